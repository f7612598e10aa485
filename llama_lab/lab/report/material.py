"""What a report is about: runs, their arms, the comparison that `compare` makes of them, or why it makes none."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import is_science
from llama_lab.config.schema import Problem, shown
from llama_lab.lab.compare.arms import LOSS, TRAINING_LOSS, Arm, choose_metric, group_arms, together
from llama_lab.lab.compare.question import baseline_first
from llama_lab.lab.compare.records import SEEDS, RunRecord, in_order, load_records
from llama_lab.lab.compare.study import Question, Study, compare_arms, reads_higher
from llama_lab.lab.compare.verdicts import times_to_loss
from llama_lab.lab.runs.sweeps import SWEEP_FILE, has_typed_order, read_sweep
from llama_lab.lab.sweep.space import as_meant
from llama_lab.training.scrub import scrub_command

MOST_KEYS = 8
LOST = "is finished, and its metrics.jsonl is missing; put it back from a copy, or train it anew with fresh=true"


@dataclass(frozen=True)
class SweepPoints:
    """What a sweep tried.

    Attributes:
        folder: the sweep's.
        keys: swept keys, seeds left out.
        values: swept key -> value, of each run, by its folder.
        objective: the metric that ranks them.
        higher_is_better: how it is read.
        missing: (job, what became of it) where there is no run to look at.
        is_log: of keys drawn from an interval, whether evenly over its logarithm.
    """

    folder: Path
    keys: list[str]
    values: dict[Path, dict[str, str]]
    objective: str
    higher_is_better: bool
    missing: list[Problem]
    is_log: dict[str, bool]


@dataclass(frozen=True)
class Asked:
    """What was typed beside the runs.

    Attributes:
        question: what is compared.
        baseline, ignore: as `compare` takes them.
        is_timed: whether it is asked what a loss takes.
        to_loss: that loss; null: the lowest that every run reaches.
        title: null: the study's name.
    """

    question: Question = field(default_factory=Question)
    baseline: str | None = None
    ignore: Sequence[str] = ()
    is_timed: bool = False
    to_loss: float | None = None
    title: str | None = None


@dataclass(frozen=True)
class Material:
    """Everything that a report is made from.

    Attributes:
        title: what it is called.
        command: what makes it again.
        question: what was asked.
        arms: all of them, the baseline first.
        metric: key of what is compared.
        higher_is_better: how it is read.
        study: the comparison; null where there is none.
        refused: why there is none.
        is_comparable: whether values of the metric mean the same in all runs.
        times: a loss, and lines of a table of what it takes.
        times_refused: why there are none although they were asked for.
        sweep: what was swept, where the report is one sweep's.
    """

    title: str
    command: list[str]
    question: Question
    arms: list[Arm]
    metric: str
    higher_is_better: bool
    study: Study | None
    refused: list[Problem]
    is_comparable: bool
    times: tuple[float, list[list[str]]] | None
    times_refused: list[Problem]
    sweep: SweepPoints | None

    @property
    def runs(self) -> list[RunRecord]:
        """Every run, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]

    def ranked(self) -> list[int]:
        """Numbers of the arms, the best first; then those that nothing finished of, and those that nothing was measured of last.

        In their order where the metric does not mean the same for all of them.
        """
        ends = [arm_end(arm, self.metric) for arm in self.arms]
        lasts = [arm_last(arm, self.metric) for arm in self.arms]
        sign = 0 if not self.is_comparable else -1 if self.higher_is_better else 1

        def place(number: int) -> tuple[int, int, float, int]:
            end, last = ends[number], lasts[number]
            if end is not None or last is None:
                return (2 if end is None else 0, 0, sign * (end or 0.0), number)
            return (1, -last[0], sign * last[1], number)

        return sorted(range(len(ends)), key=place)


