"""Which checkpoints are served, and those of them that are in memory, each with a thread of its own.

A model is for one caller at a time, so what is asked of it waits in its thread's queue. Of all models together only a few compute
at once: more would only take processor time from each other.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.training.run_folder import RunFolder, find_run
from llama_lab.training.saving.choice import chosen_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_lab.inference.load import LoadedRun

SCOPE = "this request"


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint that can be asked.

    Attributes:
        id: how a client names it: `<run id>@<update>`.
        folder: its run's.
        update, tokens: what had been trained.
        created: seconds since 1970 when it was written.
    """

    id: str
    folder: Path
    update: int
    tokens: int
    created: int


@dataclass(slots=True)
class _Held:
    """A checkpoint that is asked, or was and is still in memory.

    Attributes:
        users: requests that were not answered yet.
        is_busy: whether it computes, or is being loaded for that.
        used: when it last did.
    """

    thread: ThreadPoolExecutor
    run: "LoadedRun | None" = None
    users: int = 0
    is_busy: bool = False
    used: float = field(default_factory=time.monotonic)


class Shelf:
    """The checkpoints of some runs.

    Args:
        folders: the runs'.
        loaded: checkpoints in memory at most, those that are being loaded included. The one that was not asked for the longest time
            makes room; where all compute, what is asked of a further one waits for the first that has answered.
        running: models that compute at once at most.
        device, precision: as `llama_lab.load` takes them.

    Raises:
        ConfigError: a folder holds no run, or no run has a checkpoint.
    """

    def __init__(self, folders: list[Path], *, loaded: int, running: int, device: str, precision: str):
        self._runs = {find_run(folder).path.resolve(): None for folder in folders}
        self._loaded, self._device, self._precision = loaded, device, precision
        self._turns = threading.Semaphore(running)
        self._lock = threading.Lock()
        self._room_changed = threading.Condition(self._lock)
        self._line: list[_Held] = []
        self._held: dict[str, _Held] = {}
        if not self.entries():
            for run in self._runs:
                chosen_checkpoint(RunFolder(run), None, scope=SCOPE)

    def entries(self) -> list[Entry]:
        """What is there now, each run's newest checkpoint first: a run that is still training adds to it."""
        from llama_lab.training.saving.manifest import list_checkpoints

        names = [run.name for run in self._runs]
        found = []
        for run in self._runs:
            # Two studies may hold runs of one name.
            name = run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}"
            for checkpoint in reversed(list_checkpoints(run / "checkpoints")):
                created = int(checkpoint.path.stat().st_mtime)
                found.append(Entry(f"{name}@{checkpoint.update}", run, checkpoint.update, checkpoint.tokens, created))
        return found

    def find(self, name: str | None) -> Entry | None:
        """The checkpoint of an id; of a run's id the newest; the first of all for None."""
        entries = self.entries()
        return next((entry for entry in entries if name is None or name in (entry.id, entry.id.rpartition("@")[0])), None)

    def submit(self, entry: Entry, work: "Callable[[LoadedRun], Any]") -> "Future[Any]":
        """Have a checkpoint's thread do some work with it; it is loaded first where it is not in memory."""
        with self._lock:
            held = self._held.get(entry.id)
            if held is None:
                held = self._held[entry.id] = _Held(ThreadPoolExecutor(1, thread_name_prefix="model"))
            held.users += 1
        return held.thread.submit(self._work, entry, held, work)

    def close(self) -> None:
        """Let go of all threads, without waiting for what they do."""
        with self._lock:
            for held in self._held.values():
                held.thread.shutdown(wait=False, cancel_futures=True)

    def _work(self, entry: Entry, held: _Held, work: "Callable[[LoadedRun], Any]") -> Any:
        with self._turns, self._using(entry, held):
            if held.run is None:
                held.run = self._load(entry)
            return work(held.run)

    @contextmanager
    def _using(self, entry: Entry, held: _Held) -> "Iterator[None]":
        """A place in memory for as long as a checkpoint computes. Who waits for one holds a turn, and so do those waited for."""
        try:
            with self._lock:
                if held.run is None:
                    self._line.append(held)
                    # In the order of asking, so that a model that is asked all the time keeps no other out.
                    self._room_changed.wait_for(lambda: self._line[0] is held and self._make_room())
                    self._line.pop(0)
                    self._room_changed.notify_all()
                held.is_busy = True
            yield
        finally:
            with self._lock:
                held.is_busy = False
                held.users -= 1
                held.used = time.monotonic()
                if held.run is None or self._occupied() + len(self._line) > self._loaded:
                    self._forget(entry.id, held)
                self._room_changed.notify_all()

    def _make_room(self) -> bool:
        """Forget checkpoints that compute nothing, those first that were not asked for the longest time, until another has room."""
        idle = sorted((held.used, name) for name, held in self._held.items() if held.run is not None and not held.is_busy)
        for _, name in idle[: max(0, self._occupied() + 1 - self._loaded)]:
            self._forget(name, self._held[name])
        return self._occupied() < self._loaded

    def _occupied(self) -> int:
        """Checkpoints in memory, and on their way there."""
        return sum(held.is_busy or held.run is not None for held in self._held.values())

    def _forget(self, name: str, held: _Held) -> None:
        """Take a checkpoint out of memory; its thread stays while requests wait for it, and loads it again."""
        held.run = None
        if not held.users:
            self._held.pop(name).thread.shutdown(wait=False)

    def _load(self, entry: Entry) -> "LoadedRun":
        from llama_lab.inference.load import load_run

        return load_run(entry.folder, entry.update, device=self._device, precision="bf16" if self._precision == "bf16" else "fp32")
