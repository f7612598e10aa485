"""The data group: where tokens come from, and how they become windows."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from llama_lab.config.schema.fields import EXAMPLE, Problem, broken, later, positive


class Window(Enum):
    """How training windows are cut from the tokens."""

    contiguous = "contiguous"
    document = "document"
    packed = "packed"


class OnError(Enum):
    """What happens to an item of the text that cannot be read."""

    stop = "stop"
    skip = "skip"


class Dedup(Enum):
    """Which repeated documents are dropped."""

    exact = "exact"
    near = "near"


class Length(Enum):
    """A document's length class: short below 7,500 characters, medium up to 12,000, long above."""

    short = "short"
    medium = "medium"
    long = "long"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every kind of data has in common."""

    max_seq_len: int = MISSING
    """Tokens in a window, which is also the model's context. At least 2."""
    tokens_per_update: int = MISSING
    """Tokens in the global batch of one optimizer step; a multiple of `max_seq_len`. Padding in document windows counts."""
    window: Window = MISSING
    """contiguous: windows of `max_seq_len` cut from all documents joined; document: each window starts at a document's start or
    where its previous window ended, and is padded at the document's end; packed: each window starts likewise and goes on with the
    documents that fit whole, and attention stays inside a document. Padding is not trained on."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
            at,
            self,
            ("max_seq_len", self.max_seq_len >= 2, "is below 2, too short to predict anything from; try 256"),
            ("tokens_per_update", self.tokens_per_update >= 1, "is below 1; try 8192"),
        )


@dataclass(kw_only=True, slots=True)
class DocsConfig(DataConfig):
    """English documentation found in the Python that runs this: language reference topics and docstrings."""

    packages: list[str] = MISSING
    """Installed packages whose docstrings are added to the standard library's, by import name. They are read, never imported."""
    val_bytes: int = MISSING
    """At least so many UTF-8 bytes of whole modules are held out for validation. At least 1."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        own = broken(at, self, ("val_bytes", self.val_bytes >= 1, "is below 1; try 200000 (eval=null trains without validation)"))
        return DataConfig.problems(self, at) + own


@dataclass(kw_only=True, slots=True)
class CorpusConfig(DataConfig):
    """What every kind of text that is read document by document has in common."""

    val_fraction: float = MISSING
    """Share of documents held out by hash, in (0, 1). Below 20 documents the last share of the joined text is held out instead."""
    text_field: str = later("text")
    """Key of a JSON object, or column of a table, that holds the text."""
    dedup: Dedup | None = later(Dedup.exact)
    """exact: a document that repeats an earlier one, white space aside, is dropped; near: so is one that shares four fifths of its
    five-word sequences with an earlier one; null: nothing is."""
    ascii_only: bool = later(False)
    """Whether documents with any character beyond ASCII are dropped."""
    length: Length | None = later(None)
    """The one length class that is kept; null: all."""
    max_bytes: int | None = later(None)
    """Reading stops after the document with which the kept text reaches so many UTF-8 bytes. At least 1; null: all of it."""
    on_error: OnError = later(OnError.stop)
    """stop: what cannot be read is reported and nothing is prepared; skip: it is left out, counted and reported."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return DataConfig.problems(self, at) + broken(
            at,
            self,
            ("val_fraction", 0 < self.val_fraction < 1, "is outside (0, 1); try 0.1"),
            ("text_field", bool(self.text_field), "is empty; try text"),
            ("max_bytes", self.max_bytes is None or self.max_bytes >= 1, "is below 1; null is all of it"),
        )


@dataclass(kw_only=True, slots=True)
class TextConfig(CorpusConfig):
    """Files: .txt and .md are one document each, .jsonl (also .gz, .xz, .zst) and .parquet one a line or row."""

    path: str = field(default=MISSING, metadata={EXAMPLE: "book.txt"})
    """File, folder searched recursively, or a pattern such as 'data/*.jsonl.gz'; - is standard input."""
    separator: str | None = later(None)
    """A line that stands between two documents in .txt and .md files, such as <|endoftext|>. null: a file is one document."""
    unix_line_ends: bool = later(False)
    r"""Whether line ends of Windows and of old Macs, \r\n and \r, are read as \n. false: the text stays as it is, byte for byte."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return CorpusConfig.problems(self, at) + broken(
            at,
            self,
            ("path", bool(self.path), "is empty; give a file or folder"),
            ("separator", self.separator is None or bool(self.separator.strip()), "is empty; null is one document a file"),
        )


@dataclass(kw_only=True, slots=True)
class HuggingFaceConfig(CorpusConfig):
    """A data set of the Hugging Face hub, or a local folder of its shape, streamed once."""

    dataset: str = field(default=MISSING, metadata={EXAMPLE: "roneneldan/TinyStories"})
    """Its name on the hub, or a folder."""
    subset: str | None = MISSING
    """Which of its configurations; null: the default one."""
    split: str = MISSING
    """Which of its splits."""
    revision: str | None = MISSING
    """Commit, branch or tag on the hub; null: the newest."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return CorpusConfig.problems(self, at) + broken(
            at,
            self,
            ("dataset", bool(self.dataset), "is empty; give a name on the hub or a folder"),
            ("split", bool(self.split), "is empty; try train"),
        )


@dataclass(kw_only=True, slots=True)
class ShardsConfig(DataConfig):
    """Token ids prepared before: by `llama-lab prepare`, or by others as .npy or .bin files."""

    path: str = field(default=MISSING, metadata={EXAMPLE: "shards/fineweb"})
    """The folder."""
    val_fraction: float | None = later(None)
    """Share of documents that `llama-lab prepare` holds out by hash where the files bring no validation split, in (0, 1).
    null: none."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return DataConfig.problems(self, at) + broken(
            at,
            self,
            ("path", bool(self.path), "is empty; give a folder"),
            ("val_fraction", self.val_fraction is None or 0 < self.val_fraction < 1, "is outside (0, 1); null holds out nothing"),
        )


@dataclass(kw_only=True, slots=True)
class MixtureConfig(DataConfig):
    """Several prepared folders with one tokenizer, in fixed shares."""

    paths: list[str] = field(default=MISSING, metadata={EXAMPLE: "[shards/web,shards/code]"})
    """The folders."""
    weights: list[float] = field(default=MISSING, metadata={EXAMPLE: "[0.7,0.3]"})
    """Share of the training windows that each folder gives; any numbers above 0, only their ratios count."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return DataConfig.problems(self, at) + broken(
            at,
            self,
            ("paths", len(self.paths) >= 2, "is no mixture; give two folders or more, or data=shards for one"),
            ("paths", len(set(self.paths)) == len(self.paths), "names a folder twice; raise its weight instead"),
            ("weights", len(self.weights) == len(self.paths), f"has {len(self.weights)} numbers for {len(self.paths)} folders"),
            (
                "weights",
                all(positive(weight) for weight in self.weights),
                "holds a number that is not above 0; leave the folder out",
            ),
        )
