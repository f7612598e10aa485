"""Where a run stands: put back from its newest whole checkpoint, and kept in the next one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_lab.config.disk import remedy, why
from llama_lab.config.schema import RunConfig
from llama_lab.model.llama import Llama
from llama_lab.training.clock import Clock
from llama_lab.training.console import Console
from llama_lab.training.errors import Diverged, SaveFailed
from llama_lab.training.guard import Guard
from llama_lab.training.metrics import Metrics, cut_back
from llama_lab.training.optim import Optimizers
from llama_lab.training.processes.worker import Worker
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.checkpoint import load_checkpoint
from llama_lab.training.saving.choice import damaged, told
from llama_lab.training.saving.manifest import (
    Checkpoint,
    DamagedCheckpoint,
    list_checkpoints,
    list_incomplete,
    remove_drafts,
    set_aside,
)
from llama_lab.training.saving.saver import Saver
from llama_lab.training.update import Gradients


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
        # In one step: a GPU of Apple's has no float64, which a checkpoint of another device keeps them in.
        loss_sum, predicted = (
            saved[name].to(device=own.device, dtype=own.dtype)
            for name, own in (("loss_sum", self.loss_sum), ("predicted", self.predicted))
        )
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved["optimizer"])
        self.update, self.seconds, self.skipped = checkpoint.update, saved["seconds"], saved.get("skipped", 0)
        if worker.is_main:
            self.loss_sum += loss_sum
            self.predicted += predicted

    def count(self, update: int, gradients: Gradients) -> None:
        """Add an update. One that is left out adds nothing to the loss."""
        self.update = update
        self.loss_sum += torch.where(gradients.is_bad, 0.0, gradients.own.loss_sum)
        self.predicted += torch.where(gradients.is_bad, 0.0, gradients.own.predicted)


def resume(run: RunConfig, folder: RunFolder, model: Llama, optimizer: Optimizers, worker: Worker, console: Console) -> State:
    """Put weights and optimizer back to the newest whole checkpoint, and the rows of the run with them."""
    if worker.is_main:
        remove_drafts(folder.checkpoints)
    state, begun = State.at_start(worker), None
    broken = list_incomplete(folder.checkpoints)
    for checkpoint in reversed(list_checkpoints(folder.checkpoints)):
        try:
            state.restore(checkpoint, model, optimizer, worker)
        except DamagedCheckpoint as error:
            broken.append(error)
            continue
        begun = checkpoint
        break
    broken.sort(key=lambda error: error.path)
    if broken and begun is None:
        raise damaged(folder, broken[-1], scope="continuing this run")
    if worker.agree(state.update != 0) and not worker.agree_on(state.update):
        raise RuntimeError(
            f"rank {worker.place.rank} finds update {state.update}, others another: is the run folder on a shared disk?"
        )
    if worker.is_main:
        with folder.writing():
            set_aside(folder.checkpoints, after=state.update)
            cut_back(folder.path, state.update)
            # A run that was killed has noted how far it had come, which is further than what it goes on from.
            folder.write_summary(update=state.update, tokens=state.update * run.data.tokens_per_update)
    for error in broken:
        console.say(f"{told(error)}; its checkpoint is put aside as damaged-{error.path.parent.name}", style="yellow")
    if begun is not None:
        console.say(f"Continuing after update {begun.update} of {run.updates} ({begun.path.name})")
    return state


def save(
    saver: Saver,
    model: Llama,
    optimizer: Optimizers,
    state: State,
    worker: Worker,
    guard: Guard,
    clock: Clock,
    *,
    unless: OSError | None = None,
) -> None:
    """Begin to write a checkpoint from rank 0, with the open log interval of all ranks added up."""
    with clock.excluded():
        guard.look()
        loss_sum, predicted = worker.total(torch.stack((state.loss_sum, state.predicted))).unbind()
        # Weights are equal on all ranks, so all of them come to the same conclusion. One answer, so that the device is asked once.
        finite = torch.stack([loss_sum.isfinite(), *(parameter.isfinite().all() for parameter in model.parameters())])
        if not bool(finite.all()):
            raise Diverged(f"at update {state.update} the loss or a weight is no finite number; the checkpoint before it stays")
        if not worker.is_main:
            state.loss_sum.zero_()
            state.predicted.zero_()
            return
        state.loss_sum.copy_(loss_sum)
        state.predicted.copy_(predicted)
        rest = {"optimizer": optimizer.state_dict(), "seconds": clock.seconds(), "loss_sum": loss_sum, "predicted": predicted}
        rest["skipped"] = guard.skipped
        saver.save(state.update, model, rest, unless=unless)


def end_saving(saver: Saver, worker: Worker, metrics: Metrics | None) -> None:
    """Wait for the last checkpoint. All ranks fail alike if it or a row could not be written: the run is not done before it is
    saved."""
    failure = saver.close()
    if failure is None and metrics is not None and (error := metrics.flush()) is not None:
        failure = f"rows of the run could not be written ({why(error)}); {remedy(error)} and type the same command again, which "
        failure += "makes them again"
    if (failure := worker.heard(failure)) is not None:
        raise SaveFailed(failure)
