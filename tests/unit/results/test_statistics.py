"""Student t, intervals on logs and Holm, against values that do not come from this code."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lem.results.bootstrap import BOOTSTRAP_COVERAGE, bootstrap_ci, bootstrap_coverage_label, log_t_interval
from lem.results.stats import holm, regularized_incomplete_beta, student_t_cdf, student_t_quantile

# Two-sided 95 % and others, from the printed tables of Student's t (Abramowitz and Stegun, table 26.10).
QUANTILES = [
    (0.975, 1, 12.706),
    (0.975, 2, 4.303),
    (0.975, 4, 2.776),
    (0.975, 9, 2.262),
    (0.975, 30, 2.042),
    (0.995, 3, 5.841),
    (0.95, 10, 1.812),
    (0.9995, 1, 636.619),
]


@pytest.mark.parametrize(("probability", "df", "t"), QUANTILES)
def test_quantiles_are_those_of_the_tables(probability: float, df: int, t: float) -> None:
    assert round(student_t_quantile(probability, df), 3) == t


def test_quantiles_become_those_of_the_normal_distribution() -> None:
    assert student_t_quantile(0.975, 1e7) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-6)


def test_quantiles_are_symmetric_and_zero_in_the_middle() -> None:
    assert student_t_quantile(0.025, 4) == pytest.approx(-student_t_quantile(0.975, 4))
    assert student_t_quantile(0.5, 4) == 0


@pytest.mark.parametrize("probability", [1e-12, 1e-6, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("df", [1, 2, 3.5, 50])
def test_quantile_and_distribution_function_are_inverse(probability: float, df: float) -> None:
    assert student_t_cdf(student_t_quantile(probability, df), df) == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize("t", [-300.0, -2.0, -0.3, 0.0, 1e-9, 0.7, 1.5, 40.0])
def test_the_distribution_function_is_the_closed_form_of_one_and_two_degrees(t: float) -> None:
    assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
    assert student_t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_far_tails_keep_their_precision() -> None:
    assert student_t_cdf(-1e6, 1) == pytest.approx(math.atan(1e-6) / math.pi, rel=1e-9)
    assert (student_t_cdf(-math.inf, 3), student_t_cdf(math.inf, 3)) == (0.0, 1.0)


@pytest.mark.parametrize(("df", "probability"), [(0, 0.5), (-1, 0.5), (3, 0.0), (3, 1.0), (3, math.nan)])
def test_quantiles_of_nothing_are_refused(df: float, probability: float) -> None:
    with pytest.raises(ValueError, match=r"degrees of freedom|probability"):
        if df > 0:
            student_t_quantile(probability, df)
        else:
            student_t_cdf(1.0, df)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (7, 2), (10, 10), (1, 30)])
@pytest.mark.parametrize("x", [0.0, 0.001, 0.2, 0.5, 0.83, 0.999, 1.0])
def test_incomplete_beta_is_the_binomial_tail_for_whole_parameters(a: int, b: int, x: float) -> None:
    n = a + b - 1
    tail = math.fsum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert regularized_incomplete_beta(a, b, x, 1 - x) == pytest.approx(tail, rel=1e-10, abs=1e-300)


def test_incomplete_beta_is_symmetric() -> None:
    mirrored = 1 - regularized_incomplete_beta(0.5, 2.5, 0.7, 0.3)
    assert regularized_incomplete_beta(2.5, 0.5, 0.3, 0.7) == pytest.approx(mirrored)


def test_the_interval_on_logs_is_that_of_the_formula() -> None:
    interval = log_t_interval([1.0, math.e, math.e**2])
    half = 4.302652729749464 / math.sqrt(3)  # t at 2 degrees of freedom; the logs 0, 1, 2 have standard deviation 1
    assert interval.geometric_mean == pytest.approx(math.e)
    assert interval.ci_lower == pytest.approx(math.exp(1 - half))
    assert interval.ci_upper == pytest.approx(math.exp(1 + half))
    assert interval.n_samples == 3
    assert interval.warning is None


def test_the_interval_on_logs_scales_with_the_unit() -> None:
    joules = log_t_interval([100.0, 104.0, 99.0])
    kilojoules = log_t_interval([0.1, 0.104, 0.099])
    assert joules.ci_upper == pytest.approx(1000 * (kilojoules.ci_upper or 0))


def test_the_interval_on_logs_of_one_sample_is_missing_with_a_warning() -> None:
    interval = log_t_interval([5.0])
    assert (interval.geometric_mean, interval.ci_lower, interval.ci_upper) == (5.0, None, None)
    assert interval.warning


def test_the_interval_on_logs_of_equal_samples_has_zero_width() -> None:
    interval = log_t_interval([0.3, 0.3, 0.3])
    assert (interval.geometric_mean, interval.ci_lower, interval.ci_upper) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize("samples", [[1.0, 0.0, 2.0], [-1.0, 2.0, 3.0], [0.0]])
def test_a_sample_without_a_logarithm_leaves_no_geometric_mean(samples: list[float]) -> None:
    interval = log_t_interval(samples)
    assert (interval.geometric_mean, interval.ci_lower, interval.ci_upper) == (None, None, None)
    assert f"1 of {len(samples)} values are zero or negative" in (interval.warning or "")


def test_higher_confidence_is_wider() -> None:
    narrow, wide = log_t_interval([1.0, 2.0, 3.0], 0.9), log_t_interval([1.0, 2.0, 3.0], 0.99)
    assert (wide.ci_lower or 0) < (narrow.ci_lower or 0)
    assert (wide.ci_upper or 0) > (narrow.ci_upper or 0)


@pytest.mark.parametrize(
    ("samples", "confidence", "said"),
    [([], 0.95, "no samples"), ([1.0, math.nan], 0.95, r"samples\[1\]"), ([1.0, 2.0], 95.0, "confidence")],
)
def test_bad_samples_are_refused(samples: list[float], confidence: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        log_t_interval(samples, confidence)


def test_the_t_interval_covers_what_it_says_where_the_bootstrap_does_not() -> None:
    """400 campaigns of 3 cycles, seeded; 95 % and 75 % are expected, within four standard errors."""
    generator = random.Random(11)
    campaigns = [[generator.gauss(100, 1) for _ in range(3)] for _ in range(400)]
    t_hits = sum((i.ci_lower or 0) <= 100 <= (i.ci_upper or 0) for i in map(log_t_interval, campaigns))
    bootstrap_hits = sum(
        (i.ci_lower or 0) <= 100 <= (i.ci_upper or 0) for i in (bootstrap_ci(c, n_iterations=200) for c in campaigns)
    )
    assert t_hits / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))
    assert bootstrap_hits / 400 == pytest.approx(BOOTSTRAP_COVERAGE[3], abs=4 * math.sqrt(0.75 * 0.25 / 400))


def test_the_true_coverage_of_the_bootstrap_is_named_by_sample_size() -> None:
    labels = {n: bootstrap_coverage_label(n) for n in (1, 2, 3, 4, 5, 10, 20, 30, 31)}
    assert labels == {
        1: None,
        2: "50 %",
        3: "75 %",
        4: "75 to 84 %",
        5: "84 %",
        10: "90 %",
        20: "90 to 93 %",
        30: "93 %",
        31: "over 93 %",
    }


def test_the_true_coverage_at_another_confidence_is_not_known() -> None:
    assert bootstrap_coverage_label(5, 0.9) is None


def test_holm_adjusts_step_by_step_in_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))


def test_holm_never_exceeds_one_and_never_lets_a_larger_p_pass_a_smaller() -> None:
    adjusted = holm([0.9, 0.8, 0.001, 0.02])
    assert adjusted == pytest.approx((1.0, 1.0, 0.004, 0.06))


def test_holm_of_one_or_none_changes_nothing() -> None:
    assert holm([0.2]) == (0.2,)
    assert holm([]) == ()


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_what_is_no_p_value_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="p value"):
        holm([0.5, value])
