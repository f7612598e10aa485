"""Pictures of one run, drawn from its metrics.jsonl."""

import math
from pathlib import Path

from llama_lab.training.metrics import read_rows

# Okabe and Ito's palette: told apart by readers of every colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def draw_plots(folder: Path, *, vocab_size: int) -> list[Path]:
    """Draw loss, learning rate and throughput over tokens into `folder`/plots.

    Args:
        folder: a run's folder.
        vocab_size: ln of it is the loss of a model that knows nothing, drawn as a dotted line.

    Returns:
        The pictures written; none if the run has no rows yet.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/loss" in row]
    if not train:
        return []
    target = folder / "plots"
    target.mkdir(exist_ok=True)

    def draw(
        name: str, title: str, ylabel: str, series: list[tuple[str, list[dict], str, str, str]], level: float | None = None
    ) -> Path:
        # A Figure of its own needs no global state, so that a notebook's open figures are left alone.
        figure = Figure(figsize=(7, 4), dpi=144, layout="constrained")
        axes = figure.add_subplot()
        for label, points, key, colour, style in series:
            points = [point for point in points if point[key] is not None]
            axes.plot([point["tokens"] for point in points], [point[key] for point in points], style, color=colour, label=label)
        if level is not None:
            axes.axhline(level, color=GREY, linestyle=":", label=f"knows nothing: ln({vocab_size}) = {level:.2f}")
        axes.set(title=title, xlabel="training tokens", ylabel=ylabel)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if len(series) > 1 or level is not None:
            axes.legend(frameon=False)
        path = target / f"{name}.png"
        figure.savefig(path)
        return path

    losses = [("training", train, "train/loss", BLUE, "-"), ("validation", validation, "val/loss", ORANGE, "o--")]
    return [
        draw("loss", folder.name, "loss (nats a token)", [entry for entry in losses if entry[1]], math.log(vocab_size)),
        draw("learning_rate", folder.name, "learning rate", [("", train, "train/lr", BLUE, "-")]),
        draw("throughput", folder.name, "tokens a second", [("", train, "speed/tokens_per_second", BLUE, "-")]),
    ]
