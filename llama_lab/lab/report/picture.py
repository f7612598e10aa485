"""The curves as a PNG, for where Markdown is read."""

from collections.abc import Sequence
from pathlib import Path

from llama_lab.lab.report.chart import COLOURS
from llama_lab.lab.report.figures import Drawn, panels_of

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


def draw_curves(drawn: Drawn, names: Sequence[str], path: Path, *, higher_is_better: bool) -> None:
    """Draw a metric over its first axis as the page does: all of it, and the later half close up, with the bands of the seeds.

    Args:
        names: of all arms, in the order of their colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    axis, curves = next(iter(drawn.by_axis.items()))
    panels = panels_of(drawn.metric, axis, curves, names, higher_is_better=higher_is_better)
    figure = Figure(figsize=(5.5 * len(panels) + 1, 4.5), dpi=120, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for arm, series in curves:
            if arm >= COLOURS:
                axes.plot(series.places, series.middle, color=GREY, linewidth=0.7, alpha=0.7)
                continue
            colour, dashes = STYLES[arm]
            axes.plot(series.places, series.middle, color=colour, linestyle=dashes, label=names[arm].replace("$", r"\$"))
            if series.seeds > 1:
                axes.fill_between(series.places, series.low, series.high, color=colour, alpha=0.2, linewidth=0)
        for scale, set_scale, set_ends in ((panel.x, axes.set_xscale, axes.set_xlim), (panel.y, axes.set_yscale, axes.set_ylim)):
            set_scale("log" if scale.is_log else "linear")
            set_ends(scale.low, scale.high)
        axes.set_title(panel.title, loc="left", fontsize="medium")
        axes.set(xlabel=f"training {axis}")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].set_ylabel(drawn.metric)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.axes[-1].legend(handles[::-1], labels[::-1], frameon=False)
    # Without the version of matplotlib, the same curves give the same bytes.
    figure.savefig(path, metadata={"Software": None})
