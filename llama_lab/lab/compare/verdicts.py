"""Comparisons in words and table cells: what `llama-lab compare` prints, and what a report can show beside its curves."""

import math
import statistics

from scipy import special

from llama_lab.lab.compare.arms import Arm
from llama_lab.lab.compare.metric_names import is_higher_better
from llama_lab.lab.compare.noise import family, find_floor
from llama_lab.lab.compare.power import MOST_SEEDS, POWER, Need
from llama_lab.lab.compare.records import AXES
from llama_lab.lab.compare.statistics import LEVEL, Estimate
from llama_lab.lab.compare.study import BETTER, SAME, UNDECIDED, WORSE, Comparison, Study, time_to_loss

AXIS_UNITS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds", "cost": "of money"}
ARM_HEADINGS = ("arm", "runs", "mean", "sd", "seeds")
VERDICT_HEADINGS = ("arm", "difference", "95 % interval", "p", "smallest visible", "verdict")
TIME_HEADINGS = ("arm", "of", "baseline takes", "arm takes", "multiplier", "95 % interval", "p", "verdict")
TIME_NOTE = "multiplier: how many times as much the baseline takes; 2 is half the price"

SHARED = "Pairs that share no seed say more: -m seed.init=0,1,2,3,4 'seed.data=${seed.init}' makes such runs"
MOST_NAMES = 4
# Of a difference: what double precision may leave of values a million times as large.
ROUNDING_ERROR = 1e-9


def sentence(study: Study, one: Comparison) -> str:
    """The verdict on one arm, with everything that it rests on."""
    found, metric = one.estimate, study.metric
    if found is None:
        return _single(study, one)
    digits = _digits(found)
    moved = "higher" if one.difference > 0 else "lower"
    size = f"{metric} {abs(one.difference):.{digits}f} {moved} ({100 - 100 * LEVEL:.0f} %: {_span(found, digits)}), {_p(one)}"
    size += f", {_runs(found)}"
    if one.verdict == SAME:
        worth = study.question.worth
        return f"{one.arm.label}: no difference worth having; {size}; the whole interval lies within {worth:g} of 0"
    if one.verdict in (BETTER, WORSE):
        return f"{one.arm.label} is {one.verdict} than {one.baseline.label}: {size}"
    said = f"{one.arm.label}: undecided; {size}. {SHARED if found.design.crossed else needed(one.need, found)}"
    if one.need_for_worth is not None:
        said = said.rstrip(" .") + f". A difference of {study.question.worth:g} takes {one.need_for_worth} seeds an arm"
    return said


def needed(need: Need | None, found: Estimate) -> str:
    """How many more seeds would decide, in words."""
    if need is None:
        return ""
    if found.design.paired and found.effect == found.noise == 0:
        return "Every pair ended with the same value: what differs changed nothing in these runs"
    have = min(found.design.a, found.design.b)
    if need.seeds is None:
        return f"If the difference is what it looks like, even {MOST_SEEDS} seeds an arm would not decide"
    more = max(1, need.seeds - have)
    ends = " to ".join(
        f"more than {MOST_SEEDS - have}" if end is None else str(max(1, end - have)) for end in (need.fewest, need.most)
    )
    said = f"{more} more seed{'s' if more > 1 else ''} an arm would decide, if the difference is what it looks like"
    return f"{said} (from what is known of it: {ends})"


def cells(study: Study, one: Comparison) -> list[str]:
    """Difference, interval, p, visible difference, verdict: a line of the table."""
    if one.estimate is None or one.p is None or one.visible is None:
        return [f"{one.difference:+.4f}", "", "", "", one.verdict]
    digits = _digits(one.estimate)
    interval = f"{one.estimate.low:+.{digits}f} to {one.estimate.high:+.{digits}f}"
    verdict = one.verdict
    if verdict == UNDECIDED and one.need is not None and one.need.seeds is not None:
        more = max(1, one.need.seeds - min(one.estimate.design.a, one.estimate.design.b))
        verdict += f", {more} more seed{'s' if more > 1 else ''}"
    return [f"{one.difference:+.{digits}f}", interval, short_p(one.p), f"{one.visible:.{digits}f}", verdict]


