"""Student t intervals on log values, Holm's correction: what a few cycles can bear.

Times, rates and energies are positive and vary by percentages, so their logs are closer to normal than they are; the
mean of logs is the log of the geometric mean, and its t interval covers what it says at every number of cycles.
"""

from __future__ import annotations

import functools
import math
import statistics
import types
from collections.abc import Sequence
from dataclasses import dataclass

from lem.results.bootstrap import CONFIDENCE, check_confidence

# Simulated true coverage of the nominal 95 % percentile bootstrap interval of `bootstrap_ci` (1000 resamples) by the
# number of samples: normal data, 20,000 trials.
BOOTSTRAP_COVERAGE = types.MappingProxyType({2: 0.50, 3: 0.75, 5: 0.84, 10: 0.90, 30: 0.93})

_MAX_TERMS = 10_000
_TINY = 1e-300


@dataclass(frozen=True)
class LogTInterval:
    """A geometric mean with its Student t interval on log values, in the unit of the samples.

    Attributes:
        geometric_mean: None when a sample is zero or negative.
        ci_lower, ci_upper: None for one sample, and where there is no geometric mean.
        n_samples: how many samples there were.
        confidence: of the interval, for example 0.95.
        warning: why something is missing.
    """

    geometric_mean: float | None
    ci_lower: float | None
    ci_upper: float | None
    n_samples: int
    confidence: float
    warning: str | None = None


def log_t_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> LogTInterval:
    """The geometric mean of `samples` with its t interval on log values.

    A sample of zero or less has no logarithm; dropping it would bend the estimate, so there is none then, and a
    warning says so.

    Raises:
        ValueError: no samples, a sample that is NaN or infinite, a confidence outside (0, 1).
    """
    check_confidence(confidence)
    n = len(samples)
    if n == 0:
        raise ValueError("no samples: there is no mean of nothing")
    _refuse_infinite(samples)
    not_positive = sum(1 for value in samples if value <= 0)
    if not_positive:
        warning = f"{not_positive} of {n} values are zero or negative: no geometric mean, no interval on logs"
        return LogTInterval(None, None, None, n, confidence, warning)
    if n == 1:
        return LogTInterval(float(samples[0]), None, None, 1, confidence, "1 sample: no interval")
    if min(samples) == max(samples):
        value = float(samples[0])
        return LogTInterval(value, value, value, n, confidence)
    centre, half = _t_interval([math.log(value) for value in samples], confidence)
    return LogTInterval(math.exp(centre), math.exp(centre - half), math.exp(centre + half), n, confidence)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p values adjusted by Holm's step-down method, in the order given.

    The smallest is multiplied by their number, the next by one less, and none may fall below its predecessor: the
    chance of one false finding among all stays below the level used. [Holm 1979, Scand. J. Statistics 6:65]

    Raises:
        ValueError: a p value outside [0, 1].
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not a p value")
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return tuple(adjusted)


def bootstrap_coverage_label(n_samples: int, confidence: float = CONFIDENCE) -> str | None:
    """The true coverage of the bootstrap interval in words, `75 %` or `75 to 84 %`; None where it is not known.

    It was simulated for a nominal 95 % at the sizes of `BOOTSTRAP_COVERAGE`; between two of them it lies between.
    """
    sizes = sorted(BOOTSTRAP_COVERAGE)
    if confidence != CONFIDENCE or n_samples < sizes[0]:
        return None
    percent = {size: round(100 * BOOTSTRAP_COVERAGE[size]) for size in sizes}
    if n_samples in percent:
        return f"{percent[n_samples]} %"
    below = max(size for size in sizes if size < n_samples)
    above = min((size for size in sizes if size > n_samples), default=None)
    return f"over {percent[below]} %" if above is None else f"{percent[below]} to {percent[above]} %"


def student_t_cdf(t: float, df: float) -> float:
    """The probability that a Student t variable with `df` degrees of freedom is at most `t`.

    From the incomplete beta function: P(|T| > t) = I_x(df/2, 1/2) at x = df / (df + t²). [DLMF 8.17; Abramowitz and
    Stegun 26.7.1]

    Raises:
        ValueError: degrees of freedom that are not positive.
        ArithmeticError: so many degrees of freedom that the fraction does not converge (over 10^8).
    """
    if df <= 0:
        raise ValueError(f"{df} degrees of freedom; more than 0 are due")
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    square = t * t
    # x and 1 - x each by its own formula: for small t, 1 - x would lose every digit.
    if square <= df:
        centre = 0.5 * regularized_incomplete_beta(0.5, df / 2, square / (df + square), df / (df + square))
        return 0.5 + centre if t > 0 else 0.5 - centre
    tail = 0.5 * regularized_incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square))
    return 1 - tail if t > 0 else tail


@functools.cache
def student_t_quantile(probability: float, df: float) -> float:
    """The t that a Student t variable with `df` degrees of freedom stays below with `probability`.

    Raises:
        ValueError: a probability outside (0, 1), degrees of freedom that are not positive.
    """
    if not 0 < probability < 1:
        raise ValueError(f"{probability} is not a probability between 0 and 1")
    if probability == 0.5:
        return 0.0
    # By symmetry search in the lower tail, where the distribution function keeps its relative precision.
    tail = min(probability, 1 - probability)
    low, high = -1.0, 0.0
    while student_t_cdf(low, df) > tail:
        low, high = 2 * low, low
    while low < (middle := (low + high) / 2) < high:
        if student_t_cdf(middle, df) < tail:
            low = middle
        else:
            high = middle
    return high if probability < 0.5 else -high


def regularized_incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b), which rises from 0 at x = 0 to 1 at x = 1; `complement` is 1 - x with all its digits."""
    if x == 0 or complement == 0:
        return 0.0 if x == 0 else 1.0
    # The fraction converges fast below the mean of the distribution; above it use I_x(a, b) = 1 - I_{1-x}(b, a).
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_fraction(b, a, complement, x)
    return _beta_fraction(a, b, x, complement)


def _beta_fraction(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b) by its continued fraction, DLMF 8.17.22, evaluated forwards by the modified Lentz method.

    I = x^a (1-x)^b / (a B(a, b)) · 1/(1 + d1/(1 + d2/(1 + …))), with
    d_2m = m (b-m) x / ((a+2m-1) (a+2m)) and d_2m+1 = -(a+m) (a+b+m) x / ((a+2m) (a+2m+1)).
    """
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(complement) - log_beta) / a
    value, numerator, denominator = 1.0, 1.0, 0.0
    for index in range(1, _MAX_TERMS):
        m = index // 2
        if index % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / _not_zero(1 + term * denominator)
        numerator = _not_zero(1 + term / numerator)
        step = numerator * denominator
        value *= step
        if abs(step - 1) < 1e-15:
            return front / value
    raise ArithmeticError(f"the incomplete beta function did not converge at a={a}, b={b}, x={x}")


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _t_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The mean of at least two values and half the width of its t interval."""
    n = len(values)
    half = student_t_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), half


def _refuse_infinite(samples: Sequence[float]) -> None:
    for index, value in enumerate(samples):
        if not math.isfinite(value):
            raise ValueError(f"samples[{index}] is {value}, a finite number is due")
