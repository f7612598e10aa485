"""What a corpus is: documents in a fixed order, each on the training or the validation side.

`docs` and `text` make corpora; `prepare` turns them into tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Protocol

Say = Callable[[str], None]
"""Takes a short sentence about progress."""


class Side(IntEnum):
    """What a document is used for."""

    train = 0
    val = 1


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands for itself: nothing before it helps to predict it.

    Attributes:
        name: the source it was read from: a file's name below the path that was given, or a module's name.
        text: not empty, and encodable as UTF-8.
        item: number of the line, row or part within the source, from 1; 0 where the source is one document.
    """

    name: str
    text: str
    item: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order, each with its side. A large text is never held whole.

    Attributes:
        documents: gives (side, document) from the nth one on; each call reads anew.
        count: documents of both sides.
        text_bytes: UTF-8 bytes of both sides.
        counts: what became of everything that was read: `read`, `kept`, and a number for each reason to drop.
    """

    documents: Callable[[int], Iterator[tuple[Side, Document]]]
    count: int
    text_bytes: int
    counts: dict[str, int] = field(default_factory=dict)

    def side(self, side: Side) -> Iterator[Document]:
        """The documents of one side, from the first on."""
        return (document for found, document in self.documents(0) if found is side)

    @classmethod
    def of(cls, train: list[Document], val: list[Document], counts: dict[str, int] | None = None) -> "Corpus":
        """A corpus that is small enough to be held: the training documents, then the others."""
        placed = [(Side.train, document) for document in train] + [(Side.val, document) for document in val]
        size = sum(len(document.text.encode()) for _, document in placed)
        return cls(lambda first: islice(iter(placed), first, None), len(placed), size, counts or {"kept": len(placed)})


class Source(Protocol):
    """A text that was found but not read through yet."""

    name: str
    """Kind of source, as in the config: `docs` or `text`."""

    def fingerprint(self) -> str:
        """Changes whenever the documents or their split might. Cheap beside `corpus`."""
        ...

    def corpus(self, say: Say, work: Path) -> Corpus:
        """Read the text and divide it.

        Args:
            work: a folder for what is too large to be held in memory, or too expensive to be found twice. It is kept until the
                shards are complete, and handed in again when a killed preparation is started anew.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise ConfigError if the text has changed since `fingerprint`."""
        ...


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only."""
    return words_digest(text.split())


def words_digest(words: list[str]) -> bytes:
    """`text_digest` of a text whose words, parted by white space, are known."""
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def hash_order(name: str) -> int:
    """Place of a name in an order that has nothing to do with its meaning, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
