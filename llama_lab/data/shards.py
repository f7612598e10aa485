"""Token ids on disk: how they lie there, how they are checked and read. `writer` puts them there.

A folder holds, for each split, `<split>-00000.bin`, `<split>-00001.bin`, …: one long sequence of little-endian uint16 or uint32
ids, cut into files without regard to documents. The sequence is `EOS document EOS document … document EOS`, so every token of every
document, and the EOS behind it, has something before it to be predicted from. Two files of little-endian int64 have an entry
for each document and one for the end: `<split>-starts.bin` the position of the EOS before it, `<split>-bytes.bin` the UTF-8
bytes of text before it. `<split>-ids.bin` says where each document came from in two int64: the line of `sources.txt` (from 0) that
holds the source's name, a JSON string, and the document's number in that source (from 1; 0 if it is all of it). `manifest.json`,
written last, describes it all, and `tokenizer.json` lies beside it.
"""

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.grammar import word
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import Problem
from llama_lab.data.cache import ContentHashes
from llama_lab.data.reading import form_of

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SOURCES = "sources.txt"
# Files mapped at once; a system often allows 1024 open ones.
MAX_MAPPED = 512
OFFSET = np.dtype("<i8")
# The manifest is written last; what is later by more than clocks and file systems blur was put there by somebody else.
LATER_NS = 2_000_000_000
LONG_BYTES = 10**9


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Split:
    """One side of a prepared data set as a single sequence of tokens, however many files it lies in.

    Attributes:
        tokens: length of the sequence, end-of-document tokens included.
        documents: number of documents; 0 where that is unknown.
        text_bytes: UTF-8 bytes of the documents' text; 0 where that is unknown.
        folder, files: where they lie.
        starts: position of each file's first id.
        dtype: of the ids, as they are stored.
        starts_file, bytes_file: name of the two tables over documents; None for files of others, which have none.
        offsets: bytes before each file's first id; empty where there are none in any.
        ids_file, sources_file: names of the table and the list that say where documents came from; None where that is unknown.
    """

    tokens: int
    documents: int
    text_bytes: int
    folder: Path
    files: tuple[str, ...]
    starts: tuple[int, ...]
    dtype: np.dtype
    starts_file: str | None
    bytes_file: str | None
    offsets: tuple[int, ...] = ()
    ids_file: str | None = None
    sources_file: str | None = None

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
        """UTF-8 bytes of the text in ids 0 to position - 1; inside a document, in proportion to its tokens; 0 if unknown.

        Args:
            position: 1 to `tokens`.
        """
        if self.bytes_file is None:
            return 0
        last = position - 1
        document = int(np.searchsorted(self.document_starts, last, side="right")) - 1
        if document >= self.documents:
            return self.text_bytes
        start, end = (int(value) for value in self.document_starts[document : document + 2])
        before, after = (int(value) for value in self._document_bytes[document : document + 2])
        return before + round((after - before) * (last - start) / max(1, end - start - 1))

    def document_name(self, document: int) -> str:
        """Where a document came from: its source, and after a colon its number there if the source holds several.

        Args:
            document: 0 to `documents` - 1.
        """
        if self.ids_file is None or self.sources_file is None:
            return f"document {document}"
        ids = np.memmap(self.folder / self.ids_file, dtype=OFFSET, mode="r", shape=(self.documents, 2))
        source, item = (int(value) for value in ids[document])
        name = json.loads(self._sources[source])
        return f"{name}:{item}" if item else name

    def locate(self, position: int) -> tuple[str, int]:
        """(file, number of the id in it) where a position of the sequence lies."""
        shard = bisect.bisect_right(self.starts, position) - 1
        return self.files[shard], position - self.starts[shard]

    @cached_property
    def _sources(self) -> list[str]:
        assert self.sources_file is not None
        return (self.folder / self.sources_file).read_text(encoding="ascii").splitlines()

    @cached_property
    def _maps(self) -> "_Maps":
        return _Maps([self.folder / file for file in self.files], self.dtype, self.offsets)

    @cached_property
    def _document_bytes(self) -> np.ndarray:
        return self._table(self.bytes_file)

    def _table(self, file: str | None) -> np.ndarray:
        if file is None:
            raise ValueError(f"where documents begin in {self.folder} is not known")
        return np.memmap(self.folder / file, dtype=OFFSET, mode="r", shape=(self.documents + 1,)).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; it maps the files itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Maps:
    """Memory maps of files, opened when first read; those read longest ago are closed when there are too many."""

    def __init__(self, paths: list[Path], dtype: np.dtype, offsets: tuple[int, ...] = ()):
        self._paths, self._dtype, self._offsets = paths, dtype, offsets or (0,) * len(paths)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getitem__(self, index: int) -> np.ndarray:
        found = self._open.get(index)
        if found is None:
            # A plain array over the map: slicing a memmap costs several times as much.
            found = np.memmap(self._paths[index], dtype=self._dtype, mode="r", offset=self._offsets[index]).view(np.ndarray)
            self._open[index] = found
            if len(self._open) > MAX_MAPPED:
                self._open.popitem(last=False)
        elif len(self._paths) > MAX_MAPPED:
            self._open.move_to_end(index)
        return found


