"""A picture of calibration: how often a model is right, against how sure it is."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_lab.inference.documents import Calibration

MARKERS = "osD^vP"


def draw_calibration(path: Path, calibrations: dict[str, "Calibration"]) -> None:
    """Write a reliability diagram, a line for each text, into a file whose ending decides on the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as sure as right")
    for number, (name, found) in enumerate(calibrations.items()):
        filled = found.counts > 0
        confidence, accuracy = found.confidences[filled] / found.counts[filled], found.hits[filled] / found.counts[filled]
        label = f"{name} (error {found.error:.3f})"
        axes.plot(confidence, accuracy, marker=MARKERS[number % len(MARKERS)], markersize=4, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the first choice", ylabel="share of tokens where it is right")
    axes.set_title("Calibration of the next token")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=150)
