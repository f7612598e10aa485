"""One update's gradients: the mean over all predicted tokens of the global batch, however it is split."""

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_lab.config.schema import RunConfig, Window
from llama_lab.data.stream import IGNORE, TokenStream
from llama_lab.training.worker import Worker


def accumulate_gradients(
    model: nn.Module, stream: TokenStream, run: RunConfig, worker: Worker, update: int
) -> tuple[Tensor, Tensor]:
    """Leave in every parameter's `.grad` the gradient of the mean loss over this update's tokens.

    The windows of update u are numbers (u - 1) W to u W - 1 of the stream, W being the windows of a global batch; each process
    takes its contiguous share, in micro-batches. Every token weighs the same, wherever it is computed: losses are summed,
    and divided by the global count of targets, so neither the number of processes nor padding changes the result.

    Args:
        model: gives the summed loss from (tokens, targets); wrapped for data parallelism if there are several processes.
        update: number of the update, from 1.

    Returns:
        (summed loss in nats, predicted tokens) of this process alone, on the device, both float32 scalars.
    """
    share = run.windows_per_update // worker.place.world_size
    micro_batch = run.hardware.micro_batch or share
    first = (update - 1) * run.windows_per_update + worker.place.rank * share
    batches = [stream.batch(first + offset, micro_batch) for offset in range(0, share, micro_batch)]

    count = sum(int((targets != IGNORE).sum()) for _, targets in batches)
    predicted = torch.full((), float(count), device=worker.device)
    everywhere = predicted.clone()
    if run.data.window is Window.document:
        worker.total(everywhere)  # shares hold unequal amounts of padding
    else:
        everywhere *= worker.place.world_size
    # DistributedDataParallel averages over processes; what is wanted is the sum.
    scale = worker.place.world_size / everywhere

    summed = torch.zeros((), device=worker.device)
    for number, (tokens, targets) in enumerate(batches, start=1):
        early = isinstance(model, DistributedDataParallel) and number < len(batches)
        with cast(DistributedDataParallel, model).no_sync() if early else nullcontext():
            with worker.autocast(run.precision):
                loss = model(_to_device(tokens, worker.device), _to_device(targets, worker.device))
            (loss * scale).backward()
        summed += loss.detach()
    return summed, predicted


def _to_device(ids: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for where the device is a GPU: pinned pages can be read without it."""
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
