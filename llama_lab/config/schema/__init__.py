"""What a run is: every field, its type, its unit and its legal range. The numbers live in `conf/`.

Dataclasses here are registered with Hydra, YAML options merge onto them, and the finished tree is turned back into plain
dataclasses, so no other module ever sees an OmegaConf object. A node reports what is wrong with itself through
`problems()`; what spans nodes is in `validate.py`. Nothing here imports torch or reads a file.
"""

from llama_lab.config.schema.budget import BudgetConfig
from llama_lab.config.schema.data import (
    CorpusConfig,
    DataConfig,
    Dedup,
    DocsConfig,
    HuggingFaceConfig,
    Length,
    MixtureConfig,
    OnError,
    ShardsConfig,
    TextConfig,
    Window,
)
from llama_lab.config.schema.fields import AUTO, BEFORE, EXAMPLE, WORDS, Problem, nearest_multiples, shown
from llama_lab.config.schema.hardware import Compile, Device, HardwareConfig, Recompute
from llama_lab.config.schema.model import ModelConfig, RopeScaling
from llama_lab.config.schema.observe import EvalConfig, LogConfig, SampleConfig, TrackerMode, WandbConfig
from llama_lab.config.schema.optim import AdamWConfig, MuonConfig, OptimConfig, StateDtype
from llama_lab.config.schema.run import GROUPS, SHAPES, Origin, Precision, RunConfig, SeedConfig
from llama_lab.config.schema.safety import CheckpointConfig, GuardConfig
from llama_lab.config.schema.schedule import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig, WsdConfig
from llama_lab.config.schema.sweep import Direction, Launcher, Search, SlurmConfig, SweepConfig
from llama_lab.config.schema.tokenizer import BPE_SPECIAL_TOKENS, BpeConfig, BytesConfig, FileTokenizerConfig, TokenizerConfig

__all__ = [
    "AUTO",
    "BEFORE",
    "BPE_SPECIAL_TOKENS",
    "EXAMPLE",
    "GROUPS",
    "SHAPES",
    "WORDS",
    "AdamWConfig",
    "BpeConfig",
    "BudgetConfig",
    "BytesConfig",
    "CheckpointConfig",
    "Compile",
    "ConstantConfig",
    "CorpusConfig",
    "CosineConfig",
    "DataConfig",
    "Dedup",
    "Device",
    "Direction",
    "DocsConfig",
    "EvalConfig",
    "FileTokenizerConfig",
    "GuardConfig",
    "HardwareConfig",
    "HuggingFaceConfig",
    "Launcher",
    "Length",
    "LinearConfig",
    "LogConfig",
    "MixtureConfig",
    "ModelConfig",
    "MuonConfig",
    "OnError",
    "OptimConfig",
    "Origin",
    "Precision",
    "Problem",
    "Recompute",
    "RopeScaling",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "Search",
    "SeedConfig",
    "ShardsConfig",
    "SlurmConfig",
    "StateDtype",
    "SweepConfig",
    "TextConfig",
    "TokenizerConfig",
    "TrackerMode",
    "WandbConfig",
    "Window",
    "WsdConfig",
    "nearest_multiples",
    "shown",
]
