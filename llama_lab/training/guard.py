"""Updates that go wrong: a loss or gradient that is no finite number, and a loss that jumps.

Every process comes to the same conclusion without asking the others. A loss that is no finite number makes all gradients such (see
`Updater.gradients`), gradients are summed over the processes, and so their norm tells it everywhere. On a CPU it is looked at
before the step. On CUDA the device leaves the step out by itself (see `Optimizers.step`), and the host, which is ahead of it, looks
a few updates later, and always before a row is written or a state saved. Either way weights and optimizer stay as they were.
"""

import json
import math
import shlex
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_lab.config.disk import why
from llama_lab.config.schema import RunConfig
from llama_lab.training.errors import Diverged
from llama_lab.training.metrics import GUARD_FILE, read_rows
from llama_lab.training.processes.worker import Worker
from llama_lab.training.run_folder import relative
from llama_lab.training.update import Gradients

# Updates that the host may be ahead of what it has looked at: enough that the device always has work.
LAG = 4
# Rows that a spike is seen against. Fewer than the least say nothing of what is usual.
WINDOW, LEAST = 32, 8
# Where rows are nearly equal, noise is no spike: a standard deviation is taken to be this share of the mean at least.
LEAST_DEVIATION = 1e-3
SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Noted:
    """An update that has not been looked at yet.

    Attributes:
        figures: loss sum, predicted tokens, gradient norm, then each parameter's; on the host once `copied` has happened.
        hash: of the windows that this process was fed.
    """

    update: int
    figures: Tensor
    copied: torch.cuda.Event | None
    hash: int


class Guard:
    """Looks at every update of a run. All processes have one and call it alike.

    Args:
        folder: of the run; rank 0 writes `guard.jsonl` there when there is something to write.
        model: bare, for the names of its parameters.
        say: prints a line or several, with a style.
        skipped: updates that were left out before this start.

    Attributes:
        skipped: updates left out so far, as far as they were looked at.
    """

    def __init__(
        self, run: RunConfig, folder: Path, model: nn.Module, worker: Worker, say: Callable[[str, str], None], *, skipped: int
    ):
        self._run, self._folder, self._worker, self._say = run, folder, worker, say
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._noted: deque[Noted] = deque()
        rows = read_rows(folder / "metrics.jsonl") if worker.is_main else []
        self._losses = LossWindow(row["train/loss"] for row in rows if "train/loss" in row)
        self.skipped = skipped

    def note(self, update: int, gradients: Gradients) -> None:
        """Take down an update whose gradients are ready, and look at one before it, or at itself where nothing is waited for.

        Raises:
            Diverged: one more update had to be left out than `guard.max_skipped` allows. The last checkpoint is from before it.
        """
        own = gradients.own
        figures = torch.cat((torch.stack((own.loss_sum, own.predicted, gradients.norm)), gradients.norms))
        copied = None
        if figures.is_cuda:
            host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # waiting for it sleeps, and leaves the core to others
            copied.record()
        self._noted.append(Noted(update, figures, copied, own.hash))
        self._look(LAG if copied is not None else 0)

    def look(self) -> None:
        """Look at all updates up to now. Raises like `note`."""
        self._look(0)

    def marks(self, update: int, loss: float) -> dict[str, float]:
        """What a row with this loss says beside it, by metric key. Rank 0 alone asks, once a row and in their order."""
        found: dict[str, float] = {}
        if (deviations := self._run.guard.spike_deviations) is not None:
            usual = self._losses.exceeded(loss, deviations)
            found["train/spike"] = int(usual is not None)
            if usual is not None:
                mean, deviation = usual
                self._say(f"Spike: at update {update} the loss is {loss:.4f}, after rows of {mean:.4f} ± {deviation:.4f}", "yellow")
            self._losses.add(loss)
        if self._run.guard.max_skipped:
            found["train/skipped"] = self.skipped
        return found

    def _look(self, behind: int) -> None:
        while len(self._noted) > behind:
            noted = self._noted.popleft()
            if noted.copied is not None:
                noted.copied.synchronize()
            if not math.isfinite(noted.figures[2]):
                self._leave_out(noted)

    def _leave_out(self, noted: Noted) -> None:
        """Record a bad update, and end the run if it is one too many. All processes are here for the same one."""
        loss_sum, predicted = self._worker.total(noted.figures[:2].to(self._worker.device)).tolist()
        _, fed = self._worker.settle(False, noted.hash)
        norms = dict(zip(self._names, noted.figures[3:].tolist(), strict=True))
        found = Bad(noted.update, loss_sum / predicted, float(noted.figures[2]), fed, ranked(norms))
        self.skipped += 1
        ends = self.skipped > self._run.guard.max_skipped
        if self._worker.is_main:
            try:
                with (self._folder / GUARD_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found.row(self._run) | {"ends_the_run": ends}) + "\n")
            except OSError as error:
                self._say(f"{GUARD_FILE} could not be written ({why(error)})", "yellow")
        text = found.told(self._run, self._folder)
        if ends:
            raise Diverged(f"{text}\n  {self._advice()}")
        self._say(f"Left out: {text}\n  {self.skipped} left out of at most {self._run.guard.max_skipped}", "yellow")

    def _advice(self) -> str:
        run = self._run
        most = run.guard.max_skipped
        return (
            "The checkpoint before it stays, and the same command goes on from there. "
            f"What usually helps is a lower optim.max_lr (now {run.optim.max_lr}) or a longer schedule.warmup_updates (now "
            f"{run.schedule.warmup_updates}); guard.max_skipped={max(2 * most, 10)} (now {most}) leaves such updates out"
        )


