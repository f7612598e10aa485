"""Pictures of one run, drawn from its metrics.jsonl and its config."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_lab.config.identity import load_config
from llama_lab.config.schema import RunConfig
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.schedule import lr_factor

PICTURES = (".png", ".pdf", ".svg")
"""Endings of pictures that can be asked for."""
# Okabe and Ito's palette: told apart by readers of every colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
# More points than pixels make a line no smoother.
SCHEDULE_POINTS = 2000
TITLE_CHARACTERS = 72


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
    begin = RunFolder(folder).meta().get("lineage", {}).get("update", 0)
    done, to_come = rates(load_config(folder / "config.yaml"), begin, train[-1]["update"])
    # Between two rows the schedule may bend, so it is not the rows that are joined.
    rate: Series = [("as logged", train, "train/lr", ORANGE, "."), ("schedule", done, "train/lr", BLUE, "-")]
    rate += [("still to come", to_come, "train/lr", BLUE, ":")] if len(to_come) > 1 else []
    speed: Series = [("", train, "speed/tokens_per_second", BLUE, "-")]
    # The first row is slow by what is compiled and allocated, and would press all others to the upper edge.
    steady = [row["speed/tokens_per_second"] for row in train[1:]]
    return [
        draw_loss(folder, target / "loss.png", vocab_size=vocab_size),
        _draw(target / "learning_rate.png", folder.name, "learning rate", rate),
        _draw(target / "throughput.png", folder.name, "tokens a second", speed, within=steady),
    ]


def draw_loss(folder: Path, path: Path, *, vocab_size: int) -> Path:
    """Draw the losses of a run that has rows into one picture, and return its path."""
    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/loss" in row]
    losses: Series = [("training", train, "train/loss", BLUE, "-"), ("validation", validation, "val/loss", ORANGE, "o--")]
    return _draw(path, folder.name, "loss (nats a token)", [entry for entry in losses if entry[1]], vocab_size)


def rates(run: RunConfig, begin: int, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The learning rate as the config means it, up to the last row and from there to the end.

    Args:
        begin: update that the run began after; rows up to it are of another run, under another schedule perhaps.
        last: update of the last row.
    """

    def points(first: int, final: int) -> list[dict[str, Any]]:
        count = min(SCHEDULE_POINTS, final - first + 1)
        updates = sorted({first + round(number * (final - first) / max(count - 1, 1)) for number in range(count)})
        factors = [lr_factor(run.schedule, run.optim.max_lr, update, run.updates) for update in updates]
        return [
            {"tokens": update * run.data.tokens_per_update, "train/lr": run.optim.max_lr * factor}
            for update, factor in zip(updates, factors, strict=True)
        ]

    return points(begin + 1, last), points(max(begin + 1, last), run.updates)


def _draw(
    path: Path, title: str, ylabel: str, series: Series, vocab_size: int | None = None, *, within: Sequence[float | None] = ()
) -> Path:
    """Lines over tokens.

    Args:
        vocab_size: with it the loss of a model that knows nothing is drawn too.
        within: values that the vertical axis has to show; without two of them it shows all.
    """
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
    shown = [value for value in within if value is not None]
    if len(shown) > 1 and (room := 0.05 * (max(shown) - min(shown))) > 0:
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set(xlabel="training tokens", ylabel=ylabel)
    axes.set_title(wrapped(title, TITLE_CHARACTERS), fontsize="medium")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(abs(limit) for limit in axes.get_ylim()) >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(series) > 1 or vocab_size is not None:
        axes.legend(frameon=False)
    figure.savefig(path)
    return path


def wrapped(text: str, characters: int) -> str:
    """A title in as many lines as it takes, broken at spaces and hyphens; what dollar signs enclose is no formula."""
    return "\n".join(textwrap.wrap(text, characters)).replace("$", r"\$")
