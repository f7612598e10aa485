"""One update's gradients: the mean over all predicted tokens of the global batch, however it is split."""

from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_lab.config.schema import RunConfig
from llama_lab.training.feed import Feed
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


def accumulate_gradients(model: nn.Module, feed: Feed, run: RunConfig, worker: Worker) -> Accumulated:
    """Leave in every parameter's `.grad` the gradient of the mean loss over the next update's tokens.

    Every token weighs the same, wherever it is computed: losses are summed, and divided by the global count of targets, so neither
    the number of processes, nor an uneven share, nor padding changes the result. That count follows from the windows, so no process
    has to ask the others.

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
            # DistributedDataParallel averages over processes; what is wanted is the sum.
            (loss * (worker.place.world_size / micro_batch.update_predicted)).backward()
        loss_sum += loss.detach()
        predicted += micro_batch.predicted
        fed += micro_batch.hash
    return Accumulated(loss_sum, torch.full((), float(predicted), device=worker.device), fed % 2**64)
