"""What can be typed after a command: groups, options, presets and fields, read from the files without Hydra, OmegaConf or torch.

Help and completion answer from here, because importing Hydra alone would take longer than a person waits for TAB.
Nothing here says whether a value is legal; that is `llama_lab.config`.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llama_lab.config.paths import PACKAGE, option_file, options, search_folders


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Group -> its options, both sorted.

    Args:
        config_dir: a folder of further options, as `--config-dir` names it.
    """
    names = {file.parent.name for folder in search_folders(config_dir) for file in folder.glob("*/*.yaml")} - {"experiment"}
    return {group: options(group, config_dir) for group in sorted(names)}


def presets(config_dir: Path | None = None) -> dict[str, str]:
    """Preset -> the first sentence of its header, which is its question."""
    files = {preset: option_file("experiment", preset, config_dir) for preset in options("experiment", config_dir)}
    return {preset: _question(file) for preset, file in files.items() if file is not None}


@dataclass(frozen=True)
class Field:
    """A field or node, as the schema declares it."""

    is_node: bool
    choices: tuple[str, ...]
    """Values worth offering; empty where any text may stand."""


def fields() -> dict[str, Field]:
    """Key path -> field, over all options of every group (`schedule.cooldown_fraction` exists for one of them)."""
    classes, bases = _classes()
    found: dict[str, Field] = {}

    def walk(class_name: str, prefix: str) -> None:
        for name in [class_name, *_descendants(class_name, bases)]:
            for base in _lineage(name, bases):
                for field, annotation in classes[base].items():
                    node = next((part for part in annotation if part in classes and part.endswith("Config")), None)
                    choices = tuple(choice for part in annotation for choice in _choices(part, classes))
                    found[prefix + field] = Field(is_node=node is not None, choices=choices)
                    if node:
                        walk(node, f"{prefix}{field}.")

    walk("RunConfig", "")
    return found


def _question(file: Path) -> str:
    """First line of the comment at the top, without Hydra's `@package` and without a `Question:` before it."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if not line.startswith("#"):
            if text:
                return ""
        elif text and not text.startswith("@package"):
            return text.removeprefix("Question:").strip()
    return ""


@cache
def _classes() -> tuple[dict[str, dict[str, list[str]]], dict[str, list[str]]]:
    """(class -> field -> names in its annotation, class -> its bases) of the schema; for an Enum the fields are its members."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((PACKAGE / "config" / "schema").glob("*.py"))]
    classes: dict[str, dict[str, list[str]]] = {}
    bases: dict[str, list[str]] = {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.ClassDef):
            bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
            members: dict[str, list[str]] = {}
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    if line.value is not None and "omegaconf_ignore" in ast.unparse(line.value):
                        continue  # kept beside the config, not part of what can be typed
                    members[line.target.id] = _names(line.annotation)
                elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    members[line.targets[0].id] = []
            classes[node.name] = members
    return classes, bases


def _names(annotation: ast.expr) -> list[str]:
    return [
        part.id if isinstance(part, ast.Name) else str(part.value)
        for part in ast.walk(annotation)
        if isinstance(part, ast.Name) or (isinstance(part, ast.Constant) and part.value is None)
    ]


def _choices(name: str, classes: dict[str, dict[str, list[str]]]) -> list[str]:
    known = {"bool": ["true", "false"], "None": ["null"]}
    if name in classes and not name.endswith("Config"):
        return list(classes[name])
    return known.get(name, [])


def _descendants(name: str, bases: dict[str, list[str]]) -> list[str]:
    direct = [child for child, parents in bases.items() if name in parents]
    return direct + [further for child in direct for further in _descendants(child, bases)]


def _lineage(name: str, bases: dict[str, list[str]]) -> list[str]:
    return [ancestor for base in bases.get(name, []) if base in bases for ancestor in _lineage(base, bases)] + [name]
