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

HELD = Path(__file__).with_name("held_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Hours, of which nobody waits for the end.
ENDLESS = ["training_tokens=512000000", "checkpoint.every_tokens=null", "eval=null", "sample=null"]

Process = subprocess.Popen[str]


def command(text: Path, *overrides: str) -> list[str]:
    """`llama-lab train` of a tiny run."""
    return [sys.executable, "-m", "llama_lab", "train", *tiny_overrides(text), *overrides]


class Gate:
    """A place at which a run waits until it is asked to stop, or a test lets it go on.

    Args:
        place: as the loop says it to its watchdog: `update 20`, `the validation after update 3`, …
        folder: of the test's own.
    """

    def __init__(self, place: str, folder: Path):
        self._place, self._path = place, folder / f"gate-{place.replace(' ', '-')}"

    def before(self, words: list[str]) -> list[str]:
        """A command `python -m llama_lab …` with the gate in its way."""
        at = words.index("-m")
        assert words[at : at + 2] == ["-m", "llama_lab"]
        return [*words[:at], str(HELD), self._place, str(self._path), *words[at + 2 :]]

    def wait_for(self, process: "subprocess.Popen[Any]", count: int = 1) -> list[int]:
        """The processes that have come to it, once there are so many."""
        return wait_for(lambda: len(found := self._arrived()) >= count and found, process)

    def _arrived(self) -> list[int]:
        return [int(path.suffix[1:]) for path in self._path.parent.glob(f"{self._path.name}.*")]

    def open(self) -> None:
        """Let them go on, and whoever comes later pass."""
        self._path.touch()


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


def end_of(process: Process, seconds: float = 170.0) -> str:
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


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[Any]", seconds: float = 170.0) -> Any:
    """The first true value of a condition, while a process lives."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return value
