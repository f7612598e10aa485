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


# The disk is full from the moment that the file of the rows is so large until the run has said so.
FULL_FOR_A_WHILE = """
import glob, os, resource, sys, threading, time
from llama_lab.cli import main

def watch():
    free = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    while not any(os.path.getsize(name) > 1200 for name in glob.glob(sys.argv[1] + "/*/metrics.jsonl")):
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, free))
    while os.environ["WAIT_FOR"] not in said():
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))

def said():
    sys.stdout.flush()
    return open(os.environ["SAID"]).read()

threading.Thread(target=watch, daemon=True).start()
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_is_full_for_a_while_costs_nothing(tiny, text: Path, outputs: Path, tmp_path: Path) -> None:
    longer = ["training_tokens=81920", "log.every_updates=1", "checkpoint.every_tokens=8192"]
    unbroken = train(tiny(*longer, "name=unbroken"))
    said = tmp_path / "said"
    words = [sys.executable, "-c", FULL_FOR_A_WHILE, str(outputs / "full"), "train", *tiny_overrides(text), *longer, "name=full"]
    # Standard output goes to a pipe, which no limit of files holds for, and from there into a file.
    environment = os.environ | {"SAID": str(said), "WAIT_FOR": "metrics.jsonl could not be written"}
    said.touch()
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
        said.open("wb") as file,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
    assert process.returncode == 0, said.read_text()
    (folder,) = (outputs / "full").glob("llama_3m*")
    assert "its rows wait in memory until you lift the limit on the size of a file (ulimit -f shows it)" in said.read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert_same_run(folder, unbroken.folder)
