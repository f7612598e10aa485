"""Guards: an update that went wrong changes nothing, in any number of processes, and everything needed to look into it is said."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_lab import train
from llama_lab.config.schema import Precision
from llama_lab.training import optim as optimizers
from llama_lab.training.guard import LEAST, WINDOW, LossWindow, norms_told, ranked
from llama_lab.training.metrics import read_rows
from llama_lab.training.saving.checkpoint import load_checkpoint
from llama_lab.training.saving.manifest import list_checkpoints

from .conftest import steady, tiny_overrides
from .test_optim import CONFIGS, backward, small_llama

WATCHED = [
    "eval.every_updates=1",
    "eval.max_tokens=64",
    "sample=null",
    "log.every_updates=1",
    "checkpoint.every_tokens=512",
    "checkpoint.keep=30",
]
HARDWARE = [
    pytest.param(["hardware.processes=1"], id="cpu"),
    pytest.param(["hardware.processes=2"], id="cpu-2"),
    pytest.param(["hardware=gpu"], id="gpu", marks=pytest.mark.gpu),
]


def faulty(text: Path, fault: str, *overrides: str, call: int, last: int, rank: int = 0):
    """Train with a fault, in processes of their own."""
    script = str(Path(__file__).with_name("faulty_run.py"))
    words = [sys.executable, script, fault, str(call), str(last), str(rank), *tiny_overrides(text), *WATCHED, *overrides]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=170)


def states(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Weights and moments of every checkpoint, by update."""
    found = {}
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        weights, rest = load_checkpoint(checkpoint)
        moments = {
            f"{part} {number} {name}": value
            for part, state in rest["optimizer"].items()
            for number, values in state["state"].items()
            for name, value in values.items()
        }
        found[checkpoint.update] = weights | moments
    return found


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def training_rows(folder: Path):
    return {row["update"]: row for row in steady(folder) if "train/loss" in row}


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_a_bad_update_is_left_out_and_changes_nothing(text, outputs, fault, hardware):
    rank = 1 if "hardware.processes=2" in hardware else 0
    done = faulty(text, fault, "guard.max_skipped=2", *hardware, call=5, last=6, rank=rank)
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    state = states(folder)
    assert equal(state[5], state[6])
    assert not equal(state[6], state[7])
    assert len(state[7]) > len(list(small_llama().parameters()))

    (row,) = read_rows(folder / "guard.jsonl")
    fed = {batch["update"]: batch["hash"] for batch in read_rows(folder / "batches.jsonl")}
    assert (row["update"], row["hash"], row["windows"], row["ends_the_run"]) == (6, fed[6], [80, 95], False)
    assert row["grad_norm"] == "nan"
    if fault == "loss":
        assert row["loss"] == "inf"
    else:
        first, *others = row["grad_norms"].items()
        assert first[1] == "nan"
        assert [norm for _, norm in others] == sorted((norm for _, norm in others), reverse=True)
    assert f"Left out: at update 6 the loss is {'inf' if fault == 'loss' else ''}" in done.stdout
    assert "1 left out of at most 2" in done.stdout
    rows = training_rows(folder)
    assert rows[6]["train/loss"] is None
    assert (rows[5]["train/skipped"], rows[6]["train/skipped"], rows[20]["train/skipped"]) == (0, 1, 1)
    assert all(math.isfinite(rows[update]["train/loss"]) for update in range(7, 21))


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("fault", ["gradient", "weight"])
def test_a_bad_update_ends_the_run_before_it_can_poison_anything(tiny, text, outputs, fault, hardware):
    done = faulty(text, fault, *hardware, call=5, last=6)
    assert done.returncode == 1
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    fed = read_rows(folder / "guard.jsonl")[0]["hash"]
    lines = done.stderr[done.stderr.index("Diverged: ") :].splitlines()
    assert lines[0].startswith("Diverged: at update 6 the loss is ")
    assert lines[0].endswith("and the gradient norm nan; it changed no weight")
    assert lines[1].startswith("  Gradients: not finite in ") and lines[1].endswith("; all of them are in guard.jsonl")
    assert lines[2] == f"  Fed: windows 80 to 95, hash {fed}; llama-lab data replay {folder} --update 6"
    assert lines[3] == f"  To make it again: llama-lab verify {folder} --update 6"
    assert "a lower optim.max_lr (now " in lines[4] and "guard.max_skipped=10 (now 0) leaves such updates out" in lines[4]
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert max(states(folder)) == 5
    assert [row["update"] for row in read_rows(folder / "metrics.jsonl")][-1] <= 5

    if fault == "gradient" and "hardware.processes=1" in hardware:
        # The fault is gone, and so the same command ends like a run that never had it.
        assert train(tiny(*WATCHED, *hardware)).status == "finished"
        unbroken = train(tiny(*WATCHED, *hardware, "name=unbroken")).folder
        assert equal(states(unbroken)[20], states(folder)[20])
        assert steady(unbroken) == steady(folder)


