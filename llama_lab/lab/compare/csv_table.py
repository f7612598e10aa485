"""A CSV file as lines of cells, and what of W&B's table of runs its columns are. No runs are made here.

W&B's table puts config and results side by side and does not say which is which, so names have to.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import SHAPES, shown
from llama_lab.lab.compare.metric_names import is_measured

Line = dict[str, str]
# What spreadsheets put between cells where a comma is part of numbers, or on a clipboard.
DELIMITERS = (",", ";", "\t")
DECIMAL_COMMA = re.compile(r"-?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)
ABOUT = {
    *(
        "",
        "id",
        "name",
        "state",
        "notes",
        "user",
        "tags",
        "created",
        "updated",
        "end time",
        "heartbeat",
        "runtime",
        "sweep",
        "group",
    ),
    *("job type", "description", "entity", "project", "url", "host", "hostname", "os", "python version", "cli version", "command"),
    *("gpu type", "gpu count", "cpu count", "logical cpu count", "git", "github", "commit", "git commit", "git repository"),
    *("run id", "run name", "unnamed: 0"),
}
"""Columns that W&B, or the library that a table went through, adds: of the run, not of its config."""
PROGRESS = ("tokens", "update", "seconds", "epoch", "step", "global_step", "trainer/global_step", "iteration", "iter", "_step")
"""Columns that say how far a run came."""
COUNTS = {*PROGRESS, "training_tokens"} - {"seconds", "epoch"}
# A whole number as spreadsheets show it; with a fraction, 1,024 might be either.
GROUPED = re.compile(r"\d{1,3}([.,]\d{3})+")


def read_lines(path: Path, word: str) -> list[Line]:
    """The lines of a CSV file below its heading, cell by column. Empty lines are none.

    Commas, semicolons and tabs may stand between cells; with semicolons a number may have a decimal comma.
    Counts of tokens and steps may be written in groups of three digits.

    Args:
        word: how the file was named, for what is refused.

    Raises:
        ConfigError: it is no CSV of runs, has no line below its heading, several columns of one name, or lines of other lengths.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        delimiter = max(DELIMITERS, key=lambda one: len(next(_rows(text, one), [])))
        heading, *rows = [row for row in _rows(text, delimiter) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refused(word, f"cannot be read as CSV: {error}") from None
    if not rows:
        raise _refused(word, "has no line below its heading")
    if twice := [column for column, count in Counter(heading).items() if count > 1]:
        raise _refused(word, f"has several columns called {', '.join(sorted(twice))}; leave one of each")
    if any(column.endswith(("__MIN", "__MAX")) for column in heading):
        raise _refused(word, "is the CSV of a chart, one step a line; export the table of runs, one run a line")
    if any(len(row) != len(heading) for row in rows):
        raise _refused(word, "has lines with more or fewer cells than its heading; export the table of runs anew")
    for number in [number for number, column in enumerate(heading) if column in COUNTS]:
        for row in rows:
            if GROUPED.fullmatch(row[number]):
                row[number] = re.sub("[.,]", "", row[number])
    if delimiter == ";":
        rows = [[cell.replace(",", ".") if DECIMAL_COMMA.fullmatch(cell) else cell for cell in row] for row in rows]
    return [dict(zip(heading, row, strict=True)) for row in rows]


def result_columns(lines: Sequence[Line], asked: str | None) -> Collection[str]:
    """Columns of what runs measured, and of how far they came.

    A metric has a `/` in its name, or `_` in front, or is asked for. Else its name has to be one, such as `train_loss`, and its
    values numbers most of which differ: a weight of a loss, say, is the same for many runs.
    """
    return [
        column
        for column in lines[0]
        if column == asked or "/" in column or column.startswith("_") or column in PROGRESS or _is_result(column, lines)
    ]


def is_about(column: str) -> bool:
    """Whether a column tells of the run what is neither config nor result."""
    return column.lower() in ABOUT


def in_terms_of(known: Mapping[str, Sequence[Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Config of a line as runs write it, so that both can be told to be the same: a kind under its part's name, 10000 as 10000.0.

    Args:
        known: of the runs: by key path, the values that there are.
        values: of the line, by column.
    """
    found: dict[str, Any] = {}
    for column, value in values.items():
        part, _, field = column.partition(".")
        key = part if field == "type" and part in SHAPES else column
        same = [other for other in known.get(key, ()) if _is_same(value, other)]
        found[key] = same[0] if same else value
    return found


def _is_same(cell: Any, value: Any) -> bool:
    """Whether a cell says the value of a config."""
    if value is None or isinstance(value, bool):
        return str(cell).lower() in (shown(value), "" if value is None else shown(value))
    if isinstance(value, list):
        try:
            return json.loads(str(cell)) == value
        except json.JSONDecodeError:
            return False
    return cell == value or str(cell) == value


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _is_result(column: str, lines: Sequence[Line]) -> bool:
    if "." in column or not is_measured(column):
        return False
    cells = [line[column] for line in lines if line[column]]
    return bool(cells) and 2 * len(set(cells)) > len(cells) and all(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refused(subject: str, rule: str) -> ConfigError:
    return ConfigError([(subject, rule)], scope="this request")
