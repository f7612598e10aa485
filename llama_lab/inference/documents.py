"""Scoring texts document by document: how well each is predicted, how sure that is, and whether the model knows when it is right.

Documents are put one behind the other with an end-of-document token before, between and behind them, and cut into windows of the
context, as validation while training does; so a run's own held-out text has here the loss that it had there.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from llama_lab.inference.score import sequences_at_once
from llama_lab.inference.sources import Document
from llama_lab.model.llama import Llama

BINS = 15
"""Of confidence, all of the same width. Source: Guo et al., arXiv:1706.04599, section 2."""
CONFIDENCE = 0.95
"""Share of samples of documents whose interval holds the truth."""


MIN_DOCUMENTS = 10
"""Fewer, or such as are worth fewer of equal length, have no interval. The spread that n documents show is itself uncertain by a
share of 1 / sqrt(2 (n - 1)): a quarter for ten, 71 % for two, whose interval reaches 13 standard errors to each side and says how
few they are and nothing of the model."""


class Interval(NamedTuple):
    """Where a figure would lie for other documents of the same kind, with a confidence of 95 %."""

    low: float
    high: float


@dataclass(slots=True)
class Calibration:
    """How often the model's first choice is right, against how likely the model takes it to be.

    Attributes:
        counts: predicted tokens by the probability of the first choice, in bins of equal width.
        confidences, hits: of the tokens of each bin, the sum of that probability, and how often the first choice was right.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    confidences: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    hits: np.ndarray = field(default_factory=lambda: np.zeros(BINS))

    @property
    def accuracy(self) -> float:
        """Share of tokens that the first choice gets right."""
        return float(self.hits.sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over tokens of the gap between confidence and accuracy in their bin."""
        return float(np.abs(self.confidences - self.hits).sum() / self.counts.sum())

    def add(self, confidence: Tensor, is_hit: Tensor) -> None:
        """Count tokens: the probability of the first choice of each, and whether it was right."""
        bins = (confidence * BINS).long().clamp(max=BINS - 1).cpu().numpy()
        self.counts += np.bincount(bins, minlength=BINS)
        self.confidences += np.bincount(bins, confidence.double().cpu().numpy(), minlength=BINS)
        self.hits += np.bincount(bins, is_hit.double().cpu().numpy(), minlength=BINS)


@dataclass(frozen=True, slots=True)
class Measured:
    """How well the documents of a source are predicted.

    Attributes:
        nats, tokens, text_bytes: of each document: the sum of -ln p over its tokens and the token that ends it, how many these
            are, and the UTF-8 bytes of its text.
    """

    nats: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray
    calibration: Calibration

    @property
    def loss(self) -> float:
        """Nats a token, over all documents together."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits of all tokens over the bytes of the text; infinite if these are unknown."""
        size = self.text_bytes.sum()
        return float(self.nats.sum() / math.log(2) / size) if size else math.inf

    @property
    def worth(self) -> float:
        """How many documents of equal length they are worth, by their tokens."""
        return worth(self.tokens)

    def loss_interval(self) -> Interval | None:
        """Of the loss; None where the documents are worth fewer than `MIN_DOCUMENTS`."""
        return ratio_interval(self.nats, self.tokens)

    def bits_interval(self) -> Interval | None:
        """Of the bits per byte; None where the loss has none, or where bytes are unknown."""
        if self.worth < MIN_DOCUMENTS or not self.text_bytes.sum():
            return None
        return ratio_interval(self.nats / math.log(2), self.text_bytes)


def worth(sizes: np.ndarray) -> float:
    """How many documents of equal size say as much as these do. Source: Kish, Survey Sampling, 1965."""
    # Of equal sizes this is their number, which a last binary digit must not take them below.
    return round(float(sizes.sum() ** 2 / (sizes @ sizes)), 9) if len(sizes) else 0.0


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Interval | None:
    """Of sum(above) / sum(below) where both are drawn together, a document at a time; None where they are worth fewer than
    `MIN_DOCUMENTS`.

    Documents are what is independent, not tokens: a hard document is hard in many of its tokens. So what counts is how far the
    ratio moves without each document. A long one pulls the ratio towards itself, which this undoes, and one that is most of the
    text leaves little to learn from the others: Student's t has as many degrees of freedom as the documents are worth if all were
    equally long.

    Source: MacKinnon and White, 1985, estimator HC3, of a line through the origin; Kish, Survey Sampling, 1965, for what documents
    are worth. Cochran's interval of a ratio, which needs neither, held the truth 84 times in 100 with 30 documents as uneven as web
    pages, where this one did 95 times.
    """
    whole, count = below.sum(), worth(below)
    if count < MIN_DOCUMENTS:
        return None
    ratio = above.sum() / whole
    moved = (above - ratio * below) / (whole - below)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(moved @ moved)
    # What is counted is never below 0, so its truth is not either.
    return Interval(max(0.0, float(ratio - reach)), float(ratio + reach))


def measure(model: Llama, documents: Iterable[Document], *, eos_id: int, max_tokens: int | None = None) -> Measured:
    """Predict every token of documents once, as validation does. Precision is the model's, or the caller's autocast.

    Memory does not grow with the text but for a few numbers a document.

    Args:
        eos_id: the token before, between and behind documents.
        max_tokens: only so many tokens are predicted; what is left of the last document counts as one.

    Raises:
        ValueError: there is no document.
    """
    sums, sizes, calibration = _Sums(), [], Calibration()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for tokens, targets, owners in _batches(model, documents, eos_id, max_tokens, sizes):
                nats, confidence, is_hit = _predicted(model, tokens, targets)
                sums.add(owners, nats.double().cpu().numpy())
                calibration.add(confidence, is_hit)
    finally:
        model.train(was_training)
    if not sums.counts.size:
        raise ValueError("there is no document to be predicted")
    return Measured(sums.nats, sums.counts, np.array(sizes[: len(sums.counts)], dtype=np.float64), calibration)


def together(parts: Iterable[Measured]) -> Measured:
    """The documents of several sources as those of one."""
    parts = list(parts)
    calibrations = [part.calibration for part in parts]
    return Measured(
        nats=np.concatenate([part.nats for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        text_bytes=np.concatenate([part.text_bytes for part in parts]),
        calibration=Calibration(
            counts=np.sum([one.counts for one in calibrations], axis=0),
            confidences=np.sum([one.confidences for one in calibrations], axis=0),
            hits=np.sum([one.hits for one in calibrations], axis=0),
        ),
    )


class _Sums:
    """Nats and tokens by document."""

    def __init__(self) -> None:
        self.nats, self.counts = np.zeros(0), np.zeros(0)

    def add(self, owners: np.ndarray, nats: np.ndarray) -> None:
        """Count tokens by the documents that they belong to, whose numbers only grow."""
        missing = int(owners[-1]) + 1 - len(self.nats)
        if missing > 0:
            self.nats, self.counts = np.pad(self.nats, (0, missing)), np.pad(self.counts, (0, missing))
        first = int(owners[0])
        own = np.bincount(owners - first, nats)
        self.nats[first : first + len(own)] += own
        self.counts[first : first + len(own)] += np.bincount(owners - first)


class _Window(NamedTuple):
    """Ids of a stretch, one more than are predicted, and the number of the document of each that is."""

    ids: np.ndarray
    owners: np.ndarray


def _windows(
    documents: Iterable[Document], eos_id: int, length: int, max_tokens: int | None, sizes: list[int]
) -> Iterator[_Window]:
    """Documents one behind the other, cut; bytes of the text of each go into `sizes`."""
    ids, owners, left = np.array([eos_id]), np.zeros(0, dtype=np.int64), max_tokens
    for number, document in enumerate(documents):
        own = np.append(document.ids, eos_id).astype(np.int64)
        kept = own if left is None else own[:left]
        # Of a document that is cut, the bytes in proportion to the tokens that have any.
        share = min(len(kept), len(document.ids)) / max(1, len(document.ids))
        sizes.append(round(document.text_bytes * share))
        ids, owners = np.concatenate((ids, kept)), np.concatenate((owners, np.full(len(kept), number)))
        while len(owners) >= length:
            yield _Window(ids[: length + 1], owners[:length])
            ids, owners = ids[length:], owners[length:]
        left = None if left is None else left - len(kept)
        if left == 0:
            break
    if len(owners):
        yield _Window(ids, owners)


def _batches(
    model: Llama, documents: Iterable[Document], eos_id: int, max_tokens: int | None, sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """(inputs, targets, owners of the targets); targets behind a shorter last window are -1."""
    length = model.max_seq_len
    count = sequences_at_once(length, model.vocab_size)
    waiting: list[_Window] = []

    def batch() -> tuple[Tensor, Tensor, np.ndarray]:
        rows = np.full((len(waiting), length + 1), -1, dtype=np.int64)
        for row, window in zip(rows, waiting, strict=True):
            row[: len(window.ids)] = window.ids
        found = torch.from_numpy(rows)
        return found[:, :-1].clamp(min=0), found[:, 1:], np.concatenate([window.owners for window in waiting])

    for window in _windows(documents, eos_id, length, max_tokens, sizes):
        waiting.append(window)
        if len(waiting) == count:
            yield batch()
            waiting = []
    if waiting:
        yield batch()


def _predicted(model: Llama, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of each target, probability of the first choice in its place, and whether that is the target; (targets,) each."""
    device = model.embedding.weight.device
    is_target = (targets >= 0).flatten().to(device)
    wanted = targets.flatten().to(device)[is_target]
    logits = model.forward(tokens.to(device)).flatten(0, 1)[is_target].float()
    total = torch.logsumexp(logits, dim=-1)
    best, choice = logits.max(dim=-1)
    nats = total - logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
    return nats, (best - total).exp(), choice == wanted
