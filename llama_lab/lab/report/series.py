"""Curves of arms: the mean of their seeds with the range around it, and as many points of it as a picture can show.

Nothing is smoothed. Where a run has no finite number, there is a gap.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_lab.lab.arms import Arm
from llama_lab.lab.records import RunRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One arm along one axis.

    Attributes:
        places: rising.
        middle: mean of the seeds; not a number where one of them has none.
        low, high: of the lowest and the highest seed.
        seeds: how many.
        lost: place of the last finite value before the first gap; null without one.
    """

    places: Floats
    middle: Floats
    low: Floats
    high: Floats
    seeds: int
    lost: float | None

    def within(self, start: float, end: float) -> "Series":
        """The part between two places, with a point beyond either so that lines reach the edge."""
        inside = np.flatnonzero((self.places >= start) & (self.places <= end))
        if not inside.size:
            return self._part(slice(0, 0))
        return self._part(slice(max(0, int(inside[0]) - 1), int(inside[-1]) + 2))

    def _part(self, part: slice) -> "Series":
        return Series(self.places[part], self.middle[part], self.low[part], self.high[part], self.seeds, self.lost)


def arm_series(arm: Arm, metric: str, axis: str, price: float) -> Series | None:
    """An arm's curve, as far as all of its seeds have come that have one; None if none of them has.

    Args:
        axis: one of `AXES`.
        price: of a device for an hour.
    """
    curves = [curve for run in arm.runs if (curve := _points(run, metric, axis, price)) is not None]
    if not curves:
        return None
    first = curves[0][0]
    if all(places.size == first.size and np.array_equal(places, first) for places, _ in curves):
        places = first
    else:
        start, end = max(places[0] for places, _ in curves), min(places[-1] for places, _ in curves)
        places = np.unique(np.concatenate([places for places, _ in curves]))
        places = places[(places >= start) & (places <= end)]
        if not places.size:
            return None
    values = np.vstack([np.interp(places, *curve) if curve[0] is not places else curve[1] for curve in curves])
    return Series(places, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(curves), _lost(places, values))


def sound_parts(values: Floats) -> list[slice]:
    """The stretches between gaps."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], np.isnan(values), [True]]).astype(np.int8)))
    return [slice(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def thinned(places: Floats, values: Floats, width: float) -> NDArray[np.int64]:
    """Indices of the points that a picture can show: the ends, and of each column the lowest and the highest value.

    Args:
        places: as they are drawn, rising: logarithms, if the axis is logarithmic.
        values: without gaps.
        width: of a column.
    """
    starts = _columns(places, width)
    if places.size <= 2 * starts.size:
        return np.arange(places.size)
    kept = {0, places.size - 1}
    for start, end in zip(starts, np.append(starts[1:], places.size), strict=True):
        part = values[start:end]
        kept.update((int(start + part.argmin()), int(start + part.argmax())))
    return np.array(sorted(kept))


def range_by_column(places: Floats, low: Floats, high: Floats, width: float) -> tuple[Floats, Floats, Floats]:
    """(places, lowest, highest), one of each for a column; as they are where there are fewer points than columns."""
    starts = _columns(places, width)
    if places.size <= 2 * starts.size:
        return places, low, high
    return places[starts], np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)


def _columns(places: Floats, width: float) -> NDArray[np.int64]:
    """Index of the first point in each column that has any."""
    column = np.floor((places - places[0]) / width) if width > 0 else np.zeros(places.size)
    return np.flatnonzero(np.diff(column, prepend=-1.0))


def _points(run: RunRecord, metric: str, axis: str, price: float) -> tuple[Floats, Floats] | None:
    """(places, values) of a run, places rising; values that are no finite numbers are NaN. None without any that is."""
    found = run.curve(metric, axis, price)
    places = np.array([place for place, _ in found], dtype=np.float64)
    values = np.array([np.nan if value is None else value for _, value in found], dtype=np.float64)
    kept = np.isfinite(places) & (places > 0)
    places, values = places[kept], values[kept]
    rising = np.flatnonzero(np.diff(places, prepend=0.0) > 0)
    places, values = places[rising], np.where(np.isfinite(values[rising]), values[rising], np.nan)
    return (places, values) if np.isfinite(values).any() else None


def _lost(places: Floats, values: Floats) -> float | None:
    gaps = np.flatnonzero(np.isnan(values).any(axis=0))
    return None if not gaps.size else float(places[max(0, int(gaps[0]) - 1)])
