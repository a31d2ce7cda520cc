"""The bootstrap interval and the t interval on logs: boundary cases, formulas and coverage."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from lem.results.bootstrap import (
    BOOTSTRAP_COVERAGE,
    BootstrapResult,
    bootstrap_ci,
    bootstrap_coverage_label,
    compute_metric_ci,
    log_t_interval,
)

SAMPLES = (98.0, 101.5, 99.2, 103.1, 100.4, 97.7, 102.2)


def bounds(result: BootstrapResult) -> tuple[float, float]:
    assert result.ci_lower is not None
    assert result.ci_upper is not None
    return result.ci_lower, result.ci_upper


def test_one_sample_has_no_interval_and_a_warning() -> None:
    result = bootstrap_ci([42.0])
    assert (result.mean, result.n_samples) == (42.0, 1)
    assert result.ci_lower is None
    assert result.ci_upper is None
    assert result.std is None
    assert result.warning


def test_two_samples_have_an_unreliable_interval() -> None:
    result = bootstrap_ci([10.0, 12.0])
    assert result.mean == 11.0
    assert bounds(result) == (10.0, 12.0)
    assert "unreliable" in (result.warning or "")


def test_many_samples_have_an_interval_around_their_mean_and_no_warning() -> None:
    result = bootstrap_ci(SAMPLES)
    lower, upper = bounds(result)
    assert min(SAMPLES) < lower < result.mean < upper < max(SAMPLES)
    assert result.mean == pytest.approx(statistics.fmean(SAMPLES))
    assert result.std == pytest.approx(statistics.stdev(SAMPLES))
    assert result.n_samples == len(SAMPLES)
    assert result.warning is None


@pytest.mark.parametrize("value", [0.1, 5.0, -3.0, 0.0])
def test_constant_samples_have_zero_width_at_their_value(value: float) -> None:
    result = bootstrap_ci([value] * 6)
    assert (result.mean, result.std, bounds(result)) == (value, 0.0, (value, value))


def test_the_same_seed_gives_the_same_interval() -> None:
    assert bootstrap_ci(SAMPLES, seed=7) == bootstrap_ci(list(SAMPLES), seed=7)


def test_the_interval_of_the_defaults_never_changes() -> None:
    """Reports promise the same bytes for the same input, on every Python."""
    lower, upper = bounds(bootstrap_ci(SAMPLES))
    assert (round(lower, 9), round(upper, 9)) == (98.942857143, 101.757857143)


def test_any_iterable_of_numbers_is_taken() -> None:
    assert bootstrap_ci(iter([1, 2, 3])) == bootstrap_ci((1.0, 2.0, 3.0))


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_ci([])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_refused_by_its_place(value: float) -> None:
    with pytest.raises(ValueError, match=r"samples\[1\] is -?(nan|inf)"):
        bootstrap_ci([1.0, value, 2.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.1, math.nan])
def test_a_confidence_outside_zero_and_one_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence is"):
        bootstrap_ci(SAMPLES, confidence=confidence)


def test_no_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="n_iterations is 0"):
        bootstrap_ci(SAMPLES, n_iterations=0)


@pytest.mark.parametrize("n", [2, 3])
def test_few_samples_span_all_of_them(n: int) -> None:
    """Below four samples more than 2.5 % of the resamples are one sample n times: hence the low true coverage."""
    samples = SAMPLES[:n]
    assert bounds(bootstrap_ci(samples)) == pytest.approx((min(samples), max(samples)))


def test_a_metric_is_ready_for_json() -> None:
    document = compute_metric_ci(SAMPLES, "output_tok_per_s")
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["metric"] == "output_tok_per_s"
    result = bootstrap_ci(SAMPLES)
    for name in ("mean", "std", "ci_lower", "ci_upper", "n_samples", "confidence", "warning"):
        assert document[name] == getattr(result, name)


def test_a_metric_leaves_out_what_was_not_measured_and_counts_it() -> None:
    document = compute_metric_ci([1.0, None, 3.0, None])
    assert (document["mean"], document["n_samples"], document["n_missing"]) == (2.0, 2, 2)


@pytest.mark.parametrize("values", [[], [None, None]])
def test_a_metric_never_measured_is_null_and_says_so(values: list[float | None]) -> None:
    document = compute_metric_ci(values, "gpu_energy_j")
    assert (document["mean"], document["ci_lower"], document["n_samples"]) == (None, None, 0)
    assert document["n_missing"] == len(values)
    assert "nothing was measured" in document["warning"]


def test_a_metric_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        compute_metric_ci([1.0, math.nan])
    with pytest.raises(ValueError, match="confidence"):
        compute_metric_ci([], confidence=2)


def test_the_interval_on_logs_is_that_of_the_formula() -> None:
    interval = log_t_interval([1.0, math.e, math.e**2])
    half = 4.302652729749464 / math.sqrt(3)  # t at 2 degrees of freedom; the logs 0, 1, 2 have standard deviation 1
    assert interval.geometric_mean == pytest.approx(math.e)
    assert interval.ci_lower == pytest.approx(math.exp(1 - half))
    assert interval.ci_upper == pytest.approx(math.exp(1 + half))
    assert interval.n_samples == 3
    assert interval.warning is None


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
