"""Scoring held-out tokens: how many nats the model needs for them, and what that is per byte of text."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.nn import functional

from llama_lab.config.targets import IGNORE
from llama_lab.data.stream import TokenStream
from llama_lab.model.llama import Llama
from llama_lab.training.processes.stop import Stopped


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss_nats: mean of -ln p(token) over all predicted tokens.
        perplexity: e to the loss: the number of equally likely tokens that would be as hard to choose from.
        bits_per_byte: bits for all predicted tokens, end-of-document tokens included, over `text_bytes`. Unlike the others it
            can be compared between tokenizers; infinite if there is no text.
        tokens: how many were predicted.
        text_bytes: UTF-8 bytes of the text that they stand for.
        sources: how well each source of a mixture is predicted, by name; empty if it is none.
    """

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    sources: dict[str, "Evaluation"] = field(default_factory=dict)


def evaluate(
    model: Llama,
    stream: TokenStream,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Predict each token that the windows of a stream hold, exactly once.

    Processes take batches in turn, and every token weighs the same, so neither `micro_batch` nor the number of processes moves
    the result by more than rounding. Every batch has the same shape, so that a compiled model is compiled once. No random state
    is touched, and the model is put back to the mode it was in. Precision is the caller's: wrap the call in `torch.autocast` as in
    training.

    Args:
        model: on any device; not wrapped for data parallelism, for processes need not make equally many calls.
        stream: held-out windows in the order of the text (`shuffle=False`).
        micro_batch: windows computed at once.
        rank, world_size: number of this process, and of processes; all of them call this.
        stopped: asked before each batch whether to give up.

    Returns:
        The same on all ranks.

    Raises:
        Stopped: on all ranks, if any of them gave up.
    """
    device = model.embedding.weight.device
    # A sum of many float32 losses loses nothing in float64, which mps does not have.
    nats = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    was_training, gave_up = model.training, False
    model.eval()
    try:
        with torch.no_grad():
            for tokens, targets, documents in stream.batches(micro_batch, rank=rank, world_size=world_size):
                if gave_up := stopped():
                    break
                missing = (0, 0, 0, micro_batch - len(tokens))
                tokens, targets = functional.pad(tokens, missing), functional.pad(targets, missing, value=IGNORE)
                more = {} if documents is None else {"documents": functional.pad(documents, missing).to(device)}
                nats += model(tokens.to(device), targets.to(device), **more)
    finally:
        model.train(was_training)
    # Ranks make unequal numbers of calls, so they agree where they meet anyway: in the sum, whose second number counts who gave up.
    sums = torch.stack((nats, torch.full_like(nats, float(gave_up))))
    if world_size > 1:
        dist.all_reduce(sums)
    total, giving_up = sums.tolist()
    if giving_up:
        raise Stopped
    return _evaluation(total, stream.predicted_tokens, stream.text_bytes)


def together(sources: dict[str, Evaluation]) -> Evaluation:
    """The tokens of several texts as one. Bits per byte are infinite where the bytes of any of them are unknown."""
    parts = list(sources.values())
    nats = sum(part.loss_nats * part.tokens for part in parts)
    known = all(part.text_bytes for part in parts)
    whole = _evaluation(nats, sum(part.tokens for part in parts), sum(part.text_bytes for part in parts) if known else 0)
    return replace(whole, sources=sources)


def _evaluation(nats: float, tokens: int, text_bytes: int) -> Evaluation:
    """Sums as means; what no float holds is infinite."""
    loss = nats / tokens
    return Evaluation(
        loss_nats=loss,
        perplexity=math.exp(loss) if not loss > 700 else math.inf,
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else math.inf,
        tokens=tokens,
        text_bytes=text_bytes,
    )
