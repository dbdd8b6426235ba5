"""Comparisons: against hand-computed cases, scipy and statsmodels, and by how often the intervals hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from dora_lab.comparisons import (
    Pairs,
    by_seed,
    corrected_wording,
    count_pairs,
    difference_p_value,
    holm,
    macro_difference,
    macro_draws,
    win_tie_loss,
    within,
)
from dora_lab.power import mcnemar_power
from dora_lab.statistics import (
    Interval,
    draws_of,
    mean_of_draws,
    paired_difference,
    paired_draws,
    seed_interval,
    wilson_interval,
)


def runs(correct):
    """{seed: {id: right}} of a (seeds, items) array."""
    return {seed: {f"q-{item}": bool(right) for item, right in enumerate(row)} for seed, row in enumerate(correct)}


# --- the four counts --------------------------------------------------------------------------------------------------


def test_answers_are_counted_by_id_whatever_their_order():
    first = {"a": True, "b": True, "c": False, "d": False, "e": True}
    second = {"e": False, "d": False, "c": True, "b": True, "a": True}
    assert count_pairs(first, second) == Pairs(both=2, first_only=1, second_only=1, neither=1)


@pytest.mark.parametrize("second", [{}, {"a": True}, {"a": True, "c": True}])
def test_different_questions_are_refused(second):
    with pytest.raises(ValueError, match="same questions"):
        count_pairs({"a": True, "b": False}, second)


def test_seeds_are_never_pooled():
    generator = np.random.default_rng(0)
    a, b = runs(generator.random((3, 40)) < 0.7), runs(generator.random((4, 40)) < 0.6)
    found = by_seed(a, b)
    assert list(found) == [0, 1, 2] and {pairs.n for pairs in found.values()} == {40}
    assert found[1] == count_pairs(a[1], b[1])


# --- McNemar ----------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    # 1 of 6 discordant questions: 2 · (C(6,0) + C(6,1)) / 2⁶ = 14 / 64
    assert Pairs(10, 1, 5, 4).p_value == pytest.approx(14 / 64)
    assert Pairs(10, 5, 1, 4).p_value == pytest.approx(14 / 64)
    assert Pairs(10, 3, 3, 4).p_value == 1.0
    assert Pairs(10, 0, 0, 4).p_value == 1.0


@pytest.mark.parametrize("only", [(0, 9), (3, 11), (40, 71), (87, 147)])
def test_mcnemar_is_scipys_binomial_test_and_statsmodels(only):
    pairs = Pairs(200, *only, 90)
    assert pairs.p_value == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert pairs.p_value == pytest.approx(mcnemar([[200, only[0]], [only[1], 90]], exact=True).pvalue)


def test_what_is_detectable_is_found_four_times_in_five():
    pairs = Pairs(800, 100, 110, 190)
    assert mcnemar_power(1200, pairs.discordant, pairs.detectable) == pytest.approx(0.8, abs=0.01)
    assert math.isnan(Pairs(8, 0, 0, 2).detectable)


def test_paired_interval_by_hand():
    # b = 12.5, c = 5.5, n = 102: (7 ± 1.959964 · √(18 - 49 / 102)) / 102
    got = Pairs(50, 12, 5, 33).interval()
    half = 1.959964 * math.sqrt(18 - 49 / 102) / 102
    assert (got.estimate, got.low, got.high) == pytest.approx((0.07, 7 / 102 - half, 7 / 102 + half), abs=1e-6)


@pytest.mark.parametrize("only, apart", [((20, 90), True), ((50, 52), False), ((61, 60), False), ((140, 60), True)])
def test_mcnemar_and_bootstrap_agree_on_clear_cases(only, apart):
    pairs = Pairs(600, *only, 300)
    kinds = [(1, 1)] * pairs.both + [(1, 0)] * only[0] + [(0, 1)] * only[1] + [(0, 0)] * pairs.neither
    a, b = np.array(kinds).T.reshape(2, 1, -1)  # (methods, seeds, items)
    interval = paired_difference(runs(a), runs(b))
    assert (pairs.p_value < 0.05) == apart
    assert (not interval.low <= 0 <= interval.high) == apart
    assert (interval.low, interval.high) == pytest.approx((pairs.interval().low, pairs.interval().high), abs=0.004)


# --- several tasks ----------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # smallest first: 3 · 0.01, then max(2 · 0.02, before), then max(1 · 0.5, before)
    assert holm({"a": 0.5, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.5, "b": 0.03, "c": 0.04})
    assert holm({"a": 0.04, "b": 0.03}) == pytest.approx({"a": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_macro_average_counts_every_task_the_same():
    one = np.array([1] * 60 + [0] * 40)[None]
    first = {"small": runs(one[:, :100]), "large": runs(np.ones((1, 1000)))}
    second = {"small": runs(np.zeros((1, 100))), "large": runs(np.ones((1, 1000)))}
    got = macro_difference(first, second)
    assert got.estimate == pytest.approx(0.3) and got.items == 1100 and got.seeds == 1
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100) / 2
    assert got.half_width == pytest.approx(half, rel=0.1)


def test_macro_average_of_one_task_is_its_difference():
    generator = np.random.default_rng(1)
    a, b = runs(generator.random((3, 120)) < 0.7), runs(generator.random((3, 120)) < 0.6)
    assert macro_difference({"t": a}, {"t": b}) == paired_difference(a, b)


def test_macro_average_refuses_other_tasks():
    with pytest.raises(ValueError, match="the same tasks"):
        macro_difference({"a": runs(np.ones((1, 3)))}, {"b": runs(np.ones((1, 3)))})


@pytest.mark.parametrize("gap", [0.0, 0.06, 0.15, 0.5])
def test_p_value_and_interval_say_the_same(gap):
    generator = np.random.default_rng(2)
    a, b = runs(generator.random((4, 300)) < 0.5 + gap / 2), runs(generator.random((4, 300)) < 0.5 - gap / 2)
    draws = paired_draws(a, b)
    p, interval = difference_p_value(draws), draws.interval()
    assert (p < 0.05) == (not interval.low <= 0 <= interval.high)
    at_p = draws.interval(min(1 - p, 1 - 1e-9)) if p < 0.999 else draws.interval(0.5)
    if 0.01 < p < 0.9:
        assert min(abs(at_p.low), abs(at_p.high)) < 2e-3


def test_p_value_of_one_pair_of_runs_is_near_mcnemars():
    pairs = Pairs(700, 60, 84, 156)
    difference = np.array([0] * pairs.both + [1] * 60 + [-1] * 84 + [0] * pairs.neither, dtype=float)[None]
    assert difference_p_value(draws_of(difference, 20_000)) == pytest.approx(pairs.p_value, abs=0.02)


def test_p_value_where_nothing_differs_is_one():
    same = runs(np.ones((3, 10)))
    assert difference_p_value(macro_draws({"t": same}, {"t": same})) == pytest.approx(1, abs=1e-3)


def test_win_tie_loss_goes_by_the_intervals_and_by_holm():
    found = [Interval(0.1, 0.02, 0.2), Interval(0.1, -0.01, 0.2), Interval(-0.1, -0.2, -0.01), Interval(0.0, 0.0, 0.0)]
    differences = dict(zip("abcd", found, strict=True))
    said = corrected_wording(differences, {"a": 0.01, "b": 0.2, "c": 0.04, "d": 1.0})
    assert win_tie_loss(said.values()) == (1, 2, 1)
    assert win_tie_loss(corrected_wording(differences, {"a": 0.06, "b": 0.2, "c": 0.04, "d": 1.0}).values()) == (
        0,
        3,
        1,
    )


# --- equivalence ------------------------------------------------------------------------------------------------------


def test_equivalence_needs_both_limits_inside_the_margin():
    assert within(Interval(0.001, -0.008, 0.009, 0.9), 0.01)
    assert not within(Interval(0.005, -0.002, 0.012, 0.9), 0.01)
    with pytest.raises(ValueError, match="above 0"):
        within(Interval(0, 0, 0), 0)


@pytest.mark.slow
def test_equivalence_is_two_one_sided_tests():
    generator = np.random.default_rng(3)
    a, b = generator.random((2, 1, 3000)) < 0.8
    difference = a[0].astype(float) - b[0]
    for margin in (0.005, 0.03, 0.06):
        low = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        high = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        assert within(paired_draws(runs(a), runs(b)).interval(0.90), margin) == (max(low, high) < 0.05)


# --- how often the 95 % intervals hold the truth ----------------------------------------------------------------------


def covered(intervals, truth):
    """Share of (experiments, 2) limits that hold the truth."""
    low, high = np.asarray(intervals).T
    return np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize("p, n", [(0.5, 400), (0.8, 1267), (0.35, 3270)])
def test_wilson_covers(p, n):
    correct = np.random.default_rng(4).binomial(n, p, 4000)
    limits = {c: wilson_interval(int(c), n) for c in set(correct.tolist())}
    assert 0.93 <= covered([(limits[c].low, limits[c].high) for c in correct.tolist()], p) <= 0.97


@pytest.mark.parametrize("shares", [(0.7, 0.08, 0.05, 0.17), (0.5, 0.2, 0.2, 0.1), (0.9, 0.03, 0.01, 0.06)])
def test_paired_interval_of_two_models_covers(shares):
    counts = np.random.default_rng(5).multinomial(1000, shares, 4000)
    found = [Pairs(*map(int, row)).interval() for row in counts]
    assert 0.93 <= covered([(i.low, i.high) for i in found], shares[1] - shares[2]) <= 0.97


def simulate(generator, seeds, items, seed_spread, experiments, resamples=400):
    """(limits, accuracies): experiments on questions of different difficulty, with seeds of different luck."""
    limits, accuracies = [], []
    for _ in range(experiments):
        ability = generator.normal(0, 1, items)
        luck = generator.normal(0, seed_spread, (2, seeds, 1))
        right = generator.random((2, seeds, items)) < 1 / (1 + np.exp(-(ability + luck)))
        found = draws_of(right[0].astype(float) - right[1], resamples, int(generator.integers(2**31))).interval()
        limits.append((found.low, found.high))
        accuracies.append(right[0].mean(axis=1))
    return limits, accuracies


@pytest.mark.slow
@pytest.mark.parametrize("seeds, items, spread", [(1, 200, 0.0), (5, 200, 0.6), (3, 200, 1.0)])
def test_bootstrap_over_seeds_and_items_covers(seeds, items, spread):
    """One pair of runs, and several seeds that differ by more than their questions' noise."""
    limits, _ = simulate(np.random.default_rng(6), seeds, items, spread, 600)
    assert 0.93 <= covered(limits, 0) <= 0.97


