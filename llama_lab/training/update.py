"""One update: the gradient of the mean over all predicted tokens of the global batch, however it is split, and a step along it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_lab.config.schema import RunConfig
from llama_lab.training.feed import Feed
from llama_lab.training.optim import Optimizers
from llama_lab.training.schedule import lr_factor
from llama_lab.training.worker import Worker


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


def compute_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], feed: Feed, run: RunConfig, worker: Worker, update: int
) -> Gradients:
    """Leave in every parameter's `.grad` what the next update steps along, clipped.

    Args:
        model: as `accumulate_gradients` takes it.
        parameters: those of it that are trained.
        update: its number, which must be the one that `feed` gives next.
    """
    if run.model.dropout:
        torch.manual_seed(dropout_seed(run.seed.init, update, worker.place.rank))
    own = accumulate_gradients(model, feed, run, worker)
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    norm = torch.linalg.vector_norm(norms)
    if run.optim.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, run.optim.max_grad_norm, norm)
    return Gradients(own, norms, norm, ~norm.isfinite())


def apply_gradients(optimizer: Optimizers, run: RunConfig, update: int, *, unless: Tensor) -> float:
    """Make the step of an update, unless its gradients are bad, and forget them.

    Returns:
        The learning rate's factor, of the peak.
    """
    factor = lr_factor(run.schedule, run.optim.max_lr, update, run.updates)
    optimizer.set_lr_factor(factor)
    optimizer.step(unless=unless)
    optimizer.zero_grad()
    return factor


def accumulate_gradients(model: nn.Module, feed: Feed, run: RunConfig, worker: Worker) -> Accumulated:
    """Leave in every parameter's `.grad` the gradient of the mean loss over the next update's tokens.

    Every token weighs the same, wherever it is computed: losses are summed, and divided by the global count of targets, so neither
    the number of processes, nor an uneven share, nor padding changes the result. That count follows from the windows, so no process
    has to ask the others.

    Where the loss of any process is no finite number, no gradient of any process is: they are summed over the processes anyway, so
    that nobody has to be asked about that either.

    Args:
        model: gives the summed loss from (tokens, targets); wrapped for data parallelism if there are several processes.
        feed: gives this process its micro-batches, at least one.
    """
    loss_sum = torch.zeros((), device=worker.device)
    predicted, fed = 0, 0
    for micro_batch in feed.update():
        # Gradients are exchanged during the last backward, which each process has, however many come before it.
        early = isinstance(model, DistributedDataParallel) and not micro_batch.is_last
        tokens, targets, documents = (
            None if part is None else part.to(worker.device, non_blocking=True) for part in micro_batch.batch
        )
        # Contiguous windows have no documents to tell apart, and keep the fastest attention.
        more = {} if documents is None else {"documents": documents}
        with cast(DistributedDataParallel, model).no_sync() if early else nullcontext():
            with worker.autocast(run.precision):
                loss = model(tokens, targets, **more)
            # DistributedDataParallel averages over processes; what is wanted is the sum. A loss can be infinite with gradients that
            # are not; times zero it is NaN, any other is nothing.
            scale = 0.0 * loss.detach() + worker.place.world_size / micro_batch.update_predicted
            (loss * scale).backward()
        loss_sum += loss.detach()
        predicted += micro_batch.predicted
        fed += micro_batch.hash
    return Accumulated(loss_sum, torch.full((), float(predicted), device=worker.device), fed % 2**64)


def dropout_seed(seed: int, update: int, rank: int) -> int:
    """Seed of an update's dropout masks on one rank: a function of the update, so that a resumed run draws the same."""
    return ((seed * 1_000_003 + update) * 4_099 + rank) % 2**63
