"""Verdicts against published tables, against exact counting, and against what they claim."""

import itertools
import math
import os

import numpy as np
import pytest
from scipy import stats

from llama_lab.lab.compare.power import need, power_at, seeds_needed, visible_effect
from llama_lab.lab.compare.statistics import (
    Design,
    corrected,
    estimate_difference,
    intervals,
    lower_ends,
    noise_interval,
    p_values,
    typical_weights,
)

from .verdict_bars import crossed_cell, jobs, level_cell, power_cell, several_cell

# Student, The probable error of a mean, Biometrika 6 (1908), table in section VI: hours of sleep gained by ten patients with two
# soporifics (the numbers of R's data set `sleep`).
SLEEP_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
# R. A. Fisher, The Design of Experiments (1935), section 17, table 3: heights of Darwin's maize in eighths of an inch, crossed
# minus self-fertilised.
MAIZE = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
# A. J. Dobson, An Introduction to Statistical Modelling (1983), table 4.1, R's data set `PlantGrowth`: dried weight of plants, a
# control and two treatments.
CONTROL = np.array([4.17, 5.58, 5.18, 6.11, 4.50, 4.61, 5.17, 4.53, 5.33, 5.14])
TREATED_1 = np.array([4.81, 4.17, 4.41, 3.59, 5.87, 3.83, 6.03, 4.89, 4.32, 4.69])
TREATED_2 = np.array([6.31, 5.12, 5.54, 5.50, 5.37, 5.29, 4.92, 6.15, 5.80, 5.26])


def test_paired_sleep_is_decided_as_student_decided():
    found = estimate_difference(SLEEP_1, SLEEP_2, paired=True)
    assert found.effect == pytest.approx(1.58)
    assert found.t_p == pytest.approx(0.002833, abs=5e-7)  # t = 4.0621, 9 degrees of freedom
    # t's interval is 0.7001 to 2.4599; one patient gained 4.6 hours, which ours takes into account.
    assert 0.7 < found.low < 1.0 and 2.4 < found.high < 2.9
    assert found.p < 0.01


def test_unpaired_sleep_is_as_undecided_as_welch_has_it():
    found = estimate_difference(SLEEP_1, SLEEP_2, paired=False)
    assert found.t_p == pytest.approx(0.07939, abs=5e-6)  # t = 1.8608, 17.776 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(-0.2055, abs=0.05), pytest.approx(3.3655, abs=0.05))
    assert found.p == pytest.approx(0.08, abs=0.005)


def test_darwin_s_maize_has_the_p_of_fisher_s_count():
    found = estimate_difference(np.zeros(15), MAIZE, paired=True)
    # Fisher counts 863 of 32768 arrangements on one side; t = 2.148 gives 0.0497, so that the two disagree about 5 %.
    assert found.p == pytest.approx(2 * 863 / 32768, abs=2 / 32768)
    assert found.t_p == pytest.approx(0.0497, abs=5e-5)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(
    ("treated", "effect", "welch", "decided"),
    [(TREATED_1, -0.371, 0.2504, False), (TREATED_2, 0.494, 0.0479, True)],
)
def test_plant_growth_is_decided_as_published(treated: np.ndarray, effect: float, welch: float, decided: bool):
    found = estimate_difference(CONTROL, treated, paired=False)
    assert found.effect == pytest.approx(effect)
    assert found.t_p == pytest.approx(welch, abs=5e-5)  # t = 1.1913 and -2.1340
    assert (found.p < 0.05) == decided == (not found.low <= 0 <= found.high)


@pytest.mark.parametrize("n", [6, 8])
def test_p_lies_where_counting_every_arrangement_puts_it(n: int):
    draw = np.random.default_rng(n)
    for _ in range(20):
        values = draw.lognormal(0, 1, n) - draw.lognormal(0, 1, n) + 0.5
        sums = [
            abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=n)
        ]
        exact = sum(one >= abs(values.sum()) * (1 - 1e-12) for one in sums) / 2**n
        found = p_values(values[None], Design(n, n, True))[0]
        assert exact - 2 / 2**n <= found <= exact
    for _ in range(5):
        a, b = draw.exponential(size=4) + 0.5, draw.exponential(size=4)
        exact = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), n_resamples=np.inf).pvalue
        assert exact - 2 / 70 <= p_values(np.r_[a, b][None], Design(4, 4, False))[0] <= exact


@pytest.mark.parametrize(("near", "far"), [([1.0, 1.25], [1.5, 9.0]), ([1.0, 1.25, 1.5], [2.0, 9.0])])
def test_how_far_beyond_all_pairs_no_difference_lies_is_told_by_the_pairs_next_to_it(near: list[float], far: list[float]):
    """The next two of four, the next three of five."""
    design = Design(len(near + far), len(near + far), True)
    found, others_apart, near_apart = p_values(
        np.array([near + far, [*near, *(8 * value for value in far)], [*near[:-1], near[-1] + 0.25, *far]]), design
    )
    assert found == others_apart < near_apart


