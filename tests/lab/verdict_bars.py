"""Does `llama-lab compare` keep its word? Twenty thousand simulated studies for each kind of noise and number of seeds.

    python tests/lab/verdict_bars.py             everything, in ten minutes of one core; exit code 1 if a bar is missed
    python tests/lab/verdict_bars.py --studies 2000 --part levels

Noise is that of single runs; paired arms share half of its variance through their seeds. The bars: equal arms are called different
in 5 +- 0.5 % of studies and intervals miss in as many, from four pairs or three runs an arm on; a difference named as visible is
seen in 80 +- 1 %, in no less than 79 % if it is one of several; where seeds are crossed no more than 5.5 % are called different;
seeds needed lie within 30 % of the truth. docs/compare.md quotes the tables.
"""

import argparse
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from llama_lab.lab.compare.power import need, seeds_needed, visible_effect
from llama_lab.lab.compare.statistics import Design, corrected, intervals, noise, p_values

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

STUDIES = 20_000
SHAPES: dict[str, Draw] = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "gamma": lambda draw, shape: (draw.gamma(4, size=shape) - 4) / 2,
    "lognormal": lambda draw, shape: (
        (draw.lognormal(0, 0.5, shape) - math.exp(0.125)) / math.exp(0.125) / math.sqrt(math.expm1(0.25))
    ),
    "exponential": lambda draw, shape: draw.exponential(size=shape) - 1,
}
"""Noise of mean 0 and standard deviation 1, its skewness 0, 1, 1.75 and 2."""
WILD: dict[str, Draw] = {
    "wild": lambda draw, shape: (draw.lognormal(0, 1, shape) - math.exp(0.5)) / math.sqrt(math.e * math.expm1(1))
}
"""Noise of skewness 6, for the choice of the test."""
RESAMPLES = 499
PAIRED = [Design(n, n, True) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10)]
UNPAIRED = [Design(n, n, False) for n in (2, 3, 4, 5, 6, 7, 8)]
CHOICE = [Design(3, 3, True), Design(5, 5, True), Design(8, 8, True), Design(3, 3, False), Design(5, 5, False)]
UNEVEN = [Design(3, 5, False), Design(5, 10, False)]
SEVERAL = [Design(3, 3, True), Design(5, 5, True), Design(8, 8, True), Design(12, 12, True), Design(3, 3, False)]
SEVERAL += [Design(5, 5, False), Design(8, 8, False)]
CROSSED = [(2, 2), (4, 2), (2, 8), (3, 3), (5, 3), (4, 4), (5, 5)]
SHARES = [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.2, 0.2, 0.6), (0.6, 0.2, 0.2), (0.1, 0.7, 0.2), (0.5, 0.5, 0.0)]
"""Of the variance of a paired difference: the weights', the order's, the pair's own."""
TOLERANCE, POWER_TOLERANCE, SEEDS_TOLERANCE = 0.005, 0.01, 0.3


@dataclass(frozen=True)
class Cell:
    """One line of a table: what was simulated, its figures in percent, and whether they meet the bar (null: none is claimed)."""

    name: str
    figures: tuple[float, ...]
    passed: bool | None


def arms(design: Design, shape: str, studies: int, draw: np.random.Generator, effect: float = 0.0) -> np.ndarray:
    """Values as `intervals` takes them: one arm is `effect` above the other, in standard deviations of a run."""
    make = (SHAPES | WILD)[shape]
    if not design.paired:
        values = make(draw, (studies, design.a + design.b))
        values[:, : design.a] += effect
        return values
    shared = make(draw, (studies, design.a))
    ours, theirs = (shared + make(draw, (studies, design.a)) for _ in range(2))
    return (theirs - ours) / math.sqrt(2) + effect


def generator(*what: object) -> np.random.Generator:
    """A stream of its own for each cell, the same in every run."""
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def named(design: Design) -> str:
    return f"{design.a} pairs" if design.paired else f"{design.a} against {design.b}"


def is_claimed(design: Design, shape: str) -> bool:
    """Whether the level is claimed: with so few runs that Student's t decides, for normal noise only; nowhere for unequal arms."""
    return design.a == design.b and (not design.uses_t or shape == "normal")


