"""The schedule group: the learning rate over the run."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from llama_lab.config.schema.fields import Problem, broken


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
        return broken(
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
        own = broken(at, self, ("cooldown_fraction", 0 < self.cooldown_fraction <= 1, rule))
        return ScheduleConfig.problems(self, at) + own
