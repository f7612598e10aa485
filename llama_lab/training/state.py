"""Where a run stands."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_lab.model.llama import Llama
from llama_lab.training.checkpoint import load_checkpoint
from llama_lab.training.manifest import Checkpoint
from llama_lab.training.optim import Optimizers
from llama_lab.training.update import Gradients
from llama_lab.training.worker import Worker


@dataclass(slots=True)
class State:
    """Where a run stands, beside its weights.

    Attributes:
        update: updates done.
        seconds: time spent on them, over all starts.
        loss_sum, predicted: summed nats and predicted tokens since the last logged update; of all processes in a checkpoint, of
            this one in between.
        skipped: updates that were left out before this start.
    """

    update: int
    seconds: float
    loss_sum: Tensor
    predicted: Tensor
    skipped: int

    @classmethod
    def at_start(cls, worker: Worker) -> "State":
        """Before the first update."""
        # Sums of float32 losses are exact in float64, so the order in which ranks and starts add them up leaves no trace.
        zero = torch.zeros((), device=worker.device, dtype=torch.float32 if worker.device.type == "mps" else torch.float64)
        return cls(0, 0.0, zero, zero.clone(), 0)

    def restore(self, checkpoint: Checkpoint, model: Llama, optimizer: Optimizers, worker: Worker) -> None:
        """Go to a checkpoint, with the model and the optimizer. Raises like `load_checkpoint`, before anything has changed."""
        weights, saved = load_checkpoint(checkpoint)
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved["optimizer"])
        self.update, self.seconds, self.skipped = checkpoint.update, saved["seconds"], saved.get("skipped", 0)
        if worker.is_main:
            self.loss_sum += saved["loss_sum"].to(worker.device)
            self.predicted += saved["predicted"].to(worker.device)

    def count(self, update: int, gradients: Gradients) -> None:
        """Add an update. One that is left out adds nothing to the loss."""
        self.update = update
        self.loss_sum += torch.where(gradients.is_bad, 0.0, gradients.own.loss_sum)
        self.predicted += torch.where(gradients.is_bad, 0.0, gradients.own.predicted)
