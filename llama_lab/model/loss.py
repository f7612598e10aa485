"""Cross-entropy of the next token, from the last hidden vectors: the output projection is part of it.

Shapes: n positions, c channels, v vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llama_lab.model.blocks import wide_dtype

IGNORE = -100
"""Target of a position that is not trained on and not counted."""

_CHUNK = 512
"""Positions whose logits a CPU holds in float32 at once: few enough to stay in its cache."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Nats that the model needs to name the targets: the sum of -log p(target), not the mean.

    A sum adds up over micro-batches and processes of uneven length; whoever wants a mean divides once, by all targets.

    Args:
        hidden: (..., channels), the normalised end of the residual stream.
        weight: (vocabulary, channels), the output projection.
        targets: (...), int64 in [0, vocabulary), or `IGNORE`.

    Returns:
        Scalar, float32 (float64 for float64).
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    weight = weight.to(hidden.dtype)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _SummedCrossEntropy.apply(hidden, weight, targets, differentiated)
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.to(wide_dtype(logits.dtype)), targets, reduction="sum", ignore_index=IGNORE)


class _SummedCrossEntropy(torch.autograd.Function):
    """The same on a CPU: float32 logits exist a chunk at a time, and become their own gradient in place.

    The gradient of the logits is softmax - one_hot(target), which forward has at hand, so it goes on to the gradients of
    `hidden` and `weight` there and then; backward only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, differentiated: bool) -> Tensor:
        counted = targets != IGNORE
        index = torch.where(counted, targets, 0).unsqueeze(1)
        counted = counted.unsqueeze(1).to(wide_dtype(hidden.dtype))
        logits_nv = functional.linear(hidden, weight)
        nats = counted.new_zeros(())
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = logits_nv[rows].to(counted.dtype, copy=True)
            chunk.sub_(chunk.amax(dim=1, keepdim=True))
            target_logits = chunk.gather(1, index[rows])
            total = chunk.exp_().sum(dim=1, keepdim=True)
            nats += ((total.log() - target_logits) * counted[rows]).sum()
            if differentiated:
                chunk.mul_(counted[rows] / total).scatter_add_(1, index[rows], -counted[rows])
                logits_nv[rows] = chunk
        if differentiated:
            ctx.save_for_backward(logits_nv @ weight, logits_nv.t() @ hidden)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        gradient = gradient.to(hidden_gradient.dtype)
        return hidden_gradient * gradient, weight_gradient * gradient, None, None
