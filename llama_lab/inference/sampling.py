"""Choosing the next token from its logits. Chance comes from the generator that is handed in, one number a token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama_lab.inference.options import Sampling


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """One token id: the most likely one at temperature 0, else drawn from what `sampling` leaves.

    Args:
        logits: (vocabulary,), float32, on the CPU, so that equal logits give equal tokens whatever computed them.
        generator: a CPU generator, which gives one number unless the temperature is 0.
        seen: ids of the text so far, for the repetition penalty.
    """
    if sampling.repetition_penalty not in (None, 1.0) and seen:
        logits = penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights, ids = kept(logits, sampling)
    sums = weights.cumsum()
    place = float(torch.rand((), generator=generator, dtype=torch.float64)) * sums[-1]
    # At most the last: rounding must not lead beyond it.
    return int(ids[min(int(sums.searchsorted(place, side="right")), len(ids) - 1)])


def penalised(logits: Tensor, penalty: float | None, seen: Sequence[int]) -> Tensor:
    """Logits in which tokens of the text so far are less likely; see `Sampling.repetition_penalty`."""
    assert penalty is not None
    ids = torch.tensor(sorted(set(seen)))
    chosen = logits[ids]
    return logits.scatter(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def kept(logits: Tensor, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens that may be drawn, and their probabilities in units of the largest.

    Returns:
        (tokens,) float64, above 0, and (tokens,) int64; the most likely first where `top_k` or `top_p` ask for an order.
    """
    ordered = sampling.top_k is not None or sampling.top_p is not None
    if ordered:
        best, places = logits.topk(min(sampling.top_k or len(logits), len(logits)))
        values, ids = best.numpy(), places.numpy()
    else:
        values, ids = logits.numpy(), np.arange(len(logits))
    # In float64 and in numpy, whose calls take a fraction of the time on so few numbers.
    weights = np.exp((values.astype(np.float64) - float(values[0] if ordered else values.max())) / sampling.temperature)
    allowed = weights > 0
    if sampling.top_p is not None:
        sums = weights.cumsum()
        allowed &= sums - weights < sampling.top_p * sums[-1]
    if sampling.min_p is not None:
        allowed &= weights >= sampling.min_p
    return weights[allowed], ids[allowed]
