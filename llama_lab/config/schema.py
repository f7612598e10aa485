"""What a run is: every field, its type, its unit and its legal range. The numbers live in `conf/`.

Dataclasses here are registered with Hydra, YAML options merge onto them, and the finished tree is turned back into plain
dataclasses, so no other module ever sees an OmegaConf object. A node reports what is wrong with itself through
`problems()`; what spans nodes is in `validate.py`. Nothing here imports torch or reads a file.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

Problem = tuple[str, str]
"""The key path as typed on the command line, with its value (`schedule.min_lr=1.0`), and the rule with a value that works."""

BEFORE = "before"
"""Metadata key of a field that came after runs were made: the value that means what the code did without it. At that value the
field stays out of a run's identity, and a saved config without it is read as that value."""

EXAMPLE = "example"
"""Metadata key of a field that no option has a value for: one that a user may type."""

WORDS = "words"
"""Metadata key of a field whose value is a whole number, null, or one of a few words."""

AUTO = "auto"
"""The word that leaves a number to the machine."""


def _later(value: Any) -> Any:
    """A field that came after runs were made. Options written before it, which do not name it, keep meaning what they meant."""
    default: Any = {"default_factory": value.copy} if isinstance(value, list) else {"default": value}
    return field(**default, metadata={BEFORE: value})


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` on either side of `value`, in words; never 0."""
    below = value // step * step
    return f"nearest: {below} or {below + step}" if below else f"nearest: {step}"


def _broken(at: str, node: Any, *rules: tuple[str, bool, str]) -> list[Problem]:
    """A problem for each (field, whether it holds, what is wrong otherwise)."""
    return [(f"{at}.{name}={shown(getattr(node, name))}", wrong) for name, holds, wrong in rules if not holds]


def _positive(value: float) -> bool:
    return 0 < value < math.inf


class Precision(Enum):
    """Dtype of the activations in matrix products; weights and their gradients are fp32 in each case. `fp8` multiplies in float8
    inside the blocks, with one scale a tensor, and is bf16 elsewhere. `auto` never chooses it."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class Device(Enum):
    """Kind of device that a process computes on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Compile(Enum):
    """When `torch.compile` is applied: `auto` means on CUDA under Linux, where its compiler is at hand."""

    auto = "auto"
    always = "always"
    never = "never"


class Recompute(Enum):
    """What the backward computes anew instead of keeping it: nothing, the feed-forward layers, or whole blocks."""

    none = "none"
    selective = "selective"
    full = "full"


class RopeScaling(Enum):
    """How rotary wavelengths are stretched for texts longer than a model was first trained on."""

    linear = "linear"
    llama3 = "llama3"


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


class Search(Enum):
    """How a sweep chooses the values that it tries: every combination, by chance, or by what came of the ones before."""

    grid = "grid"
    random = "random"
    optuna = "optuna"


class Direction(Enum):
    """Which values of a metric are better."""

    minimize = "minimize"
    maximize = "maximize"


class Launcher(Enum):
    """Where the jobs of a sweep run: on this machine, or on a cluster's."""

    local = "local"
    slurm = "slurm"


class TrackerMode(Enum):
    """Where Weights & Biases writes; `auto` is online when a key is configured, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class SeedConfig:
    """The three sources of chance in a run, so that each can be varied alone."""

    init: int = MISSING
    """Initial weights, and dropout's masks if any. At least 0."""
    data: int = MISSING
    """Order of the training windows. At least 0."""
    sampling: int = MISSING
    """Tokens drawn for the generation samples. At least 0."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("init", 0 <= self.init < 2**63, "is outside 0 to 2**63 - 1; try 0"),
            ("data", 0 <= self.data < 2**63, "is outside 0 to 2**63 - 1; try 0"),
            ("sampling", 0 <= self.sampling < 2**63, "is outside 0 to 2**63 - 1; try 0"),
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The shape of a Llama. Its vocabulary comes from the tokenizer, its context from `data.max_seq_len`."""

    dim: int = MISSING
    """Width of the residual stream, in channels. A multiple of `n_heads`."""
    n_layers: int = MISSING
    """Transformer blocks. At least 1."""
    n_heads: int = MISSING
    """Query heads. `dim / n_heads` must be even, because rotary embeddings turn pairs of channels."""
    n_kv_heads: int | None = MISSING
    """Key and value heads (grouped-query attention); a divisor of `n_heads`. null: as many as `n_heads`."""
    ffn_dim: int | None = MISSING
    """Width of the SwiGLU. null: `multiple_of` x ceil(int(8/3 dim) / `multiple_of`)."""
    multiple_of: int = MISSING
    """What a derived SwiGLU width is rounded up to. At least 1."""
    rope_theta: float = MISSING
    """Base of the rotary wavelengths. Above 0."""
    norm_eps: float = MISSING
    """Added to the mean square inside RMSNorm. Above 0."""
    tie_embeddings: bool = MISSING
    """Whether the output projection is the embedding itself."""
    qk_norm: bool = MISSING
    """Whether queries and keys pass an RMSNorm per head before rotary. Off in Llama proper; the export then needs another class."""
    zero_init_outputs: bool = MISSING
    """Whether the projections back into the residual stream start at zero instead of a scaled normal."""
    dropout: float = MISSING
    """Probability of dropping a channel after attention and SwiGLU, in [0, 1). Its masks follow the micro-batch, so with it
    `hardware` is no longer free of influence on the curve."""
    rope_scaling: RopeScaling | None = _later(None)
    """linear: all rotary wavelengths are `rope_factor` times as long; llama3: only the long ones are, as in Llama 3.1 and later.
    null: none is. For weights that were trained so; a model from nothing needs none."""
    rope_factor: float = _later(1.0)
    """How many times as long the wavelengths become. At least 1; 1 without `rope_scaling`."""
    rope_low_freq: float = _later(1.0)
    """llama3: wavelengths that fit fewer times than this into `rope_original_len` are stretched in full. Above 0."""
    rope_high_freq: float = _later(4.0)
    """llama3: wavelengths that fit more often than this into `rope_original_len` stay. Above `rope_low_freq`."""
    rope_original_len: int = _later(8192)
    """llama3: tokens of context that the model was first trained with. At least 1."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        counts = _broken(
            at,
            self,
            ("dim", self.dim >= 2, "is below 2; try 256"),
            ("n_layers", self.n_layers >= 1, "is below 1; try 3"),
            ("n_heads", self.n_heads >= 1, "is below 1; try 4"),
            ("multiple_of", self.multiple_of >= 1, "is below 1; 1 leaves the width as computed"),
            ("ffn_dim", self.ffn_dim is None or self.ffn_dim >= 1, "is below 1; null derives it from dim"),
            ("rope_theta", _positive(self.rope_theta), "is not above 0; try 10000"),
            ("norm_eps", _positive(self.norm_eps), "is not above 0; try 1e-5"),
            ("dropout", 0 <= self.dropout < 1, "is outside [0, 1); 0 is none"),
            *self._rope_rules(at),
        )
        return counts or self._head_problems(at)

    def _rope_rules(self, at: str) -> list[tuple[str, bool, str]]:
        needed = self.rope_scaling is not None or self.rope_factor == 1
        return [
            ("rope_factor", 1 <= self.rope_factor < math.inf, "is below 1; 1 leaves the wavelengths as they are"),
            ("rope_factor", needed, f"has no effect without {at}.rope_scaling; try {at}.rope_scaling=linear"),
            ("rope_low_freq", _positive(self.rope_low_freq), "is not above 0; try 1"),
            (
                "rope_high_freq",
                self.rope_low_freq < self.rope_high_freq < math.inf,
                f"is not above {at}.rope_low_freq={self.rope_low_freq}; try {4 * self.rope_low_freq:g}",
            ),
            ("rope_original_len", self.rope_original_len >= 1, "is below 1; try 8192"),
        ]

    def _head_problems(self, at: str) -> list[Problem]:
        divisors = [heads for heads in range(1, self.n_heads + 1) if self.n_heads % heads == 0]
        pairs = 2 * self.n_heads
        return _broken(
            at,
            self,
            (
                "dim",
                self.dim % pairs == 0,
                f"gives {at}.n_heads={self.n_heads} heads no even number of channels each, which rotary embeddings need; "
                + nearest_multiples(self.dim, pairs),
            ),
            (
                "n_kv_heads",
                self.n_kv_heads is None or self.n_kv_heads in divisors,
                f"does not divide {at}.n_heads={self.n_heads}; one of {', '.join(map(str, divisors))} does, null is all of them",
            ),
        )


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
        return _broken(
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
        own = _broken(at, self, ("val_bytes", self.val_bytes >= 1, "is below 1; try 200000 (eval=null trains without validation)"))
        return DataConfig.problems(self, at) + own


@dataclass(kw_only=True, slots=True)
class CorpusConfig(DataConfig):
    """What every kind of text that is read document by document has in common."""

    val_fraction: float = MISSING
    """Share of documents held out by hash, in (0, 1). Below 20 documents the last share of the joined text is held out instead."""
    text_field: str = _later("text")
    """Key of a JSON object, or column of a table, that holds the text."""
    dedup: Dedup | None = _later(Dedup.exact)
    """exact: a document that repeats an earlier one, white space aside, is dropped; near: so is one that shares four fifths of its
    five-word sequences with an earlier one; null: nothing is."""
    ascii_only: bool = _later(False)
    """Whether documents with any character beyond ASCII are dropped."""
    length: Length | None = _later(None)
    """The one length class that is kept; null: all."""
    max_bytes: int | None = _later(None)
    """Reading stops after the document with which the kept text reaches so many UTF-8 bytes. At least 1; null: all of it."""
    on_error: OnError = _later(OnError.stop)
    """stop: what cannot be read is reported and nothing is prepared; skip: it is left out, counted and reported."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return DataConfig.problems(self, at) + _broken(
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
    separator: str | None = _later(None)
    """A line that stands between two documents in .txt and .md files, such as <|endoftext|>. null: a file is one document."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return CorpusConfig.problems(self, at) + _broken(
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
        return CorpusConfig.problems(self, at) + _broken(
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
    val_fraction: float | None = _later(None)
    """Share of documents that `llama-lab prepare` holds out by hash where the files bring no validation split, in (0, 1).
    null: none."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return DataConfig.problems(self, at) + _broken(
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
        return DataConfig.problems(self, at) + _broken(
            at,
            self,
            ("paths", len(self.paths) >= 2, "is no mixture; give two folders or more, or data=shards for one"),
            ("paths", len(set(self.paths)) == len(self.paths), "names a folder twice; raise its weight instead"),
            ("weights", len(self.weights) == len(self.paths), f"has {len(self.weights)} numbers for {len(self.paths)} folders"),
            (
                "weights",
                all(_positive(weight) for weight in self.weights),
                "holds a number that is not above 0; leave the folder out",
            ),
        )


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Base of the tokenizers."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return []


BPE_SPECIAL_TOKENS = ("<SOS>", "<EOS>", "<PAD>", "<UNK>")
"""Ids 0 to 3 of a tokenizer trained here."""


@dataclass(kw_only=True, slots=True)
class BpeConfig(TokenizerConfig):
    """Byte-level BPE trained on the training documents."""

    vocab_size: int = MISSING
    """Entries asked for, special tokens and 256 bytes included; a small text may give fewer. 261 to 1,000,000."""
    special_tokens: list[str] = _later([])
    """Further special tokens by name; they get the ids after <SOS>, <EOS>, <PAD>, <UNK>."""
    train_bytes: int | None = _later(None)
    """UTF-8 bytes of training text, from its beginning, that the merges are learned from. At least 1; null: the first gigabyte."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
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
        return _broken(at, self, ("path", bool(self.path), "is empty; give a tokenizer.json"))


@dataclass(kw_only=True, slots=True)
class BytesConfig(TokenizerConfig):
    """UTF-8 bytes are the tokens: ids 0 to 255, and 256 for the end of a document."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """What every optimizer has in common."""

    max_lr: float = MISSING
    """Peak learning rate, which the schedule scales. Above 0."""
    weight_decay: float = MISSING
    """Decoupled decay of matrices (embeddings included); vectors such as norm gains are never decayed. At least 0."""
    max_grad_norm: float | None = MISSING
    """Global L2 norm that gradients are clipped to. Above 0; null: not clipped, only measured."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("max_lr", _positive(self.max_lr), "is not above 0; try 0.003"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "is below 0; 0 is none"),
            ("max_grad_norm", self.max_grad_norm is None or _positive(self.max_grad_norm), "is not above 0; null is no clipping"),
        )


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """AdamW on all parameters."""

    beta1: float = MISSING
    """Decay of the first moment, in [0, 1)."""
    beta2: float = MISSING
    """Decay of the second moment, in [0, 1)."""
    eps: float = MISSING
    """Added to the root of the second moment. Above 0."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return OptimConfig.problems(self, at) + _broken(
            at,
            self,
            ("beta1", 0 <= self.beta1 < 1, "is outside [0, 1); try 0.9"),
            ("beta2", 0 <= self.beta2 < 1, "is outside [0, 1); try 0.95"),
            ("eps", _positive(self.eps), "is not above 0; try 1e-8"),
        )


@dataclass(kw_only=True, slots=True)
class MuonConfig(AdamWConfig):
    """Muon on the matrices inside the blocks (`max_lr`), AdamW on embeddings, output projection and vectors (`adamw_max_lr`)."""

    momentum: float = MISSING
    """Nesterov momentum of Muon, in [0, 1)."""
    adamw_max_lr: float = MISSING
    """Peak learning rate of the parameters that AdamW updates. Above 0."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return AdamWConfig.problems(self, at) + _broken(
            at,
            self,
            ("momentum", 0 <= self.momentum < 1, "is outside [0, 1); try 0.95"),
            ("adamw_max_lr", _positive(self.adamw_max_lr), "is not above 0; try 0.003"),
        )


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """What every schedule has in common: linear warm-up from min_lr, just before the first update, to max_lr."""

    warmup_updates: int = MISSING
    """Updates of linear warm-up; below the run's updates. At least 0."""
    min_lr: float = MISSING
    """Lowest learning rate, where warm-up starts and decay ends, on the scale of `optim.max_lr`; other peaks shrink by the same
    factor. 0 to max_lr."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("warmup_updates", self.warmup_updates >= 0, "is below 0; 0 is no warm-up"),
            ("min_lr", 0 <= self.min_lr < math.inf, "is below 0; 0 lets the rate end at nothing"),
        )


@dataclass(kw_only=True, slots=True)
class CosineConfig(ScheduleConfig):
    """Half a cosine from max_lr to min_lr."""


@dataclass(kw_only=True, slots=True)
class LinearConfig(ScheduleConfig):
    """A straight line from max_lr to min_lr."""


@dataclass(kw_only=True, slots=True)
class ConstantConfig(ScheduleConfig):
    """max_lr after warm-up, to the end."""


@dataclass(kw_only=True, slots=True)
class WsdConfig(ScheduleConfig):
    """Warm-up, stable at max_lr, then a linear cool-down to min_lr."""

    cooldown_fraction: float = MISSING
    """Share of the run's updates spent cooling down, in (0, 1]. Warm-up and cool-down together fit in the run."""

    def cooldown_updates(self, updates: int) -> int:
        """Updates of cool-down in a run of `updates`."""
        return max(1, round(self.cooldown_fraction * updates))

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        rule = "is outside (0, 1]; try 0.4, or schedule=constant for none"
        own = _broken(at, self, ("cooldown_fraction", 0 < self.cooldown_fraction <= 1, rule))
        return ScheduleConfig.problems(self, at) + own


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Where and how fast; never moves the loss curve beyond float noise."""

    device: Device = MISSING
    """auto: cuda, else mps, else cpu."""
    processes: int | None = MISSING
    """Data-parallel processes, one a GPU on cuda. null: all visible GPUs on cuda, else 1. At least 1."""
    # A whole number, `auto` or null; OmegaConf fails to merge a node with a union of types in it.
    micro_batch: Any = field(default=MISSING, metadata={WORDS: (AUTO,)})
    """Windows that a process runs through the model at once; the last of its share may be fewer. null: the share in the fewest
    passes of even size that keep to 4,096 tokens on a CPU and 16,384 elsewhere. auto: in the fewest that fit into the memory of a
    CUDA device, found by trying before the run starts, and kept in the cache; elsewhere like null. At least 1."""
    compile: Compile = MISSING
    """Whether the model goes through torch.compile."""
    recompute: Recompute = _later(Recompute.none)
    """Activations that are computed twice to save memory."""
    deterministic: bool = MISSING
    """Whether only deterministic kernels are allowed, for bitwise equal repeats on CUDA. On a CPU runs repeat bitwise anyway."""
    timeout_seconds: float | None = _later(600.0)
    """A process that makes no progress for so long, after its first update, is taken to hang: it says where, and the run ends. Let
    it be longer than the longest update and than writing a checkpoint. Above 0; null: it waits for ever."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("processes", self.processes is None or self.processes >= 1, "is below 1; null is one a visible GPU"),
            (
                "micro_batch",
                type(self.micro_batch) is not int or self.micro_batch >= 1,
                "is below 1; null chooses one, auto finds the largest that fits",
            ),
            (
                "micro_batch",
                type(self.micro_batch) is int or self.micro_batch in (AUTO, None),
                "is not a whole number, auto or null; e.g. hardware.micro_batch=auto",
            ),
            (
                "timeout_seconds",
                self.timeout_seconds is None or _positive(self.timeout_seconds),
                "is not above 0; null lets a run that hangs wait for ever",
            ),
        )


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is printed and written while training."""

    every_updates: int = MISSING
    """Updates between two log lines and metric rows. At least 1."""
    parts: bool = _later(False)
    """Whether rows also say which share of the time forward, backward, exchange, optimizer and the rest took."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(at, self, ("every_updates", self.every_updates >= 1, "is below 1; try 10"))


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Validation on documents that training never sees. `eval: null` trains without."""

    every_updates: int | None = MISSING
    """Updates between two validations; one more follows the last update. At least 1; null: only at the end."""
    max_tokens: int | None = MISSING
    """Validation tokens used, from the start of the held-out set, or of each one's in a mixture. At least 1; null: all of them."""
    tasks: list[str] = _later([])
    """Files of multiple-choice questions, or of texts to complete, that the model is scored on; see docs/evaluation.md."""
    tasks_every_updates: int | None = _later(None)
    """Updates between two such scores; one more follows the last update. At least 1; null: only at the end."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        often = self.tasks_every_updates
        return _broken(
            at,
            self,
            ("every_updates", self.every_updates is None or self.every_updates >= 1, "is below 1; null is at the end only"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "is below 1; null is all of them"),
            ("tasks_every_updates", often is None or often >= 1, "is below 1; null is at the end only"),
        )


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Text generated while training. `sample: null` trains without."""

    first_tokens: int = MISSING
    """Training tokens before the first samples. At least 1."""
    growth: float = MISSING
    """Each interval between samples is so many times the one before it. At least 1."""
    new_tokens: int = MISSING
    """Tokens generated for each prompt. At least 1."""
    temperature: float = MISSING
    """Divides the logits before sampling. At least 0; 0 takes the most likely token."""
    top_k: int | None = MISSING
    """Sample among the k most likely tokens only. At least 1; null: all."""
    prompts: list[str] = MISSING
    """Texts to continue, one sample each."""
    prompt_sets: list[str] = _later([])
    """Few-shot tasks, by name or as .json files. Each time one of them is drawn, with examples and a query of its own, and is one
    more sample."""
    top_p: float | None = _later(None)
    """Sample among the most likely tokens that reach this probability together. In (0, 1]; null: all."""
    min_p: float | None = _later(None)
    """Sample among tokens with at least this share of the most likely one's probability. In [0, 1]; null: all."""
    repetition_penalty: float | None = _later(None)
    """Makes tokens that the text holds already less likely: their logits are divided by it where positive, else multiplied. Above
    0; null: nothing is."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("first_tokens", self.first_tokens >= 1, "is below 1; try 100000, or sample=null for no samples"),
            ("growth", 1 <= self.growth < math.inf, "is below 1; 1 is an even spacing"),
            ("new_tokens", self.new_tokens >= 1, "is below 1; try 64"),
            ("temperature", 0 <= self.temperature < math.inf, "is below 0; 0 takes the most likely token"),
            ("top_k", self.top_k is None or self.top_k >= 1, "is below 1; null is all tokens"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "is outside (0, 1]; null is all tokens"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "is outside [0, 1]; null is all tokens"),
            (
                "repetition_penalty",
                self.repetition_penalty is None or _positive(self.repetition_penalty),
                "is not above 0; null leaves repetitions alone",
            ),
            ("prompts", bool(self.prompts), "is empty; sample=null trains without samples"),
        )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the run's state is saved."""

    every_tokens: int | None = MISSING
    """Training tokens between two checkpoints. At least 1; null: only the last update."""
    at_end: bool = _later(True)
    """Whether the last update is saved. Without it only a stop is: of a run that ends nothing stays but what it measured."""
    keep: int = MISSING
    """Newest checkpoints that stay on disk. At least 1."""
    keep_best: int | None = _later(None)
    """Checkpoints that stay for their validation loss, the lowest first, beside the newest. Only updates that are both saved and
    validated compete, so let `every_tokens` and `eval.every_updates` meet. At least 1; null: none."""
    keep_every_tokens: int | None = _later(None)
    """Training tokens between two checkpoints that stay for good; they are saved whatever `every_tokens` says. At least 1; null:
    none."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("every_tokens", self.every_tokens is None or self.every_tokens >= 1, "is below 1; null is only the last update"),
            ("keep", self.keep >= 1, "is below 1; 1 keeps the newest"),
            ("keep_best", self.keep_best is None or self.keep_best >= 1, "is below 1; null keeps none for its loss"),
            (
                "keep_every_tokens",
                self.keep_every_tokens is None or self.keep_every_tokens >= 1,
                "is below 1; null keeps none for good",
            ),
        )


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What happens to an update that goes wrong: whose loss or gradient is no finite number, or whose loss jumps."""

    max_skipped: int = _later(0)
    """Updates in a whole run whose loss or gradient norm is no finite number that are left out, weights and optimizer staying as
    they are; one more ends the run. At least 0; 0 ends it at the first. It is no part of a run's identity."""
    spike_deviations: float | None = _later(None)
    """A row of the log is marked as a spike where its loss lies so many standard deviations above the mean of the 32 rows before
    it. Above 0; null: none is."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("max_skipped", self.max_skipped >= 0, "is below 0; 0 ends the run at the first"),
            (
                "spike_deviations",
                self.spike_deviations is None or _positive(self.spike_deviations),
                "is not above 0; null marks none",
            ),
        )


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """What a run may take, or a whole sweep: what is predicted to take more is refused before it starts. Never part of a run's
    identity."""

    gpu_hours: float | None = _later(None)
    """Hours of all GPUs together; on a CPU those of the run's processes. Above 0; null: any."""
    gpu_hour_price: float | None = _later(None)
    """What one such hour costs, in any currency; `llama-lab plan` then says a price. At least 0; null: unknown."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        hours, price = self.gpu_hours, self.gpu_hour_price
        return _broken(
            at,
            self,
            ("gpu_hours", hours is None or _positive(hours), "is not above 0; null allows any"),
            ("gpu_hour_price", price is None or 0 <= price < math.inf, "is below 0; null says no price"),
        )


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """The Weights & Biases sink. `wandb: null` trains without. Local files are complete either way."""

    mode: TrackerMode = MISSING
    """`WANDB_MODE` in the environment wins over auto."""
    project: str = MISSING
    """Project that the run appears in."""
    entity: str | None = MISSING
    """User or team; null: the key's default."""
    group: str | None = MISSING
    """Runs shown together. null: the run's `name`."""
    tags: list[str] = MISSING
    """Labels to filter by."""
    job_type: str = _later("train")
    """Kind of run within its group; a sweep makes it `sweep` for its jobs where it is `train`."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(at, self, ("project", bool(self.project), "is empty; try llama_lab, or wandb=null to train without"))


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """What each job of a sweep asks Slurm for: one node, a GPU for each of its processes on CUDA, and this."""

    partition: str | None = MISSING
    """Partition; null: the cluster's default."""
    account: str | None = MISSING
    """Account that is charged; null: the user's default."""
    minutes: int = MISSING
    """Longest time that a job may take; near its end it saves its state and is queued again. At least 1."""
    cpus: int = MISSING
    """Cores for each process of a job. At least 1."""
    memory_gib: int | None = MISSING
    """Memory of a job in GiB. At least 1; null: the cluster's default."""
    options: list[str] = MISSING
    """Further options of sbatch, as name=value, such as qos=high."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return _broken(
            at,
            self,
            ("minutes", self.minutes >= 1, "is below 1; try 240"),
            ("cpus", self.cpus >= 1, "is below 1; try 4"),
            ("memory_gib", self.memory_gib is None or self.memory_gib >= 1, "is below 1; null is the cluster's default"),
            ("options", all(option.partition("=")[2] for option in self.options), "holds one without a value; try ['qos=high']"),
        )


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How several runs that were asked for together are chosen and started. A run alone has none of it."""

    search: Search = MISSING
    """`optuna` needs the package of that name (llama_lab[sweep])."""
    trials: int | None = MISSING
    """Points that are tried by `random` and `optuna`; a larger number later goes on. At least 1; null: those of the grid."""
    seed: int = MISSING
    """Seed of `random` and `optuna`. At least 0."""
    objective: str = MISSING
    """Metric by which runs are compared, as summary.json has it."""
    direction: Direction = MISSING
    """Whether a low or a high objective is good."""
    halvings: int | None = MISSING
    """Times that the worse jobs are stopped early: after `keep` of the budget, before that after `keep` of that, and so on. At
    least 1; null: every job trains to its end."""
    keep: float = MISSING
    """Share of the jobs that goes on at a halving. In (0, 1)."""
    noise: float | None = MISSING
    """Standard deviation of the objective between runs that differ in their seeds alone; a job is stopped only where it is worse by
    more than that explains. At least 0; null: that of the seeds which the sweep repeats, else what `llama-lab noise` has stored for
    such runs, else 0."""
    launcher: Launcher = MISSING
    """`slurm` needs the package submitit (llama_lab[slurm])."""
    at_once: int | None = MISSING
    """Jobs that run side by side. At least 1; null: as many as the GPUs or the cores have room for, on Slurm all."""
    jobs_per_gpu: int = MISSING
    """Jobs that share a GPU. At least 1."""
    slurm: SlurmConfig = MISSING

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        is_key = all(part.replace("_", "").isalnum() for part in self.objective.split("/")) and "/" in self.objective
        return self.slurm.problems(f"{at}.slurm") + _broken(
            at,
            self,
            ("trials", self.trials is None or self.trials >= 1, "is below 1; try 20"),
            (
                "trials",
                self.trials is None or self.search is not Search.grid,
                "counts nothing in a grid; sweep.search=random or optuna draws so many points",
            ),
            (
                "trials",
                self.trials is not None or self.search is Search.grid,
                f"does not say how many points sweep.search={self.search.name} tries; try 20",
            ),
            ("seed", self.seed >= 0, "is below 0; 0 will do"),
            ("objective", is_key, "is no metric; try val/loss"),
            ("halvings", self.halvings is None or self.halvings >= 1, "is below 1; null stops none early"),
            ("keep", 0 < self.keep < 1, "is outside (0, 1); 0.5 stops half of the jobs"),
            ("noise", self.noise is None or 0 <= self.noise < math.inf, "is below 0; null measures it"),
            ("at_once", self.at_once is None or self.at_once >= 1, "is below 1; null is as many as there is room for"),
            ("jobs_per_gpu", self.jobs_per_gpu >= 1, "is below 1; 1 gives each job GPUs of its own"),
        )


@dataclass(kw_only=True, slots=True)
class Origin:
    """Where a config came from: what a run's name tells a reader beyond its values. It is no part of what is configured."""

    choices: dict[str, str] = field(default_factory=dict)
    """Option of each group, and the preset as `experiment` if there is one."""
    label: str = "run"
    """The choices that tell this run from the default one, joined by `-`."""
    base: dict[str, Any] = field(default_factory=dict)
    """Every value of the science, by key path, as the choices alone give it; null where they leave it to the user."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run, whole. Science (model, data, tokenizer, optim, schedule, precision, seed) and budget make its identity."""

    name: str = MISSING
    """Study that the run belongs to; its folder is `outputs/<name>/<run id>`. Letters, digits, `.`, `_`, `-`."""
    training_tokens: int = MISSING
    """Budget. The run ends with the last whole update within it. At least one update's tokens."""
    precision: Precision = MISSING
    """auto: bf16 where the device has it in hardware, else fp32."""
    fresh: bool = MISSING
    """Whether an existing folder of this run is moved aside (`<id>.1`) and the run started anew."""
    accept_changes: bool = MISSING
    """Whether a run may continue although code, library versions or data differ from when it began."""
    profile: bool = _later(False)
    """Whether three early updates of a start are recorded into the run's folder `profile`: a trace, a table of kernels, on CUDA the
    memory as well. They are slower for it."""
    seed: SeedConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    hardware: HardwareConfig = MISSING
    log: LogConfig = MISSING
    eval: EvalConfig | None = MISSING
    sample: SampleConfig | None = MISSING
    checkpoint: CheckpointConfig = MISSING
    guard: GuardConfig = field(default_factory=GuardConfig, metadata={BEFORE: GuardConfig()})
    budget: BudgetConfig = field(default_factory=BudgetConfig, metadata={BEFORE: BudgetConfig()})
    wandb: WandbConfig | None = MISSING
    sweep: SweepConfig | None = field(default=None, metadata={BEFORE: None})
    origin: Origin = field(default_factory=Origin, compare=False, repr=False, metadata={"omegaconf_ignore": True})

    @property
    def updates(self) -> int:
        """Optimizer steps that fit whole into the budget."""
        return self.training_tokens // self.data.tokens_per_update

    @property
    def micro_batch(self) -> int:
        """Windows at once, of a run in which nothing is left to find."""
        assert isinstance(self.hardware.micro_batch, int)
        return self.hardware.micro_batch

    @property
    def windows_per_update(self) -> int:
        """Windows in the global batch of one optimizer step."""
        return self.data.tokens_per_update // self.data.max_seq_len


GROUPS = ("model", "data", "tokenizer", "optim", "schedule", "hardware")
"""Nodes of a run that are filled by choosing an option in `conf/<group>/`."""

SHAPES: dict[str, dict[str, type]] = {
    "data": {
        "docs": DocsConfig,
        "text": TextConfig,
        "huggingface": HuggingFaceConfig,
        "shards": ShardsConfig,
        "mixture": MixtureConfig,
    },
    "tokenizer": {"bpe": BpeConfig, "file": FileTokenizerConfig, "bytes": BytesConfig},
    "optim": {"adamw": AdamWConfig, "muon": MuonConfig},
    "schedule": {"cosine": CosineConfig, "linear": LinearConfig, "constant": ConstantConfig, "wsd": WsdConfig},
}
"""Groups whose options differ in shape -> name of the shape -> its class. The names are part of every run's identity."""
