"""One update: the gradient of the mean over all predicted tokens of the global batch, however it is split, and a step along it."""

from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_lab.config.schema import Compile, Precision, Recompute, RunConfig
from llama_lab.model.llama import Llama
from llama_lab.model.products import WeightCopy, refresh
from llama_lab.training.buckets import GradientBuckets
from llama_lab.training.compiling import Compiling
from llama_lab.training.copies import hang, slots, take_down
from llama_lab.training.feed import Feed
from llama_lab.training.optim import Optimizers
from llama_lab.training.processes.worker import Worker
from llama_lab.training.schedule import lr_factor
from llama_lab.training.stopwatch import Stopwatch


class Accumulated(NamedTuple):
    """What one process has put into an update.

    Attributes:
        loss_sum: summed loss in nats, on the device, a float32 scalar.
        predicted: how many tokens it is summed over, likewise.
        hash: of the windows it was fed; those of all processes add up, modulo 2^64, to the update's.
    """

    loss_sum: Tensor
    predicted: Tensor
    hash: int


class Gradients(NamedTuple):
    """What is known of an update whose gradients are ready. Tensors are on the device, which is not waited for.

    Attributes:
        own: what this process has put in.
        norms: (parameters,) float32, L2 norm of each parameter's gradient before clipping, in the order of the parameters.
        norm: of all of them together, a scalar.
        is_bad: whether the loss of any process, or the norm, is no finite number; the same on all processes.
    """

    own: Accumulated
    norms: Tensor
    norm: Tensor
    is_bad: Tensor


class Updater:
    """Makes the updates of a run. Used as a context; what it has hung into the model is gone after it.

    On a GPU in low precision the weights get copies to multiply with (`model.products`). With these, or in a process group,
    gradients live in flat buffers (`GradientBuckets`); otherwise autograd makes them anew in every update.

    Args:
        model: with the weights to go on from.
        run: resolved.
        stopwatch: is told what is computed.
        compiling: is told of the first update, in which a compiled model is compiled.

    Attributes:
        parameters: those that are trained, in the model's order.
    """

    def __init__(
        self,
        model: Llama,
        run: RunConfig,
        worker: Worker,
        stopwatch: Stopwatch | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        self._model, self._run, self._worker = model, run, worker
        self._stopwatch = stopwatch or Stopwatch(worker, is_on=False)
        self._compiling = compiling or Compiling(run, model.vocab_size, worker)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if worker.is_grouped:
            # Drawn from one seed, but perhaps by different processors.
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)
        is_copied = worker.device.type == "cuda" and run.precision is not Precision.fp32
        self._places = slots(model) if is_copied else []
        self._buckets: GradientBuckets | None = None
        self._copies: list[WeightCopy] = []
        if self._places or worker.is_grouped:
            added = [place.weights for place in self._places if place.is_added_once]
            self._buckets = GradientBuckets(self.parameters, worker, added=added)
            self._copies = hang(self._places, self._buckets, is_fp8=run.precision is Precision.fp8)
            refresh(self._copies)
        model.set_recompute(run.hardware.recompute)
        if run.hardware.compile is Compile.always:
            model.compile(dynamic=False)

    def __enter__(self) -> Self:
        self._compiling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._compiling.__exit__(kind, error, trace)
        if self._buckets is not None:
            self._buckets.release()
        take_down(self._places)
        self._model.set_recompute(Recompute.none)

    def gradients(self, feed: Feed, update: int) -> Gradients:
        """Leave in every parameter's `.grad` what the next update steps along, clipped.

        Args:
            update: its number, which must be the one that `feed` gives next.
        """
        self._compiling.begin()
        if self._run.model.dropout:
            torch.manual_seed(dropout_seed(self._run.seed.init, update, self._worker.place.rank))
        own = self._accumulate(feed)
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None]))
        norm = torch.linalg.vector_norm(norms)
        if self._run.optim.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self._run.optim.max_grad_norm, norm)
        return Gradients(own, norms, norm, ~norm.isfinite())

    def step(self, optimizer: Optimizers, update: int, *, unless: Tensor) -> float:
        """Make the step of an update, unless its gradients are bad, and forget them.

        Returns:
            The learning rate's factor, of the peak.
        """
        run = self._run
        factor = lr_factor(run.schedule, run.optim.max_lr, update, run.updates)
        optimizer.set_lr_factor(factor)
        optimizer.step(unless=unless)
        optimizer.zero_grad()
        refresh(self._copies)
        self._stopwatch.mark("optimizer")
        self._compiling.end()
        return factor

    def _accumulate(self, feed: Feed) -> Accumulated:
        """Leave in every parameter's `.grad` the gradient of the mean loss over the next update's tokens.

        Every token weighs the same, wherever it is computed: losses are summed, and divided by the global count of targets, so
        neither the number of processes, nor an uneven share, nor padding changes the result. That count follows from the windows,
        so no process has to ask the others.

        Where the loss of any process is no finite number, no gradient of any process is: they are summed over the processes anyway,
        so that nobody has to be asked about that either.
        """
        worker = self._worker
        loss_sum = torch.zeros((), device=worker.device)
        predicted, fed = 0, 0
        if self._buckets is not None:
            self._buckets.begin()
        for micro_batch in feed.update():
            if self._buckets is not None and micro_batch.is_last:
                self._buckets.last_pass()
            # Only from pinned memory, which is for CUDA alone: from other memory a device may copy when that is used again already.
            is_pinned = worker.device.type == "cuda"
            tokens, targets, documents = (
                None if part is None else part.to(worker.device, non_blocking=is_pinned) for part in micro_batch.batch
            )
            # Contiguous windows have no documents to tell apart, and keep the fastest attention.
            more = {} if documents is None else {"documents": documents}
            with worker.autocast(self._run.precision):
                loss = self._model(tokens, targets, **more)
            self._stopwatch.mark("forward")
            # A loss can be infinite with gradients that are not; times zero it is NaN, any other is nothing.
            (loss * (0.0 * loss.detach() + 1 / micro_batch.update_predicted)).backward()
            self._stopwatch.mark("backward")
            loss_sum += loss.detach()
            predicted += micro_batch.predicted
            fed += micro_batch.hash
        if self._buckets is not None:
            self._buckets.finish()
            self._stopwatch.mark("exchange")
        return Accumulated(loss_sum, torch.full((), float(predicted), device=worker.device), fed % 2**64)


def dropout_seed(seed: int, update: int, rank: int) -> int:
    """Seed of an update's dropout masks on one rank: a function of the update, so that a resumed run draws the same."""
    return ((seed * 1_000_003 + update) * 4_099 + rank) % 2**63
