"""A tokenizer as GGUF keeps it: tokens, merges, and the name of the rule that llama.cpp splits text by.

llama.cpp knows such rules by name and its own converter recognises tokenizers by hash, so a byte-level BPE trained here would be
refused there. Here the rule is read from tokenizer.json itself: what cannot be said in llama.cpp's words is refused.
"""

import json
from dataclasses import dataclass
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.data.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token in GGUF."""

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{LETTERS}|\p{{N}}|{REST}": "qwen2",
}
"""Expression that a tokenizer splits text by -> llama.cpp's name for it. GPT-2's is built into the tokenizers library."""
GPT2 = "gpt-2"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        tokens, kinds: of every id, in order.
        merges: two pieces with a space between, the most frequent first.
        rule: llama.cpp's name of how text is split before merging.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str


def gguf_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer in GGUF's terms.

    Raises:
        ConfigError: llama.cpp has no words for it.
    """
    parsed = json.loads(tokenizer.content)
    model = parsed["model"]
    rule = _rule(parsed)
    if model.get("type") != "BPE" or model.get("byte_fallback") or rule is None or parsed.get("normalizer") is not None:
        known = ", ".join([GPT2, *RULES.values()])
        rule = f"is no byte-level BPE that splits text like {known}, which GGUF is written for; --to hf takes any"
        raise ConfigError([("the tokenizer", rule)], scope="this export")
    tokens = [f"[UNUSED{number}]" for number in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * tokenizer.vocab_size
    for token, number in model["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for token in parsed.get("added_tokens", []):
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # Readers demand the list, and the format has no empty one. No byte is written as these names, so it never applies.
    return Vocabulary(tokens, kinds, merges or ["<none> <none>"], rule)


def _rule(parsed: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer splits text; None if it has none."""
    match parsed.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            # Without merges every byte is a token, wherever text is split.
            return GPT2 if splits or not parsed["model"]["merges"] else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return RULES.get(pattern)
    return None
