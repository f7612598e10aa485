"""Whether two small samples differ: interval, p-value and noise of a difference of means. Numpy and scipy, no runs.

With 2 to 10 runs an arm nobody knows the shape of the noise, and Student's t holds its level only if it is normal. So from four
pairs, or three runs an arm, on, intervals come from the typical values of a sample, which need no shape:

- Paired differences that are as likely above their centre as below: the mean of every subset of them. Sorted, they cut the line
  into 2^n gaps, and the centre lies in each with the same chance.
- Two arms that differ by a shift: the mean of any k runs of one minus that of any k of the other, likewise.

Counting gaps from outside gives an interval, and the same as an exact permutation test of the means. Between two typical values
it is interpolated, and outside all of them continued in units of the outermost spacing, so that the level is met and not only
bounded: docs/compare.md has the measurements. Fewer runs leave only Student's t. Where a smaller arm spreads more than a larger
one, Welch's t has to agree: no shift makes one out of the other.

Pairs of every combination of some initial weights and some orders of the data share what either does. Their mean varies by
s_w^2 / W + s_o^2 / O + s^2 / (W O) over W weights and O orders. The mean squares of weights and of orders, added and divided by
W O, are that with the last term twice, so never too small on average; t with the smaller number of seeds, less one, as its degrees
of freedom is then never too bold for normal noise (Mickey and Brown), and for skewed as it was measured.

Source: J. A. Hartigan, Using subsample values as typical values, JASA 64 (1969); the interpolation follows the idea of
T. P. Hettmansperger and S. J. Sheather, Confidence intervals based on interpolated order statistics, Stat. Prob. Letters 4 (1986).
M. R. Mickey and M. B. Brown, Bounds on the distribution functions of the Behrens-Fisher statistic, Ann. Math. Stat. 37 (1966).
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

LEVEL = 0.05
"""Chance of calling equal arms different that a verdict takes, and of an interval to miss."""
FEWEST_ARRANGEMENTS = 16
# Up to so many all of them are looked at (17 pairs, ten runs an arm), beyond a fixed random choice: it blurs a p of 0.05 by 0.001.
ALL_ARRANGEMENTS = 200_000
CHOSEN_ARRANGEMENTS = 99_999
# Sums that are equal but for rounding count as equal.
ROUNDING = 1e-12
DOUBTFUL_SPREAD = 1.5
REFERENCE_DRAWS = 200_000
# Numbers that are held at once when many comparisons are made together: few enough for a processor's cache.
CHUNK = 2_000_000


@dataclass(frozen=True, slots=True)
class Design:
    """How many runs stand against how many.

    Attributes:
        a, b: runs of each arm; equal if paired.
        paired: whether run i of one belongs to run i of the other.
        crossed: numbers of seeds of weights and of data whose every combination is a pair, the first changing slowest; null where
            pairs share no seed.
    """

    a: int
    b: int
    paired: bool
    crossed: tuple[int, int] | None = None

    @property
    def degrees_of_freedom(self) -> int:
        """Of the estimate of the noise."""
        if self.crossed is not None:
            return min(self.crossed) - 1
        return self.a - 1 if self.paired else self.a + self.b - 2

    @property
    def arrangements(self) -> int:
        """Ways to swap what would not matter if the arms were equal."""
        return 2**self.a if self.paired else math.comb(self.a + self.b, self.a)

    @property
    def uses_t(self) -> bool:
        """Whether there are too few arrangements to do without Student's t, or shared seeds that forbid them."""
        return self.crossed is not None or self.arrangements < FEWEST_ARRANGEMENTS


@dataclass(frozen=True, slots=True)
class Estimate:
    """What two samples say of the difference of their means.

    Attributes:
        effect: mean of b minus mean of a.
        low, high: interval that covers the true difference in 95 of 100 such comparisons.
        p: chance of such a difference between equal arms; below 0.05 exactly if the interval leaves out 0.
        t_p: the same by Student's t on pairs, or Welch's, for readers who know that.
        noise: standard deviation of a paired difference, or within an arm; of crossed pairs that with which as many independent
            pairs would leave the mean as uncertain.
        design: what it was made from.
    """

    effect: float
    low: float
    high: float
    p: float
    t_p: float
    noise: float
    design: Design


