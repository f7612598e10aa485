"""`llama-lab train --help PART`: fields of a config with their meanings, as the schema's docstrings have them."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_lab.arguments import UsageError
from llama_lab.config.paths import options_of_kind
from llama_lab.vocabulary import Meaning, headers, nodes

ALL = "all"
WIDEST = 120
INDENT = " " * 6


def field_help(topics: Sequence[str], config_dir: Path | None = None) -> str:
    """What is to be known of parts and fields.

    Args:
        topics: parts (`optim`), `run` for the fields that belong to none, fields (`optim.max_lr`, `max_lr`), or `all`.
        config_dir: a folder of further options.

    Raises:
        UsageError: a topic is none of these.
    """
    found = nodes()
    said = []
    for topic in dict.fromkeys(topics):
        parts = list(found) if topic == ALL else [topic] if topic in found else []
        fields = [field for node in found.values() for field in node.fields if _is_meant(field, topic)]
        if parts:
            said += [_part(part, config_dir) for part in parts]
        elif fields:
            said += ["\n".join(_field(field, config_dir)) for field in fields]
        else:
            raise UsageError(_unknown(topic))
    return "\n\n".join(said)


def _is_meant(field: Meaning, topic: str) -> bool:
    return topic in (field.path, field.path.rpartition(".")[2])


def _part(part: str, config_dir: Path | None) -> str:
    node, options = nodes()[part], headers(part, config_dir)
    lines = [f"{part}: {node.text}" if node.text else "Fields of a run that belong to no part:"]
    if options:
        width = max(map(len, options))
        lines = [f"{part}, a group with options:", *(f"  {part}={option:<{width}}  {said}" for option, said in options.items())]
    for field in node.fields:
        lines += ["", *_field(field, config_dir)]
    return "\n".join(lines)


def _field(field: Meaning, config_dir: Path | None) -> Iterator[str]:
    group = field.path.partition(".")[0]
    of = [option for kind in field.kinds for option in options_of_kind(group, kind, config_dir)]
    yield f"  {field.path}   {field.values}" + (f"   ({group}={', '.join(of)})" if of else "")
    yield from _wrapped(field.text, INDENT)


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _unknown(topic: str) -> str:
    found = nodes()
    fields = [field.path for node in found.values() for field in node.fields]
    known = ([ALL, *found], fields, [path.rpartition(".")[2] for path in fields])
    close = [match for names in known for match in difflib.get_close_matches(topic, names, n=1)]
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(found)}, {ALL}, and the name of any field"
    return f"llama-lab train --help {topic}: there is no such part or field; {hint}"
