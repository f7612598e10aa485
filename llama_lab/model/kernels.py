# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
"""GPU kernels of our own, in Triton; imported only where there is a GPU. Each has a test against plain torch in float64."""

import triton
import triton.language as tl
from torch import Tensor

ONE_PASS = 16_384
"""Longest vocabulary whose logits of one position stay in registers between the two uses."""


@triton.jit
def _cross_entropy(logits, targets, nats, vocab, ignore, differentiated: tl.constexpr, one_pass: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    counted = target != ignore
    columns = tl.arange(0, block)
    if one_pass:
        values = tl.load(logits + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32)
        largest = tl.max(values, 0)
        total = tl.sum(tl.exp(values - largest), 0)
    else:
        # Each lane keeps the largest value it has seen and the sum relative to it; they are brought together once, at the end.
        lane_largest = tl.full((block,), -float("inf"), tl.float32)
        lane_total = tl.zeros((block,), tl.float32)
        for start in range(0, vocab, block):
            inside = start + columns < vocab
            values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(lane_largest, values)
            lane_total = tl.where(inside, lane_total * tl.exp(lane_largest - larger) + tl.exp(values - larger), lane_total)
            lane_largest = tl.where(inside, larger, lane_largest)
        largest = tl.max(lane_largest, 0)
        total = tl.sum(lane_total * tl.exp(lane_largest - largest), 0)
    if counted:
        target_logit = tl.load(logits + target).to(tl.float32)
        tl.store(nats + row, tl.log(total) + largest - target_logit)
    else:
        tl.store(nats + row, 0.0)
    if differentiated:
        # The logit of the target is read by all before any of them is overwritten.
        tl.debug_barrier()
        weight = tl.where(counted, 1.0, 0.0)
        if one_pass:
            gradient = (tl.exp(values - largest) / total - tl.where(columns == target, 1.0, 0.0)) * weight
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab)
        else:
            for start in range(0, vocab, block):
                at = start + columns
                values = tl.load(logits + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                gradient = (tl.exp(values - largest) / total - tl.where(at == target, 1.0, 0.0)) * weight
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < vocab)


