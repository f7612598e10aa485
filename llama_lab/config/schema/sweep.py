"""How several runs that were asked for together are chosen and started."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llama_lab.config.schema.fields import Problem, broken


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
        return broken(
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
        return self.slurm.problems(f"{at}.slurm") + broken(
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
