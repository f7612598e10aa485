"""What ranks the jobs and the points of a sweep: one definition for tables, the search, halving and the report.

A job counts if it finished, trained to its full budget; a point counts with the mean of its jobs that did. What was stopped early
is shown with its last value and the update that is of, and is averaged with nothing that finished.

Values rank jobs only where they mean the same for all of them. That is the notion of `lab.compare.arms`, which asks it of runs that
are trained; here it is asked of their configs, before anything is.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import science
from llama_lab.config.schema import Direction, MixtureConfig, Problem, RunConfig, Search, ShardsConfig, SweepConfig
from llama_lab.lab.sweep.jobs import Job, Sweep

LOSS, BITS = "val/loss", "val/bits_per_byte"
VALIDATED, TRAINED = ("val/", "best/val/"), ("train/loss", "train/perplexity")
PART = "eval.max_tokens"
"""What makes different texts out of one."""


@dataclass(frozen=True, slots=True)
class PointResult:
    """What came of a point.

    Attributes:
        jobs: of the point, each with another seed.
        values: of the objective, of the jobs that finished and have it as a finite number.
        stopped: how many were stopped early.
        last: where none counts, (update, value) of the last validation of what was stopped early, the mean of those that came
            furthest; null without one.
    """

    jobs: tuple[Job, ...]
    values: tuple[float, ...]
    stopped: int
    last: tuple[int, float] | None

    @property
    def mean(self) -> float | None:
        """What the point counts with; None if no job of it counts."""
        return statistics.fmean(self.values) if self.values else None


def objective(sweep: Sweep, job: Job) -> float | None:
    """A job's objective; None if it has none, or one that is no finite number."""
    return _finite(job.outcome.summary.get(sweep.settings.objective))


def ranked(sweep: Sweep) -> list[Job]:
    """Jobs that count, the best first; in their order where values rank nothing."""
    found = [(value, job) for job in sweep.jobs if job.outcome.finished and (value := objective(sweep, job)) is not None]
    sign = 0 if sweep.unranked is not None else _sign(sweep.settings)
    return [job for _, job in sorted(found, key=lambda pair: (sign * pair[0], pair[1].number))]


def point_result(jobs: Sequence[Job], settings: SweepConfig) -> PointResult:
    """What came of the jobs of one point."""
    values = [_finite(job.outcome.summary.get(settings.objective)) for job in jobs if job.outcome.finished]
    counting = tuple(value for value in values if value is not None)
    stopped = [job for job in jobs if job.outcome.stopped_early]
    seen = [] if counting else [last for job in stopped if (last := last_measured(job.folder, settings.objective)) is not None]
    furthest = max((update for update, _ in seen), default=0)
    last = (furthest, statistics.fmean(value for update, value in seen if update == furthest)) if seen else None
    return PointResult(tuple(jobs), counting, len(stopped), last)


def ranked_points(sweep: Sweep) -> list[PointResult]:
    """Points of which something is known: those that count, the best first, then those that were stopped early, the furthest
    first.
    """
    groups: defaultdict[str, list[Job]] = defaultdict(list)
    for job in sweep.jobs:
        groups[job.point].append(job)
    found = [point_result(jobs, sweep.settings) for jobs in groups.values()]
    sign = 0 if sweep.unranked is not None else _sign(sweep.settings)
    counting = sorted((one for one in found if one.values), key=lambda one: sign * (one.mean or 0.0))
    stopped = [one for one in found if not one.values and one.stopped]
    return [*counting, *sorted(stopped, key=lambda one: (-one.last[0], sign * one.last[1]) if one.last else (0, 0.0))]


def last_measured(folder: Path, metric: str) -> tuple[int, float] | None:
    """(update, value) of the last row of a run that has a metric as a finite number; None without one."""
    # It brings what training prints with, which a command that is refused need not wait for.
    from llama_lab.training.metrics import read_rows

    path = folder / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return next(((row["update"], value) for row in reversed(rows) if (value := _finite(row.get(metric))) is not None), None)


def fitting_objective(settings: SweepConfig, runs: Sequence[RunConfig], *, is_typed: bool) -> SweepConfig:
    """The settings with bits per byte in the place of a loss a token that nobody typed, where tokenizers differ on one text.

    Args:
        runs: one of each kind that the sweep can have.
        is_typed: whether the objective was typed.

    Raises:
        ConfigError: the objective that was typed is one a token, and tokenizers differ; or the sweep is to stop or choose jobs by
            values that rank nothing.
    """
    keys = _other_tokenizers(runs)
    if keys and not is_typed and settings.objective == LOSS and not _other_texts(runs, BITS):
        settings = replace(settings, objective=BITS)
    if keys and is_typed and _is_by_token(settings.objective) and not _other_texts(runs, BITS):
        rule = f"is one a token, and the tokenizers of the jobs differ ({keys}): a token is not the same for them"
        subject = f"sweep.objective={settings.objective}"
        raise ConfigError([(subject, f"{rule}; sweep.objective={BITS} can be compared")], scope="this sweep")
    if found := ranking_problems(settings, unranked(runs, settings.objective)):
        raise ConfigError(found, scope="this sweep")
    return settings


