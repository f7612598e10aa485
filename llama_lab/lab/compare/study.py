"""Arms of a study against each other: at the end or at equal tokens, FLOPs, seconds or cost, and by the time that a loss takes.

    records -> arms -> one number a run -> pairs by seed -> estimate -> verdict

The first arm is the one that the others are compared with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ConstantConfig, Problem
from llama_lab.lab.compare.arms import LENGTHS, Arm, choose_metric, notes, together, unfinished_runs
from llama_lab.lab.compare.curves import crossing, reach, value_at
from llama_lab.lab.compare.metric_names import is_higher_better
from llama_lab.lab.compare.pairs import pair_runs
from llama_lab.lab.compare.power import Need, need, seeds_needed, visible_effect
from llama_lab.lab.compare.records import AXES, RunRecord
from llama_lab.lab.compare.statistics import LEVEL, Estimate, corrected, estimate_difference
from llama_lab.lab.runs.listing import RUNNING

ROUNDING = 0.01
# Numbers of tokens and the like that differ by less are one place.
CLOSE = 1 + 1e-9
SAME_BUDGET = "train them to the same training_tokens"
BETTER, WORSE, UNDECIDED, SAME, UNKNOWN = "better", "worse", "undecided", "no difference worth having", "cannot be said"


@dataclass(frozen=True)
class Question:
    """What is asked of the arms.

    Attributes:
        metric: key of what is compared; null: the validation loss, or bits per byte between tokenizers.
        at: axis along which the arms get the same; null: their ends, which must be at the same number of tokens.
        place: where on that axis; null: as far as every run has come.
        price: of a device for an hour, for the axis `cost`.
        worth: smallest difference that matters; null: any.
        higher_is_better: null: as the name of the metric says, else false.
        paired: whether runs with the same seeds are pairs; null: where at least half of the larger arm's seeds are common.
        finished_only: whether runs that are not finished are left out instead of refused.
    """

    metric: str | None = None
    at: str | None = None
    place: float | None = None
    price: float | None = None
    worth: float | None = None
    higher_is_better: bool | None = None
    paired: bool | None = None
    finished_only: bool = False


@dataclass(frozen=True)
class Comparison:
    """What can be said of an arm beside the baseline.

    Attributes:
        baseline, arm: who is compared.
        estimate: difference arm - baseline; null with a single seed.
        difference: of the means, whatever the seeds.
        p: corrected for all comparisons of the study; null with a single seed.
        visible: difference that 80 of 100 such comparisons would see, at least 80 if it is one of several; null with a single seed.
        need: seeds that would decide, where it is undecided and pairs share no seed.
        need_for_worth: seeds that would see a difference that is worth having, where one was named.
        verdict: one of the constants above.
        left_out: runs whose seed has no partner.
        sharing: runs left out since they share one of their seeds with a run that counts.
        comparisons: how many there are in the study.
    """

    baseline: Arm
    arm: Arm
    estimate: Estimate | None
    difference: float
    p: float | None
    visible: float | None
    need: Need | None
    need_for_worth: int | None
    verdict: str
    left_out: tuple[RunRecord, ...]
    sharing: tuple[RunRecord, ...]
    comparisons: int


@dataclass(frozen=True)
class Study:
    """Every arm against the first.

    Attributes:
        metric: key of what was compared.
        higher_is_better: how it is read.
        place: where on the axis; null at the end.
        values: of each run, by its name.
        notes: what a reader should know.
    """

    question: Question
    metric: str
    higher_is_better: bool
    place: float | None
    arms: tuple[Arm, ...]
    values: dict[str, float]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def of(self, arm: Arm) -> list[float]:
        """The values of an arm's runs."""
        return [self.values[run.name] for run in arm.runs]