def cross_entropy_in_place(logits_nv: Tensor, targets_n: Tensor, nats_n: Tensor, *, ignore: int, differentiated: bool) -> None:
    """Nats of each position's target from its logits, computed in float32, which then become the gradient of the summed nats.

    One read and one write of the logits up to `ONE_PASS` entries, one read more beyond.

    Args:
        logits_nv: (n, v), contiguous; overwritten by softmax - one_hot(target), or zeros where the target is `ignore`.
        targets_n: (n,), int64 in [0, v), or `ignore`.
        nats_n: (n,), float32, written.
        ignore: target of a position that does not count.
        differentiated: whether the gradient is wanted; the logits are left as they are otherwise.
    """
    vocab = logits_nv.shape[1]
    one_pass = vocab <= ONE_PASS
    block = triton.next_power_of_2(vocab) if one_pass else 4096
    warps = max(4, min(16, block // 512))
    _cross_entropy[(len(logits_nv),)](
        logits_nv, targets_n, nats_n, vocab, ignore, differentiated=differentiated, one_pass=one_pass, block=block, num_warps=warps
    )


@triton.jit
def _rotate(values, cos, sin, row_stride, length, head_dim, heads, block_heads: tl.constexpr, block_half: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    half = head_dim // 2
    head = tl.arange(0, block_heads)[:, None]
    pair = tl.arange(0, block_half)[None, :]
    inside = (head < heads) & (pair < half)
    angle = (row % length) * half + pair
    c = tl.load(cos + angle, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < half, other=0.0).to(tl.float32)
    at = values + row * row_stride + head * head_dim + pair
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * c - second * s).to(values.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * c + first * s).to(values.dtype.element_ty), mask=inside)


def rotate_in_place(values_nc: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, heads: int) -> None:
    """Turn the first `heads` heads of each row by the angles of its position, as `rotary.rotate` does.

    Args:
        values_nc: (batch x time, channels), rows of contiguous channels; overwritten.
        cos, sin: (time, head_dim / 2), contiguous.
    """
    _rotate[(len(values_nc),)](
        values_nc,
        cos,
        sin,
        values_nc.stride(0),
        len(cos),
        head_dim,
        heads,
        block_heads=triton.next_power_of_2(heads),
        block_half=triton.next_power_of_2(head_dim // 2),
    )


@triton.jit
def _pack(part, out, cos, sin, batch_stride, head_stride, time_stride, row_stride, length, head_dim, heads, offset,
          turned: tl.constexpr, block_heads: tl.constexpr, block_half: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = head_dim // 2
    head = tl.arange(0, block_heads)[:, None]
    pair = tl.arange(0, block_half)[None, :]
    inside = (head < heads) & (pair < half)
    place = row % length
    at = part + (row // length) * batch_stride + place * time_stride + head * head_stride + pair
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if turned:
        c = tl.load(cos + place * half + pair, mask=pair < half, other=0.0).to(tl.float32)
        s = tl.load(sin + place * half + pair, mask=pair < half, other=0.0).to(tl.float32)
        first, second = first * c + second * s, second * c - first * s
    to = out + row * row_stride + offset + head * head_dim + pair
    tl.store(to, first.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, second.to(out.dtype.element_ty), mask=inside)


def pack_turned_back(parts: list[Tensor], cos: Tensor, sin: Tensor, out_nc: Tensor) -> None:
    """Gradients of rotated queries, of rotated keys and of values, turned back, beside each other.

    Args:
        parts: three of (batch, heads, time, head_dim), in any memory order that keeps a head's channels together.
        cos, sin: (time, head_dim / 2), contiguous.
        out_nc: (batch x time, channels of all three), contiguous; written.
    """
    offset = 0
    for number, part in enumerate(parts):
        _, heads, length, head_dim = part.shape
        if part.stride(3) != 1:
            part = part.contiguous()
        _pack[(len(out_nc),)](
            part,
            out_nc,
            cos,
            sin,
            part.stride(0),
            part.stride(1),
            part.stride(2),
            out_nc.stride(0),
            length,
            head_dim,
            heads,
            offset,
            turned=number < 2,
            block_heads=triton.next_power_of_2(heads),
            block_half=triton.next_power_of_2(head_dim // 2),
        )
        offset += heads * head_dim


@triton.jit
def _gate_gradient(both, gradient, both_gradient, hidden, largest, width, places,
                   with_hidden: tl.constexpr, with_largest: tl.constexpr, block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    open_gate = gate * share
    dtype = both.dtype.element_ty
    of_gate = (upstream * up * share * (1.0 + gate * (1.0 - share))).to(dtype)
    of_up = (upstream * open_gate).to(dtype)
    tl.store(both_gradient + row * 2 * width + column, of_gate, mask=inside)
    tl.store(both_gradient + row * 2 * width + width + column, of_up, mask=inside)
    if with_hidden:
        tl.store(hidden + row * width + column, (open_gate * up).to(dtype), mask=inside)
    if with_largest:
        # As they were rounded. The order in which programs come makes no difference to a maximum.
        found = tl.max(tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32))), 0)
        tl.atomic_max(largest + row % places, found)


def gate_gradient(
    both_nf: Tensor, gradient_nf: Tensor, both_gradient_nf: Tensor, *, hidden: Tensor | None = None, largest: Tensor | None = None
) -> None:
    """The backward of silu(gate) * up, in one pass over memory.

    Args:
        both_nf: (n, 2 f), gate and up beside each other, contiguous like all others.
        gradient_nf: (n, f), of the product.
        both_gradient_nf: (n, 2 f); written.
        hidden: (n, f), the product itself; written.
        largest: any number of places, float32, at least 0; raised to magnitudes in `both_gradient_nf`, the largest in one of them.
    """
    width = gradient_nf.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    _gate_gradient[(len(gradient_nf), triton.cdiv(width, block))](
        both_nf,
        gradient_nf,
        both_gradient_nf,
        hidden,
        largest,
        width,
        1 if largest is None else len(largest),
        with_hidden=hidden is not None,
        with_largest=largest is not None,
        block=block,
        num_warps=max(1, min(8, block // 256)),
    )


@triton.jit
def _cast_both_ways(x, scale, values, turned, rows, columns, limit, block_rows: tl.constexpr, block_columns: tl.constexpr):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    column = (tl.program_id(1) * block_columns + tl.arange(0, block_columns)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    narrow = tl.minimum(tl.maximum(wide, -limit), limit).to(values.dtype.element_ty)
    tl.store(values + at, narrow, mask=inside)
    inside_turned = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(turned + column[:, None] * rows + row[None, :], tl.trans(narrow), mask=inside_turned)


def cast_both_ways(x_nc: Tensor, scale: Tensor, values_nc: Tensor, turned_cn: Tensor, *, limit: float) -> None:
    """x / scale within +- limit in a narrow dtype, as it is and turned, with one read.

    Args:
        x_nc: (n, c), contiguous like all others.
        scale: float32 scalar, positive.
        values_nc, turned_cn: (n, c) and (c, n); written.
    """
    rows, columns = x_nc.shape
    block_rows, block_columns = 128, 64
    _cast_both_ways[(triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))](
        x_nc, scale, values_nc, turned_cn, rows, columns, limit, block_rows=block_rows, block_columns=block_columns, num_warps=8
    )
