"""A sweep's folder: what was asked for, the config of every job as it was when the sweep started, and what became of it.

    outputs/<name>/sweeps/<swept keys>-<hash>/
      sweep.json           what was typed, the settings, the jobs, and every start
      jobs/0001/           config.yaml (frozen), outcome.json, output.log (what the job printed)
      bases/0001.yaml      for a search: a frozen config for each combination of options and seeds
      search.db            for a search: Optuna's study
      summary.csv          a line a job

A YAML that is edited while a sweep runs, or between two starts of it, changes none of its jobs. Only the process that holds the
folder writes in it, jobs excepted, which write their own output.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import former_run_id, load_config, run_id, save_config
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import Direction, Launcher, Search, SlurmConfig, SweepConfig
from llama_lab.lab.runs.listing import RUNNING
from llama_lab.lab.runs.sweeps import SWEEP_FILE, read_sweep
from llama_lab.lab.sweep.jobs import BEFORE_START, Job, Outcome, Sweep
from llama_lab.lab.sweep.ranking import unranked
from llama_lab.lab.sweep.space import Axis
from llama_lab.training.run_folder import RunFolder, hold_run, relative, write_json
from llama_lab.training.scrub import scrub_command

FORMAT_VERSION = 1
# Drawn behind the last update; a run that was killed before it lacks nothing else.
LAST_FILE = Path("plots/throughput.png")
ENUMS = {"search": Search, "direction": Direction, "launcher": Launcher}


@contextlib.contextmanager
def hold_sweep(folder: Path) -> Iterator[None]:
    """Hold a sweep for as long as the context lasts.

    Raises:
        ConfigError: it is running already.
    """
    try:
        with hold_run(folder):
            yield
    except ConfigError as error:
        held = [(subject, rule.replace("is being trained by", "is being run by")) for subject, rule in error.problems]
        raise ConfigError(held, scope="this sweep") from None


def freeze(sweep: Sweep) -> None:
    """Write down what the sweep is made of; of a sweep that was started before, take what was written then.

    Where the same overrides are typed again, its jobs keep their frozen configs, whatever has become of the YAML since. Where
    others are, which make the same runs (another micro-batch, say), jobs that are not finished get the configs made of these.
    """
    known = read_sweep(sweep.folder)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    take_over(sweep)
    for job in sweep.jobs:
        _save_job(sweep, job)
    for number, base in enumerate(sweep.bases, start=1):
        path = sweep.folder / "bases" / f"{number:04}.yaml"
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            save_config(base.run, path)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": now, "command": scrub_command(sweep.command), "directory": str(Path.cwd())}
    starts = [*known.get("starts", []), start]
    _write(sweep, starts)


def take_over(sweep: Sweep) -> None:
    """Put the jobs of an earlier start in the place of those that were composed now, and keep what is new behind them."""
    known = read_sweep(sweep.folder)
    if not known:
        return
    composed = {job.folder: job for job in sweep.jobs}
    frozen = [_load_job(sweep.folder, entry, known["starts"][-1]["time"], composed) for entry in known["jobs"]]
    is_same = known["fixed"] == sweep.fixed
    for job in frozen:
        now = composed.get(job.folder)
        if now is not None and not is_same:
            job.run, job.overrides = now.run, now.overrides
        elif now is not None:
            # Words to this start, not to the run.
            job.run.fresh, job.run.accept_changes = now.run.fresh, now.run.accept_changes
    there = {job.folder for job in frozen}
    # What Optuna has chosen stands in the place of what it would be given to start with.
    new = [] if sweep.settings.search is Search.optuna else [job for job in sweep.jobs if job.folder not in there]
    for number, job in enumerate(new, start=len(frozen) + 1):
        job.number = number
    sweep.jobs = [*frozen, *new]


def add_jobs(sweep: Sweep, jobs: list[Job]) -> None:
    """Freeze further jobs."""
    for number, job in enumerate(jobs, start=len(sweep.jobs) + 1):
        job.number = number
        _save_job(sweep, job)
    sweep.jobs += jobs
    save_trials(sweep)


def save_trials(sweep: Sweep) -> None:
    """Write down which point of Optuna's each job is of."""
    _write(sweep, read_sweep(sweep.folder).get("starts", []))


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP_FILE).is_file()


def load_sweep(folder: Path) -> Sweep:
    """A sweep as it was frozen.

    Raises:
        ConfigError: the folder holds none, or files of it are damaged or gone.
    """
    known = read_sweep(folder)
    if not known:
        named = "name outputs/<name>/sweeps/<sweep>"
        rule = f"holds no sweep; {named}" if folder.is_dir() else f"is no folder of a sweep; {or_meant(folder, named)}"
        raise ConfigError([(str(folder), rule)], scope="this request")
    folder = folder.absolute()
    saved: dict[str, Any] = dict(known["settings"])
    saved |= {name: kind[saved[name]] for name, kind in ENUMS.items()}
    saved["slurm"] = SlurmConfig(**saved["slurm"])
    settings = SweepConfig(**saved)
    axes = [Axis(**axis | {"choices": tuple(axis["choices"])}) for axis in known["axes"]]
    sweep = Sweep([], folder, settings, axes, known["fixed"], [], known["starts"][-1]["command"])
    sweep.jobs = [_load_job(folder, entry, known["starts"][-1]["time"]) for entry in known["jobs"]]
    for path, values in zip(sorted((folder / "bases").glob("*.yaml")), known["bases"], strict=True):
        run = load_config(path)
        sweep.bases.append(Job(sweep.fixed + [f"{key}={value}" for key, value in values.items()], values, run, None, folder))
    sweep.unranked = unranked([job.run for job in (*sweep.jobs, *sweep.bases)], settings.objective)
    return sweep