def compare_arms(arms: Sequence[Arm], question: Question) -> Study:
    """Compare every arm with the first.

    Raises:
        ConfigError: they cannot be compared, with every reason.
    """
    all_early = all(run.is_finished or run.is_stopped_early for arm in arms for run in arm.runs)
    arms, left = _finished(arms, question)
    if len(arms) < 2:
        more = "name runs of another config as well, or see llama-lab noise"
        if left:
            rest = f"the arm {arms[0].label} alone" if arms else "nothing"
            if question.finished_only and not all_early:
                raise _refused([("--finished", f"leaves {rest} to compare; the command that started a run goes on with it")])
            rule = f"leave {rest} to compare: the others were stopped early; --at tokens compares at what all have reached"
            raise _refused([("the runs", rule)])
        if sum(len(arm.runs) for arm in arms) == 1:
            raise _refused([(arms[0].runs[0].name, f"is a single run; {more}")])
        raise _refused([("the runs", f"differ in their seeds alone; {more}")])
    metric = choose_metric(arms, question.metric)
    higher = reads_higher(metric, question)
    place, values = _values(arms, metric, question)
    found = [_compare(arms[0], arm, values, question, higher=higher) for arm in arms[1:]]
    said = [*left, *notes(arms), *_shortened(arms, metric, place, question)]
    return Study(question, metric, higher, place, tuple(arms), values, _corrected(found, question, higher=higher), tuple(said))


def reads_higher(metric: str, question: Question) -> bool:
    """Whether higher is better: as was asked, else as the metric's name says; where it says nothing, lower is."""
    return bool(is_higher_better(metric)) if question.higher_is_better is None else question.higher_is_better


def time_to_loss(
    arms: Sequence[Arm], question: Question, target: float | None, axis: str
) -> tuple[float, tuple[Comparison, ...], dict[str, float]]:
    """How much of an axis each arm takes to a loss, beside the first arm.

    Args:
        target: the loss; null: the lowest that every run reaches.
        axis: one of `AXES`.

    Returns:
        The loss; comparisons of the natural logarithm of what it takes; what it takes, by run. The compute multiplier of an arm is
        exp(-effect): how many times as much the baseline takes.

    Raises:
        ConfigError: a run does not reach the loss, or has it before its first validation, so that it is not known when.
    """
    metric = choose_metric(arms, question.metric)
    curves = {run.name: _curve(run, metric, axis, question) for arm in arms for run in arm.runs}
    target = _common_loss(curves, target)
    taken = {name: crossing(curve, target) for name, curve in curves.items()}
    logs = {name: math.log(value) for name, value in taken.items()}
    plain = replace(question, worth=None)
    found_all = [_compare(arms[0], arm, logs, plain, higher=False) for arm in arms[1:]]
    return target, _corrected(found_all, plain, higher=False), taken


def _common_loss(curves: dict[str, list[tuple[float, float]]], target: float | None) -> float:
    """The loss that was asked for, or the lowest that every run reaches; refused where one was not seen to come down to it."""
    lowest = {name: min(value for _, value in curve) for name, curve in curves.items()}
    highest = {name: curve[0][1] for name, curve in curves.items()}
    late, early = max(lowest, key=lambda name: lowest[name]), min(highest, key=lambda name: highest[name])
    least, most = lowest[late], highest[early]
    if least > most:
        rule = f"finds no loss that every run was seen to come down to: {late} reaches {least:.4f}, and {early} is at {most:.4f} "
        raise _refused([("--to-loss", rule + "when it is first validated; train them with a smaller eval.every_updates")])
    if target is not None and not least <= target <= most:
        known = f"from {math.ceil(least * 1e4) / 1e4:.4f} to {math.floor(most * 1e4) / 1e4:.4f}"
        rule = f"is no loss that every run was seen to come down to; try one {known}, or --to-loss alone for the lowest"
        raise _refused([(f"--to-loss {target:g}", rule)])
    return least if target is None else target


def _finished(arms: Sequence[Arm], question: Question) -> tuple[list[Arm], list[str]]:
    """The arms without runs that are not finished, and what is said of those; refused where the question does not allow them."""
    runs = [run for arm in arms for run in arm.runs]
    found = unfinished_runs(runs)
    if not found or (question.at is not None and not question.finished_only):
        return list(arms), []
    # What a sweep has stopped early nobody goes on with: it is left out, and said, without being asked for.
    to_come = unfinished_runs([run for run in runs if not run.is_stopped_early])
    if to_come and not question.finished_only:
        found = together(to_come)
        is_training = all(run.status in ("finished", RUNNING) for run in runs if not run.is_stopped_early)
        rule = "; wait for it" if is_training else "; the command that started it goes on with it"
        rule += ", --finished leaves such runs out, --at tokens compares at what all have reached"
        if any(run.folder is None for arm in arms for run in arm.runs):
            rule = "; --finished leaves such runs out"
        raise _refused([(name, said + rule if number == 0 else said) for number, (name, said) in enumerate(found)])
    kept = [replace(arm, runs=tuple(run for run in arm.runs if run.is_finished)) for arm in arms]
    said = [f"left out: {name} {rule}" for name, rule in found]
    gone = [arm.label for arm in kept if not arm.runs]
    return [arm for arm in kept if arm.runs], said + [f"left out: {label}, none of whose runs is finished" for label in gone]


