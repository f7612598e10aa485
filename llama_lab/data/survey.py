"""What tokens are like, from all of them or from a sample: how often each id occurs, how long documents are, what they say.

Nothing here takes longer or more memory for a larger set: of what is too large, blocks are looked at that are spread evenly.
"""

from dataclasses import dataclass

import numpy as np

from llama_lab.data.entries import Entries
from llama_lab.data.shards import Split
from llama_lab.data.tokenizer import Tokenizer

BLOCK_TOKENS = 2**18
BLOCKS = 64
DOCUMENTS = 2**22
DOCUMENT_BLOCK = 2**14
# Enough of a document to recognise it.
EXCERPT_TOKENS = 400
SEED = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen of a split.

    Attributes:
        counts: how often each id occurs in the tokens looked at, (vocab_size,) int64.
        beyond: how many of these tokens are no id of the tokenizer.
        tokens: how many were looked at.
        lengths: tokens of the documents looked at, without the tokens between them, (documents,) int64, shortest first.
        is_sample, is_sample_of_documents: whether there are more tokens and documents than were looked at.
    """

    counts: np.ndarray
    beyond: int
    tokens: int
    lengths: np.ndarray
    is_sample: bool
    is_sample_of_documents: bool


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a document, decoded.

    Attributes:
        name: where it came from, or where it lies.
        text: of its first tokens.
        tokens: of the whole document; None where that is unknown.
    """

    name: str
    text: str
    tokens: int | None


def survey(split: Split, tokenizer: Tokenizer, entries: Entries) -> Survey:
    """Look at a split.

    Where documents begin is read from its tables. Files of others have none: there, documents that lie within a block are measured,
    by the tokens that end or begin them.
    """
    size = tokenizer.vocab_size
    counts, found = np.zeros(size + 1, dtype=np.int64), [np.empty(0, dtype=np.int64)]
    looked_at = 0
    for start, stop in _blocks(split.tokens):
        ids = split.read(start, stop)
        # Widened first: the ids of a vocabulary of 65,536 are uint16, and its size is none.
        counts += np.bincount(np.minimum(ids.astype(np.int64), size), minlength=size + 1)
        looked_at += len(ids)
        if split.starts_file is None:
            found.append(np.diff(_cuts(ids, tokenizer, entries)) - 1)
    lengths = np.concatenate(found)
    is_sample = looked_at < split.tokens
    is_sample_of_documents = is_sample if split.starts_file is None else split.documents > DOCUMENTS
    if split.starts_file is not None:
        lengths = _known_lengths(split)
    return Survey(counts[:size], int(counts[size]), looked_at, np.sort(lengths[lengths > 0]), is_sample, is_sample_of_documents)


def length_bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of bins whose edges are the powers of two, from the first to the last that is not empty."""
    if not len(lengths):
        return []
    places = np.bincount(np.log2(lengths).astype(np.int64)).tolist()
    first = next(place for place, count in enumerate(places) if count)
    return [(2**place, 2 ** (place + 1) - 1, places[place]) for place in range(first, len(places))]


def excerpts(split: Split, tokenizer: Tokenizer, entries: Entries, number: int) -> list[Excerpt]:
    """The beginnings of documents that are drawn at random, the same at each call."""
    random = np.random.default_rng(SEED)
    if split.starts_file is None:
        return [
            _excerpt_at(split, tokenizer, entries, place) for place in sorted(random.integers(0, split.tokens, number).tolist())
        ]
    drawn = random.choice(split.documents, min(number, split.documents), replace=False, shuffle=False)
    return [_excerpt(split, tokenizer, document) for document in sorted(drawn.tolist())]


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Parts of a sequence: all of it, or as many as may be read, spread evenly."""
    if tokens <= BLOCKS * BLOCK_TOKENS:
        return [(start, min(start + BLOCK_TOKENS, tokens)) for start in range(0, tokens, BLOCK_TOKENS)]
    starts = np.linspace(0, tokens - BLOCK_TOKENS, BLOCKS).astype(np.int64).tolist()
    return [(start, start + BLOCK_TOKENS) for start in starts]


def _known_lengths(split: Split) -> np.ndarray:
    """Tokens of documents, of all or of blocks of them."""
    table = split.document_starts
    if split.documents <= DOCUMENTS:
        return np.diff(table) - 1
    starts = np.linspace(0, split.documents - DOCUMENT_BLOCK, DOCUMENTS // DOCUMENT_BLOCK).astype(np.int64).tolist()
    return np.concatenate([np.diff(table[start : start + DOCUMENT_BLOCK + 1]) - 1 for start in starts])


def _cuts(ids: np.ndarray, tokenizer: Tokenizer, entries: Entries) -> np.ndarray:
    """Positions of the tokens that end documents, or of those that begin them where nothing ends any."""
    found = np.flatnonzero(ids == tokenizer.eos_id)
    return found if len(found) or not entries.start_ids else np.flatnonzero(np.isin(ids, entries.start_ids))


def _excerpt(split: Split, tokenizer: Tokenizer, document: int) -> Excerpt:
    start, end = (int(position) for position in split.document_starts[document : document + 2])
    text = tokenizer.decode(split.read(start + 1, min(end, start + 1 + EXCERPT_TOKENS)))
    return Excerpt(split.document_name(document), text, end - start - 1)


def _excerpt_at(split: Split, tokenizer: Tokenizer, entries: Entries, place: int) -> Excerpt:
    """The first document that lies behind a place; what stands at the place itself if none does soon."""
    cuts = _cuts(split.read(place, min(place + BLOCK_TOKENS, split.tokens)), tokenizer, entries)
    whole = np.flatnonzero(np.diff(cuts) > 1)
    start, length = place, None
    if len(whole):
        first, last = (int(position) for position in cuts[whole[0] : whole[0] + 2])
        start, length = place + first + 1, last - first - 1
    file, position = split.locate(start)
    text = tokenizer.decode(split.read(start, min(start + min(length or EXCERPT_TOKENS, EXCERPT_TOKENS), split.tokens)))
    return Excerpt(f"{file}, from token {position:,}", text, length)
