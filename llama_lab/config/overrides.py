"""What was typed, sorted into choices and values; and each mistake in it said in the user's own words.

Hydra's grammar parses. What a key means, whether its value fits, and what was probably meant is answered here from the schema.
"""

import difflib
import functools
import re
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from llama_lab.config import paths
from llama_lab.config.loose import PRESET, sort_out
from llama_lab.config.schema import EXAMPLE, GROUPS, SHAPES, WORDS, Problem, RunConfig, shown

COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmbgt])", re.IGNORECASE)
UNITS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
"""How people write large numbers: 5M, 1.5B."""
CHOSEN = (*GROUPS, PRESET)


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
        try:
            override = parser.parse_override(line)
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            typed.problems.append((line, _unreadable(line)))
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


def missing_values(config: DictConfig, unclear: set[str]) -> list[Problem]:
    """Fields that no option has a value for, and that were not typed."""
    found: list[Problem] = []
    for group in GROUPS:
        if group in unclear:
            continue
        for item in fields(node_type(config[group])):
            if OmegaConf.is_missing(config[group], item.name):
                key = f"{group}.{item.name}"
                example = item.metadata.get(EXAMPLE, "…")
                found.append((f"{key}=???", f"has no value yet; type one, e.g. {key}={example}"))
    return found


def unknown_field(key: str, known: dict[str, Known], choices: dict[str, str]) -> str:
    """What to say of a key that the run does not have."""
    node, _, name = key.rpartition(".")
    owners = [
        f"{group}={shape}"
        for group, shapes in SHAPES.items()
        for shape, kind in shapes.items()
        if key in known_fields({group: kind})
    ]
    group = key.partition(".")[0]
    if owners:
        chosen = f"{group}={choices[group]}" if group in choices else f"the {group} that is chosen"
        return f"is no field of {chosen}; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
    # `max_lr` or `lr` without its node: the fields that are named so, or have that word in their names.
    by_name = [other for other in known if other.rpartition(".")[2] == name]
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
    close = difflib.get_close_matches(option, there, n=1)
    hint = f"did you mean {group}={close[0]}? " if close else ""
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
        if value is None:
            return [(subject, "cannot be left out")]
        counts = fields_of_node(key, known)
        return [(subject, "holds several values; type " + " ".join(f"{name}={shown(value)}" for name in counts))]
    if field_type.words and value not in (None, *field_type.words) and type(value) is not int:
        return [(subject, _wrong_type(key, value, field_type, config))]
    try:
        OmegaConf.update(config, key, value)
    except GrammarParseError:
        return [(subject, "holds a ${ that names no value, or is not closed; where it is meant as text, type \\${")]
    except OmegaConfBaseException:
        return [(subject, _wrong_type(key, value, field_type, config))]
    return []


def _wrong_type(key: str, value: Any, field_type: Known, config: DictConfig) -> str:
    """What kind of value a field takes, with one that works."""
    now = OmegaConf.select(config, key, throw_on_missing=False)
    if field_type.kind is int and isinstance(value, float) and value.is_integer():
        return f"is not written as a whole number; type {key}={int(value)}"
    if field_type.kind in (int, float) and (count := COUNT.fullmatch(shown(value))) is not None:
        number = Decimal(count[1]) * Decimal(10) ** UNITS[count[2].lower()]
        return f"is not written as a number; type {key}={number.normalize():f}"
    if isinstance(field_type.kind, type) and issubclass(field_type.kind, Enum):
        names = [member.name for member in field_type.kind]
        return f"is none of {', '.join(names)}; e.g. {key}={shown(now)}"
    if typing.get_origin(field_type.kind) is list:
        return f"is no list; e.g. {key}=[{shown(value)}]"
    kinds = {int: ("a whole number", 1), float: ("a number", 0.1), bool: ("true or false", True), str: ("a text", "name")}
    words, example = kinds[field_type.kind]
    kinds_of_value = [words, *field_type.words, *(["null"] if field_type.optional else [])]
    listed = " or ".join(filter(None, [", ".join(kinds_of_value[:-1]), kinds_of_value[-1]]))
    return f"is not {listed}; e.g. {key}={shown(example if now is None else now)}"


def _unreadable(line: str) -> str:
    key, _, value = line.partition("=")
    if not key.strip():
        return "has no key before the =; type key=value"
    quoted = '"' + value.strip("\"'").replace('"', "") + '"'
    return f"cannot be read; a value with spaces or any of , : = ( ) [ ] {{ }} in it goes in quotes: '{key}={quoted}'"


def _several(override: Override) -> str:
    line = override.input_line or ""
    key, _, value = line.partition("=")
    if takes_no_value(key, any_shape()):
        return f"stands for several runs, and {key} holds several values; type -m {fields_of_node(key, any_shape())[0]}={value}"
    return f"stands for several runs; start them with -m, or type {key}=[{value}] for one list, or give one value"


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
