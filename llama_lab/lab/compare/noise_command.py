"""`llama-lab noise`: measure how far runs of a config scatter by chance, on runs that there are or on runs made for it."""

import argparse
import hashlib
import re
from dataclasses import replace
from pathlib import Path

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import run_folder
from llama_lab.config.schema import Device
from llama_lab.lab.compare.noise import BOTH, KERNELS, Floor, measure, own_part, store
from llama_lab.lab.compare.records import load_record, load_records
from llama_lab.lab.compare.statistics import Design
from llama_lab.lab.sweep import Sweep, describe, run_sweep
from llama_lab.lab.sweep.expand import as_member, build_jobs
from llama_lab.lab.sweep.jobs import Job
from llama_lab.lab.sweep.local import packing
from llama_lab.lab.table import print_table
from llama_lab.training.run_folder import RunFolder, relative

SEEDS, REPEATS = 5, 2
SEVERAL = re.compile(r"=(?:[^\[({'\",]|\[.*\]|\(.*\)|\{.*\}|'.*'|\".*\")*,")
"""A comma outside of brackets and quotes: a list of values to sweep over."""
MEANING = {
    "seeds": "initial weights and order of the data",
    "init": "initial weights alone",
    "order": "order of the data alone",
    "kernels": "nothing: the same run again",
}


