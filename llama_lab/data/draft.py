"""A prepared folder in the making: both splits side by side, and how far they have come, so that a killed process loses seconds."""

import json
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from llama_lab.data.baselines import MAX_BYTES
from llama_lab.data.corpus import Document, Side
from llama_lab.data.shards import SOURCES
from llama_lab.data.writer import HashedFile, SourceNames, SplitWriter, has_bytes, is_whole

PROGRESS = "progress.npz"
VALIDATION_TEXT = "validation.txt"
BETWEEN = b"\n\n"


class FolderWriter:
    """Writes documents of both sides into one folder, and goes on where an earlier one left it.

    Args:
        folder: exists; may hold what a killed writer left.
        vocab_size: entries of the tokenizer.
        eos_id: stands between documents.

    Attributes:
        documents: how many are written.
        text_bytes: UTF-8 bytes of their text.
    """

    def __init__(self, folder: Path, *, vocab_size: int, eos_id: int):
        self._folder = folder
        self._sizes = {"vocab_size": vocab_size, "eos_id": eos_id}
        self._open(_load_progress(folder))

    def add(self, side: Side, document: Document, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document to its side.

        Args:
            ids: of its text, (tokens,).
            text_bytes: UTF-8 bytes of its text.
        """
        source = self._names.number(document.name)
        self._splits[side].add(ids, text_bytes, source=source, item=document.item)
        if side is Side.val and self._kept < MAX_BYTES:
            raw = document.text.encode()[:MAX_BYTES]
            self._text.write_bytes(BETWEEN + raw if self._text.bytes else raw)
            self._kept += len(raw)
        self.documents += 1
        self.text_bytes += text_bytes

    @property
    def tokens(self) -> dict[Side, int]:
        """Length of each side so far, end-of-document tokens included."""
        return {side: split.tokens for side, split in self._splits.items()}

    def save(self) -> None:
        """Put everything so far on the disk; from here a later writer goes on."""
        state: dict[str, Any] = {side.name: split.checkpoint() for side, split in self._splits.items()}
        self._text.sync()
        state |= {"names": self._names.checkpoint(), "text": self._text.bytes, "kept": self._kept}
        counts = {side.name: split.counts for side, split in self._splits.items()}
        raw = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        draft = self._folder / f".{PROGRESS}"
        with draft.open("wb") as file:
            np.savez(file, state=raw, train=counts["train"], val=counts["val"])
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / PROGRESS)

    def close(self) -> tuple[dict[str, Any], dict[str, np.ndarray], bytes]:
        """Finish the files.

        Returns:
            The manifest's `splits` and `sources`; how often each id is predicted, by split; and the first 8 MB of the validation
            text, its documents joined by blank lines.
        """
        self.save()
        splits = {side.name: split.close() for side, split in self._splits.items()}
        counts = {side.name: split.counts for side, split in self._splits.items()}
        sources = self._names.close()
        self._text.close()
        return {"splits": splits, "sources": sources}, counts, (self._folder / VALIDATION_TEXT).read_bytes()[:MAX_BYTES]

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for split in self._splits.values():
            split.__exit__(*error)
        self._names.release()
        self._text.release()

    def _open(self, saved: dict[str, Any] | None) -> None:
        state: dict[str, Any] = saved["state"] if saved else {"names": 0, "text": 0, "kept": 0}
        self._splits: dict[Side, SplitWriter] = {}
        for side in Side:
            counts = saved[side.name] if saved else None
            self._splits[side] = SplitWriter(self._folder, side.name, **self._sizes, state=state.get(side.name), counts=counts)
        self._names = SourceNames(self._folder, state["names"])
        self._text = HashedFile(self._folder / VALIDATION_TEXT, state["text"])
        self._kept = state["kept"]
        self.documents = sum(state[side.name]["documents"] for side in Side) if saved else 0
        self.text_bytes = sum(state[side.name]["text_bytes"] for side in Side) if saved else 0


def forget_progress(folder: Path) -> None:
    """Remove what only a later writer would need."""
    for name in (PROGRESS, f".{PROGRESS}", VALIDATION_TEXT):
        (folder / name).unlink(missing_ok=True)


def _load_progress(folder: Path) -> dict[str, Any] | None:
    """State and counts as they were saved; None if nothing was, or the files are not there as they were."""
    try:
        with np.load(folder / PROGRESS, allow_pickle=False) as arrays:
            saved: dict[str, Any] = {side.name: arrays[side.name] for side in Side}
            saved["state"] = state = json.loads(arrays["state"].tobytes())
        whole = all(is_whole(folder, side.name, state[side.name]) for side in Side)
        whole = whole and has_bytes(folder / SOURCES, state["names"]) and has_bytes(folder / VALIDATION_TEXT, state["text"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return saved if whole else None