def test_the_count_of_what_was_left_out_goes_on_over_starts(text, outputs):
    done = faulty(text, "gradient", "guard.max_skipped=2", call=5, last=0)
    assert done.returncode == 1
    assert "Diverged: at update 8 " in done.stderr
    assert "guard.max_skipped=10 (now 2)" in done.stderr
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])[1]["skipped"] == 2
    # The second start meets its first bad update later, and has none left to leave out. The eighth is made again, and is good.
    again = faulty(text, "gradient", "guard.max_skipped=2", call=3, last=0)
    assert "Diverged: at update 10 " in again.stderr
    assert [row["update"] for row in read_rows(folder / "guard.jsonl")] == [6, 7, 10]
    more = faulty(text, "gradient", "guard.max_skipped=3", call=1, last=2)
    assert more.returncode == 0, more.stderr
    assert list((outputs / "tiny").glob("llama_3m*")) == [folder]


def test_a_jump_of_the_loss_is_marked_and_a_continued_run_marks_the_same_rows(text, outputs):
    done = faulty(text, "jump", call=14, last=15)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Spike: at update 15 the loss is ") == done.stdout.count("Spike: ") == 1
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    before = steady(folder)
    assert [update for update, row in training_rows(folder).items() if row["train/spike"]] == [15]
    for checkpoint in list_checkpoints(folder / "checkpoints")[12:]:
        (checkpoint.path / "manifest.json").unlink()
    (folder / "summary.json").write_text(json.dumps({"status": "preempted"}))
    done = faulty(text, "jump", call=3, last=4)
    assert "Continuing after update 12" in done.stdout
    assert steady(folder) == before
    none = faulty(text, "jump", "guard.spike_deviations=null", "name=unmarked", call=14, last=15)
    assert none.returncode == 0 and "Spike" not in none.stdout
    (unmarked,) = (outputs / "unmarked").glob("llama_3m*")
    assert not any("train/spike" in row for row in steady(unmarked))


def test_what_is_usual_is_told_by_a_bounded_window_of_finite_losses():
    window = LossWindow([None, *[3.0 + 0.01 * (number % 2) for number in range(LEAST - 1)]])
    assert window.exceeded(100.0, 6.0) is None
    window.add(math.nan)
    window.add(math.inf)
    assert window.exceeded(100.0, 6.0) is None
    window.add(3.01)
    mean, deviation = window.exceeded(3.1, 6.0) or (0.0, 0.0)
    assert (mean, deviation) == (pytest.approx(3.005), pytest.approx(0.005))
    assert window.exceeded(3.03, 6.0) is None
    assert window.exceeded(math.nan, 6.0) is None
    assert window.exceeded(math.inf, 6.0) is not None
    for _ in range(WINDOW):
        window.add(9.0)
    assert window.exceeded(9.03, 6.0) is None
    assert window.exceeded(9.06, 6.0) == (9.0, pytest.approx(0.009))


def test_the_worst_gradients_come_first():
    norms = ranked({"a": 1.0, "b": math.nan, "c": 30.0, "d": math.inf})
    assert list(norms) == ["b", "d", "c", "a"]
    assert norms_told(norms) == "not finite in 2 of 4 parameters, b, d; the largest of the others c 30, a 1"
    assert norms_told({"a": 1.0}) == "all finite; the largest a 1"
    many = ranked({f"p{number}": math.nan for number in range(6)})
    assert norms_told(many) == "not finite in 6 of 6 parameters, p0, p1, p2, p3, …"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_device_leaves_out_a_step_by_itself(name, precision, device, monkeypatch):
    """As on CUDA: the host gives it the step, and neither weights nor states show that it was given."""
    monkeypatch.setattr(optimizers, "DECIDING_DEVICES", ("cuda", "cpu"))
    model, plain = small_llama().to(device), small_llama().to(device)
    guarded = optimizers.build_optimizer(model, CONFIGS[name], device, precision)
    reference = optimizers.build_optimizer(plain, CONFIGS[name], device, precision)
    for step in range(6):
        for optimizer, trained, faults in ((guarded, model, [True, False] if step in (0, 3) else [False]), (reference, plain, [])):
            for is_bad in faults or [False]:
                gradients(trained, step, device)
                if is_bad:
                    for parameter in trained.parameters():
                        parameter.grad = torch.full_like(parameter, math.nan)
                optimizer.set_lr_factor(1 / (1 + step))
                optimizer.step(unless=torch.tensor(is_bad, device=device) if faults else None)
                optimizer.zero_grad()
        assert equal(model.state_dict(), plain.state_dict())


def gradients(model, step: int, device: str) -> None:
    if device == "cpu":
        backward(model, step)
        return
    tokens = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(step)).to(device)
    (model(tokens, tokens.roll(-1, 1)) / tokens.numel()).backward()
