"""Batches of token windows: which window comes when, and the tensors that the model is given.

Everything is a pure function of (seed, number of the window), so neither the number of processes nor the point where a run
was resumed changes what is trained on. How a split is cut into windows is `windows`'s, how sources take turns `mixture`'s.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_lab.config.schema import RunConfig, Window
from llama_lab.config.targets import IGNORE
from llama_lab.data.mixture import Mixture
from llama_lab.data.prepare import PreparedData
from llama_lab.data.shards import Split
from llama_lab.data.windows import cut_windows

# Four rounds make a Feistel network a good permutation of a large set; a small one needs more to mix.
ROUNDS = 8
# Windows whose places are computed at once: the cost of a few large numpy calls is shared by many small batches.
BLOCK = 1024


class Batch(NamedTuple):
    """Windows as the model is given them, on the CPU.

    Attributes:
        tokens, targets: (windows, max_seq_len) int64. Where targets are `IGNORE`, padded tokens are 0.
        documents: for packed windows the number of each token's document within its window, (windows, max_seq_len) int32, padding
            being one more; None where attention is not cut.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None


class Located(NamedTuple):
    """Where a window of the endless order comes from.

    Attributes:
        source: number of the source.
        epoch: of the source, from 0.
        place: of the window in the source, in the order of the text.
        start, stop: tokens start to stop - 1 of the source are read, and start + 1 to stop predicted. In a contiguous window that
            goes on at the beginning, `stop` is beyond the last prediction.
    """

    source: int
    epoch: int
    place: int
    start: int
    stop: int


