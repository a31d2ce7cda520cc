from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable

import pytest

from lem.base.reasons import Reason
from lem.results.bootstrap import (
    bootstrap_ci,
    bootstrap_coverage_label,
    compute_metric_ci,
    geometric_mean,
    log_t_interval,
)

SAMPLES = (98.0, 101.5, 99.2, 103.1, 100.4, 97.7, 102.2)


@pytest.mark.parametrize(
    ("samples", "mean", "std", "interval", "warning"),
    [
        ([42.0], 42.0, None, (None, None), "1 sample: no interval"),
        ([10.0, 12.0], 11.0, math.sqrt(2), (10.0, 12.0), "2 samples: the interval is unreliable"),
        # Below four samples more than 2.5 % of the resamples are one sample n times: hence the low true coverage.
        (SAMPLES[:3], statistics.fmean(SAMPLES[:3]), statistics.stdev(SAMPLES[:3]), (98.0, 101.5), None),
        # Reports promise the same bytes for the same input, on every Python.
        (SAMPLES, statistics.fmean(SAMPLES), statistics.stdev(SAMPLES), (98.942857143, 101.757857143), None),
        (iter([0.1] * 6), 0.1, 0.0, (0.1, 0.1), None),
        ((-3, -3, -3), -3.0, 0.0, (-3.0, -3.0), None),
    ],
)
def test_samples_have_an_interval_around_their_mean(samples, mean, std, interval, warning) -> None:
    result = bootstrap_ci(samples)
    assert result.mean == pytest.approx(mean)
    assert result.std == (None if std is None else pytest.approx(std))
    assert (result.ci_lower, result.ci_upper) == (interval if std is None else pytest.approx(interval, abs=1e-9))
    assert (result.warning, result.confidence) == (warning, 0.95)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ci([]), "no samples"),
        (lambda: bootstrap_ci([1.0, math.nan, 2.0]), r"samples\[1\] must be finite, got nan"),
        (lambda: bootstrap_ci([1.0, -math.inf, 2.0]), r"samples\[1\] must be finite, got -inf"),
        (lambda: bootstrap_ci(SAMPLES, n_iterations=0), "n_iterations must be at least 1, got 0"),
        *((lambda c=c: bootstrap_ci(SAMPLES, confidence=c), "between 0 and 1") for c in (0.0, 1.0, 95, -0.1, math.nan)),
        (lambda: compute_metric_ci([1.0, math.nan]), "finite"),
        (lambda: compute_metric_ci([], confidence=2), "confidence"),
        (lambda: log_t_interval([]), "no samples"),
        (lambda: log_t_interval([1.0, math.nan]), r"samples\[1\]"),
        (lambda: log_t_interval([1.0, 2.0], 95.0), "confidence"),
    ],
)
def test_what_has_no_interval_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_metric_is_ready_for_json_and_counts_what_was_not_measured() -> None:
    document = compute_metric_ci([*SAMPLES, None, None], "output_tok_per_s")
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["metric"], document["n_missing"]) == ("output_tok_per_s", 2)
    result = bootstrap_ci(SAMPLES)
    for name in ("mean", "std", "ci_lower", "ci_upper", "n_samples", "confidence", "warning"):
        assert document[name] == getattr(result, name)


@pytest.mark.parametrize("values", [[], [None, None]])
def test_a_metric_never_measured_is_null_and_says_so(values: list[float | None]) -> None:
    document = compute_metric_ci(values, "gpu_energy_j")
    assert (document["mean"], document["ci_lower"], document["n_samples"]) == (None, None, 0)
    assert document["n_missing"] == len(values)
    assert "nothing was measured" in document["warning"]


# t at 2 degrees of freedom; the logs 0, 1, 2 have standard deviation 1.
HALF = 4.302652729749464 / math.sqrt(3)


@pytest.mark.parametrize(
    ("samples", "expected", "warning"),
    [
        ([1.0, math.e, math.e**2], (math.e, math.exp(1 - HALF), math.exp(1 + HALF)), None),
        ([0.3, 0.3, 0.3], (0.3, 0.3, 0.3), None),
        ([5.0], (5.0, None, None), "1 sample: no interval"),
        ([1.0, 0.0, 2.0], (None, None, None), "1 of 3 values are zero or negative"),
        ([-1.0], (None, None, None), "1 of 1 values are zero or negative"),
    ],
)
def test_the_interval_on_logs_is_that_of_the_formula(
    samples: list[float], expected: tuple[float | None, ...], warning: str | None
) -> None:
    interval = log_t_interval(samples)
    found = (interval.geometric_mean, interval.ci_lower, interval.ci_upper)
    assert [value is None for value in found] == [value is None for value in expected]
    assert [value for value in found if value] == pytest.approx([value for value in expected if value])
    assert (interval.warning or "").startswith(warning or "")
    assert (interval.warning is None, interval.n_samples) == (warning is None, len(samples))


def test_extreme_samples_have_a_mean_and_an_interval_if_floats_can_hold_it() -> None:
    found = log_t_interval([1e308, 5e-324, 1.0])
    assert (found.ci_lower, found.ci_upper, found.reason) == (None, None, Reason.of("out_of_range"))
    assert found.geometric_mean == pytest.approx(math.exp((math.log(1e308) + math.log(5e-324)) / 3))
    close = log_t_interval([1e308, 1.01e308])
    assert close.geometric_mean == pytest.approx(1.005e308, rel=1e-4)
    assert close.reason is None
    large = bootstrap_ci([1e308, 1.1e308, 1.2e308])
    assert large.mean == pytest.approx(1.1e308)
    assert large.std == pytest.approx(1e307)
    small = bootstrap_ci([5e-324, 1e-323])
    assert (small.ci_lower, small.ci_upper) == (5e-324, 1e-323)


def test_the_true_coverage_of_the_bootstrap_is_named_by_sample_size() -> None:
    labels = [bootstrap_coverage_label(n) for n in (1, 2, 3, 4, 5, 20, 30, 31)]
    assert labels == [None, "50 %", "75 %", "75 to 84 %", "84 %", "90 to 93 %", "93 %", "over 93 %"]
    assert bootstrap_coverage_label(5, 0.9) is None


@pytest.mark.parametrize(
    "samples", [[0.3], [0.3, 0.3], [0.1, 0.2, 0.30000000000000004], [1e-300, 1e300], [0.0, 1.0], [-1.0, 2.0], [3, 5, 7]]
)
def test_a_geometric_mean_alone_is_that_of_the_interval(samples: list[float]) -> None:
    assert geometric_mean(samples) == log_t_interval(samples).geometric_mean
