"""Batches of token windows: which window comes when, and the tensors that the model is given.

Everything is a pure function of (seed, number of the window), so neither the number of processes nor the point where a run
was resumed changes what is trained on.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Window
from llama_lab.data.shards import Split

IGNORE = -100
"""Target of a position that is not predicted."""
# Four rounds make a Feistel network a good permutation of a large set; a small one needs more to mix.
ROUNDS = 8


class TokenStream:
    """The windows of a split, in an endless order of epochs.

    A window is `max_seq_len` inputs and as many targets, shifted by one. Contiguous windows are cut one behind the other,
    regardless of documents: (tokens - 1) // max_seq_len of them; what is left, shorter than a window, is left out of the epoch.
    The first epoch starts at the first token; each later one starts at an offset of its own, below a window's length, and goes on
    at the beginning when it reaches the end. So another tail is left out each time, and a text passed over several times is
    not always cut at the same places, which shows on held-out text. Document windows start with the EOS before a document,
    or where the document's previous window ended, and are padded at its end: their targets there are `IGNORE`.

    Each epoch holds each window once. Unshuffled, as for validation, windows come in the order of the text, and the last
    contiguous window is kept and padded, so that each token behind the first is predicted exactly once.

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
        ConfigError: the split is shorter than one window.
    """

    def __init__(
        self, split: Split, *, max_seq_len: int, window: Window, seed: int = 0, shuffle: bool = True, max_tokens: int | None = None
    ):
        self._split, self._length, self._seed, self._shuffle = split, max_seq_len, seed, shuffle
        self._end = split.tokens if max_tokens is None else min(split.tokens, max_tokens + 1)
        self.predicted_tokens = self._end - 1
        self.text_bytes = split.bytes_before(self._end)
        self._windows_before: np.ndarray | None = None
        if window is Window.document:
            starts = np.minimum(split.document_starts, self._end - 1)
            self._windows_before = np.cumsum(-(-np.diff(starts, prepend=starts[0]) // max_seq_len))
            self.windows = int(self._windows_before[-1])
        elif shuffle:
            self.windows = self.predicted_tokens // max_seq_len
            self.predicted_tokens = self.windows * max_seq_len
        else:
            self.windows = -(-self.predicted_tokens // max_seq_len)
        if self.windows == 0:
            rule = f"is more than the {split.tokens - 1:,} tokens there are to predict; give more text or a shorter window"
            raise ConfigError([(f"data.max_seq_len={max_seq_len}", rule)], scope="the data")

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows first to first + count - 1 of the endless order.

        Returns:
            tokens and targets, each (count, max_seq_len) int64 on the CPU. Where targets are `IGNORE`, padded tokens are 0.
        """
        tokens = np.zeros((count, self._length), dtype=np.int64)
        targets = np.full((count, self._length), IGNORE, dtype=np.int64)
        for row, (start, stop) in enumerate(zip(*self._spans(first, count), strict=True)):
            filled = 0
            while start < stop:
                end = min(stop, self._end - 1)
                ids = self._split.read(start, end + 1)
                tokens[row, filled : filled + end - start] = ids[:-1]
                targets[row, filled : filled + end - start] = ids[1:]
                filled += end - start
                start, stop = 0, stop - end
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def batches(self, count: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in batches of `count` windows, the last one smaller; of these every `world_size`th, from the `rank`th on."""
        for first in range(rank * count, self.windows, world_size * count):
            yield self.batch(first, min(count, self.windows - first))

    def order(self, first: int, count: int) -> np.ndarray:
        """Place in the split, (count,) int64 in [0, windows), of windows first to first + count - 1 of the endless order."""
        indices = np.arange(first, first + count, dtype=np.int64)
        if not self._shuffle:
            return indices % self.windows
        places = np.empty(count, dtype=np.int64)
        for epoch in range(first // self.windows, (first + count - 1) // self.windows + 1):
            inside = indices // self.windows == epoch
            places[inside] = permute(indices[inside] % self.windows, self.windows, f"{self._seed} {epoch}")
        return places

    def _spans(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """First input and last target of each window; a target beyond the split's end is meant from its start."""
        places = self.order(first, count)
        if self._windows_before is None:
            starts = places * self._length
            if not self._shuffle:
                return starts.tolist(), np.minimum(starts + self._length, self._end - 1).tolist()
            starts += self._offsets(np.arange(first, first + count, dtype=np.int64) // self.windows)
            starts %= self._end - 1
            return starts.tolist(), (starts + self._length).tolist()
        # windows_before[d] windows lie before document d, so the last d with at most `place` of them holds the window.
        documents = np.searchsorted(self._windows_before, places, side="right") - 1
        table = self._split.document_starts
        starts = table[documents] + (places - self._windows_before[documents]) * self._length
        stops = np.minimum(np.minimum(starts + self._length, table[documents + 1]), self._end - 1)
        return starts.tolist(), stops.tolist()

    def _offsets(self, epochs: np.ndarray) -> np.ndarray:
        """Where each window's epoch starts, in [0, max_seq_len); 0 for the first."""
        found = np.zeros(len(epochs), dtype=np.int64)
        for epoch in range(max(1, int(epochs[0])), int(epochs[-1]) + 1):
            digest = hashlib.blake2b(f"{self._seed} {epoch} offset".encode(), digest_size=8).digest()
            found[epochs == epoch] = int.from_bytes(digest, "little") % self._length
        return found


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
