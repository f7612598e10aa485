"""What a run is called and where it lies: a readable slug, a hash of the science, a folder; and its config as a file.

The hash covers what decides the loss curve, and the budget: model, data, tokenizer, optim, schedule, precision, seeds and
training_tokens of the resolved config. So the same request finds the same folder, and changed science gets another by itself.
Two rules keep old runs where they are when the code grows:

- A field added to the schema carries `metadata={BEFORE: value}`, the value that means what the code did without it. At that value
  it stays out of the hash, and a saved config that lacks it is read as having it.
- Names of fields and shapes are never changed, since they are hashed.
"""

import hashlib
import json
import os
import posixpath
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llama_lab.config.disk import replace_text
from llama_lab.config.errors import ConfigError
from llama_lab.config.literal import literal, unescaped
from llama_lab.config.schema import BEFORE, SHAPES, Origin, Precision, RunConfig, shown

SCIENCE = ("training_tokens", "precision", "seed", "model", "data", "tokenizer", "optim", "schedule")
"""Top-level names of the config that decide the loss curve, and the budget."""
FORMAT_VERSION = 1
SLUG_VALUES = 4
SLUG_CHARACTERS = 80
EXTRA_PART_CHARACTERS, EXTRA_CHARACTERS = 40, 150
"""File systems take 255 bytes for a name, all of ours are ASCII, and a folder's name gets additions such as `.1` or `.lock`."""


def science(run: RunConfig) -> dict[str, Any]:
    """What decides the loss curve, as plain types; nodes whose shape is chosen say it as `type`."""
    found: dict[str, Any] = {name: _plain(getattr(run, name)) for name in SCIENCE}
    for group, shape in shapes(run).items():
        found[group]["type"] = shape
    for node, key in (("data", "path"), ("tokenizer", "path")):
        if key in found[node]:
            found[node][key] = _tidy(found[node][key])
    if "paths" in found["data"]:
        found["data"]["paths"] = [_tidy(path) for path in found["data"]["paths"]]
    return found


def former_values(run: RunConfig) -> dict[str, Any]:
    """Of fields that came later, by key path, the value at which they are no part of the science, as plain types."""
    nodes = {name: node for name in SCIENCE if is_dataclass(node := getattr(run, name))}
    later = [(name, field) for name, node in nodes.items() for field in fields(node) if BEFORE in field.metadata]
    return {f"{name}.{field.name}": _plain(field.metadata[BEFORE]) for name, field in later}


def _tidy(path: str) -> str:
    """A path without what leads nowhere, so that `web/`, `./web` and `web` are one text; the same on every system."""
    return path if not path or "://" in path else posixpath.normpath(path)


