"""What a comparison could see: the smallest visible difference, and how many seeds would decide.

Power is found by making the very test that decides many times on normal noise, not from a formula for another one: shifting an arm
shifts the interval with it, so one sample of interval ends answers for every difference at once.

Of several comparisons each has to pass their correction. What is said holds at the strictest step of it, that of the smallest of m
p-values, 0.05 / m: whatever the others show, a comparison sees at least so much.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from llama_lab.lab.compare.statistics import LEVEL, Design, deciding_ends

POWER = 0.8
MOST_SEEDS = 1000
DRAWS = 20_000
# Above so many arrangements the tests see what Student's t sees, within 1 % of the difference, and t is quick.
TESTED_ARRANGEMENTS = 1300


@dataclass(frozen=True, slots=True)
class Need:
    """How many seeds an arm would decide.

    Attributes:
        seeds: of each arm, in all; null: more than 1000.
        fewest, most: with the noise and the difference at the ends of what is known of them, each end with a chance of 1 in 10;
            null: more than 1000.
    """

    seeds: int | None
    fewest: int | None
    most: int | None


def power_at(effect: float, design: Design, comparisons: int = 1) -> float:
    """Chance to see a true difference; the least there is, if it is one of several comparisons.

    Args:
        effect: in standard deviations of the noise: of a paired difference, or within an arm.
    """
    needed = _needed(design, comparisons)
    return float(np.searchsorted(needed, abs(effect)) / len(needed))


def visible_effect(noise: float, degrees_of_freedom: float, design: Design, comparisons: int = 1) -> float:
    """The difference that 80 of 100 such comparisons would see; at least 80, if it is one of several.

    Args:
        noise: its standard deviation, estimated.
        degrees_of_freedom: of that estimate; infinite if it is known. With few, the difference is made larger, so that it is 80 of
            100 on average over the estimates that could have been made.
        comparisons: how many are corrected for each other.
    """
    if math.isinf(degrees_of_freedom):
        return noise * float(np.quantile(_needed(design, comparisons), POWER))
    draws = np.random.default_rng(1).chisquare(degrees_of_freedom, DRAWS) / degrees_of_freedom
    return noise * float(np.quantile(_shuffled(design, comparisons) / np.sqrt(draws), POWER))


def seeds_needed(effect: float, noise: float, *, paired: bool, comparisons: int = 1) -> int | None:
    """Seeds an arm with which 80 of 100 comparisons see a true difference (one of several: at least 80); null: more than 1000.

    Args:
        effect: the difference, in the unit of `noise`.
        noise: standard deviation of a paired difference, or within an arm.
        comparisons: how many are corrected for each other.
    """
    if effect == 0 or not math.isfinite(effect):
        return None
    if noise == 0:
        return 2
    size = abs(effect) / noise

    def sees(seeds: int) -> bool:
        return power_at(size, Design(seeds, seeds, paired), comparisons) >= POWER

    # Known noise would take so many; the search begins a little below.
    least = (1 if paired else 2) * ((special.ndtri(1 - LEVEL / 2 / comparisons) + special.ndtri(POWER)) / size) ** 2
    if least > MOST_SEEDS:
        return None
    seeds = max(2, math.floor(least) - 1)
    while seeds <= MOST_SEEDS and not sees(seeds):
        seeds += 1
    while seeds > 2 and sees(seeds - 1):
        seeds -= 1
    return seeds if seeds <= MOST_SEEDS else None


def need(effect: float, noise: float, design: Design, comparisons: int = 1) -> Need:
    """Seeds that would decide, if the true difference is the one that was seen.

    Args:
        effect: the difference that was seen.
        noise: the standard deviation that was seen, with the degrees of freedom of `design`.
        comparisons: how many are corrected for each other.
    """
    freedom = design.degrees_of_freedom
    middle = noise * math.sqrt(freedom / special.chdtri(freedom, 0.5))
    error = noise * math.sqrt(1 / design.a if design.paired else 1 / design.a + 1 / design.b)
    reach = float(special.stdtrit(freedom, 0.9)) * error
    nearest, furthest = max(0.0, abs(effect) - reach), abs(effect) + reach

    def seeds(size: float) -> int | None:
        return seeds_needed(size, middle, paired=design.paired, comparisons=comparisons)

    return Need(seeds=seeds(effect), fewest=seeds(furthest), most=seeds(nearest))


@lru_cache(maxsize=512)
def _needed(design: Design, comparisons: int) -> np.ndarray:
    """Sorted true differences from which on each of many comparisons with noise of size 1 would have decided."""
    return np.sort(_shuffled(design, comparisons))


@lru_cache(maxsize=512)
def _shuffled(design: Design, comparisons: int) -> np.ndarray:
    """The same in the order of drawing."""
    draw = np.random.default_rng(2)
    if design.crossed is not None:
        return _corrected_t(draw, design, LEVEL / comparisons)
    if design.uses_t or design.arrangements <= TESTED_ARRANGEMENTS:
        runs = design.a if design.paired else design.a + design.b
        return -deciding_ends(draw.standard_normal((DRAWS, runs)), design, comparisons)
    if comparisons > 1:
        return _corrected_t(draw, design, LEVEL / comparisons)
    freedom = design.degrees_of_freedom
    error = math.sqrt(1 / design.a if design.paired else 1 / design.a + 1 / design.b)
    sd = np.sqrt(draw.chisquare(freedom, DRAWS) / freedom)
    return error * (draw.standard_normal(DRAWS) + special.stdtrit(freedom, 1 - LEVEL / 2) * sd)


def _corrected_t(draw: np.random.Generator, design: Design, level: float) -> np.ndarray:
    """The same by the t-tests that are corrected, Student's on pairs and Welch's between arms, from spreads that are drawn."""
    arms = [(design.a, design.degrees_of_freedom)] if design.paired else [(runs, runs - 1) for runs in (design.a, design.b)]
    squares = [draw.chisquare(known, DRAWS) / known / runs for runs, known in arms]
    error = sum(squares)
    freedom = error**2 / sum(square**2 / known for square, (_, known) in zip(squares, arms, strict=True))
    spread = math.sqrt(sum(1 / runs for runs, _ in arms))
    return spread * draw.standard_normal(DRAWS) + special.stdtrit(freedom, 1 - level / 2) * np.sqrt(error)
