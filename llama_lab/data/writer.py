"""Token ids onto the disk, in the form that `shards` describes, and so that a writer that was killed can go on.

What was written can be made to last at any point (`checkpoint`); a later writer is given what that returned, cuts the files back to
it and goes on to the same bytes.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.data.shards import MANIFEST, OFFSET, SOURCES, token_dtype

SHARD_TOKENS = 2**27
BUFFER_TOKENS = 2**20
# Names that are not looked up any more are written again when they come back; it bounds the memory for millions of them.
MAX_NAMES = 2**16
READ_BYTES = 2**22


class SplitWriter:
    """Writes one split, document after document.

    Args:
        folder: exists, and has no files of this split, or those that `state` tells of.
        split: `train` or `val`.
        vocab_size: every id is below it, which is checked; it also decides on the dtype.
        shard_tokens: length of a file.
        state: what `checkpoint` of an earlier writer returned, to go on from there.
        counts: that writer's counts at that point.

    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        eos_id: int,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
        counts: np.ndarray | None = None,
    ):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._eos = np.array([eos_id], dtype=np.uint32)
        self._state = state or {"shards": [], "shard_bytes": 0, "tokens": 1, "documents": 0, "text_bytes": 0, "max_id": 0}
        self._buffer = [] if state else [self._eos]
        self._buffered = len(self._buffer)
        entries = self._state["documents"]
        for path in folder.glob(f"{split}-[0-9]*.bin"):  # files begun after the checkpoint
            if int(path.stem.rpartition("-")[2]) >= len(self._state["shards"]) + (self._state["shard_bytes"] > 0):
                path.unlink()
        self._starts = HashedFile(folder / f"{split}-starts.bin", entries * OFFSET.itemsize)
        self._bytes = HashedFile(folder / f"{split}-bytes.bin", entries * OFFSET.itemsize)
        self._ids = HashedFile(folder / f"{split}-ids.bin", entries * 2 * OFFSET.itemsize)
        self._shard = self._open_shard(self._state["shard_bytes"]) if self._state["shard_bytes"] else None
        self.counts = np.zeros(vocab_size, dtype=np.int64) if counts is None else counts
        """How often each id was written. Once all is, the EOS before the first document is not counted: it is never predicted."""

    def add(self, ids: np.ndarray, text_bytes: int, *, source: int = 0, item: int = 0) -> None:
        """Append a document and the EOS behind it.

        Args:
            ids: of its text, (tokens,).
            text_bytes: UTF-8 bytes of its text.
            source: number of the source that it came from.
            item: its number within that source, from 1; 0 if it is all of it.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        self._note_document()
        self._ids.write(np.array([source, item], dtype=OFFSET))
        self._buffer += [ids, self._eos]
        self._buffered += len(ids) + 1
        self._state["tokens"] += len(ids) + 1
        self._state["text_bytes"] += text_bytes
        self._state["documents"] += 1
        if self._buffered >= BUFFER_TOKENS:
            self._flush()

    @property
    def tokens(self) -> int:
        """Ids so far, those of the ends of documents included."""
        return self._state["tokens"]

    def checkpoint(self) -> dict[str, Any]:
        """Put all documents so far on the disk; returns what a later writer needs to go on, apart from the counts."""
        self._flush()
        for file in (self._starts, self._bytes, self._ids, self._shard):
            if file is not None:
                file.sync()
        return {**self._state, "shards": list(self._state["shards"]), "shard_bytes": self._shard.bytes if self._shard else 0}

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
            **{name: self._state[name] for name in ("tokens", "documents", "text_bytes", "max_id", "shards")},
            "document_starts": self._starts.close(),
            "document_bytes": self._bytes.close(),
            "document_ids": self._ids.close(),
        }

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._starts, self._bytes, self._ids, self._shard):
            if file is not None:
                file.release()

    def _note_document(self) -> None:
        self._starts.write(np.array([self._state["tokens"] - 1], dtype=OFFSET))
        self._bytes.write(np.array([self._state["text_bytes"]], dtype=OFFSET))

    def _flush(self) -> None:
        if not self._buffer:
            return
        ids = np.concatenate(self._buffer)
        self._buffer, self._buffered = [], 0
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        self._state["max_id"] = max(self._state["max_id"], high)
        self.counts += np.bincount(ids, minlength=self._vocab_size)
        ids = ids.astype(self._dtype)
        while len(ids):
            if self._shard is None:
                self._shard = self._open_shard(0)
            room = self._shard_tokens - self._shard.bytes // self._dtype.itemsize
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.bytes == self._shard_tokens * self._dtype.itemsize:
                self._close_shard()

    def _open_shard(self, size: int) -> "HashedFile":
        return HashedFile(self._folder / f"{self._split}-{len(self._state['shards']):05d}.bin", size)

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._state["shards"].append(self._shard.close())
            self._shard = None


def is_whole(folder: Path, split: str, state: dict[str, Any]) -> bool:
    """Whether a split's files hold at least what `checkpoint` returned; a disk may lose more than the system promised."""
    entries = state["documents"] * OFFSET.itemsize
    sizes = {f"{split}-starts.bin": entries, f"{split}-bytes.bin": entries, f"{split}-ids.bin": 2 * entries}
    sizes |= {shard["file"]: shard["bytes"] for shard in state["shards"]}
    sizes[f"{split}-{len(state['shards']):05d}.bin"] = state["shard_bytes"]
    return all(has_bytes(folder / name, size) for name, size in sizes.items())


