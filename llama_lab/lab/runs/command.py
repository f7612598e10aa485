"""`llama-lab runs`: the runs there are, filtered and sorted by anything that their config or their last values say."""

import argparse
import csv
import difflib
import fnmatch
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import outputs_folder
from llama_lab.config.schema import Problem
from llama_lab.lab.runs.listing import STATES, Glance, beside_each_other, find_folders, look_at
from llama_lab.lab.table import counted, print_list, print_table
from llama_lab.training.run_folder import relative
from llama_lab.training.run_names import short_names

COLUMNS = ("run", "status", "val/loss", "tokens", "done", "speed", "age", "model", "differs")
DROPPED = ("model", "tokens", "speed", "study", "age", "done")
"""Columns that a narrow terminal does without, the least important first."""
SHORT = {"speed": "speed/tokens_per_second", "name": "study", "loss": "val/loss"}
"""Words for keys that are long or have another name inside."""
SHOWN_VALUES = 6
OPERATORS = ("!=", "<=", ">=", "=", "<", ">")


@dataclass(frozen=True)
class Filter:
    """A condition on one key.

    Attributes:
        key: any column.
        operator: one of `OPERATORS`.
        value: a number or text; of `=` and `!=` a list of patterns, with commas between.
    """

    key: str
    operator: str
    value: str

    def holds(self, value: Any) -> bool:
        """Whether a run's value fulfils it, of a list one of its items; nothing is by a run without one, but for `!=`."""
        if self.operator in ("=", "!="):
            patterns = self.value.split(",")
            is_equal = value == self.value or any(_is_same(item, one) for item in _items(value) for one in patterns)
            return is_equal == (self.operator == "=")
        left, right = _number(value), _number(self.value)
        if left is None or right is None:
            return False
        return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[self.operator]


def _items(value: Any) -> list[Any]:
    """A value, and where it is a list its items."""
    is_list = isinstance(value, str) and value.startswith("[") and value.endswith("]")
    return [value, *value[1:-1].split(",")] if is_list else [value]


