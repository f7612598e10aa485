"""Prompts out of a run's own data: how its held-out documents begin, in whatever language they are."""

from collections.abc import Iterator

from llama_lab.data.prepare import PreparedData
from llama_lab.data.shards import Split
from llama_lab.data.tokenizer import Tokenizer

PROMPTS = 3
CHARACTERS = 24
"""A few words of most languages."""
READ_TOKENS = 8 * CHARACTERS
"""Enough for twice as many characters where each byte is a token."""
PASSAGE_TOKENS = 2000
"""Among so many a paragraph is likely to begin."""
LOOKED_AT = 100
"""Documents of each source, in search of ones with some text."""


def beginnings(data: PreparedData) -> list[str]:
    """First words of the first held-out documents, of each source in turn; of training's documents where none is held out.

    Returns:
        At most `PROMPTS` texts, none twice; an empty one alone where no document has any.
    """
    found = [_of_split(source.val or source.train, data.tokenizer) for source in data.sources]
    in_turn = [text for texts in _in_turn(found) for text in texts]
    return list(dict.fromkeys(in_turn))[:PROMPTS] or [""]


def _in_turn(found: list[Iterator[str]]) -> Iterator[list[str]]:
    """The first of each, then the second of each, as far as they are needed."""
    for _ in range(PROMPTS):
        yield [text for texts in found if (text := next(texts, None)) is not None]


def _of_split(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """How documents begin that are long enough to be cut; where they are few or unknown, how passages do."""
    if split.starts_file is None or split.documents < PROMPTS:
        texts = (_passage(split, tokenizer, split.tokens * part // PROMPTS) for part in range(PROMPTS))
    else:
        starts = split.document_starts
        texts = (
            _text(split, tokenizer, int(starts[number]), min(int(starts[number + 1]), int(starts[number]) + READ_TOKENS))
            for number in range(min(split.documents, LOOKED_AT))
        )
    yield from (prompt for text in texts if (prompt := _first_words(text.strip())))


def _passage(split: Split, tokenizer: Tokenizer, position: int) -> str:
    """Text from the first paragraph, line, sentence or word on that begins behind a position."""
    text = _text(split, tokenizer, position, min(split.tokens, position + PASSAGE_TOKENS))
    ends = (text.find(end) + len(end) for end in ("\n\n", "\n", ". ", " ") if end in text[: len(text) // 2])
    return text[next(ends, 0) :]


def _text(split: Split, tokenizer: Tokenizer, start: int, stop: int) -> str:
    return tokenizer.decode([token for token in split.read(start, stop).tolist() if token != tokenizer.eos_id])


def _first_words(text: str) -> str:
    """Up to `CHARACTERS` of a text and half of it, whole words where it has spaces; empty if it is shorter than two."""
    room = min(CHARACTERS, len(text) // 2)
    if room < 1:
        return ""
    words = text[:room] if text[room].isspace() else text[:room].rsplit(maxsplit=1)[0]
    # A character that the last tokens hold a part of is no text to continue.
    return words.rstrip("\ufffd").strip()