def has_bytes(path: Path, size: int) -> bool:
    """Whether a file is at least so long."""
    return size == 0 or (path.is_file() and path.stat().st_size >= size)


class SourceNames:
    """Numbers the names that documents have their text from, and writes each to `sources.txt`: a JSON string a line.

    A name that was long gone gets a second number when it comes back, so `sources.txt` may hold it twice.

    Args:
        folder: exists.
        size: bytes of the file to go on from.
    """

    def __init__(self, folder: Path, size: int = 0):
        self._file = HashedFile(folder / SOURCES, size)
        self._numbers: dict[str, int] = {}
        self._count = 0
        if size:
            with (folder / SOURCES).open(encoding="ascii") as file:
                for line in file:
                    self._remember(json.loads(line))

    def number(self, name: str) -> int:
        """The line that the name stands in, from 0."""
        found = self._numbers.get(name)
        if found is None:
            self._file.write_bytes(f"{json.dumps(name)}\n".encode("ascii"))
            found = self._remember(name)
        return found

    def checkpoint(self) -> int:
        """Put all names so far on the disk; returns the `size` to go on from."""
        self._file.sync()
        return self._file.bytes

    def close(self) -> dict[str, Any]:
        """Finish the file; returns how the manifest describes it."""
        return self._file.close()

    def release(self) -> None:
        """Let go of the file after an error."""
        self._file.release()

    def _remember(self, name: str) -> int:
        if len(self._numbers) == MAX_NAMES:
            self._numbers.clear()
        self._numbers[name] = self._count
        self._count += 1
        return self._count - 1


class HashedFile:
    """A file that is hashed while it is written.

    Args:
        size: bytes that it has already, to go on behind them; what follows them is cut off.
    """

    def __init__(self, path: Path, size: int = 0):
        self._path, self._hash = path, hashlib.sha256()
        self.bytes = size
        self._is_synced = True
        self._file = path.open("r+b" if size else "wb", buffering=2**20)
        if size:
            self._read_back(size)

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of an array."""
        self.write_bytes(values.tobytes())

    def write_bytes(self, raw: bytes) -> None:
        """Append bytes."""
        self._file.write(raw)
        self._hash.update(raw)
        self.bytes += len(raw)
        self._is_synced = False

    def sync(self) -> None:
        """Put what was written so far on the disk."""
        if not self._is_synced:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._is_synced = True

    def close(self) -> dict[str, Any]:
        """Put it on the disk; returns how the manifest describes it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self._path.name, "bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def release(self) -> None:
        """Let go of the file; what an error left unwritten does not matter any more."""
        with suppress(OSError):
            self._file.close()

    def _read_back(self, size: int) -> None:
        left = size
        while left:
            raw = self._file.read(min(left, READ_BYTES))
            if not raw:
                raise OSError(f"{self._path.name} has become shorter")
            self._hash.update(raw)
            left -= len(raw)
        self._file.seek(size)
        self._file.truncate()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes a folder complete, in one step."""
    draft = folder / f".{MANIFEST}"
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)
