"""`llama-lab compare`: what it makes of the words after it, and what it prints."""

import argparse
import math
import statistics

from llama_lab.config.errors import ConfigError
from llama_lab.lab.arms import Arm, group_arms
from llama_lab.lab.compare import Comparison, Question, Study, compare_arms, time_to_loss
from llama_lab.lab.records import AXES, load_records
from llama_lab.lab.table import print_table
from llama_lab.lab.verdicts import AXIS_UNITS, cells, footnote, headline, multiplier, sentence, short_p

AUTO = "auto"


def run_compare_command(words: list[str]) -> int:
    """Compare runs and print the verdicts.

    Args:
        words: what follows `compare` on the command line.

    Returns:
        The exit code: 0 compared, 2 not understood.

    Raises:
        ConfigError: the runs cannot be found or compared, with the reasons.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    at, place = _place(asked.at)
    question = Question(
        metric=asked.metric,
        at=at,
        place=place,
        price=asked.price,
        worth=asked.worth,
        higher_is_better=True if asked.higher else None,
        paired=False if asked.unpaired else None,
        finished_only=asked.finished,
    )
    arms = _baseline_first(group_arms(load_records(asked.runs), asked.ignore), asked.baseline)
    study = compare_arms(arms, question)
    _show(study)
    if asked.to_loss is not None:
        target = None if asked.to_loss == AUTO else _number(asked.to_loss, "--to-loss")
        _show_times(study, target)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-lab compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Which config is better, by how much, and how sure. Runs that differ only in seed are one arm; arms are\n"
        "paired by seed; every arm is compared with the first.\n\n"
        "  llama-lab compare outputs/study                      every run in a folder\n"
        "  llama-lab compare 'outputs/study/*wsd*' 'outputs/study/*cosine*'\n"
        "  llama-lab compare outputs/study/sweeps/schedule-1f2e --at flops --to-loss\n"
        "  llama-lab compare wandb_export.csv --metric eval/accuracy --higher",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="run folders, folders of runs, patterns, sweeps, or W&B's CSV of runs"
    )
    parser.add_argument("--metric", metavar="KEY", help="what is compared (default: val/loss, or bits per byte between tokenizers)")
    parser.add_argument("--baseline", metavar="TEXT", help="the arm that the others are compared with, by a part of its name")
    parser.add_argument(
        "--at",
        metavar="AXIS[=X]",
        help=f"compare at equal {', '.join(AXES)}: as far as all have come, or at X (default: at the end)",
    )
    parser.add_argument("--price", type=float, metavar="P", help="of one device for an hour, for --at cost")
    parser.add_argument(
        "--to-loss", nargs="?", const=AUTO, metavar="L", help="also what a loss takes (default: the lowest that every run reaches)"
    )
    parser.add_argument("--worth", type=float, metavar="D", help="the smallest difference that matters to you")
    parser.add_argument("--higher", action="store_true", help="higher is better (known of speed/tokens_per_second)")
    parser.add_argument("--unpaired", action="store_true", help="do not pair runs by seed")
    parser.add_argument("--finished", action="store_true", help="leave out runs that are not finished")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a config key that makes no difference; repeatable"
    )
    return parser


def _place(text: str | None) -> tuple[str | None, float | None]:
    if text is None:
        return None, None
    axis, equals, value = text.partition("=")
    if axis not in AXES:
        raise ConfigError([(f"--at {text}", f"is no axis; there are {', '.join(AXES)}")], scope="this request")
    return axis, _number(value, f"--at {axis}") if equals else None


def _number(text: str, flag: str) -> float:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError([(f"{flag}={text}", "is no number above 0")], scope="this request")
    return value


def _baseline_first(arms: list[Arm], name: str | None) -> list[Arm]:
    if name is None:
        return arms
    found = [arm for arm in arms if name in arm.label]
    exact = [arm for arm in found if arm.label == name]
    if len(exact or found) != 1:
        there = ", ".join(arm.label for arm in found or arms)
        rule = f"names {len(found)} arms: {there}" if found else f"is in the name of no arm; there are {there}"
        raise ConfigError([(f"--baseline {name}", rule)], scope="this request")
    (chosen,) = exact or found
    return [chosen, *(arm for arm in arms if arm is not chosen)]


def _show(study: Study) -> None:
    rows = []
    for arm in study.arms:
        values = study.of(arm)
        sd = f"{statistics.stdev(values):.2g}" if len(values) > 1 else ""
        seeds = " ".join(run.seed_said for run in arm.runs) if all(run.seed for run in arm.runs) else "unknown"
        rows.append((arm.label, str(len(values)), f"{statistics.fmean(values):.4f}", sd, seeds))
    print_table(headline(study), ("arm", "runs", "mean", "sd", "seeds"), rows)
    print()
    lines = [(one.arm.label, *cells(study, one)) for one in study.comparisons]
    headings = ("arm", "difference", "95 % interval", "p", "smallest visible", "verdict")
    print_table(f"Against {study.arms[0].label}", headings, lines)
    if said := footnote(study):
        print(f"  {said}")
    print()
    for one in study.comparisons:
        print(sentence(study, one))
    for one in study.comparisons:
        if one.left_out:
            names = ", ".join(run.name for run in one.left_out)
            print(f"Note: {one.arm.label}: without a partner of the same seed, and so left out: {names}")
    for note in study.notes:
        print(f"Note: {note}")


def _show_times(study: Study, target: float | None) -> None:
    axes = [axis for axis in AXES if axis != "cost" or study.question.price is not None]
    lines = []
    for axis in axes:
        target, found, taken = time_to_loss(study.arms, study.question, target, axis)
        lines += [_time_cells(one, axis, taken) for one in found]
    print()
    headings = ("arm", "of", "baseline takes", "arm takes", "multiplier", "95 % interval", "p", "verdict")
    print_table(f"To {study.metric} {target:.4f}, against {study.arms[0].label}", headings, lines)
    print("  multiplier: how many times as much the baseline takes; 2 is half the price")


def _time_cells(one: Comparison, axis: str, taken: dict[str, float]) -> list[str]:
    means = [math.exp(statistics.fmean(math.log(taken[run.name]) for run in arm.runs)) for arm in (one.baseline, one.arm)]
    found = multiplier(one)
    if found is None or one.p is None:
        return [
            one.arm.label,
            AXIS_UNITS[axis],
            *[f"{mean:.4g}" for mean in means],
            f"{means[0] / means[1]:.3f}",
            "",
            "",
            one.verdict,
        ]
    middle, low, high = found
    said = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", short_p(one.p), one.verdict]
    return [one.arm.label, AXIS_UNITS[axis], *[f"{mean:.4g}" for mean in means], *said]
