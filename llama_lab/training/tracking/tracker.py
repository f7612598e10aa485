"""The copy of a run's metrics that goes to Weights & Biases. Nothing that happens to it may cost a run.

Training starts a process that reads metrics.jsonl and samples.jsonl and talks to W&B (`wandb_run.py`), listens now and then to what
it has to tell, without waiting, and at the end gives it a bounded time to close.
"""

import json
import os
import queue
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from llama_lab.config.identity import plain_config, shapes
from llama_lab.config.schema import RunConfig, WandbConfig
from llama_lab.training.run_folder import RunFolder, relative
from llama_lab.training.tracking.wandb_run import Request

INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0
# Over these two, for starting Python, importing the library and writing offline what could not go online.
SLACK_SECONDS = 15.0

Say = Callable[[str], None]


class Tracker:
    """What a run without W&B talks to: it hears nothing and says nothing."""

    def listen(self) -> None:
        """Say what W&B has done since the last call, without waiting. The first call comes after the run's rows are cut back."""

    def finish(self, exit_code: int) -> None:
        """Close the W&B run within a bounded time. `exit_code` 0 marks it finished, anything else failed."""

    def where(self) -> str | None:
        """A sentence for the closing words: where to look at the run."""
        return None


class WandbTracker(Tracker):
    """A sender that follows the run's files. If it breaks, that is said once, and training goes on."""

    def __init__(self, sender: "SenderProcess", folder: RunFolder, say: Say):
        self._sender, self._folder, self._say = sender, folder, say
        self._follows, self._lost, self._closing = False, False, False
        self._mode, self._where = "", ""

    def listen(self) -> None:
        if not self._follows:
            self._follows = True
            self._sender.tell(follow=True)
        for event in self._sender.heard():
            self._hear(event)

    def finish(self, exit_code: int) -> None:
        self._closing = True
        self._sender.tell(finish=exit_code)
        for event in self._sender.heard(
            wait=INIT_SECONDS + FINISH_SECONDS + SLACK_SECONDS, after_opened=FINISH_SECONDS + SLACK_SECONDS
        ):
            self._hear(event)
        self._sender.end()

    def where(self) -> str | None:
        if self._lost or not self._where:
            return None
        return place(self._mode, self._where)

    def _hear(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "note":
                self._say(event["text"])
            case "opened":
                self._mode, self._where = event["mode"], event["where"]
                if self._mode == "online":
                    self._say(f"W&B: {self._where}")
            case "lost" if not self._lost:
                self._lost = True
                goes_on = "" if self._closing else "training goes on, "
                self._say(
                    f"W&B is gone ({event['reason']}); {goes_on}metrics.jsonl is complete; "
                    f"send it later with: llama-lab track {relative(self._folder.path)}"
                )


class SenderProcess:
    """A process that runs `wandb_run.py`, and the lines to and from it."""

    def __init__(self, request: Request):
        # -P with our own sys.path: it imports what we import, and nothing that happens to lie in the working directory.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        # The helper of a W&B run that the caller has open is not ours to use, and its end not ours to share.
        environment.pop("WANDB_SERVICE", None)
        with _log_file(Path(request.folder)) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "llama_lab.training.tracking.wandb_run"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                # Ctrl-C in the terminal is meant for training, which then closes this process in order.
                start_new_session=os.name == "posix",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._opened = self._over = self._hangs = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.tell(**asdict(request))

    def tell(self, **order: Any) -> None:
        """Send a line. A process that is gone is heard of in another way."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def heard(self, wait: float = 0.0, after_opened: float = 0.0) -> Iterator[dict[str, Any]]:
        """What the process has told; the last event is `lost` or `closed`, and is given once.

        Args:
            wait: seconds to wait for the last event; 0: only what is there.
            after_opened: the same from where the W&B run is known to be open.
        """
        start = time.monotonic()
        while not self._over:
            seconds = after_opened if self._opened else wait
            left = start + seconds - time.monotonic()
            try:
                event = self._events.get(timeout=left) if left > 0 else self._events.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                self._hangs = True
                event = {"event": "lost", "reason": f"no answer within {seconds:.0f} s"}
            self._opened |= event["event"] == "opened"
            self._over |= event["event"] in ("lost", "closed")
            yield event

    def end(self) -> None:
        """End the process, which has nothing left to do or does not answer."""
        if self._hangs:
            self._process.kill()
        with suppress(OSError):
            self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            self._process.wait(timeout=SLACK_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=SLACK_SECONDS)
        self._process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        code = self._process.wait()
        self._events.put({"event": "lost", "reason": f"its process ended with exit code {code}"})


def start_tracker(run: RunConfig, folder: RunFolder, say: Say) -> Tracker:
    """Open the run's W&B run, or the same one again after a resume, without waiting for it.

    Args:
        run: the resolved config; W&B gets it as nested plain values.
        say: prints a line.

    Returns:
        A sink that never raises; one that does nothing where `wandb: null`.
    """
    if run.wandb is None:
        return Tracker()
    tracker_id = _agents_id() or folder.meta().get("wandb_id") or new_id(folder)
    folder.write_meta(wandb_id=tracker_id)
    request = make_request(run, run.wandb, folder, tracker_id, fallback=True)
    try:
        return WandbTracker(SenderProcess(request), folder, say)
    except OSError as error:
        say(f"W&B is not used: its process does not start ({error})")
        return Tracker()


def new_id(folder: RunFolder) -> str:
    """An id that W&B has not seen: the run's, with a random end, for W&B gives an id only once, deleted runs included."""
    return f"{folder.path.name}-{secrets.token_hex(3)}"


def place(mode: str, where: str) -> str:
    """Where to look at a W&B run, in words, and of one that is offline how it is sent.

    Args:
        where: its address, or the folder of one that is offline.
    """
    if mode == "online":
        return where
    folder = shlex.quote(relative(Path(where)))
    return f"wandb leet {folder}   (offline; wandb sync {folder} sends it)"


def _agents_id() -> str | None:
    """The id that W&B Sweeps' agent has chosen for the run it starts, which is how its server knows the run."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def make_request(run: RunConfig, node: WandbConfig, folder: RunFolder, tracker_id: str, *, fallback: bool) -> Request:
    """What a sender needs to know of a run.

    Args:
        fallback: whether a W&B that does not start online is written offline.
    """
    lineage = folder.meta().get("lineage")
    return Request(
        folder=str(folder.path),
        id=tracker_id,
        mode=node.mode.value,
        # Asked for in words, online still may not cost a run; only a command that does nothing else ends instead.
        fallback=fallback,
        project=node.project,
        entity=node.entity,
        group=node.group or run.name,
        tags=node.tags,
        job_type=node.job_type,
        name=folder.path.name,
        config=_config(run) | ({"lineage": lineage} if lineage else {}),
        # The whole command stays here; W&B has the values of the config.
        program=shlex.join((folder.meta().get("command") or ["llama-lab", "train"])[:2]),
        parent=os.getpid(),
        init_seconds=INIT_SECONDS,
        finish_seconds=FINISH_SECONDS,
    )


def _config(run: RunConfig) -> dict[str, Any]:
    """Every value, what kind of data, tokenizer, optimizer and schedule they belong to, and the options that were chosen."""
    tree = plain_config(run)
    for group, shape in shapes(run).items():
        tree[group]["type"] = shape
    return tree | {"origin": {"choices": run.origin.choices}}


@contextmanager
def _log_file(folder: Path) -> Iterator[int | IO[bytes]]:
    """Where the process writes its own errors: beside W&B's files, or nowhere if that cannot be written."""
    try:
        (folder / "wandb").mkdir(exist_ok=True)
        log = (folder / "wandb" / "process.log").open("ab")
    except OSError:
        yield subprocess.DEVNULL
        return
    with log:
        yield log