def _values(arms: Sequence[Arm], metric: str, question: Question) -> tuple[float | None, dict[str, float]]:
    """(place, value of each run there)."""
    runs = [run for arm in arms for run in arm.runs]
    if question.at is None:
        _same_budget(runs, metric)
        problems, values = [], {}
        for run in runs:
            value = run.last(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                values[run.name] = float(value)
            else:
                said = "no finite number" if value is None else repr(value)
                problems.append((run.name, f"has {said} as its last {metric}; it cannot be in a mean, leave it out and say so"))
        if problems:
            raise _refused(problems)
        return None, values
    curves = {run.name: _curve(run, metric, question.at, question) for run in runs}
    place = _common_place(curves, question)
    return place, {name: value_at(curve, place) for name, curve in curves.items()}


def _common_place(curves: dict[str, list[tuple[float, float]]], question: Question) -> float:
    """Where on the axis the runs are looked at; refused where one of them was not measured before and behind it."""
    late, early = max(curves, key=lambda name: curves[name][0][0]), min(curves, key=lambda name: reach(curves[name]))
    start, end = curves[late][0][0], reach(curves[early])
    if start > end * CLOSE:
        rule = f"finds no place at which all runs were measured: {late} is first at {start:.6g}, {early} ends at {end:.6g}; "
        raise _refused([(f"--at {question.at}", rule + f"{SAME_BUDGET}, or with a smaller eval.every_updates")])
    if question.place is None:
        return end
    if not start <= question.place * CLOSE or not question.place <= end * CLOSE:
        rule = f"is not where all runs were measured; that is from {start:.6g} to {end:.6g}, and --at {question.at} takes the last"
        raise _refused([(f"--at {question.at}={question.place:.6g}", rule)])
    return question.place


def _curve(run: RunRecord, metric: str, axis: str, question: Question) -> list[tuple[float, float]]:
    """A run's curve along an axis, every point of it a finite number."""
    if axis not in AXES:
        raise _refused([(f"--at {axis}", f"is no axis; there are {', '.join(AXES)}")])
    if run.folder is None:
        raise _refused([(run.name, "comes from a CSV, which has last values only; name the run's folder")])
    if axis == "cost" and question.price is None:
        raise _refused([("cost", "needs the price of a device for an hour: --price 2.5")])
    if axis == "flops" and math.isnan(run.flops_per_token):
        raise _refused([(run.name, "has lost its tokenizer.json, so its FLOPs are not known; compare at tokens or seconds")])
    points = [(place, value) for place, value in run.curve(metric, axis, question.price or 0.0) if place > 0]
    if broken := [place for place, value in points if value is None]:
        raise _refused([(run.name, f"has no finite {metric} at {axis}={broken[0]:.6g}; leave it out and say so")])
    if not points:
        raise _refused([(run.name, f"has no {metric} along {axis}")])
    return [(place, value) for place, value in points if value is not None]


def _same_budget(runs: Sequence[RunRecord], metric: str) -> None:
    """Refuse ends at different numbers of tokens, beyond what whole updates of different size leave of one budget."""
    measured = [[row["tokens"] for row in run.rows if metric in row and "tokens" in row] for run in runs]
    is_shared = all(measured) and max(places[0] for places in measured) <= min(places[-1] for places in measured)
    instead = "--at tokens, flops, seconds or cost gives both the same" if is_shared else SAME_BUDGET
    first, ours = runs[0].name, _tokens(runs[0])
    problems: list[Problem] = []
    for run in runs[1:]:
        theirs = _tokens(run)
        if ours is not None and theirs is not None and abs(theirs - ours) > ROUNDING * ours:
            said = f"was trained on {theirs:,.0f} tokens, {first} on {ours:,.0f}"
            problems.append((run.name, f"{said}; {instead}"))
        elif (theirs is None or ours is None) and (said := _other_length(runs[0], run)):
            problems.append((run.name, said))
    if problems:
        raise _refused(problems)


def _other_length(first: RunRecord, run: RunRecord) -> str | None:
    """That two lines of a table that do not say their tokens were trained for unequal numbers of steps."""
    for key in LENGTHS:
        ours, theirs = ([row[key] for row in one.rows if isinstance(row.get(key), int | float)] for one in (first, run))
        if ours and theirs and abs(theirs[-1] - ours[-1]) > ROUNDING * ours[-1]:
            return f"ends at {key}={theirs[-1]:,g}, {first.name} at {ours[-1]:,g}; --ignore {key} if both had the same budget"
    return None


def _tokens(run: RunRecord) -> float | None:
    found = [row["tokens"] for row in run.rows if isinstance(row.get("tokens"), int | float)]
    said = run.values.get("training_tokens")
    return max(found) if found else said if isinstance(said, int | float) else None


def _shortened(arms: Sequence[Arm], metric: str, place: float | None, question: Question) -> list[str]:
    """Runs that are looked at before their end, where a schedule has not come down yet."""
    if place is None or question.at is None:
        return []
    ends = {arm.label: max(reach(_curve(run, metric, question.at or "tokens", question)) for run in arm.runs) for arm in arms}
    early = [arm for arm in arms if ends[arm.label] > place * CLOSE]
    steady = [arm.label for arm in early if all(run.run and isinstance(run.run.schedule, ConstantConfig) for run in arm.runs)]
    falling = [arm.label for arm in early if arm.label not in steady]
    found = [f"before its end, with a learning rate that has yet to fall, is looked at: {', '.join(falling)}"] if falling else []
    return [*found, f"before its end is looked at: {', '.join(steady)}"] if steady else found


def _compare(baseline: Arm, arm: Arm, values: dict[str, float], question: Question, *, higher: bool) -> Comparison:
    """Two arms, before any correction."""
    pairs = pair_runs(baseline, arm, paired=question.paired)
    a, b = (np.array([values[run.name] for run in runs]) for runs in (pairs.ours, pairs.theirs))
    difference = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2:
        return Comparison(baseline, arm, None, difference, None, None, None, None, UNKNOWN, pairs.alone, pairs.sharing, 1)
    found = estimate_difference(a, b, paired=pairs.paired, crossed=pairs.crossed)
    return Comparison(
        baseline=baseline,
        arm=arm,
        estimate=found,
        difference=difference,
        p=found.p,
        visible=None,
        need=None,
        need_for_worth=None,
        verdict=_verdict(found, found.p, question, higher=higher),
        left_out=pairs.alone,
        sharing=pairs.sharing,
        comparisons=1,
    )


def _corrected(found: list[Comparison], question: Question, *, higher: bool) -> tuple[Comparison, ...]:
    """Comparisons with their p-values corrected for each other, and what follows from those."""
    tested = [one for one in found if one.estimate is not None]
    p = corrected([one.estimate.p for one in tested if one.estimate], [one.estimate.t_p for one in tested if one.estimate])
    by_arm = dict(zip((one.arm.label for one in tested), p, strict=True))
    done: list[Comparison] = []
    for one in found:
        if one.estimate is None:
            done.append(replace(one, comparisons=len(tested)))
            continue
        own = by_arm[one.arm.label]
        verdict = _verdict(one.estimate, own, question, higher=higher)
        # More crossed pairs may bring more seeds of one kind alone, so that no number of them says what they would decide.
        undecided = verdict == UNDECIDED and one.estimate.design.crossed is None
        design, noise, count = one.estimate.design, one.estimate.noise, len(tested)
        done.append(
            replace(
                one,
                p=own,
                visible=visible_effect(noise, design.degrees_of_freedom, design, count),
                verdict=verdict,
                comparisons=count,
                need=need(one.difference, noise, design, count) if undecided else None,
                need_for_worth=seeds_needed(question.worth, noise, paired=design.paired, comparisons=count)
                if undecided and question.worth
                else None,
            )
        )
    return tuple(done)


def _verdict(found: Estimate, p: float, question: Question, *, higher: bool) -> str:
    if question.worth is not None and -question.worth < found.low and found.high < question.worth:
        return SAME
    if p >= LEVEL or found.low <= 0 <= found.high:
        return UNDECIDED
    return BETTER if (found.effect > 0) == higher else WORSE


def _refused(problems: list[Problem]) -> ConfigError:
    return ConfigError(together(problems), scope="this comparison")
