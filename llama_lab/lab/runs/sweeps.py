"""What a sweep knows of its runs beyond what they say themselves: which it stopped early, and in which order they were typed."""

import json
import os
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.training.run_folder import relative

SWEEP_FILE = "sweep.json"
STOPPED_EARLY = "stopped early"
"""What a sweep says, with the update behind it, of a run that it left before its end."""


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of it; nothing if the folder is no sweep's.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / SWEEP_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        rule = f"is damaged: {error}; move the sweep's folder away and type its command again, which skips runs that are finished"
        raise ConfigError([(relative(path.absolute()), rule)], scope="this sweep") from None


def was_stopped_early(run: Path) -> bool:
    """Whether a sweep has left a run before its end because it, or another seed of its point, had fallen behind.

    Args:
        run: its folder, absolute. Its sweeps lie beside it.
    """
    for path in sorted(run.parent.glob(f"sweeps/*/{SWEEP_FILE}")):
        for job in _read(path).get("jobs", []):
            if os.path.normpath(path.parent / job["folder"]) == os.path.normpath(run):
                outcome = path.parent / "jobs" / f"{job['number']:04}" / "outcome.json"
                if _read(outcome).get("status", "").startswith(STOPPED_EARLY):
                    return True
    return False


def has_typed_order(folder: Path) -> bool:
    """Whether a folder is that of a sweep whose points were typed, not drawn: their order then means something."""
    return _read(folder / SWEEP_FILE).get("settings", {}).get("search") == "grid"


def _read(path: Path) -> dict[str, Any]:
    """A file of a sweep; nothing where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
