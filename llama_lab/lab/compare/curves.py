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


def value_at(curve: Curve, place: float) -> float | str:
    """The value at a place, linear in the logarithm of the place between two points, as learning curves nearly are.

    Returns:
        The value, or why there is none, as the beginning of a sentence that goes on with the place.
    """
    places = [point for point, _ in curve]
    if place < places[0] * (1 - 1e-9):
        return f"is first measured at {places[0]:.6g}, after"
    if place > places[-1] * (1 + 1e-9):
        return f"ends at {places[-1]:.6g}, before"
    index = min(max(bisect.bisect_left(places, place), 1), len(places) - 1)
    if len(places) == 1:
        return curve[0][1]
    (before, low), (behind, high) = curve[index - 1], curve[index]
    share = (math.log(place) - math.log(before)) / (math.log(behind) - math.log(before))
    return low + min(1.0, max(0.0, share)) * (high - low)


def crossing(curve: Curve, target: float) -> float | str:
    """The place where a falling curve first comes down to a value, between two points as `value_at` draws it.

    Returns:
        The place, or why there is none.
    """
    if curve[0][1] < target:
        return f"is below {target:.4f} when it is first measured, and nobody knows since when"
    for (before, high), (behind, low) in itertools.pairwise(curve):
        if low <= target:
            share = 0.0 if high == low else (high - target) / (high - low)
            return math.exp(math.log(before) + share * (math.log(behind) - math.log(before)))
    if curve[0][1] == target:
        return curve[0][0]
    return f"never comes down to {target:.4f}, its lowest is {min(value for _, value in curve):.4f}"
