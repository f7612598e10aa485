"""Rotary position embeddings: the tables, and turning queries and keys by them.

Shapes: b batch, h heads, t time, d head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama_lab.config.schema import ModelConfig, RopeScaling


def rotary_tables(head_dim: int, length: int, theta: float, scaled_as: ModelConfig | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (length, head_dim / 2), float32.

    Computed in float32 on the CPU, then moved: angles far out in the context depend on the last bit of the frequencies, so
    this is both equal on every device and equal to what Hugging Face's Llama computes.

    Args:
        scaled_as: a model whose `rope_scaling` applies; None: the wavelengths are as `theta` gives them.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim)
    if scaled_as is not None:
        frequencies = scaled_frequencies(frequencies, scaled_as)
    angles = torch.outer(torch.arange(length, device="cpu", dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def scaled_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Angles per position, made smaller so that a model trained on short texts reads longer ones.

    `linear` divides all of them by `rope_factor`, as if positions lay closer together. `llama3` divides those of long wavelengths,
    which never came round in the context that the model was first trained with, leaves those of short ones, by which neighbours
    are told apart, and blends in between.

    Args:
        frequencies: radians a position, (head_dim / 2,), float32.

    Source: linear: Extending Context Window via Positional Interpolation, arXiv:2306.15595, section 2.2. llama3: that of the
    Llama 3.1 checkpoints, as Hugging Face's `rope_type="llama3"` computes it, in the same order of operations.
    """
    match config.rope_scaling:
        case None:
            return frequencies
        case RopeScaling.linear:
            return frequencies / config.rope_factor
        case RopeScaling.llama3:
            low, high = config.rope_low_freq, config.rope_high_freq
            wavelengths = 2 * math.pi / frequencies
            share = (config.rope_original_len / wavelengths - low) / (high - low)
            blended = (1 - share) * frequencies / config.rope_factor + share * frequencies
            scaled = torch.where(wavelengths > config.rope_original_len / low, frequencies / config.rope_factor, frequencies)
            between = (wavelengths >= config.rope_original_len / high) & (wavelengths <= config.rope_original_len / low)
            return torch.where(between, blended, scaled)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by an angle that grows with position.

    After it, the dot product of a query and a key depends only on their distance: the model's sole sense of order.

    Args:
        x: queries or keys, (batch, heads, time, head_dim), head_dim even, in any memory order.
        cos, sin: (time, head_dim / 2), of the dtype of `x`.

    Returns:
        Same shape and dtype as `x`, contiguous; every pair keeps its length.

    Source: RoFormer, arXiv:2104.09864, section 3.4.2. Pairs are (i, i + head_dim/2) as in Hugging Face checkpoints;
    Meta's own weights pair (2i, 2i+1) and need their q and k rows permuted on import.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin, 1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """The same on a CPU: four passes over half of the channels and no concatenation; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x_bhtd: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """`x` turned by the tables' angles (direction 1) or back (-1)."""
    turned = torch.empty(x_bhtd.shape, dtype=x_bhtd.dtype, device=x_bhtd.device)
    first, second = x_bhtd.chunk(2, dim=-1)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=direction)
    return turned
