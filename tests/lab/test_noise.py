"""Noise floors: variance told apart by where chance comes in, stored, and found by comparisons."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.data.prepare import prepare
from llama_lab.lab.compare.noise import find_floor, measure, own_part, store
from llama_lab.lab.compare.noise_command import plan_runs
from llama_lab.lab.compare.records import load_record, load_records
from llama_lab.lab.sweep.frozen import LAST_FILE
from llama_lab.lab.sweep.jobs import Job, Sweep
from llama_lab.training.run_folder import RunFolder

from ..training.conftest import tiny_overrides
from .written_runs import Make, write_run

Output = pytest.CaptureFixture[str]


def planted(make: Make, outputs: Path, *, init: float, order: float, kernels: float, seeds: int) -> list[str]:
    """Runs whose loss is the sum of three kinds of chance of known size, as `plan_runs` lays them out."""
    draw = np.random.default_rng(0)
    by_init, by_order = draw.normal(0, init, seeds), draw.normal(0, order, seeds)
    pairs = [(seed, seed) for seed in range(seeds)] + [(s, 0) for s in range(1, seeds)] + [(0, s) for s in range(1, seeds)]
    folders = []
    for number, (a, b) in enumerate([*pairs, *[(0, 0)] * (seeds - 1)]):
        loss = 2 + by_init[a] + by_order[b] + draw.normal(0, kernels)
        repeat = outputs / "tiny" / f"repeat-{number}" if number >= len(pairs) else None
        folders.append(make(a, loss, data_seed=b, folder=repeat))
    return [str(folder) for folder in folders]


def test_kinds_of_chance_are_told_apart(make: Make, outputs: Path):
    floor = measure(load_records(planted(make, outputs, init=0.03, order=0.01, kernels=0.002, seeds=12)))
    found = floor.scatter["val/loss"]
    assert {kind: scatter.degrees_of_freedom for kind, scatter in found.items()} == {
        "seeds": 11,
        "init": 11,
        "order": 11,
        "kernels": 11,
    }
    for kind, truth in (("init", 0.03), ("order", 0.01), ("kernels", 0.002)):
        inside = math.hypot(truth, 0.002) if kind != "kernels" else truth
        assert found[kind].low < inside < found[kind].high
        without = own_part(floor, "val/loss", kind)
        assert math.hypot(without, found["kernels"].sd if kind != "kernels" else 0.0) == pytest.approx(found[kind].sd)
    assert found["seeds"].sd > found["order"].sd > found["kernels"].sd
    assert floor.scatter["val/bits_per_byte"]["init"].sd == pytest.approx(found["init"].sd / math.log(2))
    assert "train/loss" not in floor.scatter


def test_a_floor_is_stored_for_its_family_and_told_to_single_seeds(make: Make, outputs: Path, capsys: Output):
    folders = [make(seed, 2 + 0.01 * (-1) ** seed) for seed in range(6)]
    assert main(["noise", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "initial weights and order of the data" in out and "Kernels were not looked at" in out
    assert "sees, 8 times of 10, a difference of" in out
    (stored,) = (outputs / "noise").glob("*.json")
    assert json.loads(stored.read_text())["scatter"]["val/loss"]["seeds"]["degrees_of_freedom"] == 5
    variant = make(0, 1.99, lr=2e-3)
    (record,) = load_records([str(variant)])
    floor = find_floor(record)
    assert floor is not None and floor.measured_on["optim.max_lr"] == 1e-3
    assert main(["compare", str(folders[0]), str(variant)]) == 0
    out = capsys.readouterr().out
    assert (
        "cannot be said" in out
        and "The noise floor of this config lets such runs differ by 0.04" in out
        and "this is inside it" in out
    )
    assert main(["compare", str(folders[0]), str(make(0, 1.5, lr=3e-3))]) == 0
    assert "this is beyond it" in capsys.readouterr().out
    longer = load_records([str(make(0, training_tokens=20_480, last=40))])[0]
    assert find_floor(longer) is None
    stored.write_text("{}")
    assert find_floor(record) is None


def test_equal_repeats_have_no_noise_of_their_own(make: Make, outputs: Path, capsys: Output):
    folders = [make(seed, 2 + 0.01 * seed) for seed in range(3)] + [make(0, 2.0, folder=outputs / "tiny" / "again")]
    assert main(["noise", *map(str, folders)]) == 0
    assert "equal to the last digit" in capsys.readouterr().out


def test_what_is_no_floor_is_refused(make: Make):
    first = str(make(0))

    def refusal(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            measure(load_records([first, *words]))
        return str(caught.value)

    assert "are the least; llama-lab noise with the overrides that made it makes them" in refusal()
    typed = ["llama-lab", "train", "name=b", "seed.init=1", "model.dim=32"]
    told = refusal(str(make(1, lr=2e-3, name="b", command=typed)))
    assert (
        "these 2 runs have 2 configs, which differ in optim.max_lr; a floor is measured on runs that differ in seeds alone; "
        in told
    )
    twin = str(make(1))
    assert f"seeds alone; try llama-lab noise {first} {twin}" in refusal(twin, str(make(0, lr=4e-3, name="c")))
    with pytest.raises(ConfigError, match=r"are the least; llama-lab noise name=b model\.dim=32 makes them"):
        measure(load_records([str(make(2, name="d", command=typed))]))
    assert "is not finished (preempted, update 8 of 20); a floor is measured on finished runs" in refusal(str(make(2, last=8)))
    assert "has no finite val/loss at its end" in refusal(str(make(3, None)))
    assert "was trained on other data" in refusal(str(make(4, data={"data": "e", "tokenizer": "t"})))


def test_the_runs_that_tell_chances_apart_are_planned_with_folders_of_their_own(text: Path, capsys: Output):
    overrides = tiny_overrides(text)
    sweep = plan_runs(overrides, seeds=3, repeats=2, config_dir=None)
    pairs = [(job.run.seed.init, job.run.seed.data) for job in sweep.jobs]
    assert pairs == [(0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (0, 1), (0, 2), (0, 0)]
    assert len({job.folder for job in sweep.jobs}) == 8
    assert "repeat-1" in sweep.jobs[-1].folder.name
    assert plan_runs(overrides, seeds=3, repeats=2, config_dir=None).folder == sweep.folder
    assert main(["noise", *overrides, "sample.prompts=[The,One]", "--seeds", "2", "--cfg"]) == 0
    assert capsys.readouterr().out.count("llama-lab train") == 5
    for words, rule in (
        (["seed.init=3"], "is what this command varies"),
        (["optim.max_lr=1e-3,2e-3"], "names several configs"),
        (["--seeds", "1"], "is no number from 2 on"),
        ([str(text.parent)], "names runs, and overrides make new ones"),
    ):
        assert main(["noise", *overrides, *words]) == 2
        assert rule in capsys.readouterr().err


def test_runs_that_are_made_are_measured_and_stored_by_the_same_command(text: Path, outputs: Path, capsys: Output):
    overrides = tiny_overrides(text)
    for number, job in enumerate(plan_runs(overrides, seeds=2, repeats=2, config_dir=None).jobs):
        data = {"data": prepare(job.run.data, job.run.tokenizer, lambda said: None).fingerprint}
        write_run(job.run, job.run.seed.init, 2 + 0.01 * number, data_seed=job.run.seed.data, folder=job.folder, data=data)
        (job.folder / LAST_FILE).parent.mkdir()
        (job.folder / LAST_FILE).touch()
    assert main(["noise", *overrides, "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "5 jobs, 5 of them done before" in out
    assert "kernels" in out and "Stored for llama-lab compare" in out
    # The run that repeats another's seeds is for the kernels alone.
    assert "There is no report" not in out and "One config with 4 finished seeds" in next(outputs.rglob("report.html")).read_text()
    assert main(["report", str(outputs / "tiny"), "--out", str(outputs / "page")]) == 0
    assert "One config with 4 finished seeds: val/loss 2.0000 to 2.0300." in capsys.readouterr().out
    assert len(list((outputs / "noise").glob("*.json"))) == 1


def test_a_floor_of_another_folder_is_not_taken(make: Make, tmp_path: Path):
    floor = measure(load_records([str(make(0)), str(make(1, 2.1))]))
    store(floor, tmp_path / "elsewhere")
    assert find_floor(load_records([str(make(2))])[0]) is None


def written(job: Job, loss: float, threads: int) -> None:
    """A finished run of a planned job, made on a CPU with so many threads."""
    if not job.folder.exists():
        write_run(job.run, job.run.seed.init, loss, data_seed=job.run.seed.data, folder=job.folder)
    machine = {"device": "cpu", "processor": "p", "processes": 1, "threads": str(threads)}
    RunFolder(job.folder).write_meta(machine=machine)


def test_runs_of_other_threads_are_no_repeats(text: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that was there is used, but what it adds up in another order is not taken for the kernels' noise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overrides = tiny_overrides(text)

    def planned() -> Sweep:
        return plan_runs(overrides, seeds=2, repeats=2, config_dir=None)

    first = planned().jobs[0]
    written(first, 2.0, threads=1)
    assert len(planned().jobs) == 5
    written(first, 2.0, threads=2)
    jobs = planned().jobs
    assert [job.values["repeat"] for job in jobs if job.values["repeat"] != "0"] == ["1", "2"]
    for number, job in enumerate(jobs[1:]):
        written(job, 2.0625 if job.values["repeat"] != "0" else 2 + 0.01 * number, threads=1)
    assert [job.folder for job in planned().jobs] == [job.folder for job in jobs], "the same command again finds the same runs"
    floor = measure([load_record(job.folder) for job in jobs])
    kernels = floor.scatter["val/loss"]["kernels"]
    assert (kernels.sd, kernels.degrees_of_freedom) == (0.0, 1)
    alone = measure([load_record(job.folder) for job in jobs[:5]])
    assert "kernels" not in alone.scatter["val/loss"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [job.folder for job in planned().jobs] == [job.folder for job in jobs], "whatever is free by then"
