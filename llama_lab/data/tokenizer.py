"""Text to token ids and back, in the form of a `tokenizer.json` of the tokenizers library."""

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_lab.config.disk import replace_text
from llama_lab.config.errors import ConfigError
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import BPE_SPECIAL_TOKENS, BpeConfig, BytesConfig, FileTokenizerConfig, TokenizerConfig

EOS_NAMES = ("<EOS>", "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
"""Names under which the end of a document is looked for in a tokenizer of unknown origin."""
BYTES_EOS = 256
# Encoding takes about a hundred times the memory of its text, so a long text goes piece by piece.
PIECE_CHARS = 100_000
# Encoded at once, and so many of these ahead of what is asked for: all cores are busy while ids are written and text is read, and
# little is in memory.
BATCH_CHARS = 250_000
BATCHES_AHEAD = 3
# A hundred times as much text moves hardly a merge.
MAX_TRAIN_BYTES = 10**9
# Byte-level pre-tokenization joins white space with what follows it, never with what it follows; nor a full stop with a letter. The
# second half is for scripts that are written without spaces.
PIECE_END = re.compile(r"\S(?=[ \n\r\t\u3000])|[。、，！？；：](?=[ぁ-ゖァ-ヺ一-鿕])")
# Of a tokenizer that would put a space before each piece which has none.
PREFIXED_PIECE_END = re.compile(r"\S(?= )")
# A merge moves what follows it in its word, so learning from a word takes the square of its length: hours, of two million letters.
WORD_CHARS = 1_000

Batch = list[tuple[str, bool]]
"""Pieces of texts, each with whether it is its text's last."""


class Tokenizer:
    """A tokenizer as a `tokenizer.json` describes it.

    Args:
        content: the JSON text of a `tokenizer.json`.

    Attributes:
        vocab_size: one more than the largest id.
        eos_id: the token that stands between documents.
        bos_id: what its own template puts before a text; None: nothing, as in those trained here. Data is prepared without it.
        start_id: what a text that begins is given to the model with: `eos_id`, which ends the document before, unless the model
            is known to have learned otherwise.
        special_ids: the tokens that text is never encoded to, by name.
        hash: SHA-256 of the content as canonical JSON, so that neither white space nor the library's version moves it.

    Raises:
        ValueError: the content is no tokenizer, or none of its tokens ends a document.
    """

    def __init__(self, content: str):
        parsed = json.loads(content)
        self.hash = hashlib.sha256(json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        self._content = content
        try:
            self._backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"is no tokenizer: {error}") from error
        # The first is never saved, so it is set after every load; the others a file may bring along.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        if self._backend.decoder is None and isinstance(self._backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            self._backend.decoder = decoders.ByteLevel()  # else the characters that stand for bytes would be shown
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        found = next((name for name in EOS_NAMES if name in vocabulary), None)
        if found is None:
            raise ValueError(f"has no token for the end of a document; looked for {', '.join(EOS_NAMES)}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_ids = {token["content"]: token["id"] for token in parsed.get("added_tokens", []) if token.get("special")}
        self.eos_id = vocabulary[found]
        self.start_id = self.eos_id
        first = next(_template_beginnings(parsed.get("post_processor")), None)
        self.bos_id = None if first is None else vocabulary.get(first)
        self._piece_end = _piece_end(parsed)

    @property
    def content(self) -> str:
        """The JSON text that it was made from."""
        return self._content

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, ...]]:
        """How another process makes it anew; the library would forget what is set after a load."""
        return type(self), () if isinstance(self, BytesTokenizer) else (self._content,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. What looks like a special token in it is text like any other."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,) unsigned, encoded on all cores."""
        return list(_joined(map(self._encode_pieces, _batches(_pieces(texts, self._piece_end)))))

    def encode_stream(self, texts: Iterable[str]) -> Generator[np.ndarray]:
        """The same, one text after the other, with a bounded amount of text in memory.

        It reads some texts ahead, and encodes them while the caller is busy with the ids of those before.
        """
        yield from _joined(_ahead(self._encode_pieces, _batches(_pieces(texts, self._piece_end))))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens left out; broken UTF-8 becomes U+FFFD, and ids without a meaning are passed over."""
        return self._backend.decode([int(id) for id in ids if 0 <= id < self.vocab_size], skip_special_tokens=True)

    def _encode_pieces(self, batch: Batch) -> list[tuple[np.ndarray, bool]]:
        """(ids, whether they are their text's last) of pieces. Other threads run meanwhile."""
        encodings = self._backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        return [(np.array(encoding.ids, dtype=np.uint32), last) for encoding, (_, last) in zip(encodings, batch, strict=True)]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` in one step: without the old one, a run's checkpoints could not be read."""
        replace_text(path, self._content)


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document.

    Its `tokenizer.json` says the same to the tokenizers library, as a byte-level BPE without merges; numpy is faster.
    """

    def __init__(self) -> None:
        super().__init__(_bytes_content())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return list(self.encode_stream(texts))

    def encode_stream(self, texts: Iterable[str]) -> Generator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(id) for id in ids if 0 <= id < BYTES_EOS).decode("utf-8", errors="replace")


def build_tokenizer(config: TokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that a config asks for.

    Args:
        texts: gives the training documents, for a tokenizer that is trained.

    Raises:
        ConfigError: a file is missing or is no tokenizer.
    """
    match config:
        case BpeConfig():
            return train_bpe(texts(), config.vocab_size, special_tokens=config.special_tokens, train_bytes=config.train_bytes)
        case FileTokenizerConfig():
            return load_tokenizer(Path(config.path).expanduser(), f"tokenizer.path={config.path}")
        case BytesConfig():
            return BytesTokenizer()
        case _:
            raise TypeError(f"no tokenizer is built from {type(config).__name__}")


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), train_bytes: int | None = None
) -> Tokenizer:
    """A byte-level BPE learned from texts; the same texts give the same tokenizer.

    Args:
        vocab_size: entries, the four special tokens and 256 bytes included. There are fewer if the texts have no further pair of
            tokens that occurs twice.
        special_tokens: names that follow the four.
        train_bytes: UTF-8 bytes that are learned from, up to the end of a document; None: a gigabyte.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<UNK>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*BPE_SPECIAL_TOKENS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for piece, _ in _pieces(_first_bytes(texts, train_bytes or MAX_TRAIN_BYTES), PIECE_END))
    _train(backend, trainer, (part for piece in pieces for part in _without_long_words(piece)))
    return Tokenizer(backend.to_str())


def _train(backend: tokenizers.Tokenizer, trainer: trainers.BpeTrainer, pieces: Iterator[str]) -> None:
    """Train in another thread: where the library is called from, no signal is heard before it has ended, which takes minutes."""
    failures: list[BaseException] = []
    stopped, ended = threading.Event(), threading.Event()

    def until_stopped() -> Iterator[str]:
        for piece in pieces:
            if stopped.is_set():
                raise InterruptedError
            yield piece

    def work() -> None:
        try:
            backend.train_from_iterator(until_stopped(), trainer)
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=work, name="train tokenizer")
    try:
        thread.start()
        ended.wait()  # Thread.join, interrupted, takes the thread for ended
    finally:
        stopped.set()
        if thread.is_alive():  # interrupted in `start`, it may not have begun, and ends with its first piece
            ended.wait()  # at once while it reads; merging, the shorter part, goes on to its end
            thread.join()
    if failures:
        raise failures[0]


def load_tokenizer(path: Path, subject: str | None = None) -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        subject: what a problem is reported under; the path if not given.

    Raises:
        ConfigError: it is missing, is no tokenizer, or none of its tokens ends a document.
    """
    subject = subject or str(path)
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer(content)
    except OSError as error:
        meant = or_meant(path, "")
        rule = f"cannot be read: {error.strerror or error}" + (f"; {meant}" if meant else "")
        raise ConfigError([(subject, rule)], scope="the tokenizer") from error
    except json.JSONDecodeError as error:
        rule = f"is no tokenizer.json: {error.msg} in line {error.lineno}"
        raise ConfigError([(subject, rule)], scope="the tokenizer") from error
    except UnicodeDecodeError as error:
        raise ConfigError([(subject, "is no tokenizer.json: it is not UTF-8")], scope="the tokenizer") from error
    except ValueError as error:
        raise ConfigError([(subject, str(error))], scope="the tokenizer") from error
    plain = BytesTokenizer()
    return plain if plain.hash == tokenizer.hash else tokenizer


def _template_beginnings(processor: Any) -> Iterator[str]:
    """Special tokens that a post-processor puts before a text."""
    match processor:
        case {"type": "Sequence", "processors": list(parts)}:
            for part in parts:
                yield from _template_beginnings(part)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, *_]}:
            yield name


def _piece_end(parsed: Any) -> re.Pattern[str] | None:
    """Where a text may be cut so that its pieces give the tokens of the whole; None if that is not known."""
    before = parsed.get("pre_tokenizer") or {}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    if (
        not plain
        or parsed.get("normalizer") is not None
        or not all(token.get("special") for token in parsed.get("added_tokens", []))
    ):
        return None
    return PREFIXED_PIECE_END if before.get("add_prefix_space", True) else PIECE_END


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts up to the one with which `limit` UTF-8 bytes are reached."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= limit:
            return


def _pieces(texts: Iterable[str], ends: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is its text's last), cut where a match ends."""
    for text in texts:
        start = 0
        while ends is not None and len(text) - start > PIECE_CHARS:
            end = ends.search(text, start + PIECE_CHARS)
            if end is None:
                break
            yield text[start : end.end()], False
            start = end.end()
        yield text[start:] if start else text, True


def _without_long_words(piece: str) -> Iterator[str]:
    """The same text, cut where it would else hold a word, or white space, of more than about 2,000 characters."""
    start = 0
    for place in range(0, len(piece) - 2 * WORD_CHARS, WORD_CHARS):
        window = piece[place : place + WORD_CHARS]
        if window.isspace() or (" " not in window and len(window.split(maxsplit=1)) == 1):
            yield piece[start : place + WORD_CHARS]
            start = place + WORD_CHARS
    yield piece[start:] if start else piece


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[Batch]:
    """Pieces in groups of at least `BATCH_CHARS`, but for the last group."""
    batch: Batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(batches: Iterable[list[tuple[np.ndarray, bool]]]) -> Iterator[np.ndarray]:
    """Ids of whole texts."""
    parts: list[np.ndarray] = []
    for batch in batches:
        for ids, is_last in batch:
            parts.append(ids)
            if is_last:
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts.clear()


def _ahead(work: Callable[[Batch], list[tuple[np.ndarray, bool]]], batches: Iterator[Batch]) -> Iterator[list]:
    """What `work` makes of each batch, in their order, made by threads for the next few."""
    with ThreadPoolExecutor(BATCHES_AHEAD, thread_name_prefix="encode") as threads:
        waiting = deque(threads.submit(work, batch) for batch in islice(batches, BATCHES_AHEAD))
        try:
            while waiting:
                waiting.extend(threads.submit(work, batch) for batch in islice(batches, 1))
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


def _byte_characters() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


BYTE_OF = _byte_characters()
"""Character -> the byte that it stands for in every byte-level BPE, in the order of bytes: what can be printed stands for itself,
the rest follows from U+0100 on."""


def _bytes_content() -> str:
    """`tokenizer.json` of the bytes tokenizer."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": BYTES_EOS, "content": "<EOS>", **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": BYTE_OF | {"<EOS>": BYTES_EOS}, "merges": []},
    }
    return json.dumps(content, ensure_ascii=False, indent=1)
