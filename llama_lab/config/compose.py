"""From what was typed to a run: choices -> typed tree -> values -> plain dataclasses, checked.

Hydra composes the choices, options and presets alike; `overrides.py` then sets each value by itself, so that every mistake is found
and named, not only the first. Hydra's global state is put back as it was: this works in a notebook, many times in a process, and
inside another Hydra application.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from llama_lab.config import paths
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import SCIENCE, science, values
from llama_lab.config.literal import literal
from llama_lab.config.overrides import (
    PRESET,
    Typed,
    any_shape,
    common_fields,
    keys_of,
    missing_values,
    no_option,
    node_type,
    set_value,
    sort_overrides,
    unknown_field,
)
from llama_lab.config.preset import LABELLED, label, swap_problems
from llama_lab.config.schema import GROUPS, SHAPES, Origin, Problem, RunConfig, shown
from llama_lab.config.validate import problems as problems_of


@dataclass(frozen=True)
class Request:
    """What overrides ask for, before any value is looked at.

    Attributes:
        overrides: parsed, in the order typed.
        choices: option of each group, and the preset as `experiment` if there is one. A swept group has its default.
        is_sweep: whether the preset, or `hydra.mode=MULTIRUN`, makes this a sweep.
        sweep_params: key -> values that the preset sweeps over, as text in Hydra's sweep grammar.
    """

    overrides: list[Override]
    choices: dict[str, str]
    is_sweep: bool
    sweep_params: dict[str, str]


def compose(overrides: list[str], *, config_dir: str | Path | None = None, nodes: Collection[str] | None = None) -> RunConfig:
    """The run that these overrides describe, checked as far as it can be without looking at the machine.

    Args:
        overrides: `group=option`, `group.field=value`, `experiment=preset`, as on the command line. Of a preset that sweeps, the
            one run that its jobs vary.
        config_dir: a folder with more options and presets, `<group>/<option>.yaml`.
        nodes: the nodes that matter, where no run is to be started: only they are checked, each by itself. null: the whole run.

    Raises:
        ConfigError: everything wrong with the overrides and with the run that they make.
    """
    if not isinstance(overrides, list | tuple) or not all(isinstance(word, str) for word in overrides):
        raise ConfigError([(f"overrides={overrides!r}", "is no list of texts; try ['training_tokens=200_000']")], scope="this call")
    if config_dir is not None:
        config_dir = _own_folder(config_dir)
    typed = sort_overrides(list(overrides), config_dir)
    found = typed.problems
    swaps = swap_problems(typed, config_dir)
    found += [problem for problems in swaps.values() for problem in problems]
    typed.unclear |= set(swaps)
    config = _compose_choices(typed, config_dir)
    choices = _choices(config)
    base = _base_values(config)
    found += _without_kind(config, choices, typed)
    for override in typed.values:
        key = override.key_or_group
        if key.partition(".")[0] not in typed.unclear:
            found += set_value(config, choices, override)
        elif key not in any_shape():
            found.append((f"{key}={shown(override.value())}", unknown_field(key, any_shape(), {})))
    found += missing_values(config, typed.unclear if nodes is None else typed.unclear | (set(GROUPS) - set(nodes)), found)
    run = _build(config, Origin(choices=choices, label=label(choices, config_dir), base=base), found)
    if run is not None and nodes is None:
        found += problems_of(run, typed.unclear)
    elif run is not None:
        found += [problem for name in nodes or () if name not in typed.unclear for problem in getattr(run, name).problems(name)]
    if found or run is None:
        raise ConfigError(list(dict.fromkeys(found)))
    return run


def _own_folder(typed: str | Path) -> Path:
    """The folder of a user's own options.

    Raises:
        ConfigError: there is no such folder, whose options would then be said not to exist.
    """
    if not isinstance(typed, str | Path) or not Path(typed).expanduser().is_dir():
        raise ConfigError([(f"config_dir={str(typed)!r}", "is no folder with groups of options in it")], scope="this call")
    return Path(typed)


def recompose(parent: RunConfig, overrides: list[str], *, config_dir: Path | None = None) -> RunConfig:
    """A run's config with some values changed, checked as `compose` checks one.

    A group whose option is swapped has that option's values, but for the fields that all options of the group have: they keep the
    parent's. `fresh` and `accept_changes` were meant for the parent's start and are off. The new run's name says how it differs.

    Args:
        parent: a run's config, as `load_config` gives it.
        overrides: `group=option` and `group.field=value`, as on the command line.
        config_dir: a folder with more options.

    Raises:
        ConfigError: everything wrong with the overrides and with the run that they make.
    """
    typed = sort_overrides(overrides, config_dir)
    found = typed.problems
    if preset := typed.choices.pop(PRESET, None):
        found.append((f"{PRESET}={preset}", "sets values for a run from its beginning; type the values that change instead"))
    config = _compose_choices(typed, config_dir)
    swapped, base = typed.choices.keys() - typed.unclear, values(science(parent))
    base = {key: value for key, value in base.items() if key.partition(".")[0] not in swapped}
    base |= {key: value for key, value in _base_values(config).items() if key.partition(".")[0] in swapped}
    for item in fields(RunConfig):
        if item.name != "origin":
            _inherit(config, item.name, getattr(parent, item.name), swapped=item.name in swapped)
    config.fresh = config.accept_changes = False
    choices = parent.origin.choices | {group: typed.choices[group] for group in swapped}
    found += _without_kind(config, choices, typed)
    for override in typed.values:
        if override.key_or_group.partition(".")[0] not in typed.unclear:
            found += set_value(config, choices, override)
    found += missing_values(config, typed.unclear, found)
    name = "-".join([parent.origin.label, *(choices[group] for group in LABELLED if group in swapped)])
    run = _build(config, Origin(choices=choices, label=name, base=base), found)
    if run is not None:
        found += problems_of(run, typed.unclear)
    if found or run is None:
        raise ConfigError(list(dict.fromkeys(found)))
    return run


def _inherit(config: DictConfig, name: str, value: Any, *, swapped: bool) -> None:
    """Put a parent's node or value into the tree; of a node whose option is swapped only what all options have."""
    if not swapped:
        config[name] = OmegaConf.structured(literal(value)) if is_dataclass(value) else value
    elif name in SHAPES:
        for common in common_fields(name):
            config[name][common] = literal(getattr(value, common))


