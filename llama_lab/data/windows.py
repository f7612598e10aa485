"""How a split is cut into windows: how many there are, and which tokens each spans. The order they come in is `stream`'s.

A window with the span (start, stop) reads tokens start to stop - 1 and predicts tokens start + 1 to stop. Needs no torch.
"""

from abc import ABC, abstractmethod

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Window
from llama_lab.data.shards import Split

# Documents looked at together while they are packed; bounds the memory, not the result.
PACKED_AT_ONCE = 2**18


class Windows(ABC):
    """The windows of one split.

    Attributes:
        count: of the windows in an epoch.
        predicted: tokens that are predicted in an epoch, padding not counted.
        full: whether each window holds as many tokens as fit, so that none is padded.
        boundaries: where attention is cut: position of the EOS before each document and of the closing one; None: nowhere.
    """

    count: int
    predicted: int
    full = False
    boundaries: np.ndarray | None = None

    @abstractmethod
    def spans(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of the windows at `places`, (n,) int64 in [0, count), each in an epoch that starts at its offset."""


class ContiguousWindows(Windows):
    """One behind the other, regardless of documents.

    Args:
        tokens: to be predicted.
        length: of a window.
        keep_tail: whether what is left, shorter than a window, is one too. Then there are no offsets.
    """

    def __init__(self, tokens: int, length: int, *, keep_tail: bool):
        self._tokens, self._length = tokens, length
        self.full = not keep_tail
        self.count = -(-tokens // length) if keep_tail else tokens // length
        self.predicted = tokens if keep_tail else self.count * length

    def spans(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With an offset the windows go on at the beginning: a stop beyond `tokens` means so many tokens from the start."""
        if self.full:
            starts = (places * self._length + offsets) % self._tokens
            return starts, starts + self._length
        starts = places * self._length
        return starts, np.minimum(starts + self._length, self._tokens)


class DocumentWindows(Windows):
    """Each starts with the EOS before a document, or where the document's previous window ended, and ends with the document.

    Takes 8 bytes a document in memory.

    Args:
        boundaries: position of the EOS before each document and of the closing one, (documents + 1,).
        length: of a window at most.
    """

    def __init__(self, boundaries: np.ndarray, length: int):
        self._starts, self._length = boundaries, length
        # windows_before[d] windows lie before document d.
        self._windows_before = np.cumsum(-(-np.diff(boundaries, prepend=boundaries[0]) // length))
        self.count = int(self._windows_before[-1])
        self.predicted = int(boundaries[-1] - boundaries[0])

    def spans(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents are cut at the same places in every epoch, so there are no offsets."""
        # The last document with at most `place` windows before it holds the window.
        documents = np.searchsorted(self._windows_before, places, side="right") - 1
        starts = self._starts[documents] + (places - self._windows_before[documents]) * self._length
        return starts, np.minimum(starts + self._length, self._starts[documents + 1])


class PackedWindows(Windows):
    """Each starts like a document window, and goes on with the documents behind that fit whole (next-fit).

    Documents stay in the order of the set, so a window is one stretch of text, and the next one starts where it ends. A document
    that is longer than a window fills windows of its own; its last piece is packed like a document. So every token is
    predicted once an epoch, and only a document that does not fit into one window is cut. The packing is the same in every epoch.

    Takes 8 bytes a window in memory, and about a quarter of a microsecond a document when they are made.

    Args:
        boundaries: position of the EOS before each document and of the closing one, (documents + 1,).
        length: of a window at most.
    """

    def __init__(self, boundaries: np.ndarray, length: int):
        self.boundaries = boundaries
        self._edges = _packed_edges(boundaries, length)
        self.count = len(self._edges) - 1
        self.predicted = int(boundaries[-1] - boundaries[0])

    def spans(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents are packed alike in every epoch, so there are no offsets."""
        return self._edges[places], self._edges[places + 1]


def cut_windows(split: Split, window: Window, length: int, *, end: int | None = None, keep_tail: bool = False) -> Windows:
    """The windows of a split.

    Args:
        length: tokens in a window.
        end: only tokens before it are read; None: all.
        keep_tail: whether contiguous windows reach the end, with a shorter one if need be.

    Raises:
        ConfigError: the split is shorter than one window, or is not cut into documents where the windows need it.
    """
    end = split.tokens if end is None else end
    if window is Window.contiguous:
        found: Windows = ContiguousWindows(end - 1, length, keep_tail=keep_tail)
    elif split.starts_file is None:
        rule = f"needs to know where documents begin, which {split.folder} does not say; data.window=contiguous works"
        raise ConfigError([(f"data.window={window.name}", rule)], scope="the data")
    else:
        boundaries = split.document_starts
        if end < split.tokens:
            boundaries = np.minimum(boundaries, end - 1)
        found = DocumentWindows(boundaries, length) if window is Window.document else PackedWindows(boundaries, length)
    if found.count == 0:
        rule = f"is more than the {split.tokens - 1:,} tokens there are to predict; give more text or a shorter window"
        raise ConfigError([(f"data.max_seq_len={length}", rule)], scope="the data")
    return found


def _packed_edges(boundaries: np.ndarray, length: int) -> np.ndarray:
    """Where each packed window starts and the last one ends, (windows + 1,) int64.

    For every document the one behind its last window is found at once; then only the jumps from one to the next are left to follow.
    """
    parts, document = [], 0
    for first in range(0, len(boundaries) - 1, PACKED_AT_ONCE):
        # No window reaches beyond as many documents as it has positions; so few are found fast.
        nearby = boundaries[first : first + PACKED_AT_ONCE + length + 1]
        starts, ends = nearby[:-1][:PACKED_AT_ONCE], nearby[1:][:PACKED_AT_ONCE]
        pieces = -(-(ends - starts) // length)
        # What fits behind the last piece, which may be no whole window, ends at the last boundary in reach.
        reach = np.where((ends - starts) % length == 0, ends, starts + pieces * length)
        following = (np.searchsorted(nearby, reach, side="right") - 1).tolist()
        opening = []
        while document < len(starts):
            opening.append(document)
            document = following[document]
        document -= len(starts)
        counts = pieces[opening]
        before = np.cumsum(counts) - counts
        inside = np.arange(counts.sum(), dtype=np.int64) - np.repeat(before, counts)
        parts.append(np.repeat(starts[opening], counts) + inside * length)
    return np.concatenate([*parts, boundaries[-1:]])
