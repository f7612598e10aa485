"""Token ids on disk: how they are written, checked and read.

A folder holds, for each split, `<split>-00000.bin`, `<split>-00001.bin`, …: one long sequence of little-endian uint16 or uint32
ids, cut into files without regard to documents. The sequence is `EOS document EOS document … document EOS`, so every token of every
document, and the EOS behind it, has something before it to be predicted from. Two files of little-endian int64 have an entry
for each document and one for the end: `<split>-starts.bin` the position of the EOS before it, `<split>-bytes.bin` the UTF-8
bytes of text before it. `manifest.json`, written last, describes it all, and `tokenizer.json` lies beside it.
"""

import bisect
import hashlib
import json
import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.config.errors import ConfigError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 2**27
# Files mapped at once; a system often allows 1024 open ones.
MAX_MAPPED = 512
BUFFER_TOKENS = 2**20
OFFSET = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Split:
    """One side of a prepared data set as a single sequence of tokens, however many files it lies in.

    Attributes:
        tokens: length of the sequence, end-of-document tokens included.
        documents: number of documents.
        text_bytes: UTF-8 bytes of the documents' text.
        folder, files: where they lie.
        starts: position of each file's first id.
        dtype: of the ids, as they are stored.
        starts_file, bytes_file: name of the two tables over documents.
    """

    tokens: int
    documents: int
    text_bytes: int
    folder: Path
    files: tuple[str, ...]
    starts: tuple[int, ...]
    dtype: np.dtype
    starts_file: str
    bytes_file: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start to stop - 1, in the dtype they are stored in; a view into the mapped file where they lie in one."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"ids {start} to {stop} of {self.tokens}")
        shard = bisect.bisect_right(self.starts, start) - 1
        parts = []
        while True:
            base = self.starts[shard]
            end = self.starts[shard + 1] if shard + 1 < len(self.starts) else self.tokens
            parts.append(self._maps[shard][start - base : min(stop, end) - base])
            if stop <= end:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            start, shard = end, shard + 1

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Position of the EOS before each document, and of the closing EOS: (documents + 1,) int64, memory-mapped."""
        return self._table(self.starts_file)

    def bytes_before(self, position: int) -> int:
        """UTF-8 bytes of the text in ids 0 to position - 1; inside a document, in proportion to its tokens.

        Args:
            position: 1 to `tokens`.
        """
        last = position - 1
        document = int(np.searchsorted(self.document_starts, last, side="right")) - 1
        if document >= self.documents:
            return self.text_bytes
        start, end = (int(value) for value in self.document_starts[document : document + 2])
        before, after = (int(value) for value in self._document_bytes[document : document + 2])
        return before + round((after - before) * (last - start) / max(1, end - start - 1))

    @cached_property
    def _maps(self) -> "_Maps":
        return _Maps([self.folder / file for file in self.files], self.dtype)

    @cached_property
    def _document_bytes(self) -> np.ndarray:
        return self._table(self.bytes_file)

    def _table(self, file: str) -> np.ndarray:
        return np.memmap(self.folder / file, dtype=OFFSET, mode="r", shape=(self.documents + 1,)).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; it maps the files itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Maps:
    """Memory maps of files, opened when first read; those read longest ago are closed when there are too many."""

    def __init__(self, paths: list[Path], dtype: np.dtype):
        self._paths, self._dtype = paths, dtype
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getitem__(self, index: int) -> np.ndarray:
        found = self._open.get(index)
        if found is None:
            # A plain array over the map: slicing a memmap costs several times as much.
            found = np.memmap(self._paths[index], dtype=self._dtype, mode="r").view(np.ndarray)
            self._open[index] = found
            if len(self._open) > MAX_MAPPED:
                self._open.popitem(last=False)
        elif len(self._paths) > MAX_MAPPED:
            self._open.move_to_end(index)
        return found


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


def read_manifest(folder: Path, subject: str) -> dict[str, Any]:
    """The manifest of a folder, its files' sizes checked.

    Args:
        subject: what a problem is reported under.

    Raises:
        ConfigError: there is none, it is of another format, or a file is missing or has another size.
    """

    def refuse(rule: str) -> ConfigError:
        return ConfigError([(subject, rule)], scope="the data")

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError as error:
        what = "holds no manifest.json, so nothing was prepared here to the end" if folder.is_dir() else "is no folder"
        raise refuse(f"{what}; prepared sets are listed by llama-lab cache") from error
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise refuse("has a manifest.json that is not one of this project's") from error
    if version != FORMAT_VERSION:
        raise refuse(f"has format {version}, this version reads {FORMAT_VERSION}; prepare it again")
    try:
        itemsize = np.dtype(manifest["token_dtype"]).itemsize
        missing = {"hash", "vocab_size", "eos_id"} - manifest["tokenizer"].keys()
        missing |= {"data", "tokenizer"} - manifest["source"].keys()
        if missing:
            raise refuse(f"has a damaged manifest.json: it lacks {', '.join(sorted(missing))}")
        for name, split in manifest["splits"].items():
            tables = [split["document_starts"], split["document_bytes"]]
            for described in [*split["shards"], *tables]:
                _check_size(folder / described["file"], described["bytes"], refuse)
            tokens_fit = sum(shard["bytes"] for shard in split["shards"]) == split["tokens"] * itemsize
            if not tokens_fit or any(table["bytes"] != (split["documents"] + 1) * OFFSET.itemsize for table in tables):
                raise refuse(f"has a damaged manifest.json: the counts of {name} are not those of its files")
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse(f"has a damaged manifest.json: {error!r}") from error
    return manifest


def _check_size(path: Path, expected: int, refuse: Any) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise refuse(f"lacks {path.name}; prepare it again or copy it again") from error
    if size != expected:
        raise refuse(f"is damaged: {path.name} has {size:,} bytes instead of {expected:,}; prepare it again or copy it again")


def open_split(folder: Path, manifest: dict[str, Any], name: str) -> Split | None:
    """A split of a folder whose manifest was read; None if it has no such split."""
    described = manifest["splits"].get(name)
    if described is None:
        return None
    dtype = np.dtype(manifest["token_dtype"]).newbyteorder("<")
    starts = [0]
    for shard in described["shards"][:-1]:
        starts.append(starts[-1] + shard["bytes"] // dtype.itemsize)
    return Split(
        folder=folder,
        files=tuple(shard["file"] for shard in described["shards"]),
        starts=tuple(starts),
        dtype=dtype,
        tokens=described["tokens"],
        documents=described["documents"],
        text_bytes=described["text_bytes"],
        starts_file=described["document_starts"]["file"],
        bytes_file=described["document_bytes"]["file"],
    )


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Equal for folders with the same tokens, cut into the same files, and the same tokenizer, however they came about."""
    files = [[name, [shard["sha256"] for shard in split["shards"]]] for name, split in sorted(manifest["splits"].items())]
    return hashlib.sha256(json.dumps([manifest["tokenizer"]["hash"], files]).encode()).hexdigest()
