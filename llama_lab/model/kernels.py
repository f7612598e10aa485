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
