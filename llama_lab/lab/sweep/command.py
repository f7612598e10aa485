"""`llama-lab sweep`: the sweeps there are, one of them as a table, and going on with it as it was frozen."""

import argparse
import os
import sys
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import outputs_folder
from llama_lab.lab.sweep import run_sweep
from llama_lab.lab.sweep.frozen import directory_of, known_outcome, load_sweep
from llama_lab.lab.sweep.jobs import Sweep
from llama_lab.lab.sweep.show import print_results
from llama_lab.lab.table import counted, print_list, print_table
from llama_lab.training.run_folder import relative


def run_sweep_command(words: list[str]) -> int:
    """Answer `llama-lab sweep …`; returns the exit code.

    Raises:
        ConfigError: the folder that was named holds no sweep.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if asked.sweep is None:
        _list_sweeps()
        return 0
    sweep = load_sweep(Path(asked.sweep).expanduser())
    if not asked.show:
        if (directory := directory_of(sweep.folder)) != Path.cwd():
            print(f"In {directory}, where it was started")
            os.chdir(directory)
        return run_sweep(sweep)
    for job in sweep.jobs:
        job.outcome = known_outcome(sweep, job)
    print_results(sweep)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab sweep",
        description="List the sweeps there are, or go on with one exactly as it was when it started, whatever the YAML says now.",
        epilog="A sweep is started with llama-lab train -m key=a,b,c or a preset that is one.",
    )
    parser.add_argument(
        "sweep", nargs="?", metavar="SWEEP", help="a sweep's folder, outputs/<name>/sweeps/<sweep>; without it, all are listed"
    )
    parser.add_argument("--show", action="store_true", help="print what came of it so far, and start nothing")
    return parser


def _list_sweeps() -> None:
    outputs = outputs_folder()
    rows, unread = [], []
    for path in sorted(outputs.glob("*/sweeps/*/sweep.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            sweep = load_sweep(path.parent)
        except OSError:  # being removed
            continue
        except ConfigError as error:
            unread += [f"{subject} {rule}" for subject, rule in error.problems[:1]]
            continue
        rows.append([relative(path.parent), *_counts(sweep)])
    if rows:
        title = counted(len(rows), "sweep") + (", the newest first" if len(rows) > 1 else "")
        show = print_list if sys.stdout.isatty() else print_table
        show(title, ["sweep", "jobs", "finished", "failed", "left"], rows)
    elif not unread:
        print(f"There is no sweep in {outputs}; llama-lab train -m seed.init=0,1,2 starts one")
    for line in unread:
        print(f"Not read: {line}")


def _counts(sweep: Sweep) -> list[str]:
    outcomes = [known_outcome(sweep, job) for job in sweep.jobs]
    total = len(outcomes) + sweep.to_come
    finished, failed = sum(outcome.finished for outcome in outcomes), sum(outcome.failed for outcome in outcomes)
    early = sum(outcome.decided for outcome in outcomes) - finished
    return [
        str(total),
        str(finished) + (f" (+{early} stopped early)" if early else ""),
        str(failed),
        str(total - finished - early - failed),
    ]
