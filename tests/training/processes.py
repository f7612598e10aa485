"""Runs in processes of their own, watched and signalled from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llama_lab.training.metrics import read_rows

from .conftest import tiny_overrides

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Hundreds of updates of 128 tokens, so that there is time to interrupt them.
LONG = ["training_tokens=51200", "data.tokens_per_update=128", "log.every_updates=5", "checkpoint.every_tokens=2560"]
# As many as a process can be killed among, and few enough to be done twice.
SHORT = ["training_tokens=12800", "data.tokens_per_update=128", "log.every_updates=5", "checkpoint.every_tokens=512"]

Process = subprocess.Popen[str]


def command(text: Path, *overrides: str) -> list[str]:
    """`llama-lab train` of a tiny run."""
    return [sys.executable, "-m", "llama_lab", "train", *tiny_overrides(text), *overrides]


@contextmanager
def started(words: list[str], **environment: str) -> Iterator[Process]:
    """A process in a group of its own, whose whole group is ended at last."""
    output = subprocess.PIPE
    process = subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def end_of(process: Process, seconds: float = 120.0) -> str:
    """What it said, once it has ended."""
    return process.communicate(timeout=seconds)[0]


def rank_process(outputs: Path, name: str, rank: int) -> int:
    """The process of a rank, once it has said where it is; 0 before."""
    for path in (outputs / name).glob(f".locks/*.ranks/at-{rank}.json"):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())["process"]
    return 0


def folder_of(outputs: Path, name: str) -> Path:
    (folder,) = (outputs / name).glob("llama_3m*")
    return folder


def rows_of(outputs: Path, name: str) -> list[dict[str, Any]]:
    files = list((outputs / name).glob("llama_3m*/metrics.jsonl"))
    return read_rows(files[0]) if files else []


def status_of(outputs: Path, name: str) -> str:
    return json.loads((folder_of(outputs, name) / "summary.json").read_text())["status"]


def wait_for(condition: Callable[[], Any], process: Process, seconds: float = 120.0) -> Any:
    """The first true value of a condition, while a process lives."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return value
