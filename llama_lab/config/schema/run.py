"""One run, whole."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llama_lab.config.schema.budget import BudgetConfig
from llama_lab.config.schema.data import DataConfig, DocsConfig, HuggingFaceConfig, MixtureConfig, ShardsConfig, TextConfig
from llama_lab.config.schema.fields import BEFORE, Problem, broken, later
from llama_lab.config.schema.hardware import HardwareConfig
from llama_lab.config.schema.model import ModelConfig
from llama_lab.config.schema.observe import EvalConfig, LogConfig, SampleConfig, WandbConfig
from llama_lab.config.schema.optim import AdamWConfig, MuonConfig, OptimConfig
from llama_lab.config.schema.safety import CheckpointConfig, GuardConfig
from llama_lab.config.schema.schedule import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig, WsdConfig
from llama_lab.config.schema.sweep import SweepConfig
from llama_lab.config.schema.tokenizer import BpeConfig, BytesConfig, FileTokenizerConfig, TokenizerConfig


class Precision(Enum):
    """Dtype of the activations in matrix products; weights and their gradients are fp32 in each case. `fp8` multiplies in float8
    inside the blocks, with one scale a tensor, and is bf16 elsewhere. `auto` never chooses it."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


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
        return broken(
            at,
            self,
            ("init", 0 <= self.init < 2**63, "is outside 0 to 2**63 - 1; try 0"),
            ("data", 0 <= self.data < 2**63, "is outside 0 to 2**63 - 1; try 0"),
            ("sampling", 0 <= self.sampling < 2**63, "is outside 0 to 2**63 - 1; try 0"),
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
    profile: bool = later(False)
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