def arm_cells(study: Study, arm: Arm) -> list[str]:
    """Name, runs, mean, standard deviation, seeds: a line of the table of arms."""
    values = study.of(arm)
    sd = f"{statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return [arm.label, str(len(values)), f"{statistics.fmean(values):.4f}", sd, _seeds(arm)]


def _seeds(arm: Arm) -> str:
    """The seeds of an arm's runs: one number each where those of weights and of data are the same."""
    if not all(run.seed for run in arm.runs):
        return "unknown"
    if any(len(run.seed) != 2 for run in arm.runs) or all(len(set(run.seed)) == 1 for run in arm.runs):
        return " ".join(run.seed_said for run in arm.runs)
    init, data = (list(dict.fromkeys(run.seed[part] for run in arm.runs)) for part in (0, 1))
    if min(len(init), len(data)) == 1:
        return f"init {' '.join(map(str, init))}, data {' '.join(map(str, data))}"
    return " ".join("/".join(map(str, run.seed)) for run in arm.runs) + " (init/data)"


def times_to_loss(study: Study, target: float | None) -> tuple[float, list[list[str]]]:
    """The loss, and what it takes of each axis: lines of a table under `TIME_HEADINGS`.

    Args:
        target: the loss; null: the lowest that every run reaches.

    Raises:
        ConfigError: a run does not reach the loss, or it is not known when it did.
    """
    rows: list[list[str]] = []
    for axis in [axis for axis in AXES if axis != "cost" or study.question.price is not None]:
        target, found, taken = time_to_loss(study.arms, study.question, target, axis)
        rows += [_time_cells(one, axis, taken) for one in found]
    assert target is not None
    return target, rows


