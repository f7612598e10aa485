"""What each entry of a vocabulary stands for: its bytes of text, whether it is a special token, and how to show it."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_lab.data.tokenizer import BYTE_OF, Tokenizer

START_NAMES = ("<SOS>", "<s>", "<|begin_of_text|>", "<bos>", "<BOS>", "<|bos|>", "[BOS]", "<|startoftext|>")
"""Names under which others put a token at the start of a document; it counts only as a special token."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a tokenizer, each by its id.

    Attributes:
        text: bytes that an entry adds to the text; none for special tokens and ids without an entry.
        special: name of each special token by its id.
        start_ids: special tokens that begin a document, but for the one that ends it.
        is_exact: whether `text` is exact, as for byte-level BPE. For others it is an estimate: what SentencePiece or WordPiece
            makes of spaces is not always one byte.
        adds_space: whether the tokenizer puts a space before a text that begins without one.
    """

    text: tuple[bytes, ...]
    special: dict[int, str]
    start_ids: tuple[int, ...]
    is_exact: bool
    adds_space: bool

    @property
    def sizes(self) -> np.ndarray:
        """Length of each entry's text in bytes, (vocab_size,) int64."""
        return np.array([len(text) for text in self.text], dtype=np.int64)

    @property
    def is_blank(self) -> np.ndarray:
        """Whether an entry is white space and nothing else, (vocab_size,) bool."""
        return np.array([bool(text) and not text.strip() for text in self.text])

    def shown(self, id: int) -> str:
        """An entry for people: a special token by its name, text in quotes, bytes that are no text in hexadecimal."""
        if id in self.special:
            return self.special[id]
        try:
            return repr(self.text[id].decode())
        except UnicodeDecodeError:
            return " ".join(f"0x{byte:02X}" for byte in self.text[id])


def entries(tokenizer: Tokenizer) -> Entries:
    """Look a tokenizer's entries up in its description."""
    parsed = json.loads(tokenizer.content)
    model = parsed["model"]
    vocabulary = model["vocab"]
    pieces = vocabulary.items() if isinstance(vocabulary, dict) else ((piece, id) for id, (piece, *_) in enumerate(vocabulary))
    parts = [part for name in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(parsed.get(name))]
    is_exact = any(part["type"] == "ByteLevel" for part in parts)
    as_bytes = _byte_level if is_exact else _words
    text = [b""] * tokenizer.vocab_size
    for piece, id in pieces:
        text[id] = as_bytes(piece)
    special: dict[int, str] = {}
    for token in parsed.get("added_tokens", []):
        text[token["id"]] = b"" if token["special"] else token["content"].encode()
        if token["special"]:
            special[token["id"]] = token["content"]
    special.setdefault(tokenizer.eos_id, "end of document")
    text[tokenizer.eos_id] = b""
    starts = tuple(id for id, name in special.items() if name in START_NAMES and id != tokenizer.eos_id)
    return Entries(tuple(text), special, starts, is_exact, any(map(_adds_space, parts)))


def _parts(node: Any) -> list[dict[str, Any]]:
    """A component of a tokenizer.json, or those of a sequence."""
    if not node:
        return []
    inner = [part for name in ("normalizers", "pretokenizers", "decoders") for part in node.get(name, [])]
    return [node, *(found for part in inner for found in _parts(part))]


def _adds_space(part: dict[str, Any]) -> bool:
    match part["type"]:
        case "ByteLevel":
            return bool(part.get("add_prefix_space"))
        case "Metaspace":
            return part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
        case "Prepend":
            return True
        case _:
            return False


def _words(piece: str) -> bytes:
    """SentencePiece writes a space as U+2581 and a lone byte as <0x0A>; WordPiece marks what goes on with ##."""
    if byte := BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").removeprefix("##").encode()


def _byte_level(piece: str) -> bytes:
    """Each character stands for a byte; a piece with any other character is text as it is."""
    try:
        return bytes(BYTE_OF[character] for character in piece)
    except KeyError:
        return piece.encode()
