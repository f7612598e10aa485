"""Choosing the next token from its logits. Chance comes from the generator that is handed in, one number a token."""

from collections.abc import Sequence

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
    probabilities, ids = kept(logits, sampling)
    # float64 and the sum itself, so that the last token is reached whatever was lost by rounding.
    sums = probabilities.to(torch.float64).cumsum(0)
    place = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1]
    return int(ids[min(int(torch.searchsorted(sums, place, right=True)), len(ids) - 1)])


def penalised(logits: Tensor, penalty: float | None, seen: Sequence[int]) -> Tensor:
    """Logits in which tokens of the text so far are less likely; see `Sampling.repetition_penalty`."""
    assert penalty is not None
    ids = torch.tensor(sorted(set(seen)))
    chosen = logits[ids]
    return logits.scatter(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the tokens that may be drawn, the most likely first; they need not add up to 1."""
    count = min(sampling.top_k or len(logits), len(logits))
    logits, ids = (logits / sampling.temperature).topk(count)
    probabilities = torch.softmax(logits, dim=-1)
    allowed = torch.ones(count, dtype=torch.bool)
    if sampling.top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        allowed &= before < sampling.top_p
    if sampling.min_p is not None:
        allowed &= probabilities >= sampling.min_p * probabilities[0]
    allowed &= probabilities > 0
    allowed[0] = True
    return probabilities[allowed], ids[allowed]
