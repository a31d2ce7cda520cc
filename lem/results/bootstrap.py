"""Intervals over the few values that the cycles of a campaign give.

The percentile bootstrap interval of a mean is what many tools print, and with few values it is too narrow (see
`BOOTSTRAP_COVERAGE`). It is therefore always shown with the Student t interval on log values: times, rates and
energies are positive and vary by percentages, so their logs are closer to normal than they are; the mean of logs is
the log of the geometric mean, and its t interval covers what it claims for any number of cycles.
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import math
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lem.base.dataclass import asdict, dataclass
from lem.base.reasons import Reason
from lem.base.units import fmean
from lem.record import Window
from lem.results.stats import CONFIDENCE, check_confidence, paired_effect, ratio_of, stdev

__all__ = [
    "BOOTSTRAP_COVERAGE",
    "BootstrapResult",
    "LogTInterval",
    "bootstrap_ci",
    "bootstrap_coverage_label",
    "compute_metric_ci",
    "log_t_interval",
]

# Simulated true coverage of the nominal 95 % percentile bootstrap interval of `bootstrap_ci` (1000 resamples) by the
# number of samples: normal data, 20,000 trials.
BOOTSTRAP_COVERAGE = types.MappingProxyType({2: 0.50, 3: 0.75, 5: 0.84, 10: 0.90, 30: 0.93})

# Where the 95 % t interval over cycles does not cover 95 % (`python -m tests.bench.coverage --only exempt`): by the
# autocorrelation between 10 cycles; under Student's t with 2 degrees of freedom, over 5 cycles; and of Poisson traffic
# in windows of 30 s, whose queue has not settled, by figure, over 5 cycles.
AUTOCORRELATED_COVERAGE = types.MappingProxyType({0.3: 0.86, 0.5: 0.75})
HEAVY_TAILED_COVERAGE = 0.97
TRAFFIC_COVERAGE = types.MappingProxyType({"p50": 0.94, "p95": 0.78, "mean": 0.89, "tok/s": 0.95})
SETTLED_WINDOW_S = 300.0  # windows of traffic that are shorter depend on where the queue was at their start


@dataclass(frozen=True)
class BootstrapResult:
    """An arithmetic mean with its percentile bootstrap interval, in the unit of the samples."""

    mean: float
    std: float | None  # sample standard deviation (n - 1); None for one sample, as the interval
    ci_lower: float | None
    ci_upper: float | None
    n_samples: int
    confidence: float  # nominal, for example 0.95
    warning: str | None = None  # why the interval is missing or unreliable


@dataclass(frozen=True)
class LogTInterval:
    """A geometric mean with its Student t interval on log values, in the unit of the samples."""

    geometric_mean: float | None  # None when a sample is zero or negative
    ci_lower: float | None  # None for one sample, without a geometric mean, and beyond floating-point numbers
    ci_upper: float | None
    n_samples: int
    confidence: float
    reason: Reason | None = None  # why something is missing

    @property
    def warning(self) -> str | None:
        return None if self.reason is None else self.reason.text


def bootstrap_ci(
    samples: Iterable[float], n_iterations: int = 1000, confidence: float = CONFIDENCE, seed: int = 42
) -> BootstrapResult:
    """The mean of `samples` with its percentile bootstrap interval; the same arguments give the same interval.

    The means of `n_iterations` resamples are sorted; the interval runs between their (1 ± confidence) / 2 quantiles,
    interpolated linearly between neighbours. [Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13]

    Raises:
        ValueError: no samples, a sample that is NaN or infinite, no iterations, a confidence outside (0, 1).
    """
    values = _checked(samples)
    check_confidence(confidence)
    if n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, got {n_iterations}")
    n = len(values)
    if n == 1:
        return BootstrapResult(values[0], None, None, None, 1, confidence, "1 sample: no interval")
    warning = "2 samples: the interval is unreliable" if n == 2 else None
    if min(values) == max(values):
        # Rounding in a mean of equal values would otherwise make it differ from them.
        return BootstrapResult(values[0], 0.0, values[0], values[0], n, confidence, warning)
    # A mean does not depend on the order (`fsum` rounds once), so that of equal resamples is taken once.
    # Scaled, so that no sum exceeds the range of floats; by a power of two, so that no digit changes.
    exponent = math.frexp(max(map(abs, values)))[1]
    scaled = [math.ldexp(value, -exponent) for value in values]
    takers, counts = _takers(n, n_iterations, seed)
    sums = list(map(math.fsum, zip(*[take(scaled) for take in takers], strict=True)))
    order = sorted(range(len(counts)), key=sums.__getitem__)
    ends = list(itertools.accumulate(map(counts.__getitem__, order)))

    def ordered(place: int) -> float:
        return math.ldexp(sums[order[bisect.bisect_right(ends, place)]] / n, exponent)

    low, high = (_quantile(ordered, n_iterations, (1 + sign * confidence) / 2) for sign in (-1, 1))
    mean, std = (math.ldexp(of(scaled), exponent) for of in (fmean, stdev))
    return BootstrapResult(mean, std, low, high, n, confidence, warning)


def compute_metric_ci(
    values: Iterable[float | None], metric_name: str = "", confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The fields of `bootstrap_ci` as JSON values, with the metric's name.

    A None is a value that was not measured: it is left out and counted in `n_missing`. With nothing measured every
    estimate is None and `n_samples` is 0, so a table over many metrics needs no exception.

    Raises:
        ValueError: a value that is NaN or infinite, a confidence outside (0, 1).
    """
    given = list(values)
    samples = [value for value in given if value is not None]
    named = {"metric": metric_name, "n_missing": len(given) - len(samples)}
    if samples:
        return {**named, **asdict(bootstrap_ci(samples, confidence=confidence))}
    check_confidence(confidence)
    empty = dict.fromkeys(("mean", "std", "ci_lower", "ci_upper"))
    return {**named, **empty, "n_samples": 0, "confidence": confidence, "warning": "no samples: nothing was measured"}


