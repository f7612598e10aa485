"""From what was typed to the jobs of a sweep, all of them sound and different. Nothing is started and nothing is written."""

import difflib
import hashlib
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from llama_lab.config import grammar
from llama_lab.config.compose import Request, compose, read_request
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import former_run_id, science
from llama_lab.config.identity import values as by_key
from llama_lab.config.overrides import CHOSEN, PRESET, any_shape, fields_of_node, takes_no_value, unknown_field
from llama_lab.config.paths import option_file
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import AUTO, BudgetConfig, Device, Launcher, Precision, Problem, RunConfig, Search, SweepConfig
from llama_lab.lab.sweep.halving import rung_problems
from llama_lab.lab.sweep.jobs import Job, Sweep, place
from llama_lab.lab.sweep.ranking import fitting_objective, said_of_ranking, unranked
from llama_lab.lab.sweep.space import Axis, Point, axis_problems, draw_points, grid, label, read_axis, repeated

# TPE, Optuna's default, models what it has seen from here on; before that it draws by chance as well.
STARTUP_POINTS = 10
# W&B refuses a longer tag.
TAG_CHARACTERS = 64
METRICS = ("val/loss", "val/bits_per_byte", "val/perplexity", "best/val/loss", "train/loss", "train/grad_norm", "memory/peak_gib")
METRICS += ("speed/tokens_per_second", "speed/mfu")
"""Usual objectives, to tell one that is mistyped by; others are metrics too."""


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
        _refuse_settings(overrides)
        return None
    request = read_request(overrides, config_dir=config_dir)
    if not multirun and not request.is_sweep:
        _refuse_settings(overrides)
        return None
    fixed, axes = _axes(request, config_dir)
    if not axes:
        if multirun:
            raise refused([("-m", "needs a key with several values, such as seed.init=0,1,2; without -m this is one run")])
        return None
    if "RANK" in os.environ:
        rule = "is several runs, which torchrun or srun (RANK is set) would start in every process; type it without them"
        raise refused([(" ".join(f"{axis.key}={axis.text}" for axis in axes), rule)])
    settings = _settings(fixed, config_dir)
    # What starts the sweep says nothing of its runs, and alone none of them would take it.
    typed, fixed = fixed, [word for word in fixed if not word.startswith("sweep.")]
    draws = settings.search is not Search.grid
    if found := [problem for axis in axes for problem in axis_problems(axis, draws=draws)]:
        raise refused(found)
    jobs = build_jobs(fixed, _points(settings, axes), settings, config_dir)
    bases, ends = _bases(jobs[0], fixed, axes, settings, config_dir) if settings.search is Search.optuna else ([], [])
    kinds = [job.run for job in (*jobs, *bases, *ends)]
    settings = fitting_objective(settings, kinds, is_typed=any(word.startswith("sweep.objective=") for word in typed))
    command = ["llama-lab", "train", *(["-m"] if multirun else []), *overrides]
    command += ["--config-dir", str(config_dir)] if config_dir is not None else []
    sweep = Sweep(jobs, _sweep_folder(jobs, axes, settings), settings, axes, fixed, bases, command, jobs[0].run.budget)
    sweep.unranked = unranked(kinds, settings.objective)
    for job in (*sweep.jobs, *sweep.bases):
        job.run = as_member(job.run, sweep.folder)
    for number, job in enumerate(sweep.jobs, start=1):
        job.number = number
    return sweep


def describe(sweep: Sweep) -> str:
    """The jobs and their folders, without starting them."""
    more = f", and {sweep.to_come} to come from what these show" if sweep.to_come else ""
    lines = [f"# {len(sweep.jobs)} jobs{more}; summary in {sweep.folder}"]
    said = said_of_ranking(sweep.settings, [job.run for job in (*sweep.jobs, *sweep.bases)])
    lines += [f"# {said}"] if said is not None else []
    lines += [f"llama-lab train {shlex.join(job.overrides)}  # {job.folder}" for job in sweep.jobs]
    return "\n".join(lines)


def as_member(run: RunConfig, folder: Path) -> RunConfig:
    """The same run as one of several: the budget is that of all, and W&B is told the sweep as its group, and the study as a tag."""
    run = replace(run, budget=BudgetConfig())
    if run.wandb is None:
        return run
    tags = list(dict.fromkeys([*run.wandb.tags, run.name[:TAG_CHARACTERS]]))
    kind = "sweep" if run.wandb.job_type == "train" else run.wandb.job_type
    return replace(run, wandb=replace(run.wandb, group=run.wandb.group or f"{run.name}-{folder.name}", tags=tags, job_type=kind))


