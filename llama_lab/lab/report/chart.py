"""Curves as SVG that stretches to any width, with labels in HTML that keep their size.

Coordinates are tenths of what a wide screen shows, in whole numbers, each relative to the one before: a fifth of the bytes of plain
ones. Lines keep their width however the picture is stretched; numbers and names are set beside it by percent, so that a phone
shows fewer pixels and not smaller type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_lab.lab.report.series import Floats, Series, in_columns, sound_parts
from llama_lab.lab.report.text import escaped

WIDTH, HEIGHT = 5600, 3000
"""Of the drawing's own coordinates."""
COLUMNS, SMALL_COLUMNS = 140, 70
COLOURS = 8
"""Arms that have a colour and a dash pattern of their own; page.css has them."""
LABEL_PIXELS, PLOT_PIXELS = 17.0, 300.0
LABEL_CHARACTERS = 26
LOG_SPAN = 20.0
TALL_SPAN = 100.0


@dataclass(frozen=True)
class Scale:
    """How values become places between 0 and 1.

    Attributes:
        low, high: the ends.
        is_log: whether equal factors are equally long.
    """

    low: float
    high: float
    is_log: bool

    def place(self, values: Floats) -> Floats:
        """Where values are; beyond 0 and 1 outside the ends."""
        if self.is_log:
            return (np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (values - self.low) / (self.high - self.low)

    def at(self, value: float) -> float:
        """Where one value is."""
        return float(self.place(np.array([value]))[0])

    def ticks(self, count: int) -> list[float]:
        """About so many round values between the ends."""
        if self.is_log and self.high / self.low >= 3:
            return self._powers(count)
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _powers(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            found = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            if len(found) <= count + 1:
                return found
        return found[:: math.ceil(len(found) / count)]


@dataclass(frozen=True)
class Panel:
    """One picture: the same curves over a stretch of an axis.

    Attributes:
        title: what stretch.
        x, y: its scales.
        unit: of x.
        metric: of y.
        columns: that it can show.
        labels: names of arms, written at the ends of their curves, or above them where a screen is narrow; empty: none.
    """

    title: str
    x: Scale
    y: Scale
    unit: str
    metric: str
    columns: int
    labels: Sequence[str] = ()

    def draw(self, curves: Sequence[tuple[int, Series]], name: str, names: Sequence[str]) -> str:
        """The panel as HTML.

        Args:
            curves: (number of the arm, its series), those in front last.
            name: of this panel in the page.
            names: of all arms.
        """
        said = f"{self.metric} over {self.unit}, {self.title}"
        seen = sorted(((arm, series) for arm, series in curves if self._is_seen(series)), key=lambda curve: curve[0])
        last = "; ".join(f"{names[arm]} {_end(series)}" for arm, series in seen[:COLOURS])
        more = f"; and {len(seen) - COLOURS} more" if len(seen) > COLOURS else ""
        described = f"Horizontal from {short(self.x.low)} to {short(self.x.high)} {self.unit}"
        described += f"{', logarithmic' if self.x.is_log else ''}; vertical from {short(self.y.low)} to {short(self.y.high)}"
        described += f"{', logarithmic' if self.y.is_log else ''}. Last values: {last}{more}."
        grid = "".join(f"M0 {_down(self.y.at(tick))}h{WIDTH}" for tick in self.y.ticks(5))
        drawn = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-labelledby="{name}-t" aria-describedby="{name}-d">',
            f'<title id="{name}-t">{escaped(said)}</title><desc id="{name}-d">{escaped(described)}</desc>',
            f'<path class="grid" d="{grid}"/>',
            *(self._curve(arm, series) for arm, series in curves),
            "</svg>",
        ]
        scales = f'data-x="{self.x.low!r} {self.x.high!r} {int(self.x.is_log)}" '
        scales += f'data-y="{self.y.low!r} {self.y.high!r} {int(self.y.is_log)}"'
        marks = [*self._ticks(), *self._lost(curves), *self._labels(curves)]
        longest = max((len(_cut(self.labels[arm])) for _, arm in self._ends(curves)), default=0)
        kind = f'class="panel labelled" style="--label:{longest}ch"' if longest else 'class="panel"'
        return (
            f'<div {kind}><p class="stretch">{escaped(self.title)}</p>{self._legend(curves)}'
            f'<div class="plot" data-unit="{escaped(self.unit)}" data-said="{escaped(said)}" {scales}>'
            f"{''.join(drawn)}{''.join(marks)}</div></div>"
        )

    def _curve(self, arm: int, series: Series) -> str:
        """Line and band of an arm, the band first so that the line lies on it."""
        x = self.x.place(series.places)
        line = band = ""
        for part in sound_parts(series.middle):
            shown = in_columns(x, series, part, 1 / self.columns)
            line += _path(shown.places, self.y.place(shown.middle))
            if arm < COLOURS and (series.seeds > 1 or shown.is_thinned):
                around = np.concatenate([self.y.place(shown.high), self.y.place(shown.low)[::-1]])
                band += _path(np.concatenate([shown.places, shown.places[::-1]]), around) + "z"
        drawn = f'<path class="band {_class(arm)}" d="{band}"/>' if band else ""
        return drawn + (f'<path class="line {_class(arm)}" data-arm="{arm}" d="{line}"/>' if line else "")

    def _ticks(self) -> list[str]:
        down = [
            f'<span class="ty" style="top:{100 * (1 - self.y.at(tick)):.2f}%">{_tick(tick, self.y)}</span>'
            for tick in self.y.ticks(5)
        ]
        across = [f'<span class="tx" style="left:{100 * self.x.at(tick):.2f}%">{short(tick)}</span>' for tick in self.x.ticks(4)]
        return [*down, *across, f'<span class="unit">{escaped(self.unit)}{", log scale" if self.x.is_log else ""}</span>']

    def _lost(self, curves: Sequence[tuple[int, Series]]) -> list[str]:
        """A cross where a curve breaks off because a value is no finite number."""
        found = []
        for arm, series in curves:
            if series.lost is None or not self.x.low <= series.lost <= self.x.high:
                continue
            value = series.middle[np.searchsorted(series.places, series.lost)]
            if np.isfinite(value) and 0 <= (place := self.y.at(float(value))) <= 1:
                where = f"left:{100 * self.x.at(series.lost):.2f}%;top:{100 * (1 - place):.2f}%"
                found.append(f'<span class="lost {_class(arm)}" style="{where}" aria-hidden="true">×</span>')
        return found

    def _ends(self, curves: Sequence[tuple[int, Series]]) -> list[tuple[float, int]]:
        """(pixels from the top, arm) where each curve that has a name ends, from the top down."""
        wanted: list[tuple[float, int]] = []
        for arm, series in curves:
            sound = series.middle[~np.isnan(series.middle)]
            if self.labels and arm < COLOURS and self._is_seen(series):
                wanted.append((PLOT_PIXELS * (1 - min(1.0, max(0.0, self.y.at(float(sound[-1]))))), arm))
        return sorted(wanted)

    def _is_seen(self, series: Series) -> bool:
        """Whether any of a curve lies in the panel: a name beside it would else stand for a line that is not there."""
        inside = series.within(self.x.low, self.x.high)
        heights = self.y.place(inside.middle[~np.isnan(inside.middle)])
        return bool(heights.size and heights.min() <= 1 and heights.max() >= 0)

    def _legend(self, curves: Sequence[tuple[int, Series]]) -> str:
        """The names with a piece of their lines, in the order in which the curves end: for screens without room beside them."""
        spans = [
            f'<span class="{_class(arm)}">{line_sample(arm)}{escaped(self.labels[arm])}</span>' for _, arm in self._ends(curves)
        ]
        return f'<p class="ends" aria-hidden="true">{"".join(spans)}</p>' if spans else ""

    def _labels(self, curves: Sequence[tuple[int, Series]]) -> list[str]:
        """Names at the right ends, moved apart so that none covers another."""
        wanted = self._ends(curves)
        places = spread([place for place, _ in wanted], LABEL_PIXELS, PLOT_PIXELS)
        spans = []
        for (_, arm), top in zip(wanted, places, strict=True):
            text = escaped(_cut(self.labels[arm]))
            spans.append(f'<span class="label {_class(arm)}" style="top:{top:.1f}px" aria-hidden="true">{text}</span>')
        return spans


def line_sample(arm: int | None) -> str:
    """A short piece of an arm's line."""
    if arm is None:
        return '<span class="sample"></span>'
    return f'<svg class="sample" viewBox="0 0 28 8" aria-hidden="true"><path class="line {_class(arm)}" d="M1 4h26"/></svg>'


def spread(places: Sequence[float], gap: float, room: float) -> list[float]:
    """Places moved as little as it takes to stand `gap` apart, all of them between 0 and `room`, in their order.

    Args:
        places: rising.
    """
    # With the gaps taken off, they have to rise: neighbours that do not are pooled, and stand at their mean.
    pools: list[tuple[float, int]] = []
    for number, place in enumerate(places):
        mean, count = place - gap * number, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    most = max(0.0, room - gap * (len(places) - 1))
    means = [min(max(mean, 0.0), most) for mean, count in pools for _ in range(count)]
    return [mean + gap * number for number, mean in enumerate(means)]


def spanned(low: float, high: float, *, steep: float = LOG_SPAN) -> Scale:
    """A scale from one value to another, logarithmic where they are `steep` times apart."""
    if not low < high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    return Scale(low, high, low > 0 and high / low >= steep)


def padded(low: float, high: float) -> Scale:
    """A scale with a little air at both ends."""
    plain = spanned(low, high, steep=TALL_SPAN)
    if plain.is_log:
        air = (high / low) ** 0.04
        return Scale(low / air, high * air, True)
    air = 0.04 * (plain.high - plain.low)
    # What is never negative needs no room below 0.
    bottom = max(0.0, plain.low - air) if low >= 0 else plain.low - air
    return Scale(bottom, plain.high + air, False)


def short(value: float) -> str:
    """A number of any size in a few characters: 0.002, 4.5, 820K, 1.2e15."""
    if value == 0:
        return "0"
    if abs(value) >= 1e13 or abs(value) < 1e-4:
        return f"{value:.2g}".replace("e+", "e").replace("e-0", "e-")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _tick(value: float, scale: Scale) -> str:
    """A tick's number with the decimals that its neighbours need as well."""
    ticks = scale.ticks(5)
    if scale.is_log or max(map(abs, ticks)) >= 1000 or max(map(abs, ticks)) < 0.001:
        return short(value)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _end(series: Series) -> str:
    sound = series.middle[~np.isnan(series.middle)]
    return f"{sound[-1]:.4g}" if sound.size else "none"


def _class(arm: int) -> str:
    return f"a{arm}" if arm < COLOURS else "rest"


def _cut(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else f"{label[: LABEL_CHARACTERS - 1]}…"


def _down(place: float) -> int:
    return round(HEIGHT * (1 - place))


def _path(x: Floats, y: Floats) -> str:
    """Points as an SVG path; a single one is a dot."""
    across = np.rint(np.clip(x, -0.5, 1.5) * WIDTH).astype(np.int64)
    down = np.rint((1 - np.clip(y, -2.0, 3.0)) * HEIGHT).astype(np.int64)
    steps = "".join(f"{dx},{dy} " for dx, dy in zip(np.diff(across), np.diff(down), strict=True)) or "0,0"
    return f"M{across[0]},{down[0]}l{steps.rstrip()}"
