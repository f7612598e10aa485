"""Files of the user's own text as a corpus: .txt and .md, one document each, and .jsonl, one document a line.

Files are read again for each pass, and only what a pass needs is kept: one byte a document says on which side it is.
"""

import array
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem, TextConfig
from llama_lab.data.cache import ContentHashes
from llama_lab.data.corpus import Corpus, Document, Say, Side, text_digest

# Raised when the same files give other documents or another split.
FORMAT = 1
SUFFIXES = (".txt", ".md", ".jsonl")
# Below it a document is too large a share to be held out by chance.
MIN_DOCUMENTS = 20
MAX_PROBLEMS = 10
TRAIN, VAL, DUPLICATE = 0, 1, 2


class TextSource:
    """The .txt, .md and .jsonl files at a path.

    Args:
        config: the node; its path may start with `~`.
        hashes: remembers the hashes of large files.

    Raises:
        ConfigError: nothing is there that could be read.
    """

    name = "text"

    def __init__(self, config: TextConfig, hashes: ContentHashes):
        self._config = config
        self._hashes = hashes
        self._root = Path(config.path).expanduser()
        self._files = _find_files(self._root, config.path)
        self._stats: dict[Path, tuple[int, int]] = {}

    def fingerprint(self) -> str:
        """Hash of the files' contents and of their names below the path, which decide on their order."""
        found = hashlib.sha256(f"{FORMAT} {self._config.val_fraction!r}".encode())
        for path in self._files:
            name = path.relative_to(self._root).as_posix() if self._root.is_dir() else path.suffix.lower()
            try:
                self._stats[path] = _stat(path)
                content = self._hashes.of(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            found.update(f"\0{name}\0{content}".encode(errors="surrogatepass"))
        return found.hexdigest()

    def corpus(self, say: Say, work: Path) -> Corpus:
        """Read everything once, report what is wrong with it, and decide for each document on its side.

        A document that repeats an earlier one, white space aside, is dropped. From 20 documents on, one is held out if the hash
        of its text falls into the first `val_fraction` of all hashes; so it stays on its side when the files grow. Below 20, the
        last `val_fraction` of all text is held out, cut between two characters.

        Raises:
            ConfigError: broken lines, a wrong encoding, or no text for one of the sides.
        """
        start = time.perf_counter()
        problems: list[Problem] = []
        seen: set[bytes] = set()
        hashes, sizes, sides = array.array("Q"), array.array("Q"), bytearray()
        for document in self._documents(problems):
            digest = text_digest(document.text)
            sides.append(DUPLICATE if digest in seen else TRAIN)
            if digest not in seen:
                seen.add(digest)
                hashes.append(int.from_bytes(digest[:8], "big"))
                sizes.append(len(document.text.encode()))
        if problems:
            raise ConfigError(problems[:MAX_PROBLEMS], scope="the data")
        if not sizes:
            rule = "holds no text: every file or `text` is empty"
            raise ConfigError([(f"data.path={self._config.path}", rule)], scope="the data")
        count, dropped = len(sizes), len(sides) - len(sizes)
        repeated = f", {dropped:,} that repeated others dropped" if dropped else ""
        seconds = time.perf_counter() - start
        say(f"Read {_number(count, 'document')} of {sum(sizes) / 1e6:.2f} MB in {seconds:.1f} s{repeated}")
        if count < MIN_DOCUMENTS:
            return self._cut(sides, sum(sizes))
        _hold_out(sides, hashes, self._config.val_fraction)
        return _lazy(lambda: self._side(sides, TRAIN), lambda: self._side(sides, VAL), count, sum(sizes))

    def check_unchanged(self) -> None:
        """Raise ConfigError if a file has another size or date than when its hash was taken."""
        for path, stat in self._stats.items():
            try:
                now = _stat(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            if now != stat:
                raise ConfigError([(str(path), "changed while it was being read; run the command again")], scope="the data")

    def _side(self, sides: bytearray, side: int) -> Iterator[Document]:
        try:
            for document, found in zip(self._documents(), sides, strict=True):
                if found == side:
                    yield document
        except ValueError:
            self.check_unchanged()  # the likely reason why a second reading differs from the first
            raise

    def _cut(self, sides: bytearray, size: int) -> Corpus:
        """The first bytes of all documents together, and the last."""
        cut = int(size * (1 - self._config.val_fraction))

        def part(*, after: bool) -> Iterator[Document]:
            position = 0
            for document in self._side(sides, TRAIN):
                before, rest = _split_at_byte(document.text, cut - position)
                position += len(document.text.encode())
                text = rest if after else before
                if text:
                    yield Document(document.name, text)

        for after, side in ((False, "train on"), (True, "validate on")):
            if not any(document.text.strip() for document in part(after=after)):
                rule = f"leaves nothing to {side} of {size:,} bytes of text; give more text or another data.val_fraction"
                raise ConfigError([(f"data.val_fraction={self._config.val_fraction}", rule)], scope="the data")
        return _lazy(lambda: part(after=False), lambda: part(after=True), len(sides), size)

    def _documents(self, problems: list[Problem] | None = None) -> Iterator[Document]:
        """Every document that is not empty, in the order of the files' names.

        Args:
            problems: filled with what cannot be read, until it holds enough of them; without it the first is raised.
        """
        for path in self._files:
            try:
                lines = _json_lines if path.suffix.lower() == ".jsonl" else _whole_file
                for name, text, problem in lines(path):
                    if problem is None:
                        if text.strip():
                            yield Document(name, text)
                    elif problems is None:
                        raise ConfigError([(name, problem)], scope="the data")
                    else:
                        problems.append((name, problem))
                        if len(problems) == MAX_PROBLEMS:
                            return
            except OSError as error:
                raise _unreadable(path, error) from error


def _lazy(train: Callable[[], Iterator[Document]], val: Callable[[], Iterator[Document]], count: int, size: int) -> Corpus:
    def documents(first: int) -> Iterator[tuple[Side, Document]]:
        sides = (((Side.train, document) for document in train()), ((Side.val, document) for document in val()))
        return islice(chain.from_iterable(sides), first, None)

    return Corpus(documents, count, size)


Item = tuple[str, str, str | None]
"""Where a text stands, the text, and what is wrong with it, if something is."""


def _whole_file(path: Path) -> Iterator[Item]:
    text, problem = _decoded(path.read_bytes())
    yield str(path), text, problem


def _json_lines(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", *_json_text(line)


def _json_text(line: bytes) -> tuple[str, str | None]:
    text, problem = _decoded(line)
    if problem is not None:
        return "", problem
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return "", f"is no JSON object: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return "", f"is no JSON object: {error}"
    if not isinstance(value, dict):
        return "", f"is a JSON {_json_type(value)}, not an object with a `text` string"
    if "text" not in value:
        keys = ", ".join(sorted(value)[:6]) or "nothing"
        return "", f"has no `text`; it has {keys}. Rename the field that holds the text"
    if not isinstance(value["text"], str):
        return "", f"has a {_json_type(value['text'])} as `text`; it must be a string"
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        return "", f"holds half a surrogate pair at character {error.start} of `text`, which has no UTF-8"
    return value["text"], None


def _decoded(raw: bytes) -> tuple[str, str | None]:
    """Text of UTF-8 bytes, a byte order mark left out; line ends stay as they are."""
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        form = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        hint = f"convert it, for example with iconv -f {form} -t UTF-8"
        return "", f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; {hint}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _find_files(root: Path, typed: str) -> list[Path]:
    """Files at or below a path in the order of their names; hidden ones are passed over."""

    def refuse(rule: str) -> ConfigError:
        return ConfigError([(f"data.path={typed}", rule)], scope="the data")

    if not root.exists():
        parent = next((folder for folder in root.absolute().parents if folder.is_dir()), None)
        raise refuse(f"does not exist; {parent} is the part of it that does")
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise refuse(f"is {f'a {root.suffix} file' if root.suffix else 'a file without suffix'}; use {', '.join(SUFFIXES)}")
        return [root]
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(folder, file) for file in files if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES]
    if not found:
        raise refuse(f"holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _hold_out(sides: bytearray, hashes: "array.array[int]", val_fraction: float) -> None:
    """Mark the held-out documents in `sides`; at least one, and not all."""
    kept = [index for index, side in enumerate(sides) if side != DUPLICATE]
    threshold = val_fraction * 2**64
    chosen = [index for index, found in zip(kept, hashes, strict=True) if found < threshold]
    if not chosen:
        chosen = [kept[hashes.index(min(hashes))]]
    if len(chosen) == len(kept):
        chosen.remove(kept[hashes.index(max(hashes))])
    for index in chosen:
        sides[index] = VAL


def _split_at_byte(text: str, byte: int) -> tuple[str, str]:
    """A text up to a byte of its UTF-8 and from there on; a character that the byte stands in goes to the second part."""
    raw = text.encode()
    byte = min(max(byte, 0), len(raw))
    while 0 < byte < len(raw) and raw[byte] & 0xC0 == 0x80:
        byte -= 1
    return raw[:byte].decode(), raw[byte:].decode()


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError([(str(path), f"cannot be read: {error.strerror or error}")], scope="the data")
