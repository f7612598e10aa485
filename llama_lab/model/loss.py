"""Cross-entropy of the next token, from the last hidden vectors: the output projection is part of it.

Shapes: n positions, c channels, v vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llama_lab.config.targets import IGNORE
from llama_lab.model.blocks import wide_dtype
from llama_lab.model.products import WeightCopy

_CHUNK = 512
"""Positions whose logits a CPU holds in float32 at once: few enough to stay in its cache."""
_CUDA_CHUNK = 2**27
"""Logits that a GPU holds at once: a quarter of a gigabyte in bfloat16, and still products large enough to run at full speed."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, copy: WeightCopy | None = None) -> Tensor:
    """Nats that the model needs to name the targets: the sum of -log p(target), not the mean.

    A sum adds up over micro-batches and processes of uneven length; whoever wants a mean divides once, by all targets.

    Args:
        hidden: (..., channels), the normalised end of the residual stream.
        weight: (vocabulary, channels), the output projection.
        targets: (...), int64 in [0, vocabulary), or `IGNORE`.
        copy: of the weight, to multiply with instead; the weight's gradient is then added to the copy's sum.

    Returns:
        Scalar, float32 (float64 for float64).
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if copy is not None and hidden.dtype != copy.weight.dtype:
        copy = None
    weight = weight.to(hidden.dtype) if copy is None else copy.weight
    if hidden.device.type == "cuda" and hidden.dtype is not torch.float64:
        if torch.is_grad_enabled():
            return _CudaCrossEntropy.apply(hidden, weight, None if copy is None else copy.total, targets)
        return torch.ops.llama_lab.linear_cross_entropy(hidden, weight, targets, False)[0].sum()
    if copy is not None:
        logits = copy(hidden)
        return functional.cross_entropy(logits.to(wide_dtype(logits.dtype)), targets, reduction="sum", ignore_index=IGNORE)
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


@torch.library.custom_op("llama_lab::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, differentiated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of each position on a GPU, and the gradients of their sum, with the logits of few positions in memory at once.

    The gradient of the logits is at hand where they are, as on a CPU; keeping or repeating them for a backward would cost memory
    or a product.

    Args:
        hidden: (n, c).
        weight: (v, c), of the same dtype.
        targets: (n,).
        differentiated: whether gradients are wanted; they are empty otherwise.

    Returns:
        Nats (n,) in float32, the gradient of `hidden` in its dtype, that of `weight` in float32.
    """
    from llama_lab.model.kernels import cross_entropy_in_place

    positions, vocab = len(hidden), len(weight)
    nats, hidden_gradient, weight_gradient = _outputs(hidden, weight, differentiated)
    chunk = max(128, _CUDA_CHUNK // vocab // 128 * 128)
    logits_nv = hidden.new_empty(min(chunk, positions), vocab)
    for start in range(0, positions, chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows]
        logits = torch.mm(part, weight.t(), out=logits_nv[: len(part)])
        cross_entropy_in_place(logits, targets[rows], nats[rows], ignore=IGNORE, differentiated=differentiated)
        if differentiated:
            torch.mm(logits, weight, out=hidden_gradient[rows])
            if hidden.dtype is weight_gradient.dtype:
                weight_gradient.addmm_(logits.t(), part, beta=float(start > 0))
            else:
                beta = float(start > 0)
                torch.addmm(weight_gradient, logits.t(), part, beta=beta, out_dtype=weight_gradient.dtype, out=weight_gradient)
    return nats, hidden_gradient, weight_gradient


@linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, differentiated: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, differentiated)


def _outputs(hidden: Tensor, weight: Tensor, differentiated: bool) -> tuple[Tensor, Tensor, Tensor]:
    nats = hidden.new_empty(len(hidden), dtype=torch.float32)
    if not differentiated:
        return nats, hidden.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    return nats, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


class _CudaCrossEntropy(torch.autograd.Function):
    """The same on a GPU. The gradient of the weight goes to a sum where there is one, else to autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, total: Tensor | None, targets: Tensor) -> Tensor:
        nats, hidden_gradient, weight_gradient = torch.ops.llama_lab.linear_cross_entropy(hidden, weight, targets, True)
        ctx.save_for_backward(hidden_gradient, weight_gradient, total)
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_gradient, weight_gradient, total = ctx.saved_tensors
        # In float32: the scale of a mean over many tokens, rounded to bfloat16, would be off by the same factor everywhere.
        scaled = (hidden_gradient.float() * gradient).to(hidden_gradient.dtype)
        if total is None:
            return scaled, (weight_gradient * gradient).to(hidden_gradient.dtype), None, None
        torch.ops.llama_lab.add_scaled(total, weight_gradient, gradient)
        return scaled, None, None, None
