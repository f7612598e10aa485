"""A table for people: boxes and colours on a terminal, aligned plain text in a file or a pipe."""

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2
WORDS_WIDTH = 24
"""A column of words, such as what differs, is folded rather than another left out, down to this."""
LEAST_WORDS = 12
"""And down to this where no other can be left out."""


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print cells as they are; nothing is cut, because a path or a number that was cut cannot be copied."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=any(headings))
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*[cell.replace("[", r"\[") for cell in row])
        Console(highlight=False).print(table)
        return
    print(title)
    lines = ([headings] if any(headings) else []) + list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))] if lines else []
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_list(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    drop: Sequence[str] = (),
    words: Sequence[str] = (),
    say_dropped: bool = True,
) -> None:
    """Print a table on a terminal, a line for each row where that is possible, with the columns that there is room for.

    Args:
        drop: headings of columns that may be left out, the least important first.
        words: headings of columns that may be folded between words.
        say_dropped: name what was left out.
    """
    from rich.console import Console

    width = shutil.get_terminal_size().columns
    table, left_out = fitted(headings, rows, width, drop=drop, words=words)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    # What is as wide as it must be is left to the terminal, which breaks lines so that they can still be copied.
    console = Console(highlight=False, width=max(width, _least(table)))
    console.print(table)
    if left_out and say_dropped:
        console.print(f"Not shown, for want of room: {', '.join(left_out)}", style="dim", markup=False)


def fitted(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, drop: Sequence[str] = (), words: Sequence[str] = ()
) -> tuple["Table", list[str]]:
    """A table without lines that fits a width, and the headings of the columns that were left out for it.

    Columns without any value are left out too, and not named. What may neither be left out nor folded stays whole.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    there = [column for column in range(len(headings)) if any(row[column] for row in rows) or not rows]
    natural = {column: max(len(headings[column]), *(cell_len(row[column]) for row in rows), 0) for column in there}
    least = {column: min(size, WORDS_WIDTH) if headings[column] in words else size for column, size in natural.items()}
    left_out = []
    for heading in drop:
        if sum(least[column] + GAP for column in there) - GAP <= width:
            break
        dropped = [column for column in there if headings[column] == heading]
        left_out += [heading] * bool(dropped and heading)
        there = [column for column in there if column not in dropped]
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    room = width - sum(least[column] + GAP for column in there) + GAP
    for column in there:
        is_words = headings[column] in words
        size = max(min(natural[column], LEAST_WORDS), least[column] + room) if is_words and room < 0 else least[column]
        size += max(0, min(natural[column] - least[column], room))
        room -= size - least[column]
        is_number = all(row[column][:1].isdecimal() or not row[column] for row in rows)
        justify = "right" if is_number and column and not is_words else "left"
        table.add_column(headings[column], justify=justify, no_wrap=not is_words, overflow="fold", min_width=size, max_width=size)
    for row in rows:
        table.add_row(*[Text(row[column]) for column in there])
    return table, left_out


def _least(table: "Table") -> int:
    return sum((column.width or column.max_width or 0) + GAP for column in table.columns)
