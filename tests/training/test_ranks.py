"""Several processes as one run: what becomes of the others when one dies, fails or stands still."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_lab import train
from llama_lab.config.resolve import resolve
from llama_lab.training.processes.board import Board, Failure, Whereabouts
from llama_lab.training.processes.watchdog import Watchdog
from llama_lab.training.processes.worker import Place, join
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.manifest import list_checkpoints

from .conftest import assert_same_run, tiny_overrides
from .processes import ENDLESS, TORCHRUN, Gate, command, end_of, folder_of, rank_process, rows_of, started, status_of, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several processes, stopped and continued as Linux does it")

SMALL = ["data.tokens_per_update=128", "hardware.micro_batch=2", "log.every_updates=5"]
# Observers of our own, handed in as the suite hands in its own: a real fault in the middle of a real run.
FAULTY = """
import sys, threading
from llama_lab import compose
from llama_lab.training.launch import launch
from llama_lab.training.observing import Observers

def fails(model, data, run, worker, stopped):
    if worker.place.rank == run.hardware.processes - 1:
        raise ValueError("the fault of one")
    worker.agree(False)

def hangs(model, data, run, worker, stopped):
    if worker.place.rank == run.hardware.processes - 1:
        threading.Event().wait()
    worker.agree(False)

def observers_that_fail():
    return Observers(evaluate=fails, score=lambda *_: {}, sample=lambda *_: [])

def observers_that_hang():
    return Observers(evaluate=hangs, score=lambda *_: {}, sample=lambda *_: [])

if __name__ == "__main__":
    launch(compose(sys.argv[2:]), {"fail": observers_that_fail, "hang": observers_that_hang}[sys.argv[1]], handle_signals=True)
