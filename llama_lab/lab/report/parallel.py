"""Parallel coordinates: each run a line through the values that it was given, to what it came to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_lab.config.schema import shown
from llama_lab.lab.compare.records import SEEDS
from llama_lab.lab.report.blocks import Figure
from llama_lab.lab.report.chart import HEIGHT, Scale, padded, short, spanned
from llama_lab.lab.report.material import Material, counts, last_value
from llama_lab.lab.report.text import escaped

LEAST_ARMS, LEAST_KEYS, MOST_KEYS = 4, 2, 8
BEST_SHARE = 0.25
STEP = 1000
"""Horizontal coordinates between two axes."""
EDGE = 0.06
"""Part of an axis that stays free at either end."""
FEW_VALUES = 6
"""So many different numbers, as in a grid, are written beside their axis; of more, round ones are."""


@dataclass(frozen=True)
class Point:
    """A run as a line.

    Attributes:
        name: of its arm, and its seeds.
        values: by key.
        result: what it came to.
    """

    name: str
    values: dict[str, str | float]
    result: float


@dataclass(frozen=True)
class Axis:
    """One of the upright lines.

    Attributes:
        key: what it stands for.
        scale: of numbers; null: words, one below the other.
        words: in order.
        numbers: that occur, where they are few.
    """

    key: str
    scale: Scale | None
    words: Sequence[str] = ()
    numbers: Sequence[float] = ()

    def place(self, value: str | float) -> float:
        """Where a value is, from the bottom."""
        if self.scale is None:
            inside = 0.5 if len(self.words) == 1 else 1 - self.words.index(str(value)) / (len(self.words) - 1)
        else:
            inside = self.scale.at(float(value))
        return EDGE + (1 - 2 * EDGE) * inside

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of what is written beside it."""
        if self.scale is None:
            return [(self.place(word), word) for word in self.words]
        return [(self.place(tick), short(tick)) for tick in self.numbers or self.scale.ticks(4)]


def parallel_figure(material: Material) -> Figure | None:
    """The runs of a sweep, or of a study of many arms; None where there is nothing that lines could show."""
    points = _points(material)
    keys = _keys(material, points)
    if len(material.arms) < LEAST_ARMS or not points or len(keys) < LEAST_KEYS or not material.is_comparable:
        return None
    sign = -1 if material.higher_is_better else 1
    points.sort(key=lambda point: (sign * point.result, point.name))
    logs = {} if material.sweep is None else material.sweep.is_log
    axes = [_axis(key, [point.values[key] for point in points], logs.get(key)) for key in keys]
    results = [point.result for point in points]
    axes.append(Axis(material.metric, padded(min(results), max(results))))
    best = max(1, math.ceil(BEST_SHARE * len(points)))
    lines = []
    for rank, point in reversed(list(enumerate(points))):
        places = [axis.place(value) for axis, value in zip(axes, [*(point.values[key] for key in keys), point.result], strict=True)]
        path = "L".join(f"{STEP * number},{round(HEIGHT * (1 - place))}" for number, place in enumerate(places))
        kind = "first" if rank == 0 else "good" if rank < best else "rest"
        said = ", ".join([*(f"{key}={shown(point.values[key])}" for key in keys), f"{material.metric} {point.result:.4f}"])
        lines.append(f'<path class="{kind}" data-rank="{rank}" data-said="{escaped(said)}" d="M{path}"/>')
    lower = "highest" if material.higher_is_better else "lowest"
    said = f"{len(points)} runs as lines through {', '.join(keys)} to {material.metric}"
    first = ", ".join(f"{key}={shown(points[0].values[key])}" for key in keys)
    described = f"The {lower} {material.metric}, {points[0].result:.4f}, has {first}."
    width = STEP * (len(axes) - 1)
    grid = "".join(f"M{STEP * number} 0v{HEIGHT}" for number in range(len(axes)))
    caption = f"Each line is a run. Thick: the {lower} {material.metric}; blue: the best {best} of {len(points)}; grey: the others."
    return Figure(
        f'<figure class="parallel"><figcaption>{escaped(caption)}</figcaption><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Values of the runs"><div class="coordinates" style="{_room(axes)}">'
        f'<svg viewBox="0 0 {width} {HEIGHT}" preserveAspectRatio="none" role="img" '
        'aria-labelledby="parallel-t" aria-describedby="parallel-d">'
        f'<title id="parallel-t">{escaped(said)}</title><desc id="parallel-d">{escaped(described)}</desc>'
        f'<path class="grid" d="{grid}"/>{"".join(lines)}</svg>{_written(axes)}</div></div>'
        '<p class="readout" aria-live="polite"></p></figure>'
    )


def _points(material: Material) -> list[Point]:
    found = []
    for arm in material.arms:
        for run in arm.runs:
            result = last_value(run, material.metric)
            if result is None or (not counts(run) if material.study is None else run.name not in material.study.values):
                continue
            values = run.values if material.sweep is None else run.values | _typed(material, run.folder)
            found.append(Point(f"{arm.label} {run.seed_said}", {key: _number(value) for key, value in values.items()}, result))
    return found


def _typed(material: Material, folder: object) -> dict[str, str]:
    """What was swept for a run and its config does not hold as one value: an option of a group, a preset."""
    assert material.sweep is not None
    values = next((values for path, values in material.sweep.values.items() if path == folder), {})
    return {key: value for key, value in values.items() if "." not in key}


def _number(value: object) -> str | float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)


def _keys(material: Material, points: Sequence[Point]) -> list[str]:
    """What was swept; without a sweep, what differs and all have."""
    if not points:
        return []
    there = set.intersection(*(set(point.values) for point in points))
    candidates = list(points[0].values) if material.sweep is None else material.sweep.keys
    differing = [key for key in candidates if key in there and len({point.values[key] for point in points}) > 1]
    return [key for key in differing if key not in SEEDS][:MOST_KEYS]


def _axis(key: str, values: Sequence[str | float], is_log: bool | None) -> Axis:
    """An axis for values that were drawn evenly or over a logarithm; null: nobody said which."""
    numbers = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if len(numbers) < len(values):
        return Axis(key, None, sorted({shown(value) for value in values}))
    # Factors of four and more are what people try on a logarithmic scale.
    steep = {None: 4.0, True: 1.0, False: math.inf}[is_log]
    few = sorted(set(numbers))
    return Axis(key, spanned(few[0], few[-1], steep=steep), numbers=few if len(few) <= FEW_VALUES else ())


def _room(axes: Sequence[Axis]) -> str:
    """The style that leaves room for the longest text left of the first axis, and for all axes."""
    longest = max(len(text) for _, text in axes[0].ticks())
    return f"min-width:{8.5 * len(axes)}rem;margin-left:max(3.5rem,{0.8 * longest:.1f}ch + 0.75rem)"


def _written(axes: Sequence[Axis]) -> str:
    """Names and numbers of the axes, set beside them."""
    found = []
    for number, axis in enumerate(axes):
        left = f"left:{100 * number / (len(axes) - 1):.2f}%"
        side = " last" if number == len(axes) - 1 else " first" if number == 0 else ""
        log = " (log)" if axis.scale is not None and axis.scale.is_log else ""
        found.append(f'<span class="key{side}" style="{left}">{escaped(axis.key.rpartition(".")[2])}{log}</span>')
        for place, text in axis.ticks():
            found.append(f'<span class="at{side}" style="{left};top:{100 * (1 - place):.2f}%">{escaped(text)}</span>')
    return "".join(found)