def gather(words: Sequence[str], asked: Asked, command: Sequence[str]) -> Material:
    """The runs that words name, and what `compare` says of them.

    Raises:
        ConfigError: there is no such run, one is there twice, or a flag fits none of them.
    """
    sweep = _read_sweep(words)
    records = _short_names(load_records(words, metric=asked.question.metric) if sweep is None else _records_of(sweep))
    question = asked.question if sweep is None else _question_of(sweep, asked.question, records)
    if question.price is None:
        question = replace(question, price=_recorded_price(records))
    arms = baseline_first(group_arms(records, asked.ignore), asked.baseline)
    metric, problems, is_comparable = _metric(arms, question)
    study, refused, times, times_refused = None, problems, None, []
    if not problems:
        try:
            study = compare_arms(arms, question)
        except ConfigError as error:
            # Of a sweep what is not finished is left out without being asked for.
            unasked = "--finished" if not asked.question.finished_only else ""
            refused = [("What is finished" if subject == unasked else subject, rule) for subject, rule in error.problems]
    if any(subject.startswith("--") or subject == "cost" for subject, _ in refused):
        # What was typed is wrong, not the runs.
        raise ConfigError(refused, scope="this report")
    if study is not None and asked.is_timed:
        try:
            times = times_to_loss(study, asked.to_loss)
        except ConfigError as error:
            times_refused = error.problems
    return Material(
        title=asked.title or _title(records, sweep),
        command=scrub_command(list(command)),
        question=question,
        arms=arms,
        metric=metric,
        higher_is_better=reads_higher(metric, question),
        study=study,
        refused=refused,
        is_comparable=is_comparable,
        times=times,
        times_refused=times_refused,
        sweep=sweep,
    )


def last_value(run: RunRecord, metric: str) -> float | None:
    """What a run ended with, as a number; None if that is none, or it was never measured."""
    value = next((row[metric] for row in reversed(run.rows) if metric in row), None)
    return float(value) if isinstance(value, int | float) else None


def lost_rows(run: RunRecord) -> bool:
    """Whether a run was trained to its end and what it measured is gone."""
    return run.is_finished and run.folder is not None and not (run.folder / "metrics.jsonl").is_file()


def counts(run: RunRecord) -> bool:
    """Whether a run is at its end, so that what it ended with may be averaged and ranked."""
    return run.is_finished or run.folder is None


def is_drawn(run: RunRecord, arm: Arm) -> bool:
    """Whether a run is part of its arm's curve: one that was stopped early is not where others of the arm are at their end."""
    return run.folder is not None and not (run.is_stopped_early and any(map(counts, arm.runs)))


def arm_end(arm: Arm, metric: str) -> float | None:
    """The mean of what an arm's runs ended with, as far as they are finished and ended with a number."""
    values = [value for run in arm.runs if counts(run) and (value := last_value(run, metric)) is not None]
    return sum(values) / len(values) if values else None


def arm_last(arm: Arm, metric: str) -> tuple[int, float] | None:
    """(update, value) of the last that was measured of an arm's runs, the mean of those that came furthest; None if nothing was."""
    found = []
    for run in arm.runs:
        row = next((row for row in reversed(run.rows) if isinstance(row.get(metric), int | float)), None)
        if row is not None:
            found.append((row.get("update", 0), row[metric]))
    furthest = [value for update, value in found if update == max(update for update, _ in found)]
    return (max(update for update, _ in found), sum(furthest) / len(furthest)) if found else None


def brief_labels(arms: Sequence[Arm]) -> list[str]:
    """As little of each arm as tells it from the others: `muon`, `max_lr=0.01`; where nothing short does, its label."""
    keys = dict.fromkeys(key for arm in arms for key in arm.values)
    said = {key: [_brief(key, arm.values.get(key, "-")) for arm in arms] for key in keys}
    # The kind of a part says more than a number of it.
    differing = sorted((key for key in keys if len(set(said[key])) > 1), key=lambda key: "." in key)[:MOST_KEYS]
    for key in differing:
        if len(set(said[key])) == len(arms):
            return said[key]
    for first, second in itertools.combinations(differing, 2):
        if len(set(zip(said[first], said[second], strict=True))) == len(arms):
            alone = {word for word, times in Counter(said[first]).items() if times == 1}
            pairs = zip(said[first], said[second], strict=True)
            return [word if word in alone else f"{word} {more}" for word, more in pairs]
    return [arm.label for arm in arms]


def _brief(key: str, value: Any) -> str:
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    return shown(value) if "." not in key and isinstance(value, str) else f"{key.rpartition('.')[2]}={shown(value)}"


