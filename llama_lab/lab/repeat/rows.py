"""What a run has written of its updates, and whether it has made those that are asked for. Torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import RunConfig
from llama_lab.training.run_folder import RunFolder, relative
from llama_lab.training.saving.manifest import list_checkpoints

SCOPE = "this request"


@dataclass(frozen=True, slots=True)
class Rows:
    """The lines of a run's files that could be read, in order.

    Attributes:
        broken: what is wrong with lines that could not.
    """

    metrics: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    broken: list[str]

    @classmethod
    def of(cls, folder: RunFolder) -> "Rows":
        """Those of a run. A last line without an end is being written, or was cut by a kill; it does not count."""
        broken: list[str] = []
        return cls(_lines(folder.path / "metrics.jsonl", broken), _lines(folder.path / "batches.jsonl", broken), broken)

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows with a training loss."""
        return [row for row in self.metrics if "train/loss" in row]

    @property
    def done(self) -> int:
        """Number of the last update that left a line."""
        return max((row["update"] for row in (*self.metrics, *self.batches)), default=0)


def updates_done(folder: RunFolder, rows: Rows) -> int:
    """Number of the last update that left a line or a checkpoint."""
    return max([rows.done, *(checkpoint.update for checkpoint in list_checkpoints(folder.checkpoints))])


def check_asked(run: RunConfig, folder: RunFolder, *, updates: int | None, update: int | None) -> None:
    """Refuse updates that the run has not made, before anything heavy is imported.

    Args:
        updates: how many from its beginning.
        update: the number of one.

    Raises:
        ConfigError: there are not so many.
    """
    if update is not None and update > run.updates:
        rule = f"is none of the updates of {relative(folder.path)}, 1 to {run.updates}"
        raise ConfigError([(f"--update {update}", rule)], scope=SCOPE)
    done = updates_done(folder, Rows.of(folder)) - first_update(folder) if updates is not None else 0
    if updates is not None and 0 < done < updates:
        raise ConfigError([(f"--updates {updates}", f"is more than the run has done; try --updates {done}")], scope=SCOPE)


def first_update(folder: RunFolder) -> int:
    """Number of the update that the run itself began after: 0, or that of the checkpoint it was forked from."""
    return folder.meta().get("lineage", {}).get("update", 0)


def _lines(path: Path, broken: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["update"], int):
                raise TypeError
            found.append(row)
        except (ValueError, TypeError, LookupError):
            broken.append(f"line {number} of {path.name} is no row")
    return found
