"""Short names of runs: what a user may type, and a narrow table may show, in place of a path."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_lab.config.identity import outputs_folder

HASH = re.compile(r"[0-9a-f]{8}(\.\d+)?$")
"""What a run's name ends in, with the number of one that was moved aside."""
FILES = ("config.yaml", "meta.json")
"""A folder with one of these is a run, if a damaged one."""


def runs_called(typed: Path) -> list[Path]:
    """Runs in the outputs folder with a name, or with an end of it that holds the hash; a study may stand before either.

    Args:
        typed: such as `7866f6c1`, `bf16-7866f6c1`, `llama_3m-docs-bf16-7866f6c1`, `runs/7866f6c1`.
    """
    if typed.is_absolute() or not 1 <= len(typed.parts) <= 2 or ".." in typed.parts:
        return []
    word = "/".join(typed.parts)
    named = (folder for folder in _folders(outputs_folder()) if word in _names(folder))
    found = sorted(folder for folder in named if any((folder / name).is_file() for name in FILES))
    return [folder for folder in found if folder.name == typed.name] or found


def short_names(folders: Sequence[Path]) -> list[str]:
    """For each run the shortest name that no other has, among them and in the outputs folder: its hash where that is enough."""
    # One folder may be reached by two paths.
    keys = [os.path.realpath(folder) for folder in folders]
    everyone = {key: _names(folder) for key, folder in zip(keys, folders, strict=True)}
    everyone |= {os.path.realpath(folder): _names(folder) for folder in _folders(outputs_folder())}
    count = Counter(name for names in everyone.values() for name in set(names))
    return [
        next((name for name in everyone[key] if count[name] == 1), str(folder)) for key, folder in zip(keys, folders, strict=True)
    ]


def _names(folder: Path) -> list[str]:
    """What a run may be called, the shortest first: ends of its name, from a dash on, the hash being the least."""
    words = folder.name.split("-")
    count = len(words) if HASH.match(words[-1]) else 1
    ends = ["-".join(words[-number:]) for number in range(1, count + 1)] if count > 1 else [folder.name]
    return [name for end in ends for name in (end, f"{folder.parent.name}/{end}")]


def _folders(outputs: Path) -> Iterator[Path]:
    """Folders where runs can be: those of the studies, and in them."""
    for study in _visible(outputs):
        yield study
        yield from _visible(study)


def _visible(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
