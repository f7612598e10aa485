"""The optim group: how gradients become steps."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llama_lab.config.schema.fields import Problem, broken, later, positive

HIGHEST_BF16_DECAY = 0.99
"""bfloat16 has 8 binary digits: a mean that moves by less than 1 % a step would often not move at all."""


class StateDtype(Enum):
    """Dtype in which an optimizer keeps its moments between two steps; it computes in fp32 either way."""

    fp32 = "fp32"
    bf16 = "bf16"


_BYTES = {StateDtype.fp32: 4, StateDtype.bf16: 2}


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """What every optimizer has in common."""

    max_lr: float = MISSING
    """Peak learning rate, which the schedule scales. Above 0."""
    weight_decay: float = MISSING
    """Decoupled decay of matrices (embeddings included); vectors such as norm gains are never decayed. At least 0."""
    max_grad_norm: float | None = MISSING
    """Global L2 norm that gradients are clipped to. Above 0; null: not clipped, only measured."""

    def state_bytes(self, inside: int, outside: int) -> int:
        """Bytes of what it keeps from step to step, for plans: two moments in fp32, unless an optimizer says otherwise.

        Args:
            inside: weights inside the blocks.
            outside: those of the embedding and the output projection. Vectors do not count next to either.
        """
        return 2 * _BYTES[StateDtype.fp32] * (inside + outside)

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
            at,
            self,
            ("max_lr", positive(self.max_lr), "is not above 0; try 0.003"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "is below 0; 0 is none"),
            ("max_grad_norm", self.max_grad_norm is None or positive(self.max_grad_norm), "is not above 0; null is no clipping"),
        )


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """AdamW on all parameters."""

    state_dtype: StateDtype = later(StateDtype.fp32)
    """bf16 halves the memory and the disk of the moments. It is science: the curve is another one."""
    beta1: float = MISSING
    """Decay of the first moment, in [0, 1)."""
    beta2: float = MISSING
    """Decay of the second moment, in [0, 1)."""
    eps: float = MISSING
    """Added to the root of the second moment. Above 0."""

    def state_bytes(self, inside: int, outside: int) -> int:
        """Two moments."""
        return 2 * _BYTES[self.state_dtype] * (inside + outside)

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return OptimConfig.problems(self, at) + broken(
            at,
            self,
            ("beta1", 0 <= self.beta1 < 1, "is outside [0, 1); try 0.9"),
            ("beta2", 0 <= self.beta2 < 1, "is outside [0, 1); try 0.95"),
            ("eps", positive(self.eps), "is not above 0; try 1e-8"),
            *self._too_slow("beta1", "beta2"),
        )

    def _too_slow(self, *names: str) -> list[tuple[str, bool, str]]:
        """Rules for decays of moments that bf16 could not follow."""
        rule = f"is above {HIGHEST_BF16_DECAY}, too slow a mean for optim.state_dtype=bf16; try 0.95, or optim.state_dtype=fp32"
        fits = self.state_dtype is StateDtype.fp32
        return [(name, fits or not HIGHEST_BF16_DECAY < getattr(self, name) < 1, rule) for name in names]


@dataclass(kw_only=True, slots=True)
class MuonConfig(AdamWConfig):
    """Muon on the matrices inside the blocks (`max_lr`), AdamW on embeddings, output projection and vectors (`adamw_max_lr`)."""

    momentum: float = MISSING
    """Nesterov momentum of Muon, in [0, 1)."""
    adamw_max_lr: float = MISSING
    """Peak learning rate of the parameters that AdamW updates. Above 0."""

    def state_bytes(self, inside: int, outside: int) -> int:
        """One moment for the matrices inside the blocks, two for the rest."""
        return _BYTES[self.state_dtype] * (inside + 2 * outside)

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return AdamWConfig.problems(self, at) + broken(
            at,
            self,
            ("momentum", 0 <= self.momentum < 1, "is outside [0, 1); try 0.95"),
            ("adamw_max_lr", positive(self.adamw_max_lr), "is not above 0; try 0.003"),
            *self._too_slow("momentum"),
        )