"""


def words(text: Path, *more: str) -> list[str]:
    return command(text, *ENDLESS, *SMALL, *more)


def faulty(tmp_path: Path, text: Path, fault: str, *more: str) -> list[str]:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    return [str(script), fault, *tiny_overrides(text), "eval.every_updates=4", "sample=null", *more]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"


def test_a_killed_worker_is_named_and_ends_the_others(text: Path, outputs: Path) -> None:
    with started(words(text, "name=killed", "hardware.processes=2")) as process:
        wait_for(lambda: len(rows_of(outputs, "killed")) > 1, process)
        workers = [wait_for(lambda rank=rank: rank_process(outputs, "killed", rank), process) for rank in (0, 1)]
        os.kill(workers[1], signal.SIGKILL)
        start = time.monotonic()
        said = end_of(process)
        assert process.returncode == 1
        assert time.monotonic() - start < 30
        assert not any(is_alive(worker) for worker in workers)
    message = "rank 1 was killed by SIGKILL (the system does that when memory runs out; see dmesg); the others were ended"
    assert said.rstrip().endswith(f"RankFailed: {message}")
    assert "Traceback" not in said
    assert status_of(outputs, "killed") == "failed"
    assert message in (folder_of(outputs, "killed") / "train.log").read_text()
    assert not list(outputs.glob("killed/.locks/*.ranks"))


@pytest.mark.parametrize("start", ["spawn", "torchrun"])
def test_the_traceback_of_the_rank_that_failed_is_what_is_seen(tmp_path: Path, text: Path, outputs: Path, start: str) -> None:
    launcher = TORCHRUN if start == "torchrun" else [sys.executable]
    done = subprocess.run(
        [*launcher, *faulty(tmp_path, text, "fail", "name=faulty", "hardware.processes=2")],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 1
    assert done.stderr.count("ValueError: the fault of one") == 1
    assert "gloo" not in done.stderr
    log = (folder_of(outputs, "faulty") / "train.log").read_text()
    assert re.search(r"rank 1 has failed\nTraceback .*?ValueError: the fault of one\n", log, re.DOTALL)
    assert status_of(outputs, "faulty") == "failed"
    if start == "torchrun":
        assert "rank 0 ends, because rank 1 has failed" in done.stderr


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_does_not_answer_is_named_with_its_place(text: Path, outputs: Path, stopped: int) -> None:
    with started(words(text, "name=silent", "hardware.processes=2", "hardware.timeout_seconds=3")) as process:
        wait_for(lambda: len(rows_of(outputs, "silent")) > 1, process)
        worker = wait_for(lambda: rank_process(outputs, "silent", stopped), process)
        os.kill(worker, signal.SIGSTOP)
        said = end_of(process)
        assert process.returncode == 1
        assert not is_alive(worker)
    assert re.search(rf"RankFailed: rank {stopped} \(process {worker} on \S+\) does not answer any more; it was in ", said)
    assert "(hardware.timeout_seconds=3); train.log has the Python stacks" in said
    log = (folder_of(outputs, "silent") / "train.log").read_text()
    assert f"rank {1 - stopped}: Python stacks\n" in log
    assert 'loop.py", line' in log
    assert status_of(outputs, "silent") == "failed"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_that_stands_still_is_named_with_its_place(tmp_path: Path, text: Path, outputs: Path, processes: int) -> None:
    with started(
        [
            sys.executable,
            *faulty(tmp_path, text, "hang", "name=hang", f"hardware.processes={processes}", "hardware.timeout_seconds=3"),
        ]
    ) as process:
        said = end_of(process)
        assert process.returncode == 1
    place = r"it is in the validation after update 4 \(observe, observing\.py:\d+\)"
    assert re.search(rf"rank {processes - 1} has made no progress for \d+ s; {place} \(hardware.timeout_seconds=3\)", said)
    log = (folder_of(outputs, "hang") / "train.log").read_text()
    assert "faulty.py" in log
    assert "in hangs" in log
    assert all(f"rank {rank}: Python stacks\n" in log for rank in range(processes))
    assert status_of(outputs, "hang") == "failed"


def test_torchrun_goes_on_by_itself_after_a_worker_was_killed(tmp_path: Path, tiny, text: Path, outputs: Path) -> None:
    short = [*SMALL, "training_tokens=5120", "checkpoint.every_tokens=512", "eval=null", "sample=null"]
    gate = Gate("update 20", tmp_path)
    with started([*TORCHRUN, "--max-restarts=1", *gate.before(command(text, *short, "name=restarted"))[1:]]) as process:
        gate.wait_for(process, 2)
        wait_for(lambda: list((outputs / "restarted").glob("*/checkpoints/tokens-000000000002048/manifest.json")), process)
        os.kill(wait_for(lambda: rank_process(outputs, "restarted", 1), process), signal.SIGKILL)
        gate.open()
        said = end_of(process, 170)
    assert process.returncode == 0, said
    assert "Continuing after update 16 of 40" in said
    unbroken = train(tiny(*short, "name=unbroken", "hardware.processes=2"))
    assert_same_run(unbroken.folder, folder_of(outputs, "restarted"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_torchrun_that_ends_leaves_a_saved_run_and_no_workers(tmp_path: Path, text: Path, outputs: Path, number: int) -> None:
    gate = Gate("update 20", tmp_path)
    with started([*TORCHRUN, *gate.before(words(text, "name=preempted"))[1:]]) as process:
        workers = gate.wait_for(process, 2)
        process.send_signal(number)
        process.wait(60)
        assert process.returncode != 0
        deadline = time.monotonic() + 100
        while any(is_alive(worker) for worker in workers):
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.05)
    assert status_of(outputs, "preempted") == "preempted"
    assert [checkpoint.update for checkpoint in list_checkpoints(folder_of(outputs, "preempted") / "checkpoints")] == [20]


@pytest.mark.parametrize(
    "script",
    ["train(run)", "if '__main__' in __name__ or True: train(run)"],
    ids=["no guard", "a guard that guards nothing"],
)
def test_a_script_that_each_process_would_run_again_is_told_what_to_type(
    tmp_path: Path, text: Path, outputs: Path, script: str
) -> None:
    given = words(text, "hardware=ddp", "hardware.device=cpu", "hardware.processes=2")
    path = tmp_path / "research.py"
    path.write_text(f"from llama_lab import compose, train\nrun = compose({given[given.index('train') + 1 :]})\n{script}\n")
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    rule = "hardware.processes=2 starts processes that begin by running this script; put what it does below"
    assert f'{rule}  if __name__ == "__main__":' in ended.stderr


def test_causes_come_before_consequences(tmp_path: Path) -> None:
    board = Board(tmp_path / "ranks")
    assert board.failures() == []
    board.report(Failure(0, "RuntimeError", "gloo/transport: closed", is_consequence=True, time=1.0))
    board.report(Failure(2, "ValueError", "mine", "Traceback …", time=3.0))
    board.report(Failure(1, "Diverged", "at update 7", time=2.0))
    board.report(Failure(1, "ValueError", "a later word of the same process", time=0.0))
    assert [failure.rank for failure in board.failures()] == [1, 2, 0]
    assert [str(failure.error()) for failure in board.failures()[:2]] == [
        "at update 7",
        "rank 2 failed, and the others were ended\nTraceback …",
    ]
    board.clear()
    assert board.failures() == []


def test_a_board_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "ranks")
    board.show(0, Whereabouts(1, 1, "here", False, 1, "host"))
    board.report(Failure(0, "", "x"))
    assert (board.everybody(), board.failures()) == ({}, [])


def test_a_process_that_was_stopped_for_long_is_not_taken_to_hang(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from pathlib import Path
from llama_lab.training.processes.watchdog import Watchdog
with Watchdog(rank=0, seconds=2, log=Path({str(tmp_path / "log")!r})) as watchdog:
    watchdog.update(1)
    watchdog.update(2)
    time.sleep(0.5)  # a few looks of the watchdog, before and after, fewer than it allows
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
print("ended well")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(3)  # longer than the watchdog allows; what is tested is the passing of time itself
        process.send_signal(signal.SIGCONT)
        out, error = process.communicate(timeout=170)
    assert (process.returncode, out, error) == (0, "ended well\n", "")


def test_a_process_that_moves_again_while_the_others_are_asked_is_not_ended(tmp_path: Path) -> None:
    code = f"""