def build_jobs(
    fixed: list[str], points: list[Point], settings: SweepConfig, config_dir: Path | None, *, are_asked: bool = True
) -> list[Job]:
    """The jobs, all of them sound and different.

    Args:
        are_asked: whether somebody asked for just these points, and knows them by number.
    """
    jobs: list[Job] = []
    problems: dict[Problem, list[int]] = {}
    twins: list[Problem] = []
    first: dict[Path, int] = {}
    for number, values in enumerate(points, start=1):
        words = fixed + [f"{key}={value}" for key, value in values.items()]
        try:
            run = _resolved(compose(words, config_dir=config_dir), settings)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(number)
            continue
        for problem in rung_problems(run, settings) + _objective_problems(run, settings):
            problems.setdefault(problem, []).append(number)
        slug, folder = place(run, values)
        jobs.append(Job(words, values, run, slug, folder))
        if (earlier := first.setdefault(folder, number)) != number:
            both = f"(jobs {earlier} and {number})"
            twins.append((label(values), f"is the same run as {label(points[earlier - 1])} {both}; leave one of them out"))
    listed = [(subject, rule + (whose(numbers, len(points)) if are_asked else "")) for (subject, rule), numbers in problems.items()]
    if listed or twins:
        raise refused(listed + twins, len(points) if are_asked else 0)
    return jobs


def _settings(fixed: list[str], config_dir: Path | None) -> SweepConfig:
    """How the sweep is run: what its preset and the command line say."""
    words = [word for word in fixed if word.lstrip("+~").startswith(("sweep.", f"{PRESET}="))]
    settings = compose(words, config_dir=config_dir, nodes=["sweep"]).sweep
    assert settings is not None
    return settings


