"""How much larger one thing is than another, and how sure that is: ratios from pairs, also across campaigns."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lem.results.bootstrap import CONFIDENCE
from lem.results.statistics import student_t_cdf, student_t_quantile

__all__ = ["Effect", "anchored_effect", "paired_effect"]


@dataclass(frozen=True)
class Effect:
    """A ratio with its uncertainty, on logs.

    Attributes:
        log_ratio: log of how much larger the one is than the other.
        std_error: of `log_ratio`; None where nothing is known of it (one cycle, cycles that are no replicates).
        df: degrees of freedom of `std_error`.
        n_cycles: pairs it stands on, in each campaign.
    """

    log_ratio: float
    std_error: float | None
    df: float | None
    n_cycles: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """The geometric mean of the ratios of the pairs."""
        return math.exp(self.log_ratio)

    @property
    def p_value(self) -> float | None:
        """Two-sided, of the true ratio being 1; None without a standard error."""
        below, above = self.p_below(0.0), self.p_above(0.0)
        return None if below is None or above is None else min(1.0, 2 * min(below, above))

    def p_above(self, bound: float) -> float | None:
        """One-sided, of the true log ratio being at most `bound`: a small one says that it is above."""
        return self._tail(bound - self.log_ratio)

    def p_below(self, bound: float) -> float | None:
        """One-sided, of the true log ratio being at least `bound`: a small one says that it is below."""
        return self._tail(self.log_ratio - bound)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """The Student t interval of the ratio."""
        if self.std_error is None or self.df is None:
            return None
        half = student_t_quantile((1 + confidence) / 2, self.df) * self.std_error
        return math.exp(self.log_ratio - half), math.exp(self.log_ratio + half)

    def without_error(self) -> Effect:
        """The same ratio where its error cannot be told from the cycles."""
        return dataclasses.replace(self, std_error=None, df=None)

    def _tail(self, distance: float) -> float | None:
        """P(T ≤ distance / error)."""
        if self.std_error is None or self.df is None:
            return None
        if self.std_error == 0:
            return 0.5 if distance == 0 else float(distance > 0)
        return student_t_cdf(distance / self.std_error, self.df)


def paired_effect(numerators: Sequence[float], denominators: Sequence[float]) -> Effect:
    """The ratio of two things measured in the same cycles, pair by pair, since cycles are blocks.

    What a whole cycle shares (a warm room, another driver state) divides out of each pair; with 2 % drift between
    cycles and 0.5 % noise a true 1 % effect is found in 66 % of campaigns of 5 cycles so, unpaired in 2 %.

    Raises:
        ValueError: lists of different lengths, no pairs, a value that is not positive and finite.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators and {len(denominators)} denominators are no pairs")
    if not numerators:
        raise ValueError("no pairs: there is no ratio of nothing")
    for value in (*numerators, *denominators):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a ratio needs positive and finite values on both sides, got {value}")
    logs = [math.log(above / below) for above, below in zip(numerators, denominators, strict=True)]
    n = len(logs)
    centre = statistics.fmean(logs)
    if n == 1:
        return Effect(centre, None, None, (1,))
    return Effect(centre, statistics.stdev(logs) / math.sqrt(n), n - 1, (n,))


def anchored_effect(now: Effect, before: Effect) -> Effect:
    """How much more the ratio to an anchor is in one campaign than in another.

    Two campaigns share no cycles; what separates their days divides out of each ratio to a configuration that both
    measured. The variances add; the degrees of freedom are Welch's. [Satterthwaite 1946, Biometrics Bulletin 2:110]
    """
    counts = (*before.n_cycles, *now.n_cycles)
    difference = Effect(now.log_ratio - before.log_ratio, None, None, counts)
    if now.std_error is None or now.df is None or before.std_error is None or before.df is None:
        return difference
    variances = (now.std_error**2, before.std_error**2)
    spread = variances[0] ** 2 / now.df + variances[1] ** 2 / before.df
    df = sum(variances) ** 2 / spread if spread else now.df + before.df
    return dataclasses.replace(difference, std_error=math.sqrt(sum(variances)), df=df)
