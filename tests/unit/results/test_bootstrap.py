"""The bootstrap interval: its boundary cases and what a notebook may rely on."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from lem.results.bootstrap import BootstrapResult, bootstrap_ci, compute_metric_ci

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


def test_two_equal_samples_are_still_two() -> None:
    assert "unreliable" in (bootstrap_ci([3.0, 3.0]).warning or "")


def test_the_same_seed_gives_the_same_interval() -> None:
    assert bootstrap_ci(SAMPLES, seed=7) == bootstrap_ci(list(SAMPLES), seed=7)


def test_another_seed_gives_another_interval_of_the_same_mean() -> None:
    one, other = bootstrap_ci(SAMPLES, seed=1), bootstrap_ci(SAMPLES, seed=2)
    assert bounds(one) != bounds(other)
    assert one.mean == other.mean


def test_the_interval_does_not_depend_on_the_random_state_of_the_program() -> None:
    import random

    before = bootstrap_ci(SAMPLES)
    random.seed(1)
    assert bootstrap_ci(SAMPLES) == before


def test_the_interval_of_the_defaults_never_changes() -> None:
    """Reports promise the same bytes for the same input, on every Python."""
    lower, upper = bounds(bootstrap_ci(SAMPLES))
    assert (round(lower, 9), round(upper, 9)) == (98.942857143, 101.757857143)


def test_higher_confidence_is_wider() -> None:
    widths = [upper - lower for lower, upper in (bounds(bootstrap_ci(SAMPLES, confidence=c)) for c in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths)
    assert widths[0] < widths[1] < widths[2]


def test_more_spread_is_wider() -> None:
    narrow = bounds(bootstrap_ci(SAMPLES))
    wide = bounds(bootstrap_ci([100 + 10 * (value - 100) for value in SAMPLES]))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


def test_the_order_of_samples_does_not_move_the_mean() -> None:
    assert bootstrap_ci(sorted(SAMPLES)).mean == bootstrap_ci(SAMPLES).mean


def test_one_iteration_is_enough_for_a_degenerate_interval() -> None:
    lower, upper = bounds(bootstrap_ci(SAMPLES, n_iterations=1))
    assert lower == upper


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


def test_a_metric_has_the_same_fields_measured_or_not() -> None:
    assert set(compute_metric_ci([])) == set(compute_metric_ci([1.0])) == set(compute_metric_ci(SAMPLES))


def test_a_metric_passes_its_confidence_on() -> None:
    wide, narrow = compute_metric_ci(SAMPLES, confidence=0.99), compute_metric_ci(SAMPLES, confidence=0.5)
    assert wide["confidence"] == 0.99
    assert wide["ci_upper"] - wide["ci_lower"] > narrow["ci_upper"] - narrow["ci_lower"]


def test_a_metric_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        compute_metric_ci([1.0, math.nan])
    with pytest.raises(ValueError, match="confidence"):
        compute_metric_ci([], confidence=2)
