"""Saving beside training: the copy is of one moment, failures are said and survived, and the right checkpoints stay."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llama_lab import train
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import save_config
from llama_lab.data.prepare import prepare
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving import retention, saver
from llama_lab.training.saving.checkpoint import load_checkpoint
from llama_lab.training.saving.manifest import list_checkpoints
from llama_lab.training.saving.retention import beside_free, need, retained
from llama_lab.training.saving.saver import HostCopy, Saver

from .conftest import tiny_overrides

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def started(tiny, tmp_path):
    """A run and its folder, as they are when the first update begins."""

    def make(*overrides: str):
        run = tiny(*overrides)
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        save_config(run, folder.path / "config.yaml")
        folder.write_meta(
            run_id="run", code={"sha256": "c", "diff": "d"}, versions={"torch": "2"}, data={"data": "f"}, wandb_id="w"
        )
        return run, folder

    return make


def model_of(value: float) -> nn.Module:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, value)
    return model


def saved_updates(folder: RunFolder) -> list[int]:
    return [checkpoint.update for checkpoint in list_checkpoints(folder.checkpoints)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_save_holds_the_moment_it_was_asked_for(started, device):
    run, folder = started()
    model = model_of(1.0).to(device)
    state = {"optimizer": {0: {"moment": torch.full((5, 5), 2.0, device=device)}}, "seconds": 1.0}
    with Saver(run, folder, torch.device(device), print) as saving:
        saving.save(4, model, state)
        saving.before_step()
        with torch.no_grad():
            model.weight.fill_(9.0)
            state["optimizer"][0]["moment"].fill_(9.0)
        assert saving.close() is None
    weights, found = load_checkpoint(list_checkpoints(folder.checkpoints)[0])
    assert weights["weight"].unique().tolist() == [1.0]
    assert found["optimizer"][0]["moment"].unique().tolist() == [2.0]


@pytest.mark.gpu
def test_the_copy_from_a_gpu_is_page_locked_and_its_memory_is_used_again():
    copy = HostCopy(torch.device("cuda"))
    for value in (1.0, 2.0, 3.0):
        tensor = torch.full((1 << 22,), value, device="cuda")
        taken = copy.take([tensor])
        copy.protect()
        tensor.fill_(-1.0)
        copy.wait()
        assert taken[0].is_pinned()
        assert taken[0].unique().tolist() == [value]
    assert len(copy.tensors) == 1


def test_the_manifest_says_what_made_the_state(started):
    run, folder = started("seed.data=3")
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        saving.save(4, model_of(1.0), {})
    (checkpoint,) = list_checkpoints(folder.checkpoints)
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert (manifest["update"], manifest["tokens"], manifest["windows"]) == (4, 2048, 64)
    assert manifest["code"] == {"sha256": "c"}
    assert manifest["versions"] == {"torch": "2"}
    assert manifest["data"] == {"data": "f"}
    assert manifest["tracker_id"] == "w"
    assert manifest["seeds"] == {"init": 0, "data": 3, "sampling": 0}
    assert (checkpoint.path / "config.yaml").read_bytes() == (folder.path / "config.yaml").read_bytes()


def test_one_save_at_a_time_and_the_next_one_waits(started, monkeypatch):
    run, folder = started()
    may_write, order = threading.Event(), []
    write = saver.save_checkpoint

    def slow(*arguments, **named):
        order.append(f"begin {named['update']}")
        assert may_write.wait(30)
        write(*arguments, **named)
        order.append(f"end {named['update']}")

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        saving.save(1, model_of(1.0), {})
        saving.report()
        assert order != ["begin 1", "end 1"]  # the loop was not kept
        threading.Timer(0.1, may_write.set).start()
        saving.save(2, model_of(2.0), {})
        assert order[:2] == ["begin 1", "end 1"]
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]
    assert saved_updates(folder) == [1, 2]


def test_saves_that_come_faster_than_they_are_written_are_said_once(started, monkeypatch):
    run, folder = started()
    write, said = saver.save_checkpoint, []

    def slow(*arguments, **named):
        time.sleep(0.1)
        write(*arguments, **named)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    with Saver(run, folder, torch.device("cpu"), said.append) as saving:
        for update in range(1, 4):
            saving.save(update, model_of(1.0), {})
        assert said == []  # too short to matter
        monkeypatch.setattr(saver, "TOLD_SECONDS", 0.25)
        for update in range(4, 8):
            saving.save(update, model_of(1.0), {})
        saving.close()
    (line,) = said
    assert re.fullmatch(
        r"Training has waited \d+ of the last \d+ s for checkpoints to be written, which takes \d\.\d s each; "
        r"a larger checkpoint\.every_tokens, or auto, trains faster",
        line,
    )
    assert folder.summary()["save_seconds"] >= 0.1


def test_a_failed_save_is_said_once_and_the_next_one_succeeds(started):
    run, folder = started()
    said = []
    with Saver(run, folder, torch.device("cpu"), said.append) as saving:
        saving.save(1, model_of(1.0), {})
        saving.wait()
        aside = folder.checkpoints.rename(folder.path / "elsewhere")
        folder.checkpoints.write_text("a file in place of the folder")
        saving.save(2, model_of(2.0), {})
        saving.wait()
        saving.report()
        folder.checkpoints.unlink()
        aside.rename(folder.checkpoints)
        saving.save(3, model_of(3.0), {})
        assert saving.close() is None
    (line,) = said
    assert line.startswith("The checkpoint after update 2 could not be written (")
    assert "Training goes on; there is none before it" in line
    assert saved_updates(folder) == [1, 3]


def test_a_disk_without_room_is_found_out_before_anything_is_written(started, monkeypatch):
    run, folder = started()
    said = []
    with Saver(run, folder, torch.device("cpu"), said.append) as saving:
        saving.save(1, model_of(1.0), {})
        saving.wait()
        monkeypatch.setattr(saver, "free_bytes", lambda folder: 1000)
        saving.save(2, model_of(2.0), {})
        failure = saving.close()
    assert said == [
        "The checkpoint after update 2 could not be written (it takes 66.6 kB, 1 kB are free). Training goes on; "
        "the one after update 1 stays. Make room on that disk, or lower checkpoint.keep; the next one is tried as planned"
    ]
    assert failure == (
        "the checkpoint after update 2, the last one, could not be written (it takes 66.6 kB, 1 kB are free); "
        "the one after update 1 stays. Make room on that disk and type the same command again, which goes on from what is saved"
    )
    assert saved_updates(folder) == [1]


def test_a_checkpoint_is_given_up_only_where_it_does_not_fit(started, monkeypatch):
    """What is asked for is what is written and a little, though many tensors make long headers."""
    run, folder = started()
    model = nn.ModuleList(nn.Linear(50, 50) for _ in range(100))
    size, before = sum(weight.nbytes for weight in model.parameters()), folder.path / "checkpoints"
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        monkeypatch.setattr(saver, "free_bytes", lambda folder: 1.2 * size)
        saving.save(1, model, {})
        assert saving.close() is None
    written = sum(file.stat().st_size for file in before.rglob("*") if file.is_file())
    assert size < written < size + saver.MARGIN_BYTES + saver.TENSOR_BYTES * 200 < 1.2 * size


def test_an_error_of_the_program_is_raised_in_the_loop(started):
    run, folder = started()
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        saving.save(1, model_of(1.0), {"no plain type": object()})
        with pytest.raises(TypeError, match="is a object; a checkpoint takes tensors and plain types only"):
            saving.wait()


def rows(folder: RunFolder, losses: dict[int, float]) -> None:
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"update": update, "val/loss": loss}) + "\n" for update, loss in losses.items())


def test_the_newest_the_best_and_those_for_good_stay(started):
    run, folder = started("checkpoint.keep=2", "checkpoint.keep_best=1", "checkpoint.keep_every_tokens=2560")
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        for update, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.0, 6: 1.5, 7: 1.4, 8: 0.9}.items():
            saving.save(update, model_of(1.0), {})
            saving.wait()
            rows(folder, {update: loss})
        assert saved_updates(folder) == [2, 5, 7, 8]
        saving.close()
    # After the last validation, 8 is the best: 2 need not stay. 5 passed a multiple of 2,560 tokens.
    assert saved_updates(folder) == [5, 7, 8]


def test_a_row_that_is_half_written_is_read_once_it_is_whole(started):
    run, folder = started("checkpoint.keep=1", "checkpoint.keep_best=1")
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        rows(folder, {1: 2.0})
        with (folder.path / "metrics.jsonl").open("a") as file:
            file.write('{"update": 2, "val/loss": 1')
            file.flush()
            saving.save(1, model_of(1.0), {})
            saving.wait()
            file.write(".5}\n")
        for update in (2, 3):
            saving.save(update, model_of(1.0), {})
            saving.wait()
        assert saved_updates(folder) == [2, 3]
        assert saving.close() is None


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux names open files")
def test_rows_are_on_the_disk_before_the_checkpoint_that_follows_them(started, monkeypatch):
    run, folder = started()
    rows(folder, {1: 2.0})
    synced, fsync = [], os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with Saver(run, folder, torch.device("cpu"), print) as saving:
        saving.save(1, model_of(1.0), {})
        saving.wait()
    assert synced.index("metrics.jsonl") < synced.index("manifest.json")


def test_a_resumed_run_knows_the_losses_of_before(started):
    run, folder = started("checkpoint.keep=1", "checkpoint.keep_best=1")
    for update, loss in {1: 1.0, 2: 2.0, 3: 3.0}.items():
        with Saver(run, folder, torch.device("cpu"), print) as saving:
            saving.save(update, model_of(1.0), {})
            saving.wait()
            rows(folder, {update: loss})
            saving.close()
    assert saved_updates(folder) == [1, 3]


def test_a_checkpoint_without_validation_is_never_the_best(tiny):
    run = tiny("checkpoint.keep=1", "checkpoint.keep_best=2")
    assert retained(run, [1, 2, 3, 4], {}) == {4}
    assert retained(run, [1, 2, 3, 4], {1: 2.0, 2: 1.0, 3: 1.0, 9: 0.1}) == {2, 3, 4}
    assert retained(tiny("checkpoint.keep=1", "checkpoint.keep_best=null"), [1, 2], {1: 0.0}) == {2}


def test_of_equal_losses_the_earlier_is_the_best(tiny):
    run = tiny("checkpoint.keep=1", "checkpoint.keep_best=1")
    assert retained(run, [1, 2, 3, 4], {1: 2.0, 2: 1.0, 3: 1.0}) == {2, 4}


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.keep=2", "checkpoint.keep_best=1"],
        ["checkpoint.keep=1", "checkpoint.keep_best=null", "checkpoint.keep_every_tokens=3000"],
        ["checkpoint.keep=10", "checkpoint.every_tokens=null"],
        ["checkpoint.keep=1", "checkpoint.every_tokens=1", "eval=null"],
    ],
)
def test_the_disk_that_was_said_is_what_a_run_takes(tiny, overrides, monkeypatch):
    most, written, prune = 0, 0, Saver._prune

    def counted(saving: Saver) -> None:
        nonlocal most, written
        most = max(most, len(list_checkpoints(saving._folder.checkpoints)))
        written += 1
        prune(saving)

    monkeypatch.setattr(Saver, "_prune", counted)
    run = tiny(*overrides)
    needed = need(run, 257)
    folder = train(run).folder
    assert needed.written == written - 1  # pruned once more at the end
    assert most <= needed.most <= most + 1
    kept = list_checkpoints(folder / "checkpoints")
    assert needed.newest + needed.permanent <= len(kept) + 1
    assert len(kept) <= needed.newest + needed.best + needed.permanent
    size = sum(path.stat().st_size for path in kept[-1].path.glob("*.safetensors"))
    assert size == pytest.approx(needed.each, rel=0.1)


def test_the_disk_is_said_before_the_run_and_refused_if_it_holds_not_one(tiny, monkeypatch, capsys, outputs):
    run = tiny("checkpoint.keep=2", "checkpoint.keep_best=1")
    train(run)
    each = 313
    beginning = f"Checkpoints: {each} kB each, at most 4 at once (2 newest, the best, 1 being written), 1.25 MB; "
    assert beginning in capsys.readouterr().out
    monkeypatch.setattr(retention, "free_bytes", lambda folder: 400_000)
    said = beside_free(need(run, 257), outputs)
    assert f"Checkpoints: {said}" == f"{beginning}400 kB free, which is enough for 1 more: make room, or lower checkpoint.keep"
    monkeypatch.setattr(retention, "free_bytes", lambda folder: 200_000)
    with pytest.raises(ConfigError) as caught:
        train(tiny("name=other"))
    rule = f"checkpoints has 200 kB free, a checkpoint of this run takes {each} kB; make room on that disk, or set"
    assert rule in str(caught.value)
    assert not (outputs / "other").exists()


LIMITED = """
import resource, sys
from llama_lab.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("size", [1000, 3000])
def test_a_disk_that_takes_no_small_file_ends_in_one_sentence_and_loses_nothing(tiny, text, outputs, size):
    """config.yaml is the first that does not fit, or tokenizer.json; what a run had before is still there."""
    prepare(tiny().data, tiny().tokenizer, print)
    words = ["train", *tiny_overrides(text)]
    command = [sys.executable, "-c", LIMITED, str(size), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=outputs.parent)
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"ConfigError: 1 problem in this run\n  {folder.relative_to(outputs.parent)} cannot be written: File too large; lift the "
        "limit on the size of a file (ulimit -f shows it) and type the same command again, which goes on from there, or set "
        "LLAMA_LAB_OUTPUTS to a folder with room that you may write to\n"
    )
    train(tiny())
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    RunFolder(folder).write_summary(status="running")
    assert subprocess.run(command, capture_output=True, timeout=170).returncode == 2
    assert (folder / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert train(tiny()).status == "finished"
    assert read_rows(folder / "metrics.jsonl")[-1]["update"] == 20


def test_outputs_that_cannot_be_written_are_named(tiny, outputs, monkeypatch):
    outputs.write_text("a file where the folder should be")
    monkeypatch.chdir(outputs.parent)
    with pytest.raises(ConfigError) as caught:
        train(tiny())
    rule = "cannot be written: Not a directory; move the file that is in its place, or set LLAMA_LAB_OUTPUTS to a folder with room"
    assert str(caught.value) == f"1 problem in this run\n  outputs/tiny {rule} that you may write to"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system without blocks")
def test_a_file_system_that_counts_no_bytes_is_not_full(tiny):
    assert retention.free_bytes(Path("/proc/x")) == math.inf
    assert beside_free(need(tiny(), 257), Path("/proc/x")) == need(tiny(), 257).said()


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_takes_no_checkpoint_costs_no_update_and_the_run_can_be_resumed(tiny, text, outputs, processes):
    """The limit on a file's size stands for a full disk: small files are still written, as by the few bytes left there."""
    prepare(tiny().data, tiny().tokenizer, print)
    words = ["train", *tiny_overrides(text), f"hardware.processes={processes}", "name=full"]
    done = subprocess.run([sys.executable, "-c", LIMITED, "60000", *words], capture_output=True, text=True, timeout=170)
    assert done.returncode == 1, done.stderr
    (folder,) = (outputs / "full").glob("llama_3m*")
    limit = "there is none before it. Lift the limit on the size of a file (ulimit -f shows it)"
    said = f"The checkpoint after update 4 could not be written (File too large). Training goes on; {limit}; the next one is tried"
    assert said in done.stdout
    assert f"the checkpoint after update 20, the last one, could not be written (File too large); {limit} and type" in done.stderr
    assert [row["update"] for row in read_rows(folder / "metrics.jsonl") if "val/loss" in row] == [5, 10, 15, 20]
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert not list(folder.glob("checkpoints/.draft-*")), "half a checkpoint fills the disk"
    again = subprocess.run([sys.executable, "-m", "llama_lab", *words], capture_output=True, text=True, timeout=170)
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert list_checkpoints(folder / "checkpoints")[-1].update == 20
