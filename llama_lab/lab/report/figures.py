"""The figures of a report: each metric's curves along each axis, the differences with their intervals, the points of a sweep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_lab.lab.compare.records import AXES
from llama_lab.lab.compare.study import BETTER, WORSE, Study
from llama_lab.lab.compare.verdicts import AXIS_UNITS
from llama_lab.lab.report.blocks import Figure
from llama_lab.lab.report.chart import COLOURS, COLUMNS, SMALL_COLUMNS, Panel, Scale, line_sample, padded, spanned
from llama_lab.lab.report.material import Material, brief_labels, is_drawn
from llama_lab.lab.report.series import Series, arm_series, points_of
from llama_lab.lab.report.text import escaped

SMALL = ("train/lr", "train/grad_norm", "speed/tokens_per_second")
LATE = 0.5
"""Share of an axis after which the second picture begins."""
LATE_POINTS = 3
FEW = 3
"""Arms whose bands lie over each other and are still told apart."""
UNITS = AXIS_UNITS | {"cost": "price"}

Curves = list[tuple[int, Series]]


@dataclass(frozen=True)
class Drawn:
    """Curves of one metric.

    Attributes:
        metric: its key.
        by_axis: axis -> (number of the arm, its series); axes that nothing is known along are left out.
    """

    metric: str
    by_axis: dict[str, Curves]


def known_axes(material: Material) -> list[str]:
    """Axes that every run has places along."""
    runs = [run for run in material.runs if run.rows and run.folder is not None]
    axes = [axis for axis in AXES if axis != "cost" or material.question.price is not None]
    return [axis for axis in axes if axis != "flops" or not any(math.isnan(run.flops_per_token) for run in runs)]


def order_of_colours(material: Material) -> list[int]:
    """Numbers of the arms, in the order in which they get a line of their own: all in order, or the first and the best ones."""
    if len(material.arms) <= COLOURS:
        return list(range(len(material.arms)))
    return [0, *[number for number in material.ranked() if number != 0]]


def drawn_metrics(material: Material) -> list[Drawn]:
    """The curves that there are: the metric that is compared, the training loss, and what explains them."""
    place = {arm: number for number, arm in enumerate(order_of_colours(material))}
    price = material.question.price or 0.0
    found = []
    for metric in dict.fromkeys((material.metric, "train/loss", *SMALL)):
        by_axis: dict[str, Curves] = {}
        # A table of runs has last values, which are no curve.
        points = [[points_of(run, metric) if is_drawn(run, arm) else None for run in arm.runs] for arm in material.arms]
        for axis in known_axes(material):
            arms = enumerate(zip(material.arms, points, strict=True))
            curves = [(place[number], arm_series(arm.runs, found, axis, price)) for number, (arm, found) in arms]
            if kept := [(number, series) for number, series in curves if series is not None]:
                # Those in front are drawn last.
                by_axis[axis] = sorted(kept, key=lambda curve: -curve[0])
        if by_axis:
            found.append(Drawn(metric, by_axis))
    return found


def names_of(material: Material) -> tuple[list[str], list[str]]:
    """Labels of the arms in the order of their colours, whole and brief."""
    order, brief = order_of_colours(material), brief_labels(material.arms)
    return [material.arms[number].label for number in order], [brief[number] for number in order]


def curve_figure(drawn: Drawn, names: Sequence[str], brief: Sequence[str], *, higher_is_better: bool) -> Figure:
    """A metric along every axis: all of it, and the later half close up."""
    is_small = drawn.metric in SMALL
    many = " many" if len(names) > FEW else ""
    parts = []
    for axis, curves in drawn.by_axis.items():
        name = f"{drawn.metric.replace('/', '-')}-{axis}"
        if is_small:
            panels = [_whole(drawn.metric, axis, curves, (), small=True)]
        else:
            panels = panels_of(drawn.metric, axis, curves, brief, higher_is_better=higher_is_better)
        pictures = "".join(panel.draw(curves, f"{name}-{number}", names) for number, panel in enumerate(panels))
        parts.append(f'<div class="along along-{axis}"><div class="panels{many}">{pictures}</div></div>')
    kind = "chart small" if is_small else "chart"
    return Figure(
        f'<figure class="{kind}"><figcaption><h3>{escaped(drawn.metric)}</h3></figcaption>{"".join(parts)}'
        '<p class="readout" aria-live="polite"></p></figure>'
    )


def panels_of(metric: str, axis: str, curves: Curves, names: Sequence[str], *, higher_is_better: bool) -> list[Panel]:
    """The whole curves, and their later half where that shows more; the last of them has the names."""
    end = max(float(series.places[-1]) for _, series in curves)
    late = [
        (arm, part) for arm, series in curves if np.isfinite((part := series.within(LATE * end, end)).middle).sum() >= LATE_POINTS
    ]
    if not late:
        return [_whole(metric, axis, curves, names, small=False)]
    spans = [_span(series, LATE * end, end) for _, series in late]
    y = _close_up(spans, higher_is_better=higher_is_better)
    title = "the later half, close up"
    if out := sum(low < y.low or high > y.high for low, high in spans):
        title += f"; {out} of {len(late)} arms {'is' if out == 1 else 'are'} partly outside"
    x = Scale(LATE * end, end, False)
    return [_whole(metric, axis, curves, (), small=False), Panel(title, x, y, UNITS[axis], metric, COLUMNS, names)]


def _whole(metric: str, axis: str, curves: Curves, labels: Sequence[str], *, small: bool) -> Panel:
    start, end = (pick(float(series.places[index]) for _, series in curves) for pick, index in ((min, 0), (max, -1)))
    low = min(float(np.nanmin(series.low)) for _, series in curves)
    high = max(float(np.nanmax(series.high)) for _, series in curves)
    if metric.startswith(("speed/", "train/lr", "train/grad_norm")):
        low = min(0.0, low) if high < 100 * abs(low) or low <= 0 else low
    return Panel(
        "the whole run", spanned(start, end), padded(low, high), UNITS[axis], metric, SMALL_COLUMNS if small else COLUMNS, labels
    )


def _close_up(spans: Sequence[tuple[float, float]], *, higher_is_better: bool) -> Scale:
    """A vertical scale that shows the better half of the arms whole, and others unless that makes it three times as tall."""
    spans = sorted(spans, key=lambda span: -span[0] if higher_is_better else span[1])
    kept = spans[: max(2, math.ceil(len(spans) / 2))]
    low, high = (pick(span[side] for span in kept) for pick, side in ((min, 0), (max, 1)))
    tall = 3 * (high - low)
    for start, end in spans:
        if max(high, end) - min(low, start) <= tall:
            low, high = min(low, start), max(high, end)
    return padded(low, high)


def _span(series: Series, start: float, end: float) -> tuple[float, float]:
    """The lowest and the highest value between two places, where the line enters included and what lies before it left out."""
    inside = (series.places >= start) & (series.places <= end)
    low, high = (np.append(side[inside], np.interp(start, series.places, side)) for side in (series.low, series.high))
    return float(np.nanmin(low)), float(np.nanmax(high))


def difference_figure(study: Study) -> Figure | None:
    """Each arm's difference from the baseline with its interval, over a line at 0; None where no interval is known."""
    known = [one for one in study.comparisons if one.estimate is not None]
    if not known:
        return None
    found = [one.estimate for one in known if one.estimate is not None]
    low, high = min(0.0, *(one.low for one in found)), max(0.0, *(one.high for one in found))
    scale = Scale(low - 0.06 * (high - low or 1.0), high + 0.06 * (high - low or 1.0), False)
    lines = []
    for one, estimate in zip(known, found, strict=True):
        places = [100 * scale.at(value) for value in (estimate.low, estimate.effect, estimate.high)]
        kind = "better" if one.verdict == BETTER else "worse" if one.verdict == WORSE else "open"
        said = f"{one.arm.label}: {estimate.effect:+.4g}, 95 % interval {estimate.low:+.4g} to {estimate.high:+.4g}, {one.verdict}"
        lines.append(
            f'<div class="difference {kind}" role="img" aria-label="{escaped(said)}">'
            f'<span class="who">{escaped(one.arm.label)}</span><span class="track">'
            f'<i class="zero" style="left:{100 * scale.at(0.0):.2f}%"></i>'
            f'<i class="reach" style="left:{places[0]:.2f}%;width:{places[2] - places[0]:.2f}%"></i>'
            f'<i class="point" style="left:{places[1]:.2f}%"></i></span>'
            f'<span class="verdict">{escaped(one.verdict)}</span></div>'
        )
    better = "higher" if study.higher_is_better else "lower"
    ticks = "".join(f'<span style="left:{100 * scale.at(tick):.2f}%">{tick:+.3g}</span>' for tick in scale.ticks(4) if tick)
    zero = f'<span style="left:{100 * scale.at(0.0):.2f}%">0</span>'
    caption = f"{study.metric}: difference from {study.arms[0].label}, with 95 % intervals; {better} is better"
    return Figure(
        f'<figure class="differences"><figcaption>{escaped(caption)}</figcaption>{"".join(lines)}'
        f'<div class="difference" aria-hidden="true"><span class="who"></span><span class="track scale">{zero}{ticks}</span>'
        '<span class="verdict"></span></div></figure>'
    )


def controls(drawn: Sequence[Drawn], names: Sequence[str]) -> Figure:
    """Which axis, and which arms: inputs that the style sheet alone obeys, so that they work without a script."""
    axes = list(dict.fromkeys(axis for one in drawn for axis in one.by_axis))
    radios = "".join(
        f'<label><input type="radio" name="axis" id="axis-{axis}"{" checked" if axis == axes[0] else ""}> {UNITS[axis]}</label>'
        for axis in axes
    )
    with_curves = {arm for one in drawn for curves in one.by_axis.values() for arm, _ in curves}
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{number}" checked> {line_sample(number)} {escaped(name)}</label>'
        for number, name in enumerate(names[:COLOURS])
        if number in with_curves
    )
    if len(names) > COLOURS:
        boxes += (
            f'<label><input type="checkbox" id="show-rest" checked> {line_sample(COLOURS)} {len(names) - COLOURS} others</label>'
        )
    along = f"<fieldset><legend>Along</legend>{radios}</fieldset>"
    return Figure(f'<div class="controls">{along}<fieldset><legend>Arms</legend>{boxes}</fieldset></div>')
