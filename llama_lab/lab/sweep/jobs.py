"""The jobs of a sweep, and how each ended."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lab.config.identity import is_science, joined_slug, run_folder, slug_part
from llama_lab.config.overrides import PRESET
from llama_lab.config.schema import BudgetConfig, RunConfig, Search, SweepConfig
from llama_lab.lab.runs.sweeps import STOPPED_EARLY
from llama_lab.lab.sweep.space import Axis, Point, label, repeated, without_seeds

BEFORE_START = "stopped before its first update"


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        status: what the run says of itself (`finished`, `preempted`, `already finished`), `stopped early …`, or `failed …`.
        folder: the run's folder; null if it never had one.
        updates, tokens: done so far, in all starts together.
        summary: last values by metric key.
        kind, message: class and text of the error it ended with; empty without one.
        process_seconds: from its process's first line to its last, in this start.
    """

    status: str
    folder: str | None = None
    updates: int = 0
    tokens: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    message: str = ""
    process_seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self.status.startswith("failed")

    @property
    def finished(self) -> bool:
        """Whether its run is trained to its end."""
        return self.status in ("finished", "already finished")

    @property
    def stopped_early(self) -> bool:
        """Whether it was left before its end because it, or another seed of its point, had fallen behind."""
        return self.status.startswith(STOPPED_EARLY)

    @property
    def decided(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished or self.stopped_early


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        overrides: what composes it.
        values: swept key -> its value in this job, as typed.
        run: the validated, resolved config.
        slug: what distinguishes it from the others without changing the science; null: nothing.
        folder: where it will be.
        number: its place in the sweep, from 1.
        trial: Optuna's number of its point; null where Optuna has not heard of it.
    """

    overrides: list[str]
    values: Point
    run: RunConfig
    slug: str | None
    folder: Path
    outcome: Outcome = field(default_factory=lambda: Outcome("not started"))
    number: int = 0
    trial: int | None = None

    @property
    def label(self) -> str:
        """Its values as they are typed."""
        return label(self.values)

    @property
    def point(self) -> str:
        """Its values without the seeds."""
        return label(without_seeds(self.values))


@dataclass
class Sweep:
    """Jobs that were asked for together.

    Attributes:
        jobs: all that are known; a search by Optuna adds more as it goes.
        folder: where its summary and frozen configs are kept; the same for the same jobs.
        settings: how they are chosen and started.
        axes: what is swept.
        fixed: overrides that every job has.
        bases: for a search, a job for each combination of options and seeds, from which later ones are made.
        command: what was typed.
        budget: what all jobs together may take; no job has one of its own.
        unranked: why values of the objective do not rank the jobs, as a clause; null where they do.
    """

    jobs: list[Job]
    folder: Path
    settings: SweepConfig
    axes: list[Axis] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    bases: list[Job] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    unranked: str | None = None

    @property
    def to_come(self) -> int:
        """Jobs that the search is still to choose."""
        if self.settings.search is not Search.optuna or self.settings.trials is None:
            return 0
        repetitions = len(repeated([{}], self.axes))
        return max(0, self.settings.trials - len(self.jobs) // repetitions) * repetitions


def place(run: RunConfig, values: Point) -> tuple[str | None, Path]:
    """What a job adds to its run's name for values outside the science, and the run's folder."""
    parts = [slug_part(key, value) for key, value in values.items() if not is_science(key) and key not in ("name", PRESET)]
    slug = joined_slug(parts)
    return slug, run_folder(run, slug)
