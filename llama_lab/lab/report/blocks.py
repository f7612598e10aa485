"""What a report is made of, before it is HTML or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prose:
    """Sentences, one a line.

    Attributes:
        kind: `plain`, `answer`, `note` or `wrong`.
    """

    lines: Sequence[str]
    kind: str = "plain"


@dataclass(frozen=True)
class Table:
    """Cells under headings; the first column names the row.

    Attributes:
        caption: what it shows.
        words: columns whose cells are words, set left; the others are numbers, set right.
        arms: number of the arm that a row is about, for its line's sample; null or none: no sample.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    arms: Sequence[int | None] = ()


@dataclass(frozen=True)
class Figure:
    """Something drawn as HTML, which Markdown leaves to the picture beside it."""

    html: str


@dataclass(frozen=True)
class Texts:
    """Texts side by side.

    Attributes:
        prompt: what they go on from.
        texts: (whose, arm's number, text).
    """

    prompt: str
    texts: Sequence[tuple[str, int, str]]


@dataclass(frozen=True)
class Lines:
    """Text that is set as it is, such as commands.

    Attributes:
        name: what it is, said to those who do not see it.
    """

    name: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a heading that opens them."""

    summary: str
    blocks: Sequence["Block"]


Block = Prose | Table | Figure | Texts | Lines | Fold


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        name: of the place in the page, for links.
    """

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)
