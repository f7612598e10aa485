"""A W&B run made from a run's own files, in a process of its own.

    metrics.jsonl, samples.jsonl -> rows that W&B does not have yet -> wandb -> its server, or RUN/wandb/offline-run-*

Training never calls W&B: its library blocks for ever when its helper hangs, raises whatever a socket raises when the helper dies,
and keeps exit hooks that do either. Here it may do all that; `tracker.py` starts this module, hears what it has to tell, and drops
it.

Words with the parent are lines of JSON. On standard input: the request; then `follow` once the files may be read, and `finish`. On
standard output: `note`, `opened`, `sent`, `lost`, `closed`. An input that ends without `finish` means that the parent was killed.
"""

import contextlib
import json
import netrc
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

from llama_lab.training.tracking.sent import GrowingRows, Sent, read_sent, rows_in, sending, write_sent

FOLLOW_SECONDS = 0.5
PROGRESS_ROWS = 1000
# Offline rows reach the disk so often, in seconds; the library's default of 15 loses a run killed early.
FLUSH_SECONDS = 1.0
BEST = "best/val/loss"

Tell = Callable[..., None]


@dataclass
class Request:
    """What the parent wants sent.

    Attributes:
        folder: the run's folder.
        id: W&B's id of the run, unique in its project for ever.
        mode: `auto`, `online` or `offline`.
        fallback: whether a W&B that does not start online is written offline instead.
        project, entity, group, tags, job_type, name: where and under which words it appears.
        config: nested plain values.
        program: the command's first words, for W&B's overview.
        parent: process whose memory and CPU W&B records.
        init_seconds, finish_seconds: how long W&B may take to open and to close.
    """

    folder: str
    id: str
    mode: str
    fallback: bool
    project: str
    entity: str | None
    group: str
    tags: list[str]
    job_type: str
    name: str
    config: dict[str, Any]
    program: str
    parent: int
    init_seconds: float
    finish_seconds: float


class Sender:
    """One open W&B run and the two files that feed it."""

    def __init__(self, request: Request, wandb: Any, tell: Tell):
        self._request, self._wandb, self._tell = request, wandb, tell
        self._folder = Path(request.folder)
        self._table: Any = None
        self._groups: set[str] = set()
        self._count = 0
        self._sent = Sent(request.id, decide_mode(request.mode, wandb), request.project, request.entity)
        if self._sent.mode != "disabled":
            self._open()

    @property
    def is_open(self) -> bool:
        """Whether there is a W&B run; there is none where WANDB_MODE=disabled."""
        return self._sent.mode != "disabled"

    def send(self) -> None:
        """Give W&B what the files have got since the last call."""
        rows, samples = self._metrics.new(), self._samples.new()
        # Saved before the new rows are given: those given before it have reached W&B's own file by now.
        write_sent(self._folder, self._sent)
        for number, row in enumerate(rows, 1):
            self._log(row)
            if number % PROGRESS_ROWS == 0:
                self._tell("sent", rows=number, of=len(rows))
        for row in samples:
            if self._table is None:
                # A table logged again after it grew would stay at its first row in the default mode.
                self._table = self._wandb.Table(columns=["update", "tokens", "prompt", "text", "set"], log_mode="INCREMENTAL")
            self._table.add_data(row["update"], row["tokens"], row["prompt"], row["text"], row.get("set"))
        if samples:
            axes = {axis: samples[-1][axis] for axis in ("update", "tokens", "seconds")}
            self._handle.log(axes | {"samples": self._table})
        self._count += len(rows) + bool(samples)
        self._sent.metrics, self._sent.samples = list(self._metrics.last), list(self._samples.last)

    def close(self, exit_code: int) -> None:
        """Send the rest, close the W&B run, and look whether its file holds what it was given.

        Raises:
            OSError: it does not; the library says nothing when its disk is full.
        """
        self.send()
        # Said explicitly: of an exit through a signal's handler the library would record a success.
        self._handle.finish(exit_code=exit_code)
        # The helper may still be writing when the run counts as finished; it is done when it has ended.
        self._wandb.teardown(exit_code)
        kept = rows_in(self._file)
        if kept is not None and kept < self._count:
            raise OSError(f"{self._file.parent} holds {kept} of {self._count} rows; is the disk full?")
        self._sent.closed = True
        write_sent(self._folder, self._sent)

    def lose(self, reason: str) -> None:
        """Remember that rows may be missing, as far as there is still a place to write it."""
        self._sent.lost = reason
        with contextlib.suppress(OSError):
            write_sent(self._folder, self._sent)

    def _open(self) -> None:
        request = self._request
        try:
            self._handle = self._init(self._sent.mode)
        except Exception as error:
            if not (request.fallback and self._sent.mode == "online"):
                raise
            self._tell("note", text=f"W&B does not start online ({in_a_line(error)}); this run is written offline instead")
            with contextlib.suppress(Exception):
                self._wandb.teardown()  # the helper holds the run's id otherwise
            self._sent.mode = "offline"
            self._handle = self._init("offline")
        self._sent = next((entry for entry in read_sent(self._folder) if entry.same_run(self._sent)), self._sent)
        self._sent.closed = False
        self._metrics = GrowingRows(self._folder / "metrics.jsonl", self._sent.metrics)
        self._samples = GrowingRows(self._folder / "samples.jsonl", self._sent.samples)
        self._file = Path(self._handle.settings.sync_file)
        if not self._file.is_relative_to(self._folder):
            raise OSError(f"{self._folder / 'wandb'} cannot be written")
        self._sent.where = str(self._handle.url if self._sent.mode == "online" else self._file.parent)
        write_sent(self._folder, self._sent)
        for axis in ("update", "tokens", "seconds"):
            self._handle.define_metric(axis, hidden=True)
        self._tell("opened", mode=self._sent.mode, where=self._sent.where)

    def _init(self, mode: str) -> Any:
        request = self._request
        return self._wandb.init(
            project=request.project,
            entity=request.entity,
            group=request.group,
            tags=request.tags,
            name=request.name,
            id=request.id,
            resume="allow" if mode == "online" else None,
            job_type=request.job_type,
            dir=request.folder,
            config=request.config,
            mode=mode,
            settings=self._wandb.Settings(
                init_timeout=request.init_seconds,
                finish_timeout=request.finish_seconds,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                x_stats_pid=request.parent,
                program=request.program,
                # Of an account that saves code by default, W&B would take the sources and the uncommitted changes along.
                save_code=os.environ.get("WANDB_SAVE_CODE", "").lower() in ("1", "true"),
                console="off",
                silent=True,
            ),
        )

    def _log(self, row: dict[str, Any]) -> None:
        """One row with its axes. What is null in the file, since JSON has no infinity, is left out."""
        for group in {key.partition("/")[0] for key in row if "/" in key} - self._groups:
            self._groups.add(group)
            self._handle.define_metric(f"{group}/*", step_metric="tokens")
        self._handle.log({key: value for key, value in row.items() if value is not None})
        loss = row.get("val/loss")
        if loss is not None and (self._sent.best is None or loss < self._sent.best):
            self._sent.best = loss
            # Not through define_metric(summary="min"), which would take the last value's plain key away.
            self._handle.summary[BEST] = loss


