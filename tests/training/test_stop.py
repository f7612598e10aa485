"""Signals: asked to stop, a run ends between two steps of whatever it does, and goes on later without a trace."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from llama_lab import compose, load, train
from llama_lab.inference.evaluate import evaluate
from llama_lab.inference.generate import generate
from llama_lab.inference.options import Sampling
from llama_lab.training.processes.stop import Stop, Stopped, stop_on_signals
from llama_lab.training.saving.manifest import list_checkpoints

from .conftest import assert_same_run, tiny_overrides
from .processes import Gate, command, end_of, folder_of, rows_of, started, status_of, wait_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_asks_and_the_handlers_are_put_back(name: str) -> None:
    number = getattr(signal, name)
    before, stop = signal.getsignal(number), Stop()
    with stop_on_signals(stop, quiet=True):
        assert stop.listens
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert signal.getsignal(number) == before
    assert not stop.listens
    assert "signals" not in {thread.name for thread in threading.enumerate()}


# A library's loop of many minutes, from which Python is not asked anything.
STUCK = """
import hashlib, os, signal, threading, time
from llama_lab.training.processes.stop import ECHO_SECONDS, Stop, stop_on_signals
stop = Stop()
def send(*numbers):
    for number in numbers:
        time.sleep(ECHO_SECONDS + 0.2)
        os.kill(os.getpid(), number)