@pytest.mark.parametrize(
    "design", [Design(3, 3, True), Design(5, 5, True), Design(7, 7, True), Design(4, 4, False), Design(3, 6, False)]
)
def test_p_and_interval_agree_and_move_with_the_data(design: Design):
    draw = np.random.default_rng(1)
    runs = design.a if design.paired else design.a + design.b
    values = draw.standard_normal((400, runs)) + np.r_[np.ones(design.a), np.zeros(runs - design.a)]
    low, high = intervals(values, design)
    p = p_values(values, design)
    assert (low < high).all()
    assert ((p < 0.05) == ((low > 0) | (high < 0))).mean() > 0.995  # the quantile and the count of the tail may differ by one draw
    shift = np.r_[np.full(design.a, 2.5), np.zeros(runs - design.a)]
    assert np.allclose(lower_ends(values + shift, design), low + 2.5)
    assert np.allclose(lower_ends(3 * values, design), 3 * low)
    wider, _ = intervals(values, design, level=0.01)
    assert (wider < low).all()
    assert np.allclose(p_values(-values, design), p)


def test_typical_values_end_with_the_difference_of_the_means():
    assert np.allclose(typical_weights(Design(3, 3, True))[-1], 1 / 3)
    weights = typical_weights(Design(2, 3, False))
    assert len(weights) == math.comb(5, 2) - 1
    assert np.allclose(np.abs(weights[:, :2].sum(axis=1)), 1)
    many = typical_weights(Design(12, 12, False))
    assert 99_900 < len(many) < 100_000 and np.allclose(many[:, :12].sum(axis=1), -many[:, 12:].sum(axis=1))


def test_equal_and_constant_runs_are_no_trouble():
    same = estimate_difference(np.ones(5), np.ones(5), paired=True)
    assert (same.effect, same.low, same.high, same.p, same.t_p, same.noise) == (0, 0, 0, 1, 1, 0)
    moved = estimate_difference(np.ones(5), np.full(5, 2.0), paired=True)
    assert (moved.low, moved.high) == (1, 1) and moved.p < 0.001
    for bad in (np.array([1.0]), np.array([1.0, math.nan])):
        with pytest.raises(ValueError, match="at least two finite values"):
            estimate_difference(bad, bad, paired=True)


def test_few_unpaired_runs_have_student_s_interval_with_the_pooled_noise():
    one, other = np.array([1.0, 1.6]), np.array([2.9, 4.1, 3.2])
    found, student = estimate_difference(one, other, paired=False), stats.ttest_ind(other, one)
    interval = student.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((student.pvalue, interval.low, interval.high))
    # Sums of squares 0.18 and 0.78, of three degrees of freedom.
    assert found.noise == pytest.approx(math.sqrt((0.18 + 0.78) / 3))


def test_few_runs_that_scatter_are_not_taken_to_be_as_steady_as_many():
    """Then Welch's t has to agree. Where it is the many that scatter, ranks alone decide."""
    few, many = np.array([1.0, 2.6, 4.3]), np.array([0.1, -0.2, 0.3, -0.1, 0.2, -0.3, 0.05, 0.0])
    steady, wild = np.array([1.1, 0.6, 1.2, 1.4]), np.array([0.8, 0.7, -4.5, 0.3, 0.0, -0.2, -0.8])
    for one, other in ((few, many), (many, few)):
        found = estimate_difference(one, other, paired=False)
        interval = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
        assert found.p == pytest.approx(found.t_p) and found.p > 0.1
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    for one, other in ((steady, wild), (wild, steady)):
        found = estimate_difference(one, other, paired=False)
        assert found.p < 0.02 < 0.06 < found.t_p
        assert found.low * found.high > 0


def test_correction_is_holm_s_and_never_below_the_test_itself():
    assert corrected([0.03], [0.01]) == [0.03]
    assert corrected([0.01, 0.02, 0.04], [0.01, 0.02, 0.04]) == pytest.approx([0.03, 0.04, 0.04])
    assert corrected([0.06, 0.02], [0.001, 0.02]) == pytest.approx([0.06, 0.02])
    # Nothing less significant gets a smaller p, in whatever order they were asked.
    assert corrected([0.025, 0.02], [0.025, 0.02]) == pytest.approx([0.04, 0.04])
    assert corrected([0.6, 0.7], [0.6, 0.7]) == [1.0, 1.0]


def test_the_noise_of_few_runs_is_known_badly():
    low, high = noise_interval(1.0, 4)
    assert (low, high) == (pytest.approx(0.599, abs=1e-3), pytest.approx(2.874, abs=1e-3))  # chi-squared 11.143 and 0.484