def values(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `science` by key path, without the types. Precision stays out: it is often the machine's and not the user's."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= values(value, f"{prefix}{key}.")
        elif prefix + key != "precision" and key != "type":
            flat[prefix + key] = value
    return flat


def run_hash(run: RunConfig) -> str:
    """8 hexadecimal digits of the SHA-256 over the science.

    Raises:
        ValueError: the run is not resolved, so its precision is not known yet.
    """
    if run.precision is Precision.auto:
        raise ValueError("a run has an identity only once it is resolved: precision=auto differs between machines")
    text = json.dumps(science(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_id(run: RunConfig, extra_slug: str | None = None) -> str:
    """The run's name within its study: what was chosen, what was changed, and the hash that makes it unique.

    Args:
        run: the resolved config.
        extra_slug: what a sweep adds for keys outside the science, as `joined_slug` gives it.
    """
    changed = _changed(run)
    kept = changed[:SLUG_VALUES]
    if len(_slug(run, changed, kept)) > SLUG_CHARACTERS:
        # No value is cut, for it would then read as another one: what there is no room for is counted.
        kept = []
        for part in changed:
            if len(kept) < SLUG_VALUES and len(_slug(run, changed, [*kept, part])) <= SLUG_CHARACTERS:
                kept.append(part)
    return _named(run, _slug(run, changed, kept), extra_slug)


def former_run_id(run: RunConfig, extra_slug: str | None = None) -> str:
    """The name that `run_id` gave when it cut a long slug wherever it ended; the same but for those.

    Args:
        run, extra_slug: as `run_id` takes them.
    """
    changed = _changed(run)
    return _named(run, _slug(run, changed, changed[:SLUG_VALUES]), extra_slug)


def outputs_folder() -> Path:
    """Where runs are, absolute and without `..` in it: $LLAMA_LAB_OUTPUTS, or `outputs` in the working directory."""
    return Path(os.path.abspath(Path(os.environ.get("LLAMA_LAB_OUTPUTS") or "outputs").expanduser()))  # noqa: PTH100


def run_folder(run: RunConfig, extra_slug: str | None = None) -> Path:
    """The folder of a resolved run, absolute, below $LLAMA_LAB_OUTPUTS or else `outputs` in the working directory.

    A run that was made under its former name keeps it.
    """
    study, name, former = outputs_folder() / run.name, run_id(run, extra_slug), former_run_id(run, extra_slug)
    # Moved aside for a fresh start, it has a number behind its name, and the new one takes its place.
    is_there = former != name and next(study.glob(f"{former}*"), None) is not None
    return study / (former if is_there else name)


def is_science(key: str) -> bool:
    """Whether a key path belongs to what the hash covers."""
    return key.partition(".")[0] in SCIENCE


def slug_part(key: str, value: Any) -> str:
    """How a value appears in a slug: its field's own name, after its node's where the name alone would mislead."""
    node, _, name = key.rpartition(".")
    text = Path(str(value)).name if name == "path" else shown(value)
    return _clean(f"{key if node == 'seed' or name == 'path' else name}-{text}")


def joined_slug(parts: list[str]) -> str | None:
    """`slug_part`s as one; where that is too long, each long one is cut and ends with a hash of what it was. Null without parts."""
    whole = "-".join(parts)
    if len(whole) > EXTRA_CHARACTERS:
        whole = "-".join(_shortened(part, EXTRA_PART_CHARACTERS) for part in parts)
    return _shortened(whole, EXTRA_CHARACTERS) or None


def plain_config(run: RunConfig) -> dict[str, Any]:
    """Every value of the config as nested plain types, enums by name; where they came from is left out."""
    return {field.name: _saved(getattr(run, field.name)) for field in fields(run) if field.name != "origin"}


def shapes(run: RunConfig) -> dict[str, str]:
    """Of each group whose options differ in shape the name of the one that the run has: {"schedule": "linear", …}."""
    return {group: _shape(group, getattr(run, group)) for group in SHAPES}


def to_yaml(run: RunConfig) -> str:
    """The whole config as `load_config` reads it: every value, then where it came from."""
    tree = plain_config(run)
    now = values(science(run))
    tree["origin"] = {
        "format_version": FORMAT_VERSION,
        "shapes": shapes(run),
        "choices": run.origin.choices,
        "label": run.origin.label,
        "changed_from": {key: value for key, value in run.origin.base.items() if now.get(key) != value},
    }
    return OmegaConf.to_yaml(OmegaConf.create(literal(tree)))


def save_config(run: RunConfig, path: Path) -> None:
    """Write `to_yaml` in one step."""
    replace_text(path, to_yaml(run))


def load_config(path: Path) -> RunConfig:
    """Read a config that `save_config` wrote; shapes, types and the run's id come back.

    Raises:
        ConfigError: there is no such file, or it is not one of ours.
    """
    try:
        saved: Any = OmegaConf.load(path)
        origin: Any = OmegaConf.to_container(saved["origin"])
        schema = OmegaConf.structured(RunConfig)
        for group, shape in origin["shapes"].items():
            schema[group] = OmegaConf.structured(SHAPES[group][shape])
        tree = OmegaConf.merge(schema, {key: node for key, node in saved.items() if key != "origin"})
        assert isinstance(tree, DictConfig)
        _fill_fields_that_came_later(tree)
        run: Any = OmegaConf.to_object(tree)
        base = values(science(run)) | unescaped(origin["changed_from"])
        run.origin = Origin(choices=origin["choices"], label=origin["label"], base=base)
    except FileNotFoundError:
        raise ConfigError([(str(path), "does not exist; name the config.yaml of a run's folder")], scope="this file") from None
    except (OmegaConfBaseException, YAMLError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError([(str(path), f"is no config that this version can read: {reason}")], scope="this file") from None
    return run


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and enums as their names; fields that came later are left out at their value from before."""
    if is_dataclass(value):
        items = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: _plain(item) for field, item in items if BEFORE not in field.metadata or item != field.metadata[BEFORE]}
    return value.name if isinstance(value, Enum) else value


def _saved(value: Any) -> Any:
    """Dataclasses as dicts, nothing left out."""
    if is_dataclass(value):
        return {field.name: _saved(getattr(value, field.name)) for field in fields(value)}
    return value.name if isinstance(value, Enum) else value


def _shape(group: str, node: Any) -> str:
    """Name of a node's class among the shapes of its group."""
    return next(name for name, shape in SHAPES[group].items() if type(node) is shape)


def _changed(run: RunConfig) -> list[str]:
    """Slug parts of the values that the choices alone would not give, in the order of the config."""
    base = run.origin.base
    changed = {key: value for key, value in values(science(run)).items() if key in base and base[key] != value}
    seeds = {changed.get(f"seed.{name}") for name in ("init", "data", "sampling")}
    if len(seeds) == 1 and None not in seeds:
        changed = {"seed": seeds.pop()} | {key: value for key, value in changed.items() if not key.startswith("seed.")}
    return [slug_part(key, value) for key, value in changed.items()]


def _slug(run: RunConfig, changed: list[str], kept: list[str]) -> str:
    """What was chosen, those of the changed values that are kept, and how many are not."""
    parts = [run.origin.label, *kept]
    if len(changed) > len(kept):
        parts.append(f"{len(changed) - len(kept)}_more")
    if run.precision is not Precision.fp32:
        # Said from the resolved value alone, so that typing what auto finds changes nothing.
        parts.append(run.precision.name)
    return "-".join(map(_clean, parts))


def _named(run: RunConfig, slug: str, extra_slug: str | None) -> str:
    slug = slug[:SLUG_CHARACTERS].rstrip("-._")
    return "-".join(part for part in [slug, _shortened(_clean(extra_slug or ""), EXTRA_CHARACTERS), run_hash(run)] if part)


def _clean(text: str) -> str:
    """Lower case, with anything that could trouble a file system or a shell as `_`."""
    return re.sub(r"[^a-z0-9._-]+", "_", text.lower()).strip("_")


def _shortened(text: str, characters: int) -> str:
    """A text of a slug, or its beginning and 8 hexadecimal digits that stand for all of it."""
    if len(text) <= characters:
        return text
    digits = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: characters - len(digits) - 1].rstrip('-._')}-{digits}"


def _fill_fields_that_came_later(tree: DictConfig) -> None:
    """Give fields that a saved config does not know the value that means what the code did then."""
    schema: Any = OmegaConf.get_type(tree)
    for field in fields(schema):
        if field.metadata.get("omegaconf_ignore"):
            continue
        if OmegaConf.is_missing(tree, field.name):
            if BEFORE in field.metadata:
                tree[field.name] = field.metadata[BEFORE]
        elif isinstance(tree[field.name], DictConfig):
            _fill_fields_that_came_later(tree[field.name])