class TokenStream:
    """The windows of a split, in an endless order of epochs.

    A window is `max_seq_len` inputs and as many targets, shifted by one. Contiguous windows are cut one behind the other,
    regardless of documents: (tokens - 1) // max_seq_len of them; what is left, shorter than a window, is left out of the epoch.
    The first epoch starts at the first token; each later one starts at an offset of its own, below a window's length, and goes on
    at the beginning when it reaches the end. So another tail is left out each time, and a text passed over several times is
    not always cut at the same places, which shows on held-out text. Document windows start with the EOS before a document,
    or where the document's previous window ended, and are padded at its end: their targets there are `IGNORE`. Packed windows
    start likewise, go on with the next documents as long as they fit whole, and say which token belongs to which.

    Each epoch holds each window once. Unshuffled, as for validation, windows come in the order of the text, and the last
    contiguous window is kept and padded, so that each token behind the first is predicted exactly once.

    Memory does not grow with the tokens. Document windows take 8 bytes a document, packed ones 8 bytes a window.

    Args:
        split: the tokens.
        max_seq_len: T, at least 1.
        seed: of the order; unused where `shuffle` is false.
        max_tokens: only so many tokens are predicted, from the start of the split; null: all.

    Attributes:
        windows: in an epoch.
        predicted_tokens: in an epoch, padding not counted.
        text_bytes: UTF-8 bytes that the text behind these windows takes; also counts what a left-out tail stands for.

    Raises:
        ConfigError: the split is shorter than one window, or where its documents begin is needed and not known.
    """

    def __init__(
        self, split: Split, *, max_seq_len: int, window: Window, seed: int = 0, shuffle: bool = True, max_tokens: int | None = None
    ):
        self._split, self.max_seq_len, self._seed, self._shuffle = split, max_seq_len, seed, shuffle
        self._end = split.tokens if max_tokens is None else min(split.tokens, max_tokens + 1)
        self._cut = cut_windows(split, window, max_seq_len, end=self._end, keep_tail=not shuffle)
        self.windows, self.predicted_tokens = self._cut.count, self._cut.predicted
        self.text_bytes = split.bytes_before(self._end)
        self._block = (-1, np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))

    @property
    def packs(self) -> bool:
        """Whether a window may hold several documents that must not see each other."""
        return self._cut.boundaries is not None

    def batch(self, first: int, count: int) -> Batch:
        """Windows first to first + count - 1 of the endless order."""
        batch = blank_batch(count, self.max_seq_len, packs=self.packs)
        self.fill(batch, range(count), first)
        return batch

    def batches(self, count: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One epoch in batches of `count` windows, the last one smaller; of these every `world_size`th, from the `rank`th on."""
        for first in range(rank * count, self.windows, world_size * count):
            yield self.batch(first, min(count, self.windows - first))

    def fill(self, batch: Batch, rows: Sequence[int], first: int) -> None:
        """Write the windows from `first` on into rows of a blank batch."""
        tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
        _, starts, stops = self._spans(first, len(rows))
        last = self._end - 1
        for row, start, stop in zip(rows, starts.tolist(), stops.tolist(), strict=True):
            filled = 0
            while start < stop:
                end = min(stop, last)
                ids = self._split.read(start, end + 1)
                tokens[row, filled : filled + end - start] = ids[:-1]
                targets[row, filled : filled + end - start] = ids[1:]
                filled += end - start
                start, stop = 0, stop - end
        if batch.documents is not None:
            self._number_documents(batch.documents.numpy(), rows, starts, stops)

    def predicted(self, first: int, count: int) -> int:
        """Tokens that these windows predict; where they are padded their spans are looked at, but not their tokens."""
        if self._cut.full:
            return count * self.max_seq_len
        _, starts, stops = self._spans(first, count)
        return int((stops - starts).sum())

    def order(self, first: int, count: int) -> np.ndarray:
        """Place in the split, (count,) int64 in [0, windows), of windows first to first + count - 1 of the endless order."""
        return self._spans(first, count)[0]

    def located(self, first: int, count: int, source: int = 0) -> list[Located]:
        """Where these windows come from."""
        numbers = range(first, first + count)
        spans = zip(numbers, *(values.tolist() for values in self._spans(first, count)), strict=True)
        return [Located(source, number // self.windows, *span) for number, *span in spans]

    def _spans(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place, first input and last target of each window; a target beyond the split's end is meant from its start."""
        parts = []
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            if self._block[0] != block:
                self._block = (block, *self._block_spans(block * BLOCK, BLOCK))
            inside = slice(max(first - block * BLOCK, 0), first + count - block * BLOCK)
            parts.append([values[inside] for values in self._block[1:]])
        if len(parts) == 1:
            places, starts, stops = parts[0]
        else:
            places, starts, stops = (np.concatenate(values) for values in zip(*parts, strict=True))
        return places, starts, stops

    def _block_spans(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), self.windows)
        offsets = np.zeros(count, dtype=np.int64)
        # A small set has many epochs in a block; each is one stretch of it.
        edges = np.flatnonzero(np.diff(epochs, prepend=epochs[0] - 1))
        for start, stop in zip(edges, [*edges[1:], count], strict=True) if self._shuffle else ():
            epoch, inside = int(epochs[start]), slice(start, stop)
            places[inside] = permute(places[inside], self.windows, f"{self._seed} {epoch}")
            offsets[inside] = self._offset(epoch)
        return places, *self._cut.spans(places, offsets)

    def _offset(self, epoch: int) -> int:
        """Where an epoch of contiguous windows starts, in [0, max_seq_len); 0 for the first."""
        if epoch == 0:
            return 0
        digest = hashlib.blake2b(f"{self._seed} {epoch} offset".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.max_seq_len

    def _number_documents(self, documents: np.ndarray, rows: Sequence[int], starts: np.ndarray, stops: np.ndarray) -> None:
        """Count the boundaries inside each window; its end is one, so that padding sees padding alone."""
        boundaries = self._cut.boundaries
        assert boundaries is not None
        before = np.searchsorted(boundaries, starts, side="right")
        counts = np.searchsorted(boundaries, stops, side="right") - before
        numbers = np.arange(counts.sum()) + np.repeat(before - np.cumsum(counts) + counts, counts)
        inside = np.concatenate((boundaries[numbers] - np.repeat(starts, counts), stops - starts))
        owners = np.concatenate((np.repeat(np.array(rows), counts), np.array(rows)))
        begins = inside < self.max_seq_len
        documents[owners[begins], inside[begins]] = 1
        for row in rows:
            np.cumsum(documents[row], out=documents[row])


class MixedStream:
    """The windows that a run is trained on, from one source or from several in turn.

    Each source goes through its own windows in an order of its own, and `Mixture` says whose turn it is. A single source comes in
    exactly the order of its `TokenStream`.

    Args:
        streams: of each source, all of the same length and kind of window.
        weights: of each source; only their ratios count.
    """

    def __init__(self, streams: Sequence[TokenStream], weights: Sequence[float]):
        self.streams, self.mixture = list(streams), Mixture(weights)

    def batch(self, first: int, count: int) -> Batch:
        """Windows first to first + count - 1 of the endless order."""
        batch = blank_batch(count, self.streams[0].max_seq_len, packs=self.streams[0].packs)
        for stream, (rows, number) in zip(self.streams, self.mixture.turns(first, count), strict=True):
            if len(rows):
                stream.fill(batch, rows.tolist(), number)
        return batch

    def predicted(self, first: int, count: int) -> int:
        """Tokens that these windows predict."""
        turns = zip(self.streams, self.mixture.turns(first, count), strict=True)
        return sum(stream.predicted(number, len(rows)) for stream, (rows, number) in turns if len(rows))

    def located(self, first: int, count: int) -> list[Located]:
        """Where these windows come from."""
        found: dict[int, Located] = {}
        for source, (rows, number) in enumerate(self.mixture.turns(first, count)):
            if len(rows):
                found |= zip(rows.tolist(), self.streams[source].located(number, len(rows), source), strict=True)
        return [found[row] for row in range(count)]

    def epochs(self, count: int) -> list[float]:
        """How often each source was passed over in the first `count` windows."""
        return [given / stream.windows for given, stream in zip(self.mixture.given(count), self.streams, strict=True)]


def training_stream(run: RunConfig, data: PreparedData) -> MixedStream:
    """The windows of a run, in their order.

    Raises:
        ConfigError: a source is shorter than one window, or not cut into documents where the windows need it.
    """
    streams = [
        TokenStream(source.train, max_seq_len=run.data.max_seq_len, window=run.data.window, seed=seed)
        for source, seed in zip(data.sources, source_seeds(run.seed.data, len(data.sources)), strict=True)
    ]
    return MixedStream(streams, [source.weight for source in data.sources])


def source_seeds(seed: int, sources: int) -> list[int]:
    """A seed for the order of each source: the run's own for a single one, else one derived from it and the source's number."""
    if sources == 1:
        return [seed]
    digests = [hashlib.blake2b(f"{seed} source {source}".encode(), digest_size=8).digest() for source in range(sources)]
    return [int.from_bytes(digest, "little") for digest in digests]


def blank_batch(count: int, length: int, *, packs: bool) -> Batch:
    """Nothing but padding."""
    tokens, targets = torch.zeros(count, length, dtype=torch.int64), torch.full((count, length), IGNORE, dtype=torch.int64)
    return Batch(tokens, targets, torch.zeros(count, length, dtype=torch.int32) if packs else None)


def batch_hash(batch: Batch, first: int, count: int) -> int:
    """64 bits that say what was fed: the sum, modulo 2^64, of a hash of each window's number and content.

    A sum does not depend on how windows are spread over processes and micro-batches: those of an update add up to the same.

    Args:
        first: number of the first window in the endless order.
        count: windows that count; those behind them only fill the batch up.
    """
    tokens = batch.tokens.numpy()[:count].astype("<i4")
    beyond = batch.targets.numpy()[:count].astype("<i4")
    # A target is nearly always the token that follows, and a document's number that of its neighbour: where that changes, and to
    # what, says all there is in few bytes.
    beyond[:, :-1] -= tokens[:, 1:]
    listed = [_changes(beyond)] + ([] if batch.documents is None else [_changes(batch.documents.numpy()[:count])])
    total = 0
    for row in range(count):
        digest = hashlib.blake2b(tokens[row], digest_size=8, salt=(first + row).to_bytes(16, "little"))
        for changes in listed:
            digest.update(changes[row].tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64


def _changes(rows: np.ndarray) -> list[np.ndarray]:
    """Of each row the places at which it changes and the values from there on, (changes, 2) int64; the first place is 0."""
    changed = np.ones(rows.shape, dtype=bool)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=changed[:, 1:])
    owners, places = changed.nonzero()
    found = np.stack((places, rows[owners, places]), axis=1).astype("<i8")
    return np.split(found, np.searchsorted(owners, np.arange(1, len(rows))))


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a keyed permutation of 0 to size - 1 puts each index; no table, so it costs the same for any size.

    A Feistel network over pairs (left, right) of digits to the base ceil(sqrt(size)); an index that lands outside is sent
    through again until it lands inside (cycle walking), which about one in sqrt(size) needs.

    Args:
        indices: (n,) int64 in [0, size), size at most 2^62.
        key: a different permutation for each.
    """
    base = math.isqrt(size - 1) + 1
    seed = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    round_keys = np.frombuffer(seed, dtype="<u8").astype(np.uint64)
    places = indices.astype(np.uint64)
    walking = np.arange(len(places))
    while len(walking):
        left, right = np.divmod(places[walking], np.uint64(base))
        for round_key in round_keys:
            left, right = right, (left + _mix(right ^ round_key) % np.uint64(base)) % np.uint64(base)
        places[walking] = left * np.uint64(base) + right
        walking = walking[places[walking] >= size]
    return places.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """A hash of each 64-bit number: the finaliser of SplitMix64, whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
