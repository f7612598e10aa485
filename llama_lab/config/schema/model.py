"""The model group: the shape of a Llama."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llama_lab.config.schema.fields import Problem, broken, later, positive

SUGGESTED = 4
"""Numbers of heads that are named where one does not fit."""


class RopeScaling(Enum):
    """How rotary wavelengths are stretched for texts longer than a model was first trained on."""

    linear = "linear"
    llama3 = "llama3"


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
    rope_scaling: RopeScaling | None = later(None)
    """linear: all rotary wavelengths are `rope_factor` times as long; llama3: only the long ones are, as in Llama 3.1 and later.
    null: none is. For weights that were trained so; a model from nothing needs none."""
    rope_factor: float = later(1.0)
    """How many times as long the wavelengths become. At least 1; 1 without `rope_scaling`."""
    rope_low_freq: float = later(1.0)
    """llama3: wavelengths that fit fewer times than this into `rope_original_len` are stretched in full. Above 0."""
    rope_high_freq: float = later(4.0)
    """llama3: wavelengths that fit more often than this into `rope_original_len` stay. Above `rope_low_freq`."""
    rope_original_len: int = later(8192)
    """llama3: tokens of context that the model was first trained with. At least 1."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, counted also where `n_kv_heads` is null."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        counts = broken(
            at,
            self,
            ("dim", self.dim >= 2, "is below 2; try 256"),
            ("n_layers", self.n_layers >= 1, "is below 1; try 3"),
            ("n_heads", self.n_heads >= 1, "is below 1; try 4"),
            ("multiple_of", self.multiple_of >= 1, "is below 1; 1 leaves the width as computed"),
            ("ffn_dim", self.ffn_dim is None or self.ffn_dim >= 1, "is below 1; null derives it from dim"),
            ("rope_theta", positive(self.rope_theta), "is not above 0; try 10000"),
            ("norm_eps", positive(self.norm_eps), "is not above 0; try 1e-5"),
            ("dropout", 0 <= self.dropout < 1, "is outside [0, 1); 0 is none"),
            *self._rope_rules(at),
        )
        return counts or self._head_problems(at)

    def _rope_rules(self, at: str) -> list[tuple[str, bool, str]]:
        needed = self.rope_scaling is not None or self.rope_factor == 1
        return [
            ("rope_factor", 1 <= self.rope_factor < math.inf, "is below 1; 1 leaves the wavelengths as they are"),
            ("rope_factor", needed, f"has no effect without {at}.rope_scaling; try {at}.rope_scaling=linear"),
            ("rope_low_freq", positive(self.rope_low_freq), "is not above 0; try 1"),
            (
                "rope_high_freq",
                self.rope_low_freq < self.rope_high_freq < math.inf,
                f"is not above {at}.rope_low_freq={self.rope_low_freq}; try {4 * self.rope_low_freq:g}",
            ),
            ("rope_original_len", self.rope_original_len >= 1, "is below 1; try 8192"),
        ]

    def _head_problems(self, at: str) -> list[Problem]:
        divisors = [heads for heads in range(1, self.n_heads + 1) if self.n_heads % heads == 0]
        return broken(
            at,
            self,
            (
                "n_heads",
                self.dim % (2 * self.n_heads) == 0,
                f"does not divide {at}.dim={self.dim} into heads of an even number of channels, as rotary embeddings need; "
                + self._fitting_heads(at),
            ),
            (
                "n_kv_heads",
                self.n_kv_heads is None or self.n_kv_heads in divisors,
                f"does not divide {at}.n_heads={self.n_heads}; one of {', '.join(map(str, divisors))} does, null is all of them",
            ),
        )

    def _fitting_heads(self, at: str) -> str:
        """The numbers of heads nearest to `n_heads` that fit the width, and the widths nearest to `dim` that fit `n_heads`."""
        step = 2 * self.n_heads
        below = self.dim // step * step
        widths = " or ".join(f"{at}.dim={width}" for width in (below, below + step) if width)
        fitting = [heads for heads in range(1, self.dim // 2 + 1) if self.dim % (2 * heads) == 0]
        near = sorted(sorted(fitting, key=lambda heads: abs(math.log(heads / self.n_heads)))[:SUGGESTED])
        if not near:
            return f"{widths} works"
        listed = ", ".join(map(str, near))
        return f"{listed} does, or {widths}" if len(near) == 1 else f"one of {listed} does, or {widths}"
