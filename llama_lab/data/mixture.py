"""Sources that take turns in fixed shares: whose window comes when, and how often a run passes over each. Needs no torch.

The numbers follow from the place of a window alone, so that no state has to be saved and no process has to ask another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.windows import cut_windows

# Shares are whole multiples of 2^-32, so that quotas are exact on every machine.
BITS = 32


class Mixture:
    """Which source gives which window of an endless order.

    Sources are split off one after the other: of the windows that reach a source, it takes its share among those sources that are
    left, evenly spread, and passes the rest on. Of the first n windows a source so has its share of n to within the number of
    sources, at every n.

    Args:
        weights: above 0; only their ratios count.
    """

    def __init__(self, weights: Sequence[float]):
        left = np.cumsum(np.array(weights, dtype=np.float64)[::-1])[::-1]
        ratios = [round(weight / rest * 2**BITS) for weight, rest in zip(weights[:-1], left[:-1], strict=True)]
        self._ratios = np.clip(np.array(ratios, dtype=np.uint64), 1, 2**BITS - 1)

    def given(self, count: int) -> list[int]:
        """Windows that each source gives to the first `count`."""
        found, left = [], count
        for ratio in self._ratios:
            found.append(int(_quota(np.uint64(left), ratio)))
            left -= found[-1]
        return [*found, left]

    def turns(self, first: int, count: int) -> list[tuple[np.ndarray, int]]:
        """For each source which of `count` windows from `first` on it gives, and which of its own windows is the first of them.

        Its own windows come in their order, so the others follow.
        """
        found = []
        rows, numbers = np.arange(count, dtype=np.int64), np.arange(first, first + count, dtype=np.uint64)
        begun = first
        for ratio in self._ratios:
            taken = _quota(numbers, ratio)
            own = _quota(numbers + np.uint64(1), ratio) > taken
            passed = int(_quota(np.uint64(begun), ratio))
            found.append((rows[own], passed))
            rows, numbers, begun = rows[~own], (numbers - taken)[~own], begun - passed
        return [*found, (rows, begun)]


@dataclass(frozen=True, slots=True)
class Exposure:
    """What a whole run takes from a source.

    Attributes:
        name: of the source.
        share: of the windows, in (0, 1].
        windows: trained on.
        epochs: passes over the source's training text.
    """

    name: str
    share: float
    windows: int
    epochs: float

    @property
    def said(self) -> str:
        """The epochs in words, and beyond one what they mean."""
        epochs = f"{self.epochs:.{1 if self.epochs >= 0.1 else 2}f} epochs"
        if self.epochs <= 1:
            return epochs
        low = int(self.epochs)
        return f"{epochs}: each text is seen {low}{'' if low == self.epochs else f' or {low + 1}'} times"


def exposures(run: RunConfig, data: PreparedData) -> list[Exposure]:
    """What a run takes from each of its sources.

    Raises:
        ConfigError: a source is shorter than one window, or not cut into documents where the windows need it.
    """
    given = Mixture([source.weight for source in data.sources]).given(run.updates * run.windows_per_update)
    sizes = [cut_windows(source.train, run.data.window, run.data.max_seq_len).count for source in data.sources]
    return [
        Exposure(source.name, source.weight, windows, windows / size)
        for source, windows, size in zip(data.sources, given, sizes, strict=True)
    ]


def _quota(count: np.uint64 | np.ndarray, ratio: np.uint64) -> np.ndarray:
    """The share `ratio` / 2^32 of the first `count` windows, rounded; computed in two halves, which do not overflow."""
    high, low = count >> np.uint64(BITS), count & np.uint64(2**BITS - 1)
    return np.asarray(high * ratio + ((low * ratio + np.uint64(2 ** (BITS - 1))) >> np.uint64(BITS)))
