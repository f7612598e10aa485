"""Which checkpoint of a run is meant, and what to say where it is not there or damaged. Torch-free."""

import shlex
from collections.abc import Sequence

from llama_lab.config.errors import ConfigError
from llama_lab.training.run_folder import RunFolder, relative
from llama_lab.training.saving.manifest import (
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_folders,
    is_whole,
    list_checkpoints,
    list_incomplete,
)

FLAG = "--update "
"""Before the number of an update, as it is typed."""


def chosen_checkpoint(folder: RunFolder, update: str | None, *, scope: str, flag: str = FLAG) -> Checkpoint:
    """The checkpoint that was meant; its files are not read.

    Args:
        update: as typed: a number, `last` or `best` by validation; None: last.
        scope: what a problem is reported in.
        flag: how an update is named.

    Raises:
        ConfigError: there is none, or no such.
    """
    there = {checkpoint.update: checkpoint for checkpoint in list_checkpoints(folder.checkpoints)}
    number = chosen_update(folder, list(there), update, scope=scope, flag=flag)
    if number not in there:
        raise missing(folder, number, list(there), scope=scope, flag=flag)
    return there[number]


def chosen_update(folder: RunFolder, there: Sequence[int], update: str | None, *, scope: str, flag: str = FLAG) -> int:
    """The number of the update that was meant; the arguments are those of `chosen_checkpoint`.

    Args:
        there: updates that have a checkpoint, in order. A number that is typed need not be among them.

    Raises:
        ConfigError: it is none, there is no checkpoint, the newest is damaged, or none was validated.
    """
    if update is not None and update.isdecimal():
        return int(update)
    if update not in (None, "last", "best"):
        raise ConfigError([(f"{flag}{update}", f"is no update; {there_are(there)}, or last, or best")], scope=scope)
    broken = list_incomplete(folder.checkpoints)
    names = [path.name for path in checkpoint_folders(folder.checkpoints)]
    if broken and (not there or (update != "best" and broken[-1].path.parent.name == names[-1])):
        raise damaged(folder, broken[-1], scope=scope, flag=flag)
    if not there:
        rule = _lost(folder) if folder.finished else "has no checkpoint yet; train it further"
        raise ConfigError([(str(folder.path), rule)], scope=scope)
    if update != "best":
        return there[-1]

    from llama_lab.training.metrics import read_rows

    rows = read_rows(folder.path / "metrics.jsonl")
    losses = {row["update"]: row["val/loss"] for row in rows if row.get("val/loss") is not None and row["update"] in there}
    if not losses:
        raise ConfigError([(f"{flag}best", f"cannot be told: no checkpoint was validated; {there_are(there)}")], scope=scope)
    return min(losses, key=lambda number: (losses[number], number))


def missing(folder: RunFolder, update: int, there: Sequence[int], *, scope: str, flag: str = FLAG) -> ConfigError:
    """What to say where an update has no checkpoint."""
    rule = f"is no checkpoint of {relative(folder.path)}; {there_are(there)}"
    rule += "".join(f"; {told(error)}" for error in list_incomplete(folder.checkpoints))
    return ConfigError([(f"{flag}{update}", rule)], scope=scope)


def damaged(
    folder: RunFolder, error: DamagedCheckpoint, *, scope: str, files: Sequence[str] | None = None, flag: str = FLAG
) -> ConfigError:
    """What to say of a damaged checkpoint: what is wrong with it, and what can be done. Reads others, newest first.

    Args:
        files: those of a checkpoint that are needed; None: all.
    """
    return ConfigError([(relative(error.path), f"{error.rule}; {way_out(folder, files=files, flag=flag)}")], scope=scope)


def way_out(folder: RunFolder, *, files: Sequence[str] | None = None, flag: str = FLAG) -> str:
    """What can be done where a checkpoint is damaged; see `damaged`."""
    newest_first = reversed(list_checkpoints(folder.checkpoints))
    if (whole := next((checkpoint for checkpoint in newest_first if is_whole(checkpoint, files)), None)) is not None:
        return f"the newest whole checkpoint is {flag}{whole.update}"
    return "no checkpoint of this run is whole: the command that trained it, with fresh=true, moves it aside and starts anew"


def _lost(folder: RunFolder) -> str:
    """What to say of a run that was trained to its end and has no checkpoint left."""
    command = folder.meta().get("command") or []
    again = "the command that trained it, with fresh=true, moves it aside and starts anew"
    if command[1:2] == ["train"] and "-m" not in command:
        words = shlex.join([*(word for word in command if not word.startswith("fresh=")), "fresh=true"])
        again = f"{words} moves it aside and trains it anew"
    return f"is finished, and its checkpoints are gone; put {folder.checkpoints.name}/ back from a copy, or {again}"


def told(error: DamagedCheckpoint) -> str:
    """What is wrong with a checkpoint, with a path as short as it can be typed."""
    return f"{relative(error.path)} {error.rule}"


def there_are(updates: Sequence[int]) -> str:
    """Which checkpoints there are, in words."""
    if len(updates) == 1:
        return f"the only one is {updates[0]}"
    return f"there are {', '.join(map(str, updates))}" if updates else "there is none"
