"""What was typed, sorted into choices and values; and each mistake in it said in the user's own words.

Hydra's grammar parses. What a key means, whether its value fits, and what was probably meant is answered here from the schema.
"""

import difflib
import functools
import re
import shlex
import types
import typing
from dataclasses import Field, dataclass, field, fields, is_dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from llama_lab.config import grammar, paths
from llama_lab.config.guesses import MEANT, OFF, ON, SWITCHES
from llama_lab.config.loose import PRESET, sort_out
from llama_lab.config.schema import EXAMPLE, GROUPS, SHAPES, WORDS, Problem, RunConfig, shown

COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmbgt])", re.IGNORECASE)
UNITS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
"""How people write large numbers: 5M, 1.5B."""
CHOSEN = (*GROUPS, PRESET)
SEVERAL_FILES = "several files are named as their folder, or by a pattern such as data.path='books/*.txt'"
OF_A_PATH = {"data": "text", "tokenizer": "file"}
"""Options that read what the user names by a path."""


@dataclass
class Typed:
    """Overrides, sorted.

    Attributes:
        parsed: all that could be parsed, in the order typed.
        choices: group or `experiment` -> option; only options that exist. Of two for one group the last counts.
        values: overrides of fields and nodes.
        settings: lines for Hydra itself, such as hydra.mode=MULTIRUN.
        unclear: groups whose option is not known because of a mistake; nothing can be said of their values.
        problems: mistakes so far.
    """

    parsed: list[Override] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    values: list[Override] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def sort_overrides(lines: list[str], config_dir: Path | None, *, allow_sweeps: bool = False) -> Typed:
    """Parse and sort what was typed.

    Args:
        config_dir: a folder with more options and presets.
        allow_sweeps: whether a list of values is none of our business here instead of a mistake.
    """
    whole, loose = sort_out(lines, lambda: {key: known.kind for key, known in any_shape().items()}, config_dir)
    typed = Typed(problems=loose)
    for file, shipped in paths.shadowed(CHOSEN, config_dir) if config_dir is not None else ():
        rule = f"would be ignored, for {shipped} has the same name; rename it, such as own_{file.name}, and type "
        typed.problems.append((str(file), f"{rule}{file.parent.name}=own_{file.stem}"))
    for key in {subject.split()[0].partition("=")[0] for subject, _ in loose}:
        _doubt(typed, key)
    parser = OverridesParser.create()
    for line in whole:
        override = _parsed(parser, line)
        if override is None:
            key = line.partition("=")[0].lstrip("+~")
            typed.problems.append((line, _unreadable(line, key, config_dir)))
            _doubt(typed, key)
            continue
        typed.parsed.append(override)
        if override.is_sweep_override():
            if not allow_sweeps:
                typed.problems.append((line, _several(override)))
                _doubt(typed, override.key_or_group)
        elif override.key_or_group.startswith(("hydra.", "hydra/")):
            _sort_setting(typed, override, line)
        elif override.key_or_group in CHOSEN or override.package is not None or "/" in override.key_or_group:
            _sort_choice(typed, override, line, config_dir)
        elif override.is_delete():
            typed.problems.append((line, f"removes nothing here; what can be left out is typed {override.key_or_group}=null"))
        else:
            typed.values.append(override)
    return typed


def set_value(config: DictConfig, choices: dict[str, str], override: Override) -> list[Problem]:
    """Set one field of the typed tree, or say why not.

    Args:
        config: the tree; changed in place where the value is good.
        choices: option of each group, for the words of a hint.
    """
    key, value = override.key_or_group, override.value()
    known = known_fields({group: node_type(config[group]) for group in SHAPES})
    if key not in known:
        return [(f"{override.get_key_element()}={shown(value)}", unknown_field(key, known, choices))]
    if override.is_add():
        return [(override.input_line or key, f"exists already; type {key}={shown(value)} without the +")]
    return _set(config, key, value, known)


@dataclass(frozen=True)
class Known:
    """What the schema says of a key: the type of its value, a dataclass for a node; whether null is one too, and which words."""

    kind: Any
    optional: bool
    words: tuple[str, ...] = ()

    @property
    def is_node(self) -> bool:
        """Whether the key holds fields of its own."""
        return is_dataclass(self.kind)


def known_fields(shapes: dict[str, type]) -> dict[str, Known]:
    """Every key path of a run, nodes and fields, given the class of each group that has several."""
    return _fields_below(RunConfig, "", tuple(sorted(shapes.items())))


