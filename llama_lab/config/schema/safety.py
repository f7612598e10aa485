"""What keeps a run from being lost: checkpoints, and guards against updates that go wrong."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from llama_lab.config.schema.fields import AUTO, WORDS, Problem, broken, later, positive


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the run's state is saved."""

    # A whole number, `auto` or null; OmegaConf fails to merge a node with a union of types in it.
    every_tokens: Any = field(default=MISSING, metadata={WORDS: (AUTO,)})
    """Training tokens between two checkpoints. auto: a checkpoint with every validation; with every few of them, or also between
    two, where otherwise fewer than 100 updates or more than 200 would lie between. At least 1; null: only the last update."""
    at_end: bool = later(True)
    """Whether the last update is saved. Without it only a stop is: of a run that ends nothing stays but what it measured."""
    keep: int = MISSING
    """Newest checkpoints that stay on disk. At least 1."""
    keep_best: int | None = later(None)
    """Checkpoints that stay for their validation loss, the lowest first, beside the newest. Only updates that are both saved and
    validated compete, so let `every_tokens` and `eval.every_updates` meet. At least 1; null: none."""
    keep_every_tokens: int | None = later(None)
    """Training tokens between two checkpoints that stay for good; they are saved whatever `every_tokens` says. At least 1; null:
    none."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
            at,
            self,
            (
                "every_tokens",
                type(self.every_tokens) is not int or self.every_tokens >= 1,
                "is below 1; null is only the last update",
            ),
            (
                "every_tokens",
                type(self.every_tokens) is int or self.every_tokens in (AUTO, None),
                "is not a whole number, auto or null; e.g. checkpoint.every_tokens=auto",
            ),
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

    max_skipped: int = later(0)
    """Updates in a whole run whose loss or gradient norm is no finite number that are left out, weights and optimizer staying as
    they are; one more ends the run. At least 0; 0 ends it at the first. It is no part of a run's identity."""
    spike_deviations: float | None = later(None)
    """A row of the log is marked as a spike where its loss lies so many standard deviations above the mean of the 32 rows before
    it. Above 0; null: none is."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
            at,
            self,
            ("max_skipped", self.max_skipped >= 0, "is below 0; 0 ends the run at the first"),
            (
                "spike_deviations",
                self.spike_deviations is None or positive(self.spike_deviations),
                "is not above 0; null marks none",
            ),
        )