def _time_cells(one: Comparison, axis: str, taken: dict[str, float]) -> list[str]:
    means = [math.exp(statistics.fmean(math.log(taken[run.name]) for run in arm.runs)) for arm in (one.baseline, one.arm)]
    what = [one.arm.label, AXIS_UNITS[axis], *[f"{mean:{',.0f' if axis == 'tokens' else '.4g'}}" for mean in means]]
    found = multiplier(one)
    if found is None or one.p is None:
        return [*what, f"{means[0] / means[1]:.3f}", "", "", one.verdict]
    middle, low, high = found
    return [*what, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", short_p(one.p), one.verdict]


def multiplier(one: Comparison) -> tuple[float, float, float] | None:
    """How many times as much the baseline takes as the arm, with its interval; null with a single seed."""
    if one.estimate is None:
        return None
    return math.exp(-one.estimate.effect), math.exp(-one.estimate.high), math.exp(-one.estimate.low)


def short_p(p: float) -> str:
    """A p-value with two significant digits."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _p(one: Comparison) -> str:
    assert one.p is not None and one.estimate is not None
    if one.comparisons == 1:
        return f"p = {short_p(one.p)}".replace("= <", "<")
    corrected, uncorrected = short_p(one.p), short_p(one.estimate.p)
    other = "the same" if corrected == uncorrected else uncorrected
    return f"p = {corrected} corrected for {one.comparisons} comparisons ({other} uncorrected)".replace("= <", "<")


def _runs(found: Estimate) -> str:
    if found.design.crossed is not None:
        freedom, seeds = found.design.degrees_of_freedom, " x ".join(map(str, found.design.crossed))
        said = f"{found.design.a} pairs of equal seeds, {seeds} seeds crossed: pairs that share one are not independent"
        return f"{said}, which leaves {freedom} degree{'s' if freedom > 1 else ''} of freedom"
    if found.design.paired:
        return f"{found.design.a} pairs of equal seeds"
    return f"{found.design.b} against {found.design.a} runs, taken as independent"


def _span(found: Estimate, digits: int) -> str:
    """An interval in words that say which way."""
    low, high = found.low, found.high
    if low < 0 < high:
        return f"from {-low:.{digits}f} lower to {high:.{digits}f} higher"
    near, far = sorted((abs(low), abs(high)))
    return f"{near:.{digits}f} to {far:.{digits}f}"


def _digits(found: Estimate) -> int:
    """Decimals that show two significant digits of half the interval."""
    half = (found.high - found.low) / 2
    # Pairs that all differ by the same leave an interval of nothing but rounding.
    if half <= ROUNDING_ERROR * abs(found.effect):
        half = abs(found.effect)
    if not half or not math.isfinite(half):
        return 4
    return max(0, 1 - math.floor(math.log10(half)))


def _single(study: Study, one: Comparison) -> str:
    few = min((one.baseline, one.arm), key=lambda arm: len(arm.runs))
    said = f"{one.arm.label}: cannot be said; {study.metric} is {abs(one.difference):.4f} "
    moved = "higher" if one.difference > 0 else "lower"
    said += f"{moved}, but {few.label} has a single seed, so nobody knows how much of that is chance"
    ours, theirs = one.baseline.runs[0], one.arm.runs[0]
    # One family's noise says nothing of another's, and a difference has that of both.
    floor = find_floor(ours) if family(ours.values) == family(theirs.values) else None
    scatter = None if floor is None else floor.of(study.metric)
    if scatter is None or study.place is not None:
        more = "" if one.baseline.runs[0].folder is None else "; llama-lab noise measures what one seed hides"
        return f"{said}. Two seeds an arm are the least, five are usual{more}"
    without = (*one.left_out, *one.sharing)
    runs = sum(1 / sum(run not in without for run in arm.runs) for arm in (one.baseline, one.arm))
    bound = float(special.stdtrit(scatter.degrees_of_freedom, 1 - LEVEL / 2)) * scatter.sd * math.sqrt(runs)
    place = "inside" if abs(one.difference) < bound else "beyond"
    return f"{said}. The noise floor of this config lets such runs differ by {bound:.2g} in 95 of 100 cases; this is {place} it"


def left_out(study: Study) -> list[str]:
    """Runs that no comparison with the baseline took, and why."""
    found = []
    for one in study.comparisons:
        if one.left_out:
            names = ", ".join(run.name for run in one.left_out)
            found.append(f"{one.arm.label}: without a partner of the same seed, and so left out: {names}")
        if one.sharing:
            names = ", ".join(run.name for run in one.sharing[:MOST_NAMES]) + (", …" if len(one.sharing) > MOST_NAMES else "")
            rule = "left out, since they share a seed with a run that counts and so are not independent of it"
            found.append(f"{one.arm.label}: {len(one.sharing)} runs {rule}: {names}")
    return found


def headline(study: Study) -> str:
    """What was compared, where, and how it is read."""
    where = "at the end"
    if study.place is not None:
        where = f"at {study.place:,.6g} {AXIS_UNITS[study.question.at or 'tokens']}"
    return f"{study.metric} {where}; {'higher' if study.higher_is_better else 'lower'} is better{_assumed(study)}"


def _assumed(study: Study) -> str:
    """Where the reader should know that nobody said which way is better."""
    known = is_higher_better(study.metric)
    if study.question.higher_is_better is not None or known is False or study.metric.startswith("speed/"):
        return ""
    return " by its name (else --lower)" if known else ", as its name does not say (else --higher)"


def footnote(study: Study) -> str:
    """How the numbers are meant."""
    if all(one.visible is None for one in study.comparisons):
        return ""
    tested = max(one.comparisons for one in study.comparisons)
    seen = f"{100 * POWER:.0f} of 100 such comparisons would see"
    if tested > 1:
        seen = f"at least {seen}, corrected for {tested}"
    return f"smallest visible: a true difference that {seen}, if noise is about normal"