def common_fields(group: str) -> set[str]:
    """Names of the fields that every option of a group has, where its options differ in shape."""
    return set.intersection(*({item.name for item in fields(shape)} for shape in SHAPES[group].values()))


def any_shape() -> dict[str, Known]:
    """Every key path that a run could have, over all shapes of all groups."""
    each = (known_fields({group: shape}) for group, shapes in SHAPES.items() for shape in shapes.values())
    return {key: known for fields in each for key, known in fields.items()}


def node_type(node: Any) -> type:
    """The dataclass that a node of the typed tree stands for."""
    kind = OmegaConf.get_type(node)
    assert kind is not None and is_dataclass(kind)
    return kind


def fields_of_node(key: str, known: dict[str, Known]) -> list[str]:
    """What was probably meant where a node was given a value: its fields that are whole numbers, or its first one."""
    inner = {name: kind for name, kind in known.items() if name.rpartition(".")[0] == key}
    return [name for name, kind in inner.items() if kind.kind is int and not kind.optional] or list(inner)[:1]


def takes_no_value(key: str, known: dict[str, Known]) -> bool:
    """Whether a key is a node that is neither chosen nor left out, so that only its fields can be typed."""
    return key not in CHOSEN and key in known and known[key].is_node and not known[key].optional


def keys_of(problems: list[Problem]) -> set[str]:
    """The keys that problems are about."""
    return {subject.split()[0].partition("=")[0].lstrip("+~") for subject, _ in problems if subject.strip()}


def missing_values(config: DictConfig, unclear: set[str], said: list[Problem]) -> list[Problem]:
    """Fields that no option has a value for, and that were not typed.

    Args:
        said: problems so far; a field that one of them names was typed.
    """
    found: list[Problem] = []
    named = keys_of(said)
    for group in GROUPS:
        if group in unclear:
            continue
        for item in fields(node_type(config[group])):
            key = f"{group}.{item.name}"
            if OmegaConf.is_missing(config[group], item.name) and key not in named:
                found.append(no_value(group, item))
    return found


def no_value(group: str, item: Field[Any]) -> Problem:
    """What to say of a field that has no value and was not typed."""
    key = f"{group}.{item.name}"
    return f"{key}=???", f"has no value yet; type one, e.g. {key}={item.metadata.get(EXAMPLE, '…')}"


def unknown_field(key: str, known: dict[str, Known], choices: dict[str, str]) -> str:
    """What to say of a key that the run does not have."""
    node, _, name = key.rpartition(".")
    name = name.lower().replace("-", "_")
    owners = [
        f"{group}={option}"
        for group, shapes in SHAPES.items()
        for shape, kind in shapes.items()
        if key in known_fields({group: kind})
        for option in paths.options_of_kind(group, shape)
    ]
    group = key.partition(".")[0]
    if owners:
        chosen = f"{group}={choices[group]}" if group in choices else f"the {group} that is chosen"
        return f"is no field of {chosen}; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
    if name in SWITCHES and node in known and known[node].optional:
        return f"is no field; {node} is on unless {node}=null leaves it out"
    # `max_lr` or `lr` without its node: the fields that are named so, or have that word in their names.
    by_name = [other for other in known if other.rpartition(".")[2] == name]
    meant, note = MEANT.get(name, ([], ""))
    if not by_name and meant and (node not in known or any(other.startswith(f"{node}.") for other in meant)):
        return f"is no field; did you mean {' or '.join(meant)}?{f' {note}' if note else ''}"
    by_name = by_name or [other for other in known if name in other.rpartition(".")[2].split("_")]
    # A sound node narrows what was meant; without one the whole path is compared, then the field's own name.
    siblings = [other for other in known if other.rpartition(".")[0] == node]
    pool = [*siblings, PRESET] if node in known or not node else list(known)
    close = difflib.get_close_matches(key, pool, n=1, cutoff=0.75) or by_name
    if not close:
        names = {other.rpartition(".")[2]: other for other in known}
        close = [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.75)]
    close = [name for other in close for name in (fields_of_node(other, known) if takes_no_value(other, known) else [other])]
    if close:
        return f"is no field; did you mean {' or '.join(close[:3])}?"
    listed = ", ".join(other.rpartition(".")[2] for other in siblings)
    return f"is no field; {node} has {listed}" if node in known else f"is no field; at the top there are {PRESET}, {listed}"


