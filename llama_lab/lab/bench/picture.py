"""The picture of `llama-lab bench`: speed, and where the time goes."""

from pathlib import Path

from llama_lab.lab.bench.measure import PARTS, Bench, told_apart
from llama_lab.training.plots import wrapped

COLOURS = {"forward": "#0072b2", "backward": "#56b4e9", "exchange": "#e69f00", "optimizer": "#009e73", "rest": "#999999"}
"""Of Okabe and Ito, told apart by colour-blind readers too."""
DARK = ("forward", "optimizer")
"""Parts whose colour is read better under white than under black."""
TITLE_CHARACTERS, NAME_CHARACTERS = 120, 32


def draw(found: list[Bench], path: Path) -> None:
    """Write a PNG: a bar for each config, tokens a second on the left, shares of the device's time on the right.

    Args:
        found: at least one, each without an error.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    shared, own = told_apart([bench.config for bench in found])
    title, names = wrapped(shared, TITLE_CHARACTERS), [wrapped(name, NAME_CHARACTERS) for name in own]
    lines = max(1 + name.count("\n") for name in names)
    height = 1.7 + (0.5 + 0.18 * (lines - 1)) * len(found) + 0.2 * title.count("\n")
    figure = Figure(figsize=(11, height), layout="constrained")
    speed, shares = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    figure.suptitle(title, fontsize="medium")
    places = range(len(found))[::-1]
    bars = speed.barh(places, [bench.tokens_per_second for bench in found], color="#0072b2", height=0.6)
    said = [f"{bench.tokens_per_second:,.0f}" + (f"  MFU {bench.mfu:.1%}" if bench.mfu else "") for bench in found]
    speed.bar_label(bars, said, padding=4)
    speed.set_yticks(list(places) if any(own) else [], names if any(own) else [])
    speed.set_xlabel("tokens a second")
    speed.set_xlim(right=1.35 * max(bench.tokens_per_second for bench in found))
    speed.xaxis.set_major_locator(MaxNLocator(5))
    speed.xaxis.set_major_formatter(EngFormatter(sep=""))
    left = [0.0] * len(found)
    for part in PARTS:
        widths = [bench.parts.get(part, 0.0) for bench in found]
        if not any(widths):
            continue
        drawn = shares.barh(places, widths, left=left, color=COLOURS[part], height=0.6, label=part)
        labels = [f"{100 * width:.0f}" if width > 0.04 else "" for width in widths]
        shares.bar_label(drawn, labels, label_type="center", color="white" if part in DARK else "black")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    shares.set_xlabel("share of the device's time")
    shares.set_xlim(0, 1)
    shares.xaxis.set_major_formatter(PercentFormatter(1))
    shares.tick_params(axis="y", length=0)
    handles, parts = shares.get_legend_handles_labels()
    if handles:
        # Below both: over one of them it is wider than the axes, and cut.
        figure.legend(handles, parts, ncols=len(parts), loc="outside lower right", frameon=False, fontsize="small")
    for axes in (speed, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
