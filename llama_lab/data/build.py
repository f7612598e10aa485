"""Making a prepared folder from a source: tokenizer, shards, baselines, and last the manifest.

Each step leaves something that the next start finds: the source its work, the tokenizer its file, the shards a note every few
seconds of how far they are. A preparation that was killed goes on from there and ends with the same bytes.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, TokenizerConfig
from llama_lab.data.baselines import compression_bits_per_byte, unigram_bits_per_byte
from llama_lab.data.clock import SAY_SECONDS, Clock, duration
from llama_lab.data.corpus import Corpus, Document, Say, Side, Source
from llama_lab.data.draft import FolderWriter, forget_progress
from llama_lab.data.place import WORK, discard
from llama_lab.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER, token_dtype
from llama_lab.data.tokenizer import MAX_TRAIN_BYTES, Tokenizer, build_tokenizer, load_tokenizer
from llama_lab.data.writer import write_manifest

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
    """Everything that a prepared folder holds, made from text; its manifest last.

    Args:
        folder: empty, or what a killed call with the same arguments left.

    Raises:
        ConfigError: the text is not as it must be, or has changed meanwhile.
    """
    if not (folder / MANIFEST).exists():
        (folder / WORK).mkdir(exist_ok=True)
        corpus = source.corpus(say, folder / WORK)
        tokenizer = _find_tokenizer(folder, config, corpus, say)
        with FolderWriter(folder, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) as writer:
            _write(corpus, tokenizer, writer, say)
            origin = {"data": source.name, "tokenizer": asked_for(config), "key": key, "counts": corpus.counts}
            finish(folder, writer, tokenizer, origin, source.check_unchanged)
    forget_progress(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def finish(
    folder: Path, writer: FolderWriter, tokenizer: Tokenizer, origin: dict[str, Any], check_unchanged: Callable[[], None]
) -> None:
    """Close the files, compute the baselines and write the manifest. Without validation documents there is no such split.

    Args:
        origin: what the tokens come from.
        check_unchanged: raises ConfigError if that is not what it was when it was read.
    """
    described, counts, val_text = writer.close()
    try:
        check_unchanged()
    except ConfigError:
        discard(folder)
        raise
    baselines, val = {}, described["splits"]["val"]
    if val["documents"]:
        baselines = compression_bits_per_byte(val_text)
        baselines["unigram_bits_per_byte"] = unigram_bits_per_byte(counts["train"], counts["val"], val["text_bytes"])
    else:
        for file in folder.glob("val-*.bin"):
            file.unlink()
        del described["splits"]["val"]
    entries = {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    manifest = {
        "format_version": FORMAT_VERSION,
        "token_dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {**entries, "special_ids": tokenizer.special_ids},
        **described,
        "baselines": baselines,
        "source": origin,
    }
    write_manifest(folder, manifest)


def _find_tokenizer(folder: Path, config: TokenizerConfig, corpus: Corpus, say: Say) -> Tokenizer:
    """The tokenizer that lies in the folder, or else a new one."""
    if (folder / TOKENIZER).exists():
        return load_tokenizer(folder / TOKENIZER)
    start = time.perf_counter()
    limit = (isinstance(config, BpeConfig) and config.train_bytes) or MAX_TRAIN_BYTES
    clock = Clock("Learned the tokenizer from", min(limit, corpus.text_bytes), say)

    def texts() -> Iterator[str]:
        done = 0
        for document in corpus.side(Side.train):
            yield document.text
            done += len(document.text)
            clock(done)

    tokenizer = build_tokenizer(config, texts)
    if isinstance(config, BpeConfig):
        wanted = "" if tokenizer.vocab_size == config.vocab_size else f" of the {config.vocab_size:,} that were asked for"
        say(f"Trained a tokenizer of {tokenizer.vocab_size:,} entries{wanted} in {time.perf_counter() - start:.1f} s")
    draft = folder / f".{TOKENIZER}"
    tokenizer.save(draft)
    with draft.open("r+b") as file:
        os.fsync(file.fileno())
    draft.replace(folder / TOKENIZER)
    return tokenizer


def _write(corpus: Corpus, tokenizer: Tokenizer, writer: FolderWriter, say: Say) -> None:
    """Encode and write every document that is not written yet, and note every few seconds how far that is."""
    waiting: deque[tuple[Side, Document, int]] = deque()

    def texts(first: int) -> Iterator[str]:
        for side, document in corpus.documents(first):
            waiting.append((side, document, len(document.text.encode())))
            yield document.text

    clock = _Clock(corpus.text_bytes, writer, say)
    saved = time.perf_counter()
    with closing(tokenizer.encode_stream(texts(writer.documents))) as encoded:
        for ids in encoded:
            side, document, size = waiting.popleft()
            writer.add(side, document, ids, size)
            if time.perf_counter() - saved > SAVE_SECONDS:
                writer.save()
                saved = time.perf_counter()
            clock.tick()
    clock.stop()


class _Clock:
    """Says how far encoding is, how fast it goes and how long it will take.

    Args:
        total: UTF-8 bytes of all text.
    """

    def __init__(self, total: int, writer: FolderWriter, say: Say):
        self._total, self._writer, self._say = total, writer, say
        self._start = self._said = time.perf_counter()
        self._before = writer.text_bytes
        if writer.documents:
            done = f"{writer.text_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            say(f"Going on where an earlier command stopped: {done} are encoded")

    def tick(self) -> None:
        """Say something if it is time to."""
        now = time.perf_counter()
        if now - self._said < SAY_SECONDS:
            return
        self._said = now
        done, speed = self._writer.text_bytes, self._speed(now)
        share = f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB ({100 * done / max(1, self._total):.0f} %)"
        left = duration(max(0.0, (self._total - done) / speed))
        self._say(f"Encoded {share} at {speed / 1e6:.1f} MB/s, {left} left")

    def stop(self) -> None:
        """Say what came out."""
        now, writer = time.perf_counter(), self._writer
        train, val = writer.tokens[Side.train], writer.tokens[Side.val]
        counts = f"{train:,} training and {val:,} validation tokens of {writer.text_bytes / (train + val):.2f} bytes"
        speed = f" ({self._speed(now) / 1e6:.1f} MB/s)" if writer.text_bytes > self._before else ""
        self._say(f"Encoded {counts} in {now - self._start:.1f} s{speed}")

    def _speed(self, now: float) -> float:
        """Bytes of text a second, of this process alone."""
        return max(1.0, (self._writer.text_bytes - self._before) / max(1e-9, now - self._start))
