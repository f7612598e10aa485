"""What a person sees of a sweep: a line whenever something happens, a live table under them on a terminal, and at the end a table
and summary.csv."""

import csv
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llama_lab.config.errors import ConfigError
from llama_lab.lab.labels import short_keys
from llama_lab.lab.sweep.jobs import Job, Sweep
from llama_lab.lab.sweep.ranking import LOSS, measured_alike, objective, ranked, ranked_points
from llama_lab.lab.sweep.space import as_meant
from llama_lab.lab.table import counted, print_list, print_table
from llama_lab.training.console import Terminal
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
        self._console = Terminal()
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
            table.add_row(str(job.number), *_values(job), *cells, short_time(now))
        more = [Text(f"and {len(running) - SHOWN_JOBS} more")] if len(running) > SHOWN_JOBS else []
        return Group(Text(""), table, *more, Text(self._standing(), style="bold"))

    def _standing(self) -> str:
        """How far the sweep is, in a line."""
        jobs, total = self._sweep.jobs, len(self._sweep.jobs) + self._sweep.to_come
        finished = sum(job.outcome.finished for job in jobs)
        early = sum(job.outcome.stopped_early for job in jobs)
        failed = sum(job.outcome.failed for job in jobs)
        said = [f"{finished} of {total} finished"]
        said += [f"{early} stopped early"] if early else []
        said += [f"{failed} failed"] if failed else []
        said += [f"{len(self.running)} running", short_time(time.monotonic() - self._start)]
        best = ranked(self._sweep)[:1] if self._sweep.unranked is None else []
        said += (
            [f"best {shown_value(self._sweep.settings.objective, objective(self._sweep, best[0]))}: {best[0].label}"]
            if best
            else []
        )
        return " | ".join(said)


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
            writer.writerow([*_values(job), *values, job.outcome.status, job.outcome.folder or job.folder])
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
            ["" if job.outcome.folder is None else name, *_values(job), *row]
            for job, name, row in zip(jobs, names, cells, strict=True)
        ]
        drop = [columns[key] for key in DROPPED if key != sweep.settings.objective and key in columns]
        headings = ["run", *(short[key] for key in keys), *columns.values(), "status"]
        print_list(_order_said(sweep, best), headings, rows, drop=drop, words=["status"])
    else:
        folders = ["" if job.outcome.folder is None else relative(job.folder) for job in jobs]
        rows = [[*_values(job), *row, folder] for job, row, folder in zip(jobs, cells, folders, strict=True)]
        print_table(_order_said(sweep, best), [*sweep.jobs[0].values, *columns.values(), "status", "folder"], rows)
    headings, points = _points(sweep)
    if points:
        print()
        print_table(f"{objective_heading(sweep)} over the seeds" + ", not ranked" * (sweep.unranked is not None), headings, points)
    if points and sweep.unranked is None:
        print(f"Whether such a difference is more than chance: llama-lab compare {shlex.quote(relative(sweep.folder))}")
    elif sweep.unranked is not None and any(job.outcome.tokens for job in jobs):
        print(f"Nothing of this ranks the jobs; {measured_alike(sweep.unranked)}")


def _order_said(sweep: Sweep, best: Sequence[Job]) -> str:
    """How many jobs there are, and in which order: values of runs that did not finish are of other updates, and rank nothing."""
    said = counted(len(sweep.jobs), "job")
    by = f" by {sweep.settings.objective}" if sweep.settings.objective != LOSS else ""
    if sweep.unranked is not None:
        return f"{said}, not ranked: {sweep.unranked}"
    if len(best) == len(sweep.jobs):
        return f"{said}, the best first{by}"
    if not best:
        return (
            f"{said}, none of them finished" if not any(job.outcome.finished for job in sweep.jobs) else f"{said}, in their order"
        )
    return f"{said}: {len(best)} finished, the best first{by}; then the others"


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


def _values(job: Job) -> list[str]:
    """What was swept, for a table."""
    return [as_meant(text) for text in job.values.values()]


def _metric(job: Job, key: str) -> Any:
    value = job.outcome.tokens or None if key == "tokens" else job.outcome.summary.get(key)
    return "" if value is None else value


def _points(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the points that several seeds repeat, in the order of `ranked_points`; no rows where there is nothing to
    take together."""
    seeds = {axis.key for axis in sweep.axes if axis.is_seed}
    results = ranked_points(sweep)
    if not seeds or len(results) < 2 or all(len(one.values) < 2 for one in results):
        return [], []
    keys = [key for key in sweep.jobs[0].values if key not in seeds]
    headings = [*keys, "runs", "mean", "deviation"] + ["stopped early"] * any(one.stopped for one in results)
    rows = []
    for one in results:
        spread = f"{statistics.stdev(one.values):.4f}" if len(one.values) > 1 else ""
        cells = [str(len(one.values)), "" if one.mean is None else f"{one.mean:.4f}", spread]
        early = str(one.stopped or "") + (f", last {one.last[1]:.4f} after update {one.last[0]}" if one.last is not None else "")
        rows.append([*(as_meant(one.jobs[0].values[key]) for key in keys), *cells, early][: len(headings)])
    return headings, rows