def run_runs_command(words: list[str]) -> int:
    """List runs.

    Args:
        words: what follows `runs` on the command line.

    Returns:
        The exit code: 0 listed, 1 if a folder could not be read, 2 not understood.

    Raises:
        ConfigError: a word names no run, or a key that no run has.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    filters = [found for word in asked.words if (found := _filter(word)) is not None]
    _check_operators(filters)
    folders = find_folders(word for word in asked.words if _filter(word) is None)
    runs: list[Glance] = []
    broken: list[Problem] = []
    now = time.time()
    for folder in folders:
        try:
            runs.append(look_at(folder, now))
        except ConfigError as error:
            broken += error.problems
    runs = beside_each_other(runs)
    columns = _columns(asked.columns)
    sort = asked.sort or "-age"
    _check_keys(runs, [(f"{one.key}{one.operator}{one.value}", one.key) for one in filters])
    _check_keys(runs, [(f"--columns {column}", column) for column in columns] + [(f"--sort {sort}", sort.lstrip("-"))])
    _check_states(filters)
    kept = [run for run in runs if all(one.holds(value_of(run, one.key, now)) for one in filters)]
    kept = _sorted(kept, sort, now)
    if asked.json:
        print(json.dumps([{column: value_of(run, column, now) for column in columns} for run in kept], indent=1))
    elif asked.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows([[_plain(value_of(run, column, now)) for column in columns] for run in kept])
    elif kept:
        _print(kept, f"{len(kept)} of " * (len(kept) < len(runs)) + counted(len(runs), "run"), columns, asked.columns, now)
    elif runs:
        states = Counter(str(value_of(run, "status", now)) for run in runs)
        there = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
        others = "".join(f"; {one.key}: {_values(runs, one.key, now)}" for one in filters if _fits_none(one, runs, now))
        print(f"None of {counted(len(runs), 'run')} fits; by status: {there}{others}")
    elif not broken:
        print(f"There is no run in {outputs_folder()}; llama-lab train makes one")
    for subject, rule in broken:
        print(f"Not listed: {subject} {rule}", file=sys.stderr)
    return 1 if broken else 0


def _fits_none(one: Filter, runs: Sequence[Glance], now: float) -> bool:
    """Whether a condition on a name, other than the status, is fulfilled by no run at all."""
    is_name = one.operator == "=" and one.key != "status" and _number(one.value) is None
    return is_name and not any(one.holds(value_of(run, one.key, now)) for run in runs)


def _values(runs: Sequence[Glance], key: str, now: float) -> str:
    """The first of the values that runs have under a key."""
    found = sorted({str(value) for run in runs if (value := value_of(run, key, now)) is not None})
    return ", ".join([*found[:SHOWN_VALUES], *(["…"] if len(found) > SHOWN_VALUES else [])])


def _print(runs: Sequence[Glance], title: str, columns: Sequence[str], asked: str | None, now: float) -> None:
    """Print runs: with their paths where nobody reads, or where the columns were chosen, else with short names."""
    rows = [[_shown(column, value_of(run, column, now)) for column in columns] for run in runs]
    if not sys.stdout.isatty():
        print_table(title, columns, rows)
        return
    chosen = [] if asked is None else [key.strip() for key in asked.split(",")]
    if any(key and not key.startswith("+") for key in chosen):
        print_list(title, columns, rows)
        return
    studies = [run.folder.parent.name for run in runs]
    several = len({run.folder.parent for run in runs}) > 1
    cells = [
        [name, study if several else "", *row[1:]]
        for name, study, row in zip(short_names([run.folder for run in runs]), studies, rows, strict=True)
    ]
    drop = [key for key in DROPPED if f"+{key}" not in chosen]
    print_list(title, [columns[0], "study", *columns[1:]], cells, drop=drop, words=["differs"])


def value_of(run: Glance, key: str, now: float) -> Any:
    """What a run has under a key; None if it has nothing.

    Args:
        key: a column's name, a metric, or a key path of the config.
        now: seconds since the epoch.
    """
    key = SHORT.get(key, key)
    own: dict[str, Callable[[], Any]] = {
        "run": lambda: relative(run.folder),
        "folder": lambda: str(run.folder),
        "study": lambda: run.folder.parent.name,
        "status": lambda: run.status,
        "age": lambda: round(now - run.touched),
        "done": lambda: _done(run),
        "tokens": lambda: run.summary.get("tokens", 0),
        "differs": lambda: run.differs,
    }
    if key in own:
        return own[key]()
    if key in run.summary:
        return run.summary[key]
    text = run.config.get(key)
    return text if text is None or (number := _number(text)) is None else int(number) if number == int(number) else number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The runs there are. Any key of a config and any metric can be shown, filtered and sorted by.\n\n"
        "  llama-lab runs                                       all runs in outputs/, the newest last\n"
        "  llama-lab runs outputs/study status=finished --sort val/loss\n"
        "  llama-lab runs model='llama_*' 'val/loss<3' optim=muon,adamw --columns run,optim,optim.max_lr,val/loss\n"
        "  llama-lab runs status=dead                           runs whose process is gone",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FOLDER|KEY=VALUE",
        help="runs (folder, name or hash), folders, patterns, sweeps; and conditions: = != < > <= >=",
    )
    parser.add_argument(
        "--sort", metavar="KEY", help="by this key, small values first; --sort=-KEY: large ones (default: newest last)"
    )
    parser.add_argument("--columns", metavar="KEYS", help=f"keys with commas between; +KEY adds one (default: {','.join(COLUMNS)})")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print CSV")
    return parser


def _filter(word: str) -> Filter | None:
    """The condition that a word is; None if it is a path."""
    places = [(word.find(operator), -len(operator), operator) for operator in OPERATORS if operator in word]
    if not places:
        return None
    place, _, operator = min(places)
    key = word[:place]
    return Filter(key, operator, word[place + len(operator) :]) if key and ".." not in key and not key.startswith("/") else None


def _columns(text: str | None) -> list[str]:
    if text is None:
        return list(COLUMNS)
    keys = [key.strip() for key in text.split(",") if key.strip()]
    added = [key[1:] for key in keys if key.startswith("+")]
    return [key for key in keys if not key.startswith("+")] + added if len(added) < len(keys) else [*COLUMNS, *added]


def _check_keys(runs: Sequence[Glance], asked: Sequence[tuple[str, str]]) -> None:
    """Refuse keys that no run has."""
    known = {"folder", "study", *COLUMNS, *SHORT}
    known |= {key for run in runs for key in (*run.summary, *run.config)}
    problems: list[Problem] = []
    for said, key in asked:
        if key not in known and runs:
            close = (
                difflib.get_close_matches(key, sorted(known), n=1) or [one for one in sorted(known) if one.endswith(f".{key}")][:1]
            )
            hint = (
                f"did you mean {close[0]}?" if close else "a key of the config, such as optim.max_lr, or a metric, such as val/loss"
            )
            problems.append((said, f"is about a key that no run has; {hint}"))
    if problems:
        raise ConfigError(problems, scope="this request")


def _check_operators(filters: Sequence[Filter]) -> None:
    """Refuse operators with their signs in another order, such as `=<`, which would compare with a text that begins with one, and
    orders of what is no number.
    """
    problems: list[Problem] = []
    for one in filters:
        value = one.value.lstrip("=!<>")
        if value == one.value and one.operator not in ("=", "!=") and _number(value) is None:
            rule = f"compares with no number; {one.key}=… takes texts and patterns"
            problems.append((f"{one.key}{one.operator}{one.value}", rule))
        if value != one.value:
            signs = one.operator + one.value.removesuffix(value)
            meant = "!=" if signs == "<>" else signs[::-1] if signs[::-1] in OPERATORS else one.operator
            problems.append((f"{one.key}{one.operator}{one.value}", f"is no condition; did you mean '{one.key}{meant}{value}'?"))
    if problems:
        raise ConfigError(problems, scope="this request")


def _check_states(filters: Sequence[Filter]) -> None:
    """Refuse states that no run can be in."""
    problems: list[Problem] = []
    asked = [pattern for one in filters if one.key == "status" for pattern in one.value.split(",")]
    for pattern in asked:
        if not any(_is_same(state, pattern) for state in STATES):
            close = difflib.get_close_matches(pattern, STATES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(STATES)}"
            problems.append((f"status={pattern}", f"is no status; {hint}"))
    if problems:
        raise ConfigError(problems, scope="this request")


def _sorted(runs: list[Glance], sort: str, now: float) -> list[Glance]:
    """Runs by a key; those that lack it stand last."""
    key = sort.lstrip("-")
    values = [(value_of(run, key, now), run) for run in runs]
    there = [(value, run) for value, run in values if not _is_nothing(value)]
    rest = [run for value, run in values if _is_nothing(value)]

    def place(pair: tuple[Any, Glance]) -> tuple[int, float, str, str]:
        value, run = pair
        return (0, value, "", run.name) if isinstance(value, int | float) else (1, 0.0, str(value), run.name)

    return [run for _, run in sorted(there, key=place, reverse=sort.startswith("-"))] + rest


def _is_nothing(value: Any) -> bool:
    """Whether a value has no place among others: there is none, or it is no number."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).lower() in ("null", "nan", ".nan")


def _done(run: Glance) -> float | None:
    """The part of its tokens that it has been trained on."""
    return None if not run.total_tokens else round(run.summary.get("tokens", 0) / run.total_tokens, 4)


def _is_same(value: Any, text: str) -> bool:
    left, right = _number(value), _number(text)
    if left is not None and right is not None:
        return math.isclose(left, right, rel_tol=1e-9)
    return fnmatch.fnmatchcase("null" if value is None else str(value), text)


def _number(value: Any) -> float | None:
    try:
        found = float(str(value).replace("_", "")) if not isinstance(value, bool) else None
    except ValueError:
        return None
    return found if found is not None and math.isfinite(found) else None


def _plain(value: Any) -> Any:
    return "" if value is None else value


def _shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    match SHORT.get(column, column):
        case "age":
            return short_age(value)
        case "done":
            return f"{100 * value:.0f} %"
        case "speed/tokens_per_second":
            return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and "/" not in column
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )


def short_age(seconds: float) -> str:
    """How long ago something was: 12 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
