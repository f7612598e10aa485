"""What the paths, patterns and names that a user types mean."""

import os
import re
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path

from llama_lab.config.identity import outputs_folder
from llama_lab.training.run_folder import named_run

RUN_HELP = "the run's folder, outputs/<name>/<run id>, its name, or the hash at the end of that"
AS_NUMBERED = re.compile(r"\.[-\d*?\[\]]+$")
"""Ends a pattern that means runs which were moved aside."""
BESIDE = ("sweeps", "report")
"""Folders that are made beside runs."""


def matches(word: str) -> list[Path]:
    """Paths that a pattern stands for, sorted; or the run of that name or hash; or the folder of that name in outputs/, which a
    run's `name` makes; none if it is nothing of these.

    Runs that were moved aside for a fresh start are left out, unless the pattern names their numbers.

    Raises:
        ConfigError: several runs are called so.
    """
    path = Path(word).expanduser().absolute()
    try:
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, NotImplementedError):
        return []
    if not found and not has_magic(word):
        called = (named_run(Path(word)).absolute(), outputs_folder().absolute() / word)
        return [folder for folder in called if os.path.isdir(folder)][:1]  # noqa: PTH112 - a text may be no path at all
    return found if AS_NUMBERED.search(path.name) else [match for match in found if not is_aside(match)]


def is_aside(folder: Path) -> bool:
    """Whether a run was moved aside for a fresh start: its name is another's and a number."""
    name = re.sub(r"\.\d+$", "", folder.name)
    return name != folder.name and folder.with_name(name).is_dir()


def without_asides(words: Sequence[str]) -> list[str]:
    """The words of a command without what a pattern of the shell has found beside runs.

    Folders of sweeps and reports are left out where they stand among others of their folder, and runs that were moved aside where
    everything in a folder was named: beside a single run, one of these is meant.
    """
    among: dict[Path, list[int]] = {}
    for number, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        # What follows a flag may be its value, where none is in it.
        is_value = before.startswith("-") and "=" not in before
        if not word.startswith("-") and not is_value and (path := Path(word)).is_dir():
            among.setdefault(path.parent, []).append(number)
    left_out: set[int] = set()
    for parent, numbers in among.items():
        named = {number: Path(words[number]) for number in numbers}
        beside = {number for number, path in named.items() if _is_beside(path)}
        aside = {number for number, path in named.items() if number not in beside and is_aside(path.absolute())}
        runs = len(named) - len(beside)
        left_out |= beside if runs else set()
        if runs - len(aside) > 1 and _is_all({path.name for path in named.values()}, parent):
            left_out |= aside
    return [word for number, word in enumerate(words) if number not in left_out]


def _is_beside(folder: Path) -> bool:
    """Whether a folder is one that is made beside runs, and no run or study of that name."""
    return folder.name in BESIDE and not any(next(folder.glob(f"{depth}config.yaml"), None) for depth in ("", "*/"))


def _is_all(names: set[str], folder: Path) -> bool:
    """Whether these are all folders that a shell shows of a folder."""
    return all(entry.name in names for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
