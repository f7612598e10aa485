"""What an offline W&B run holds, as W&B's own tool reads it."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Records = dict[str, list[dict[str, Any]]]


def offline_folders(run_folder: Path) -> list[Path]:
    """The offline runs in a run's folder, oldest first."""
    return sorted((run_folder / "wandb").glob("offline-run-*"))


def read_records(offline_folder: Path) -> Records:
    """Records by type, in order."""
    (file,) = offline_folder.glob("run-*.wandb")
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    shown = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=170, check=True).stdout
    records: Records = defaultdict(list)
    for line in shown.splitlines():
        record = json.loads(line)
        records[record["type"]].append(record.get(record["type"], {}))
    return records


def history(records: Records) -> list[dict[str, Any]]:
    """Rows of metrics as they were logged, without what W&B adds and without samples."""
    items = [record["item"] for record in records["history"]]
    rows = [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]
    return [row for row in rows if not any(key.startswith("samples") for key in row)]


def summary(records: Records) -> dict[str, Any]:
    """Last values."""
    found: dict[str, Any] = {}
    for record in records["summary"]:
        found |= record["update"]
    return found


def sampled_texts(offline_folder: Path) -> list[tuple[int, str, str]]:
    """(update, prompt, text) of every sample in the tables of a run."""
    tables = sorted(offline_folder.glob("files/media/table/samples_*.table.json"), key=lambda path: int(path.name.split("_")[1]))
    rows = [row for table in tables for row in json.loads(table.read_text(encoding="utf-8"))["data"]]
    return [(update, prompt, text) for update, _, prompt, text, _ in rows]