def test_planning_agrees_with_textbook_power_where_t_is_used():
    # J. Cohen, Statistical Power Analysis (1988), table 2.4.1: d = 0.8, alpha = 0.05, power 0.80 takes 26 an arm; d = 0.5 takes 64.
    assert seeds_needed(0.8, 1.0, paired=False) == 26
    assert abs((seeds_needed(0.5, 1.0, paired=False) or 0) - 64) <= 1
    assert power_at(visible_effect(1.0, math.inf, Design(5, 5, True)), Design(5, 5, True)) == pytest.approx(0.8, abs=1e-3)
    assert visible_effect(1.0, 4, Design(5, 5, True)) > visible_effect(1.0, math.inf, Design(5, 5, True))
    assert seeds_needed(0.0, 1.0, paired=True) is None
    assert seeds_needed(1e-6, 1.0, paired=True) is None
    assert seeds_needed(1.0, 0.0, paired=True) == 2


def test_what_is_needed_has_a_range_as_wide_as_what_is_known():
    found = need(1.0, 1.5, Design(5, 5, True))
    assert found.seeds is not None and found.fewest is not None
    assert found.fewest < found.seeds and found.most is None
    sure = need(1.0, 1.5, Design(40, 40, True))
    assert sure.fewest is not None and sure.seeds is not None and sure.most is not None
    assert sure.fewest < sure.seeds < sure.most


FULL = os.environ.get("LLAMA_LAB_FULL") == "1"


@pytest.mark.skipif(not FULL, reason="LLAMA_LAB_FULL=1 simulates every cell: ten minutes")
@pytest.mark.parametrize("part", ["levels", "power", "several", "crossed", "needs"])
def test_every_claim_holds(part: str):
    cells = [work(*arguments) for work, arguments in jobs(20_000, part)[part]]
    assert [cell for cell in cells if cell.passed is False] == []


@pytest.mark.parametrize("design", [Design(4, 4, True), Design(5, 5, True), Design(4, 4, False)])
@pytest.mark.parametrize("shape", ["normal", "exponential"])
def test_levels_hold_on_a_small_scale(design: Design, shape: str):
    """Four standard errors wide; tests/lab/verdict_bars.py has the bars themselves."""
    false, missed = level_cell(design, shape, 4000).figures
    assert false == pytest.approx(5, abs=1.4)
    assert missed == pytest.approx(5, abs=1.4)


def test_visible_differences_are_seen_on_a_small_scale():
    assert power_cell(Design(5, 5, True), 3000).figures == pytest.approx((80, 80), abs=3)


def test_visible_differences_are_seen_in_spite_of_the_correction():
    one, every, false = several_cell(Design(5, 5, True), 5, 3000).figures
    assert one == pytest.approx(80, abs=3)
    assert every > one and false < 6.5


@pytest.mark.parametrize("shares", [(0.0, 1.0, 0.0), (0.1, 0.7, 0.2), (0.5, 0.5, 0.0)])
def test_pairs_that_share_seeds_are_not_called_different_too_often(shares: tuple[float, ...]):
    independent, false, missed, seen = crossed_cell((4, 3), shares, "normal", 4000).figures
    assert independent > 25 and max(false, missed) < 6.4 and seen > 77


def test_crossed_pairs_have_the_error_of_their_mean_squares():
    values = np.array([[1.0, 3.0], [2.0, 8.0], [6.0, 4.0]])
    found = estimate_difference(np.zeros(6), values.ravel(), paired=True, crossed=(3, 2))
    # Means 4; of weights 2, 5, 5; of orders 3, 5. Mean squares: 2 * 6 / 2 and 3 * 2 / 1.
    error = math.sqrt((6 + 6) / 6)
    assert found.noise == pytest.approx(math.sqrt(12))
    assert (found.low, found.high) == pytest.approx((4 - 12.7062 * error, 4 + 12.7062 * error), rel=1e-5)
    assert found.p == found.t_p == pytest.approx(2 * stats.t.sf(4 / error, 1))


@pytest.mark.parametrize("paired", [True, False])
def test_several_comparisons_need_more_seeds(paired: bool):
    needed = [seeds_needed(1.0, 1.0, paired=paired, comparisons=count) or 0 for count in (1, 3, 8)]
    assert needed[0] < needed[1] < needed[2]
    for count, seeds in zip((3, 8), needed[1:], strict=True):
        # The normal approximation of the strictest step, which few runs exceed a little.
        z = stats.norm.isf(0.025 / count) + stats.norm.isf(0.2)
        assert 0 < seeds - (1 if paired else 2) * z**2 < 6
        seen = [power_at(1.0, Design(number, number, paired), count) for number in (seeds - 1, seeds)]
        assert seen[0] < 0.8 <= seen[1]
    alone, among_four = (need(0.5, 1.0, Design(6, 6, paired), count) for count in (1, 4))
    assert (among_four.seeds or 0) > (alone.seeds or 0) > 0