@dataclass(frozen=True, slots=True)
class Bad:
    """An update whose loss or gradient norm is no finite number.

    Attributes:
        loss: in nats a token, over all processes.
        fed: hash of its windows.
        norms: of each parameter's gradient, the worst first.
    """

    update: int
    loss: float
    norm: float
    fed: int
    norms: dict[str, float]

    def row(self, run: RunConfig) -> dict[str, Any]:
        """As it stands in guard.jsonl. JSON has no infinity or NaN; here they are words."""
        first, last = windows_of(run, self.update)
        return {
            "update": self.update,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "loss": _as_json(self.loss),
            "grad_norm": _as_json(self.norm),
            "hash": f"{self.fed:016x}",
            "windows": [first, last],
            "grad_norms": {name: _as_json(norm) for name, norm in self.norms.items()},
        }

    def told(self, run: RunConfig, folder: Path) -> str:
        """What a person needs to know, and how to see more."""
        first, last = windows_of(run, self.update)
        place = shlex.quote(relative(folder))
        return (
            f"at update {self.update} the loss is {self.loss:.6g} and the gradient norm {self.norm:.6g}; it changed no weight\n"
            f"  Gradients: {norms_told(self.norms)}; all of them are in {GUARD_FILE}\n"
            f"  Fed: windows {first:,} to {last:,}, hash {self.fed:016x}; llama-lab data replay {place} --update {self.update}\n"
            f"  To make it again: llama-lab verify {place} --update {self.update}"
        )


class LossWindow:
    """The last finite losses of the log, which say what is usual.

    Args:
        losses: of the rows so far, in order; None stands for one that is no finite number.
    """

    def __init__(self, losses: Iterable[float | None] = ()):
        self._losses = deque((loss for loss in losses if loss is not None), maxlen=WINDOW)

    def exceeded(self, loss: float, deviations: float) -> tuple[float, float] | None:
        """Mean and standard deviation of the window if a loss lies that many of the latter above the former."""
        if len(self._losses) < LEAST:
            return None
        mean = statistics.fmean(self._losses)
        deviation = max(statistics.pstdev(self._losses, mean), LEAST_DEVIATION * mean)
        return (mean, deviation) if loss > mean + deviations * deviation else None

    def add(self, loss: float) -> None:
        """Take in a loss; one that is no finite number would make every mean after it such, and stays out."""
        if math.isfinite(loss):
            self._losses.append(loss)


def windows_of(run: RunConfig, update: int) -> tuple[int, int]:
    """First and last window of an update in the run's endless order."""
    return (update - 1) * run.windows_per_update, update * run.windows_per_update - 1


def ranked(norms: dict[str, float]) -> dict[str, float]:
    """Gradient norms by parameter: those that are no finite numbers first, then the largest."""
    return dict(sorted(norms.items(), key=lambda item: (math.isfinite(item[1]), -item[1] if math.isfinite(item[1]) else 0.0)))


def norms_told(norms: dict[str, float]) -> str:
    """Ranked gradient norms in a line: how many are no finite numbers, the first of them, the largest of the others."""
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    largest = [f"{name} {norm:.3g}" for name, norm in norms.items() if math.isfinite(norm)][:SHOWN_NAMES]
    told = "all finite" if not bad else f"not finite in {len(bad)} of {len(norms)} parameters, {', '.join(bad[:SHOWN_NAMES])}"
    told += ", …" if len(bad) > SHOWN_NAMES else ""
    return f"{told}; the largest {'of the others ' if bad else ''}{', '.join(largest)}" if largest else told


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
