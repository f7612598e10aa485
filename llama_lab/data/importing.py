"""Documents out of token files that others wrote, so that they can be prepared like any text.

In a bare folder (`foreign`) documents are told apart by ids alone. A document ends at the token for its end and begins at a token
for its start, whichever a folder has. llm.c and modded-nanogpt put the former before each document, nanoGPT behind it; llm.c for
Llama 3 writes only the latter; SimpleLLaMA both, with a line break between them. Neither token belongs to the document, and white
space between them is no document.
"""

import bisect
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ShardsConfig
from llama_lab.data import foreign
from llama_lab.data.baselines import MAX_BYTES
from llama_lab.data.build import SAVE_SECONDS, finish
from llama_lab.data.clock import SAY_SECONDS, duration
from llama_lab.data.corpus import Document, Say, Side
from llama_lab.data.draft import FolderWriter, forget_progress
from llama_lab.data.entries import entries
from llama_lab.data.foreign import TokenFile, TokenFolder
from llama_lab.data.id_check import check_ids
from llama_lab.data.place import discard
from llama_lab.data.shards import MANIFEST, TOKENIZER, Split
from llama_lab.data.tokenizer import Tokenizer

# Raised when the same files give other documents or another split.
FORMAT = 1
BLOCK_TOKENS = 2**22
# A document longer than any real one: the ids were made with another tokenizer, or have nothing between documents.
MAX_DOCUMENT_TOKENS = 2**26
HASHES = 2**64


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document that is ids already.

    Attributes:
        document: its name is that of the file that it begins in, its item its number in that file. Its text is only there for
            validation, and only for as much of that as a baseline needs.
        ids: (tokens,), at least one, without the tokens between documents.
        text_bytes: UTF-8 bytes of its text: exact for byte-level BPE, if no text began with a space that the tokenizer would
            have added; an estimate for other tokenizers (`Entries`).
    """

    side: Side
    document: Document
    ids: np.ndarray
    text_bytes: int


class TokenSource:
    """The documents of a bare folder, in the order of its files, those of the validation files last.

    Where the files bring no validation split, a document is held out if the hash of its ids falls into the first `val_fraction` of
    all hashes: equal documents are on one side.

    Args:
        data: the node, whose path is a bare folder.
        tokenizer: that the ids were made with.

    Attributes:
        tokenizer: the same.
        tokens: ids of all files, those between documents included.

    Raises:
        ConfigError: the files are not whole, do not fit the tokenizer, or bring a validation split while another is asked for.
    """

    name = "shards"

    def __init__(self, data: ShardsConfig, folder: TokenFolder, tokenizer: Tokenizer, say: Say):
        self._subject = f"data.path={data.path}"
        self.tokens = sum(file.tokens for file in folder.files)
        self._folder, self.tokenizer, self._val_fraction = folder, tokenizer, data.val_fraction
        if folder.val and data.val_fraction is not None:
            rule = f"asks for a second validation split; {folder.val[0].path.name} is one; leave data.val_fraction out"
            raise ConfigError([(f"data.val_fraction={data.val_fraction}", rule)], scope="the data")
        self._stamps = [_stamp(file) for file in folder.files]
        self._digests = check_ids(folder, tokenizer.vocab_size, self._subject, say)
        self._entries = entries(tokenizer)
        self._is_blank = self._entries.is_blank
        self.counts = {"kept": 0, "empty": 0, "start_tokens": 0, "blanks_between": 0}
        """What was found so far: documents, those without text, start tokens, and white space between documents; none of the last
        three is written."""

    def fingerprint(self) -> str:
        """Hash of the files' contents, the tokenizer, and what decides on the split."""
        content = foreign.tokens_fingerprint(self._folder, self._digests, self.tokenizer.hash)
        return hashlib.sha256(json.dumps([FORMAT, content, self._val_fraction]).encode()).hexdigest()

    def documents(self, first: int = 0) -> Iterator[Encoded]:
        """The documents from the nth one on; those before are passed over.

        Raises:
            ConfigError: nothing stands between documents.
        """
        self.counts = dict.fromkeys(self.counts, 0)
        sizes, validation = self._entries.sizes, {file.path.name for file in self._folder.val}
        with_text = 0
        for name, item, ids in islice(self._cut_all(), first, None):
            side = Side.val if name in validation or self._is_held_out(ids) else Side.train
            text = ""
            if side is Side.val and with_text < MAX_BYTES:
                text = b"".join(self._entries.text[id] for id in ids.tolist()).decode(errors="replace")[self._added_space(ids) :]
                with_text += len(text.encode())
            yield Encoded(side, Document(name, text, item), ids, int(sizes[ids].sum()) - self._added_space(ids))

    def check_unchanged(self) -> None:
        """Raise ConfigError if a file has another size or date than when its ids were checked."""
        for file, stamp in zip(self._folder.files, self._stamps, strict=True):
            if not file.path.exists() or _stamp(file) != stamp:
                rule = "changed while it was being read; run the command again"
                raise ConfigError([(f"{self._subject}: {file.path.name}", rule)], scope="the data")

    def check_sides(self, tokens: dict[Side, int]) -> None:
        """Raise ConfigError if a side that was asked for has no documents; a token alone is the one before the first."""
        count = f"{self.counts['kept']:,} documents"
        if tokens[Side.train] <= 1:
            raise ConfigError([(self._subject, f"leaves nothing to train on: all of its {count} are held out")], scope="the data")
        if tokens[Side.val] <= 1 and self._val_fraction is not None:
            rule = f"holds out none of the {count}; try a larger share, or leave it out and train with eval=null"
            raise ConfigError([(f"data.val_fraction={self._val_fraction}", rule)], scope="the data")

    def _cut_all(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """(file that it begins in, its number there, ids) of each document, training files first."""
        was_cut = False
        for split in filter(None, (self._folder.split("train"), self._folder.split("val"))):
            file, item = -1, 0
            for begin, ids, is_ended in self._cut(split):
                was_cut |= is_ended
                here = bisect.bisect_right(split.starts, begin) - 1
                file, item = here, item + 1 if here == file else 1
                yield split.files[file], item, ids
        if not was_cut:
            raise self._uncut()

    def _cut(self, split: Split) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(position of its first id, ids, whether a token ends it) of each document of a split."""
        ends = np.zeros(self.tokenizer.vocab_size, dtype=bool)
        ends[[self.tokenizer.eos_id, *self._entries.start_ids]] = True
        parts: list[np.ndarray] = []
        begin = 0
        for start in range(0, split.tokens, BLOCK_TOKENS):
            block = split.read(start, min(start + BLOCK_TOKENS, split.tokens))
            previous = 0
            for cut in np.flatnonzero(ends[block]).tolist():
                ids = _joined([*parts, block[previous:cut]])
                if self._is_document(ids, begin, int(block[cut])):
                    yield begin, ids, True
                parts, previous, begin = [], cut + 1, start + cut + 1
            parts.append(block[previous:])
            if start + len(block) - begin > MAX_DOCUMENT_TOKENS:
                raise self._uncut()
        ids = _joined(parts)
        if len(ids) and self._is_document(ids, begin, self.tokenizer.eos_id):
            yield begin, ids, False

    def _is_document(self, ids: np.ndarray, begin: int, end: int) -> bool:
        """Count what stands before the token `end`, and the token; whether it is text."""
        is_start = end != self.tokenizer.eos_id
        self.counts["start_tokens"] += is_start
        if len(ids) and not (self._is_blank[ids[0]] and self._is_blank[ids].all()):
            self.counts["kept"] += 1
            return True
        if is_start:
            self.counts["blanks_between"] += len(ids) > 0
        elif begin > 0 or len(ids):  # the first token may be an end, where ends stand before documents
            self.counts["empty"] += 1
        return False

    def _is_held_out(self, ids: np.ndarray) -> bool:
        if self._val_fraction is None:
            return False
        digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._val_fraction * HASHES

    def _added_space(self, ids: np.ndarray) -> int:
        """1 if a text begins with a space that the tokenizer put there, else 0."""
        return int(self._entries.adds_space and self._entries.text[ids[0]].startswith(b" "))

    def _uncut(self) -> ConfigError:
        ends = [f"{self._entries.special[id]} (id {id})" for id in (self.tokenizer.eos_id, *self._entries.start_ids)]
        rule = f"holds nothing between documents: {' and '.join(ends)} never occur, or hardly; is this the tokenizer of these ids?"
        return ConfigError([(self._subject, rule)], scope="the data")


def import_tokens(folder: Path, source: TokenSource, key: str, asked: str, say: Say) -> None:
    """Write a folder of this project's form from the documents of a bare one, its manifest last.

    Args:
        folder: empty, or what a killed call with the same arguments left.
        key: what decides on the content.
        asked: how the tokenizer was asked for.

    Raises:
        ConfigError: documents cannot be told apart, or one side has none.
    """
    if not (folder / MANIFEST).exists():
        tokenizer = source.tokenizer
        tokenizer.save(folder / TOKENIZER)
        with FolderWriter(folder, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) as writer:
            try:
                _write(source, writer, say)
            except ConfigError:
                discard(folder)
                raise
            origin = {"data": source.name, "tokenizer": asked, "key": key, "counts": source.counts}
            finish(folder, writer, tokenizer, origin, source.check_unchanged)
    forget_progress(folder)


def _write(source: TokenSource, writer: FolderWriter, say: Say) -> None:
    """Write every document that is not written yet."""
    start = saved = said = time.perf_counter()
    before = sum(writer.tokens.values())
    if writer.documents:
        say(f"Going on where an earlier command stopped: {before / 1e6:,.0f} of {source.tokens / 1e6:,.0f} M tokens are written")
    for found in source.documents(writer.documents):
        writer.add(found.side, found.document, found.ids, found.text_bytes)
        now = time.perf_counter()
        if now - saved > SAVE_SECONDS:
            writer.save()
            saved = now
        if now - said > SAY_SECONDS:
            said, done = now, sum(writer.tokens.values())
            speed = max(1.0, (done - before) / (now - start))
            left = duration(max(0, source.tokens - done) / speed)
            say(f"Wrote {done / 1e6:,.0f} of {source.tokens / 1e6:,.0f} M tokens at {speed / 1e6:.1f} M a second, {left} left")
    source.check_sides(writer.tokens)
    train, val = writer.tokens[Side.train], writer.tokens[Side.val]
    seconds = time.perf_counter() - start
    say(f"Wrote {train:,} training and {val:,} validation tokens of {writer.documents:,} documents in {seconds:.1f} s")


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _stamp(file: TokenFile) -> tuple[int, int]:
    stat = file.path.stat()
    return stat.st_size, stat.st_mtime_ns
