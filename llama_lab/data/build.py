"""Making a prepared folder from a source: tokenizer, shards, baselines, and last the manifest."""

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, TokenizerConfig
from llama_lab.data.baselines import compression_bits_per_byte, unigram_bits_per_byte
from llama_lab.data.corpus import Document, Say, Side, Source
from llama_lab.data.shards import FORMAT_VERSION, TOKENIZER, token_dtype
from llama_lab.data.tokenizer import Tokenizer, build_tokenizer
from llama_lab.data.writer import SplitWriter, write_manifest

SAY_SECONDS = 10.0


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
    """Everything that an entry holds, its manifest last."""
    corpus = source.corpus(say, folder)
    start = time.perf_counter()
    tokenizer = build_tokenizer(config, lambda: (document.text for document in corpus.side(Side.train)))
    if isinstance(config, BpeConfig):
        say(f"Trained a tokenizer of {tokenizer.vocab_size:,} entries in {time.perf_counter() - start:.1f} s")
    tokenizer.save(folder / TOKENIZER)
    start = time.perf_counter()
    train, train_counts = _write_split(folder, "train", corpus.side(Side.train), tokenizer, say)
    val, val_counts = _write_split(folder, "val", corpus.side(Side.val), tokenizer, say)
    ratio = (train["text_bytes"] + val["text_bytes"]) / (train["tokens"] + val["tokens"])
    say(
        f"Encoded {train['tokens']:,} training and {val['tokens']:,} validation tokens of {ratio:.2f} bytes "
        f"in {time.perf_counter() - start:.1f} s"
    )
    unigram = unigram_bits_per_byte(train_counts, val_counts, val["text_bytes"])
    manifest = {
        "format_version": FORMAT_VERSION,
        "token_dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id},
        "splits": {"train": train, "val": val},
        "baselines": {
            **compression_bits_per_byte(document.text for document in corpus.side(Side.val)),
            "unigram_bits_per_byte": unigram,
        },
        "source": {"data": source.name, "tokenizer": asked_for(config), "key": key},
    }
    write_manifest(folder, manifest)


def _write_split(
    folder: Path, split: str, documents: Iterator[Document], tokenizer: Tokenizer, say: Say
) -> tuple[dict[str, Any], np.ndarray]:
    """Encode documents into shards; returns the split's part of the manifest, and how often each id is predicted."""
    sizes: deque[int] = deque()

    def texts() -> Iterator[str]:
        for document in documents:
            sizes.append(len(document.text.encode()))
            yield document.text

    start = said = time.perf_counter()
    done = 0
    with SplitWriter(folder, split, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) as writer:
        for ids in tokenizer.encode_stream(texts()):
            done += sizes[0]
            writer.add(ids, sizes.popleft())
            now = time.perf_counter()
            if now - said > SAY_SECONDS:
                said = now
                say(f"Encoded {done / 1e6:,.0f} MB of {split} text in {now - start:.0f} s")
        return writer.close(), writer.counts
