"""The hardware group: where a run computes and how fast, which never moves its curve."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llama_lab.config.schema.fields import AUTO, WORDS, Problem, broken, later, positive


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
    passes of even size that keep to 4,096 tokens on a CPU, and on CUDA to 131,072 or what memory, width and depth suggest. auto: in
    the fewest that fit into the memory of a CUDA device, found by trying before the run starts, and kept in the cache; elsewhere
    like null. At least 1."""
    compile: Compile = MISSING
    """Whether the model goes through torch.compile."""
    recompute: Recompute = later(Recompute.none)
    """Activations that are computed twice to save memory."""
    deterministic: bool = MISSING
    """Whether only deterministic kernels are allowed, for bitwise equal repeats on CUDA. On a CPU runs repeat bitwise anyway."""
    timeout_seconds: float | None = later(600.0)
    """A process that makes no progress for so long, after its first update, is taken to hang: it says where, and the run ends. Let
    it be longer than the longest update and than writing a checkpoint. Above 0; null: it waits for ever."""

    def problems(self, at: str) -> list[Problem]:
        """What is wrong with this node alone; `at` is its key path."""
        return broken(
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
                self.timeout_seconds is None or positive(self.timeout_seconds),
                "is not above 0; null lets a run that hangs wait for ever",
            ),
        )