def read_request(overrides: list[str], *, config_dir: Path | None = None) -> Request:
    """What overrides ask for, without looking at values: enough to tell a sweep from a run.

    Raises:
        ConfigError: overrides that cannot be parsed, or options that do not exist.
    """
    typed = sort_overrides(overrides, config_dir, allow_sweeps=True)
    if typed.problems:
        raise ConfigError(typed.problems)
    config = _compose_choices(typed, config_dir)
    sweep = OmegaConf.to_container(OmegaConf.create(config.hydra.sweeper.get("params") or {}), resolve=True)
    assert isinstance(sweep, dict)
    params = {str(key): shown(value) for key, value in sweep.items()}
    return Request(typed.parsed, _choices(config), config.hydra.mode == RunMode.MULTIRUN, params)


def _compose_choices(typed: Typed, config_dir: Path | None) -> DictConfig:
    """The typed tree of the options and the preset, before any value. What is unclear has its default.

    Raises:
        ConfigError: a file among the options or presets is wrong in itself.
    """
    lines = [f"{group}={_quoted(option)}" for group, option in typed.choices.items() if group not in typed.unclear]
    folders = paths.search_folders(config_dir)
    try:
        config = _composed((*lines, *typed.settings), tuple(folders[1:]), paths.fingerprint(folders))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([*typed.problems, _file_problem(error)]) from None
    return copy.deepcopy(config)


@functools.lru_cache(maxsize=32)
def _composed(lines: tuple[str, ...], further: tuple[Path, ...], files: Hashable) -> DictConfig:
    """What Hydra makes of choices; kept, for the jobs of a sweep mostly share theirs, and anew when a file has changed."""
    searched = ",".join(_quoted(f"file://{folder.as_posix()}") for folder in further)
    with _own_hydra():
        return hydra.compose("config", [f"hydra.searchpath=[{searched}]", *lines], return_hydra_config=True)


def _build(config: DictConfig, origin: Origin, found: list[Problem]) -> RunConfig | None:
    """Plain dataclasses of the tree; none if it cannot be had, and then `found` says why."""
    parts: dict[str, Any] = {}
    for item in fields(RunConfig):
        if item.name == "origin":
            continue
        try:
            node = config[item.name]
            parts[item.name] = _plain_node(node, item.name) if isinstance(node, DictConfig) else node
        except OmegaConfBaseException as error:
            key = error.full_key or item.name
            if not (isinstance(error, MissingMandatoryValue) and key in keys_of(found)):
                found.append((key, f"cannot be read: {str(error).splitlines()[0]}{_instead(key, error)}"))
    return RunConfig(**parts, origin=origin) if len(parts) == len(fields(RunConfig)) - 1 else None


def _instead(key: str, error: OmegaConfBaseException) -> str:
    """What to type in place of an interpolation that leads nowhere; nothing for other errors."""
    if not isinstance(error, InterpolationResolutionError):
        return ""
    known = any_shape().get(re.sub(r"\[\d+\]$", "", key))
    is_text = known is not None and known.kind in (str, list[str])
    if unset := re.search(r"Environment variable '(.+?)' not found", str(error)):
        name = unset[1]
        return f"; set {name}, or say what to take where it is not set: '${{oc.env:{name},VALUE}}'"
    return "; where ${ is meant as text, type \\${" if is_text else "; type a value, or the key of another field as '${KEY}'"


