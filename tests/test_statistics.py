"""Intervals: against textbook values, by their properties, and by how often they hold what they should."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dora_lab.statistics import Interval, correct_by_id, paired_difference, seed_interval, wilson_interval, wording


def runs(correct):
    """{seed: {id: right}} of a (seeds, items) array."""
    return {seed: {f"q-{item}": bool(right) for item, right in enumerate(row)} for seed, row in enumerate(correct)}


def test_seed_interval_is_scipys_t_interval():
    values = [0.61, 0.66, 0.58, 0.70, 0.63]
    got = seed_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (got.estimate, got.low, got.high) == pytest.approx((np.mean(values), low, high))
    assert got.seeds == 5


def test_seed_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.normal(0.7, 0.03, size=(2000, 3))
    held = [(i := seed_interval(row)).low <= 0.7 <= i.high for row in samples]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_one_seed_has_a_mean_and_no_limits():
    got = seed_interval([0.5])
    assert got.estimate == 0.5 and math.isnan(got.half_width)


@pytest.mark.parametrize("values", [[], [0.5, math.nan]])
def test_seed_interval_refuses_values_without_a_mean(values):
    with pytest.raises(ValueError, match="at least one finite value"):
        seed_interval(values)


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation_and_mirrors(case):
    correct, n = case
    got, mirrored = wilson_interval(correct, n), wilson_interval(n - correct, n)
    z = stats.norm.ppf(0.975)
    for limit in (got.low, got.high):  # a limit p satisfies (p̂ - p)² = z² p (1 - p) / n
        assert (got.estimate - limit) ** 2 == pytest.approx(z**2 * limit * (1 - limit) / n, abs=1e-9)
    assert got.low == pytest.approx(1 - mirrored.high)
    assert -1e-12 <= got.low <= got.estimate + 1e-12 and got.estimate - 1e-12 <= got.high <= 1 + 1e-12


@pytest.mark.parametrize("correct, n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="0 <= correct <= n"):
        wilson_interval(correct, n)


def test_a_level_given_in_percent_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        seed_interval([0.1, 0.2], level=95)


def test_equal_methods_differ_by_nothing():
    answers = runs(np.random.default_rng(0).random((3, 50)) < 0.7)
    assert paired_difference(answers, answers) == Interval(0.0, 0.0, 0.0, seeds=3, items=50)


def test_swapping_the_methods_mirrors_the_difference():
    generator = np.random.default_rng(1)
    a, b = runs(generator.random((5, 400)) < 0.8), runs(generator.random((5, 400)) < 0.7)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth.estimate == pytest.approx(-back.estimate)
    assert forth.low == pytest.approx(-back.high, abs=1e-9)
    assert wording(forth) == "ahead" and wording(back) == "behind"


def test_where_all_questions_agree_the_spread_over_seeds_is_students():
    difference = np.array([0.10, 0.04, 0.07, 0.01, 0.09, 0.05, 0.03, 0.08])
    a = np.stack([np.arange(1000) < 500 + round(1000 * d) for d in difference])
    b = np.stack([np.arange(1000) < 500 for _ in difference])
    got, student = paired_difference(runs(a), runs(b), resamples=8000), seed_interval(difference)
    assert got.estimate == pytest.approx(student.estimate)
    assert 0.9 <= got.half_width / student.half_width <= 1.2  # the questions' own noise comes on top


def test_percentile_limits_follow_seeds_that_lie_to_one_side():
    """What the docstring says they do: with few and skewed seeds they leave zero out where Student's do not."""
    difference = np.array([0.02, 0.02, 0.05])
    a = np.stack([np.arange(1000) < 500 + round(1000 * d) for d in difference])
    b = np.stack([np.arange(1000) < 500 for _ in difference])
    got, student = paired_difference(runs(a), runs(b), resamples=8000), seed_interval(difference)
    assert got.low > student.low and got.high > student.high


def test_the_difference_is_covered_at_least_as_often_as_said_with_three_seeds():
    generator = np.random.default_rng(2)
    held = []
    for _ in range(200):
        ability = generator.normal(0, 1, size=150)  # questions of different difficulty, the same for both methods
        shift = generator.normal(0, 0.4, size=(2, 3, 1))  # seeds of different luck
        right = generator.random((2, 3, 150)) < 1 / (1 + np.exp(-(ability + shift)))
        interval = paired_difference(runs(right[0]), runs(right[1]), resamples=400)
        held.append(interval.low <= 0 <= interval.high)
    assert np.mean(held) >= 0.92


def test_pairing_uses_common_seeds_and_refuses_other_questions():
    answers = runs(np.ones((3, 10)))
    assert paired_difference({s: answers[s] for s in (0, 2)}, answers).seeds == 2
    with pytest.raises(ValueError, match="no common seed"):
        paired_difference({7: answers[0]}, answers)
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(answers, answers | {1: {"other": True}})


def test_one_seed_draws_questions_only():
    generator = np.random.default_rng(3)
    a, b = generator.random((2, 1, 2000)) < np.array([0.75, 0.70]).reshape(2, 1, 1)
    got = paired_difference(runs(a), runs(b))
    difference = a[0].astype(float) - b[0]
    assert got.half_width == pytest.approx(1.96 * difference.std() / math.sqrt(2000), rel=0.08)


def test_the_bootstrap_repeats_itself():
    generator = np.random.default_rng(4)
    a, b = runs(generator.random((3, 80)) < 0.6), runs(generator.random((3, 80)) < 0.6)
    assert paired_difference(a, b) == paired_difference(a, b)
    assert wording(paired_difference(a, b)) == "no difference shown"


def test_wording_of_an_interval_without_limits():
    assert wording(Interval(0.1, math.nan, math.nan)) == "no difference shown"


def test_correct_by_id_compares_prediction_with_gold():
    rows = [{"id": "a", "gold": "true", "prediction": "true"}, {"id": "b", "gold": "true", "prediction": None}]
    assert correct_by_id(rows) == {"a": True, "b": False}
    with pytest.raises(ValueError, match="occurs twice"):
        correct_by_id(rows + rows)