def estimate_difference(a: np.ndarray, b: np.ndarray, *, paired: bool, crossed: tuple[int, int] | None = None) -> Estimate:
    """Compare two samples.

    Args:
        a, b: one value a run, at least two each; in the same order of seeds if paired.
        crossed: as a `Design` has it; at least two seeds of either kind.

    Raises:
        ValueError: fewer than two values, unequal numbers of pairs, or a value that is no finite number.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a comparison takes at least two finite values an arm, and as many of one as of the other if paired")
    design = Design(len(a), len(b), paired, crossed)
    values = np.atleast_2d(b - a if paired else np.concatenate((b, a)))
    turned = design if paired else Design(design.b, design.a, False)
    (low,), (high,) = intervals(values, turned)
    return Estimate(
        effect=float(b.mean() - a.mean()),
        low=float(low),
        high=float(high),
        p=float(p_values(values, turned)[0]),
        t_p=_t_p(values, turned),
        noise=float(noise(values, turned)[0]),
        design=design,
    )


def intervals(values: np.ndarray, design: Design, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of many comparisons at once.

    Args:
        values: (comparisons, a) paired differences, or (comparisons, a + b) values of arm a, then of arm b.
        level: chance to miss the true difference, half on either side.

    Returns:
        Lower and upper ends of the difference of the means, a - b.
    """
    return lower_ends(values, design, level), -lower_ends(-values, design, level)


def lower_ends(values: np.ndarray, design: Design, level: float = LEVEL) -> np.ndarray:
    """Lower ends of `intervals`. Shifting arm a, or the differences, shifts them as much."""
    if design.uses_t:
        return _t_lower(values, design, level, pooled=True)
    typical = typical_weights(design)
    rank = level / 2 * (len(typical) + 1)
    ends = np.empty(len(values))
    for part in _parts(values, len(typical)):
        ends[part] = _lower_of_typical(values[part], values[part] @ typical.T, design, rank)
    doubtful = _is_no_shift(values, design)
    ends[doubtful] = np.minimum(ends[doubtful], _t_lower(values[doubtful], design, level, pooled=False))
    return ends


def deciding_ends(values: np.ndarray, design: Design, comparisons: int = 1) -> np.ndarray:
    """Lower ends that have to be above 0 for a verdict, where it is one of several comparisons.

    The correction of the most significant of them, which is the strictest: Holm's first step. `lower_ends` for a single one.
    """
    ends = lower_ends(values, design)
    if comparisons == 1:
        return ends
    return np.minimum(ends, _t_lower(values, design, LEVEL / comparisons, pooled=False))


def p_values(values: np.ndarray, design: Design) -> np.ndarray:
    """Two-sided p-values of many comparisons; below a level exactly where the interval of that level leaves out 0.

    Args:
        values: as `intervals` takes them.
    """
    if design.uses_t:
        return _t_p_values(values, design, pooled=True)
    typical = typical_weights(design)
    found = np.empty(len(values))
    # Turned so that the difference is above 0, which then lies nearer to the lower end.
    upwards = values * np.where(values @ typical[-1] < 0, -1.0, 1.0)[:, None]
    for part in _parts(values, len(typical)):
        ranks = _rank_of_zero(upwards[part], upwards[part] @ typical.T, design)
        found[part] = np.minimum(1, 2 * ranks / (len(typical) + 1))
    doubtful = _is_no_shift(values, design)
    found[doubtful] = np.maximum(found[doubtful], _t_p_values(values[doubtful], design, pooled=False))
    return found


def noise(values: np.ndarray, design: Design) -> np.ndarray:
    """Standard deviations: of a paired difference, or within an arm, pooled; of crossed pairs as an `Estimate` has it."""
    if design.crossed is not None:
        weights, orders = design.crossed
        grid = values.reshape(len(values), weights, orders)
        between = orders * grid.mean(axis=2).var(axis=1, ddof=1), weights * grid.mean(axis=1).var(axis=1, ddof=1)
        return np.sqrt(between[0] + between[1])
    if design.paired:
        return values.std(axis=1, ddof=1)
    squares = sum(part.var(axis=1) * part.shape[1] for part in np.split(values, [design.a], axis=1))
    return np.sqrt(squares / design.degrees_of_freedom)


