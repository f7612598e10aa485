"""Layers of a block computed together in training on a GPU: queries, keys and values; gate, up and down.

What reads the same input is one product, forward and backward, so the input's gradient is written once instead of two or three
times and added up. What stands between products is one kernel that writes where the next product reads. The weights and their
names are those of the separate layers; `attention` and `blocks` say what is computed.

Shapes: b batch, t time, n = b t, c channels, h query heads, g key/value heads, d head_dim, f width of the feed-forward layer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llama_lab.model.products import WeightCopy, backward_of, multiply

LARGEST = 256
"""Places among which kernels spread a largest magnitude, lest all wait for one."""


def rotated_heads(x_btc: Tensor, copy: WeightCopy, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries and keys, turned by their positions, and values.

    Args:
        x_btc: in the copy's dtype.
        copy: of the weights of queries, keys and values, in this order.
        cos, sin: (t, d / 2).

    Returns:
        (b, h, t, d), (b, g, t, d), (b, g, t, d), views of one tensor.
    """
    if torch.is_grad_enabled():
        return _RotatedHeads.apply(x_btc, copy.total, cos, sin, heads, kv_heads, *copy.operands())
    return _heads(functional.linear(x_btc, copy.weight), cos, sin, heads, kv_heads)


def gated(x_btc: Tensor, both: WeightCopy, down: WeightCopy) -> Tensor:
    """down(silu(gate(x)) * up(x)), same shape as `x_btc`.

    Args:
        x_btc: in the copies' dtype.
        both: copy of the weights of gate and up, in this order.
        down: copy of the other one.
    """
    if torch.is_grad_enabled():
        operands = both.operands()
        return _Gated.apply(x_btc, both.total, down.total, len(operands), *operands, *down.operands())
    gate, up = functional.linear(x_btc, both.weight).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down.weight)