def _points(settings: SweepConfig, axes: list[Axis]) -> list[Point]:
    """The points that are known before anything has run."""
    if settings.search is Search.grid:
        return grid(axes)
    drawn = [axis for axis in axes if not axis.is_seed]
    if not drawn:
        subject = " ".join(f"{axis.key}={axis.text}" for axis in axes)
        rule = f"repeats runs, and leaves sweep.search={settings.search.name} nothing to choose; sweep.search=grid runs them"
        raise refused([(subject, rule)])
    assert settings.trials is not None
    count = settings.trials if settings.search is Search.random else min(settings.trials, STARTUP_POINTS, -(-settings.trials // 3))
    return repeated(draw_points(drawn, count, settings.seed), axes)


def _bases(
    first: Job, fixed: list[str], axes: list[Axis], settings: SweepConfig, config_dir: Path | None
) -> tuple[list[Job], list[Job]]:
    """A job for each combination of options and seeds, with the first drawn values for the rest; and one for each further value or
    end of an axis, which has to be sound too.

    Raises:
        ConfigError: one is not; or a field takes its value from one that is drawn, which the search would not follow.
    """
    from llama_lab.lab.sweep.search import base_of, changed

    chosen = [axis for axis in axes if "." not in axis.key and not axis.is_seed]
    rest = {key: value for key, value in first.values.items() if key not in {axis.key for axis in chosen}}
    points = [rest | seeds | choice for seeds in repeated([{}], axes) for choice in grid(chosen)]
    ends = [
        first.values | {axis.key: value}
        for axis in axes
        for value in (axis.choices or (axis.typed(axis.low), axis.typed(axis.high)))
        if not axis.is_seed and first.values[axis.key] != value
    ]
    further = [*points, *(end for end in ends if end not in points)]
    jobs = build_jobs(fixed, further, settings, config_dir, are_asked=False)
    bases, others = jobs[: len(points)], jobs[len(points) :]
    found: list[Problem] = []
    for job in others:
        made, meant = (by_key(science(run)) for run in (changed(base_of(bases, job.values), job.values), job.run))
        key = next(key for key in job.values if job.values[key] != first.values[key])
        rule = f"takes its value from {key}, which sweep.search=optuna does not follow; sweep.search=random does"
        found += [(other, rule) for other in meant if made.get(other) != meant[other]]
    if found:
        raise refused(list(dict.fromkeys(found)))
    return bases, others


def _resolved(run: RunConfig, settings: SweepConfig) -> RunConfig:
    """The run as it is named. On a cluster's nodes nothing can be asked, so what names it has to be typed."""
    if settings.launcher is Launcher.local:
        return resolve(run)
    found: list[Problem] = []
    if run.hardware.device is Device.auto:
        found.append(("hardware.device=auto", "cannot be found out here for Slurm's nodes; hardware=gpu or hardware=cpu"))
    if run.precision is Precision.auto:
        found.append(("precision=auto", "cannot be found out here for Slurm's nodes; precision=bf16 or precision=fp32"))
    if run.hardware.processes is None:
        found.append(("hardware.processes=null", "does not say how many GPUs a job asks Slurm for; hardware.processes=1"))
    if found:
        raise ConfigError(found)
    return replace(run, sweep=None)


def _objective_problems(run: RunConfig, settings: SweepConfig) -> list[Problem]:
    if settings.objective not in METRICS and (close := difflib.get_close_matches(settings.objective, METRICS, n=1, cutoff=0.85)):
        return [(f"sweep.objective={settings.objective}", f"is no metric; did you mean sweep.objective={close[0]}?")]
    if run.eval is None and "val/" in settings.objective:
        return [("eval=null", f"leaves no sweep.objective={settings.objective} to compare; sweep.objective=train/loss needs none")]
    if run.hardware.micro_batch == AUTO and settings.jobs_per_gpu > 1:
        rule = f"would take a whole GPU for a job, and sweep.jobs_per_gpu={settings.jobs_per_gpu} share one; type a number"
        return [("hardware.micro_batch=auto", rule)]
    return []


def _axes(request: Request, config_dir: Path | None) -> tuple[list[str], list[Axis]]:
    """(overrides that every job has, what is swept). What is typed replaces what a preset sweeps over."""
    parser = OverridesParser.create()
    typed = {
        override.get_key_element(): override for override in request.overrides if not override.key_or_group.startswith("hydra.")
    }
    fixed: list[str] = []
    axes: list[Axis] = []
    problems: list[Problem] = []
    params: dict[str, Override] = {}
    for key, text in request.sweep_params.items():
        try:
            params[key] = _read_params(parser, key, text)
        except HydraException:
            known = any_shape().get(key)
            kind = None if known is None or known.is_node else known.kind
            problems.append((f"{key}={text}", grammar.unreadable(f"{key}={text}", kind)))
    for key, override in (params | typed).items():
        line = override.input_line or key
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
        elif key.startswith("budget."):
            problems.append((line, f"is about the sweep as a whole and takes one value, such as {key}=2"))
        elif key.startswith("sweep."):
            problems.append((line, f"is about the sweep as a whole and takes one value; for one list, type {key}=[a,b]"))
        elif (wrong := _key_problem(key, override)) is not None:
            problems.append((line, wrong))
        else:
            axis = read_axis(override, config_dir)
            axes.append(axis)
            if key == PRESET:
                nested = [preset for preset in axis.choices if _is_sweep(preset, config_dir)]
                problems += [(f"{PRESET}={preset}", "is a sweep itself; start it alone") for preset in nested]
    if problems:
        raise refused(problems)
    return fixed, axes


def _read_params(parser: OverridesParser, key: str, text: str) -> Override:
    """The values of a key as a preset has them. Texts beyond ASCII, which Hydra's grammar reads in quotes alone, get theirs."""
    try:
        return parser.parse_override(f"{key}={text}")
    except HydraException:
        if text.isascii() or set(text) & set("'\"()[]{}"):
            raise
        parts = (part.strip() for part in text.split(","))
        return parser.parse_override(f"{key}={','.join(part if part.isascii() else grammar.quoted(part) for part in parts)}")


def _key_problem(key: str, override: Override) -> str | None:
    """What is wrong with the key of an axis, said once and not for each of its values; None if nothing is."""
    known = any_shape()
    if takes_no_value(key, known):
        text = (override.input_line or "").partition("=")[2]
        return f"holds several values; type {fields_of_node(key, known)[0]}={text}"
    is_known = key in known or key in CHOSEN or re.search(r"[@/+~]", key) is not None
    return None if is_known else unknown_field(key, known, {})


def _is_sweep(preset: str, config_dir: Path | None) -> bool:
    there = option_file(PRESET, preset, config_dir)
    return there is not None and read_request([f"{PRESET}={preset}"], config_dir=config_dir).is_sweep


def _refuse_settings(overrides: Iterable[str]) -> None:
    """A single run has nothing that starts several."""
    typed = [word for word in overrides if word.startswith("sweep.")]
    if typed:
        rule = "says how several runs are chosen or started, and this is one; add -m and a key with several values"
        raise refused([(word, rule) for word in typed])


def refused(problems: list[Problem], jobs: int = 0) -> ConfigError:
    """What a sweep is refused with.

    Args:
        jobs: how many it has; 0: that is not known.
    """
    return ConfigError(problems, scope=f"this sweep of {jobs} jobs; none was started" if jobs else "this sweep")


def whose(numbers: list[int], total: int) -> str:
    """Which jobs a problem belongs to, unless it is all of them, or none that has a number."""
    if not numbers or len(numbers) == total:
        return ""
    few = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f" (job {few})" if len(numbers) == 1 else f" (jobs {few})"


def _first_name(job: Job) -> str:
    """What a sweep's own name is made of for a job: what its run has always been called."""
    return former_run_id(job.run, job.slug)


def _sweep_folder(jobs: list[Job], axes: list[Axis], settings: SweepConfig) -> Path:
    """`outputs/<name>/sweeps/<swept keys>-<hash>`: for a grid the same for the same jobs, whatever their order; for a search the
    same for the same axes, whatever the number of points."""
    keys = "-".join(re.sub(r"[^a-z0-9._]+", "_", axis.key.rpartition(".")[2].lower()) for axis in axes)[:60]
    if settings.search is Search.grid:
        told = sorted(map(_first_name, jobs))
    else:
        searched = [settings.search.name, str(settings.seed)]
        searched += [settings.objective, settings.direction.name] if settings.search is Search.optuna else []
        told = [*searched, *(f"{axis.key}={axis.text}" for axis in axes), _first_name(jobs[0])]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]
    return jobs[0].folder.parent / "sweeps" / f"{keys}-{digest}"
