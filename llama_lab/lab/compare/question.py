"""What is asked of runs, as flags: shared by `llama-lab compare` and `llama-lab report`."""

import argparse
import math
from collections.abc import Sequence

from llama_lab.config.errors import ConfigError
from llama_lab.lab.compare.arms import Arm
from llama_lab.lab.compare.records import AXES
from llama_lab.lab.compare.study import Question

AUTO = "auto"
RUNS_HELP = "run folders, folders of runs, patterns, sweeps, or W&B's CSV of runs"


def add_question(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flags that say what is compared and how."""
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
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--higher", action="store_true", help="higher is better (default: as the metric's name says, else lower)")
    ways.add_argument("--lower", action="store_true", help="lower is better")
    parser.add_argument("--unpaired", action="store_true", help="do not pair runs by seed")
    parser.add_argument("--finished", action="store_true", help="leave out runs that are not finished")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a config key that makes no difference; repeatable"
    )


def read_question(asked: argparse.Namespace) -> Question:
    """The question that flags make.

    Raises:
        ConfigError: `--at` names no axis or no number, or `--worth` or `--price` is not above 0.
    """
    at, place = _place(asked.at)
    if asked.worth is not None and not asked.worth > 0:
        raise ConfigError([(f"--worth {asked.worth:g}", "is not above 0; type a difference, such as 0.01")], scope="this request")
    if asked.price is not None and not 0 < asked.price < math.inf:
        raise ConfigError([(f"--price {asked.price:g}", "is no price above 0; type one, such as 2.5")], scope="this request")
    return Question(
        metric=asked.metric,
        at=at,
        place=place,
        price=asked.price,
        worth=asked.worth,
        higher_is_better=asked.higher if asked.higher or asked.lower else None,
        paired=False if asked.unpaired else None,
        finished_only=asked.finished,
    )


def read_loss(text: str) -> float | None:
    """The loss of `--to-loss`; null: the lowest that every run reaches.

    Raises:
        ConfigError: it is no number above 0.
    """
    return None if text == AUTO else _number(text, "--to-loss")


def baseline_first(arms: Sequence[Arm], name: str | None) -> list[Arm]:
    """The arms with the one in front that a part of its name means.

    Raises:
        ConfigError: it is in the name of none, or of several.
    """
    if name is None:
        return list(arms)
    found = [arm for arm in arms if name in arm.label]
    exact = [arm for arm in found if arm.label == name]
    if len(exact or found) != 1:
        there = ", ".join(arm.label for arm in found or arms)
        rule = f"names {len(found)} arms: {there}" if found else f"is in the name of no arm; there are {there}"
        raise ConfigError([(f"--baseline {name}", rule)], scope="this request")
    (chosen,) = exact or found
    return [chosen, *(arm for arm in arms if arm is not chosen)]


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
