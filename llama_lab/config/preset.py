"""What a preset and the primary config say themselves, read from their files: choices, values, and what a run is called after."""

import functools
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from llama_lab.config import paths
from llama_lab.config.grammar import word
from llama_lab.config.overrides import PRESET, Typed, common_fields, known_fields, no_value
from llama_lab.config.schema import GROUPS, SHAPES, Problem, shown

LABELLED = ("model", "data", "tokenizer", "optim", "schedule")
"""Groups whose options appear in a run's name, in this order."""
ALIKE = ("data", "schedule")
"""Groups whose common fields go with a preset's budget and not with its option: what is read at once, warm-up."""


@dataclass
class Preset:
    """A preset's own delta.

    Attributes:
        choices: group -> option.
        values: key path -> value, for keys below a group.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def read_preset(name: str, config_dir: Path | None = None) -> Preset:
    """What a preset sets, those it builds on included."""
    file = paths.option_file(PRESET, name, config_dir)
    preset = Preset()
    try:
        content = _content(file) if file is not None else None
    except YAMLError:
        content = None  # said in full when it is composed
    if not isinstance(content, DictConfig):
        return preset
    for entry in content.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            base = read_preset(entry.rpartition("/")[2], config_dir)
            preset.choices |= base.choices
            preset.values |= base.values
        elif isinstance(entry, DictConfig):
            preset.choices |= _choices(entry)
    for group in GROUPS:
        if isinstance(content.get(group), DictConfig):
            preset.values |= _leaves(OmegaConf.to_container(content[group], resolve=False), f"{group}.")
    return preset


def default_choices() -> dict[str, str]:
    """Option of each group in a run that nothing was typed for."""
    content = _content(paths.config_folder("conf") / "config.yaml")
    assert isinstance(content, DictConfig) and isinstance(content.defaults, ListConfig)
    found: dict[str, str] = {}
    for entry in content.defaults:
        if isinstance(entry, DictConfig):
            found |= _choices(entry)
    return found


def label(choices: dict[str, str], config_dir: Path | None = None) -> str:
    """What was chosen, in a few words: the model and the data, or the preset; then what differs from the default or the preset."""
    usual = default_choices()
    words = [choices["model"], choices["data"]]
    preset = choices.get(PRESET)
    if preset is not None:
        usual |= read_preset(preset, config_dir).choices
        words = [preset]
    said = () if preset is not None else ("model", "data")
    return "-".join(words + [choices[group] for group in LABELLED if group not in said and choices[group] != usual[group]])


def swap_problems(typed: Typed, config_dir: Path | None = None) -> dict[str, list[Problem]]:
    """Group -> why its option cannot be swapped: the preset's values were made for another option and would stay silently.

    What the option has no value for is said as well, so that one answer holds all that is to be typed.
    """
    name = typed.choices.get(PRESET)
    if name is None:
        return {}
    preset = read_preset(name, config_dir)
    own = {override.key_or_group for override in typed.values}
    usual = default_choices() | preset.choices
    found: dict[str, list[Problem]] = {}
    for group in GROUPS:
        option = typed.choices.get(group, usual[group])
        alike = {f"{group}.{name}" for name in common_fields(group)} if group in ALIKE else set()
        left = {key: value for key, value in preset.values.items() if key.startswith(f"{group}.") and key not in own | alike}
        if option != usual[group] and left:
            rule = f"would keep what {PRESET}={name} sets for {group}={usual[group]}: {_typed(left)}; "
            lacking = _lacking(group, option, own | left.keys(), config_dir)
            found[group] = [(f"{group}={option}", rule + _instead(group, option, left, config_dir)), *lacking]
    return found


def _lacking(group: str, option: str, there: set[str], config_dir: Path | None) -> list[Problem]:
    """Fields of an option that neither it nor anything else has a value for."""
    shape, own = _option(group, option, config_dir)
    items = fields(SHAPES[group][shape]) if shape in SHAPES.get(group, {}) else ()
    return [no_value(group, item) for item in items if item.default == MISSING and f"{group}.{item.name}" not in own.keys() | there]


def _instead(group: str, option: str, left: dict[str, Any], config_dir: Path | None) -> str:
    """What to type where a preset's values would stay under another option than theirs."""
    shape, own = _option(group, option, config_dir)
    known = known_fields({group: SHAPES[group][shape]} if group in SHAPES and shape in SHAPES[group] else {})
    if foreign := [key for key in left if key not in known]:
        return f"{group}={option} has no {' and no '.join(foreign)}, so start without the preset"
    these, them = ("that", "it") if len(left) == 1 else ("these", "them")
    words = [f"type {these} as well to keep {them}"]
    if (others := {key: own[key] for key in left if key in own}) != left and len(others) == len(left):
        words.append(f"{_typed(others)} as {group}={option} has {them}")
    return ", or ".join([*words, "start without the preset"])


def _typed(values: dict[str, Any]) -> str:
    """Values as a shell takes them."""
    words = [word(key, value) if isinstance(value, str) else shlex.quote(f"{key}={shown(value)}") for key, value in values.items()]
    return " ".join(words)


def _option(group: str, option: str, config_dir: Path | None) -> tuple[str, dict[str, Any]]:
    """(shape of an option, its values by key path), with what it has from options that it builds on."""
    file = paths.option_file(group, option, config_dir)
    try:
        content = _content(file) if file is not None else None
    except YAMLError:
        content = None  # said in full when it is composed
    shape: str = ""
    own: dict[str, Any] = {}
    if not isinstance(content, DictConfig):
        return shape, own
    for entry in content.get("defaults") or []:
        name = str(entry).partition("@")[0] if isinstance(entry, str) else "_self_"
        if name.startswith("/schema/"):
            shape = name.rpartition("/")[2]
        elif name not in ("_self_", option):
            base, inherited = _option(group, name.rpartition("/")[2], config_dir)
            shape, own = base or shape, own | inherited
    tree = OmegaConf.to_container(content, resolve=False)
    assert isinstance(tree, dict)
    return shape, own | _leaves({key: value for key, value in tree.items() if key != "defaults"}, f"{group}.")


def _content(file: Path) -> Any:
    """What a file says; read again once it has changed, for the jobs of a sweep all ask for the same few."""
    stat = file.stat()
    return _loaded(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)
def _loaded(file: Path, modified: int, size: int) -> Any:
    return OmegaConf.load(file)


def _choices(entry: DictConfig) -> dict[str, str]:
    """Choices of one line of a defaults list: `model: x` or `override /model: x`."""
    pairs = [(str(key).rpartition(" ")[2].lstrip("/"), value) for key, value in entry.items()]
    return {group: str(option) for group, option in pairs if group in GROUPS}


def _leaves(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, item in tree.items() for key, value in _leaves(item, f"{prefix}{name}.").items()}
