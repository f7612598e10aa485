"""Blocks as one HTML file that needs no other: style, script and pictures are inside, and nothing is fetched.

Whatever comes from runs is text: names, errors, samples are escaped, and a policy in the page lets only our own script run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from llama_lab.lab.report.blocks import Block, Figure, Fold, Lines, Prose, Section, Table, Texts
from llama_lab.lab.report.chart import line_sample
from llama_lab.lab.report.text import escaped, legible

ASSETS = Path(__file__).parent / "page"
LONG_CHARACTERS = 60
SMALL_FIGURE = '<figure class="chart small">'


def write_page(title: str, sections: Sequence[Section], names: Sequence[str]) -> str:
    """The whole page.

    Args:
        names: of the arms, in the order of their colours; the script reads them out.
    """
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    # In a script element only `<` could end it.
    listed = json.dumps([legible(name) for name in names]).replace("<", "\\u003c")
    links = "".join(
        f'<li><a href="#{section.name}">{escaped(section.title)}</a></li>' for section in sections if section.name != "answer"
    )
    body = "\n".join(_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{escaped(title)}</h1></header>
<main>
{body.replace("</section>", f'</section><nav aria-label="Sections"><ul>{links}</ul></nav>', 1)}
</main>
<script type="application/json" id="names">{listed}</script>
<script>{script}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    name = section.name
    heading = f'<h2 id="{name}-title">{escaped(section.title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{_blocks(section.blocks)}</section>'


def _blocks(blocks: Sequence[Block]) -> str:
    """Blocks one below the other, small figures side by side."""
    parts: list[str] = []
    smalls: list[str] = []
    for block in [*blocks, None]:
        if isinstance(block, Figure) and block.html.startswith(SMALL_FIGURE):
            smalls.append(block.html)
            continue
        if smalls:
            parts.append(f'<div class="smalls">{"".join(smalls)}</div>')
            smalls = []
        if block is not None:
            parts.append(_block(block))
    return "".join(parts)


def _block(block: Block) -> str:
    match block:
        case Prose():
            return f'<div class="{block.kind}">{"".join(f"<p>{escaped(line)}</p>" for line in block.lines)}</div>'
        case Table():
            return _table(block)
        case Figure():
            return block.html
        case Lines():
            lines = "\n".join(escaped(line) for line in block.lines)
            return f'<pre tabindex="0" role="region" aria-label="{escaped(block.name)}">{lines}</pre>'
        case Fold():
            return f"<details><summary>{escaped(block.summary)}</summary>{_blocks(block.blocks)}</details>"
        case Texts():
            texts = "".join(
                f'<div><p class="whose">{line_sample(arm)}{escaped(whose)}</p><p class="text" dir="auto">{escaped(text)}</p></div>'
                for whose, arm, text in block.texts
            )
            return f'<p class="prompt" dir="auto">{escaped(block.prompt)}</p><div class="texts">{texts}</div>'


def _table(table: Table) -> str:
    words = set(table.words)
    head = "".join(
        f'<th scope="col"{_class(number in words, heading)}>{escaped(heading)}</th>'
        for number, heading in enumerate(table.headings)
    )
    arms = table.arms or [None] * len(table.rows)
    is_marked = any(arm is not None for arm in arms)
    body = "".join(_row(row, words, line_sample(arm) if is_marked else "") for row, arm in zip(table.rows, arms, strict=True))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(table.caption)}"><table>'
        f"<caption><span>{escaped(table.caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Sequence[str], words: set[int], sample: str) -> str:
    cells = [f'<th scope="row"{_class(0 in words, row[0])}>{sample}{escaped(row[0])}</th>']
    cells += [f"<td{_class(number in words, cell)}>{escaped(cell)}</td>" for number, cell in enumerate(row[1:], start=1)]
    return f"<tr>{''.join(cells)}</tr>"


def _class(is_words: bool, text: str) -> str:
    names = ["w"] * is_words + ["long"] * (len(text) > LONG_CHARACTERS)
    return f' class="{" ".join(names)}"' if names else ""