def log_t_interval(samples: Iterable[float], confidence: float = CONFIDENCE) -> LogTInterval:
    """The geometric mean of `samples` with its t interval on log values.

    A sample of zero or less has no logarithm, and dropping it would bias the estimate: there is no estimate then, and a
    warning says why.

    Raises:
        ValueError: no samples, a sample that is NaN or infinite, a confidence outside (0, 1).
    """
    check_confidence(confidence)
    values = _checked(samples)
    n = len(values)
    not_positive = sum(value <= 0 for value in values)
    if not_positive:
        return LogTInterval(None, None, None, n, confidence, Reason.of("no_logs", count=not_positive, total=n))
    if n == 1:
        return LogTInterval(values[0], None, None, 1, confidence, Reason.of("one_sample"))
    if min(values) == max(values):
        return LogTInterval(values[0], values[0], values[0], n, confidence)
    mean = paired_effect(values, [1.0] * n)
    interval = mean.interval(confidence)
    low, high = interval or (None, None)
    reason = None if interval else Reason.of("out_of_range")
    return LogTInterval(mean.ratio, low, high, n, confidence, reason)


def geometric_mean(samples: Sequence[float]) -> float | None:
    """That of `log_t_interval`, which takes ten times as long; None where a sample is zero or negative."""
    if min(samples) <= 0:
        return None
    return float(samples[0]) if min(samples) == max(samples) else ratio_of(fmean(map(math.log, samples)))


def bootstrap_coverage_label(n_samples: int, confidence: float = CONFIDENCE) -> str | None:
    """The true coverage of the bootstrap interval in words: `75 %`, or `75 to 84 %` between two simulated sizes.

    None where it is unknown; the simulation was of a nominal 95 %.
    """
    percent = {size: round(100 * coverage) for size, coverage in BOOTSTRAP_COVERAGE.items()}
    below = max((size for size in percent if size <= n_samples), default=None)
    above = min((size for size in percent if size >= n_samples), default=None)
    if confidence != CONFIDENCE or below is None:
        return None
    if above is None:
        return f"over {percent[below]} %"
    return f"{percent[below]} %" if below == above else f"{percent[below]} to {percent[above]} %"


@functools.lru_cache(maxsize=8)
def resamples(n: int, n_iterations: int, seed: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Which values each resample takes, sorted, and how many take the same; the same for every metric."""
    import random  # imported here to keep the start-up fast

    generator = random.Random(seed)
    rows = (tuple(sorted(generator.choices(range(n), k=n))) for _ in range(n_iterations))
    return tuple(collections.Counter(rows).items())


@functools.lru_cache(maxsize=8)
def _takers(n: int, n_iterations: int, seed: int) -> tuple[Sequence[Callable[[Sequence[float]], Any]], Sequence[int]]:
    """What takes the first values of all distinct resamples, the second, and so on; how often each resample occurs."""
    rows, counts = zip(*resamples(n, n_iterations, seed), strict=True)
    # One index more than needed, since itemgetter gives no tuple for a single one.
    return [operator.itemgetter(*column, 0) for column in zip(*rows, strict=True)], counts


def _checked(samples: Iterable[float]) -> list[float]:
    values = list(map(float, samples))
    if not values:
        raise ValueError("no samples")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"samples[{index}] must be finite, got {value}")
    return values


def _quantile(ordered: Callable[[int], float], n: int, probability: float) -> float:
    position = probability * (n - 1)
    below = math.floor(position)
    low, high = ordered(below), ordered(min(below + 1, n - 1))
    return low + (high - low) * (position - below)


def coverage_notes(windows: Iterable[Window]) -> Iterable[str]:
    share = {f"{rho:g}": f"{100 * found:g} %" for rho, found in AUTOCORRELATED_COVERAGE.items()}
    correlated = " and ".join(share.values())
    yield (
        f"It assumes independent cycles: with an autocorrelation of {' and '.join(share)} it covers {correlated}, "
        f"with heavy tails (t, 2 degrees of freedom) {100 * HEAVY_TAILED_COVERAGE:g} %."
    )
    if any(it.traffic_mode == "poisson" and it.window_s < SETTLED_WINDOW_S for it in windows):
        found = ", ".join(f"{name} {100 * share:g} %" for name, share in TRAFFIC_COVERAGE.items())
        yield (
            f"Under traffic, windows under {SETTLED_WINDOW_S / 60:g} minutes miss slow changes of the queue: of what a "
            f"long run gives, intervals of 30 s windows cover about: {found}."
        )
