"""A run that goes on is the run that never stopped: from every checkpoint, on other hardware, after damage, under a wrong clock."""

import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lab import train
from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Window
from llama_lab.data.prepare import prepare
from llama_lab.data.stream import TokenStream
from llama_lab.inference.observers import OBSERVERS
from llama_lab.training.console import Console
from llama_lab.training.launch import launch
from llama_lab.training.loop import build
from llama_lab.training.metrics import read_rows
from llama_lab.training.observing import Observers
from llama_lab.training.processes.stop import Stopped
from llama_lab.training.processes.worker import Place, Worker
from llama_lab.training.run_folder import RunFolder, open_run
from llama_lab.training.saving.manifest import list_checkpoints
from llama_lab.training.state import resume

from .conftest import rewind, steady, tiny_overrides
from .kill_runs import Bench, differences, loss_difference, survive
from .processes import Gate, Process, command, end_of, started

ORIGIN = {"command": None, "code": {"sha256": "0" * 64}, "versions": {}, "machine": {"host": "here"}, "data": {}}


def moved(folder: Path, name: str) -> Path:
    """A copy of a run's folder, to compare with after the run itself has gone on."""
    return Path(shutil.copytree(folder, folder.parent.parent / name))


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[-1].path


def newest_folder(folder: Path) -> Path:
    """The newest checkpoint, whole or not."""
    return max((folder / "checkpoints").glob("tokens-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_each_of_its_checkpoints_and_from_each_side_of_an_epochs_edge(tiny, text):
    """The first epoch ends with an update, so one of the checkpoints lies exactly on its edge."""
    length, windows = length_that_divides(tiny)
    share = windows // 4  # an epoch is 4 updates
    words = [f"data.max_seq_len={length}", f"data.tokens_per_update={length * share}", f"training_tokens={10 * length * share}"]
    words += [
        "checkpoint.every_tokens=1",
        "checkpoint.keep=100",
        "log.every_updates=3",
        "sample.first_tokens=5000",
        "sample.growth=1",
    ]
    whole = train(tiny(*words, "model.dropout=0.1"))
    assert whole.updates == 10
    unbroken = moved(whole.folder, "unbroken")
    for update in range(10, 0, -1):
        rewind(whole.folder, update)
        train(tiny(*words, "model.dropout=0.1"))
        assert differences(unbroken, whole.folder) == [], f"after update {update}"
    shutil.rmtree(whole.folder / "checkpoints")
    RunFolder(whole.folder).write_summary(status="running")
    train(tiny(*words, "model.dropout=0.1"))
    assert differences(unbroken, whole.folder) == [], "killed before the first checkpoint"


def length_that_divides(tiny) -> tuple[int, int]:
    """A window length that cuts the text into a multiple of 4 windows, and their number."""
    data = prepare(tiny().data, tiny().tokenizer, print)
    for length in range(24, 80):
        windows = TokenStream(data.sources[0].train, max_seq_len=length, window=Window.contiguous).windows
        if windows % 4 == 0:
            return length, windows
    raise AssertionError("no length fits")


@pytest.mark.parametrize("other", ["hardware.micro_batch=3", "hardware.processes=2"])
def test_a_run_that_goes_on_on_other_hardware_is_fed_the_same(tiny, other):
    whole = train(tiny("optim=adamw"))
    unbroken = moved(whole.folder, "unbroken")
    rewind(whole.folder, 8)
    train(tiny("optim=adamw", other))
    assert loss_difference(unbroken, whole.folder) < 1e-5
    assert read_rows(unbroken / "batches.jsonl") == read_rows(whole.folder / "batches.jsonl") != []
    seconds = [row["seconds"] for row in read_rows(whole.folder / "metrics.jsonl")]
    assert seconds == sorted(seconds), "over both starts"


def test_a_rank_that_finds_another_state_is_named(tiny, tmp_path):
    """As on a disk that the machines do not share."""

    class Elsewhere(Worker):
        def agree(self, flag: bool) -> bool:
            return True

        def agree_on(self, number: int) -> bool:
            return False

    run = resolve(tiny())
    alone = Worker(Place(), torch.device("cpu"))
    model, optimizer = build(run, prepare(run.data, run.tokenizer, print), alone)
    with (
        Console(tmp_path / "train.log", total=run.updates) as console,
        pytest.raises(RuntimeError, match="rank 1 finds update 0, others another: is the run folder on a shared disk"),
    ):
        resume(run, RunFolder(tmp_path), model, optimizer, Elsewhere(Place(1, 2), torch.device("cpu")), console)


def test_random_numbers_drawn_elsewhere_leave_no_trace(tiny):
    """Every draw of a run comes from a generator of its own, so no state of a generator has to be saved."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        folders.append(train(tiny("model.dropout=0.1", f"name=seed{seed}")).folder)
    assert differences(*folders) == []


DAMAGE = {
    "flipped": (
        lambda path: flip(path / "model.safetensors"),
        r"model\.safetensors is not what was saved \(its checksum differs\)",
    ),
    "cut": (lambda path: os.truncate(path / "state.safetensors", 100), r"state\.safetensors is not what was saved"),
    "missing": (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_it_used(tiny, capsys, kind):
    run = train(tiny("checkpoint.keep=2", "checkpoint.keep_best=null"))
    unbroken = moved(run.folder, "unbroken")
    damage, message = DAMAGE[kind]
    damaged = newest(run.folder)
    damage(damaged)
    RunFolder(run.folder).write_summary(status="running")
    capsys.readouterr()
    assert train(tiny("checkpoint.keep=2", "checkpoint.keep_best=null")).status == "finished"
    out = capsys.readouterr().out
    assert re.search(message + rf".*; its checkpoint is put aside as damaged-{damaged.name}", out)
    assert "Continuing after update 16 of 20 (tokens-000000000008192)" in out
    assert (run.folder / "checkpoints" / f"damaged-{damaged.name}").is_dir()
    assert [checkpoint.update for checkpoint in list_checkpoints(run.folder / "checkpoints")] == [16, 20]
    assert differences(unbroken, run.folder) == []


@pytest.mark.parametrize("kind", ["missing", "torn"])
def test_a_checkpoint_without_a_whole_manifest_is_named_and_put_aside(tiny, capsys, kind):
    run = train(tiny())
    manifest = newest(run.folder) / "manifest.json"
    manifest.unlink() if kind == "missing" else manifest.write_bytes(manifest.read_bytes()[:100])
    RunFolder(run.folder).write_summary(status="running")
    capsys.readouterr()
    assert train(tiny()).status == "finished"
    what = "is missing" if kind == "missing" else "is not what was saved (its checksum differs)"
    assert f"{manifest} {what}; its checkpoint is put aside as damaged-{manifest.parent.name}\n" in capsys.readouterr().out
    assert list((run.folder / "checkpoints").glob("damaged-tokens-000000000010240"))


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_where_no_checkpoint_can_be_read_nothing_is_overwritten(tiny, name, capsys):
    run = train(tiny())
    for checkpoint in list_checkpoints(run.folder / "checkpoints"):
        flip(checkpoint.path / name)
    RunFolder(run.folder).write_summary(status="running")
    rows = (run.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train(tiny())
    rule = "is not what was saved (its checksum differs); no checkpoint of this run is whole: the command that trained it, with "
    rule += "fresh=true, moves it aside and starts anew"
    assert str(caught.value) == f"1 problem in continuing this run\n  {newest_folder(run.folder) / name} {rule}"
    assert "put aside" not in capsys.readouterr().out
    assert (run.folder / "metrics.jsonl").read_bytes() == rows
    assert len(list((run.folder / "checkpoints").glob("tokens-*"))) == 5


def stops(model, data, run, worker, stopped):
    raise Stopped


def observers_that_stop() -> Observers:
    """A stop is asked for in the middle of the first validation."""
    return replace(OBSERVERS, evaluate=stops)


def test_a_killed_run_that_is_stopped_at_once_says_where_it_goes_on(tiny, capsys):
    """It had come further than its checkpoint, whose validation is made again."""
    run = tiny("checkpoint.every_tokens=2560")
    folder = train(run).folder
    rewind(folder, 10)
    stopped = launch(run, observers_that_stop)
    assert (stopped.status, stopped.updates, stopped.tokens) == ("preempted", 10, 5120)
    assert "Stopped after update 10 of 20; the same command goes on from there" in capsys.readouterr().out
    summary = RunFolder(folder).summary()
    assert (summary["update"], summary["tokens"]) == (10, 5120)


@pytest.mark.parametrize("content", ["", '{"status": "fini', "[]", "\0" * 40], ids=["empty", "cut", "list", "zeros"])
def test_a_damaged_summary_is_taken_to_be_empty(tiny, content):
    run = train(tiny("training_tokens=2048"))
    rows = read_rows(run.folder / "metrics.jsonl")
    (run.folder / "summary.json").write_text(content)
    assert RunFolder(run.folder).summary() == {}
    again = train(tiny("training_tokens=2048"))
    assert (again.status, again.updates) == ("finished", 4)
    assert RunFolder(run.folder).summary()["status"] == "finished"
    assert [row["update"] for row in read_rows(run.folder / "metrics.jsonl")] == [row["update"] for row in rows]


@pytest.mark.parametrize("content", ["", '{"run_id": "lla'], ids=["empty", "cut"])
def test_a_damaged_origin_is_named_with_what_to_do(tiny, content):
    run = train(tiny("training_tokens=2048"))
    meta = run.folder / "meta.json"
    RunFolder(run.folder).write_summary(status="running")
    meta.write_text(content)
    with pytest.raises(ConfigError) as caught:
        train(tiny("training_tokens=2048"))
    rule = "is empty or cut, and a run is not continued without knowing what it came from; put it back from a copy, or move it "
    rule += "away to go on all the same, or start the run anew with fresh=true"
    assert str(caught.value) == f"1 problem in this run\n  {meta} {rule}"
    meta.unlink()
    assert train(tiny("training_tokens=2048")).status == "finished"
    RunFolder(run.folder).write_summary(status="running")
    meta.write_text(content)
    assert train(tiny("training_tokens=2048", "fresh=true")).status == "finished"
    assert run.folder.with_name(f"{run.folder.name}.1").is_dir()


def test_where_a_run_came_from_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: [steps.append("kept"), fsync(handle)][1])
    monkeypatch.setattr(os, "replace", lambda *paths: [steps.append(paths[1].name), rename(*paths)][1])
    folder = RunFolder(tmp_path)
    folder.write_meta(run_id="x")
    folder.write_summary(update=1)  # with every row, so it does not wait
    assert steps == ["kept", "meta.json", "summary.json"]
    assert (folder.meta(), folder.summary()) == ({"run_id": "x"}, {"update": 1})


def test_files_that_a_kill_left_half_written_are_gone(tiny):
    run = train(tiny())
    rewind(run.folder, 8)
    for name in (".summary.json.draft", ".metrics.jsonl.draft", ".config.yaml.draft"):
        (run.folder / name).write_text('{"half')
    for name in (".draft-tokens-000000000009999", ".removed-tokens-000000000000001"):
        shutil.copytree(newest(run.folder), run.folder / "checkpoints" / name)
    train(tiny())
    assert [path.name for path in run.folder.rglob(".*")] == []


def test_changed_code_is_named_by_its_commit(tiny):
    run = train(tiny())
    meta = RunFolder(run.folder).meta()
    RunFolder(run.folder).write_meta(code=meta["code"] | {"sha256": "f" * 64, "commit": "0123456789abcdef"})
    RunFolder(run.folder).write_summary(status="running")
    with pytest.raises(ConfigError) as caught:
        train(tiny())
    assert f"the source code changed from {'f' * 12} (commit 0123456789ab) to {meta['code']['sha256'][:12]}" in str(caught.value)
    assert "since this run began; fresh=true starts it anew, accept_changes=true goes on" in str(caught.value)


def test_a_run_that_has_saved_nothing_begins_with_the_code_of_today(tiny, outputs):
    run = train(tiny())
    rows = steady(run.folder)
    rewind(run.folder, 0)
    RunFolder(run.folder).write_meta(code={"sha256": "f" * 64})
    again = train(tiny())
    assert (again.status, again.folder) == ("finished", run.folder)
    assert steady(run.folder) == rows
    assert RunFolder(run.folder).meta()["code"]["sha256"] != "f" * 64


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_an_automatic_restart_goes_on_although_fresh_was_typed(tiny, monkeypatch, variable):
    run = train(tiny())
    rewind(run.folder, 8)
    monkeypatch.setenv(variable, "1")
    assert train(tiny("fresh=true")).status == "finished"
    assert len(RunFolder(run.folder).meta()["starts"]) == 2
    assert not run.folder.with_name(run.folder.name + ".1").exists()


def test_a_second_launch_is_refused_with_who_holds_the_run(tiny, tmp_path):
    path = tmp_path / "outputs" / "tiny" / "run"
    with open_run(tiny(), path, origin=ORIGIN):
        since = json.loads((path.parent / ".locks" / "run.json").read_text())["since"]
        with pytest.raises(ConfigError) as caught, open_run(tiny(), path, origin=ORIGIN):
            pass
    assert str(caught.value) == (
        f"1 problem in this run\n  {path} is being trained by process {os.getpid()} on {socket.gethostname()} since {since}; "
        "wait for it, or change name=… or the config"
    )
    with open_run(tiny(), path, origin=ORIGIN):
        pass


def test_of_two_launches_at_once_one_trains_and_the_other_is_refused(tmp_path, tiny, text, outputs):
    prepare(tiny().data, tiny().tokenizer, print)
    gate = Gate("update 5", tmp_path)
    with started(gate.before(command(text))) as one, started(gate.before(command(text))) as other:
        refused, trains = wait_for_one(one, other)
        assert refused.returncode == 2
        assert "is being trained by " in end_of(refused)
        gate.open()
        said = end_of(trains)
    assert trains.returncode == 0, said
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert len(RunFolder(folder).meta()["starts"]) == 1
    assert [row["update"] for row in read_rows(folder / "batches.jsonl")] == list(range(1, 21))


def wait_for_one(one: Process, other: Process) -> tuple[Process, Process]:
    """The one of two processes that has ended first, and the other."""
    deadline = time.monotonic() + 120
    while one.poll() is None and other.poll() is None:
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return (one, other) if one.poll() is not None else (other, one)


JUMPING = """
import itertools, sys, time
from llama_lab.cli import main
real, jumps = time.time, itertools.cycle([0, 86_400, -86_400 * 365, 7])
time.time = lambda: real() + next(jumps)
sys.exit(main(sys.argv[1:]))
"""


def test_a_clock_that_jumps_leaves_no_trace(tiny, text, outputs):
    steady = train(tiny("name=steady"))
    done = subprocess.run(
        [sys.executable, "-c", JUMPING, "train", *tiny_overrides(text), "name=jumping"], capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "jumping").glob("llama_3m*")
    assert differences(steady.folder, folder) == []
    rows = read_rows(folder / "metrics.jsonl")
    assert all(before["seconds"] <= after["seconds"] for before, after in itertools.pairwise(rows))
    assert all(row["speed/tokens_per_second"] > 0 for row in rows if "train/loss" in row)


def test_more_tokens_for_a_finished_run_say_how_to_extend_it(tiny, capsys):
    short = train(tiny())
    capsys.readouterr()
    train(tiny("optim.max_lr=0.001", "training_tokens=10752"))
    assert "A finished run of" not in capsys.readouterr().out
    train(tiny("training_tokens=10752"))
    # The cool-down of the finished run began after update 10; what goes on from it starts at the checkpoint before that.
    assert (
        "A finished run of 10,240 tokens differs in its budget alone. To go on from it instead of from nothing:\n"
        f"  llama-lab fork {short.folder} --update 8 training_tokens=10752"
    ) in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_inside_a_save_ends_as_if_it_never_was(tmp_path, capsys, processes):
    """The short form of `python tests/training/kill_runs.py`."""
    assert survive(Bench(tmp_path), kills=1, seed=0, processes=(processes,), moments=("save",)) == 0
    assert "1 of 1 as if never killed" in capsys.readouterr().out
