"""Curves of arms: the mean of their seeds with the range around it, in as many columns as a picture can show.

Where a run has no finite number, there is a gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_lab.lab.compare.records import RunRecord

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


@dataclass(frozen=True)
class Points:
    """What a run measured of one metric.

    Attributes:
        tokens, seconds: where.
        values: NaN for what is no finite number.
    """

    tokens: Floats
    seconds: Floats
    values: Floats


def points_of(run: RunRecord, metric: str) -> Points | None:
    """A metric's points; None without one that is a finite number."""
    rows = [(row["tokens"], row.get("seconds"), row[metric]) for row in run.rows if metric in row and "tokens" in row]
    if not rows:
        return None
    tokens, seconds, values = np.array(rows, dtype=np.float64).T
    return Points(tokens, seconds, np.where(np.isfinite(values), values, np.nan)) if np.isfinite(values).any() else None


def arm_series(runs: Sequence[RunRecord], points: Sequence[Points | None], axis: str, price: float) -> Series | None:
    """An arm's curve, as far as all of its seeds have come that have one; None if none of them has.

    Args:
        points: of each run.
        axis: one of `AXES`.
        price: of a device for an hour.
    """
    pairs = [(run, found) for run, found in zip(runs, points, strict=True) if found is not None]
    curves = [curve for run, found in pairs if (curve := _along(found, axis, run, price)) is not None]
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


@dataclass(frozen=True)
class Columns:
    """A stretch of a curve as a picture shows it.

    Attributes:
        places, middle: of the line: the points, or the mean of each column where there are more than two points a column.
        low, high: of everything in the column, over all seeds.
        is_thinned: whether they are columns.
    """

    places: Floats
    middle: Floats
    low: Floats
    high: Floats
    is_thinned: bool


def in_columns(places: Floats, series: Series, part: slice, width: float) -> Columns:
    """What a picture can show of a stretch without gaps.

    Args:
        places: of the whole series, as they are drawn, rising: logarithms, if the axis is logarithmic.
        width: of a column.
    """
    places, middle, low, high = places[part], series.middle[part], series.low[part], series.high[part]
    starts = _columns(places, width)
    if places.size <= 2 * starts.size:
        return Columns(places, middle, low, high, False)
    counts = np.diff(np.append(starts, places.size))
    means = [np.add.reduceat(values, starts) / counts for values in (places, middle)]
    # The line begins and ends where the curve does.
    means[0][[0, -1]] = places[[0, -1]]
    return Columns(means[0], means[1], np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts), True)


def _columns(places: Floats, width: float) -> NDArray[np.int64]:
    """Index of the first point in each column that has any."""
    column = np.floor((places - places[0]) / width) if width > 0 else np.zeros(places.size)
    return np.flatnonzero(np.diff(column, prepend=-1.0))


def _along(points: Points, axis: str, run: RunRecord, price: float) -> tuple[Floats, Floats] | None:
    """(places, values) along an axis, places rising and above 0; None where there are none."""
    match axis:
        case "tokens":
            places = points.tokens
        case "flops":
            places = points.tokens * run.flops_per_token
        case "seconds":
            places = points.seconds
        case _:
            places = points.seconds * (price * run.processes / 3600)
    kept = np.flatnonzero(np.isfinite(places) & (places > 0))
    kept = kept[np.diff(places[kept], prepend=0.0) > 0]
    values = points.values[kept]
    return (places[kept], values) if np.isfinite(values).any() else None


def _lost(places: Floats, values: Floats) -> float | None:
    gaps = np.flatnonzero(np.isnan(values).any(axis=0))
    return None if not gaps.size else float(places[max(0, int(gaps[0]) - 1)])