def _metric(arms: list[Arm], question: Question) -> tuple[str, list[Problem], bool]:
    """The metric, why nothing can be compared by it, and whether what there is of it means the same in all runs.

    Runs that have none of it yet do not make the others incomparable, nor, where finished runs alone are compared, those that ended
    before they had any. Where nobody has validated, the training loss is shown.
    """
    metric = question.metric or LOSS
    begun = [run for arm in arms for run in arm.runs if run.rows]
    if question.finished_only and any(metric in row for run in begun for row in run.rows):
        begun = [run for run in begun if counts(run) or any(metric in row for row in run.rows)]
    measured = [replace(arm, runs=runs) for arm in arms if (runs := tuple(run for run in arm.runs if run in begun))]
    if not measured:
        runs = [run for arm in arms for run in arm.runs]
        return metric, together([(run.name, LOST if lost_rows(run) else "has no metrics yet; train it") for run in runs]), True
    try:
        return choose_metric(measured, question.metric), [], True
    except ConfigError as error:
        keys = [{key for row in run.rows for key in row} for arm in measured for run in arm.runs]
        is_untold = question.metric is None and not any(metric in own for own in keys)
        shown_metric = TRAINING_LOSS if is_untold and any(TRAINING_LOSS in own for own in keys) else metric
        return shown_metric, error.problems, not all(metric in own for own in keys)


def _read_sweep(words: Sequence[str]) -> SweepPoints | None:
    """The sweep, where one is all that was named."""
    folder = Path(words[0]).expanduser()
    folder = folder.parent if folder.name == "summary.csv" else folder
    if len(words) != 1 or not (folder / SWEEP_FILE).is_file():
        return None
    folder = folder.absolute()
    known = read_sweep(folder)
    values: dict[Path, dict[str, str]] = {}
    missing: list[Problem] = []
    for job in known["jobs"]:
        run = (folder / job["folder"]).resolve()
        if (run / "config.yaml").is_file():
            values[run] = {key: as_meant(text) for key, text in job["values"].items()}
        else:
            said = " ".join(f"{key}={value}" for key, value in job["values"].items())
            missing.append((f"job {job['number']} ({said})", f"left no run: {_status(folder, job['number'])}"))
    keys = [axis["key"] for axis in known["axes"] if axis["key"] not in SEEDS]
    settings = known["settings"]
    logs = {axis["key"]: axis["is_log"] for axis in known["axes"] if not axis["choices"]}
    return SweepPoints(folder, keys, values, settings["objective"], settings["direction"] == "maximize", missing, logs)


def _status(folder: Path, number: int) -> str:
    path = folder / "jobs" / f"{number:04}" / "outcome.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.is_file() else "not started"


def _records_of(sweep: SweepPoints) -> list[RunRecord]:
    """The runs of a sweep that are there. What was swept outside the science tells its runs apart as well."""
    found: list[RunRecord] = []
    for folder, values in sweep.values.items():
        try:
            (record,) = load_records([str(folder)])
        except ConfigError as error:
            sweep.missing.extend(error.problems)
            continue
        own = {key: value for key, value in values.items() if not is_science(key) and "." in key}
        found.append(replace(record, values=record.values | own))
    if not found:
        rule = "is a sweep without a run to look at yet"
        raise ConfigError(sweep.missing or [(str(sweep.folder), rule)], scope="this report")
    return found if has_typed_order(sweep.folder) else in_order(found)


def _question_of(sweep: SweepPoints, question: Question, records: list[RunRecord]) -> Question:
    """The question as a sweep means it: by its objective; and without jobs that failed or were stopped early, which are named."""
    is_measured = any(sweep.objective in row for record in records for row in record.rows)
    metric = question.metric or (sweep.objective if is_measured and sweep.objective != LOSS else None)
    higher = question.higher_is_better
    if higher is None and (metric or LOSS) == sweep.objective:
        higher = sweep.higher_is_better
    return replace(question, metric=metric, higher_is_better=higher, finished_only=question.finished_only or question.at is None)


def _recorded_price(records: list[RunRecord]) -> float | None:
    """The price of a GPU for an hour, where all runs were given the same."""
    prices = {None if record.run is None else record.run.budget.gpu_hour_price for record in records}
    return prices.pop() if len(prices) == 1 else None


def _short_names(records: list[RunRecord]) -> list[RunRecord]:
    """Runs by study and id, wherever they lie and from wherever the report is made, as far as that tells them apart."""
    short = [record.name if record.folder is None else f"{record.folder.parent.name}/{record.folder.name}" for record in records]
    if len(set(short)) < len(short):
        return records
    return [replace(record, name=name) for record, name in zip(records, short, strict=True)]


def _title(records: list[RunRecord], sweep: SweepPoints | None) -> str:
    names = list(dict.fromkeys(record.run.name for record in records if record.run is not None))
    study = ", ".join(names[:3]) + (", …" if len(names) > 3 else "") or "Runs of a table"
    return f"{study}: sweep over {', '.join(sweep.keys)}" if sweep is not None and sweep.keys else study
