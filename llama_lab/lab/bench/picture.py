"""The picture of `llama-lab bench`: speed, and where the time goes."""

from pathlib import Path

from llama_lab.lab.bench.measure import PARTS, Bench

COLOURS = {"forward": "#0072b2", "backward": "#56b4e9", "exchange": "#e69f00", "optimizer": "#009e73", "rest": "#999999"}
"""Of Okabe and Ito, told apart by colour-blind readers too."""


def draw(found: list[Bench], path: Path) -> None:
    """Write a PNG: a bar for each config, tokens a second on the left, shares of the device's time on the right.

    Args:
        found: at least one, each without an error.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.6 * len(found)), layout="constrained")
    speed, shares = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    names = [bench.config for bench in found]
    places = range(len(found))[::-1]
    bars = speed.barh(places, [bench.tokens_per_second for bench in found], color="#0072b2", height=0.6)
    said = [f"{bench.tokens_per_second:,.0f}" + (f"  MFU {bench.mfu:.1%}" if bench.mfu else "") for bench in found]
    speed.bar_label(bars, said, padding=4)
    speed.set_yticks(list(places), [name if len(name) <= 60 else f"{name[:58]} …" for name in names])
    speed.set_xlabel("tokens a second")
    speed.set_xlim(right=1.35 * max(bench.tokens_per_second for bench in found))
    left = [0.0] * len(found)
    for part in PARTS:
        widths = [bench.parts.get(part, 0.0) for bench in found]
        if not any(widths):
            continue
        drawn = shares.barh(places, widths, left=left, color=COLOURS[part], height=0.6, label=part)
        shares.bar_label(drawn, [f"{width:.0%}" if width > 0.04 else "" for width in widths], label_type="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    shares.set_xlabel("share of the device's time")
    shares.set_xlim(0, 1)
    shares.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    for axes in (speed, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
