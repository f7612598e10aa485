"""Successive halving that knows what chance can do: which running job is so far behind that it need not end.

At each rung, a validation at a fixed share of the budget, a job is compared with all that have reached it with the same seeds. It
goes on if it is among the best `keep` of them, or behind the last of those by no more than two runs can differ by their seeds
alone. The others' values are read from their own metrics.jsonl, so nothing has to be remembered over a restart.

Source: asynchronous successive halving in its stopping form (Li et al., arXiv:1810.05934, and its use in Syne Tune); the margin is
ours.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lab.config.schema import Direction, Problem, RunConfig, SweepConfig
from llama_lab.lab.sweep.space import Point, label, without_seeds

# Repetitions, beyond the first of each point, below which their scatter says little.
FEW = 3
CERTAINTY = 1.645
"""Standard deviations behind which a difference is chance in one case of twenty, looked at from one side."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a job is stopped.

    Attributes:
        value, needed: its objective at the rung, and what would have let it go on.
        update: number of the update at which it was validated.
    """

    value: float
    needed: float
    update: int


def rung_updates(run: RunConfig, settings: SweepConfig) -> list[int]:
    """Updates whose validations are rungs, rising: the first validation at or after each share of the budget."""
    if settings.halvings is None or run.eval is None or run.eval.every_updates is None:
        return []
    every = run.eval.every_updates
    shares = [settings.keep**power for power in range(settings.halvings, 0, -1)]
    return [-(-max(1, math.ceil(share * run.updates)) // every) * every for share in shares]


def rung_problems(run: RunConfig, settings: SweepConfig) -> list[Problem]:
    """Why a job could not be compared before its end."""
    if settings.halvings is None:
        return []
    subject = f"sweep.halvings={settings.halvings}"
    if not settings.objective.startswith("val/"):
        return [(subject, f"compares validations, and sweep.objective={settings.objective} is none; try sweep.objective=val/loss")]
    first = settings.keep**settings.halvings * run.updates
    works = max(1, int(first))
    if run.eval is None or run.eval.every_updates is None:
        return [(subject, f"needs validations on the way; eval.every_updates={works} makes them")]
    rungs = rung_updates(run, settings)
    if rungs[-1] >= run.updates or len(set(rungs)) < len(rungs) or run.eval.every_updates > max(1, math.ceil(first)):
        where = ", ".join(str(max(1, math.ceil(settings.keep**power * run.updates))) for power in range(settings.halvings, 0, -1))
        rule = (
            f"looks at validations after about {where} of {run.updates} updates, and eval.every_updates={run.eval.every_updates} "
        )
        return [(subject, rule + f"makes none there; try eval.every_updates={works}")]
    return []


def falls_behind(value: float, others: Sequence[float], keep: float, margin: float) -> float | None:
    """What a job would have needed to go on, if it does not; lower is better.

    Args:
        value: its objective.
        others: those of the jobs it is compared with.
        margin: how far behind the last that is kept may be chance.
    """
    everyone = sorted([value, *others])
    if len(everyone) < math.ceil(1 / keep - 1e-9):
        return None
    needed = everyone[max(1, math.floor(keep * len(everyone) + 1e-9)) - 1] + margin
    return needed if value > needed else None


@dataclass
class Candidate:
    """A job as halving sees it.

    Attributes:
        values: swept key -> its value.
        run, folder: what it trains, and where.
    """

    values: Point
    run: RunConfig
    folder: Path
    _known: dict[int, float] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)

    def at(self, update: int, objective: str, sign: int) -> float | None:
        """Its objective after an update, lower being better; None if it was not validated there yet. A value that is no finite
        number is the worst there is."""
        # It brings what training prints with, which a command that is refused need not wait for.
        from llama_lab.training.metrics import read_rows

        path = self.folder / "metrics.jsonl"
        if update not in self._known and path.is_file():
            stat = path.stat()
            if (now := (stat.st_mtime_ns, stat.st_size)) != self._seen:
                self._seen = now
                for row in read_rows(path):
                    if objective in row:
                        self._known[row["update"]] = math.inf if row[objective] is None else sign * row[objective]
        return self._known.get(update)


class Halving:
    """The rungs of a sweep and who passed them in this start."""

    def __init__(self, settings: SweepConfig):
        self._settings = settings
        self._sign = 1 if settings.direction is Direction.minimize else -1
        self._passed: set[tuple[Path, int]] = set()
        self._floor: list[Any] | None = None

    def look(self, job: Candidate, everyone: Sequence[Candidate]) -> Verdict | None:
        """Why a running job should be stopped; None if it goes on.

        Args:
            everyone: all jobs of the sweep; those that have not begun say nothing.
        """
        for rung, update in enumerate(rung_updates(job.run, self._settings)):
            if (job.folder, rung) in self._passed:
                continue
            value = self._value(job, rung)
            if value is None:
                return None
            self._passed.add((job.folder, rung))
            peers = [other for other in everyone if other.folder != job.folder and _seeds(other.values) == _seeds(job.values)]
            found = [peer for other in peers if (peer := self._value(other, rung)) is not None]
            margin = CERTAINTY * math.sqrt(2) * self.noise(rung, everyone)
            needed = falls_behind(value, found, self._settings.keep, margin)
            if needed is not None:
                return Verdict(self._sign * value, self._sign * needed, update)
        return None

    def noise(self, rung: int, everyone: Sequence[Candidate]) -> float:
        """Standard deviation between runs that differ in their seeds alone.

        As it was typed; else as the repetitions of this sweep show it at the rung so far, pooled over points; where these are too
        few, as `llama-lab noise` has stored it for such runs; else as those few show it, and 0 without any.
        """
        if self._settings.noise is not None:
            return self._settings.noise
        groups: defaultdict[str, list[float]] = defaultdict(list)
        for one in everyone:
            value = self._value(one, rung)
            if value is not None and math.isfinite(value):
                groups[label(without_seeds(one.values))].append(value)
        repeated = [values for values in groups.values() if len(values) > 1]
        freedom = sum(len(values) - 1 for values in repeated)
        if freedom < FEW and (stored := self._stored(everyone)) is not None:
            return stored
        return math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / freedom) if freedom else 0.0

    def _stored(self, everyone: Sequence[Candidate]) -> float | None:
        """The noise floor that was measured for runs like these, if there is one."""
        # They import scipy, which a command that only starts a run need not wait for.
        from llama_lab.lab.compare.noise import find_floor
        from llama_lab.lab.compare.records import load_record

        begun = next((one.folder for one in everyone if (one.folder / "metrics.jsonl").is_file()), None)
        if begun is not None and self._floor is None:
            self._floor = [find_floor(load_record(begun))]
        floor = self._floor[0] if self._floor else None
        scatter = floor.of(self._settings.objective) if floor is not None else None
        return None if scatter is None else scatter.sd

    def _value(self, job: Candidate, rung: int) -> float | None:
        updates = rung_updates(job.run, self._settings)
        return job.at(updates[rung], self._settings.objective, self._sign) if rung < len(updates) else None


def _seeds(values: Point) -> str:
    return label({key: value for key, value in values.items() if key.startswith("seed.")})
