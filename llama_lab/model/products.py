"""Matrix products of training in low precision: copies of the weights to multiply with, and where the weights' gradients add up.

The weights stay in float32 and are what the optimizer moves. Multiplying takes a copy of each in bfloat16 or float8, made once an
update instead of once a pass; weights that read the same input are copied below each other, so that one product serves them. The
gradient of a weight is added by the product that computes it to a sum in float32, which is the parameter's `.grad`: autograd would
write it in bfloat16, widen it, and add it to the sum in three passes over memory.

Shapes: n positions, i channels in, o channels out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ADDED: dict[int, Callable[[], None]] = {}
"""What is called when something was added to a sum, by the address of the sum: how data parallelism learns what is ready."""

FORWARD_FP8, BACKWARD_FP8 = torch.float8_e4m3fn, torch.float8_e5m2
"""Activations and weights need digits, gradients need range."""
MULTIPLE_FP8 = 16
"""All sides of a float8 product are multiples of it: widths, and the positions for the weights' gradients, as `resolve` demands."""


class WeightCopy(nn.Module):
    """Weights in the dtype that products are computed in, below each other.

    Args:
        weights: (o, i) each, float32, with one i; the copy is only ever as new as the last `refresh`.
        total: (sum of o, i), float32, what gradients are added to.
        is_fp8: multiply in float8, with one scale for each tensor, found anew for every product. Without gradients the product is
            that of bfloat16 all the same, as in a model that is loaded later.
    """

    weight: Tensor
    total: Tensor
    forward_weight: Tensor
    backward_weight: Tensor
    scale: Tensor

    def __init__(self, weights: Sequence[Tensor], total: Tensor, *, is_fp8: bool = False) -> None:
        super().__init__()
        # Not registered: they are the layers' own.
        self._sources = tuple(weights)
        self.is_fp8 = is_fp8
        (rows, columns), device = total.shape, total.device
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.bfloat16, device=device), persistent=False)
        self.register_buffer("total", total, persistent=False)
        if is_fp8:
            self.register_buffer("forward_weight", torch.empty(rows, columns, dtype=FORWARD_FP8, device=device), persistent=False)
            self.register_buffer("backward_weight", torch.empty(columns, rows, dtype=FORWARD_FP8, device=device), persistent=False)
            self.register_buffer("scale", torch.ones((), device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, i) in bfloat16 to (…, sum of o)."""
        if torch.is_grad_enabled():
            return _Product.apply(x, self.total, *self.operands())
        return functional.linear(x, self.weight)

    def operands(self) -> tuple[Tensor, ...]:
        """What `multiply` and `backward_of` take."""
        return (self.forward_weight, self.backward_weight, self.scale) if self.is_fp8 else (self.weight,)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight, and its part of the copy."""
        sizes = [len(weight) for weight in self._sources]
        return list(zip((weight.detach() for weight in self._sources), self.weight.split(sizes), strict=True))

    def quantise(self, largest: Tensor) -> None:
        """Make the float8 copies what the bfloat16 one is, whose largest magnitude is given."""
        self.scale.copy_(_scale(largest, FORWARD_FP8))
        _fill_both_ways(self.weight, self.scale, self.forward_weight, self.backward_weight)


@torch.no_grad()
def refresh(copies: Sequence[WeightCopy]) -> None:
    """Make the copies what the weights have become."""
    pairs = [pair for copy in copies for pair in copy.parts()]
    if pairs:
        torch._foreach_copy_([part for _, part in pairs], [weight for weight, _ in pairs])
    in_fp8 = [copy for copy in copies if copy.is_fp8]
    if in_fp8:
        found = torch._foreach_norm([copy.weight for copy in in_fp8], float("inf"))
        for copy, largest in zip(in_fp8, found, strict=True):
            copy.quantise(largest)


def quantised(x_nc: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in a float8 dtype whose largest magnitude is the dtype's largest.

    Args:
        largest: magnitude in `x_nc`, a scalar; found where it is not known.

    Returns:
        (n, c), the same turned, (c, n), and the scale that both are multiplied with to turn them back.
    """
    scale = _scale(x_nc.abs().amax() if largest is None else largest, dtype)
    return *torch.ops.llama_lab.cast_both_ways(x_nc, scale, dtype), scale


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return largest.float().clamp(min=1e-12) / torch.finfo(dtype).max


@torch.library.custom_op("llama_lab::cast_both_ways", mutates_args=())
def cast_both_ways(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in a float8 dtype, (n, c) and turned, (c, n): float8 products read rows on both sides."""
    values, turned = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)
    _fill_both_ways(x, scale, values, turned)
    return values, turned


@cast_both_ways.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)


