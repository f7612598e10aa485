"""The tokenizer group."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from llama_lab.config.schema.fields import EXAMPLE, Problem, broken, later

BPE_SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>")
"""Ids 0 to 3 of a tokenizer trained here."""


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Base of the tokenizers."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return []


@dataclass(kw_only=True, slots=True)
class BpeConfig(TokenizerConfig):
    """Byte-level BPE trained on the training documents."""

    vocab_size: int = MISSING
    """Entries asked for, special tokens and 256 bytes included; a small text may give fewer. 261 to 1,000,000."""
    special_tokens: list[str] = later([])
    """Further special tokens by name; they get the ids after <SOS>, <EOS>, <PAD>, <UNK>."""
    train_bytes: int | None = later(None)
    """UTF-8 bytes of training text, from its beginning, that the merges are learned from. At least 1; null: the first gigabyte."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
            at,
            self,
            ("vocab_size", self.vocab_size >= 261, "is below 261: 4 special tokens, 256 bytes and one merge; try 2048"),
            ("vocab_size", self.vocab_size <= 1_000_000, "is above 1000000; try 32768"),
            (
                "special_tokens",
                all(self.special_tokens) and len({*self.special_tokens, *BPE_SPECIAL_TOKENS}) == len(self.special_tokens) + 4,
                f"names a token twice, or one that is there anyway: {', '.join(BPE_SPECIAL_TOKENS)}",
            ),
            ("train_bytes", self.train_bytes is None or self.train_bytes >= 1, "is below 1; null is up to a gigabyte"),
        )


@dataclass(kw_only=True, slots=True)
class FileTokenizerConfig(TokenizerConfig):
    """A `tokenizer.json` as Hugging Face's tokenizers library writes it."""

    path: str = field(default=MISSING, metadata={EXAMPLE: "tokenizer.json"})
    """The file."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(at, self, ("path", bool(self.path), "is empty; give a tokenizer.json"))


@dataclass(kw_only=True, slots=True)
class BytesConfig(TokenizerConfig):
    """UTF-8 bytes are the tokens: ids 0 to 255, and 256 for the end of a document."""