def decide_mode(asked: str, wandb: Any) -> str:
    """online, offline or disabled. What was asked for wins over the environment, that over whether there is a key."""
    if asked != "auto":
        return asked
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted:
        return {"dryrun": "offline", "run": "online"}.get(wanted, wanted)
    return "online" if _has_key(wandb) else "offline"


def _has_key(wandb: Any) -> bool:
    """Whether W&B could log in without asking: a key in the environment, or one that `wandb login` stored."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(Exception):
        host = urlparse(wandb.setup().settings.base_url).hostname or ""
        default = "_netrc" if sys.platform == "win32" else ".netrc"
        stored = netrc.netrc(os.environ.get("NETRC") or Path.home() / default)
        return stored.authenticators(host) is not None
    return False


def in_a_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _orders(source: TextIO) -> "queue.Queue[dict[str, Any] | None]":
    """The parent's lines as they come, then None. Read by a thread: not every system waits for a pipe with a time-out."""
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in source:
            orders.put(json.loads(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    return orders


def serve(orders: "queue.Queue[dict[str, Any] | None]", tell: Tell) -> None:
    """Answer one request: open the W&B run, feed it until the parent ends it, close it. Whatever goes wrong is told as `lost`."""
    first = orders.get()
    if first is None:
        return
    request = Request(**first)
    sender: Sender | None = None
    try:
        import wandb

        with sending(Path(request.folder)):
            sender = Sender(request, wandb, tell)
            exit_code, follows = None, False
            while exit_code is None:
                try:
                    order = orders.get(timeout=FOLLOW_SECONDS)
                    # Killed, the parent can say nothing any more; what it wrote is sent all the same.
                    exit_code = 1 if order is None else order.get("finish")
                    follows = True
                except queue.Empty:
                    if follows and sender.is_open:
                        sender.send()
            if sender.is_open:
                sender.close(exit_code)
        tell("closed")
    except Exception as error:
        # When its helper process dies, the library raises whatever its socket raised: there is no narrower class to catch.
        if sender is not None and sender.is_open:
            sender.lose(in_a_line(error))
        tell("lost", reason=in_a_line(error))


def main() -> None:
    """Be the process: keep standard output for words with the parent, and leave without the library's exit hooks."""
    # What the library prints goes where our errors go; only events reach the parent.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        # A signal to the whole job is the parent's to answer; it says here when to end.
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def tell(event: str, **values: Any) -> None:
        # Where nobody listens any more, the work goes on.
        with contextlib.suppress(OSError):
            print(json.dumps({"event": event} | values), file=events)

    serve(_orders(sys.stdin), tell)
    # The library's exit hooks wait for its helper, which may hang or be gone.
    os._exit(0)


if __name__ == "__main__":
    main()
