"""A curve between its measured points: its value at a place, and the place of a value."""

import bisect
import itertools
import math
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]
"""(place, value), places rising and above 0."""


def reach(curve: Curve) -> float:
    """The place of the last point."""
    return curve[-1][0]


def value_at(curve: Curve, place: float) -> float:
    """The value at a place, linear in the logarithm of the place between two points, as learning curves nearly are.

    Args:
        place: from the first point's to the last's, but for rounding.
    """
    places = [point for point, _ in curve]
    index = min(max(bisect.bisect_left(places, place), 1), len(places) - 1)
    if len(places) == 1:
        return curve[0][1]
    (before, low), (behind, high) = curve[index - 1], curve[index]
    share = (math.log(place) - math.log(before)) / (math.log(behind) - math.log(before))
    return low + min(1.0, max(0.0, share)) * (high - low)


def crossing(curve: Curve, target: float) -> float:
    """The place where a falling curve first comes down to a value, between two points as `value_at` draws it.

    Args:
        target: from the first value down to the lowest.
    """
    for (before, high), (behind, low) in itertools.pairwise(curve):
        if low <= target:
            share = 0.0 if high == low else (high - target) / (high - low)
            return math.exp(math.log(before) + share * (math.log(behind) - math.log(before)))
    return curve[0][0]
