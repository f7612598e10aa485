"""The curves as a PNG, for where Markdown is read."""

from collections.abc import Sequence
from pathlib import Path

from llama_lab.lab.report.chart import COLOURS
from llama_lab.lab.report.figures import Drawn

# Those of the page on a light ground, with its dash patterns.
STYLES = (
    ("#00568a", "-"),
    ("#b44a00", "--"),
    ("#00785a", ":"),
    ("#8f3f86", "-."),
    ("#1a1c1e", (0, (2, 2))),
    ("#7d6100", (0, (7, 2))),
    ("#0b76b5", (0, (5, 2, 1, 2, 1, 2))),
    ("#b3265e", (0, (3, 2, 1, 2))),
)
GREY = "#868b91"


def draw_curves(drawn: Drawn, names: Sequence[str], path: Path) -> None:
    """Draw a metric over its first axis, the bands of the seeds included.

    Args:
        names: of all arms, in the order of their colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axis, curves = next(iter(drawn.by_axis.items()))
    for arm, series in curves:
        if arm >= COLOURS:
            axes.plot(series.places, series.middle, color=GREY, linewidth=0.7, alpha=0.7)
            continue
        colour, dashes = STYLES[arm]
        axes.plot(series.places, series.middle, color=colour, linestyle=dashes, label=names[arm].replace("$", r"\$"))
        if series.seeds > 1:
            axes.fill_between(series.places, series.low, series.high, color=colour, alpha=0.2, linewidth=0)
    if max(float(series.places[-1]) for _, series in curves) >= 20 * min(float(series.places[0]) for _, series in curves):
        axes.set_xscale("log")
    axes.set(xlabel=f"training {axis}", ylabel=drawn.metric)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False)
    # Without the version of matplotlib, the same curves give the same bytes.
    figure.savefig(path, metadata={"Software": None})
