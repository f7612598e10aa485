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
from llama_lab.training.worker import Worker

BUCKET_BYTES = 2**26
"""Large enough for the full speed of the links, small enough that little is left to send when the last backward ends."""


class GradientBuckets:
    """The buffers.

    Args:
        parameters: all that are trained, in the model's order.
        added: which of them get their gradients by `products.add_…`, by identity; those are sent as they are ready. Backward meets
            the model's end first, so buffers are filled from there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], worker: Worker, *, added: Sequence[Tensor] = ()) -> None:
        self._worker = worker
        early = {id(parameter) for parameter in added}
        backwards = list(reversed(parameters))
        groups = _grouped([parameter for parameter in backwards if id(parameter) in early])
        self._early = len(groups)
        groups += _grouped([parameter for parameter in backwards if id(parameter) not in early])
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._flat: list[Tensor] = []
        self._sizes = [len(group) for group in groups]
        for number, group in enumerate(groups):
            flat = torch.zeros(sum(parameter.numel() for parameter in group), device=group[0].device, dtype=group[0].dtype)
            parts = flat.split([parameter.numel() for parameter in group])
            # `data`: to autograd each is a tensor of its own, which is not changed when its neighbours are.
            views = [part.view_as(parameter).data for part, parameter in zip(parts, group, strict=True)]
            self._flat.append(flat)
            self._views += zip(group, views, strict=True)
            if number < self._early and worker.is_grouped:
                for view in views:
                    products.ADDED[view.data_ptr()] = partial(self._arrived, number)
        self._left: list[int] | None = None
        self._sent: list[dist.Work] = []

    def view(self, parameter: Tensor) -> Tensor:
        """What a parameter's gradient is added to."""
        return next(view for other, view in self._views if other is parameter)

    def begin(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self._flat)
        for parameter, view in self._views:
            parameter.grad = view

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
        for _, view in self._views:
            products.ADDED.pop(view.data_ptr(), None)

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


def _grouped(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours of one dtype together, up to the size of a bucket."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if not groups or size + own > BUCKET_BYTES or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += own
    return groups
