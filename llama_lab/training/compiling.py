"""The wait before the first update of a compiled run: what is compiled is kept for later runs, and made once for several at a time.

torch keeps what it compiles in files (`compiled_files`). Of several runs of one shape that start together, as a sweep's do, the
first compiles and the others wait for it: they would all do the same work at once, on the same cores.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch._functorch import config as functorch_config

from llama_lab.config.identity import plain_config, science
from llama_lab.config.schema import Compile, RunConfig
from llama_lab.data.cache import compiled_root, lock_file, mark_used
from llama_lab.training.processes.worker import Worker

if TYPE_CHECKING:
    import filelock

CACHE_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"
"""torch's switch, off by default, for keeping the traced forward and backward of models with autograd functions of their own.
Without it only kernels are kept, and each start traces anew. What such a function does is part of the trace, and so of its key."""
CHECKPOINTING = logging.getLogger("torch._higher_order_ops.wrap")
"""Warns of every policy for what to compute again, lest it keep what is overwritten later. The model's keeps nothing."""
LONGEST_WAIT_SECONDS = 600.0
BETWEEN_LOOKS_SECONDS = 0.2
SLOW_SECONDS = 1.0
"""A compilation that took less was read from the cache, and not worth a line."""


def import_compiler(run: RunConfig) -> None:
    """Begin to import the compiler if it will be needed: that takes seconds, in which others can draw weights and open devices."""
    if run.hardware.compile is Compile.always:
        Thread(target=import_module, args=("torch._inductor.compile_fx",), name="import", daemon=True).start()


class Compiling:
    """Surrounds the first update of a start. A context, for as long as the model may compile anything.

    Args:
        run: resolved.
        vocab_size: entries of the model's vocabulary.
        say: takes a line.
        phase: takes what is going on in one word, for whoever watches; empty for nothing in particular.
    """

    def __init__(
        self,
        run: RunConfig,
        vocab_size: int,
        worker: Worker,
        *,
        say: Callable[[str], None] = lambda text: None,
        phase: Callable[[str], None] = lambda word: None,
    ) -> None:
        self._say, self._phase = say, phase
        self._is_due = run.hardware.compile is Compile.always
        # One process of a run is enough: the others cannot go on without it. And none of them may wait for another run, whose
        # processes could be waiting for this one.
        self._locks = self._is_due and worker.is_main
        self._key = _key(run, vocab_size, worker) if self._locks else ""
        self._lock: filelock.BaseFileLock | None = None
        self._undo = contextlib.ExitStack()
        self._start = 0.0

    def __enter__(self) -> Self:
        if self._is_due:
            CHECKPOINTING.addFilter(_says_something_new)
            self._undo.callback(CHECKPOINTING.removeFilter, _says_something_new)
            if hasattr(functorch_config, CACHE_FUNCTIONS):
                self._undo.enter_context(functorch_config.patch(CACHE_FUNCTIONS, True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()
        self._undo.close()

    def begin(self) -> None:
        """Say that an update begins; does something for the first alone."""
        if not self._is_due:
            return
        if self._locks and not self._mark.exists():
            self._wait()
        self._start = time.perf_counter()
        self._phase("compiling")

    def end(self) -> None:
        """Say that an update is made, as far as the host is concerned."""
        if not self._is_due:
            return
        self._is_due = False
        self._phase("")
        if (seconds := time.perf_counter() - self._start) > SLOW_SECONDS:
            self._say(f"Compiled in {seconds:.0f} s")
        if self._locks:
            with contextlib.suppress(OSError):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()
            mark_used(compiled_root())
        self._release()

    @property
    def _mark(self) -> Path:
        """There once something of this shape was compiled: then it is read, which is fast and disturbs nobody."""
        return compiled_root() / "shapes" / self._key

    def _wait(self) -> None:
        """Hold the lock of this shape, or wait for whoever holds it. A cache that cannot be locked is no reason to stop."""
        with contextlib.suppress(OSError):
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self._mark.with_suffix(".lock"))
            end, has_said = time.monotonic() + LONGEST_WAIT_SECONDS, False
            while not self._mark.exists() and time.monotonic() < end:
                try:
                    self._lock.acquire(timeout=0)
                    return
                except TimeoutError:
                    if not has_said:
                        self._say("Another run compiles a model of this shape; waiting for it")
                        has_said = True
                    time.sleep(BETWEEN_LOOKS_SECONDS)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _says_something_new(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _key(run: RunConfig, vocab_size: int, worker: Worker) -> str:
    """Name of all that decides what is compiled."""
    decisive = science(run)
    facts: dict[str, Any] = {
        "model": decisive["model"],
        "vocab_size": vocab_size,
        "max_seq_len": run.data.max_seq_len,
        "window": run.data.window.name,
        "precision": decisive["precision"],
        "optim": [decisive["optim"]["type"], plain_config(run)["optim"].get("state_dtype")],
        "hardware": plain_config(run)["hardware"],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else worker.device.type,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