def corrected(p: list[float], t_p: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that all of them together err in 5 of 100 studies of equal arms.

    Holm's correction of the t-tests: exact tests of few runs cannot give the small p-values that it needs. Where those of t are too
    small because of it, the exact one is the bound.
    """
    if len(p) == 1:
        return list(p)
    order = sorted(range(len(p)), key=lambda index: t_p[index])
    found, largest = [0.0] * len(p), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * t_p[index]))
        found[index] = max(largest, p[index])
    return found


def noise_interval(sd: float, degrees_of_freedom: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a standard deviation that was estimated from normal noise."""
    low, high = special.chdtri(degrees_of_freedom, [level / 2, 1 - level / 2])
    return sd * math.sqrt(degrees_of_freedom / low), sd * math.sqrt(degrees_of_freedom / high)


@lru_cache(maxsize=32)
def typical_weights(design: Design) -> np.ndarray:
    """Rows of weights that turn a sample into its typical values; the last gives the difference of the means."""
    n = design.a + (0 if design.paired else design.b)
    if design.paired:
        if design.arrangements <= ALL_ARRANGEMENTS:
            chosen = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
        else:
            chosen = np.random.default_rng(0).integers(0, 2, (CHOSEN_ARRANGEMENTS, n))
            chosen = chosen[chosen.any(axis=1)]
        return chosen / chosen.sum(axis=1, keepdims=True)
    if design.arrangements <= ALL_ARRANGEMENTS:
        firsts = np.array(list(itertools.combinations(range(n), design.a))[1:])
    else:
        shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(n), (CHOSEN_ARRANGEMENTS, 1)), axis=1)
        firsts = shuffled[:, : design.a]
    becomes_first = np.zeros((len(firsts), n), dtype=bool)
    np.put_along_axis(becomes_first, firsts, True, axis=1)
    leaves, joins = ~becomes_first[:, : design.a], becomes_first[:, design.a :]
    weights = np.concatenate((leaves, -joins.astype(float)), axis=1)
    moved = leaves.sum(axis=1, keepdims=True)
    return weights[moved[:, 0] > 0] / moved[moved[:, 0] > 0]


def _lower_of_typical(values: np.ndarray, means: np.ndarray, design: Design, rank: float) -> np.ndarray:
    """The point below which the true difference lies with the chance of `rank` gaps."""
    if rank < 1:
        first, spacing = _outermost(values, design)
        return first - _spacings_at(design, rank) * spacing
    below = int(rank)
    share = rank - below
    if below == 1:
        # The centre is not spread evenly over this gap. Where the noise has a flat density around it, the chance to be below a
        # share s of the gap is s / (2 - s).
        share = 2 * share / (1 + share)
    around = np.partition(means, (below - 1, below), axis=1)[:, below - 1 : below + 1]
    return around[:, 0] + share * (around[:, 1] - around[:, 0])


