"""Words among the overrides that lack their `=`, or have spaces around it: what they were probably meant to be."""

import difflib
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from llama_lab.config import paths
from llama_lab.config.schema import GROUPS, Problem

PRESET = "experiment"
EXAMPLES = {int: "64", float: "1e-3", bool: "true", str: "name"}
INSTEAD = "type key=value, such as model.dim=64, or group=option, such as data=text"


def sort_out(lines: list[str], kinds: Callable[[], Mapping[str, Any]], config_dir: Path | None) -> tuple[list[str], list[Problem]]:
    """(lines that can be parsed by themselves, what is to be said of the others).

    Args:
        kinds: gives the type of each field's value by its key path; asked only where a line is loose.
    """
    whole: list[str] = []
    found: list[Problem] = []
    rest = list(lines)
    while rest:
        if (count := _belong_together(rest, kinds)) > 1:
            words = [rest.pop(0) for _ in range(count)]
            joined = "=".join(part for word in words for part in word.split("=") if part)
            found.append((" ".join(words), f"is one value in pieces; type {joined} without spaces"))
        elif _is_loose(rest[0]):
            word = rest.pop(0)
            found.append((word, _meant(word, kinds(), config_dir)))
        else:
            whole.append(rest.pop(0))
    return whole, found


def _is_loose(word: str) -> bool:
    """Whether a word can be no override: only what is left out with ~ has no `=`."""
    return "=" not in word and not word.startswith("~")


def _belong_together(rest: list[str], kinds: Callable[[], Mapping[str, Any]]) -> int:
    """How many of the next words are one override with spaces in it: key = value, key= value, key =value, or key value."""
    first, second, third = [*rest, "", "", ""][:3]
    if second == "=" and third and _is_loose(first):
        return 3
    if second.startswith("=") and len(second) > 1 and _is_loose(first):
        return 2
    if not second or not _is_loose(second):
        return 1
    if first.endswith("=") and first.count("=") == 1 and len(first) > 1:
        return 2
    is_key = _is_loose(first) and (first in (*GROUPS, PRESET) or first in kinds())
    return 2 if is_key and second not in kinds() else 1


def _meant(word: str, kinds: Mapping[str, Any], config_dir: Path | None) -> str:
    """What to type in place of a word without `=`."""
    if word == "help":
        return "is typed with dashes: --help"
    if word in (*GROUPS, PRESET):
        return f"has no option; type {word}=OPTION, one of {', '.join(paths.options(word, config_dir))}"
    if word in kinds:
        return f"has no value; type one, e.g. {word}={_example(kinds[word])}"
    groups = [group for group in (PRESET, *GROUPS) if word in paths.options(group, config_dir)]
    if groups:
        return f"has no group; type {' or '.join(f'{group}={word}' for group in groups)}"
    if Path(word).expanduser().exists():
        return f"is a {'folder' if Path(word).expanduser().is_dir() else 'file'}; to use its text, type data=text data.path={word}"
    if close := difflib.get_close_matches(word, kinds, n=1, cutoff=0.75):
        return f"is no field, and has no value; did you mean {close[0]}={_example(kinds[close[0]])}?"
    return f"has no =; {INSTEAD}"


def _example(kind: Any) -> str:
    """A value of a type, as it is typed."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(iter(kind)).name
    return EXAMPLES.get(kind, "…")
