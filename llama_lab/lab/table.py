"""A table for people: boxes and colours on a terminal, aligned plain text in a file or a pipe."""

import sys
from collections.abc import Sequence


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
