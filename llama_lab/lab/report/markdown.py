"""Blocks as Markdown, for a commit beside a study's presets."""

import re
from collections.abc import Sequence

from llama_lab.lab.report.blocks import Block, Figure, Fold, Lines, Prose, Section, Table, Texts
from llama_lab.lab.report.text import legible


def write_markdown(title: str, sections: Sequence[Section], picture: str | None) -> str:
    """The whole report.

    Args:
        picture: name of the file with the curves, beside it; null: there is none.
    """
    parts = [f"# {_text(title)}"]
    for section in sections:
        inside = [part for block in section.blocks for part in _block(block)]
        if section.name == "curves" and picture is not None:
            inside.insert(0, f"![Curves of every arm over training tokens]({picture})")
        if inside and section.name != "answer":  # what is a picture alone is only on the page
            parts.append(f"## {_text(section.title)}")
        parts += inside
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> list[str]:
    match block:
        case Prose():
            return [_text(line) for line in block.lines]
        case Table():
            return [f"{_text(block.caption)}:", _table(block)]
        case Figure():
            return []
        case Lines():
            return [_fenced("\n".join(block.lines))]
        case Fold():
            inside = [part for inner in block.blocks for part in _block(inner)]
            return ["\n\n".join([f"<details><summary>{_text(block.summary)}</summary>", *inside, "</details>"])]
        case Texts():
            return [
                f"> {_text(block.prompt)}",
                *(part for whose, _, text in block.texts for part in (f"{_text(whose)}:", _fenced(text))),
            ]


def _table(table: Table) -> str:
    rules = [":--" if number in set(table.words) else "--:" for number in range(len(table.headings))]
    lines = [table.headings, rules, *table.rows]
    return "\n".join(f"| {' | '.join(cell if line is rules else _text(cell) for cell in line)} |" for line in lines)


def _text(text: str) -> str:
    """Text in which no letter means anything to Markdown or HTML."""
    escaped = re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", legible(text))
    return re.sub(r"\s*\n\s*", " ⏎ ", escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;"))


def _fenced(text: str) -> str:
    """Text as it is, between fences longer than any inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{legible(text)}\n{fence}"
