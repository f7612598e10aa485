"""Making a prepared folder from a source: tokenizer, shards, baselines, and last the manifest.

Each step leaves something that the next start finds: the source its work, the tokenizer its file, the shards a note every few
seconds of how far they are. A preparation that was killed goes on from there and ends with the same bytes.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, TokenizerConfig
from llama_lab.data.baselines import compression_bits_per_byte, unigram_bits_per_byte
from llama_lab.data.corpus import Corpus, Document, Say, Side, Source
from llama_lab.data.draft import FolderWriter, forget_progress
from llama_lab.data.place import WORK, discard
from llama_lab.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER, token_dtype
from llama_lab.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from llama_lab.data.writer import write_manifest

SAY_SECONDS = 10.0
# What a killed process loses at most; putting the files on the disk takes a few hundredths of a second.
SAVE_SECONDS = 5.0


def asked_for(config: TokenizerConfig) -> str:
    """How the tokenizer was asked for, in words that do not change when more kinds come."""
    match config:
        case BpeConfig():
            more = [f"with {' '.join(config.special_tokens)}"] if config.special_tokens else []
            more += [f"of {config.train_bytes} bytes"] if config.train_bytes is not None else []
            return " ".join([f"bpe {config.vocab_size}", *more])
        case FileTokenizerConfig():
            return "file"
        case _:
            return "bytes"


def build(folder: Path, source: Source, config: TokenizerConfig, key: str, say: Say) -> None:
    """Everything that a prepared folder holds, its manifest last.

    Args:
        folder: empty, or what a killed call with the same arguments left.

    Raises:
        ConfigError: the text is not as it must be, or has changed meanwhile.
    """
    if not (folder / MANIFEST).exists():
        (folder / WORK).mkdir(exist_ok=True)
        corpus = source.corpus(say, folder / WORK)
        tokenizer = _find_tokenizer(folder, corpus, config, say)
        with FolderWriter(folder, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) as writer:
            _encode(corpus, tokenizer, writer, say)
            described, counts, val_text = writer.close()
        try:
            source.check_unchanged()
        except ConfigError:
            discard(folder)
            raise
        val_bytes = described["splits"]["val"]["text_bytes"]
        unigram = unigram_bits_per_byte(counts["train"], counts["val"], val_bytes)
        manifest = {
            "format_version": FORMAT_VERSION,
            "token_dtype": token_dtype(tokenizer.vocab_size).name,
            "tokenizer": {
                "hash": tokenizer.hash,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "special_ids": tokenizer.special_ids,
            },
            **described,
            "baselines": {**compression_bits_per_byte(val_text), "unigram_bits_per_byte": unigram},
            "source": {"data": source.name, "tokenizer": asked_for(config), "key": key, "counts": corpus.counts},
        }
        write_manifest(folder, manifest)
    forget_progress(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _find_tokenizer(folder: Path, corpus: Corpus, config: TokenizerConfig, say: Say) -> Tokenizer:
    """The tokenizer that lies in the folder, or else a new one."""
    path = folder / TOKENIZER
    if path.exists():
        return load_tokenizer(path)
    start = time.perf_counter()
    tokenizer = build_tokenizer(config, lambda: (document.text for document in corpus.side(Side.train)))
    if isinstance(config, BpeConfig):
        say(f"Trained a tokenizer of {tokenizer.vocab_size:,} entries in {time.perf_counter() - start:.1f} s")
    draft = folder / f".{TOKENIZER}"
    tokenizer.save(draft)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    return tokenizer


def _encode(corpus: Corpus, tokenizer: Tokenizer, writer: FolderWriter, say: Say) -> None:
    """Encode and write every document that is not written yet."""
    waiting: deque[tuple[Side, Document, int]] = deque()

    def texts(first: int) -> Iterator[str]:
        for side, document in corpus.documents(first):
            waiting.append((side, document, len(document.text.encode())))
            yield document.text

    if writer.documents:
        done, total = writer.text_bytes / 1e6, corpus.text_bytes / 1e6
        say(f"Going on where an earlier command stopped: {done:,.0f} of {total:,.0f} MB are encoded")
    clock = _Clock(corpus.text_bytes, writer.text_bytes)
    saved = said = time.perf_counter()
    with closing(tokenizer.encode_stream(texts(writer.documents))) as encoded:
        for ids in encoded:
            side, document, size = waiting.popleft()
            writer.add(side, document, ids, size)
            now = time.perf_counter()
            if now - saved > SAVE_SECONDS:
                writer.save()
                saved = now
            if now - said > SAY_SECONDS:
                say(clock.words(writer.text_bytes))
                said = now
    say(clock.result(writer))


class _Clock:
    """How fast encoding goes, in words.

    Args:
        total: UTF-8 bytes of all text.
        before: those that were encoded by an earlier process.
    """

    def __init__(self, total: int, before: int):
        self._total, self._before, self._start = total, before, time.perf_counter()

    def words(self, done: int) -> str:
        """Where it stands, and how long it will take."""
        speed = self._speed(done)
        left = duration((self._total - done) / speed) if done < self._total else "little"
        share = f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB ({100 * done / max(1, self._total):.0f} %)"
        return f"Encoded {share} at {speed / 1e6:.1f} MB/s, {left} left"

    def result(self, writer: FolderWriter) -> str:
        """What came out."""
        seconds = time.perf_counter() - self._start
        train, val = writer.tokens[Side.train], writer.tokens[Side.val]
        ratio = writer.text_bytes / (train + val)
        speed = f" ({self._speed(writer.text_bytes) / 1e6:.1f} MB/s)" if writer.text_bytes > self._before else ""
        return f"Encoded {train:,} training and {val:,} validation tokens of {ratio:.2f} bytes in {seconds:.1f} s{speed}"

    def _speed(self, done: int) -> float:
        """Bytes a second of this process."""
        return max(1.0, (done - self._before) / max(1e-9, time.perf_counter() - self._start))


def duration(seconds: float) -> str:
    """A time that is to come, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
