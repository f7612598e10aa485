"""What a corpus is: documents in a fixed order, each on the training or the validation side.

`docs` and `text` make corpora; `prepare` turns them into tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

Say = Callable[[str], None]
"""Takes a short sentence about progress."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands for itself: nothing before it helps to predict it.

    Attributes:
        name: where it comes from, for messages.
        text: not empty, and encodable as UTF-8.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The two sides of a text. Each call starts again from the first document, so that a large text is never held whole."""

    train: Callable[[], Iterator[Document]]
    val: Callable[[], Iterator[Document]]


class Source(Protocol):
    """A text that was found but not read through yet."""

    name: str
    """Kind of source, as in the config: `docs` or `text`."""

    def fingerprint(self) -> str:
        """Changes whenever the documents or their split might. Cheap beside `corpus`."""
        ...

    def corpus(self, say: Say) -> Corpus:
        """Read the text and divide it."""
        ...

    def check_unchanged(self) -> None:
        """Raise ConfigError if the text has changed since `fingerprint`."""
        ...


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def hash_order(name: str) -> int:
    """Place of a name in an order that has nothing to do with its meaning, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
