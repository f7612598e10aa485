"""The time that training takes, in all and between two rows, without what happens beside it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from llama_lab.training.processes.worker import Worker


class Clock:
    """Training time: in all, and in laps that leave out validation, samples and checkpoints."""

    def __init__(self, seconds: float, worker: Worker):
        self._worker = worker
        self._start = time.perf_counter() - seconds
        self._lap_start = time.perf_counter()
        self._lap_excluded = 0.0
        self._lap_tokens = 0
        self._lap_waited = 0.0

    def count(self, tokens: int) -> None:
        """Add tokens to the lap."""
        self._lap_tokens += tokens

    def seconds(self) -> float:
        """Time since the run's first start, without the time between two starts."""
        return time.perf_counter() - self._start

    def lap(self, waited: float) -> tuple[float, float]:
        """Of the lap that ends here tokens a second of all processes, and the share of it that this one waited for data.

        Args:
            waited: seconds waited for data since the start, in all laps.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap_start - self._lap_excluded, 1e-9)
        found = self._lap_tokens / seconds, (waited - self._lap_waited) / seconds
        self._lap_start, self._lap_excluded, self._lap_tokens, self._lap_waited = now, 0.0, 0, waited
        return found

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave what happens inside out of the lap. The device's training work is waited for first, so that it stays in."""
        self._worker.synchronise()
        start = time.perf_counter()
        yield
        self._lap_excluded += time.perf_counter() - start
