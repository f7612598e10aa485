"""What is foreseen of a run: against the parts that make it, against rows that are known, and against a run that then happens."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lab import compose, train
from llama_lab.config.devices import Cuda
from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve, tokens_at_once
from llama_lab.config.schema import BudgetConfig, Compile, Device, HardwareConfig, Precision, Recompute, RunConfig, Window
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.lab import probe as probe_module
from llama_lab.lab import sweep
from llama_lab.lab.plan import show
from llama_lab.lab.probe import Timetable, measured, probe, shortened
from llama_lab.lab.sweep.budget import keep_sweep_to_budget
from llama_lab.model.llama import Llama
from llama_lab.training.buckets import GradientBuckets
from llama_lab.training.copies import hang, slots
from llama_lab.training.due import samples_due, scores_due, validation_due
from llama_lab.training.foresight import forecast
from llama_lab.training.foresight.forecast import Forecast, Probe, foresee, keep_probe, keep_to_budget, kind_of, known_probe
from llama_lab.training.foresight.gpu_memory import gpu_memory
from llama_lab.training.foresight.occasions import occasions
from llama_lab.training.optim import build_optimizer
from llama_lab.training.processes.worker import Place, Worker
from llama_lab.training.run_folder import RunFolder

from ..training.conftest import tiny_overrides

Output = pytest.CaptureFixture[str]
Make = Callable[..., RunConfig]
ALL_PARTS = Probe(start=10, update=0.5, validation=2, score=0, sample=1, save=0.25, write=0.0, peak_gib=0.75, updates=10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def known(run: RunConfig) -> tuple[RunConfig, PreparedData]:
    """The run as it starts, and its data."""
    run = resolve(run)
    return run, prepare(run.data, run.tokenizer, lambda said: None)


def on_gpu(*words: str, micro_batch: int, precision: str = "bf16", **hardware: Any) -> RunConfig:
    """A run as it would be on a CUDA device."""
    batch = ["data.max_seq_len=2048", "data.tokens_per_update=131072", "training_tokens=100_000_000"]
    run = compose([*words, *batch, "schedule.warmup_updates=1"])
    chosen: HardwareConfig = replace(
        run.hardware, device=Device.cuda, processes=1, micro_batch=micro_batch, compile=Compile.always, **hardware
    )
    return replace(run, precision=Precision[precision], hardware=chosen)


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 40, 80, 141])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")))
def test_the_micro_batch_that_a_gpu_is_given_leaves_room(preset: str, precision: str, gigabytes: int) -> None:
    run = on_gpu(f"model={preset}", "optim=adamw", micro_batch=1, precision=precision)
    tokens = tokens_at_once(run, Device.cuda, Cuda(devices=1, has_bf16=True, bytes=gigabytes * 10**9), run.precision)
    assert tokens is not None
    chosen = max(1, min(64, tokens // 2048))
    assert chosen == 1 or gpu_memory(run, 8192, chosen).gib < 0.75 * gigabytes * 10**9 / 2**30


def test_the_formula_gives_what_was_measured_on_an_h100():
    # docs/performance.md
    run = on_gpu("model=llama_97m", "optim=adamw", micro_batch=32)
    assert gpu_memory(run, 8192, 32).gib == pytest.approx(17.8, rel=0.01)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize(("precision", "tied"), [("bf16", False), ("bf16", True), ("fp8", False), ("fp32", True)])
def test_what_stays_is_what_the_parts_hold(optim: str, precision: str, tied: bool):
    shape = ["model.dim=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.multiple_of=32"]
    run = on_gpu(*shape, f"model.tie_embeddings={tied}", f"optim={optim}", micro_batch=1, precision=precision)
    model = Llama(run.model, vocab_size=96, max_seq_len=64)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, run.optim, "cpu", run.precision)
    tensors = list(model.parameters())
    weights, gradients = _bytes(tensors), _bytes(tensors)
    if precision != "fp32":
        places = slots(model)
        added = [place.weights for place in places if place.is_added_once]
        buckets = GradientBuckets(tensors, Worker(Place(), torch.device("cpu")), added=added)
        copies = hang(places, buckets, is_fp8=precision == "fp8")
        weights += sum(_bytes([part for part in copy.buffers() if part is not copy.total]) for copy in copies)
    for parameter in tensors:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for part in optimizer.parts.values() for state in part.state.values() for value in state.values()]
    found = gpu_memory(run, 96, 1)
    # Gains, scalars and counters of steps hardly count.
    assert found.weights == pytest.approx(weights, rel=0.02)
    assert found.gradients == gradients
    assert found.optimizer == pytest.approx(_bytes(states), rel=0.005)


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_follows_what_is_kept():
    def gib(*words: str, micro_batch: int = 16, **more: Any) -> float:
        run = on_gpu("model=llama_97m", "optim=adamw", *words, micro_batch=micro_batch, **more)
        return gpu_memory(run, 8192, micro_batch).gib

    usual = gib()
    assert gib(recompute=Recompute.full) < gib(recompute=Recompute.selective) < usual
    assert gib(precision="fp32") > 1.5 * usual
    assert gib("model.n_kv_heads=4") < usual < gib("model.qk_norm=true")
    assert gib("model.dropout=0.1") > usual
    packed = on_gpu("model=llama_97m", "optim=adamw", "data.window=packed", micro_batch=16)
    assert packed.data.window is Window.packed
    assert gpu_memory(packed, 8192, 16).gib - usual == pytest.approx(16 * 2048 * 2048 * 2 / 2**30, rel=0.01)
    # A share of 64 windows is all there is, whatever the micro-batch.
    assert gib(micro_batch=64) == gib(micro_batch=500)
    assert gpu_memory(on_gpu("model=seed_1b", "optim=muon", micro_batch=1), 8192, 1).moment == "in the optimizer's step"
    assert gpu_memory(on_gpu("model=llama_3m", "optim=adamw", micro_batch=1), 131072, 1).moment == "in the loss"


@pytest.mark.parametrize(
    "words",
    [
        ["eval.every_updates=7", "sample.first_tokens=2000", "sample.growth=2"],
        ["eval.every_updates=null", "sample.first_tokens=100", "sample.growth=1"],
        ["eval.every_updates=5", "sample.first_tokens=1100", "sample.growth=1.0"],
        ["eval.every_updates=100", "sample.first_tokens=10", "sample.growth=1.1", "checkpoint.at_end=false"],
    ],
)
def test_occasions_are_those_of_the_loop(tiny: Make, words: list[str]):
    run = tiny("training_tokens=20480", *words)
    updates = range(1, run.updates + 1)
    found = occasions(run, 257)
    assert run.eval is not None and run.sample is not None
    assert found.validations == sum(validation_due(run.eval, update, run.updates) for update in updates)
    assert found.samples == sum(samples_due(run.sample, run, update) for update in updates)
    assert found.saves == 10 - (not run.checkpoint.at_end)
    assert occasions(replace(run, eval=None, sample=None), 257).validations == 0
    for every, often in ((7, 6), (None, 1)):
        scored = replace(run.eval, tasks=["task.jsonl"], tasks_every_updates=every)
        assert sum(scores_due(scored, update, run.updates) for update in updates) == often
        assert occasions(replace(run, eval=scored), 257).scores == often


@pytest.mark.parametrize("updates", [10, 12, 16, 26, 34, 100, 2000])
def test_a_probe_tells_its_parts_apart(tiny: Make, tmp_path: Path, updates: int):
    run, data = known(tiny("checkpoint.every_tokens=4096"))
    table = Timetable.of(updates)
    probed, _ = shortened(run, data, table)
    seconds, previous, rows, samples = 3.0, 3.0, [], []  # the first update is slow, the second still is
    for update in range(1, updates + 1):
        seconds += 0.5 + (1.5 if update == 2 else 0.0)
        axes = {"update": update, "tokens": update * 512}
        if update in (1, updates) or update % table.row == 0:
            taken = update - max((row["update"] for row in rows if "train/loss" in row), default=0)
            slow = 3.0 if update == 1 else 1.5 if update == table.row else 0.0
            speed = taken * 512 / (taken * 0.5 + slow)
            rows.append(axes | {"seconds": seconds, "train/loss": 1.0, "speed/tokens_per_second": speed, "memory/peak_gib": 0.75})
        if update == table.save:
            seconds += 0.25
        if update in (table.look, updates):
            seconds += 2.0 + (4.0 if update == table.look else 0.0)  # what the first one compiles
            rows.append(axes | {"seconds": seconds, "val/loss": 1.0})
            seconds += 1.0
            samples.append(axes | {"seconds": seconds, "text": "a"})
    for name, written in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    summary = {"wall_seconds": seconds + 5.0, "save_seconds": 0.5}
    found = measured(probed, table, tmp_path, summary, validation_scale=3.0)
    parts = (found.update, found.validation, found.sample, found.save, found.write, found.start, found.peak_gib)
    assert parts == pytest.approx((0.5, 6.0, 1.0, 0.25, 0.5, 5.0 + previous + 1.5 + 4.0, 0.75))
    # What is written beside the updates takes nothing from what happens once.
    assert measured(probed, table, tmp_path, summary | {"save_seconds": 1e4}).start == found.start


def test_long_validations_are_measured_by_a_part(tiny: Make):
    run, data = known(tiny("eval.max_tokens=null", "data.tokens_per_update=32"))
    probed, scale = shortened(run, data, Timetable.of(10))
    assert probed.eval is not None and probed.eval.max_tokens == 16 * 32
    assert scale == data.val_tokens / (16 * 32) > 1
    # Each source of a mixture is validated up to as many.
    probed, scale = shortened(run, replace(data, sources=data.sources * 4), Timetable.of(10))
    assert probed.eval is not None and probed.eval.max_tokens == 16 * 32 // 4
    assert scale == 4 * data.val_tokens / (16 * 32)


def test_one_probe_serves_runs_that_take_alike(tiny: Make, cache: Path):
    run, data = known(tiny())
    keep_probe(run, data, ALL_PARTS)
    assert known_probe(run, data) == ALL_PARTS
    alike, _ = known(tiny("seed.init=7", "optim.max_lr=0.001", "training_tokens=51200", "eval.every_updates=2", "name=other"))
    assert kind_of(alike, data) == kind_of(run, data)
    for words in (
        *("model.dim=64", "eval.max_tokens=64", "hardware.micro_batch=4", "sample.new_tokens=9", "optim=adamw", "log.parts=true"),
        *("data.window=packed", f"data.tokens_per_update=1024 hardware.micro_batch={run.micro_batch}"),
    ):
        assert known_probe(known(tiny(*words.split()))[0], data) is None, words
    assert known_probe(run, data, threads=7) is None
    # 20 updates, 4 validations, samples after 4, 12 and 20, 5 checkpoints.
    assert foresee(run, data).seconds == 10 + 20 * 0.5 + 4 * 2 + 3 * 1 + 5 * 0.25
    # The last save is waited for.
    keep_probe(run, data, replace(ALL_PARTS, write=0.5))
    assert foresee(run, data).seconds == 10 + 20 * 0.5 + 4 * 2 + 3 * 1 + 5 * 0.25 + 0.5
    # Each of them waits for the one before where the disk is slow.
    keep_probe(run, data, replace(ALL_PARTS, write=7.0))
    assert foresee(run, data).seconds == 10 + 5 * 7
    unsaved = replace(run, checkpoint=replace(run.checkpoint, at_end=False))
    assert foresee(unsaved, data).seconds == 10 + 4 * 7
    (cache / "probes.json").write_text('{"x": 1}')
    assert foresee(run, data).seconds is None


def test_speeds_are_expected_only_where_they_were_measured(monkeypatch: pytest.MonkeyPatch, tiny: Make):
    _, data = known(tiny())
    h100 = forecast.devices.Cuda(1, True, "NVIDIA H100 80GB HBM3", 80 * 2**30)
    monkeypatch.setattr(forecast.devices, "probe_cuda", lambda: h100)
    usual = on_gpu("model=llama_97m", "optim=adamw", micro_batch=32)
    found = foresee(usual, data)
    # 97M at 8,192 entries reached 618,000 tokens a second; with bytes a token takes 13 % less.
    assert found.seconds == pytest.approx(usual.updates * 131072 / 618_000, rel=0.15)
    assert found.gpu_hours == pytest.approx((found.seconds or 0) / 3600)
    for run in (
        on_gpu("model=llama_3m", "optim=adamw", micro_batch=32),
        on_gpu("model=llama_97m", "optim=adamw", micro_batch=2),
        on_gpu("model=llama_97m", "optim=adamw", micro_batch=32, precision="fp32"),
        on_gpu("model=llama_97m", "optim=adamw", micro_batch=32, recompute=Recompute.full),
    ):
        assert foresee(run, data).seconds is None
        assert "NVIDIA H100" in foresee(run, data).unknown
        assert foresee(run, data).peak_gib is not None


def test_a_budget_refuses_what_is_over_and_what_nobody_knows():
    hour = Forecast(2, seconds=1800, seconds_from="a probe")
    keep_to_budget(BudgetConfig(), [Forecast(1, unknown="nobody knows")], "this run", "plan")
    keep_to_budget(BudgetConfig(gpu_hours=2), [hour, hour], "this sweep", "plan")
    with pytest.raises(ConfigError, match=r"gpu_hours=1.5 is less than the 2 hours foreseen, from a probe; lower .* to 75 %"):
        keep_to_budget(BudgetConfig(gpu_hours=1.5), [hour, hour], "this sweep", "plan")
    with pytest.raises(ConfigError, match="the 10 hours"):  # eight more like these
        keep_to_budget(BudgetConfig(gpu_hours=1.5), [hour, hour], "this sweep", "plan", to_come=8)
    with pytest.raises(ConfigError, match=r"cannot be kept to: nobody knows\. llama-lab plan --probe … measures"):
        keep_to_budget(BudgetConfig(gpu_hours=9), [hour, Forecast(1, unknown="nobody knows")], "this", "llama-lab plan --probe …")


def test_nothing_starts_over_its_budget(tiny: Make, text: Path, cache: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, data = known(tiny("budget.gpu_hours=0.005"))
    with pytest.raises(ConfigError, match="this CPU trains is not known without a probe"):
        train(run)
    keep_probe(run, data, ALL_PARTS)  # 32.25 s, 0.009 hours
    with pytest.raises(ConfigError, match=r"budget.gpu_hours=0.005 is less than the 0.00896 hours foreseen"):
        train(run)
    words = [*tiny_overrides(text), "budget.gpu_hours=0.012", "seed.init=0,1"]
    jobs = sweep.expand(words, multirun=True)
    assert jobs is not None and jobs.budget.gpu_hours == 0.012
    assert all(job.run.budget == BudgetConfig() for job in jobs.jobs)
    with pytest.raises(ConfigError, match="this sweep of 2 jobs"):
        sweep.run_sweep(jobs)
    slurm = sweep.expand([*words, "sweep.launcher=slurm", "hardware.processes=1"], multirun=True)
    assert slurm is not None
    with pytest.raises(ConfigError, match="how fast Slurm's nodes train"):
        sweep.run_sweep(slurm)
    with pytest.raises(ConfigError, match=r"takes one value, such as budget\.gpu_hours=2"):
        sweep.expand([*tiny_overrides(text), "budget.gpu_hours=range(1,3)"], multirun=True)
    assert list(outputs.rglob("config.yaml")) == []


def test_a_run_that_takes_far_less_than_its_probe_corrects_it(tiny: Make, cache: Path, outputs: Path, capsys: Output):
    run, data = known(tiny())
    keep_probe(run, data, ALL_PARTS)
    took = train(run).summary["wall_seconds"]
    assert "A probe had foreseen 32s, made while this machine was busy; it is corrected" in capsys.readouterr().out
    assert foresee(run, data).seconds == pytest.approx(took)
    assert known_probe(run, data) == ALL_PARTS.scaled(took / ALL_PARTS.seconds(occasions(run, data.tokenizer.vocab_size)))

    keep_probe(run, data, replace(ALL_PARTS, start=0.0, update=1e-3, validation=0.0, sample=0.0, save=0.0))
    train(replace(run, fresh=True))
    assert "busy" not in capsys.readouterr().out, "a run that took longer may have had to share the machine"


def test_a_sweep_is_foreseen_as_a_whole(tiny: Make, text: Path, cache: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*tiny_overrides(text), "seed.init=0,1,2", "sweep.at_once=2"]
    show(words, multirun=True)
    assert "Time: how fast this CPU trains is not known without a probe" in capsys.readouterr().out
    keep_probe(*known(tiny()), ALL_PARTS)
    show([*words, "budget.gpu_hours=0.02", "budget.gpu_hour_price=100"], multirun=True)
    said = capsys.readouterr().out
    assert len(re.findall(r"  0\.75 +32s +new  ", said)) == 3
    assert "Time: 48s with 2 at once, 1m 37s of runs (from a probe)" in said
    assert "Hours of processes: 0.0269; more than budget.gpu_hours=0.02: train refuses it" in said
    assert "Price: 2.69 at 100 an hour" in said


def test_what_is_done_costs_nothing_more(
    tiny: Make, text: Path, make: Callable[..., Path], cache: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*tiny_overrides(text), "seed.init=0,1,2", "sweep.at_once=2", "eval.max_tokens=null"]
    jobs = sweep.expand(words, multirun=True)
    assert jobs is not None
    run, data = known(jobs.jobs[0].run)
    keep_probe(run, data, ALL_PARTS)
    make(0, folder=jobs.jobs[0].folder, data={"data": data.fingerprint, "tokenizer": data.tokenizer.hash})
    half = make(1, folder=jobs.jobs[1].folder, last=12)
    saved = half / "checkpoints" / "tokens-000000000005120" / "manifest.json"
    saved.parent.mkdir(parents=True)
    saved.touch()
    show([*words, "budget.gpu_hours=0.012"], multirun=True)
    said = capsys.readouterr().out
    assert "In total: 30,720 tokens" in said
    assert "Left: 15,360 tokens; 1 of 3 runs is done" in said
    assert "Time: 32s with 2 at once, 48s of runs for what is left, 1m 37s in all (from a probe)" in said
    over = "more than budget.gpu_hours=0.012: train refuses it"
    assert f"Hours of processes: 0.0134 for what is left, 0.0269 in all; {over}" in said
    refused = sweep.expand([*words, "budget.gpu_hours=0.012"], multirun=True)
    assert refused is not None
    rule = r"budget\.gpu_hours=0\.012 is less than the 0\.0134 hours foreseen for what is left, of 0\.0269 in all, from a probe; "
    with pytest.raises(ConfigError, match=rule + r"raise the budget \(other training_tokens would begin anew what is done\)"):
        sweep.run_sweep(refused)
    keep_sweep_to_budget(replace(refused, budget=BudgetConfig(gpu_hours=0.014)))
    show([*words[:-3], "seed.init=0", words[-1]])
    assert re.search(r"time +nothing is left to train", capsys.readouterr().out)


def test_a_run_is_probed_then_records_what_was_foreseen_and_what_became_true(
    tiny: Make, cache: Path, outputs: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe_module, "ENOUGH_SECONDS", 0.0)  # ten updates, however quick
    run, data = known(tiny())
    found = probe(run, data, print)
    assert "Probing 10 updates" in capsys.readouterr().out
    assert found == known_probe(run, data)
    assert found.updates == 10
    assert min(found.start, found.update, found.validation, found.sample, found.peak_gib) > 0
    assert not outputs.exists()
    result = train(run)
    predicted = RunFolder(result.folder).meta()["predicted"]
    assert predicted["seconds"] == pytest.approx(found.seconds(occasions(run, 257)), abs=0.05)
    assert predicted["peak_gib"] == pytest.approx(found.peak_gib, abs=0.001)
    assert result.summary["wall_seconds"] > result.summary["seconds"]
    assert "Foreseen: about " in capsys.readouterr().out


def test_a_probe_that_cannot_be_trained_says_why(tiny: Make, cache: Path, monkeypatch: pytest.MonkeyPatch):
    run, data = known(tiny("optim.max_lr=1e30"))
    monkeypatch.setattr(probe_module, "_trained", lambda *_: probe_module.Outcome("failed (Diverged)", message="the loss is NaN"))
    with pytest.raises(ConfigError, match="--probe could not train 10 updates: the loss is NaN"):
        probe(run, data, print)


@pytest.mark.gpu
def test_the_formula_foresees_the_allocators_peak(tiny: Make, cache: Path):
    wide = ["model.dim=512", "model.n_layers=4", "model.n_heads=8", "data.max_seq_len=512", "data.tokens_per_update=65536"]
    quick = ["training_tokens=524288", "hardware=gpu", "hardware.micro_batch=64", "precision=bf16", "eval=null", "sample=null"]
    result = train(tiny(*wide, *quick))
    predicted = RunFolder(result.folder).meta()["predicted"]
    assert predicted["peak_from"] == forecast.FROM_FORMULA
    assert predicted["peak_gib"] == pytest.approx(result.summary["memory/peak_gib"], rel=0.1)