def _rank_of_zero(values: np.ndarray, means: np.ndarray, design: Design) -> np.ndarray:
    """The rank at which `_lower_of_typical` is 0."""
    is_below = means <= ROUNDING * np.abs(values).max(axis=1, keepdims=True)
    below = is_below.sum(axis=1)
    before = np.where(is_below, means, -np.inf).max(axis=1)
    behind = np.where(is_below, np.inf, means).min(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(before / (before - behind), nan=0.0)
        share = np.where(below == 1, share / (2 - share), share)
        first, spacing = _outermost(values, design)
        outside = np.nan_to_num(first / spacing, nan=np.inf, posinf=np.inf)
    tail = _tail(design)
    beyond = (len(tail) - np.searchsorted(tail, outside) + 1) / (len(tail) + 1)
    return np.where(below == 0, beyond, below + share)


def _outermost(values: np.ndarray, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """The smallest typical value, and the spacing that measures how far something lies beyond it."""
    if design.paired:
        ordered = np.sort(values, axis=1)
        return ordered[:, 0], ordered[:, _spacing_width(design.a)] - ordered[:, 0]
    a, b = np.sort(values[:, : design.a], axis=1), np.sort(values[:, design.a :], axis=1)
    return a[:, 0] - b[:, -1], (a[:, 1] - a[:, 0]) + (b[:, -1] - b[:, -2])


def _spacing_width(n: int) -> int:
    """Of four differences the nearest two say how far is far whatever their shape; from five on, the nearest three almost as well,
    and they see more."""
    return 1 if n <= 4 else 2


@lru_cache(maxsize=64)
def _tail(design: Design) -> np.ndarray:
    """Sorted distances, in spacings, of 0 from the smallest typical value among equal arms, wherever it lies outside all of them.

    Sides and order do not matter then: differences that all have one sign are a sample of their sizes, and of runs of which all of
    one arm are above all of the other the upper ones are one arm. Differences of skewed noise have a peak in their middle, so the
    reference for them is a third Laplace, two thirds normal.
    """
    draw = np.random.default_rng(0)
    if design.paired:
        third = REFERENCE_DRAWS // 3
        shapes = (draw.standard_normal((2 * third, design.a)), draw.laplace(size=(third, design.a)))
        sizes = np.abs(np.concatenate(shapes))
        first, spacing = _outermost(sizes, design)
    else:
        ordered = np.sort(draw.standard_normal((REFERENCE_DRAWS, design.a + design.b)), axis=1)
        first, spacing = _outermost(np.concatenate((ordered[:, design.b :], ordered[:, : design.b]), axis=1), design)
    return np.sort(first / spacing)


def _spacings_at(design: Design, rank: float) -> float:
    return float(np.quantile(_tail(design), 1 - rank))


def _is_no_shift(values: np.ndarray, design: Design) -> np.ndarray:
    """Where the smaller of two unequal arms spreads so much more than the larger that they hardly differ by a shift alone.

    Only this direction matters: the few runs are then taken to be as steady as the many.
    """
    if design.paired or design.a == design.b:
        return np.zeros(len(values), dtype=bool)
    a, b = (part.std(axis=1, ddof=1) for part in np.split(values, [design.a], axis=1))
    return a > DOUBTFUL_SPREAD * b if design.a < design.b else b > DOUBTFUL_SPREAD * a


def _parts(values: np.ndarray, width: int) -> list[slice]:
    rows = max(1, CHUNK // max(1, width))
    return [slice(begin, begin + rows) for begin in range(0, len(values), rows)]


def _t_parts(values: np.ndarray, design: Design, *, pooled: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences of the means, their standard errors, degrees of freedom."""
    if design.paired:
        error = noise(values, design) / math.sqrt(design.a)
        return values.mean(axis=1), error, np.full(len(values), float(design.degrees_of_freedom))
    a, b = values[:, : design.a], values[:, design.a :]
    effect = a.mean(axis=1) - b.mean(axis=1)
    if pooled:
        error = noise(values, design) * math.sqrt(1 / design.a + 1 / design.b)
        return effect, error, np.full(len(values), float(design.degrees_of_freedom))
    squares = [part.var(axis=1, ddof=1) / part.shape[1] for part in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = (squares[0] + squares[1]) ** 2 / (squares[0] ** 2 / (design.a - 1) + squares[1] ** 2 / (design.b - 1))
    return effect, np.sqrt(squares[0] + squares[1]), np.nan_to_num(freedom, nan=1.0)


def _t_lower(values: np.ndarray, design: Design, level: float, *, pooled: bool) -> np.ndarray:
    effect, error, freedom = _t_parts(values, design, pooled=pooled)
    return effect - special.stdtrit(freedom, 1 - level / 2) * error


def _t_p_values(values: np.ndarray, design: Design, *, pooled: bool) -> np.ndarray:
    effect, error, freedom = _t_parts(values, design, pooled=pooled)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(effect == 0, 0.0, np.abs(effect) / error)
    return 2 * special.stdtr(freedom, -t)


def _t_p(values: np.ndarray, design: Design) -> float:
    return float(_t_p_values(values, design, pooled=False)[0])
