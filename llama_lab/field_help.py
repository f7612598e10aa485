"""`llama-lab train --help WORD`: what a word stands for in a config, as the schema's docstrings and the YAML files have it."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_lab.arguments import UsageError
from llama_lab.config.guesses import MEANT
from llama_lab.config.paths import option_file, options_of_kind
from llama_lab.vocabulary import Meaning, groups, headers, nodes

ALL = "all"
PRESET = "experiment"
WIDEST = 120
INDENT = " " * 6


def field_help(topics: Sequence[str], config_dir: Path | None = None) -> str:
    """What is to be known of parts, fields, options and presets.

    Args:
        topics: parts (`optim`), `run` for the fields that belong to none, `all`, fields (`optim.max_lr`, `max_lr`), `experiment`,
            options and presets (`adamw`, `smoke`), or what fields are called elsewhere (`learning_rate`).
        config_dir: a folder of further options.

    Raises:
        UsageError: a topic is none of these.
    """
    said = []
    for topic in dict.fromkeys(topics):
        about = _about(topic, config_dir)
        if not about:
            raise UsageError(_unknown(topic))
        said += about
    return "\n\n".join(said)


def topics(config_dir: Path | None = None, *, fields: bool = False) -> list[str]:
    """Parts, options and presets that `field_help` knows, or the paths of all fields."""
    found = nodes()
    if fields:
        return [field.path for node in found.values() for field in node.fields]
    known = [option for group in (*groups(config_dir), PRESET) for option in headers(group, config_dir)]
    return [*found, ALL, PRESET, *known]


def _about(topic: str, config_dir: Path | None) -> list[str]:
    """Paragraphs about a topic; none where it is not known."""
    found = nodes()
    if topic == ALL:
        return [_part(part, config_dir) for part in found]
    if topic in found:
        return [_part(topic, config_dir)]
    if topic == PRESET:
        return ["\n".join(["experiment, presets to start from:", *_options(PRESET, config_dir)])]
    fields = [field for node in found.values() for field in node.fields]
    if named := [field for field in fields if topic in (field.path, _name(field))]:
        return ["\n".join(_field(field, config_dir)) for field in named]
    chosen = [(group, file) for group in (*groups(config_dir), PRESET) if (file := option_file(group, topic, config_dir))]
    if chosen:
        return [f"{group}={topic}, as {file} has it:\n\n{file.read_text(encoding='utf-8').strip()}" for group, file in chosen]
    if topic in MEANT:
        keys, note = MEANT[topic]
        here = f"{topic} is called {' or '.join(keys)} here" + (f": {note}" if note else "")
        return [here, *(paragraph for key in keys for paragraph in _about(key, config_dir))]
    return ["\n".join(_field(field, config_dir)) for field in fields if topic in _name(field).split("_")]


def _name(field: Meaning) -> str:
    return field.path.rpartition(".")[2]


def _part(part: str, config_dir: Path | None) -> str:
    node, options = nodes()[part], _options(part, config_dir)
    lines = [f"{part}: {node.text}" if node.text else "Fields of a run that belong to no part:"]
    if options:
        lines = [f"{part}, a group with options:", *options]
    for field in node.fields:
        lines += ["", *_field(field, config_dir)]
    return "\n".join(lines)


def _options(group: str, config_dir: Path | None) -> list[str]:
    """A line for each option of a group; none of a part that is no group."""
    options = headers(group, config_dir)
    width = max(map(len, options), default=0)
    return [f"  {group}={option:<{width}}  {said}".rstrip() for option, said in options.items()]


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
    fields = [field for node in found.values() for field in node.fields]
    known = ([ALL, PRESET, *found], [field.path for field in fields], list(map(_name, fields)), list(MEANT))
    close = [match for names in known for match in difflib.get_close_matches(topic, names, n=1)]
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(found)}, {PRESET}, {ALL}, and any field or option"
    return f"llama-lab train --help {topic}: there is no such part, field or option; {hint}"
