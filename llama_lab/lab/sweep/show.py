"""What a person sees of a sweep: a line whenever something happens, a live table under them on a terminal, and at the end a table
and summary.csv."""

import csv
import math
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Direction
from llama_lab.lab.labels import short_keys
from llama_lab.lab.sweep.expand import Job, Sweep
from llama_lab.lab.table import counted, print_list, print_table
from llama_lab.training.metrics import short_time
from llama_lab.training.run_folder import RunFolder, relative
from llama_lab.training.run_names import short_names

COLUMNS = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "train/loss": "train loss",
    "tokens": "tokens",
    "seconds": "seconds",
}
"""Metric key, as in summary.csv -> heading of the printed table."""
DROPPED = ("seconds", "tokens", "train/loss", "val/bits_per_byte", "val/loss")
"""Columns that a narrow terminal does without, but for the objective, the least important first."""
# Where there is no terminal, one line says how far the sweep is, so often.
SAID_SECONDS = 60.0
SHOWN_JOBS = 30
# Reading a config takes a twentieth of a second; a report is worth seconds after a sweep, not minutes.
REPORTED_JOBS = 200


class Board:
    """The lines and the live table of a sweep that runs. Use `shown` as a context.

    Attributes:
        running: job -> when it was started, on the monotonic clock.
    """

    def __init__(self, sweep: Sweep):
        self._sweep = sweep
        self._console = RichConsole(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._start = self._said = time.monotonic()
        self.running: dict[int, float] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the context lasts, the table stands below the lines, where there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def say(self, text: str, style: str | None = None) -> None:
        """Print one or several lines."""
        self._console.print(text, style=style, markup=False, emoji=False)

    def tell(self, job: Job, text: str, style: str | None = None) -> None:
        """Print what happened to a job."""
        self.say(f"[{job.number}/{len(self._sweep.jobs) + self._sweep.to_come}] {job.label}: {text}", style)

    def refresh(self) -> None:
        """Show where things stand."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._said > SAID_SECONDS:
            self._said = time.monotonic()
            self.say(self._standing())

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        columns = ["job", *self._sweep.jobs[0].values, "updates", "train loss", objective_heading(self._sweep), "tok/s", "time"]
        for column in columns:
            table.add_column(column, no_wrap=True, justify="left" if column in self._sweep.jobs[0].values else "right")
        running = [job for job in self._sweep.jobs if job.number in self.running]
        for job in running[:SHOWN_JOBS]:
            known = RunFolder(job.folder).summary()
            now = time.monotonic() - self.running[job.number]
            cells = [f"{known.get('update', 0):,}/{job.run.updates:,}"]
            cells += [shown_value(key, known.get(key)) for key in ("train/loss", self._sweep.settings.objective)]
            cells += [f"{known['speed/tokens_per_second']:,.0f}" if known.get("speed/tokens_per_second") else ""]
            table.add_row(str(job.number), *job.values.values(), *cells, short_time(now))
        more = [Text(f"and {len(running) - SHOWN_JOBS} more")] if len(running) > SHOWN_JOBS else []
        return Group(Text(""), table, *more, Text(self._standing(), style="bold"))

    def _standing(self) -> str:
        """How far the sweep is, in a line."""
        jobs, total = self._sweep.jobs, len(self._sweep.jobs) + self._sweep.to_come
        finished = sum(job.outcome.finished for job in jobs)
        early = sum(job.outcome.status.startswith("stopped early") for job in jobs)
        failed = sum(job.outcome.failed for job in jobs)
        said = [f"{finished} of {total} finished"]
        said += [f"{early} stopped early"] if early else []
        said += [f"{failed} failed"] if failed else []
        said += [f"{len(self.running)} running", short_time(time.monotonic() - self._start)]
        best = ranked(self._sweep)[:1]
        said += (
            [f"best {shown_value(self._sweep.settings.objective, objective(self._sweep, best[0]))}: {best[0].label}"]
            if best
            else []
        )
        return " | ".join(said)


def objective(sweep: Sweep, job: Job) -> float | None:
    """A job's objective; None if it has none, or one that is no finite number."""
    value = job.outcome.summary.get(sweep.settings.objective)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def ranked(sweep: Sweep) -> list[Job]:
    """Finished jobs that have the objective, the best first."""
    sign = 1 if sweep.settings.direction is Direction.minimize else -1
    finished = [(value, job) for job in sweep.jobs if job.outcome.finished and (value := objective(sweep, job)) is not None]
    return [job for _, job in sorted(finished, key=lambda pair: (sign * pair[0], pair[1].number))]


def objective_heading(sweep: Sweep) -> str:
    """The objective as a heading."""
    return COLUMNS.get(sweep.settings.objective, sweep.settings.objective)


def write_summary(sweep: Sweep) -> None:
    """Replace summary.csv with what is known now, so that a sweep that dies leaves what it had."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "summary.csv"
    draft = path.with_name(".summary.csv.draft")
    columns = _columns(sweep)
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.jobs[0].values, *columns, "status", "folder"])
        for job in sweep.jobs:
            values = [_metric(job, key) for key in columns]
            writer.writerow([*job.values.values(), *values, job.outcome.status, job.outcome.folder or job.folder])
    draft.replace(path)


def print_results(sweep: Sweep) -> None:
    """The jobs as a table, those that finished in front, and the points over their seeds if there are several."""
    columns = _columns(sweep)
    best = ranked(sweep)
    there = {job.number for job in best}
    jobs = [*best, *(job for job in sweep.jobs if job.number not in there)]
    cells = [[shown_value(key, _metric(job, key)) for key in columns] + [job.outcome.status] for job in jobs]
    if sys.stdout.isatty():
        keys = list(sweep.jobs[0].values)
        short = short_keys(keys)
        names = short_names([job.folder for job in jobs])
        rows = [
            ["" if job.outcome.folder is None else name, *job.values.values(), *row]
            for job, name, row in zip(jobs, names, cells, strict=True)
        ]
        drop = [columns[key] for key in DROPPED if key != sweep.settings.objective and key in columns]
        headings = ["run", *(short[key] for key in keys), *columns.values(), "status"]
        print_list(_order_said(sweep, best), headings, rows, drop=drop, words=["status"])
    else:
        folders = ["" if job.outcome.folder is None else relative(job.folder) for job in jobs]
        rows = [[*job.values.values(), *row, folder] for job, row, folder in zip(jobs, cells, folders, strict=True)]
        print_table(_order_said(sweep, best), [*sweep.jobs[0].values, *columns.values(), "status", "folder"], rows)
    if points := _points(sweep, best):
        print()
        print_table(
            f"{objective_heading(sweep)} over the seeds", [*points[0][0], "runs", "mean", "deviation"], [row for _, row in points]
        )
        print(f"Whether such a difference is more than chance: llama-lab compare {shlex.quote(relative(sweep.folder))}")


def _order_said(sweep: Sweep, best: Sequence[Job]) -> str:
    """How many jobs there are, and in which order: values of runs that did not finish are of other updates, and rank nothing."""
    said = counted(len(sweep.jobs), "job")
    if len(best) == len(sweep.jobs):
        return f"{said}, the best first"
    if not best:
        return (
            f"{said}, none of them finished" if not any(job.outcome.finished for job in sweep.jobs) else f"{said}, in their order"
        )
    return f"{said}: {len(best)} finished, the best first; then the others"


def write_report(sweep: Sweep) -> None:
    """Write the sweep's page and say where it is. A sweep that ran does not fail because its report did."""
    started = [job for job in sweep.jobs if job.outcome.tokens]
    command = f"llama-lab report {relative(sweep.folder)}"
    if not started:
        return
    if len(started) > REPORTED_JOBS:
        print(f"A report on so many jobs takes its time: {command}")
        return
    try:
        from llama_lab.lab.report.command import report_sweep

        print(f"The report: {relative(report_sweep(sweep.folder))} ({command} adds Markdown and a picture)")
    except Exception as error:
        problems = error.problems if isinstance(error, ConfigError) else [(type(error).__name__, str(error))]
        print(f"There is no report: {' '.join(problems[0])}; {command} tries again")


def shown_value(key: str, value: Any) -> str:
    """A metric as it is printed."""
    if isinstance(value, float):
        return f"{value:.1f}" if key == "seconds" else f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _columns(sweep: Sweep) -> dict[str, str]:
    """The objective in front where it is none of the usual metrics."""
    key = sweep.settings.objective
    return COLUMNS if key in COLUMNS else {key: key, **COLUMNS}


def _metric(job: Job, key: str) -> Any:
    value = job.outcome.tokens or None if key == "tokens" else job.outcome.summary.get(key)
    return "" if value is None else value


def _points(sweep: Sweep, best: list[Job]) -> list[tuple[list[str], list[str]]]:
    """(swept keys, cells) for each point that several seeds finished, the best mean first."""
    seeds = {axis.key for axis in sweep.axes if axis.is_seed}
    groups: defaultdict[str, list[Job]] = defaultdict(list)
    for job in best:
        groups[job.point].append(job)
    if not seeds or len(groups) < 2 or all(len(jobs) < 2 for jobs in groups.values()):
        return []
    sign = 1 if sweep.settings.direction is Direction.minimize else -1
    found = []
    for jobs in groups.values():
        values = [value for job in jobs if (value := objective(sweep, job)) is not None]
        kept = {key: value for key, value in jobs[0].values.items() if key not in seeds}
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        mean = statistics.fmean(values)
        found.append((sign * mean, list(kept), [*kept.values(), str(len(values)), f"{mean:.4f}", spread]))
    return [(keys, cells) for _, keys, cells in sorted(found, key=lambda row: row[0])]