def test_where_seeds_do_not_differ_the_bootstrap_is_too_wide_never_too_narrow():
    """Questions and seeds each bring the noise of a single answer along: it is counted twice."""
    limits, _ = simulate(np.random.default_rng(7), 5, 200, 0.0, 200)
    assert covered(limits, 0) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds, spreads", [(3, (1.0, 1.0)), (3, (1.5, 1.5, 1.5)), (5, (1.0, 1.0, 1.0)), (3, (0.1, 1.0))]
)
def test_the_mean_over_tasks_covers(seeds, spreads):
    """Two and three tasks, with as few seeds as are recorded; also where only one task's seeds differ much."""
    generator, held = np.random.default_rng(8), []
    for _ in range(400):
        draws = []
        for spread in spreads:
            chances = generator.normal(0, 1, 200) + generator.normal(0, spread, (2, seeds, 1))
            right = generator.random((2, seeds, 200)) < 1 / (1 + np.exp(-chances))
            draws.append(draws_of(right[0].astype(float) - right[1], 400, int(generator.integers(2**31))))
        found = mean_of_draws(draws).interval()
        held.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_the_mean_of_one_difference_is_that_difference():
    draws = draws_of(np.random.default_rng(0).normal(0, 1, (3, 50)))
    assert mean_of_draws([draws]).interval() == draws.interval()


def test_three_tasks_alike_have_three_times_the_freedom():
    values = np.random.default_rng(0).normal(0, 1, (3, 50))
    one = draws_of(values)
    assert mean_of_draws([one, one, one]).freedom == pytest.approx(6)
    still = draws_of(np.zeros((3, 50)))
    assert mean_of_draws([one, still, still]).freedom == pytest.approx(2)
    assert mean_of_draws([draws_of(values[:1])]).freedom == 0


def test_students_interval_over_seeds_covers():
    samples = np.random.default_rng(9).normal(0.7, 0.03, (3000, 5))
    assert 0.93 <= covered([(i.low, i.high) for i in map(seed_interval, samples)], 0.7) <= 0.97