def no_option(group: str, option: str, config_dir: Path | None) -> str:
    """What to say of an option that does not exist."""
    there = paths.options(group, config_dir)
    close = difflib.get_close_matches(option, there, n=1) or [name for name in there if name.startswith(option)][:1]
    hint = f"did you mean {group}={close[0]}? " if close else ""
    if group in OF_A_PATH and Path(option).expanduser().exists():
        hint = f"to use what lies there, type {group}={OF_A_PATH[group]} {grammar.word(f'{group}.path', option)}; "
    kind = "preset" if group == PRESET else "option"
    return f"is no {kind}; {hint}there are {', '.join(there)}"


def _doubt(typed: Typed, group: str) -> None:
    """Remember that a group's option, or with the preset every group's, is not known."""
    typed.unclear |= set(GROUPS) if group == PRESET else {group} & set(GROUPS)


def _sort_setting(typed: Typed, override: Override, line: str) -> None:
    key = override.key_or_group
    if key == "hydra.mode" or key.startswith("hydra.sweeper.params"):
        typed.settings.append(line)
    else:
        rule = "is no setting here: runs name their own folders and start their own processes"
        typed.problems.append((line, "is given as --config-dir FOLDER here" if key == "hydra.searchpath" else rule))


def _sort_choice(typed: Typed, override: Override, line: str, config_dir: Path | None) -> None:
    group, option = override.key_or_group, override.value()
    if override.package is not None or group not in CHOSEN:
        typed.problems.append((line, f"names no group; groups are {', '.join(CHOSEN)}, each with one place"))
    elif override.is_delete() and group == PRESET:
        typed.choices.pop(PRESET, None)
    elif override.is_delete():
        typed.problems.append((line, f"cannot be left out; there are {', '.join(paths.options(group, config_dir))}"))
    elif override.is_add() or override.is_force_add():
        typed.problems.append((line, f"exists already; type {group}={shown(option)} without the +"))
        _doubt(typed, group)
    elif group == PRESET and option is None:
        typed.choices.pop(PRESET, None)
    elif group == PRESET and shown(option).lower() in OFF and paths.option_file(group, shown(option), config_dir) is None:
        typed.problems.append((f"{group}={shown(option)}", f"is no preset; for none, type {group}=null"))
        _doubt(typed, group)
    elif paths.option_file(group, shown(option), config_dir) is None or not isinstance(option, str | int):
        typed.problems.append((f"{group}={shown(option)}", no_option(group, shown(option), config_dir)))
        _doubt(typed, group)
    else:
        typed.choices[group] = shown(option)


def _set(config: DictConfig, key: str, value: Any, known: dict[str, Known]) -> list[Problem]:
    subject, field_type = f"{key}={shown(value)}", known[key]
    node = key.rpartition(".")[0]
    if node and OmegaConf.select(config, node) is None:
        return [(subject, f"cannot be set, because {node} is null and so left out of this run")]
    if field_type.is_node and isinstance(value, dict):
        problems: list[Problem] = []
        for name, item in value.items():
            inner = f"{key}.{name}"
            if inner in known:
                problems += _set(config, inner, item, known)
            else:
                problems.append((f"{inner}={shown(item)}", unknown_field(inner, known, {})))
        return problems
    if field_type.is_node and not (value is None and field_type.optional):
        switch = shown(value).lower()
        if field_type.optional and switch in ("0", *OFF):
            return [(subject, f"is no way to leave it out; type {key}=null")]
        if not field_type.optional and switch in ("null", *OFF):
            return [(subject, "cannot be left out")]
        if field_type.optional and switch in ON:
            is_on = OmegaConf.select(config, key) is not None
            null = f"cannot be set, because {key} is null and so left out of this run"
            return [(subject, f"need not be typed; only {key}=null leaves it out" if is_on else null)]
        counts = fields_of_node(key, known)
        return [(subject, "holds several values; type " + " ".join(f"{name}={shown(value)}" for name in counts))]
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return [(subject, "holds a list or a mapping where each item is one value")]
    if field_type.words and value not in (None, *field_type.words) and type(value) is not int:
        return [(subject, _wrong_type(key, value, known, config))]
    try:
        OmegaConf.update(config, key, value)
    except GrammarParseError:
        return [(subject, "holds a ${ that names no value, or is not closed; where it is meant as text, type \\${")]
    except OmegaConfBaseException:
        return [(subject, _wrong_type(key, value, known, config))]
    return []


def _off(key: str, value: Any, field_type: Known, known: dict[str, Known]) -> str | None:
    """How to type what was meant by a word such as `none`; None where it was no such word, or nothing can be left out."""
    node = key.rpartition(".")[0]
    if value is not None and shown(value).lower() not in OFF:
        return None
    if field_type.optional:
        return f"type {key}=null"
    return f"to leave {node} out, type {node}=null" if node in known and known[node].optional else None


