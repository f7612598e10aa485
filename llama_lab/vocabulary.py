"""What can be typed after a command: groups, options, presets and fields, read from the files without Hydra, OmegaConf or torch.

Help and completion answer from here, because importing Hydra alone would take longer than a person waits for TAB.
Nothing here says whether a value is legal; that is `llama_lab.config`.
"""

import ast
from collections.abc import Iterator
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
    return headers("experiment", config_dir)


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


@dataclass(frozen=True)
class Meaning:
    """What the schema says of a field.

    Attributes:
        path: its key path.
        values: what it takes, in words.
        text: the docstring below it, in one line.
        kinds: of its group, those that have it, as `kinds` names them; empty where all do.
    """

    path: str
    values: str
    text: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """What the schema says of a part of a run.

    Attributes:
        text: the docstring of its class.
    """

    text: str
    fields: list[Meaning]


def headers(group: str, config_dir: Path | None = None) -> dict[str, str]:
    """Option of a group -> the first line of its header."""
    files = {option: option_file(group, option, config_dir) for option in options(group, config_dir)}
    return {option: _question(file) for option, file in files.items() if file is not None}


OWN = "run"
"""Where the fields stand that belong to no part."""


def nodes() -> dict[str, Node]:
    """Parts of a run, in the order of its config, its own fields first under `OWN`."""
    classes, _ = _classes()
    shapes = _shapes()
    found = {OWN: Node("", [])}
    for name, annotation in classes["RunConfig"].items():
        node = next((part for part in annotation if part in classes and part.endswith("Config")), None)
        if node is None:
            found[OWN].fields.append(_meaning("RunConfig", name, name))
        else:
            found[name] = Node(_doc(node), list(_fields_of(name, shapes.get(name, {"": node}))))
    return found


def _fields_of(node: str, shapes: dict[str, str]) -> Iterator[Meaning]:
    """Fields of a part, each once: those of all its kinds, and with their kinds those that some have."""
    classes, bases = _classes()
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, shape in shapes.items():
        for base in _lineage(shape, bases):
            for name in classes[base]:
                kinds.setdefault((name, base), []).append(kind)
    for (name, base), having in kinds.items():
        inner = next((part for part in classes[base][name] if part in classes and part.endswith("Config")), None)
        if inner is not None:
            yield from _fields_of(f"{node}.{name}", {"": inner})
        else:
            yield _meaning(base, name, f"{node}.{name}", () if len(having) == len(shapes) else tuple(having))


def _meaning(owner: str, name: str, path: str, kinds: tuple[str, ...] = ()) -> Meaning:
    return Meaning(path, _values(_classes()[0][owner][name]), _doc(owner, name), kinds)


def _values(annotation: list[str]) -> str:
    """What a field takes, from the names in its annotation."""
    classes, _ = _classes()
    # Of a node with a union of types OmegaConf knows none; there is one such field.
    words = {"int": "whole number", "float": "number", "str": "text", "None": "null", "Any": "whole number | auto | null"}
    if "list" in annotation:
        words |= {"list": "", "str": "[text, …]", "float": "[number, …]", "int": "[whole number, …]"}
    said = [word for part in annotation for word in (_choices(part, classes) or [words.get(part, part)]) if word]
    return " | ".join(said)


@cache
def _trees() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((PACKAGE / "config" / "schema").glob("*.py"))]


@cache
def _docs() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring below it, in one line; the class's own under the field ``."""
    found: dict[tuple[str, str], str] = {}
    for node in (node for tree in _trees() for node in tree.body if isinstance(node, ast.ClassDef)):
        found[node.name, ""] = " ".join((ast.get_docstring(node) or "").split())
        for line, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                found[node.name, line.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _doc(owner: str, name: str = "") -> str:
    return _docs().get((owner, name), "")


@cache
def _shapes() -> dict[str, dict[str, str]]:
    """`SHAPES` of the schema: group -> kind -> class."""
    for node in (node for tree in _trees() for node in tree.body if isinstance(node, ast.AnnAssign)):
        if isinstance(node.target, ast.Name) and node.target.id == "SHAPES" and isinstance(node.value, ast.Dict):
            groups = zip(node.value.keys, node.value.values, strict=True)
            return {
                ast.literal_eval(group): {
                    ast.literal_eval(kind): ast.unparse(shape) for kind, shape in zip(kinds.keys, kinds.values, strict=True) if kind
                }
                for group, kinds in groups
                if group and isinstance(kinds, ast.Dict)
            }
    raise AssertionError("the schema has no SHAPES")


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
    classes: dict[str, dict[str, list[str]]] = {}
    bases: dict[str, list[str]] = {}
    for node in (node for tree in _trees() for node in tree.body):
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
