"""Token ids onto the disk, in the form that `shards` describes."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.data.shards import MANIFEST, OFFSET, token_dtype

SHARD_TOKENS = 2**27
BUFFER_TOKENS = 2**20


class SplitWriter:
    """Writes one split, document after document.

    Args:
        folder: exists, and has no files of this split.
        split: `train` or `val`.
        vocab_size: every id is below it, which is checked; it also decides on the dtype.
        shard_tokens: length of a file.
    """

    def __init__(self, folder: Path, split: str, *, vocab_size: int, eos_id: int, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._shards: list[dict[str, Any]] = []
        self._eos = np.array([eos_id], dtype=np.uint32)
        self._buffer = [self._eos]
        self._buffered = 1
        self._tokens, self._text_bytes, self._documents, self._max_id = 1, 0, 0, 0
        self._starts = _HashedFile(folder / f"{split}-starts.bin")
        self._bytes = _HashedFile(folder / f"{split}-bytes.bin")
        self._shard: _HashedFile | None = None
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        """How often each id was written, the EOS before the first document not counted: it is never predicted."""

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document and the EOS behind it.

        Args:
            ids: of its text, (tokens,).
            text_bytes: UTF-8 bytes of its text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        self._note_document()
        self._buffer += [ids, self._eos]
        self._buffered += len(ids) + 1
        self._tokens += len(ids) + 1
        self._text_bytes += text_bytes
        self._documents += 1
        if self._buffered >= BUFFER_TOKENS:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Finish the files.

        Returns:
            The split's part of the manifest.
        """
        self._flush()
        self._close_shard()
        self.counts[self._eos[0]] -= 1
        self._note_document()
        return {
            "tokens": self._tokens,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "max_id": self._max_id,
            "shards": self._shards,
            "document_starts": self._starts.close(),
            "document_bytes": self._bytes.close(),
        }

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._starts, self._bytes, self._shard):
            if file is not None:
                file.release()

    def _note_document(self) -> None:
        self._starts.write(np.array([self._tokens - 1], dtype=OFFSET))
        self._bytes.write(np.array([self._text_bytes], dtype=OFFSET))

    def _flush(self) -> None:
        if not self._buffer:
            return
        ids = np.concatenate(self._buffer)
        self._buffer, self._buffered = [], 0
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        self._max_id = max(self._max_id, high)
        self.counts += np.bincount(ids, minlength=self._vocab_size)
        ids = ids.astype(self._dtype)
        while len(ids):
            if self._shard is None:
                self._shard = _HashedFile(self._folder / f"{self._split}-{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.bytes // self._dtype.itemsize
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.bytes == self._shard_tokens * self._dtype.itemsize:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._path, self._hash = path, hashlib.sha256()
        self._file = path.open("wb", buffering=2**20)
        self.bytes = 0

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of an array."""
        raw = values.tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self.bytes += len(raw)

    def close(self) -> dict[str, Any]:
        """Put it on the disk; returns how the manifest describes it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.release()
        return {"file": self._path.name, "bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def release(self) -> None:
        """Let go of the file; what an error left unwritten does not matter any more."""
        with suppress(OSError):
            self._file.close()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes a folder complete, in one step."""
    draft = folder / f".{MANIFEST}"
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)