def _fill_both_ways(x_nc: Tensor, scale: Tensor, values_nc: Tensor, turned_cn: Tensor) -> None:
    limit = torch.finfo(values_nc.dtype).max
    if x_nc.is_cuda:
        from llama_lab.model.kernels import cast_both_ways as fill

        fill(x_nc.contiguous(), scale, values_nc, turned_cn, limit=limit)
        return
    values_nc.copy_((x_nc.float() / scale).clamp(-limit, limit))
    turned_cn.copy_(values_nc.t())


def multiply(x_ni: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x W^T, (n, o), and what `backward_of` needs of x."""
    if len(operands) == 1:
        return functional.linear(x_ni, operands[0]), (x_ni,)
    forward_weight, _, scale = operands
    x_fp8, turned_fp8, x_scale = quantised(x_ni, FORWARD_FP8)
    product = torch._scaled_mm(x_fp8, forward_weight.t(), x_scale, scale, out_dtype=x_ni.dtype, use_fast_accum=True)
    return product, (turned_fp8, x_scale)


def backward_of(
    gradient_no: Tensor, kept: Sequence[Tensor], operands: Sequence[Tensor], total: Tensor, largest: Tensor | None = None
) -> Tensor:
    """Add the gradient of the weights to their sum, and return that of x, (n, i).

    Args:
        gradient_no: of the product.
        kept: what `multiply` returned of x.
        largest: magnitude in the gradient, where it is known already.
    """
    if len(operands) == 1:
        torch.ops.llama_lab.add_weight_gradient(total, gradient_no, kept[0])
        return gradient_no @ operands[0]
    _, backward_weight, scale = operands
    x_turned_fp8, x_scale = kept
    gradient_fp8, turned_fp8, gradient_scale = quantised(gradient_no, BACKWARD_FP8, largest)
    torch.ops.llama_lab.add_fp8_weight_gradient(total, turned_fp8, x_turned_fp8, gradient_scale, x_scale)
    return torch._scaled_mm(
        gradient_fp8, backward_weight.t(), gradient_scale, scale, out_dtype=gradient_no.dtype, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    """x W^T, whose backward adds the gradient of W to a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, *operands: Tensor) -> Tensor:
        product, kept = multiply(x.flatten(0, -2), operands)
        ctx.save_for_backward(total, *operands, *kept)
        ctx.operands = len(operands)
        return product.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, *rest = ctx.saved_tensors
        operands, kept = rest[: ctx.operands], rest[ctx.operands :]
        x_gradient = backward_of(gradient.flatten(0, -2), kept, operands, total)
        return x_gradient.unflatten(0, gradient.shape[:-1]), None, *(None for _ in operands)


@torch.library.custom_op("llama_lab::add_weight_gradient", mutates_args=("total",))
def add_weight_gradient(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add gradient^T x to a sum.

    Args:
        total: (o, i), float32.
        gradient: (n, o), of the outputs.
        x: (n, i), the inputs.
    """
    if total.is_cuda and x.dtype is not total.dtype:
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), x.to(total.dtype))
    _tell(total)


@add_weight_gradient.register_fake
def _(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    return None


@torch.library.custom_op("llama_lab::add_fp8_weight_gradient", mutates_args=("total",))
def add_fp8_weight_gradient(total: Tensor, gradient: Tensor, x: Tensor, gradient_scale: Tensor, x_scale: Tensor) -> None:
    """The same from float8.

    Args:
        total: (o, i), float32.
        gradient: (o, n), transposed, for the hardware multiplies rows.
        x: (i, n), likewise.
        gradient_scale, x_scale: what their values are multiplied with, float32 scalars.
    """
    total.add_(torch._scaled_mm(gradient, x.t(), gradient_scale, x_scale, out_dtype=torch.bfloat16))
    _tell(total)


@add_fp8_weight_gradient.register_fake
def _(total: Tensor, gradient: Tensor, x: Tensor, gradient_scale: Tensor, x_scale: Tensor) -> None:
    return None


@torch.library.custom_op("llama_lab::add_scaled", mutates_args=("total",))
def add_scaled(total: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """Add a gradient times a scalar to a sum of the same shape."""
    total.addcmul_(gradient, scale)
    _tell(total)


@add_scaled.register_fake
def _(total: Tensor, gradient: Tensor, scale: Tensor) -> None:
    return None


def _tell(total: Tensor) -> None:
    if (added := ADDED.get(total.data_ptr())) is not None:
        added()
