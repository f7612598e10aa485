"""What the loop trains on next, ready when it asks: a thread reads the coming micro-batches while the device computes.

The thread decides nothing. Which windows an update has, and how they are shared, follows from the update's number; so the order is
the same with a slow disk and a fast one, and nothing of it has to be saved.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llama_lab.config.schema import Compile, RunConfig
from llama_lab.config.targets import IGNORE
from llama_lab.data.stream import Batch, MixedStream, batch_hash
from llama_lab.training.processes.worker import Worker

# Micro-batches that wait at most: enough to bridge a hiccup of the disk, little in memory.
DEPTH = 4


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one pass through the model is given.

    Attributes:
        batch: the windows, on the CPU; in pinned pages where the device is a GPU.
        predicted: targets in it.
        update_predicted: targets in the whole update, on all processes.
        hash: of its windows, as `batch_hash` gives it.
        is_last: whether it is the last one of this process in its update.
    """

    batch: Batch
    predicted: int
    update_predicted: int
    hash: int
    is_last: bool


def share(windows: int, rank: int, world_size: int) -> range:
    """Which of an update's windows a process has: contiguous shares that differ by at most one window."""
    return range(windows * rank // world_size, windows * (rank + 1) // world_size)


class Feed:
    """The micro-batches of coming updates, in their order. Used as a context; the thread ends with it.

    The windows of update u are numbers (u - 1) W to u W - 1 of the stream, W being the windows of a global batch; each process
    takes its share in micro-batches. The last of a share may be smaller. Where the model is compiled, which happens once for each
    shape, it is filled up with windows that nothing is predicted in.

    Args:
        stream: read by the thread alone from now on; what it only computes, `epochs` say, anybody may ask for.
        first_update, last_update: what is fed.

    Attributes:
        waited: seconds that `update` has waited for data in all.
    """

    def __init__(self, stream: MixedStream, run: RunConfig, worker: Worker, *, first_update: int, last_update: int):
        self._stream, self._run, self._worker = stream, run, worker
        self._updates = range(first_update, last_update + 1)
        self._ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(DEPTH)
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = True
        # Room for what the thread has in hand, so that it sees the end.
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()

    def update(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next update.

        Raises:
            Exception: whatever reading them raised.
        """
        is_last = False
        while not is_last:
            start = time.perf_counter()
            found = self._ready.get()
            self.waited += time.perf_counter() - start
            if isinstance(found, BaseException):
                raise found
            is_last = found.is_last
            yield found

    def _work(self) -> None:
        try:
            if self._worker.device.type == "cuda":
                # A thread starts on the first GPU, and pinning would open a context there.
                torch.cuda.set_device(self._worker.device)
            for update in self._updates:
                for micro_batch in self._micro_batches(update):
                    if self._ended:
                        return
                    self._ready.put(micro_batch)
        except BaseException as error:
            self._ready.put(error)

    def _micro_batches(self, update: int) -> Iterator[MicroBatch]:
        windows, place = self._run.windows_per_update, self._worker.place
        begin = (update - 1) * windows
        own = share(windows, place.rank, place.world_size)
        size = min(self._run.micro_batch, len(own))
        everywhere = self._stream.predicted(begin, windows)
        for first in own[::size]:
            count = min(size, own.stop - first)
            batch = self._stream.batch(begin + first, count)
            if count < size and self._run.hardware.compile is Compile.always:
                batch = _filled_up(batch, size - count)
            if self._worker.device.type == "cuda":
                documents = None if batch.documents is None else batch.documents.pin_memory()
                batch = Batch(batch.tokens.pin_memory(), batch.targets.pin_memory(), documents)
            yield MicroBatch(
                batch=batch,
                predicted=int(np.count_nonzero(batch.targets.numpy() != IGNORE)),
                update_predicted=everywhere,
                hash=batch_hash(batch, begin + first, count),
                is_last=first + count == own.stop,
            )


def _filled_up(batch: Batch, count: int) -> Batch:
    """The batch with so many windows of padding behind it."""
    below = (0, 0, 0, count)
    documents: Tensor | None = None if batch.documents is None else functional.pad(batch.documents, below)
    return Batch(functional.pad(batch.tokens, below), functional.pad(batch.targets, below, value=IGNORE), documents)
