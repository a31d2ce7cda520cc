"""Drift: how a metric moved with the order of execution, whichever configuration it was."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lem.results.bootstrap import CONFIDENCE
from lem.results.statistics import student_t_quantile

__all__ = ["DRIFT_FLAGGED", "Drift", "Observation", "change_of", "drift_of", "relative_to_own_mean"]

# From the first experiment to the last; more is flagged.
DRIFT_FLAGGED = 0.01
_LARGEST_LOG = 700.0


@dataclass(frozen=True)
class Observation:
    """One value of a metric: of which configuration, and at which place of the order of execution."""

    configuration: str
    order: int
    value: float


@dataclass(frozen=True)
class Drift:
    """The change of a metric from the first experiment of a campaign to the last.

    Attributes:
        change: as a share, 0.02 for 2 % more at the end.
        ci_lower, ci_upper: 95 % t interval of the change; None where too few values are left.
        n: values it stands on.
    """

    change: float
    ci_lower: float | None
    ci_upper: float | None
    n: int

    @property
    def is_flagged(self) -> bool:
        """Whether it is more than `DRIFT_FLAGGED`."""
        return abs(self.change) > DRIFT_FLAGGED

    @property
    def is_told_from_zero(self) -> bool:
        """Whether the interval leaves out no change."""
        return self.ci_lower is not None and self.ci_upper is not None and not self.ci_lower <= 0 <= self.ci_upper


def change_of(log_ratio: float) -> float:
    """The change as a share that a log of a ratio means; what no float can hold is the largest that one can."""
    return math.expm1(min(log_ratio, _LARGEST_LOG))


def relative_to_own_mean(observations: Sequence[Observation]) -> tuple[float, ...]:
    """The log of each value over its configuration's geometric mean, in the order given; values must be positive."""
    logs: dict[str, list[float]] = collections.defaultdict(list)
    for item in observations:
        logs[item.configuration].append(math.log(item.value))
    means = {name: statistics.fmean(values) for name, values in logs.items()}
    return tuple(math.log(item.value) - means[item.configuration] for item in observations)


def drift_of(observations: Sequence[Observation]) -> Drift | None:
    """The drift over all places of the order; None where no configuration ran at two of them.

    Least squares of log values on the order with a mean for each configuration, so that what differs between
    configurations is not taken for drift.
    """
    counts = collections.Counter(item.configuration for item in observations)
    kept = [item for item in observations if counts[item.configuration] > 1]
    orders: dict[str, list[int]] = collections.defaultdict(list)
    for item in kept:
        orders[item.configuration].append(item.order)
    centres = {name: statistics.fmean(values) for name, values in orders.items()}
    steps = [item.order - centres[item.configuration] for item in kept]
    squares = math.fsum(step * step for step in steps)
    if not squares:
        return None
    logs = relative_to_own_mean(kept)
    slope = math.fsum(step * log for step, log in zip(steps, logs, strict=True)) / squares
    places = [item.order for item in observations]
    length = max(places) - min(places)
    freedom = len(kept) - len(orders) - 1
    half = None
    if freedom > 0:
        left = math.fsum((log - slope * step) ** 2 for step, log in zip(steps, logs, strict=True))
        half = student_t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(left / freedom / squares) * length
    total = slope * length
    if half is None:
        return Drift(change_of(total), None, None, len(kept))
    return Drift(change_of(total), change_of(total - half), change_of(total + half), len(kept))