def ranking_problems(settings: SweepConfig, reason: str | None) -> list[Problem]:
    """What a sweep asks for that takes a ranking where there is none.

    Args:
        reason: why values rank nothing; null: they do.
    """
    if reason is None:
        return []
    found: list[Problem] = []
    instead = "leave it out"
    if settings.halvings is not None:
        rule = f"stops jobs that are behind by {settings.objective}, which says nothing between them: {reason}"
        found.append((f"sweep.halvings={settings.halvings}", f"{rule}; {instead}, or start a sweep for each"))
    if settings.search is Search.optuna:
        rule = f"chooses points by {settings.objective}, which says nothing between them: {reason}"
        found.append(("sweep.search=optuna", f"{rule}; sweep.search=random ranks nothing, or start a sweep for each"))
    return found


def unranked(runs: Sequence[RunConfig], metric: str) -> str | None:
    """Why values of a metric do not rank runs, as a clause; None where they do."""
    if not metric.startswith((*VALIDATED, *TRAINED)):
        return None
    if keys := _other_texts(runs, metric):
        return f"they are {'validated' if metric.startswith(VALIDATED) else 'trained'} on different texts ({keys})"
    if _is_by_token(metric) and (keys := _other_tokenizers(runs)):
        return f"their tokenizers differ ({keys}), and a nat a token is not the same for them"
    return None


def said_of_ranking(settings: SweepConfig, runs: Sequence[RunConfig]) -> str | None:
    """What is to be known of a ranking before it is read; None where it is as one expects."""
    if (reason := unranked(runs, settings.objective)) is not None:
        return f"The jobs are not ranked: {reason}; {measured_alike(reason)}"
    if settings.objective == BITS and (keys := _other_tokenizers(runs)):
        return f"The jobs are ranked by {BITS}: their tokenizers differ ({keys}), and a nat a token is not the same for them"
    return None


def measured_alike(reason: str) -> str:
    """What gives jobs values that do rank them.

    Args:
        reason: why those that they have do not, as `unranked` says it.
    """
    if f"({PART}" in reason:
        return "llama-lab evaluate RUN measures each on all of its text"
    return "llama-lab evaluate RUN TEXT measures each on one text"


def _sign(settings: SweepConfig) -> int:
    return 1 if settings.direction is Direction.minimize else -1


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _is_by_token(metric: str) -> bool:
    return metric.startswith((*VALIDATED, *TRAINED)) and not metric.endswith("bits_per_byte")


def _other_tokenizers(runs: Sequence[RunConfig]) -> str:
    """Keys that give runs different tokenizers; empty where all have the same."""
    if len({repr((run.tokenizer, run.data)) for run in runs}) == 1:
        return ""
    kinds = {_known(run, "tokenizer") or json.dumps(science(run)["tokenizer"], sort_keys=True) for run in runs}
    return "" if len(kinds) == 1 else _differing(runs, ("tokenizer", "data"))


def _other_texts(runs: Sequence[RunConfig], metric: str) -> str:
    """Keys that have runs validated, or trained, on different texts; empty where it is one text."""
    is_validation = metric.startswith(VALIDATED)
    if len({repr(run.data) for run in runs}) > 1:
        texts = {(is_validation and _known(run, "text")) or json.dumps(_chosen(run), sort_keys=True) for run in runs}
        if len(texts) > 1:
            return _differing(runs, ("data",))
    asked = {run.eval.max_tokens if run.eval is not None and is_validation else None for run in runs}
    if len(asked) > 1:
        return PART
    if asked != {None} and _other_tokenizers(runs):
        return f"{PART}={asked.pop()} ends elsewhere for each tokenizer; {PART}=null takes all of it"
    return ""


def _chosen(run: RunConfig) -> dict[str, Any]:
    """What of a config says which text is read."""
    from llama_lab.lab.compare.arms import FEEDING

    return {key: value for key, value in science(run)["data"].items() if f"data.{key}" not in FEEDING}


def _differing(runs: Sequence[RunConfig], nodes: Iterable[str]) -> str:
    """Keys of nodes in which runs differ; where the kind of a node differs, the node."""
    from llama_lab.lab.compare.arms import FEEDING

    found: list[str] = []
    for node in nodes:
        trees = [science(run)[node] for run in runs]
        keys = dict.fromkeys(key for tree in trees for key in tree)
        own = [key for key in keys if len({json.dumps(tree.get(key)) for tree in trees}) > 1 and f"{node}.{key}" not in FEEDING]
        found += [node] if "type" in own else [f"{node}.{key}" for key in own]
    return ", ".join(found)


def _known(run: RunConfig, what: str) -> str | None:
    """Hash of the tokenizer or of the validation text of folders that are prepared already; None where nothing says it yet."""
    data = run.data
    folders = [data.path] if isinstance(data, ShardsConfig) else data.paths if isinstance(data, MixtureConfig) else []
    found: list[str] = []
    with suppress(OSError, ValueError, LookupError, TypeError):
        for folder in folders:
            manifest = json.loads((Path(folder).expanduser() / "manifest.json").read_text(encoding="utf-8"))
            found.append(
                manifest["tokenizer"]["hash"] if what == "tokenizer" else manifest["splits"]["val"]["document_bytes"]["sha256"]
            )
    if not folders or len(found) < len(folders):
        return None
    return json.dumps(sorted(set(found)) if what == "tokenizer" else found)
