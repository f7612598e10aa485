"""Matrix products of training in low precision: copies of the weights to multiply with, and where the weights' gradients add up.

The weights stay in float32 and are what the optimizer moves. Multiplying takes a copy of each in bfloat16 or float8, made once an
update instead of once a pass. The gradient of a weight is added by the product that computes it to a sum in float32, which is the
parameter's `.grad`: autograd would write it in bfloat16, widen it, and add it to the sum in three passes over memory. Nothing
here depends on what else is in the model, and a layer without a copy computes as any `nn.Linear`.

Shapes: n positions, i channels in, o channels out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ADDED: dict[int, Callable[[], None]] = {}
"""What is called when something was added to a sum, by the address of the sum: how data parallelism learns what is ready."""

FORWARD_FP8, BACKWARD_FP8 = torch.float8_e4m3fn, torch.float8_e5m2
"""Activations and weights need digits, gradients need range."""


class WeightCopy(nn.Module):
    """A linear layer's weight in the dtype that products are computed in.

    Args:
        weight: (o, i), float32; its copy is only ever as new as the last `refresh`.
        total: same shape, float32, what gradients are added to.
    """

    weight: Tensor
    total: Tensor

    def __init__(self, weight: Tensor, total: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().to(torch.bfloat16), persistent=False)
        self.register_buffer("total", total, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, i) in bfloat16 to (…, o)."""
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.total)
        return functional.linear(x, self.weight)


class Fp8WeightCopy(WeightCopy):
    """The same, multiplied in float8 with one scale for each tensor, which is found anew for every product.

    Without gradients it multiplies in bfloat16, as a model that is loaded later will.
    """

    forward_weight: Tensor
    backward_weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, total: Tensor) -> None:
        super().__init__(weight, total)
        outputs, inputs = weight.shape
        shared = {"dtype": FORWARD_FP8, "device": weight.device}
        self.register_buffer("forward_weight", torch.empty(outputs, inputs, **shared), persistent=False)
        self.register_buffer("backward_weight", torch.empty(inputs, outputs, **shared), persistent=False)
        self.register_buffer("scale", torch.ones((), device=weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, i) in bfloat16 to (…, o)."""
        if torch.is_grad_enabled():
            return _Fp8Product.apply(x, self.forward_weight, self.backward_weight, self.scale, self.total)
        return functional.linear(x, self.weight)

    def refresh(self) -> None:
        """Take over what the bfloat16 copy has become."""
        values, scale = quantised(self.weight, FORWARD_FP8)
        self.forward_weight.copy_(values)
        self.backward_weight.copy_(values.t())
        self.scale.copy_(scale)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in a float8 dtype whose largest value is the dtype's largest, and the scale that turns it back."""
    largest = x.abs().amax().float().clamp(min=1e-12)
    limit = torch.finfo(dtype).max
    return (x.float() * (limit / largest)).clamp(-limit, limit).to(dtype), largest / limit


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


class _Product(torch.autograd.Function):
    """x W^T, whose backward adds the gradient of W to a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, total = ctx.saved_tensors
        torch.ops.llama_lab.add_weight_gradient(total, gradient.flatten(0, -2), x.flatten(0, -2))
        return gradient @ weight, None, None


class _Fp8Product(torch.autograd.Function):
    """The same with all three products in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_weight: Tensor, backward_weight: Tensor, scale: Tensor, total: Tensor) -> Tensor:
        x_ni, x_scale = quantised(x.flatten(0, -2), FORWARD_FP8)
        ctx.save_for_backward(x_ni, x_scale, backward_weight, scale, total)
        y_no = torch._scaled_mm(x_ni, forward_weight.t(), x_scale, scale, out_dtype=x.dtype, use_fast_accum=True)
        return y_no.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x_ni, x_scale, backward_weight, scale, total = ctx.saved_tensors
        gradient_no, gradient_scale = quantised(gradient.flatten(0, -2), BACKWARD_FP8)
        x_gradient = torch._scaled_mm(
            gradient_no, backward_weight.t(), gradient_scale, scale, out_dtype=gradient.dtype, use_fast_accum=True
        )
        torch.ops.llama_lab.add_fp8_weight_gradient(
            total, gradient_no.t().contiguous(), x_ni.t().contiguous(), gradient_scale, x_scale
        )
        return x_gradient.unflatten(0, gradient.shape[:-1]), None, None, None, None