def level_cell(design: Design, shape: str, studies: int) -> Cell:
    """(false positives, intervals that miss a planted difference) in percent."""
    draw = generator("level", design, shape)
    false = float((p_values(arms(design, shape, studies, draw), design) < 0.05).mean())
    low, high = intervals(arms(design, shape, studies, draw, effect=1.0), design)
    missed = float(((low > 1) | (high < 1)).mean())
    passed = max(abs(false - 0.05), abs(missed - 0.05)) <= TOLERANCE if is_claimed(design, shape) else None
    return Cell(f"{named(design)}, {shape}", (100 * false, 100 * missed), passed)


def choice_cell(design: Design, shape: str, studies: int) -> Cell:
    """Percent of equal arms called different by the t-test, Welch's, permutations, the bootstrap of t, and what was chosen."""
    draw = generator("choice", design, shape)
    values = arms(design, shape, studies, draw)
    chosen = p_values(values, design)
    # Permutations give the step that the chosen p lies in.
    steps = design.arrangements / 2
    permuted = (np.floor(chosen * steps) + 1) / steps
    if design.paired:
        t = welch = stats.ttest_1samp(values, 0, axis=1).pvalue
    else:
        halves = np.split(values, 2, axis=1)
        t, welch = (stats.ttest_ind(*halves, axis=1, equal_var=equal).pvalue for equal in (True, False))
    found = [float((p < 0.05).mean()) for p in (t, welch)] + [float((permuted <= 0.05).mean())]
    found += [bootstrapped(values[: studies // 5], design, draw), float((chosen < 0.05).mean())]
    return Cell(f"{named(design)}, {shape}", tuple(100 * share for share in found), None)


def bootstrapped(values: np.ndarray, design: Design, draw: np.random.Generator) -> float:
    """Share of studies whose bootstrap-t interval of 95 % leaves out 0."""
    parts = [values] if design.paired else np.split(values, 2, axis=1)

    def effect(samples: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        means = [sample.mean(axis=-1) for sample in samples]
        error = np.sqrt(sum(sample.var(axis=-1, ddof=1) / sample.shape[-1] for sample in samples))
        return (means[0] - means[1] if len(means) == 2 else means[0]), error

    middle, error = effect(parts)
    again = [
        np.take_along_axis(part[:, None, :], draw.integers(0, part.shape[1], (len(part), RESAMPLES, part.shape[1])), axis=2)
        for part in parts
    ]
    means, errors = effect(again)
    # A resample of one value alone has no error; it says nothing.
    ratio = np.where(errors > 0, (means - middle[:, None]) / np.where(errors > 0, errors, 1), np.nan)
    low, high = np.nanquantile(ratio, [0.025, 0.975], axis=1)
    return float(((middle - high * error > 0) | (middle - low * error < 0)).mean())


def power_cell(design: Design, studies: int) -> Cell:
    """Percent of studies that see the difference named as visible: with known noise, and with that of an earlier study as large."""
    draw = generator("power", design)
    step = np.ones(design.a) if design.paired else np.r_[np.ones(design.a), np.zeros(design.b)]
    found = []
    for freedom in (math.inf, design.degrees_of_freedom):
        named_visible = visible_effect(1.0, freedom, design)
        sizes = np.ones(studies) if math.isinf(freedom) else noise(arms(design, "normal", studies, draw), design)
        values = arms(design, "normal", studies, draw) + (named_visible * sizes)[:, None] * step
        low, high = intervals(values, design)
        found.append(float(((low > 0) | (high < 0)).mean()))
    passed = max(abs(share - 0.8) for share in found) <= POWER_TOLERANCE
    return Cell(named(design), (100 * found[0], 100 * found[1]), passed)


def several_cell(design: Design, comparisons: int, studies: int) -> Cell:
    """Percent of studies of several arms beside a baseline that see the difference named as visible, of noise as large as that of
    an earlier study: where one arm has it and the others are equal; where all have it. Then of those that call any of equal arms
    different.
    """
    draw = generator("several", design, comparisons)
    sizes = noise(arms(design, "normal", studies, draw), design)
    effect = visible_effect(1.0, design.degrees_of_freedom, design, comparisons) * sizes
    seen = [np.mean([study[0] for study in several_called(design, comparisons, effect, which, draw)]) for which in (1, comparisons)]
    false = np.mean([any(study) for study in several_called(design, comparisons, 0 * effect, 0, draw)])
    passed = min(seen) >= 0.8 - POWER_TOLERANCE and false <= 0.05 + TOLERANCE
    return Cell(f"{named(design)}, {comparisons} arms", tuple(100 * float(share) for share in (*seen, false)), bool(passed))


def several_called(design: Design, comparisons: int, effect: np.ndarray, which: int, draw: np.random.Generator) -> list[list[bool]]:
    """Which arms each study calls different from its baseline. The first `which` of them are `effect` above it."""
    studies = len(effect)
    shared = draw.standard_normal((studies, design.a)) if design.paired else 0.0
    scale = math.sqrt(2) if design.paired else 1.0
    baseline = (shared + draw.standard_normal((studies, design.a))) / scale
    p: list[np.ndarray] = []
    t_p: list[np.ndarray] = []
    for number in range(comparisons):
        arm = (shared + draw.standard_normal((studies, design.b))) / scale + (effect[:, None] if number < which else 0.0)
        values = arm - baseline if design.paired else np.concatenate((arm, baseline), axis=1)
        p.append(p_values(values, design))
        t = stats.ttest_rel(arm, baseline, axis=1) if design.paired else stats.ttest_ind(arm, baseline, axis=1, equal_var=False)
        t_p.append(t.pvalue)
    studies_p, studies_t = np.stack(p, axis=1).tolist(), np.stack(t_p, axis=1).tolist()
    return [[one < 0.05 for one in corrected(own, t)] for own, t in zip(studies_p, studies_t, strict=True)]


def crossed_cell(crossed: tuple[int, int], shares: tuple[float, ...], shape: str, studies: int) -> Cell:
    """Percent of equal arms called different where every one of some weights meets every one of some orders of the data, were all
    pairs taken as independent; as is; intervals that miss a planted difference; visible differences seen.
    """
    draw = generator("crossed", crossed, shares, shape)
    design = Design(math.prod(crossed), math.prod(crossed), True, crossed)

    def differences() -> np.ndarray:
        sizes = [(studies, crossed[0], 1), (studies, 1, crossed[1]), (studies, *crossed)]
        # Of two arms, each with its own: the difference of what a seed does to either.
        drawn = [[SHAPES[shape](draw, (studies, math.prod(size[1:]))) for _ in range(2)] for size in sizes]
        parts = [(ours - theirs).reshape(size) for (ours, theirs), size in zip(drawn, sizes, strict=True)]
        return sum(math.sqrt(share / 2) * part for share, part in zip(shares, parts, strict=True)).reshape(studies, -1)

    values = differences()
    found = [float((p_values(values, one) < 0.05).mean()) for one in (replace(design, crossed=None), design)]
    low, high = intervals(differences() + 1, design)
    found.append(float(((low > 1) | (high < 1)).mean()))
    visible = visible_effect(1.0, design.degrees_of_freedom, design) * noise(differences(), design)
    low, high = intervals(differences() + visible[:, None], design)
    found.append(float(((low > 0) | (high < 0)).mean()))
    passed = max(found[1:3]) <= 0.05 + TOLERANCE and (shape != "normal" or found[3] >= 0.8 - POWER_TOLERANCE)
    name = f"{crossed[0]} x {crossed[1]}, {'/'.join(f'{share:g}' for share in shares)}, {shape}"
    return Cell(name, tuple(100 * share for share in found), passed)


def true_need(effect: float, *, paired: bool) -> int:
    """Seeds an arm with which 80 % of studies see an effect: by simulating them up to eight, by the noncentral t beyond."""
    # What known noise would take, and some less.
    least = (1 if paired else 2) * (2.8 / effect) ** 2
    for seeds in range(max(2, int(0.7 * least)), 500):
        design = Design(seeds, seeds, paired)
        if seeds <= (8 if paired else 5):
            low, _ = intervals(arms(design, "normal", 8000, generator("truth", design, effect), effect), design)
            share = float((low > 0).mean())
        else:
            freedom = design.degrees_of_freedom
            shift = effect * math.sqrt(seeds if paired else seeds / 2)
            share = float(stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift))
        if share >= 0.8:
            return seeds
    raise ValueError(effect)


def needs_cell(number: int) -> Cell:
    """Seeds needed in one of 20 planted studies, against the truth.

    Returns:
        (truth, with noise of 400 runs, median over studies of six seeds and their own noise, percent of those within 30 %).
    """
    paired = number % 2 == 0
    effect = 0.45 * 1.13 ** (number // 2) if paired else 0.6 * 1.13 ** (number // 2)
    truth = true_need(effect, paired=paired)
    draw = generator("needs", number)
    measured = float(noise(arms(Design(400, 400, paired), "normal", 1, draw), Design(400, 400, paired))[0])
    said = seeds_needed(effect, measured, paired=paired) or 0
    pilot = Design(6, 6, paired)
    values = arms(pilot, "normal", 400, draw, effect)
    seen = values.mean(axis=1) if paired else values[:, :6].mean(axis=1) - values[:, 6:].mean(axis=1)
    asked = [need(float(one), float(sd), pilot).seeds or math.inf for one, sd in zip(seen, noise(values, pilot), strict=True)]
    close = float(np.mean([abs(one - truth) <= SEEDS_TOLERANCE * truth for one in asked]))
    middle = float(np.median(asked))
    passed = abs(said - truth) <= SEEDS_TOLERANCE * truth and abs(middle - truth) <= SEEDS_TOLERANCE * truth
    name = f"{'paired' if paired else 'unpaired'}, {effect:.2f} sd"
    return Cell(name, (truth, said, middle, 100 * close), passed)


def looking_again_cell(shape: str, studies: int) -> Cell:
    """Percent of studies of equal arms called different after five pairs; after five or eight; after five, eight or ten."""
    values = arms(Design(10, 10, True), shape, studies, generator("again", shape))
    called = np.zeros(studies, dtype=bool)
    found = []
    for seeds in (5, 8, 10):
        called |= p_values(values[:, :seeds], Design(seeds, seeds, True)) < 0.05
        found.append(100 * float(called.mean()))
    return Cell(shape, tuple(found), None)


def jobs(studies: int, part: str | None) -> dict[str, list[tuple[Callable[..., Cell], tuple[object, ...]]]]:
    """Table -> what fills it."""
    tables: dict[str, list[tuple[Callable[..., Cell], tuple[object, ...]]]] = {
        "levels": [(level_cell, (design, shape, studies)) for design in (*PAIRED, *UNPAIRED, *UNEVEN) for shape in SHAPES],
        "choice": [(choice_cell, (design, shape, studies)) for design in CHOICE for shape in (*SHAPES, *WILD)],
        "power": [(power_cell, (design, studies)) for design in (*PAIRED, *UNPAIRED[:-1])],
        "several": [(several_cell, (design, count, studies)) for design in SEVERAL for count in (2, 4, 8)],
        "crossed": [
            (crossed_cell, (crossed, shares, shape, studies))
            for crossed in CROSSED
            for shares in SHARES
            for shape in ("normal", "exponential")
        ],
        "needs": [(needs_cell, (number,)) for number in range(20)],
        "again": [(looking_again_cell, (shape, studies)) for shape in SHAPES],
    }
    return tables if part is None else {part: tables[part]}


HEADINGS = {
    "choice": "equal arms called different %: t, Welch's t, permutations, bootstrap-t, chosen",
    "levels": "equal arms called different %, intervals that miss %",
    "power": "visible differences seen %: known noise, estimated noise",
    "several": "visible differences seen %: in one arm of several, in all; any of equal arms called different %",
    "crossed": "crossed seeds, equal arms called different %: were pairs independent, as is; intervals that miss %; visible seen %",
    "needs": "seeds needed: truth, noise of 400 runs, median of six-seed studies, % of those within 30 %",
    "again": "equal arms called different %, looking at 5, at 5 and 8, at 5, 8 and 10 pairs",
}


def main() -> int:
    """Fill the tables, print them, and say whether every bar is met."""
    parser = argparse.ArgumentParser(description="Simulate studies, and hold the verdicts to what they claim.")
    parser.add_argument("--studies", type=int, default=STUDIES, help=f"for each cell (default: {STUDIES})")
    parser.add_argument("--part", choices=list(HEADINGS), help="one table only")
    asked = parser.parse_args()
    started, missed = time.perf_counter(), 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tables = {
            part: [pool.submit(work, *arguments) for work, arguments in cells]
            for part, cells in jobs(asked.studies, asked.part).items()
        }
        for part, cells in tables.items():
            print(f"{part}: {HEADINGS[part]}")
            for cell in (future.result() for future in cells):
                missed += cell.passed is False
                mark = {True: "ok", False: "MISSED", None: "no claim"}[cell.passed]
                print(f"  {cell.name:<36}" + "".join(f"{figure:9.2f}" for figure in cell.figures) + f"   {mark}", flush=True)
    print(f"{missed} bars missed; {time.perf_counter() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
