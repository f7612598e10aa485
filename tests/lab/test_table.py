"""Tables on terminals of several widths."""

import os
import re
import struct
import subprocess
import sys

import pytest

from llama_lab.lab.table import fitted

from .written_runs import Make

WIDTHS = (80, 120, 160)


def on_terminal(columns: int, *words: str) -> list[str]:
    """Lines that a command prints on a terminal of a width, without colours."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "CI")} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "llama_lab", *words]
    said = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        while True:
            try:
                piece = os.read(mine, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            said += piece
        assert process.wait(60) == 0
    os.close(mine)
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*\w", "", said.decode()).splitlines()]


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_run_is_a_line_with_its_hash_and_what_differs(columns: int, make: Make):
    runs = [make(seed, 2.0, lr) for seed in (0, 1) for lr in (1e-3, 2e-3)]
    title, headings, *lines = on_terminal(columns, "runs", "--sort", "optim.max_lr", "--columns", "+optim")
    assert title == "4 runs"
    assert headings.split()[:3] == ["run", "status", "val/loss"]
    assert {"differs", "optim"} <= set(headings.split())
    assert all(len(line) <= columns for line in lines)
    first = [line for line in lines if "finished" in line]
    assert {line.split()[0] for line in first} == {run.name[-8:] for run in runs}
    assert all("2.0000" in line and "init=" in line and "muon" in line for line in first)
    assert ("tokens" in headings) == (columns > 80)
    assert lines[-1].startswith("Not shown, for want of room: model, tokens") == (columns == 80)
    paths = on_terminal(columns, "runs", "--columns", "run,val/loss")
    assert all(sum(str(run) in line for line in paths) == 1 for run in runs), "in one piece"


@pytest.mark.parametrize("columns", WIDTHS)
def test_numbers_of_watched_runs_are_seen_at_any_width(columns: int, make: Make):
    runs = [make(seed, status="preempted", last=8) for seed in (0, 1)]
    _, headings, *lines = on_terminal(columns, "watch", "--once", *map(str, runs))
    assert {"run", "status", "done", "val", "differs"} <= set(headings.split())
    assert {line.split()[0] for line in lines} == {run.name[-8:] for run in runs}
    assert all("40 %" in line and "2.4022" in line and "init=" in line and len(line) <= columns for line in lines)


def cells(*sizes: int) -> list[str]:
    return ["9" * size for size in sizes]


def widths(headings: list[str], rows: list[list[str]], width: int, **named: list[str]) -> tuple[dict[str, int | None], list[str]]:
    table, left_out = fitted(headings, rows, width, **named)
    return {str(column.header): column.max_width for column in table.columns}, left_out


def test_the_least_important_columns_go_first_and_words_are_folded_before_the_others():
    headings, rows = ["id", "a", "b", "words"], [cells(8, 10, 10, 60)]
    named = {"drop": ["b", "a"], "words": ["words"]}
    assert widths(headings, rows, 94, **named) == ({"id": 8, "a": 10, "b": 10, "words": 60}, [])
    assert widths(headings, rows, 60, **named) == ({"id": 8, "a": 10, "b": 10, "words": 26}, [])
    assert widths(headings, rows, 50, **named) == ({"id": 8, "a": 10, "words": 28}, ["b"])
    assert widths(headings, rows, 30, **named) == ({"id": 8, "words": 20}, ["b", "a"])
    assert widths(headings, rows, 5, **named) == ({"id": 8, "words": 12}, ["b", "a"]), "what cannot be left out stays whole"
    assert widths(headings, [cells(8, 0, 3, 0)], 94, **named) == ({"id": 8, "b": 3}, []), "nobody misses an empty column"
