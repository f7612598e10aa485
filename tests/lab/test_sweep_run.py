"""Sweeps that run: real jobs in processes of their own, and what is left when something goes wrong."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import optuna
import pytest
import yaml
from rich.console import Console

from llama_lab import train
from llama_lab.cli import main
from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, save_config
from llama_lab.lab import sweep as sweeps
from llama_lab.lab.runs import track
from llama_lab.lab.sweep import Sweep, load_sweep, run, run_sweep, slurm
from llama_lab.lab.sweep.command import run_sweep_command
from llama_lab.lab.sweep.data import refuse_missing_data
from llama_lab.lab.sweep.frozen import freeze, hold_sweep, keep_config, keep_outcome, known_outcome
from llama_lab.lab.sweep.jobs import Outcome
from llama_lab.lab.sweep.local import Local
from llama_lab.lab.sweep.ranking import point_result
from llama_lab.lab.sweep.search import Proposer
from llama_lab.lab.sweep.show import Board, print_results
from llama_lab.training.run_folder import RunFolder, hold_run, relative

from ..training.conftest import tiny_overrides
from .kill_sweeps import Bench, _broken, _descendants, _state, survive, write_text

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks jobs from a warm process, and finds them in /proc")
pytestmark = linux

SMALL = ["training_tokens=5120", "sample=null", "checkpoint.every_tokens=null", "log.every_updates=1"]
Make = Callable[..., Sweep]


@pytest.fixture
def make(text: Path) -> Make:
    """Expand a sweep over runs of ten updates."""

    def expanded(*words: str, config_dir: Path | None = None) -> Sweep:
        found = sweeps.expand([*tiny_overrides(text), *SMALL, *words], multirun=True, config_dir=config_dir)
        assert found is not None
        return found

    return expanded


def statuses(sweep: Sweep) -> list[str]:
    with (sweep.folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        return [row["status"] for row in csv.DictReader(file)]


def wait_for(condition: Callable[[], object], seconds: float = 170.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Something that another thread does while the context lasts; what it raises is raised at its end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if raised:
        raise raised[0]


def test_what_is_gone_of_a_sweeps_folder_is_said_or_made_anew(make: Make, capsys: pytest.CaptureFixture[str]):
    words = ("seed.init=0,1", "optim.max_lr=0.001,0.002")
    sweep = make(*words)
    freeze(sweep)
    before = (sweep.folder / "jobs" / "0002" / "config.yaml").read_text(encoding="utf-8")
    shutil.rmtree(sweep.folder / "jobs" / "0002")
    with pytest.raises(ConfigError, match="the frozen config of job 2, is gone; type the sweep's command again"):
        load_sweep(sweep.folder)
    capsys.readouterr()
    assert run_sweep_command([]) == 0
    said = capsys.readouterr().out
    assert "Not read: " in said and "the frozen config of job 2, is gone" in said and "There is no sweep" not in said
    again = make(*words)
    freeze(again)
    assert [job.number for job in again.jobs] == [1, 2, 3, 4]
    assert (sweep.folder / "jobs" / "0002" / "config.yaml").read_text(encoding="utf-8") == before
    assert load_sweep(sweep.folder).jobs[1].values == sweep.jobs[1].values
    # A run that was made has its config itself.
    shutil.copytree(sweep.folder / "jobs" / "0002", sweep.jobs[1].folder)
    shutil.rmtree(sweep.folder / "jobs" / "0002")
    assert load_sweep(sweep.folder).jobs[1].run == sweep.jobs[1].run


def test_a_damaged_sweep_is_named(make: Make, capsys: pytest.CaptureFixture[str]):
    sweep = make("seed.init=0,1")
    freeze(sweep)
    text = (sweep.folder / "sweep.json").read_text(encoding="utf-8")
    (sweep.folder / "sweep.json").write_text(text[: len(text) // 2], encoding="utf-8")
    for command in (["sweep"], ["sweep", str(sweep.folder)], ["report", str(sweep.folder)], ["runs", str(sweep.folder)]):
        code = main(command)
        output = capsys.readouterr()
        assert code == (0 if command == ["sweep"] else 2)
        assert "sweep.json is damaged: " in (output.out if code == 0 else output.err), command


def test_a_failed_job_stops_no_other_and_is_tried_again_from_frozen_configs(make: Make, tmp_path: Path, capsys):
    preset = tmp_path / "experiment" / "mine.yaml"
    preset.parent.mkdir()
    preset.write_text("# @package _global_\n# Mine?\nguard:\n  spike_deviations: 5.0\n", encoding="utf-8")
    words = ("experiment=mine", "seed.init=0,1", "sweep.at_once=1")
    sweep = make(*words, config_dir=tmp_path)
    blocked = sweep.jobs[0].folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the first job's folder would be", encoding="utf-8")
    assert run_sweep(sweep) == 1
    said = capsys.readouterr().out
    assert statuses(sweep) == ["failed (ConfigError)", "finished"]
    rule = f"{relative(blocked)} cannot be written: File exists; move the file that is in its place"
    assert said.index(rule) < said.index("[2/2] seed.init=1: finished"), "the error is shown at once"
    assert "1 of 2 jobs failed; the same command, or llama-lab sweep" in said
    assert "bits/byte" in said
    assert f"The report: {sweep.folder / 'report.html'}" in said and (sweep.folder / "report.html").is_file()
    finished = {job.folder: _state(RunFolder(job.folder)) for job in sweep.jobs[1:]}

    blocked.unlink()
    preset.write_text(preset.read_text(encoding="utf-8").replace("5.0", "4.0"), encoding="utf-8")
    again = make(*words, config_dir=tmp_path)
    assert again.jobs[0].run.guard.spike_deviations == 4.0
    assert run_sweep(again) == 0
    assert statuses(again) == ["finished", "already finished"]
    assert {path: _state(RunFolder(path)) for path in finished} == finished
    assert _broken(RunFolder(again.jobs[0].folder)) == []
    assert load_config(blocked / "config.yaml").guard.spike_deviations == 5.0, "as when the sweep began"


def test_a_sweep_ends_when_its_first_jobs_fail_alike(make: Make, tmp_path: Path, capsys):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n", encoding="utf-8")
    sweep = make(f"data.path={blank}", "seed.init=range(6)", "sweep.at_once=1")
    assert run_sweep(sweep) == 1
    assert statuses(sweep) == ["failed (ConfigError)"] * 3 + ["not started"] * 3
    said = capsys.readouterr().out
    assert "The first 3 jobs failed with the same error" in said
    assert "blank.txt" in said
    # What failed before it had a run is still said to have failed.
    assert known_outcome(sweep, sweep.jobs[0]).status == "failed (ConfigError)"


def test_nothing_is_started_where_a_job_has_nothing_to_train_on(make: Make, text: Path, tmp_path: Path):
    near = tmp_path / "corpus.jsonl"
    shutil.copy(text, near)
    sweep = make(f"data.path={near},{tmp_path / 'corpsu.jsonl'}", "seed.init=0,1")
    with pytest.raises(ConfigError) as caught:
        run_sweep(sweep)
    heading, said = str(caught.value).splitlines()
    assert heading == "1 problem in this sweep of 4 jobs; none was started"
    assert said.endswith(f"; did you mean {near}? (jobs 3, 4)")
    assert not sweep.folder.exists()
    # A run that is finished needs its text no more.
    for job in (done := make(f"data.path={near}", "seed.init=0,1")).jobs:
        train(job.run)
    near.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        run_sweep(make(f"data.path={near}", "seed.init=0,2"))
    refuse_missing_data(done)


def test_a_sweep_that_is_interrupted_saves_its_jobs_and_goes_on(make: Make, capsys):
    # Long enough that a busy machine does not end the first before it is asked to.
    sweep = make("training_tokens=102400", "log.every_updates=50", "eval.every_updates=1000", "seed.init=0,1", "sweep.at_once=1")

    def interrupt() -> None:
        wait_for((sweep.jobs[0].folder / "metrics.jsonl").is_file)
        # Not Ctrl-C: a shell that runs the tests in the background has made this process deaf to it.
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(interrupt):
        assert run_sweep(sweep) == 75
    assert statuses(sweep) == ["preempted", "not started"]
    assert "2 of 2 jobs are not finished" in capsys.readouterr().out
    assert run_sweep_command([str(sweep.folder), "--show"]) == 0
    assert "interrupted" in capsys.readouterr().out
    assert run_sweep(load_sweep(sweep.folder)) == 0
    said = capsys.readouterr().out
    assert "[1/2] seed.init=0: started again" in said
    assert [problem for job in sweep.jobs for problem in _broken(RunFolder(job.folder))] == []
    printed = (sweep.folder / "jobs" / "0001" / "output.log").read_text(encoding="utf-8")
    assert printed.count("Step: 200 ") == 1


def test_a_sweep_goes_on_where_its_paths_lead_from(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    shutil.copy(text, tmp_path / "near.jsonl")
    monkeypatch.chdir(tmp_path)
    sweep = make("seed.init=0,1", "sweep.at_once=1", "data.path=near.jsonl")
    freeze(sweep)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_sweep_command([str(sweep.folder)]) == 0
    assert f"In {tmp_path}, where it was started\n" in capsys.readouterr().out
    assert statuses(sweep) == ["finished"] * 2


def test_a_sweep_that_is_made_anew_is_made_anew_once(make: Make):
    words = ("seed.init=0,1", "sweep.at_once=1", "fresh=true")
    sweep = make(*words)
    assert run_sweep(sweep) == 0
    made = {job.folder: _state(RunFolder(job.folder)) for job in sweep.jobs}
    # As a sweep that is killed while its second job runs leaves it.
    sweep.jobs[1].run.fresh = True
    keep_config(sweep, sweep.jobs[1])
    assert run_sweep(load_sweep(sweep.folder)) == 0
    assert statuses(sweep) == ["already finished"] * 2
    assert {path: _state(RunFolder(path)) for path in made} == made
    assert run_sweep(make(*words)) == 0
    assert statuses(sweep) == ["finished"] * 2, "it was typed again"


def test_a_job_that_runs_out_of_memory_gets_a_smaller_micro_batch(make: Make, capsys):
    big = ("data.tokens_per_update=65536", "training_tokens=65536", "schedule.warmup_updates=0", "eval.max_tokens=64")
    sweep = make(*big, "hardware.micro_batch=2048", "seed.init=0,1", "sweep.at_once=1")
    Local(sweep)
    # Until the process that jobs are forked from has imported everything.
    first = multiprocessing.get_context("forkserver").Process(target=int)
    first.start()
    first.join()
    server = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    size = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{server._forkserver_pid}/status").read_text())[1]) * 1024  # pyright: ignore
    before = resource.prlimit(server._forkserver_pid, resource.RLIMIT_AS)
    resource.prlimit(server._forkserver_pid, resource.RLIMIT_AS, (size + 400 * 2**20, before[1]))
    try:
        assert run_sweep(sweep) == 0
    finally:
        resource.prlimit(server._forkserver_pid, resource.RLIMIT_AS, before)
    said = capsys.readouterr().out
    assert "[1/2] seed.init=0: out of memory; tried again with hardware.micro_batch=1024, which leaves the curve" in said
    assert load_sweep(sweep.folder).jobs[0].run.micro_batch <= 1024
    assert statuses(sweep) == ["finished", "finished"]


def test_a_job_that_falls_behind_is_stopped_for_good(make: Make, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    words = (
        "training_tokens=153600",
        "log.every_updates=10",
        "eval.every_updates=10",
        "eval.max_tokens=64",
        "optim.max_lr=2e-2,1e-6",
        "seed.init=0,1",
    )
    sweep = make(*words, "sweep.at_once=1", "sweep.halvings=2", "sweep.noise=0")
    sweep.jobs.sort(key=lambda job: job.values["seed.init"])
    assert run_sweep(sweep) == 0
    good, bad, *second = statuses(sweep)
    assert good == "finished"
    assert bad.startswith("stopped early after update ")
    said = capsys.readouterr().out
    bound = re.search(r"falls behind and is stopped: val/loss (\S+) after update \d+, where it took (\S+) or lower to go on", said)
    assert bound is not None and float(bound[1]) > float(bound[2])
    assert "The report: " in said, "also where one arm alone is left"
    # The second seed of the point that fell behind is not begun.
    assert second == ["finished", "stopped early with job 3"]


def test_a_search_goes_on_where_it_was_with_more_trials(make: Make):
    words = ("optim.max_lr=tag(log,interval(1e-3,1e-1))", "optim=muon,adamw", "sweep.search=optuna")
    first = make(*words, "sweep.trials=2")
    assert run_sweep(first) == 0
    assert len(first.jobs) == 2
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{first.folder / 'search.db'}")
    done = optuna.trial.TrialState.COMPLETE
    assert [trial.state for trial in study.trials] == [done] * 2
    assert [trial.value for trial in study.trials] == [RunFolder(job.folder).summary()["val/loss"] for job in first.jobs]
    # A kill between a proposal and its jobs leaves the one without the other; the next start tries 3 points all the same.
    study.ask()
    more = make(*words, "sweep.trials=3")
    assert more.folder == first.folder
    assert run_sweep(more) == 0
    assert statuses(more) == ["already finished"] * 2 + ["finished"]
    failed = optuna.trial.TrialState.FAIL
    assert [trial.state for trial in study.get_trials()] == [done] * 2 + [failed] + [done]
    assert len({job.folder for job in more.jobs if job.folder.is_dir()}) == 3


def test_what_is_half_done_goes_on_first_and_its_room_is_kept_while_it_is_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(run, "SAVING_SECONDS", 170.0)
    sweep = make("seed.init=0,1,2", "sweep.at_once=1", "training_tokens=5120")
    freeze(sweep)
    # As a sweep leaves it that was killed while it trained the last.
    half = RunFolder(sweep.jobs[2].folder)
    half.path.mkdir(parents=True)
    save_config(sweep.jobs[2].run, half.path / "config.yaml")
    is_held, seen = threading.Event(), []

    def save() -> None:
        with hold_run(half.path):
            half.write_summary(status="running", update=4)
            is_held.set()
            wait_for(lambda: "waiting for it" in capsys.readouterr().out)
            seen.extend(statuses(sweep))
            shutil.rmtree(half.path)

    with meanwhile(save):
        is_held.wait()
        assert known_outcome(sweep, sweep.jobs[2]).status == "running"
        assert run_sweep(load_sweep(sweep.folder)) == 0
    assert seen == ["not started", "not started", "running"], "what had not begun left it the room"
    started = re.findall(r"seed.init=(\d): started", capsys.readouterr().out)
    assert started == ["2", "0", "1"]


def test_the_summary_says_running_of_what_runs(make: Make, monkeypatch: pytest.MonkeyPatch):
    sweep, seen = make("seed.init=0,1", "sweep.at_once=1"), []
    wait = Local.wait

    def look(place: Local, seconds: float) -> None:
        seen.append(statuses(sweep))
        wait(place, seconds)

    monkeypatch.setattr(Local, "wait", look)
    assert run_sweep(sweep) == 0
    assert seen[0] == ["running", "not started"]


def test_a_search_counts_what_finished_and_prunes_what_did_not(make: Make, capsys):
    words = ("optim.max_lr=tag(log,interval(1e-3,1e-1))", "seed.init=0,1", "sweep.search=optuna", "sweep.trials=9")
    sweep = make(*words)
    freeze(sweep)
    points = [sweep.jobs[at : at + 2] for at in (0, 2, 4)]
    early = "stopped early after update 5"
    outcomes = [("finished", 2.0), ("finished", 3.0), ("finished", 2.5), (early, 9.0), (early, 8.0), (early, 6.0)]
    for job, (status, loss) in zip(sweep.jobs, outcomes, strict=True):
        job.folder.mkdir(parents=True)
        update = 4 if loss == 6.0 else 2
        rows = [{"update": update, "val/loss": loss}, {"update": 5, "train/loss": 7.0}]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        job.outcome = Outcome(status, str(job.folder), 5, 5, {"val/loss": loss})
        keep_outcome(sweep, job)
    proposer = Proposer(sweep)
    proposer.tell()
    told = [(trial.state.name, trial.value) for trial in proposer._study.trials]
    assert told == [("COMPLETE", 2.5), ("COMPLETE", 2.5), ("PRUNED", 6.0)]
    assert proposer._study.trials[2].intermediate_values == {4: 6.0}
    results = [point_result(jobs, sweep.settings) for jobs in points]
    assert [(one.mean, one.stopped, one.last) for one in results] == [(2.5, 0, None), (2.5, 1, None), (None, 2, (4, 6.0))]
    print_results(sweep)
    table = capsys.readouterr().out.partition("over the seeds")[2].splitlines()
    assert [line.split()[1:] for line in table[2:5]] == [
        ["2", "2.5000", "0.7071"],
        ["1", "2.5000", "1"],
        ["0", "2,", "last", "6.0000", "after", "update", "4"],
    ]


def test_a_run_that_somebody_else_trains_is_waited_for(make: Make, capsys):
    sweep = make("seed.init=3,4", "sweep.at_once=1")
    is_held, said = threading.Event(), []

    def hold() -> None:
        with hold_run(sweep.jobs[0].folder):
            is_held.set()
            wait_for(lambda: RunFolder(sweep.jobs[1].folder).finished)
            said.append("let go")

    with meanwhile(hold):
        is_held.wait()
        assert run_sweep(sweep) == 0
    assert said == ["let go"]
    assert "[1/2] seed.init=3: is being trained by another process; waiting for it" in capsys.readouterr().out
    with hold_sweep(sweep.folder), pytest.raises(ConfigError, match="is being run by process"):
        run_sweep(sweep)
    # W&B is sent all members by the sweep's folder, and the list of sweeps has it.
    assert [folder.path for folder in track._named([str(sweep.folder)])] == [job.folder for job in sweep.jobs]
    assert run_sweep_command([]) == 0
    assert re.search(rf"{sweep.folder.name} +2 +2 +0 +0", capsys.readouterr().out)
    with pytest.raises(ConfigError, match="holds no sweep"):
        run_sweep_command([str(sweep.folder.parent)])


def test_the_live_table_shows_what_runs(make: Make):
    sweep = make("seed.init=0,1")
    board = Board(sweep)
    job = sweep.jobs[1]
    job.folder.mkdir(parents=True)
    RunFolder(job.folder).write_summary(**{"update": 3, "train/loss": 4.25, "speed/tokens_per_second": 1234.5})
    board.running[2] = time.monotonic()
    console = Console(width=120)
    with console.capture() as captured:
        console.print(board._table())
    shown = captured.get()
    assert re.search(r"2 +1 +3/10 +4\.2500 +1,23[45] +0\.\ds", shown), shown
    assert "0 of 2 finished | 1 running" in shown


def test_a_killed_sweep_ends_complete_with_nothing_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """By default one kill of everything; LLAMA_LAB_SWEEP_JOBS=24 has so many jobs and three kills, as kill_sweeps.py by itself."""
    write_text(tmp_path)
    if jobs := int(os.environ.get("LLAMA_LAB_SWEEP_JOBS", 0)):
        assert survive(Bench(tmp_path, jobs), kills=3, seed=0) == []
        return
    bench = Bench(tmp_path, jobs=2, updates=20)
    process = bench.start("sweep.at_once=1")
    wait_for(lambda: any(run.finished for run in bench.runs))
    for victim in [process.pid, *_descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()
    before = {run.path: _state(run) for run in bench.runs if run.finished}
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    (folder,) = (tmp_path / "outputs" / "killed" / "sweeps").glob("init-*")
    assert run_sweep(load_sweep(folder)) == 0
    assert {path: _state(RunFolder(path)) for path in before} == before != {}
    assert [problem for run in bench.runs for problem in _broken(run)] == []
    assert len(bench.runs) == 2


def test_what_was_trained_on_another_text_is_no_result_of_a_sweep(make: Make, text: Path, tmp_path: Path):
    own = tmp_path / "corpus.jsonl"
    own.write_bytes(text.read_bytes())
    sweep = make("seed.init=0,1", f"data.path={own}")
    train(sweep.jobs[0].run)
    own.write_text(own.read_text(encoding="utf-8").replace("loss", "gain"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the data changed from \w+ to \w+ since this run was trained"):
        run_sweep(sweep)


@pytest.mark.gpu
def test_several_jobs_share_the_gpus_there_are(make: Make, capsys):
    sweep = make("hardware=gpu", "precision=auto", "hardware.compile=never", "seed.init=range(5)", "sweep.jobs_per_gpu=2")
    assert run_sweep(sweep) == 0
    assert statuses(sweep) == ["finished"] * 5
    assert re.search(r"at once on \d+ GPU", capsys.readouterr().out)
    outputs = [(sweep.folder / "jobs" / f"{job.number:04}" / "output.log").read_text(encoding="utf-8") for job in sweep.jobs]
    assert all("Device: 1 process on NVIDIA" in output for output in outputs)


SHELL = {
    "sbatch": 'cp "$1" "$RECORD/$$.sh"\necho "Submitted batch job $$"',
    "squeue": "exit 0",
    "sacct": "echo ' FAILED '",
    "scancel": "exit 0",
    "srun": "exit 0",
}
"""Commands of a Slurm that loses every job at once."""


def test_what_slurm_is_asked_for_and_what_is_said_of_a_job_that_it_lost(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    pytest.importorskip("submitit")
    commands, record = tmp_path / "bin", tmp_path / "record"
    commands.mkdir()
    record.mkdir()
    for name, body in SHELL.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setattr(slurm, "ASKED_SECONDS", 0.1)
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.1)
    asked = ("sweep.slurm.partition=long", "sweep.slurm.minutes=90", "sweep.slurm.memory_gib=8", "sweep.slurm.options=['qos=high']")
    sweep = make("seed.init=0,1", "sweep.launcher=slurm", "sweep.at_once=1", *asked)
    assert run_sweep(sweep) == 1
    assert statuses(sweep) == ["failed (FAILED)"] * 2
    assert "ended without a word, and Slurm says FAILED of it" in capsys.readouterr().out
    script = next(record.glob("*.sh")).read_text()
    for line in ("--partition=long", "--time=90", "--mem=8GB", "--qos=high", "--cpus-per-task=4", "--signal=USR1@120"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script


@pytest.mark.skipif(
    shutil.which("sbatch") is None or not os.environ.get("LLAMA_LAB_SLURM"), reason="LLAMA_LAB_SLURM=1 where Slurm is"
)
def test_a_sweep_runs_through_slurm(make: Make):
    sweep = make("seed.init=0,1", "sweep.launcher=slurm", "sweep.slurm.cpus=1")
    assert run_sweep(sweep) == 0
    assert statuses(sweep) == ["finished"] * 2


def test_slurm_is_refused_where_it_is_not(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="finds no sbatch here"):
        run_sweep(make("seed.init=0,1", "sweep.launcher=slurm"))


def test_the_agent_of_wandb_types_what_train_takes():
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    # As W&B reads it; to OmegaConf ${…} would be an interpolation.
    asked = yaml.safe_load((Path(__file__).parents[2] / "docs" / "wandb_sweep.yaml").read_text(encoding="utf-8"))
    words = agent.create_sweep_command(asked["command"])
    drawn = {"optim.max_lr": {"value": 0.0123}, "schedule.cooldown_fraction": {"value": 0.4}, "seed.init": {"value": 2}}
    assert drawn.keys() == asked["parameters"].keys()
    typed = agent.create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    at = words.index("${args_no_hyphens}")
    assert words[:2] == ["llama-lab", "train"]
    run = compose(words[2:at] + typed)
    assert (run.optim.max_lr, run.seed.init) == (0.0123, 2)
    assert asked["metric"]["name"] == "val/loss"