def read_manifest(folder: Path, subject: str, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The manifest of a folder, its files' sizes checked, and the content of those that are newer than it.

    A copied folder is read through once for that; the hashes of large files are remembered.

    Args:
        subject: what a problem is reported under.
        say: told if that takes long.

    Raises:
        ConfigError: there is none, it is of another format, or a file is missing, has another size or was changed.
    """

    def refuse(rule: str) -> ConfigError:
        return ConfigError([(subject, rule)], scope="the data")

    manifest = _load_manifest(folder, refuse)
    try:
        itemsize = np.dtype(manifest["token_dtype"]).itemsize
        missing = {"hash", "vocab_size", "eos_id"} - manifest["tokenizer"].keys()
        missing |= {"data", "tokenizer"} - manifest["source"].keys()
        if missing:
            raise refuse(f"has a damaged manifest.json: it lacks {', '.join(sorted(missing))}")
        for described in _files(manifest):
            _check_size(folder / described["file"], described["bytes"], refuse)
        for name, split in manifest["splits"].items():
            fits = sum(shard["bytes"] for shard in split["shards"]) == split["tokens"] * itemsize
            entries = {"document_starts": split["documents"] + 1, "document_bytes": split["documents"] + 1}
            entries["document_ids"] = 2 * split["documents"]
            if not fits or any(split[table]["bytes"] != count * OFFSET.itemsize for table, count in entries.items()):
                raise refuse(f"has a damaged manifest.json: the counts of {name} are not those of its files")
        _check_later(folder, manifest, refuse, say)
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse(f"has a damaged manifest.json: {error!r}") from error
    return manifest


def verify_shards(
    folder: Path, subject: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Iterator[Problem]:
    """What is wrong with a prepared folder, found by reading all of it.

    Args:
        subject: what problems are reported under; the folder if not given.
        progress: told after each file the bytes that are checked, and those there are.

    Yields:
        A problem for each file that is missing or is not what was written.

    Raises:
        ConfigError: it has no manifest that could be read.
    """
    subject = subject or str(folder)
    manifest = _load_manifest(folder, lambda rule: ConfigError([(subject, rule)], scope="the data"))
    done, total = 0, sum(described["bytes"] for described in _files(manifest))
    for described in _files(manifest):
        path = folder / described["file"]
        done += described["bytes"]
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            yield subject, f"lacks {path.name}, or it cannot be read: {error.strerror or error}; copy it again or prepare it again"
            continue
        if found != described["sha256"]:
            yield subject, _changed(path)
        if progress is not None:
            progress(done, total)


def _load_manifest(folder: Path, refuse: Callable[[str], ConfigError]) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError as error:
        what = "holds no manifest.json, so nothing was prepared here to the end" if folder.is_dir() else "is no folder"
        instead = "prepared sets are listed by llama-lab cache"
        files = list(folder.iterdir()) if folder.is_dir() else []
        if any(map(form_of, files)) and all(file.suffix != ".bin" for file in files):
            instead = f"to use the text in it, type data=text {word('data.path', str(folder))}"
        raise refuse(f"{what}; {or_meant(folder, instead)}") from error
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise refuse("has a manifest.json that is not one of this project's") from error
    if version != FORMAT_VERSION:
        raise refuse(f"has format {version}, this version reads {FORMAT_VERSION}; prepare it again")
    return manifest


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every file that the manifest describes."""
    found = [manifest["sources"]] if "sources" in manifest else []
    for split in manifest["splits"].values():
        found += [*split["shards"], split["document_starts"], split["document_bytes"], split["document_ids"]]
    return found


def _check_size(path: Path, expected: int, refuse: Callable[[str], ConfigError]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise refuse(f"lacks {path.name}; prepare it again or copy it again") from error
    if size != expected:
        raise refuse(f"is damaged: {path.name} has {size:,} bytes instead of {expected:,}; prepare it again or copy it again")


def _check_later(
    folder: Path, manifest: dict[str, Any], refuse: Callable[[str], ConfigError], say: Callable[[str], None] | None
) -> None:
    """Hash what was written after the manifest: copied, or changed."""
    written = (folder / MANIFEST).stat().st_mtime_ns
    later = [found for found in _files(manifest) if (folder / found["file"]).stat().st_mtime_ns > written + LATER_NS]
    if not later:
        return
    size = sum(described["bytes"] for described in later)
    if say is not None and size > LONG_BYTES:
        say(f"Checking {size / 1e9:.1f} GB in {folder} that are newer than their manifest, as after a copy")
    hashes = ContentHashes()
    for described in later:
        if hashes.of(folder / described["file"]) != described["sha256"]:
            raise refuse(_changed(folder / described["file"]))


def _changed(path: Path) -> str:
    return f"has {path.name}, which was changed after it was prepared; copy it again or prepare it again"


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
        ids_file=described["document_ids"]["file"] if "sources" in manifest else None,
        sources_file=manifest["sources"]["file"] if "sources" in manifest else None,
    )


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Equal for folders with the same tokens, cut into the same files, and the same tokenizer, however they came about."""
    files = [[name, [shard["sha256"] for shard in split["shards"]]] for name, split in sorted(manifest["splits"].items())]
    return hashlib.sha256(json.dumps([manifest["tokenizer"]["hash"], files]).encode()).hexdigest()
