"""Pictures of one run, drawn from its metrics.jsonl."""

import math
from pathlib import Path
from typing import Any

from llama_lab.training.metrics import read_rows

PICTURES = (".png", ".pdf", ".svg")
"""Endings of pictures that can be asked for."""
# Okabe and Ito's palette: told apart by readers of every colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


Series = list[tuple[str, list[dict[str, Any]], str, str, str]]
"""Label, rows, key, colour and style of each line."""


def draw_plots(folder: Path, *, vocab_size: int) -> list[Path]:
    """Draw loss, learning rate and throughput over tokens into `folder`/plots.

    Args:
        folder: a run's folder.
        vocab_size: ln of it is the loss of a model that knows nothing, drawn as a dotted line.

    Returns:
        The pictures written; none if the run has no rows yet.
    """
    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    if not train:
        return []
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    rate: Series = [("", train, "train/lr", BLUE, "-")]
    speed: Series = [("", train, "speed/tokens_per_second", BLUE, "-")]
    return [
        draw_loss(folder, target / "loss.png", vocab_size=vocab_size),
        _draw(target / "learning_rate.png", folder.name, "learning rate", rate),
        _draw(target / "throughput.png", folder.name, "tokens a second", speed),
    ]


def draw_loss(folder: Path, path: Path, *, vocab_size: int) -> Path:
    """Draw the losses of a run that has rows into one picture, and return its path."""
    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/loss" in row]
    losses: Series = [("training", train, "train/loss", BLUE, "-"), ("validation", validation, "val/loss", ORANGE, "o--")]
    return _draw(path, folder.name, "loss (nats a token)", [entry for entry in losses if entry[1]], vocab_size)


def _draw(path: Path, title: str, ylabel: str, series: Series, vocab_size: int | None = None) -> Path:
    """Lines over tokens; with a vocabulary's size, the loss of a model that knows nothing too."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # A Figure of its own needs no global state, so that a notebook's open figures are left alone.
    figure = Figure(figsize=(7, 4), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    for label, points, key, colour, style in series:
        points = [point for point in points if point[key] is not None]
        axes.plot([point["tokens"] for point in points], [point[key] for point in points], style, color=colour, label=label)
    if vocab_size is not None:
        level = math.log(vocab_size)
        axes.axhline(level, color=GREY, linestyle=":", label=f"knows nothing: ln({vocab_size}) = {level:.2f}")
    axes.set(title=title, xlabel="training tokens", ylabel=ylabel)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(series) > 1 or vocab_size is not None:
        axes.legend(frameon=False)
    figure.savefig(path)
    return path
