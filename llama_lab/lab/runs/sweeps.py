"""What a sweep knows of its runs beyond what they say themselves: which it stopped early, and in which order they were typed."""

import json
import os
from pathlib import Path
from typing import Any

SWEEP_FILE = "sweep.json"
STOPPED_EARLY = "stopped early"
"""What a sweep says, with the update behind it, of a run that it left before its end."""


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
