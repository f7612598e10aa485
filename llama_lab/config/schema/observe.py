"""What is seen of a run: its log, validation, samples, tracker."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llama_lab.config.schema.fields import Problem, broken, later, positive


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is printed and written while training."""

    every_updates: int = MISSING
    """Updates between two log lines and metric rows. At least 1."""
    parts: bool = later(False)
    """Whether rows also say which share of the time forward, backward, exchange, optimizer and the rest took."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(at, self, ("every_updates", self.every_updates >= 1, "is below 1; try 10"))


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Validation on documents that training never sees. `eval: null` trains without."""

    every_updates: int | None = MISSING
    """Updates between two validations; one more follows the last update. At least 1; null: only at the end."""
    max_tokens: int | None = MISSING
    """Validation tokens used, from the start of the held-out set, or of each one's in a mixture. At least 1; null: all of them."""
    tasks: list[str] = later([])
    """Files of multiple-choice questions, or of texts to complete, that the model is scored on; see docs/evaluation.md."""
    tasks_every_updates: int | None = later(None)
    """Updates between two such scores; one more follows the last update. At least 1; null: only at the end."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        often = self.tasks_every_updates
        return broken(
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
    prompts: list[str] | None = MISSING
    """Texts to continue, one sample each. null: how the first held-out documents begin."""
    prompt_sets: list[str] = later([])
    """Few-shot tasks, by name or as .json files. Each time one of them is drawn, with examples and a query of its own, and is one
    more sample."""
    top_p: float | None = later(None)
    """Sample among the most likely tokens that reach this probability together. In (0, 1]; null: all."""
    min_p: float | None = later(None)
    """Sample among tokens with at least this share of the most likely one's probability. In [0, 1]; null: all."""
    repetition_penalty: float | None = later(None)
    """Makes tokens that the text holds already less likely: their logits are divided by it where positive, else multiplied. Above
    0; null: nothing is."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
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
                self.repetition_penalty is None or positive(self.repetition_penalty),
                "is not above 0; null leaves repetitions alone",
            ),
            ("prompts", self.prompts != [], "is empty; null takes beginnings of held-out documents, sample=null no samples at all"),
        )


class TrackerMode(Enum):
    """Where Weights & Biases writes; `auto` is online when a key is configured, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


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
    job_type: str = later("train")
    """Kind of run within its group; a sweep makes it `sweep` for its jobs where it is `train`."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(at, self, ("project", bool(self.project), "is empty; try llama_lab, or wandb=null to train without"))
