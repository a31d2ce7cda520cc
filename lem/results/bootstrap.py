"""The percentile bootstrap interval of a mean.

It is what many tools print, and at the few cycles a campaign has it is too narrow: see
`statistics.BOOTSTRAP_COVERAGE`. So whatever shows it shows the Student t interval on log values beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["BootstrapResult", "bootstrap_ci", "check_confidence", "compute_metric_ci"]


# Of every interval, unless another one is asked for.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class BootstrapResult:
    """A mean with its percentile bootstrap interval, in the unit of the samples.

    Attributes:
        mean: arithmetic mean.
        std: sample standard deviation (n - 1); None for one sample.
        ci_lower, ci_upper: the interval of the mean; None for one sample.
        n_samples: how many samples there were.
        confidence: nominal confidence, for example 0.95.
        warning: why the interval is missing or not to be relied on.
    """

    mean: float
    std: float | None
    ci_lower: float | None
    ci_upper: float | None
    n_samples: int
    confidence: float
    warning: str | None = None


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
        raise ValueError(f"n_iterations is {n_iterations}, at least 1 is due")
    n = len(values)
    if n == 1:
        return BootstrapResult(values[0], None, None, None, 1, confidence, "1 sample: no interval")
    warning = "2 samples: the interval is unreliable" if n == 2 else None
    if min(values) == max(values):
        # Rounding in a mean of equal values would otherwise make it differ from them.
        return BootstrapResult(values[0], 0.0, values[0], values[0], n, confidence, warning)
    means = _sorted_means(values, n_iterations, seed)
    return BootstrapResult(
        mean=statistics.fmean(values),
        std=statistics.stdev(values),
        ci_lower=_quantile(means, (1 - confidence) / 2),
        ci_upper=_quantile(means, (1 + confidence) / 2),
        n_samples=n,
        confidence=confidence,
        warning=warning,
    )


def compute_metric_ci(
    values: Iterable[float | None], metric_name: str = "", confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The fields of `bootstrap_ci` as JSON values, with the metric's name.

    A None is a value that was not measured: it is left out and counted in `n_missing`. With nothing measured every
    estimate is None and `n_samples` 0, so a table over many metrics needs no exception.

    Raises:
        ValueError: a value that is NaN or infinite, a confidence outside (0, 1).
    """
    given = list(values)
    samples = [value for value in given if value is not None]
    named = {"metric": metric_name, "n_missing": len(given) - len(samples)}
    if samples:
        return {**named, **dataclasses.asdict(bootstrap_ci(samples, confidence=confidence))}
    check_confidence(confidence)
    empty = dict.fromkeys(("mean", "std", "ci_lower", "ci_upper"))
    return {**named, **empty, "n_samples": 0, "confidence": confidence, "warning": "no samples: nothing was measured"}


def check_confidence(confidence: float) -> None:
    """Refuse a confidence outside (0, 1).

    Raises:
        ValueError: it is; 95 for 0.95 is the usual slip.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, a value between 0 and 1 is due, for example 0.95")


def _sorted_means(values: list[float], n_iterations: int, seed: int) -> list[float]:
    """The means of all resamples. A mean does not depend on the order (`fmean` rounds once), so each is taken once."""
    counted = [
        (statistics.fmean([values[index] for index in row]), count)
        for row, count in _resamples(len(values), n_iterations, seed)
    ]
    return [mean for mean, count in sorted(counted) for _ in range(count)]


@functools.lru_cache(maxsize=8)
def _resamples(n: int, n_iterations: int, seed: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Which values each resample takes, in order of place, and how many take the same.

    It is the same for all metrics and configurations with as many cycles; five values have 126 resamples.
    """
    generator = random.Random(seed)
    rows = (tuple(sorted(generator.choices(range(n), k=n))) for _ in range(n_iterations))
    return tuple(collections.Counter(rows).items())


def _checked(samples: Iterable[float]) -> list[float]:
    values = [float(value) for value in samples]
    if not values:
        raise ValueError("no samples: there is no mean of nothing")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"samples[{index}] is {value}, a finite number is due")
    return values


def _quantile(ordered: list[float], probability: float) -> float:
    position = probability * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
