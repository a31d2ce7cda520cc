"""Student's t distribution, central and noncentral: quantiles, and the power of t intervals by number of cycles."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence

# The chance of a verdict for which numbers of cycles are given.
POWER = 0.8

# With more cycles than this, an effect lies on the threshold as far as can be determined.
MOST_CYCLES_PLANNED = 1000

_MAX_TERMS, _MAX_STEPS = 10_000, 4_000
_TINY = 1e-300


def student_t_cdf(t: float, df: float) -> float:
    """The probability that a Student t variable with `df` degrees of freedom, at most 10^8, is at most `t`."""
    # From the incomplete beta function: P(|T| > t) = I_x(df/2, 1/2) at x = df / (df + t²). [DLMF 8.17; Abramowitz and
    # Stegun 26.7.1]
    if df <= 0:
        raise ValueError(f"degrees of freedom must be positive, got {df}")
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
    if not 0 < probability < 1:
        raise ValueError(f"expected a probability between 0 and 1, got {probability}")
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
    """I_x(a, b) by its continued fraction, DLMF 8.17.22, evaluated forwards by the modified Lentz method."""
    # I = x^a (1-x)^b / (a B(a, b)) · 1/(1 + d1/(1 + d2/(1 + …))), with d_2m = m (b-m) x / ((a+2m-1) (a+2m)) and d_2m+1
    # = -(a+m) (a+b+m) x / ((a+2m) (a+2m+1)).
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(complement) - log_beta) / a
    value, numerator, denominator = 1.0, 1.0, 0.0
    for index in range(1, _MAX_TERMS):
        m = index // 2
        if index % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 + term * denominator
        numerator = 1 + term / numerator
        if -_TINY <= denominator <= _TINY:
            denominator = _TINY
        if -_TINY <= numerator <= _TINY:
            numerator = _TINY
        denominator = 1 / denominator
        step = numerator * denominator
        value *= step
        if -1e-15 < step - 1 < 1e-15:
            return front / value
    raise ArithmeticError(f"the incomplete beta function did not converge at a={a}, b={b}, x={x}")


def power_of(distance: float, std_error: float, df: float, confidence: float) -> float:
    """The chance that a t interval excludes a bound that lies `distance` above or below the true value."""
    # P(T > t) for a noncentral t variable with noncentrality distance / std_error: the mean of Φ(noncentrality - t s)
    # over s = sqrt(χ²_df / df), the ratio of the estimated standard error to the true one, by the trapezoidal rule on
    # log s. [Johnson, Kotz and Balakrishnan 1995, Continuous Univariate Distributions 2, chapter 31]
    if std_error == 0:
        return float(distance > 0)
    shift, critical, deviations = (
        distance / std_error,
        student_t_quantile((1 + confidence) / 2, df),
        9 / math.sqrt(2 * df),
    )
    if shift > critical * (1 + deviations) + 9:
        return 1.0
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)

    def weighted(log_s: float) -> float:
        density = math.exp(log_scale + df * (log_s - math.exp(2 * log_s) / 2))
        return density * math.erfc((critical * math.exp(log_s) - shift) / math.sqrt(2)) / 2

    # Outside of these less than 1e-9 is left; a step is smaller than what changes fastest, density or Φ.
    low, high = -21 / df - deviations, min(math.log1p(deviations), math.log((shift + 9) / critical))
    steps = min(math.ceil(1.5 * (high - low) * max(4.0, shift, math.sqrt(2 * df))), _MAX_STEPS)
    step = (high - low) / steps
    return step * (math.fsum(weighted(low + step * at) for at in range(1, steps)) + weighted(high) / 2)


def cycles_needed(
    distances: Sequence[float], spread: float, confidence: float, *, df_per_pair: float = 1.0
) -> int | None:
    """With how many cycles an interval excludes all bounds at these log `distances` with a chance of `POWER`."""
    # None beyond `MOST_CYCLES_PLANNED`. That two bounds are excluded together is at least as likely as one, less the
    # chance that the other is not. [Bonferroni] `df_per_pair` is more than 1 where two campaigns add degrees of
    # freedom.

    def is_enough(cycles: int) -> bool:
        df = df_per_pair * (cycles - 1)
        missed = (1 - power_of(distance, spread / math.sqrt(cycles), df, confidence) for distance in distances)
        return sum(missed) <= 1 - POWER

    most = 2
    while not is_enough(most):
        if most >= MOST_CYCLES_PLANNED:
            return None
        most = min(2 * most, MOST_CYCLES_PLANNED)
    return bisect.bisect_left(range(most), True, lo=most // 2 + 1, key=is_enough)


def smallest_difference(cycles: int, spread: float, confidence: float) -> float:
    """The smallest true log ratio that as many cycles tell from 0 with a chance of `POWER`."""
    if spread == 0:
        return 0.0
    low, high = 0.0, spread
    while power_of(high, spread / math.sqrt(cycles), cycles - 1, confidence) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        is_enough = power_of(middle, spread / math.sqrt(cycles), cycles - 1, confidence) >= POWER
        low, high = (low, middle) if is_enough else (middle, high)
    return high
