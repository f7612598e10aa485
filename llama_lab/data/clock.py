"""What is said now and then while a long work goes on."""

import time

from llama_lab.data.corpus import Say

SAY_SECONDS = 10.0


class Clock:
    """Says now and then how far a long work is; called with how much of it is done.

    Args:
        size: of all of it, in bytes, or in `unit` where one is given; None if nobody knows.
    """

    def __init__(self, verb: str, size: int | None, say: Say, unit: str | None = None):
        self._verb, self._size, self._say, self._unit = verb, size, say, unit
        self._start = self._said = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._said < SAY_SECONDS:
            return
        self._said = now
        passed = now - self._start
        scale, unit = (1, self._unit) if self._unit else (1_000_000, "MB")
        of = left = ""
        if self._size is not None:
            of = f" of {self._size / scale:,.0f}"
            if 0 < done <= self._size:
                left = f", about {duration(passed * (self._size - done) / done)} left"
        self._say(f"{self._verb} {done / scale:,.0f}{of} {unit} in {duration(passed)}{left}")


def duration(seconds: float) -> str:
    """A time span in the two units that matter."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
