"""A sweep: one command that stands for many runs, checked as a whole, run one after another, ended by a table.

    overrides -> swept keys x values -> jobs (composed, validated, named) -> processes -> table, summary.csv

What a comma list, `range`, `choice` or `glob` means is Hydra's to say: its parser expands them. Its launcher is not used: it runs
jobs in one process, checks a job when its turn comes, shows errors at the end, and numbers folders anew at every start. Here a
run's folder follows from its config, so a sweep that is typed again skips what is finished and goes on with what is not.
"""

import csv
import hashlib
import itertools
import os
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from llama_lab.config.compose import Request, compose, read_request
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import is_science, run_folder, slug_part
from llama_lab.config.overrides import PRESET
from llama_lab.config.paths import option_file, options
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Problem, RunConfig
from llama_lab.lab.job import Outcome, StopRequest, start_job
from llama_lab.lab.table import print_table
from llama_lab.training.run_folder import RunFolder

COLUMNS = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "train/loss": "train loss",
    "tokens": "tokens",
    "seconds": "seconds",
}
"""Metric key, as in summary.csv -> heading of the printed table."""


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        overrides: what composes it.
        values: swept key -> its value in this job, as typed.
        run: the validated, resolved config.
        slug: what distinguishes it from the others without changing the science; null: nothing.
        folder: where it will be.
    """

    overrides: list[str]
    values: dict[str, str]
    run: RunConfig
    slug: str | None
    folder: Path
    outcome: Outcome = field(default_factory=lambda: Outcome("not started"))


@dataclass
class Sweep:
    """Jobs that were asked for together.

    Attributes:
        folder: where its summary is kept; the same for the same jobs.
    """

    jobs: list[Job]
    folder: Path


def expand(overrides: list[str], *, multirun: bool, config_dir: Path | None = None) -> Sweep | None:
    """Every job that the overrides stand for, validated; nothing is started and nothing is written.

    Args:
        multirun: whether several runs were asked for. A preset may ask for them too.

    Returns:
        None if this is one run.

    Raises:
        ConfigError: all problems of all jobs, equal ones once; a list without values; two jobs that are the same run.
    """
    keys = [word.partition("=")[0] for word in overrides]
    if not multirun and not {PRESET, "hydra.mode"} & set(keys):
        return None
    request = read_request(overrides, config_dir=config_dir)
    if not multirun and not request.is_sweep:
        return None
    fixed, swept = _axes(request, config_dir)
    if not swept:
        if multirun:
            raise _refused([("-m", "needs a key with several values, such as seed.init=0,1,2; without -m this is one run")])
        return None
    if "RANK" in os.environ:
        rule = "is several runs, which torchrun or srun (RANK is set) would start in every process; type it without them"
        raise _refused([(_label({key: ",".join(values) for key, values in swept.items()}), rule)])
    combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    jobs = _build_jobs(fixed, combinations, config_dir)
    return Sweep(jobs, _sweep_folder(jobs))


def describe(sweep: Sweep) -> str:
    """The jobs and their folders, without starting them."""
    lines = [f"# {len(sweep.jobs)} jobs; summary in {sweep.folder}"]
    lines += [f"llama-lab train {shlex.join(job.overrides)}  # {job.folder}" for job in sweep.jobs]
    return "\n".join(lines)


def run_sweep(sweep: Sweep) -> int:
    """Run the jobs one after another, and print what came of them.

    Returns:
        The exit code: 1 if a job failed, 75 if the sweep was stopped, else 0.
    """
    for job in sweep.jobs:
        job.outcome = _known_outcome(job)
    summary = _write_summary(sweep)
    stop = StopRequest()
    with stop.forwarding():
        for number, job in enumerate(sweep.jobs, start=1):
            if stop.received:
                break
            count = f"[{number}/{len(sweep.jobs)}]"
            if job.outcome.status == "already finished":
                print(f"{count} {_label(job.values)}: already finished, {_near(job.folder)}", flush=True)
                continue
            print(f"\n{count} {_label(job.values)}", flush=True)
            started = time.monotonic()
            job.outcome = start_job(job.run, command=["llama-lab", "train", *job.overrides], slug=job.slug, stop=stop)
            job.outcome.summary.setdefault("seconds", round(time.monotonic() - started, 1))
            if job.outcome.failed:
                print(f"{count} {_label(job.values)}: {job.outcome.status}", flush=True)
            _write_summary(sweep)
    print()
    _print_results(sweep)
    print(f"\nThe same as a file: {_near(summary)}")
    failed = sum(job.outcome.failed for job in sweep.jobs)
    if failed and not stop.received:
        print(f"{failed} of {len(sweep.jobs)} jobs failed; the same command tries them again and skips what is finished")
        return 1
    left = [job for job in sweep.jobs if job.outcome.status not in ("finished", "already finished")]
    if left:
        print(f"{len(left)} of {len(sweep.jobs)} jobs are not finished; the same command goes on with them")
        return 75
    return 0


def _known_outcome(job: Job) -> Outcome:
    """What an earlier sweep or run left behind. What is finished is not started again: its process would only say so."""
    known = {} if job.run.fresh else RunFolder(job.folder).summary()
    if not known:
        return Outcome("not started")
    status = "already finished" if known["status"] == "finished" else known["status"]
    return Outcome(status, str(job.folder), known.get("update", 0), known.get("tokens", 0), known)


def _axes(request: Request, config_dir: Path | None) -> tuple[list[str], dict[str, list[str]]]:
    """(overrides that every job has, swept key -> its values). What is typed replaces what a preset sweeps over."""
    parser = OverridesParser.create()
    typed = {
        override.get_key_element(): override for override in request.overrides if not override.key_or_group.startswith("hydra.")
    }
    params = {key: parser.parse_override(f"{key}={text}") for key, text in request.sweep_params.items()}
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for key, override in (params | typed).items():
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
            continue
        line = override.input_line or key
        if not override.is_discrete_sweep():
            problems.append((line, f"names no values to try; a sweep over a grid takes {key}=a,b,c or range(start,stop,step)"))
            continue
        swept[key] = _values(override, config_dir)
        if not swept[key]:
            there = options(key, config_dir)
            what = (
                f"there are {', '.join(there)}"
                if there
                else "glob(...) chooses among the options of a group; type the values of a field"
            )
            problems.append((line, f"gives no values; {what}"))
        elif key == PRESET:
            nested = [
                preset for preset in swept[key] if option_file(PRESET, preset, config_dir) and _asks_for_sweep(preset, config_dir)
            ]
            problems += [(f"{PRESET}={preset}", "is a sweep itself; start it alone") for preset in nested]
    if problems:
        raise _refused(problems)
    return fixed, swept


def _values(override: Override, config_dir: Path | None) -> list[str]:
    chosen = override.value()
    if isinstance(chosen, Glob):
        return chosen.filter(options(override.key_or_group, config_dir))
    return list(override.sweep_string_iterator())


def _asks_for_sweep(preset: str, config_dir: Path | None) -> bool:
    return read_request([f"{PRESET}={preset}"], config_dir=config_dir).is_sweep


def _build_jobs(fixed: list[str], combinations: list[dict[str, str]], config_dir: Path | None) -> list[Job]:
    """The jobs, all of them sound and different."""
    jobs: list[Job] = []
    problems: dict[Problem, list[int]] = {}
    twins: list[Problem] = []
    first: dict[Path, int] = {}
    for number, values in enumerate(combinations, start=1):
        words = fixed + [f"{key}={value}" for key, value in values.items()]
        try:
            run = resolve(compose(words, config_dir=config_dir))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(number)
            continue
        parts = [slug_part(key, value) for key, value in values.items() if not is_science(key) and key not in ("name", PRESET)]
        slug = "-".join(parts) or None
        job = Job(words, values, run, slug, run_folder(run, slug))
        jobs.append(job)
        if (earlier := first.setdefault(job.folder, number)) != number:
            both = f"(jobs {earlier} and {number})"
            twins.append((_label(values), f"is the same run as {_label(combinations[earlier - 1])} {both}; leave one of them out"))
    listed = [(subject, rule + _whose(numbers, len(combinations))) for (subject, rule), numbers in problems.items()]
    if listed or twins:
        raise _refused(listed + twins, len(combinations))
    return jobs


def _refused(problems: list[Problem], jobs: int = 0) -> ConfigError:
    return ConfigError(problems, scope=f"this sweep of {jobs} jobs; none was started" if jobs else "this sweep")


def _whose(numbers: list[int], total: int) -> str:
    """Which jobs a problem belongs to, unless it is all of them."""
    if len(numbers) == total:
        return ""
    few = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f" (job {few})" if len(numbers) == 1 else f" (jobs {few})"


def _label(values: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _sweep_folder(jobs: list[Job]) -> Path:
    """`outputs/<name>/sweeps/<swept keys>-<hash of the jobs>`: the same for the same jobs, whatever their order."""
    keys = "-".join(re.sub(r"[^a-z0-9._]+", "_", key.rpartition(".")[2].lower()) for key in jobs[0].values)[:60]
    digest = hashlib.sha256("\n".join(sorted(str(job.folder.name) for job in jobs)).encode()).hexdigest()[:8]
    return jobs[0].folder.parent / "sweeps" / f"{keys}-{digest}"


def _write_summary(sweep: Sweep) -> Path:
    """Replace summary.csv with what is known now, so that a sweep that dies leaves what it had."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "summary.csv"
    draft = path.with_name(".summary.csv.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.jobs[0].values, *COLUMNS, "status", "folder"])
        for job in sweep.jobs:
            writer.writerow(
                [
                    *job.values.values(),
                    *[_metric(job, key) for key in COLUMNS],
                    job.outcome.status,
                    job.outcome.folder or job.folder,
                ]
            )
    draft.replace(path)
    return path


def _print_results(sweep: Sweep) -> None:
    headings = [*sweep.jobs[0].values, *COLUMNS.values(), "status", "folder"]
    rows = []
    for job in sweep.jobs:
        where = "" if job.outcome.folder is None else _near(Path(job.outcome.folder))
        rows.append([*job.values.values(), *[_short(key, _metric(job, key)) for key in COLUMNS], job.outcome.status, where])
    print_table(f"{len(sweep.jobs)} jobs", headings, rows)


def _metric(job: Job, key: str) -> Any:
    value = job.outcome.tokens or None if key == "tokens" else job.outcome.summary.get(key)
    return "" if value is None else value


def _short(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if key == "seconds" else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _near(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
