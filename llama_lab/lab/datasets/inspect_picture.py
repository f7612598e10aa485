"""The picture of `llama-lab data inspect`: how long documents are, and how often tokens occur."""

from pathlib import Path

import numpy as np

from llama_lab.data.survey import Survey, length_bins
from llama_lab.training.plots import BLUE, GREY, ORANGE, wrapped

LOOKS = {"train": ("training", BLUE, "-"), "val": ("validation", ORANGE, "--")}
# More points than pixels make a file large and a line no smoother.
CURVE_POINTS = 2000
SHORT_SPAN = 300
TITLE_CHARACTERS = 110


def draw_surveys(path: Path, title: str, surveys: dict[str, Survey]) -> None:
    """Draw what was seen of splits into one file, whose ending decides on the format.

    Args:
        title: stands above; usually the folder's name.
        surveys: by split, `train` or `val`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    # A Figure of its own needs no global state, so that a notebook's open figures are left alone.
    figure = Figure(figsize=(11, 4.4), dpi=144, layout="constrained")
    lengths, frequencies = figure.subplots(1, 2)
    for name, seen in surveys.items():
        label, colour, style = LOOKS[name]
        _draw_lengths(lengths, seen, label, colour, style)
        _draw_frequencies(frequencies, seen, label, colour, style)
    lengths.set(title="Length of documents", xlabel="tokens of a document", ylabel="share of documents (%)", xscale="log")
    frequencies.set(
        title="Frequency of tokens", xlabel="rank of the token", ylabel="share of tokens (%)", xscale="log", yscale="log"
    )
    _draw_zipf(frequencies, surveys)
    lengths.set_ylim(0, 1.3 * lengths.get_ylim()[1])  # room for the legend
    _set_ticks(lengths.xaxis, EngFormatter(sep=""))
    _set_ticks(frequencies.xaxis, EngFormatter(sep=""))
    _set_ticks(frequencies.yaxis, StrMethodFormatter("{x:g}"))
    for axes in (lengths, frequencies):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(wrapped(title, TITLE_CHARACTERS))
    figure.savefig(path)


def _set_ticks(axis, formatter) -> None:
    """Numbers on a logarithmic axis in one notation. Where it is short, ticks between the powers of ten get numbers as well."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 10 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
    elif high < SHORT_SPAN * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    # By itself matplotlib numbers the small ticks of a short axis, in a notation of its own.
    axis.set_minor_formatter(NullFormatter())


def _draw_lengths(axes, seen: Survey, label: str, colour: str, style: str) -> None:
    bins = length_bins(seen.lengths)
    if not bins:
        return
    edges = [low for low, _, _ in bins] + [bins[-1][1] + 1]
    shares = [100 * count / len(seen.lengths) for *_, count in bins]
    half = float(np.quantile(seen.lengths, 0.5))
    sample = " in a sample" if seen.is_sample_of_documents else ""
    axes.stairs(
        shares,
        edges,
        color=colour,
        linestyle=style,
        linewidth=1.8,
        label=f"{label}: {len(seen.lengths):,}{sample}, half up to {half:,.0f}",
    )
    axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)


def _draw_frequencies(axes, seen: Survey, label: str, colour: str, style: str) -> None:
    counts = np.sort(seen.counts[seen.counts > 0])[::-1]
    places = np.unique(np.geomspace(1, len(counts), CURVE_POINTS).astype(np.int64))
    sample = " in a sample" if seen.is_sample else ""
    name = f"{label}: {len(counts):,} of {len(seen.counts):,} entries{sample}"
    axes.plot(places, 100 * counts[places - 1] / seen.tokens, style, color=colour, label=name)


def _draw_zipf(axes, surveys: dict[str, Survey]) -> None:
    """Zipf's law through the tenth most frequent token of the first split."""
    seen = next(iter(surveys.values()))
    counts = np.sort(seen.counts[seen.counts > 0])[::-1]
    if len(counts) >= 10:
        ranks = np.array([1, len(counts)])
        axes.plot(ranks, 100 * counts[9] / seen.tokens * 10 / ranks, ":", color=GREY, label="Zipf's law: share falls as 1/rank")