def _wrong_type(key: str, value: Any, known: dict[str, Known], config: DictConfig) -> str:
    """What kind of value a field takes, with one that works."""
    field_type = known[key]
    works = _off(key, value, field_type, known)
    now = OmegaConf.select(config, key, throw_on_missing=False)
    if field_type.kind is int and isinstance(value, float) and value.is_integer():
        return f"is not written as a whole number; type {key}={int(value)}"
    if field_type.kind in (int, float) and (count := COUNT.fullmatch(shown(value))) is not None:
        number = Decimal(count[1]) * Decimal(10) ** UNITS[count[2].lower()]
        return f"is not written as a number; type {key}={number.normalize():f}"
    if isinstance(field_type.kind, type) and issubclass(field_type.kind, Enum):
        names = [member.name for member in field_type.kind] + (["null"] if field_type.optional else [])
        return f"is none of {', '.join(names)}; {works or f'e.g. {key}={shown(now)}'}"
    if isinstance(value, str) and (meant := grammar.one_number(value, field_type.kind)) is not None:
        return f"is not written as a number; type {key}={meant}"
    if isinstance(value, list) and field_type.kind is str:
        return f"is a list; {SEVERAL_FILES if key == 'data.path' else 'give one text'}"
    if typing.get_origin(field_type.kind) is list:
        return f"is no list; e.g. {shlex.quote(f'{key}=[{shown(value)}]')}"
    kinds = {int: ("a whole number", 1), float: ("a number", 0.1), bool: ("true or false", True), str: ("a text", "name")}
    words, example = kinds[field_type.kind]
    kinds_of_value = [words, *field_type.words, *(["null"] if field_type.optional else [])]
    listed = " or ".join(filter(None, [", ".join(kinds_of_value[:-1]), kinds_of_value[-1]]))
    return f"is not {listed}; {works or f'e.g. {key}={shown(example if now is None else now)}'}"


def _parsed(parser: OverridesParser, line: str) -> Override | None:
    """An override as Hydra reads it, or as the text that its value is where Hydra cannot; None where it is neither."""
    key = line.partition("=")[0].lstrip("+")
    try:
        override = parser.parse_override(line)
    except HydraException:
        known = any_shape().get(key)
        kind = None if known is None else known.kind
        as_text = grammar.as_text(line) if kind is str else grammar.as_texts(line) if kind == list[str] else None
        if as_text is None:
            return None
        override = parser.parse_override(as_text)
        # A sweep hands its jobs the words that were typed.
        override.input_line = line
    return override if override.key_or_group else None


def _unreadable(line: str, key: str, config_dir: Path | None) -> str:
    fields_there = any_shape()
    known = fields_there.get(key)
    value = line.partition("=")[2]
    if key in CHOSEN and not grammar.FUNCTION.match(value) and not set(value) & set(grammar.CURLY):
        return no_option(key, value, config_dir)
    if known is None and key not in CHOSEN and re.fullmatch(r"[\w.\[\]-]+", key) and not key.startswith("hydra."):
        return unknown_field(key, fields_there, {})
    return grammar.unreadable(line, None if known is None or known.is_node else known.kind)


def _several(override: Override) -> str:
    key, _, value = (override.input_line or "").partition("=")
    known = any_shape()
    if takes_no_value(key, known):
        return f"stands for several runs, and {key} holds several values; type -m {fields_of_node(key, known)[0]}={value}"
    if re.fullmatch(r"\w[\w.]*", key) and key not in known and key not in CHOSEN and not key.startswith("hydra."):
        return unknown_field(key, known, {})
    said = grammar.several(key, value, known[key].kind if key in known else None)
    return f"{said}; {SEVERAL_FILES}" if key == "data.path" else said


@functools.cache
def _fields_below(node: type, at: str, shapes: tuple[tuple[str, type], ...]) -> dict[str, Known]:
    chosen, found = dict(shapes), {}
    hints = typing.get_type_hints(node)
    for item in fields(node):
        if item.metadata.get("omegaconf_ignore"):
            continue
        kind, optional = _without_none(hints[item.name])
        key = at + item.name
        kind = chosen.get(key, kind)
        found[key] = Known(int, True, item.metadata[WORDS]) if WORDS in item.metadata else Known(kind, optional)
        if is_dataclass(kind):
            found |= _fields_below(kind, f"{key}.", shapes)
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A field's type, and whether None is allowed beside it."""
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(typing.get_args(hint))
    return hint, False
