"""Ratios from pairs, within a campaign and across two, against closed forms and SciPy."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from lem.results.stats import (
    Effect,
    anchored_effect,
    holm,
    paired_effect,
    regularized_incomplete_beta,
    student_t_cdf,
    student_t_quantile,
)


def noisy(rng: random.Random, n: int, log_mean: float, sd: float) -> list[float]:
    return [math.exp(rng.gauss(log_mean, sd)) for _ in range(n)]


def test_a_ratio_is_taken_pair_by_pair() -> None:
    """Cycles drift by 20 %, the ratio does not: paired it is sharp."""
    slow = [100.0, 120.0, 80.0, 110.0]
    fast = [slow[0] * 1.02, slow[1] * 1.021, slow[2] * 1.019, slow[3] * 1.02]
    effect = paired_effect(fast, slow)
    lower, upper = effect.interval() or (0, 9)
    assert effect.ratio == pytest.approx(1.02, abs=1e-4)
    assert 1.018 < lower < upper < 1.022
    assert (effect.p_value or 1) < 1e-4
    assert effect.n_cycles == (4,)


def test_a_ratio_of_one_is_not_significant() -> None:
    effect = paired_effect([100.0, 101.0, 99.0], [101.0, 100.0, 99.0])
    lower, upper = effect.interval() or (9, 0)
    assert (effect.p_value or 0) > 0.5
    assert lower < 1 < upper


def test_the_p_value_is_that_of_the_t_test() -> None:
    """Log ratios 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.464 at 2 degrees, whose closed form gives p."""
    t = 2 * math.sqrt(3)
    expected = 2 * (0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert paired_effect([math.e, math.e**2, math.e**3], [1.0, 1.0, 1.0]).p_value == pytest.approx(expected)


def test_the_ratio_turned_round_is_the_inverse() -> None:
    one, other = paired_effect([2.0, 3.0], [1.0, 1.4]), paired_effect([1.0, 1.4], [2.0, 3.0])
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert (one.interval() or (0, 0))[0] == pytest.approx(1 / (other.interval() or (0, 1))[1])
    assert one.p_value == pytest.approx(other.p_value)


def test_one_pair_has_a_ratio_and_nothing_else() -> None:
    effect = paired_effect([2.0], [1.0])
    assert effect.ratio == pytest.approx(2.0)
    assert (effect.interval(), effect.p_value, effect.p_above(0), effect.p_below(0)) == (None, None, None, None)


def test_pairs_that_never_differ_are_equal_for_sure() -> None:
    effect = paired_effect([5.0, 6.0], [5.0, 6.0])
    assert (effect.ratio, effect.p_value, effect.interval()) == (1.0, 1.0, (1.0, 1.0))
    assert effect.p_below(0.01) == 0.0
    assert effect.p_above(0.01) == 1.0


def test_one_sided_p_values_of_a_bound_add_up_to_one() -> None:
    effect = paired_effect([1.02, 1.03, 1.05], [1.0, 1.0, 1.0])
    assert (effect.p_above(0.02) or 0) + (effect.p_below(0.02) or 0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("above", "below", "said"),
    [([1.0], [1.0, 2.0], "no pairs"), ([], [], "no pairs"), ([0.0], [1.0], "positive"), ([math.inf], [1.0], "finite")],
)
def test_what_is_no_pair_is_refused(above: list[float], below: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        paired_effect(above, below)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_paired_effects_are_those_of_scipy(n: int) -> None:
    rng = random.Random(n)
    for _ in range(20):
        above, below = noisy(rng, n, 0.01, 0.02), noisy(rng, n, 0.0, 0.02)
        logs = [list(map(math.log, side)) for side in (above, below)]
        found = paired_effect(above, below)
        expected = stats.ttest_rel(*logs)
        bounds = expected.confidence_interval(0.95)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.interval(0.95) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)), rel=1e-9)
        shifted = [value - 0.03 for value in logs[0]]
        above_bound = stats.ttest_rel(shifted, logs[1], alternative="greater")
        assert found.p_above(0.03) == pytest.approx(above_bound.pvalue, rel=1e-9)


@pytest.mark.parametrize(("n_now", "n_before"), [(2, 2), (3, 5), (10, 4)])
def test_anchored_effects_are_those_of_scipys_welch_test(n_now: int, n_before: int) -> None:
    rng = random.Random(n_now)
    for _ in range(20):
        now, before = noisy(rng, n_now, 0.03, 0.02), noisy(rng, n_before, 0.0, 0.01)
        found = anchored_effect(paired_effect(now, [1.0] * n_now), paired_effect(before, [1.0] * n_before))
        expected = stats.ttest_ind(list(map(math.log, now)), list(map(math.log, before)), equal_var=False)
        bounds = expected.confidence_interval(0.95)
        assert found.df == pytest.approx(expected.df, rel=1e-9)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.interval(0.95) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)), rel=1e-9)


def test_an_anchored_effect_without_an_error_on_one_side_has_none() -> None:
    one, several = paired_effect([2.0], [1.0]), paired_effect([2.0, 2.1], [1.0, 1.0])
    found = anchored_effect(several, one)
    assert (found.std_error, found.n_cycles) == (None, (1, 2))


def test_an_anchored_effect_of_constant_ratios_is_certain() -> None:
    same = paired_effect([2.0, 2.0], [1.0, 1.0])
    assert anchored_effect(same, same) == Effect(0.0, 0.0, 2, (2, 2))


@pytest.mark.parametrize("df", [1, 2, 2.7, 4, 9, 30, 1000])
def test_students_t_is_that_of_scipy(df: float) -> None:
    for t in (-40.0, -3.1, -0.2, 0.0, 0.4, 2.2, 12.0):
        assert student_t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9)
    for probability in (1e-9, 0.001, 0.025, 0.3, 0.9, 0.975, 0.9999):
        assert student_t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-8)


def test_the_incomplete_beta_function_is_that_of_scipy() -> None:
    rng = random.Random(3)
    for _ in range(200):
        a, b, x = rng.uniform(0.1, 40), rng.uniform(0.1, 40), rng.random()
        found = regularized_incomplete_beta(a, b, x, 1 - x)
        assert found == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-9, abs=1e-300)


def test_holm_keeps_the_chance_of_one_false_finding_below_the_level() -> None:
    """2,000 families of five true hypotheses, seeded: at most 5 %, within three standard errors."""
    rng = random.Random(8)
    found = sum(min(holm([rng.random() for _ in range(5)])) < 0.05 for _ in range(2000))
    assert found / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert found / 2000 > 0.05 - 3 * math.sqrt(0.05 * 0.95 / 2000)
