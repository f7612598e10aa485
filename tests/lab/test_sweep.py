"""Sweeps: what a command expands to, what is refused before anything starts, and two real ones from end to end."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.lab import sweep as sweeps
from llama_lab.lab.sweep import Sweep

SMOKE = ["experiment=smoke", "wandb=null", "hardware=cpu"]


def expand(overrides: list[str], *, multirun: bool = True, config_dir: Path | None = None) -> Sweep:
    found = sweeps.expand(overrides, multirun=multirun, config_dir=config_dir)
    assert found is not None
    return found


def problems(*overrides: str, **options: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(list(overrides), **options)
    return str(caught.value).splitlines()


def test_every_combination_is_a_job_with_its_own_folder():
    sweep = expand([*SMOKE, "optim.max_lr=1e-3,2e-3", "seed.init=range(0,3)"])
    assert [(job.values["optim.max_lr"], job.values["seed.init"]) for job in sweep.jobs] == [
        (rate, seed) for rate in ("0.001", "0.002") for seed in ("0", "1", "2")
    ]
    assert [job.run.optim.max_lr for job in sweep.jobs] == [1e-3] * 3 + [2e-3] * 3
    assert [job.run.seed.init for job in sweep.jobs] == [0, 1, 2] * 2
    assert len({job.folder for job in sweep.jobs}) == 6


def test_lists_are_read_as_hydra_reads_them():
    assert [job.run.model.tie_embeddings for job in expand([*SMOKE, "model.tie_embeddings=choice(true,false)"]).jobs] == [
        True,
        False,
    ]
    schedules = [job.values["schedule"] for job in expand(["hardware=cpu", "schedule=glob(*)"]).jobs]
    assert schedules == ["constant", "cosine", "linear", "wsd"]
    # A list of one value is no sweep, and a quoted comma is text.
    sweep = expand([*SMOKE, "seed.init=0,1", "sample.prompts=['a, b','c']"])
    assert sweep.jobs[1].run.sample is not None
    assert sweep.jobs[1].run.sample.prompts == ["a, b", "c"]


def test_the_last_of_two_overrides_of_one_key_counts():
    assert len(expand([*SMOKE, "seed.init=0,1,2", "seed.init=3,4"]).jobs) == 2


def test_what_is_no_science_joins_the_folder_name():
    folders = [job.folder.name for job in expand([*SMOKE, "hardware.micro_batch=1,2"]).jobs]
    assert len(set(folders)) == 2
    alone = {expand([*SMOKE, "hardware.micro_batch=1,2", "seed.init=0,1"]).jobs[0].folder.name}
    assert alone == {folders[0]}, "another swept key must not rename a run"


def test_the_summary_folder_follows_from_the_jobs():
    one = expand([*SMOKE, "optim.max_lr=1e-3,2e-3"]).folder
    assert one.parent.name == "sweeps"
    assert one.name.startswith("max_lr-")
    assert expand([*SMOKE, "optim.max_lr=2e-3,1e-3"]).folder == one
    assert expand([*SMOKE, "optim.max_lr=2e-3,3e-3"]).folder != one


def test_all_jobs_are_checked_before_the_first_starts(outputs: Path):
    heading, *lines = problems(*SMOKE, "model.n_heads=2,3,4,5", "schedule.warmup_updates=-1")
    assert "of 4 jobs; none was started" in heading
    assert any("schedule.warmup_updates=-1" in line and "job" not in line for line in lines), "a problem of all jobs is said once"
    assert sum("schedule.warmup_updates" in line for line in lines) == 1
    assert any("model.n_heads=3" in line and line.endswith("(job 2)") for line in lines)
    assert not any("(job 1)" in line for line in lines)
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.max_lr=1e-3,0.001"], "is the same run as optim.max_lr=0.001 (jobs 1 and 2)"),
        (["seed.init=1"], "needs a key with several values"),
        (["optim.weight_decay=glob(*)"], "gives no values"),
        (["schedule=glob(x*)"], "gives no values"),
        (["optim.max_lr=interval(0,1)"], "interval"),
        (["optim.max_lr=range(0,"], "optim.max_lr=range(0,"),
        (["optim.max_rl=1e-3,2e-3"], "optim.max_rl"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], said: str):
    assert said in "\n".join(problems(*SMOKE, *overrides))


def test_refused_where_every_rank_would_start_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in problems(*SMOKE, "seed.init=0,1")[1]


def test_a_preset_can_be_a_sweep(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "rates.yaml").write_text(
        "# @package _global_\n# Which rate?\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper:\n    params:\n      optim.max_lr: 1e-3,2e-3\n      seed.init: range(2)\n",
        encoding="utf-8",
    )
    overrides = ["experiment=rates"]
    assert len(expand(overrides, multirun=False, config_dir=tmp_path).jobs) == 4
    # The command line wins over the preset; with everything given it is one run.
    assert len(expand([*overrides, "seed.init=7"], multirun=False, config_dir=tmp_path).jobs) == 2
    assert sweeps.expand([*overrides, "seed.init=7", "optim.max_lr=1e-3"], multirun=False, config_dir=tmp_path) is None
    assert sweeps.expand(["experiment=smoke"], multirun=False) is None
    assert sweeps.expand(["seed.init=0"], multirun=False) is None
    assert "is a sweep itself" in problems("experiment=rates,smoke", config_dir=tmp_path)[1]


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*/sweeps/*/summary.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_runs_goes_on_after_a_failure_and_skips_what_is_finished(llama_lab, outputs: Path):
    words = [*SMOKE, "seed.init=0,1"]
    blocked = expand(words).jobs[0].folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the first job's folder would be", encoding="utf-8")

    done = llama_lab("train", "-m", *words)
    assert done.returncode == 1, done.stderr
    first, second = rows(outputs)
    assert first["status"].startswith("failed")
    assert second["status"] == "finished"
    assert float(second["val/bits_per_byte"]) > 0
    assert float(second["train/loss"]) > 0
    assert int(second["tokens"]) > 0
    assert (Path(second["folder"]) / "metrics.jsonl").is_file()
    assert "[1/2] seed.init=0: failed" in done.stdout
    assert str(blocked) in done.stderr, "the failed job's own error is shown"
    assert "bits/byte" in done.stdout

    blocked.unlink()
    again = llama_lab("train", "-m", *words)
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in rows(outputs)] == ["finished", "already finished"]
    assert rows(outputs)[1]["val/loss"] == second["val/loss"]


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_an_interrupted_sweep_saves_its_job_and_says_what_is_left(outputs: Path, tmp_path: Path):
    words = [*SMOKE, "training_tokens=100_000_000", "log.every_updates=1", "seed.init=0,1"]
    sweep = subprocess.Popen(
        [sys.executable, "-u", "-m", "llama_lab", "train", "-m", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert sweep.stdout is not None
    try:
        for line in sweep.stdout:
            if line.startswith("Step: 2 "):
                break
        sweep.send_signal(signal.SIGINT)
        rest, _ = sweep.communicate(timeout=60)
    finally:
        sweep.kill()
    assert sweep.returncode == 75
    first, second = rows(outputs)
    assert (first["status"], second["status"]) == ("preempted", "not started")
    assert list(Path(first["folder"]).glob("checkpoints/*/manifest.json"))
    assert "2 of 2 jobs are not finished" in rest
