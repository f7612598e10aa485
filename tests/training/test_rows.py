"""Rows on a disk that has no room for a while."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_lab import train
from llama_lab.training.metrics import read_rows
from llama_lab.training.rows import RowFile

from .conftest import assert_same_run, tiny_overrides

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes meanwhile, as on a disk that is full."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_for_room_and_none_is_written_half(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    rows = RowFile(path, said.append)
    assert rows.append({"update": 1}) is None
    with largest_file(path.stat().st_size + 5):
        error = rows.append({"update": 2})
        assert error is not None
        assert error.errno == errno.EFBIG
        assert rows.append({"update": 3}) is not None
        assert read_rows(path) == [{"update": 1}]
        assert path.read_bytes().endswith(b"\n")
    assert said == [
        "metrics.jsonl could not be written (File too large). Training goes on; its rows wait in memory until you lift the limit "
        "on the size of a file (ulimit -f shows it)"
    ]
    assert rows.append() is None
    assert read_rows(path) == [{"update": update} for update in (1, 2, 3)]
    assert rows.append({"update": 4}) is None
    assert len(read_rows(path)) == 4


# No file can grow from the tenth update to the thirteenth, in which no checkpoint is due.
FULL_FOR_A_WHILE = """
import resource, sys
from llama_lab.cli import main
from llama_lab.training.processes.watchdog import Watchdog

free, say_place = resource.getrlimit(resource.RLIMIT_FSIZE)[1], Watchdog.at

def at(watchdog, place):
    say_place(watchdog, place)
    if place in ("update 10", "update 13"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500 if place == "update 10" else free, free))

Watchdog.at = at
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_for_a_while_costs_nothing(tiny, text: Path, outputs: Path) -> None:
    longer = ["training_tokens=10240", "log.every_updates=1", "checkpoint.every_tokens=8192"]
    unbroken = train(tiny(*longer, "name=unbroken"))
    words = [sys.executable, "-c", FULL_FOR_A_WHILE, "train", *tiny_overrides(text), *longer, "name=full"]
    # Standard output goes to a pipe, which no limit of files holds for.
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "full").glob("llama_3m*")
    assert "its rows wait in memory until you lift the limit on the size of a file (ulimit -f shows it)" in done.stdout
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert_same_run(folder, unbroken.folder)
