"""Gradients of all parameters in a few flat buffers, and their exchange between processes.

Every `.grad` is a view into a buffer, so nothing is packed before it is sent and nothing unpacked after. Gradients add up over the
micro-batches of a process without a word to the others; during the last backward a buffer is sent as soon as all in it is added,
while the device computes the rest.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_lab.model import products
from llama_lab.training.processes.worker import Worker

BUCKET_BYTES = 2**26
"""Large enough for the full speed of the links, small enough that little is left to send when the last backward ends."""

Unit = tuple[Tensor, ...]
"""Parameters that lie behind each other, in this order."""


class GradientBuckets:
    """The buffers.

    Args:
        parameters: all that are trained, in the model's order.
        added: those of them that get their gradients by `products.add_…`, in the model's order; what gets them at once together.
            They are sent as they are ready: backward meets the model's end first, so buffers are filled from there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], worker: Worker, *, added: Sequence[Unit] = ()) -> None:
        self._worker = worker
        early = {id(parameter) for unit in added for parameter in unit}
        buckets = _grouped(added[::-1])
        self._early = len(buckets)
        buckets += _grouped([(parameter,) for parameter in reversed(parameters) if id(parameter) not in early])
        self._sizes = [len(units) for units in buckets]
        self._flat: list[Tensor] = []
        self._views: dict[int, Tensor] = {}
        self._joined: dict[int, Tensor] = {}
        self._parameters = list(parameters)
        for number, units in enumerate(buckets):
            self._flat.append(self._laid_out(units))
            if number < self._early and worker.is_grouped:
                for unit in units:
                    products.ADDED[self._joined[id(unit[0])].data_ptr()] = partial(self._arrived, number)
        self._left: list[int] | None = None
        self._sent: list[dist.Work] = []

    def total(self, first: Tensor) -> Tensor:
        """What the gradients of a unit are added to, its parameters below each other.

        Args:
            first: the unit's first parameter.
        """
        return self._joined[id(first)]

    def begin(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self._flat)
        for parameter in self._parameters:
            parameter.grad = self._views[id(parameter)]

    def last_pass(self) -> None:
        """From here to `finish` each gradient is added to once more, and then complete in this process."""
        if self._worker.is_grouped:
            self._left = list(self._sizes)

    def finish(self) -> None:
        """Add up over the processes. The device waits for what was sent, the host does not."""
        if not self._worker.is_grouped:
            return
        self._left = None
        for flat in self._flat[len(self._sent) :]:
            self._send(flat)
        for work in self._sent:
            work.wait()
        self._sent = []

    def release(self) -> None:
        """Be told of nothing any more."""
        for total in self._joined.values():
            products.ADDED.pop(total.data_ptr(), None)

    def _laid_out(self, units: list[Unit]) -> Tensor:
        """A buffer for units, and the views into it."""
        everything = [parameter for unit in units for parameter in unit]
        flat = torch.zeros(
            sum(parameter.numel() for parameter in everything), device=everything[0].device, dtype=everything[0].dtype
        )
        start = 0
        for unit in units:
            first = start
            for parameter in unit:
                # `data`: to autograd each is a tensor of its own, which is not changed when its neighbours are.
                self._views[id(parameter)] = flat[start : start + parameter.numel()].view_as(parameter).data
                start += parameter.numel()
            self._joined[id(unit[0])] = flat[first:start].view(-1, *unit[0].shape[1:]).data
        return flat

    def _arrived(self, bucket: int) -> None:
        """Send what is complete. In the order of the buckets, which is that of every process."""
        if self._left is None:
            return
        self._left[bucket] -= 1
        while (number := len(self._sent)) < self._early and self._left[number] == 0:
            self._send(self._flat[number])

    def _send(self, flat: Tensor) -> None:
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append(work)


def _grouped(units: Sequence[Unit]) -> list[list[Unit]]:
    """Neighbours of one dtype together, up to the size of a bucket."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        own = sum(parameter.numel() * parameter.element_size() for parameter in unit)
        if not groups or size + own > BUCKET_BYTES or groups[-1][0][0].dtype != unit[0].dtype:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += own
    return groups
