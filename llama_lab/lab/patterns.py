"""What the paths and patterns that a user types name."""

import re
from pathlib import Path

AS_NUMBERED = re.compile(r"\.[-\d*?\[\]]+$")
"""Ends a pattern that means runs which were moved aside."""


def matches(word: str) -> list[Path]:
    """Paths that a pattern stands for, sorted; none if it is no pattern that a path can have.

    Runs that were moved aside for a fresh start are left out, unless the pattern names their numbers.
    """
    path = Path(word).expanduser().absolute()
    try:
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, NotImplementedError):
        return []
    return found if AS_NUMBERED.search(path.name) else [match for match in found if not is_aside(match)]


def is_aside(folder: Path) -> bool:
    """Whether a run was moved aside for a fresh start: its name is another's and a number."""
    name = re.sub(r"\.\d+$", "", folder.name)
    return name != folder.name and folder.with_name(name).is_dir()
