"""A run as a whole: what it leaves, that it can be repeated, split and interrupted without a trace."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from llama_lab import compose, load, train
from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Device
from llama_lab.data import cache
from llama_lab.data.prepare import prepare
from llama_lab.training.announce import batch_advice
from llama_lab.training.errors import Diverged
from llama_lab.training.metrics import read_rows
from llama_lab.training.processes.worker import Place, join
from llama_lab.training.run_folder import RunFolder, relative
from llama_lab.training.saving.manifest import list_checkpoints

from .conftest import assert_same_run, final_weights, steady, tiny_overrides
from .processes import ENDLESS, Gate, command, end_of, started, wait_for


def largest_difference(first: Path, second: Path) -> float:
    expected, found = final_weights(first), final_weights(second)
    return max(float((expected[name] - found[name]).abs().max()) for name in expected)


def test_a_run_leaves_what_it_promises(tiny, capsys):
    result = train(tiny())
    assert result.status == "finished"
    assert (result.updates, result.tokens) == (20, 10240)
    names = {
        "config.yaml",
        "meta.json",
        "metrics.jsonl",
        "batches.jsonl",
        "samples.jsonl",
        "summary.json",
        "train.log",
        "tokenizer.json",
    }
    assert {path.name for path in result.folder.iterdir()} == names | {"checkpoints", "plots"}
    assert {path.name for path in (result.folder / "plots").iterdir()} == {"loss.png", "learning_rate.png", "throughput.png"}

    rows = read_rows(result.folder / "metrics.jsonl")
    training = [row for row in rows if "train/loss" in row]
    assert [row["update"] for row in training] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert abs(training[0]["train/loss"] - math.log(257)) < 0.3
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 1
    assert [row["update"] for row in rows if "val/loss" in row] == [5, 10, 15, 20]
    assert json.loads((result.folder / "summary.json").read_text())["status"] == "finished"

    meta = json.loads((result.folder / "meta.json").read_text())
    assert meta["versions"]["torch"] == version("torch")
    assert len(meta["starts"]) == 1
    out = capsys.readouterr().out
    assert "beside ln(257) = 5.5491, that of a model that knows nothing" in out
    assert "Step: 20 | Training Progress: 100.00% | Training Loss: " in out
    assert (result.folder / "train.log").read_text(encoding="utf-8").count("Step: ") == len(training)


def test_the_loss_is_the_mean_since_the_row_before(tiny):
    every = [
        row["train/loss"]
        for row in read_rows(train(tiny("log.every_updates=1", "name=each")).folder / "metrics.jsonl")
        if "train/loss" in row
    ]
    some = {row["update"]: row["train/loss"] for row in read_rows(train(tiny()).folder / "metrics.jsonl") if "train/loss" in row}
    assert some[1] == pytest.approx(every[0], rel=1e-6)
    assert some[6] == pytest.approx(sum(every[3:6]) / 3, rel=1e-6)


def test_the_same_command_again_changes_nothing(tiny, capsys):
    first = train(tiny())
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = train(tiny())
    assert (again.status, again.folder) == ("already finished", first.folder)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()} == before
    assert "Already finished" in capsys.readouterr().out


def test_a_config_that_somebody_removed_is_written_again(tiny, capsys):
    words = ["training_tokens=2048", "schedule.warmup_updates=1"]
    first = train(tiny(*words))
    config = first.folder / "config.yaml"
    before = config.read_text(encoding="utf-8")
    for status in ("finished", "running"):
        config.unlink()
        RunFolder(first.folder).write_summary(status=status)
        assert train(tiny(*words)).folder == first.folder
        assert config.read_text(encoding="utf-8") == before
        assert "config.yaml was missing; it is written again" in capsys.readouterr().out


def test_a_finished_run_is_no_answer_for_another_text(tiny, text, tmp_path, monkeypatch, capsys):
    own = tmp_path / "corpus.jsonl"
    own.write_bytes(text.read_bytes())
    words = [f"data.path={own}", "training_tokens=2048", "schedule.warmup_updates=1"]
    first = train(tiny(*words))
    # The same text needs no cache to be known.
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "empty"))
    capsys.readouterr()
    assert train(tiny(*words)).status == "already finished"
    assert capsys.readouterr().out.startswith("Already finished")

    own.write_text(own.read_text(encoding="utf-8").replace("loss", "gain"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"the data changed from \w+ to \w+ since this run was trained; fresh=true trains it anew"
    ):
        train(tiny(*words))
    assert train(tiny(*words, "accept_changes=true")).status == "already finished"
    own.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"corpus\.jsonl .*empty"):
        train(tiny(*words))
    own.unlink()
    assert train(tiny(*words)).status == "already finished"
    own.write_bytes(text.read_bytes())
    assert train(tiny(*words)).folder == first.folder


def test_fresh_moves_the_old_run_aside_and_repeats_it_bitwise(tiny):
    first = train(tiny())
    train(tiny("fresh=true"))
    aside = first.folder.with_name(first.folder.name + ".1")
    assert_same_run(aside, first.folder)


def test_validation_and_samples_leave_no_trace_in_the_curve(tiny):
    watched = train(tiny())
    alone = train(tiny("eval=null", "sample=null", "name=alone"))
    assert largest_difference(watched.folder, alone.folder) == 0.0


@pytest.mark.parametrize("overrides", [["hardware.micro_batch=1"], ["hardware.micro_batch=4"]])
def test_the_micro_batch_leaves_the_curve(tiny, overrides):
    # AdamW, because Muon orthogonalises in bf16 and so carries more float noise than the sum over micro-batches.
    whole = train(tiny("optim=adamw", "data.window=document"))
    split = train(tiny("optim=adamw", "data.window=document", "name=split", *overrides))
    assert largest_difference(whole.folder, split.folder) < 1e-5


def test_two_processes_equal_one_with_documents_of_uneven_length(tiny):
    one = train(tiny("optim=adamw", "data.window=document", "hardware.micro_batch=4"))
    two = train(tiny("optim=adamw", "data.window=document", "hardware.micro_batch=4", "hardware.processes=2", "name=two"))
    assert largest_difference(one.folder, two.folder) < 1e-6
    pairs = zip(steady(one.folder), steady(two.folder), strict=True)
    assert all(row == pytest.approx(other, rel=1e-4) for row, other in pairs)


def test_torchrun_gives_the_same_run(tiny, text, outputs):
    one = train(tiny("optim=adamw", "hardware.micro_batch=4"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llama_lab", "train"]
    overrides = [*tiny_overrides(text), "optim=adamw", "hardware.micro_batch=4", "name=torchrun"]
    done = subprocess.run([*start, *overrides], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "torchrun").glob("llama_3m*")
    assert largest_difference(one.folder, folder) < 1e-6


@pytest.mark.parametrize("overrides", [[], ["model.dropout=0.1", "optim=adamw", "data.window=document"]])
def test_a_run_that_is_killed_and_started_again_equals_one_that_never_was(tmp_path, tiny, text, outputs, overrides):
    unbroken = train(tiny("name=unbroken", *overrides))
    words, gate = command(text, "name=killed", *overrides), Gate("update 14", tmp_path)
    with started(gate.before(words)) as process:
        gate.wait_for(process)
        wait_for(lambda: list((outputs / "killed").glob("*/checkpoints/tokens-000000000006144/manifest.json")), process)
        process.kill()
    (folder,) = (outputs / "killed").glob("llama_3m*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    # A kill can leave half a row and half a checkpoint behind.
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"update": 99, "train/lo')
    (folder / "checkpoints" / ".draft-tokens-000000000099999").mkdir()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=170)
    assert not list(folder.glob("checkpoints/.draft-*"))
    assert len(json.loads((folder / "meta.json").read_text())["starts"]) == 2
    assert_same_run(unbroken.folder, folder)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_says_so_and_the_same_command_goes_on(tmp_path, tiny, text, outputs, processes):
    more = ["checkpoint.every_tokens=null", "eval=null", "sample=null", f"hardware.processes={processes}"]
    words, gate = command(text, *more, "name=stopped"), Gate("update 8", tmp_path)
    with started(gate.before(words)) as process:
        gate.wait_for(process, processes)
        process.send_signal(signal.SIGTERM)
        out = end_of(process)
    assert process.returncode == 75, out
    assert "the same command goes on from there" in out
    assert "Stopped after update 8 of 20" in out
    (folder,) = (outputs / "stopped").glob("llama_3m*")
    summary = json.loads((folder / "summary.json").read_text())
    # That of the stop and not of the last row, which is older.
    assert (summary["status"], summary["update"]) == ("preempted", 8)
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert checkpoint.update == 8
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=170)
    unbroken = train(tiny(*more, "name=unbroken"))
    assert_same_run(unbroken.folder, folder)


def test_a_run_that_is_running_is_not_started_twice(tiny, text, outputs):
    with started(command(text, *ENDLESS)) as process:
        wait_for(lambda: list((outputs / "tiny").glob("*/metrics.jsonl")), process)
        with pytest.raises(ConfigError, match=rf"is being trained by process {process.pid} on "):
            train(tiny(*ENDLESS))
        (entry,) = [entry for entry in cache.entries() if entry.path == prepare(tiny().data, tiny().tokenizer, print).folder]
        assert os.name == "nt" or not cache.remove(entry), "its data stays as well"


def test_changed_data_is_named_and_has_to_be_accepted(tiny, outputs):
    stopped = train(tiny())
    meta_path, summary_path = stopped.folder / "meta.json", stopped.folder / "summary.json"
    meta = json.loads(meta_path.read_text())
    meta["data"]["data"] = "another"
    meta["versions"]["torch"] = "1.0"
    meta_path.write_text(json.dumps(meta))
    summary_path.write_text(json.dumps({"status": "preempted"}))
    with pytest.raises(ConfigError) as caught:
        train(tiny())
    assert f"torch's version changed from 1.0 to {version('torch')} since this run began" in str(caught.value)
    assert "the data changed from another to " in str(caught.value)
    assert "accept_changes=true" in str(caught.value)
    assert train(tiny("accept_changes=true")).status == "finished"


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(tiny, outputs):
    with pytest.raises(Diverged, match=r"a lower optim\.max_lr \(now 1e\+30\)"):
        train(tiny("optim=adamw", "optim.max_lr=1e30", "optim.max_grad_norm=null"))
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert "Diverged" in (folder / "train.log").read_text(encoding="utf-8")
    weights = [load_ for checkpoint in list_checkpoints(folder / "checkpoints") for load_ in final_weights(folder).values()]
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_a_worker_that_fails_ends_the_others_with_its_own_error(tiny, outputs):
    with pytest.raises(Diverged, match=r"a lower optim\.max_lr \(now 1e\+30\)"):
        train(tiny("optim=adamw", "optim.max_lr=1e30", "optim.max_grad_norm=null", "hardware.processes=2"))
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_training_in_python_leaves_signals_arguments_and_random_state_alone(tiny):
    arguments, handlers = list(sys.argv), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train(tiny())
    assert sys.argv == arguments
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deterministic_run_leaves_the_environment_as_it_was(tiny, monkeypatch):
    hardware = resolve(tiny("hardware.deterministic=true")).hardware
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with join(hardware, Place()):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with join(hardware, Place()):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_sweep_is_suggested_of_what_was_typed_alone(tiny, capsys):
    folder = train(tiny("training_tokens=2048", "sample=null")).folder
    said = capsys.readouterr().out
    assert f"    llama-lab generate {relative(folder)} -i " in said
    assert "# twice the budget, from a checkpoint of this run" in said
    assert "# a sweep" not in said
    train(tiny("training_tokens=2048", "sample=null", "name=typed"), command=["llama-lab", "train", "name=typed"])
    assert "    llama-lab train name=typed -m optim.max_lr=" in capsys.readouterr().out


def test_a_trained_run_can_be_loaded_and_asked(tiny):
    result = train(tiny())
    loaded = load(result.folder)
    assert (loaded.update, loaded.tokens) == (20, 10240)
    assert loaded.generate("the model", max_new_tokens=5, seed=3) == loaded.generate("the model", max_new_tokens=5, seed=3)
    assert loaded.logits([1, 2, 3]).shape == (3, 257)


def test_a_vocabulary_that_the_text_cannot_fill_is_said(tiny, capsys):
    trained = train(tiny("tokenizer=bpe", "tokenizer.vocab_size=1000000"))
    out, size = capsys.readouterr().out, load(trained.folder).tokenizer.vocab_size
    assert f"Trained a tokenizer of {size} entries of the 1,000,000 that were asked for in " in out
    short = "(not the 1,000,000 of tokenizer.vocab_size: the text has no further pair that occurs twice)"
    assert f"context 32, vocabulary {size} {short}\n" in out


def test_loading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        load(tmp_path)


def test_wandb_writes_an_offline_run_that_its_own_tool_reads(text):
    words = [word for word in tiny_overrides(text) if word != "wandb=null"]
    result = train(compose([*words, "wandb.mode=offline", "wandb.tags=[a]"]))
    (record,) = (result.folder / "wandb").glob("offline-run-*/run-*.wandb")
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)], capture_output=True, text=True, timeout=170
    )
    assert shown.returncode == 0, shown.stderr
    assert "train/loss" in shown.stdout
    assert "val/bits_per_byte" in shown.stdout


def test_a_gpu_that_gets_too_few_tokens_at_a_time_is_told():
    def told(*words: str, processes: int = 1) -> str | None:
        run = resolve(compose(["hardware=cpu", "training_tokens=100_000_000", *words]))
        return batch_advice(replace(run, hardware=replace(run.hardware, device=Device.cuda, processes=processes)), 97_000_000)

    said = told()
    assert said is not None
    assert "4,096 tokens an update do not keep a GPU busy" in said
    assert "such as 131072, trains" in said
    several = told("data.max_seq_len=384", "data.tokens_per_update=98304", processes=8)
    assert several is not None
    assert "12,288 tokens an update on each" in several
    more = int(re.search(r"such as (\d+),", several)[1])  # pyright: ignore[reportOptionalSubscript]
    assert more % 384 == 0
    assert told("data.max_seq_len=384", f"data.tokens_per_update={more}", processes=8) is None
    run = resolve(compose(["hardware=cpu"]))
    assert batch_advice(run, 97_000_000) is None
    assert batch_advice(replace(run, hardware=replace(run.hardware, device=Device.cuda)), 3_500_000) is None


def test_at_the_end_the_files_that_there_are_are_named(tiny, capsys):
    def named(*words: str) -> tuple[Path, list[str]]:
        folder = train(tiny(*words)).folder
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Everything is in ")]
        return folder, line.rpartition(": ")[2].split(", ")

    folder, files = named("sample=null", "checkpoint.every_tokens=null", "name=no_samples")
    assert files == ["metrics.jsonl", "checkpoints/", "plots/loss.png", "…"]
    assert not (folder / "samples.jsonl").exists()
    assert "samples.jsonl" in named()[1]