def directory_of(folder: Path) -> Path:
    """Where a sweep was started last, which is where the relative paths of its jobs lead from; here if that is gone."""
    directory = Path(read_sweep(folder)["starts"][-1].get("directory", "."))
    return directory if directory.is_dir() else Path.cwd()


def job_folder(sweep: Sweep, job: Job) -> Path:
    """Where a job's frozen config and its printed lines are."""
    return sweep.folder / "jobs" / f"{job.number:04}"


def keep_outcome(sweep: Sweep, job: Job) -> None:
    """Write down how a job ended."""
    write_json(job_folder(sweep, job) / "outcome.json", asdict(job.outcome))


def keep_config(sweep: Sweep, job: Job) -> None:
    """Freeze a job's config anew, after something of it had to change."""
    save_config(job.run, job_folder(sweep, job) / "config.yaml")


def forget_first_words(sweep: Sweep, job: Job) -> None:
    """Take back what holds for one start of a job once that has begun: the next must not move its run aside again."""
    since = read_sweep(sweep.folder)["starts"][-1]["time"]
    if (job.run.fresh or job.run.accept_changes) and _has_begun(job.folder, since):
        job.run.fresh = job.run.accept_changes = False
        keep_config(sweep, job)


def _has_begun(folder: Path, since: str) -> bool:
    """Whether a run was started at or after a moment."""
    form = "%Y-%m-%dT%H:%M:%S%z"
    starts = [datetime.strptime(start["time"], form) for start in RunFolder(folder).meta().get("starts", [])]
    return bool(starts) and starts[-1] >= datetime.strptime(since, form)


def known_outcome(sweep: Sweep, job: Job) -> Outcome:
    """What an earlier start, or the run itself, has left behind. What is finished is not started again."""
    known = {} if job.run.fresh else RunFolder(job.folder).summary()
    path = job_folder(sweep, job) / "outcome.json"
    kept = Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() and not job.run.fresh else None
    if known.get("status") == "finished" and (job.folder / LAST_FILE).is_file():
        return Outcome("already finished", str(job.folder), known.get("update", 0), known.get("tokens", 0), known)
    if kept is not None and kept.stopped_early:
        return kept
    if not job.run.fresh and (job.folder / "config.yaml").is_file():
        status = known.get("status", RUNNING)
        if status in (RUNNING, "preempted", "finished"):
            # Of a process that was killed the run still says that it is running.
            status = RUNNING if status == RUNNING and is_held(job.folder) else "interrupted" if known else BEFORE_START
        return Outcome(status, str(job.folder), known.get("update", 0), known.get("tokens", 0), known)
    return kept if kept is not None and kept.failed else Outcome("not started")


def is_held(path: Path) -> bool:
    """Whether a process has a run's folder."""
    lock = path.parent / ".locks" / f"{path.name}.lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _save_job(sweep: Sweep, job: Job) -> None:
    path = job_folder(sweep, job)
    path.mkdir(parents=True, exist_ok=True)
    keep_config(sweep, job)


def _load_job(folder: Path, entry: dict[str, Any], since: str, composed: Mapping[Path, Job] | None = None) -> Job:
    """A job as it was frozen, by a sweep that was last started at `since`.

    Where its frozen config is gone, its run has it too, and a sweep that is typed again has `composed` it.
    """
    path = folder / "jobs" / f"{entry['number']:04}" / "config.yaml"
    where = Path(os.path.normpath(folder / entry["folder"]))
    if not path.is_file() and (where / "config.yaml").is_file():
        path = where / "config.yaml"
    elif not path.is_file():
        if (now := (composed or {}).get(where)) is not None:
            return replace(now, number=entry["number"], trial=entry["trial"])
        rule = f"the frozen config of job {entry['number']}, is gone; type the sweep's command again, which freezes it anew"
        raise ConfigError([(relative(path.absolute()) + ",", rule)], scope="this sweep")
    run = load_config(path)
    # A sweep that was frozen when runs had other names: a run that has not begun since gets the one of today.
    if where.name == former_run_id(run, entry["slug"]) and not where.is_dir():
        where = where.with_name(run_id(run, entry["slug"]))
    if run.fresh and _has_begun(where, since):  # and the sweep was killed before it took note
        run.fresh = run.accept_changes = False
    return Job(entry["overrides"], entry["values"], run, entry["slug"], where, number=entry["number"], trial=entry["trial"])


def _write(sweep: Sweep, starts: list[dict[str, Any]]) -> None:
    settings = asdict(sweep.settings) | {name: getattr(sweep.settings, name).name for name in ENUMS}
    content = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "axes": [asdict(axis) for axis in sweep.axes],
        "fixed": sweep.fixed,
        "bases": [base.values for base in sweep.bases],
        "jobs": [
            {
                "number": job.number,
                "values": job.values,
                "overrides": job.overrides,
                "slug": job.slug,
                # Relative, so that outputs/ can be moved as a whole.
                "folder": os.path.relpath(job.folder, sweep.folder),
                "trial": job.trial,
            }
            for job in sweep.jobs
        ],
        "starts": starts,
    }
    write_json(sweep.folder / SWEEP_FILE, content)
