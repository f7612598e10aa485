"""What a sweep tries: the values of each swept key as they were typed, and points drawn from them.

What a comma list, `range`, `choice`, `glob` or `interval` means is Hydra's to say; its parser reads them. A swept `seed.…` is no
value to choose among but a repetition: where points are drawn, each of them is run with every seed.
"""

import itertools
import math
import random
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from llama_lab.config.overrides import any_shape
from llama_lab.config.paths import options
from llama_lab.config.schema import Problem

Point = dict[str, str]
"""Swept key -> its value, as typed."""
DIGITS = 4
# A space of few points is drawn from until so many draws in a row gave nothing new.
PATIENCE = 200


@dataclass(frozen=True, slots=True)
class Axis:
    """The values of one swept key.

    Attributes:
        text: what was typed for it.
        choices: its values; empty for an interval.
        low, high, is_log, is_whole: of an interval: its ends, whether values are spread evenly over their logarithm, and whether
            they are whole numbers.
    """

    key: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False

    @property
    def is_seed(self) -> bool:
        """Whether it repeats runs instead of changing them."""
        return self.key.startswith("seed.")

    def drawn(self, draw: random.Random) -> str:
        """A value by chance."""
        if self.choices:
            return draw.choice(self.choices)
        low, high = self.low, self.high
        if self.is_whole:
            # Each number stands for what is rounded to it, the outermost too; to half of that alone, they would come half as often.
            low, high = math.ceil(low) - 0.5, math.floor(high) + 0.5
        return self.typed(math.exp(draw.uniform(math.log(low), math.log(high))) if self.is_log else draw.uniform(low, high))

    def typed(self, value: float) -> str:
        """A number of the interval as it is typed: with few digits, since it appears in the names of folders."""
        if self.is_whole:
            return str(min(max(math.floor(value + 0.5), math.ceil(self.low)), math.floor(self.high)))
        return repr(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))


def read_axis(override: Override, config_dir: object = None) -> Axis:
    """The values that an override stands for; none where `choices` is empty and it is no interval."""
    chosen, key = override.value(), override.get_key_element()
    text = (override.input_line or "").partition("=")[2]
    if isinstance(chosen, Glob):
        return Axis(key, text, tuple(chosen.filter(options(override.key_or_group, config_dir))))  # pyright: ignore[reportArgumentType]
    if isinstance(chosen, IntervalSweep):
        known = any_shape().get(key)
        is_whole = known is not None and known.kind is int
        low, high = float(chosen.start or 0.0), float(chosen.end or 0.0)
        return Axis(key, text, (), low, high, "log" in chosen.tags, is_whole)
    return Axis(key, text, tuple(override.sweep_string_iterator()))


def axis_problems(axis: Axis, *, draws: bool) -> list[Problem]:
    """What is wrong with an axis.

    Args:
        draws: whether points are drawn, so that an interval has a meaning.
    """
    subject, key = f"{axis.key}={axis.text}", axis.key
    if axis.choices:
        return []
    if axis.low == axis.high == 0.0:
        there = options(key)
        works = f"there are {', '.join(there)}" if there else "glob(...) chooses among the options of a group"
        return [(subject, f"gives no values; {works}" + ("" if there else "; type the values of a field"))]
    if axis.is_seed:
        return [(subject, f"is a range to draw seeds from; they are repeated, so type them: {key}=0,1,2")]
    if not draws:
        rule = f"names no values to try one by one; type {key}=a,b,c, or add sweep.search=random sweep.trials=20 to draw from it"
        return [(subject, rule)]
    if not axis.low < axis.high or not math.isfinite(axis.high - axis.low):
        return [(subject, "is no interval from a lower to a higher number")]
    if axis.is_log and axis.low <= 0:
        return [(subject, "has no logarithm at its lower end; begin above 0, or leave tag(log, …) out")]
    if axis.is_whole and math.ceil(axis.low) > math.floor(axis.high):
        return [(subject, f"holds no whole number, and {key} is one")]
    return []


def grid(axes: list[Axis]) -> list[Point]:
    """Every combination, the last axis changing fastest."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.choices for axis in axes))]


def draw_points(axes: list[Axis], count: int, seed: int) -> list[Point]:
    """Different points by chance, as many as were asked for or as there are. The first of them never depend on how many are
    asked.
    """
    found: list[Point] = []
    known: set[tuple[str, ...]] = set()
    misses, number = 0, 0
    while len(found) < count and misses < PATIENCE:
        # A stream of its own for each key: a further axis leaves the values of the others.
        point = {axis.key: axis.drawn(random.Random(f"{seed}/{number}/{axis.key}")) for axis in axes}
        number += 1
        misses = misses + 1 if tuple(point.values()) in known else 0
        if not misses:
            known.add(tuple(point.values()))
            found.append(point)
    return found


def repeated(points: list[Point], axes: list[Axis]) -> list[Point]:
    """Each point with every combination of the swept seeds."""
    return [point | seeds for point in points for seeds in grid([axis for axis in axes if axis.is_seed])]


def without_seeds(values: Point) -> Point:
    """What remains of a job's values when runs that differ in their seeds alone are taken together."""
    return {key: value for key, value in values.items() if not key.startswith("seed.")}


def as_meant(text: str) -> str:
    """A value as it is read, without the quotes that Hydra's grammar asks for."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return str(OverridesParser.create().parse_override(f"value={text}").value()) if is_quoted else text


def label(values: Point) -> str:
    """Values as they are typed."""
    return " ".join(f"{key}={value}" for key, value in values.items())
