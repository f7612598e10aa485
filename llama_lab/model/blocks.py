"""What a transformer block is made of besides attention: RMSNorm, the SwiGLU, a linear layer without bias."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llama_lab.model.joined import gated
from llama_lab.model.products import WeightCopy


class Linear(nn.Linear):
    """A matrix product without bias. Weights are NaN until `initialise` or a checkpoint fills them.

    Attributes:
        copy: of the weight, which inputs of its dtype are multiplied with instead; set by training, on a GPU.
    """

    copy: WeightCopy | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.copy = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.copy is not None and x.dtype == self.copy.weight.dtype:
            return self.copy(x)
        return functional.linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Draw nothing: torch's own draw would cost time and move the global random state."""
        nn.init.constant_(self.weight, float("nan"))


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then each channel by a learned gain.

    Source: arXiv:1910.07467. Unlike LayerNorm it neither centres nor shifts.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension, inside in float32, with the dtype of `x` in and out."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps) if torch.is_grad_enabled() else _normed(x, self.weight, self.eps)[0]
        wide = x.to(wide_dtype(x.dtype))
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same on a CPU, in a third of the time: in-place passes, and a backward written out.

    With h = x / rms and y = h w, the gradient of x is (gw - h mean(gw h)) / rms, where gw = gradient w.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse_rms = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.to(wide_dtype(x.dtype), copy=True).mul_(inverse_rms)
        gradient = gradient.to(normed.dtype, copy=True)
        gained = gradient * weight
        weight_gradient = gradient.mul_(normed).flatten(0, -2).sum(dim=0)
        along = (gained * normed).mean(dim=-1, keepdim=True)
        return gained.addcmul_(normed, along, value=-1).mul_(inverse_rms).to(x.dtype), weight_gradient.to(weight.dtype), None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x` normalised and scaled by the gains, and the inverse of its root mean square."""
    wide = x.to(wide_dtype(x.dtype), copy=True)
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    inverse_rms = mean_square.add_(eps).rsqrt_()
    return wide.mul_(inverse_rms).mul_(weight).to(x.dtype), inverse_rms


class SwiGLU(nn.Module):
    """The feed-forward layer: one projection, gated by the SiLU of another, projected back.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202, section 2 (there FFN_SwiGLU, with beta = 1).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden_dim)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)
        # Of gate and up together; set by training on a GPU.
        self.joined: WeightCopy | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        if self.joined is not None and self.down.copy is not None and x.dtype == self.joined.weight.dtype:
            return gated(x, self.joined, self.down.copy)
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are taken in: float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)