"""
LOOP = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGTERM", "SIGTERM", 143), ("SIGINT", "SIGINT", 130), ("SIGUSR1", "SIGTERM", 143)]
)
def test_a_second_signal_ends_a_process_that_is_stuck(first: str, second: str, code: int) -> None:
    sending = f"threading.Thread(target=send, args=(signal.{first}, signal.{second})).start()\n"
    done = python(f"{STUCK}with stop_on_signals(stop):\n    {sending}    {LOOP}")
    said = "Finishing the update and saving; a second signal stops at once\nStopping now; the last checkpoint stays\n"
    assert (done.returncode, done.stderr) == (code, said)


def test_a_preparation_that_is_stuck_is_ended_after_one_signal() -> None:
    sending = "threading.Thread(target=send, args=(signal.SIGTERM,)).start()\n"
    done = python(f"{STUCK}with stop_on_signals(stop), stop.at_once():\n    {sending}    {LOOP}")
    assert (done.returncode, done.stderr) == (143, "Stopped before the first update\n")


def test_signals_that_follow_each_other_at_once_are_one_request() -> None:
    """`timeout` signals a process, and then its group, which it is in."""
    longer = "from llama_lab.training.processes import stop as module\nmodule.ECHO_SECONDS = 20.0\n"
    send = "os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.05)\n"
    done = python(f"{STUCK}{longer}with stop_on_signals(stop):\n    {send}    {send}print(stop.requested())")
    assert (done.returncode, done.stdout) == (0, "True\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_before_the_first_update_a_signal_ends_at_once_and_tidies_up(name: str, code: int) -> None:
    done = python(
        f"{STUCK}try:\n    with stop_on_signals(stop), stop.at_once():\n"
        f"        os.kill(os.getpid(), signal.{name})\n        time.sleep(50)\n"
        "except KeyboardInterrupt:\n    raise SystemExit(130)\nfinally:\n    print('tidied up', flush=True)\n"
    )
    assert (done.returncode, done.stdout) == (code, "tidied up\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_stopped_while_its_text_is_prepared_leaves_nothing_in_the_way(
    tmp_path: Path, outputs: Path, name: str, code: int
) -> None:
    cache = tmp_path / "cache"
    words = [sys.executable, "-m", "llama_lab", "train", "experiment=smoke", "wandb=null", "name=early"]
    with started(words, LLAMA_LAB_CACHE=str(cache)) as process:
        wait_for(lambda: cache.is_dir() and list(cache.rglob("*.lock")), process)
        process.send_signal(getattr(signal, name))
        said = end_of(process)
    assert process.returncode == code, said
    assert "Stopped before the first update" in said
    assert "Traceback" not in said
    assert not list(outputs.glob("early/*"))


class After:
    """Says no so many times."""

    def __init__(self, times: int):
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_validation_and_generation_ask_between_their_steps(tiny) -> None:
    result = train(tiny())
    loaded = load(result.folder)
    stream = [(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64), None)] * 5

    class Stream:
        predicted_tokens, text_bytes = 80, 80

        def batches(self, *_, **__):
            return iter(stream)

    once = After(2)
    with pytest.raises(Stopped):
        evaluate(loaded.model, Stream(), micro_batch=2, stopped=once)  # pyright: ignore[reportArgumentType]
    assert once.left == -1
    assert evaluate(loaded.model, Stream(), micro_batch=2, stopped=After(5)).tokens == 80  # pyright: ignore[reportArgumentType]

    again = After(3)
    options = {"sampling": Sampling(temperature=0)}
    with pytest.raises(Stopped):
        generate(loaded.model, [[1], [2]], new_tokens=2, stopped=again, **options)
    assert again.left == -1
    assert len(generate(loaded.model, [[1], [2]], new_tokens=2, stopped=After(4), **options)) == 2


LOOKS = {
    "validation": ["eval.every_updates=3", "sample=null"],
    "samples": ["eval=null", "sample.first_tokens=1536", "sample.growth=100"],
}


@pytest.mark.parametrize(("what", "processes", "updates"), [("validation", 1, 4), ("validation", 2, 3), ("samples", 2, 4)])
def test_a_stop_cuts_validation_and_samples_short_and_they_are_made_again(
    tmp_path: Path, text: Path, outputs: Path, what: str, processes: int, updates: int
) -> None:
    """After the third update, which is the last one or not."""
    budget = [f"training_tokens={512 * updates}", "log.every_updates=1", "checkpoint.every_tokens=null"]
    short = ["schedule.warmup_updates=1", "hardware.micro_batch=4", f"hardware.processes={processes}"]
    words = [*budget, *short, *LOOKS[what]]
    gate = Gate(f"the {what} after update 3", tmp_path)
    with started(gate.before(command(text, *words, "name=stopped"))) as process:
        gate.wait_for(process, processes)
        process.send_signal(signal.SIGTERM)
        said = end_of(process)
    assert process.returncode == 75, said
    assert status_of(outputs, "stopped") == "preempted"
    folder = folder_of(outputs, "stopped")
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert checkpoint.update == 3
    assert [row["update"] for row in rows_of(outputs, "stopped") if "train/loss" in row] == [1, 2, 3]
    assert not [row for row in rows_of(outputs, "stopped") if "val/loss" in row]
    assert not (folder / "samples.jsonl").exists()
    for name in ("stopped", "unbroken"):
        train(compose([*tiny_overrides(text), *words, f"name={name}"]))
    assert_same_run(folder_of(outputs, "unbroken"), folder)


def test_a_stop_is_saved_where_the_end_would_not_be(tmp_path: Path, text: Path, outputs: Path) -> None:
    words = ["checkpoint.every_tokens=null", "checkpoint.at_end=false", "eval=null", "sample=null", "name=stopped"]
    gate = Gate("update 4", tmp_path)
    with started(gate.before(command(text, *words))) as process:
        gate.wait_for(process)
        process.send_signal(signal.SIGTERM)
        said = end_of(process)
    assert process.returncode == 75, said
    assert [checkpoint.update for checkpoint in list_checkpoints(folder_of(outputs, "stopped") / "checkpoints")] == [4]


@pytest.mark.parametrize("words", [["hardware.processes=1"], ["hardware.processes=2"], ["-m", "seed.init=0,1"]])
def test_work_goes_on_when_the_reader_of_its_output_leaves(tmp_path: Path, text: Path, outputs: Path, words: list[str]) -> None:
    gate = Gate("update 10", tmp_path)
    with started(gate.before(command(text, "name=left", *words))) as process:
        gate.wait_for(process)
        assert process.stdout is not None
        process.stdout.close()
        gate.open()
        assert process.wait(170) in (0, 1)  # 1 where plain Python had something to print
    found = [json.loads(path.read_text())["status"] for path in (outputs / "left").glob("llama_3m*/summary.json")]
    assert found == ["finished"] * (2 if "-m" in words else 1)
