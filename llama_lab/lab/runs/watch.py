"""`llama-lab watch`: runs while they train, from outside: how far, how long still, how fast, and which way the loss goes.

Nothing is asked of the runs; what they write anyway is read. So it can begin and end at any time, and on another machine that sees
the same disk.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import outputs_folder
from llama_lab.config.schema import Problem
from llama_lab.lab.runs.command import short_age
from llama_lab.lab.runs.listing import DEAD, RUNNING, Glance, beside_each_other, find_folders, is_alive, look_at
from llama_lab.lab.table import counted, fitted, print_list, print_table
from llama_lab.training.metrics import short_time
from llama_lab.training.run_folder import relative
from llama_lab.training.run_names import short_names

HEADINGS = ("run", "status", "done", "left", "train loss", "", "val loss", "tok/s", "written", "differs")
NARROW_HEADINGS = ("run", "study", "status", "", "done", "left", "loss", "last rows", "val loss", "tok/s", "written", "differs")
"""On a terminal, which may be narrow."""
DROPPED = ("", "last rows", "written", "study")
"""What says something beside the numbers, the least important first."""
EVERY_SECONDS = 2.0
# Without a terminal a table is printed now and then, not drawn over.
PRINTED_SECONDS = 60.0
PIECE_SECONDS = 0.25
TAIL_BYTES = 65_536
SPARK = "▁▂▃▄▅▆▇█"
SPARK_WIDTH, BAR_WIDTH = 16, 12
RECENT_ROWS = 20


@dataclass(frozen=True)
class Seen:
    """A run as it is watched.

    Attributes:
        glance: its small files.
        rows: its last rows of metrics, in order.
    """

    glance: Glance
    rows: list[dict[str, Any]]

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last rows, everything between them counted; None if that is not known."""
        total, rows = self.glance.total_tokens, [row for row in self.rows if "train/loss" in row][-RECENT_ROWS:]
        if total is None or len(rows) < 2:
            return None
        tokens, seconds = (rows[-1][key] - rows[0][key] for key in ("tokens", "seconds"))
        return None if tokens <= 0 else max(0.0, (total - rows[-1]["tokens"]) * seconds / tokens)


def run_watch_command(words: list[str]) -> int:
    """Follow runs until none of them trains any more.

    Args:
        words: what follows `watch` on the command line.

    Returns:
        The exit code: 1 if one of them failed or is dead, 2 not understood, else 0, Ctrl-C included.

    Raises:
        ConfigError: a word names no run.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    watcher = _Watcher(asked.runs)
    seen = watcher.look()
    if not seen and not watcher.goes_on(seen):
        print(f"No run is training in {outputs_folder()}; llama-lab runs lists all, llama-lab watch RUN shows the one named")
        return 0
    try:
        if asked.once or not watcher.goes_on(seen):
            _show(seen)
        elif sys.stdout.isatty():
            seen = _draw(watcher, seen, asked.every)
        else:
            seen = _print(watcher, seen, max(asked.every, PRINTED_SECONDS) if asked.every == EVERY_SECONDS else asked.every)
    except KeyboardInterrupt:
        print("\nNot watched any more; what trains goes on")
        return 0
    _conclude(seen)
    ended_badly = any(one.glance.status in (DEAD, "failed") for one in seen)
    return 1 if ended_badly and not asked.once else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab watch",
        description="Follow runs while they train: how far, how long still, loss, speed. It ends when none trains any more, and "
        "ending it ends none of them.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="runs (by folder, name or hash), folders, patterns, sweeps; without any, what trains in outputs/",
    )
    parser.add_argument("--once", action="store_true", help="one look")
    parser.add_argument(
        "--every", type=_seconds, default=EVERY_SECONDS, metavar="S", help=f"seconds between looks ({EVERY_SECONDS:g})"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


class _Watcher:
    """Which runs are watched. What is found once stays, so that it is seen how it ends."""

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        self._sweeps = [path for word in words if (path := Path(word).expanduser().absolute()) and (path / "sweep.json").is_file()]
        self._found: dict[Path, None] = {}

    def look(self) -> list[Seen]:
        """The runs, in the order in which they were first seen."""
        try:
            folders = find_folders(self._words)
        except ConfigError:
            # A sweep that has just begun has no run yet, and runs can be moved while they are watched.
            if not self._found and not any(map(_is_held, self._sweeps)):
                raise
            folders = []
        for folder in folders:
            if folder not in self._found and (self._words or _trains(folder)):
                self._found[folder] = None
        seen = []
        for folder in self._found:
            try:
                glance = look_at(folder)
            except ConfigError as error:
                if not folder.is_dir():
                    continue  # moved aside, or removed
                glance = Glance(folder, folder.name, "unreadable", {}, {"error": _said(error.problems)}, 0.0)
            seen.append(glance)
        return [Seen(glance, _tail(glance.folder / "metrics.jsonl")) for glance in beside_each_other(seen)]

    def goes_on(self, seen: Sequence[Seen]) -> bool:
        """Whether any of them trains, or a sweep among them is to start more."""
        return any(one.glance.status == RUNNING or _is_starting(one.glance) for one in seen) or any(map(_is_held, self._sweeps))


def _trains(folder: Path) -> bool:
    try:
        glance = look_at(folder)
    except ConfigError:
        return False
    return glance.status == RUNNING or _is_starting(glance)


def _is_starting(glance: Glance) -> bool:
    """Whether a process holds a run that has not said anything yet."""
    return glance.status == "started" and is_alive(glance.holder, glance.touched, time.time())


def _is_held(sweep: Path) -> bool:
    lock = sweep.parent / ".locks" / f"{sweep.name}.json"
    try:
        return is_alive(json.loads(lock.read_text(encoding="utf-8")), lock.stat().st_mtime, time.time())
    except (OSError, ValueError):
        return False


def _draw(watcher: _Watcher, seen: list[Seen], every: float) -> list[Seen]:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
        while watcher.goes_on(seen):
            title, headings, rows = _narrow_table(seen)
            table, _ = fitted(headings, rows, console.width, drop=DROPPED, words=["differs"])
            table.title, table.title_justify, table.title_style = title, "left", "bold"
            live.update(table, refresh=True)
            wait(every)
            seen = watcher.look()
    _show(seen)
    return seen


def wait(seconds: float) -> None:
    """Sleep in pieces.

    A Ctrl-C that comes in the moment before a sleep begins does not interrupt it: it is seen when the sleep is over.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, PIECE_SECONDS))


