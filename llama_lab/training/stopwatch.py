"""Which parts of an update the device spends its time on, for `log.parts=true`."""

import time
from collections import defaultdict

import torch

from llama_lab.training.processes.worker import Worker

Mark = float | torch.cuda.Event


class Stopwatch:
    """Marks on the device's own line of time, which the host does not wait for; nothing where it is off.

    Args:
        is_on: whether anything is measured.
    """

    def __init__(self, worker: Worker, *, is_on: bool) -> None:
        self._worker, self._is_on = worker, is_on
        self._marks: list[tuple[str | None, Mark]] = []

    def mark(self, part: str | None) -> None:
        """Say that what the device was given since the mark before belongs to `part`; None: to nothing."""
        if not self._is_on:
            return
        if self._worker.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._worker.synchronise()
            self._marks.append((part, time.perf_counter()))

    def shares(self) -> dict[str, float]:
        """Each part's share of the time between the first mark and the last, by metric key; forgets all marks but the last.

        The device is waited for.
        """
        if len(self._marks) < 2:
            return {}
        self._worker.synchronise()
        spent: dict[str | None, float] = defaultdict(float)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[part] += _seconds(begin, end)
        spent.pop(None, None)
        self._marks = self._marks[-1:]
        whole = sum(spent.values())
        return {f"speed/{part}": seconds / whole for part, seconds in spent.items()} if whole else {}


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