def _heads(y_btc: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Rotate in place, and split."""
    head_dim = y_btc.shape[-1] // (heads + 2 * kv_heads)
    torch.ops.llama_lab.rotate_heads(y_btc.flatten(0, -2), cos, sin, head_dim, heads + kv_heads)
    parts = y_btc.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=2)
    return tuple(part.transpose(1, 2) for part in parts)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_btc: Tensor, total: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        y_nc, kept = multiply(x_btc.flatten(0, -2), operands)
        ctx.save_for_backward(total, cos, sin, *operands, *kept)
        ctx.operands = len(operands)
        return _heads(y_nc.unflatten(0, x_btc.shape[:-1]), cos, sin, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, cos, sin, *rest = ctx.saved_tensors
        operands, kept = rest[: ctx.operands], rest[ctx.operands :]
        batch, _, length, _ = gradients[0].shape
        gradient_nc = torch.ops.llama_lab.pack_turned_back(*gradients, cos, sin)
        x_gradient = backward_of(gradient_nc, kept, operands, total)
        return x_gradient.unflatten(0, (batch, length)), *(None for _ in range(5 + len(operands)))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btc: Tensor, both_total: Tensor, down_total: Tensor, count: int, *operands: Tensor) -> Tensor:
        both_nf, kept = multiply(x_btc.flatten(0, -2), operands[:count])
        gate, up = both_nf.chunk(2, dim=-1)
        y_nc, hidden_kept = multiply(functional.silu(gate) * up, operands[count:])
        # In bfloat16 its input is computed again beside its gradient; what float8 keeps of it is half as large and was costly.
        ctx.save_for_backward(both_total, down_total, both_nf, *operands, *kept, *(hidden_kept if count > 1 else ()))
        ctx.count = count
        return y_nc.unflatten(0, x_btc.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        both_total, down_total, both_nf, *rest = ctx.saved_tensors
        count = ctx.count
        both_operands, down_operands, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        gradient_nc = gradient.flatten(0, -2)
        if count == 1:
            hidden_gradient_nf = gradient_nc @ down_operands[0]
            both_gradient_nf, hidden_nf = torch.ops.llama_lab.gate_gradient(both_nf, hidden_gradient_nf)
            torch.ops.llama_lab.add_weight_gradient(down_total, gradient_nc, hidden_nf)
            x_gradient = backward_of(both_gradient_nf, kept, both_operands, both_total)
        else:
            hidden_gradient_nf = backward_of(gradient_nc, kept[2:], down_operands, down_total)
            both_gradient_nf, largest = torch.ops.llama_lab.measured_gate_gradient(both_nf, hidden_gradient_nf)
            x_gradient = backward_of(both_gradient_nf, kept[:2], both_operands, both_total, largest.amax())
        return x_gradient.unflatten(0, gradient.shape[:-1]), *(None for _ in range(3 + 2 * count))


@torch.library.custom_op("llama_lab::rotate_heads", mutates_args=("values",))
def rotate_heads(values: Tensor, cos: Tensor, sin: Tensor, head_dim: int, heads: int) -> None:
    """Turn the first `heads` heads of (n, c) by the angles of their positions, in place."""
    if values.is_cuda:
        from llama_lab.model.kernels import rotate_in_place

        rotate_in_place(values, cos.contiguous(), sin.contiguous(), head_dim=head_dim, heads=heads)
        return
    halves = values.view(-1, len(cos), values.shape[1] // head_dim, head_dim)[:, :, :heads].chunk(2, dim=-1)
    (first, second), (wide_cos, wide_sin) = (half.float() for half in halves), (table.float().unsqueeze(1) for table in (cos, sin))
    # Both are computed before either is written: in float32 they are read where they are written.
    for half, turned in zip(halves, (first * wide_cos - second * wide_sin, second * wide_cos + first * wide_sin), strict=True):
        half.copy_(turned)


@rotate_heads.register_fake
def _(values: Tensor, cos: Tensor, sin: Tensor, head_dim: int, heads: int) -> None:
    return None


@torch.library.custom_op("llama_lab::pack_turned_back", mutates_args=())
def pack_turned_back(queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of what `rotate_heads` and the split gave, as that of the product before them, (n, c)."""
    packed = _packed(queries, keys)
    if queries.is_cuda:
        from llama_lab.model.kernels import pack_turned_back as pack

        pack([queries, keys, values], cos.contiguous(), sin.contiguous(), packed)
        return packed
    torch.cat([part.transpose(1, 2) for part in (queries, keys, values)], dim=2, out=packed.view(*_by_heads(queries, keys)))
    rotate_heads(packed, cos, -sin, queries.shape[3], queries.shape[1] + keys.shape[1])
    return packed


@pack_turned_back.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _packed(queries, keys)


def _by_heads(queries: Tensor, keys: Tensor) -> tuple[int, int, int, int]:
    batch, heads, length, head_dim = queries.shape
    return batch, length, heads + 2 * keys.shape[1], head_dim


def _packed(queries: Tensor, keys: Tensor) -> Tensor:
    batch, length, heads, head_dim = _by_heads(queries, keys)
    return queries.new_empty(batch * length, heads * head_dim)


@torch.library.custom_op("llama_lab::gate_gradient", mutates_args=())
def gate_gradient(both: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """From gate and up beside each other, (n, 2 f), and the gradient of silu(gate) * up: that of `both`, and the product itself."""
    both_gradient, hidden = torch.empty_like(both), torch.empty_like(gradient)
    if both.is_cuda:
        from llama_lab.model.kernels import gate_gradient as fill

        fill(both.contiguous(), gradient.contiguous(), both_gradient, hidden=hidden)
    else:
        hidden.copy_(_gate_gradient(both, gradient, both_gradient))
    return both_gradient, hidden


@gate_gradient.register_fake
def _(both: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(both), torch.empty_like(gradient)


@torch.library.custom_op("llama_lab::measured_gate_gradient", mutates_args=())
def measured_gate_gradient(both: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The same gradient, and largest magnitudes in it, float32: in parts, the largest of which is that of all."""
    both_gradient, largest = torch.empty_like(both), both.new_zeros(LARGEST, dtype=torch.float32)
    if both.is_cuda:
        from llama_lab.model.kernels import gate_gradient as fill

        fill(both.contiguous(), gradient.contiguous(), both_gradient, largest=largest)
    else:
        _gate_gradient(both, gradient, both_gradient)
        largest[0] = both_gradient.abs().amax()
    return both_gradient, largest


@measured_gate_gradient.register_fake
def _(both: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(both), both.new_empty(LARGEST, dtype=torch.float32)


def _gate_gradient(both: Tensor, gradient: Tensor, both_gradient: Tensor) -> Tensor:
    """Fill in the gradient, and return the product."""
    gate, up, upstream = (part.float() for part in (*both.chunk(2, dim=-1), gradient))
    share = gate.sigmoid()
    of_gate, of_up = both_gradient.chunk(2, dim=-1)
    of_gate.copy_(upstream * up * share * (1 + gate * (1 - share)))
    of_up.copy_(upstream * gate * share)
    return gate * share * up
