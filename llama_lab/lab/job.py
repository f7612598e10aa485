"""One run in a process of its own: what a sweep starts, and what answers in that process.

A fresh process costs about two seconds for importing torch. It buys that no GPU memory leaks from one job into the next, that a
crash takes nothing else along, and that one job's settings of torch, tracker and environment never reach another.

The request and the answer are files in a folder that the sweep makes: `config.yaml` and `request.json` go in, `result.json` comes
out. So a job trains exactly what was validated, whatever happens to the YAML in between.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llama_lab.config.identity import load_config, save_config
from llama_lab.config.schema import RunConfig


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        status: what the run says of itself (`finished`, `preempted`, `already finished`), or `failed …`.
        folder: the run's folder; null if it never had one.
        updates, tokens: done so far, in all starts together.
        summary: last values by metric key.
    """

    status: str
    folder: str | None = None
    updates: int = 0
    tokens: int = 0
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self.status.startswith("failed")


class StopRequest:
    """Signals that reached the sweep, handed on to the job that is running."""

    def __init__(self) -> None:
        self.received = False
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """While the context lasts, a signal to stop goes to the running job instead of ending this process."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
        before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None)) is not None}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def holding(self, process: "subprocess.Popen[bytes]") -> Iterator[None]:
        """While the context lasts, `process` is the one that signals go to."""
        self._process = process
        if self.received:  # between the end of the job before and the start of this one
            self._receive(signal.SIGTERM, None)
        try:
            yield
        finally:
            self._process = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        # Windows sends Ctrl-C to every process of the console, so the job has it already.
        if self._process is not None and self._process.poll() is None and os.name == "posix":
            # A closed terminal asks for the same as a polite kill; the job saves its state on either.
            self._process.send_signal(signal.SIGTERM if number == getattr(signal, "SIGHUP", None) else number)


def start_job(run: RunConfig, *, command: list[str], slug: str | None, stop: StopRequest) -> Outcome:
    """Train `run` in a new process whose output goes where ours goes, and wait for it.

    Args:
        command: what would be typed to start this run alone, for its records.
        slug: what the sweep adds to the run's folder name; null: nothing.
        stop: where signals to this process come in.
    """
    with tempfile.TemporaryDirectory(prefix="llama_lab-job-") as name:
        folder = Path(name)
        save_config(run, folder / "config.yaml")
        (folder / "request.json").write_text(json.dumps({"command": command, "slug": slug}), encoding="utf-8")
        # -P with our own sys.path: the job imports what we import, and nothing that happens to lie in the working directory.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        words = [sys.executable, "-P", "-m", "llama_lab", "__job", name]
        # A process group of its own: Ctrl-C in the terminal reaches the job once, from us, and its workers not behind its back.
        group = 0 if os.name == "posix" else None
        sys.stdout.flush()
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, process_group=group)
        with stop.holding(process):
            code = process.wait()
        result = folder / "result.json"
        if result.is_file():
            return Outcome(**json.loads(result.read_text(encoding="utf-8")))
    if stop.received:
        return Outcome("stopped before its first update")
    return Outcome(f"failed ({_reason(code)})")


def answer_job(folder: Path) -> int:
    """Be the job: train what the request says, write the result, and return the exit code."""
    from llama_lab.api import train

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    run = load_config(folder / "config.yaml")
    result = train(run, handle_signals=True, command=request["command"], extra_slug=request["slug"])
    outcome = Outcome(result.status, str(result.folder), result.updates, result.tokens, result.summary)
    (folder / "result.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return 0


def _reason(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "its config was refused" if code == 2 else f"exit code {code}"