def run_noise_command(words: list[str]) -> int:
    """Measure a floor, store it, print it.

    Args:
        words: what follows `noise` on the command line.

    Returns:
        The exit code: 0 measured, 1 a run failed, 2 not understood, 75 stopped; the same command goes on.

    Raises:
        ConfigError: the words or the runs do not allow it.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not asked.words:
        rule = "takes runs that there are, or overrides of the config to make them with, such as experiment=smoke"
        raise ConfigError([("llama-lab noise", rule)], scope="this request")
    overrides = [word for word in asked.words if "=" in word and not Path(word).exists()]
    named = [word for word in asked.words if word not in overrides]
    if named and (overrides or asked.cfg):
        rule = "names runs, and overrides make new ones; type either"
        raise ConfigError([(named[0], rule)], scope="this request")
    if named:
        runs = load_records(named)
    else:
        sweep = plan_runs(overrides, seeds=asked.seeds, repeats=asked.repeats, config_dir=asked.config_dir)
        if asked.cfg:
            print(describe(sweep))
            return 0
        if code := run_sweep(sweep):
            return code
        runs = [load_record(job.folder) for job in sweep.jobs]
    floor = measure(runs)
    folder = runs[0].folder
    _show(floor, len(runs))
    if folder is not None:
        print(f"Stored for llama-lab compare: {relative(store(floor, folder.parent.parent))}")
    return 0


def plan_runs(overrides: list[str], *, seeds: int, repeats: int, config_dir: Path | None) -> Sweep:
    """The runs that tell kinds of chance apart, as a sweep that can be interrupted and typed again.

    Args:
        seeds: values of each seed.
        repeats: how often the first of them is made.

    Raises:
        ConfigError: one of them could not be started.
    """
    if typed := [word for word in overrides if word.startswith(("seed.init=", "seed.data=")) or SEVERAL.search(word)]:
        rule = (
            "is what this command varies; leave it out"
            if typed[0].startswith("seed.")
            else "names several configs; a floor has one"
        )
        raise ConfigError([(typed[0], rule)], scope="this noise floor")
    settings = compose(overrides, config_dir=config_dir, nodes=["sweep"]).sweep
    assert settings is not None
    pairs = [(seed, seed) for seed in range(seeds)]
    pairs += [(seed, 0) for seed in range(1, seeds)] + [(0, seed) for seed in range(1, seeds)]
    points = [{"seed.init": str(init), "seed.data": str(data)} for init, data in pairs]
    jobs = build_jobs(overrides, points, settings, config_dir)
    for job in jobs:
        job.values = job.values | {"repeat": "0"}
    again = [_repeat(jobs[0], number) for number in range(1, repeats + 1)]
    planned = [*jobs, *again[:-1]]
    # A run that is there already may have added up in another order than one that is made now.
    threads = packing(Sweep(planned, jobs[0].folder, settings))[1]
    jobs = [*jobs, *again] if _is_of_other_threads(jobs[0], again[:-1], threads) else planned
    digest = hashlib.sha256("\n".join(sorted(job.folder.name for job in jobs)).encode()).hexdigest()[:8]
    folder, budget = jobs[0].folder.parent / "sweeps" / f"noise-{digest}", jobs[0].run.budget
    for number, job in enumerate(jobs, start=1):
        job.number = number
        job.run = as_member(job.run, folder)
    command = ["llama-lab", "noise", *overrides, "--seeds", str(seeds), "--repeats", str(repeats)]
    command += ["--config-dir", str(config_dir)] if config_dir is not None else []
    return Sweep(jobs, folder, settings, fixed=overrides, command=command, budget=budget)


def _is_of_other_threads(first: Job, repeats: list[Job], threads: int) -> bool:
    """Whether a run on a CPU is finished that used another number of threads than its repeats do: they need one more to compare."""
    if first.run.hardware.device is not Device.cpu or not RunFolder(first.folder).finished or first.run.fresh:
        return False
    its = _threads(first)
    done = [_threads(job) for job in repeats if RunFolder(job.folder).finished]
    return its not in (done or [str(threads)])


def _threads(job: Job) -> str | None:
    return (RunFolder(job.folder).meta().get("machine") or {}).get("threads")


def _repeat(job: Job, number: int) -> Job:
    """The same run once more, in a folder of its own."""
    slug = "-".join(filter(None, (job.slug, f"repeat-{number}")))
    return replace(job, values=job.values | {"repeat": str(number)}, slug=slug, folder=run_folder(job.run, slug))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab noise",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How far runs of one config scatter by chance, split by initial weights, order of the data and kernels.\n"
        "llama-lab compare takes it where it has too few seeds of its own.\n\n"
        f"  llama-lab noise experiment=smoke          make {3 * SEEDS - 2 + REPEATS - 1} runs and measure\n"
        "  llama-lab noise outputs/runs/llama_3m-*   measure runs that there are",
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="overrides, as llama-lab train takes them; or runs, folders, sweeps"
    )
    parser.add_argument("--seeds", type=_count, default=SEEDS, metavar="N", help=f"values of each seed (default: {SEEDS})")
    parser.add_argument(
        "--repeats",
        type=_count,
        default=REPEATS,
        metavar="N",
        help=f"how often one run is made, for the kernels (default: {REPEATS})",
    )
    parser.add_argument("--cfg", action="store_true", help="print the runs that would be made, and start nothing")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="further options and presets")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 2 on; try 5")
    return int(text)


def _show(floor: Floor, count: int) -> None:
    from llama_lab.lab.compare.power import visible_effect

    for metric, kinds in floor.scatter.items():
        total = floor.of(metric)
        parts = sum(own_part(floor, metric, kind) ** 2 for kind in kinds if kind != BOTH)
        rows = []
        for kind, found in kinds.items():
            share = "" if kind == BOTH or not parts else f"{100 * own_part(floor, metric, kind) ** 2 / parts:.0f} %"
            said = f"{found.low:.2g} to {found.high:.2g}" if found.sd else "equal to the last digit"
            rows.append((kind, MEANING[kind], f"{found.sd:.3g}", said, str(found.degrees_of_freedom), share))
        headings = ("chance", "what differs", "sd", "95 % interval", "degrees of freedom", "share")
        print_table(f"{metric}: noise of single runs ({count} runs)", headings, rows)
        if KERNELS not in kinds:
            print("Kernels were not looked at: no two runs have the same seeds on the same device with as many threads")
        if total is not None and total.sd > 0:
            seen = [
                f"{visible_effect(total.sd, total.degrees_of_freedom, Design(n, n, False)):.2g} with {n} seeds an arm"
                for n in (3, 5, 10)
            ]
            print(f"A comparison whose arms share no seeds sees, 8 times of 10, a difference of {', '.join(seen)}")
        print()