import threading
from pathlib import Path
from llama_lab.training.processes.board import Board
from llama_lab.training.processes.watchdog import Watchdog

asked = threading.Semaphore(0)

class Moving(Board):
    def everybody(self):
        watchdog.alive()
        asked.release()
        return super().everybody()

with Watchdog(rank=0, seconds=0.5, log=Path({str(tmp_path / "log")!r}), board=Moving(Path({str(tmp_path)!r}))) as watchdog:
    watchdog.update(1)
    watchdog.update(2)
    for _ in range(5):  # twice each time that the loop has stood still for too long
        asked.acquire()
print("ended well")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended well\n", "")
    assert not (tmp_path / "log").exists()


def test_processes_that_ask_for_each_other_at_once_see_each_other(tmp_path: Path) -> None:
    board = Board(tmp_path / "ranks")
    asking, asked = (Watchdog(rank=rank, seconds=8, log=tmp_path / "log", board=board) for rank in (0, 1))
    said: list[str] = []
    threads = [threading.Thread(target=lambda watchdog=watchdog: said.append(watchdog._behind(5))) for watchdog in (asking, asked)]
    asked._show()
    for thread in threads:  # the second begins after the first has looked, and ends after it
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert len(said) == 2
    assert not any("does not answer" in words for words in said)


def test_processes_share_the_threads_of_their_own_machine(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = resolve(tiny()).hardware
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    place = Place.from_environment()
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        with join(hardware, replace(place, rendezvous=None)):
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("mistake", "said"), [("model.n_heads=3", "model.n_heads=3 does not divide model.dim=32"), ("data.path=nowhere", "nowhere")]
)
def test_a_mistake_is_said_once_under_torchrun(text: Path, mistake: str, said: str) -> None:
    launched = [*TORCHRUN, *command(text, mistake)[1:]]
    done = subprocess.run(launched, capture_output=True, text=True, timeout=170)
    assert done.returncode != 0
    assert done.stderr.count("ConfigError: ") == 1
    assert said in done.stderr


def test_a_run_that_cannot_go_on_says_so_once_under_torchrun(tiny, text: Path) -> None:
    folder = train(tiny("training_tokens=2048")).folder
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        (checkpoint.path / "model.safetensors").write_bytes(b"")
    RunFolder(folder).write_summary(status="running")
    launched = [*TORCHRUN, *command(text, "training_tokens=2048")[1:]]
    done = subprocess.run(launched, capture_output=True, text=True, timeout=170)
    assert done.returncode != 0
    assert done.stderr.count("no checkpoint of this run is whole") == 1


def test_before_the_first_update_is_done_the_time_out_is_long(tmp_path: Path) -> None:
    settled: list[bool] = []
    watchdog = Watchdog(rank=0, seconds=2, log=tmp_path / "log", settled=lambda: settled.append(True))
    with watchdog:
        watchdog.at("the start")
        watchdog.update(1)
        watchdog.at("the validation after update 1")
        assert (watchdog._limit, settled) == (1800, [])
        watchdog.update(2)
        assert (watchdog._limit, settled) == (2, [True])
        watchdog.update(3)
        assert settled == [True]