def _plain_node(node: DictConfig, at: str) -> Any:
    """A node as its dataclass. A text that is missing, and named so already, gets a stand-in, so that the rest is checked too."""
    for name in node:
        if OmegaConf.is_missing(node, name):
            with contextlib.suppress(ValidationError):
                node[name] = "missing"
    _read(node)
    plain = literal(OmegaConf.to_container(node, resolve=True))
    try:
        # Merged again into its own type, so that a stray key of a YAML file is refused.
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(node_type(node)), plain))
    except OmegaConfBaseException as error:
        error.full_key = f"{at}.{error.full_key}" if error.full_key else at
        raise


def _read(node: Any) -> None:
    """Look at every value: an interpolation that leads nowhere, or a number that is missing, fails here, where its key is known."""
    for key in range(len(node)) if isinstance(node, ListConfig) else node:
        if OmegaConf.is_config(value := node[key]):
            _read(value)


def _base_values(config: DictConfig) -> dict[str, Any]:
    """Every value of the science as the choices give it; null where they leave it to the user."""
    tree = {name: _container(config[name]) if OmegaConf.is_config(config[name]) else config[name] for name in SCIENCE}
    return {key: None if value == MISSING else value for key, value in values(tree).items()}


def _container(node: DictConfig) -> Any:
    """A node as plain types, with what stands for another value replaced by it, unless that one is left to the user."""
    try:
        return OmegaConf.to_container(node, enum_to_str=True, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(node, enum_to_str=True)


def _without_kind(config: DictConfig, choices: dict[str, str], typed: Typed) -> list[Problem]:
    """Options that do not say of which kind they are, where kinds differ; nothing else can be said of their group."""
    bare = [group for group, shapes in SHAPES.items() if node_type(config[group]) not in shapes.values()]
    typed.unclear |= set(bare)
    return [(f"{group}={choices[group]}", f"does not say of which kind it is; {_kind_of(group)}") for group in bare]


def _kind_of(group: str) -> str:
    """How an option says of which kind it is."""
    return f"its file says so in its defaults: /schema/{group}/KIND@_here_, where KIND is one of {', '.join(SHAPES[group])}"


def _choices(config: DictConfig) -> dict[str, str]:
    chosen = config.hydra.runtime.choices
    return {group: str(chosen[group]) for group in (*GROUPS, PRESET) if chosen.get(group) is not None}


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _file_problem(error: Exception) -> Problem:
    """A mistake inside a YAML file, as Hydra, OmegaConf or the YAML parser reports it, in our words."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return error.problem_mark.name, f"is no YAML: {error.problem} in line {error.problem_mark.line + 1}"
    text = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '(\w+)/([^']+)'", text):
        return f"{missing[1]}={missing[2]}", f"{no_option(missing[1], missing[2], None)} (a preset or an option asks for it)"
    if shape := re.search(r"In '([^']+)': Could not load 'schema/(\w+)/([^']+)'", text):
        group, name = shape[2], shape[3]
        known = ", ".join(SHAPES.get(group, {}))
        rule = f"begins with /schema/{group}/{name}, which is no kind of {group}"
        rule += f"; there are {known}, and SHAPES in llama_lab/config/schema/run.py takes others" if known else ""
        return f"{shape[1]}.yaml", rule
    key = re.search(r"full_key: (\S+)", text)
    file = re.search(r"In '([^']+)'", text)
    subject = " in ".join([*([key[1]] if key else []), *([f"{file[1]}.yaml"] if file else [])]) or "a config file"
    if key and re.search(r"Key '[^']*' not in '", text):
        if key[1] == PRESET:
            return subject, "is no field; the first line of a preset is # @package _global_"
        rule, group = unknown_field(key[1], any_shape(), {}), key[1].partition(".")[0]
        if key[1] in any_shape() and group in SHAPES:
            rule += f"; {_kind_of(group)}"
        return subject, rule
    lines = [line.strip() for line in text.splitlines() if line.strip() and "raised while composing" not in line]
    return subject, f"is wrong: {lines[0] if lines else type(error).__name__}"


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra on our folders and types, with whatever another application set up put back afterwards."""
    store, states = ConfigStore.instance(), Singleton._instances
    kinds = (GlobalHydra, JobRuntime, VersionBase)
    before, types = {kind: states.pop(kind) for kind in kinds if kind in states}, store.repo
    try:
        store.repo = {name: group for name, group in types.items() if name != "schema"}
        _register_types(store)
        with hydra.initialize_config_dir(str(paths.config_folder("conf")), job_name="llama_lab", version_base="1.3"):
            yield
    finally:
        store.repo = types
        for kind in kinds:
            states.pop(kind, None)
        states.update(before)


def _register_types(store: ConfigStore) -> None:
    """Put the types where `conf/` finds them: `schema/run` and `schema/<group>/<shape>`."""
    store.store(group="schema", name="run", node=RunConfig, provider="llama_lab")
    for group, shapes in SHAPES.items():
        for name, shape in shapes.items():
            store.store(group=f"schema/{group}", name=name, node=shape, provider="llama_lab")