def _show(seen: Sequence[Seen]) -> None:
    if sys.stdout.isatty():
        print_list(*_narrow_table(seen), drop=DROPPED, words=["differs"], say_dropped=False)
    else:
        print_table(*_table(seen))


def _print(watcher: _Watcher, seen: list[Seen], every: float) -> list[Seen]:
    print_table(*_table(seen))
    sys.stdout.flush()
    while watcher.goes_on(seen):
        wait(every)
        seen = watcher.look()
        print_table(*_table(seen))
        sys.stdout.flush()
    return seen


def _table(seen: Sequence[Seen]) -> tuple[str, Sequence[str], list[list[str]]]:
    return _title(seen), HEADINGS, [_cells(one) for one in seen]


def _narrow_table(seen: Sequence[Seen]) -> tuple[str, Sequence[str], list[list[str]]]:
    """The same with short names, and the bar in a column of its own."""
    names = short_names([one.glance.folder for one in seen])
    several = len({one.glance.folder.parent for one in seen}) > 1
    studies = [one.glance.folder.parent.name if several else "" for one in seen]
    rows = [
        [name, study, status, *(bar.split(" ", 1) if bar else ["", ""]), *rest]
        for name, study, (_, status, bar, *rest) in zip(names, studies, map(_cells, seen), strict=True)
    ]
    return _title(seen), NARROW_HEADINGS, [[cell.strip() for cell in row] for row in rows]


def _title(seen: Sequence[Seen]) -> str:
    training = sum(one.glance.status == RUNNING for one in seen)
    return f"{training} of {counted(len(seen), 'run')} training"


def _cells(one: Seen) -> list[str]:
    glance, summary = one.glance, one.glance.summary
    is_running = glance.status == RUNNING
    left = one.seconds_left if is_running else None
    losses = [row["train/loss"] for row in one.rows if "train/loss" in row]
    speed = summary.get("speed/tokens_per_second")
    return [
        relative(glance.folder),
        glance.status,
        _progress(glance),
        "" if left is None else short_time(left),
        _value(losses[-1]) if losses else "",
        spark(losses),
        _value(summary["val/loss"]) if "val/loss" in summary else "",
        f"{speed:,.0f}" if speed and is_running else "",
        f"{short_age(time.time() - glance.touched)} ago" if glance.touched else "",
        glance.differs,
    ]


def _progress(glance: Glance) -> str:
    if not glance.total_tokens:
        return ""
    share = min(1.0, glance.summary.get("tokens", 0) / glance.total_tokens)
    return f"{'█' * round(BAR_WIDTH * share):░<{BAR_WIDTH}} {100 * share:3.0f} %"


def spark(values: Sequence[float | None]) -> str:
    """The last values as a line of blocks, lowest to highest; a cross for what is no finite number."""
    last = values[-SPARK_WIDTH:]
    finite = [value for value in last if value is not None]
    if not finite:
        return "×" * len(last)
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join("×" if value is None else SPARK[min(7, int(8 * (value - low) / span))] for value in last)


def _value(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a file that is being written."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)[1 if size > TAIL_BYTES else 0 :]
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except (OSError, ValueError):
        return []


def _conclude(seen: Sequence[Seen]) -> None:
    """What has to be done about runs that have not ended well."""
    for one in seen:
        glance, name = one.glance, relative(one.glance.folder)
        match glance.status:
            case "dead":
                who = f"process {glance.holder['process']} on {glance.holder['host']}" if glance.holder else "its process"
                when = short_age(time.time() - glance.touched)
                print(f"{name} is dead: it says that it runs, but {who} is gone, and it last wrote {when} ago.")
                print("    The command that started it goes on with it")
            case "failed" | "unreadable":
                lines = str(glance.summary.get("error") or "see train.log").splitlines()
                print(f"{name} {'failed' if glance.status == 'failed' else 'cannot be read'}: {lines[0]}")


def _said(problems: Sequence[Problem]) -> str:
    return "; ".join(rule for _, rule in problems)
