"""How a run moves over time: drift, the effect of the place within a cycle, and what cycles have in common."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property

from lem.base.dataclass import dataclass
from lem.base.reasons import Reason
from lem.base.units import fmean, percent, plain
from lem.results.metrics import Cycle, Metric
from lem.results.run import ENERGY, THROUGHPUT, Configuration, Run
from lem.results.stats import AUTOCORRELATION_SOUGHT, Autocorrelation, autocorrelation_of
from lem.results.student import student_t_quantile

# A trend is reported if it is larger than this from the first place to the last, and if it is not chance.
DRIFT_FLAGGED = 0.01
FALSE_ALARMS = 0.05

BLOCKS, SAME_ORDER = Reason.of("blocks"), Reason.of("same_order")

WATCHED = (ENERGY, THROUGHPUT)  # for drift

_LARGEST_LOG = 700.0
_LARGEST_SHOWN = 10.0


@dataclass(frozen=True)
class Drift:
    """The change of a metric from the first place to the last, as a share: 0.02 is 2 % more at the end."""

    change: float
    ci_lower: float | None  # t interval of the change; None with too few values
    ci_upper: float | None
    confidence: float  # of that interval

    @property
    def is_significant(self) -> bool:
        return self.ci_lower is not None and self.ci_upper is not None and not self.ci_lower <= 0 <= self.ci_upper

    @property
    def is_found(self) -> bool:
        return self.is_significant and abs(self.change) > DRIFT_FLAGGED

    @property
    def moved(self) -> str:
        return f"{'rises' if self.change > 0 else 'falls'} by {percent(abs(self.change))}"

    @property
    def interval(self) -> str:
        if self.ci_lower is None or self.ci_upper is None:
            return "too few values for an interval"
        bounds = (self.ci_lower, self.ci_upper)
        low, high = (plain(100 * bound, "+.2g") if bound < _LARGEST_SHOWN else "over +1000" for bound in bounds)
        return f"{100 * self.confidence:g} % {low} to {high} %"


def is_chance(count: int, total: int, probability: float) -> bool:
    """Whether `count` or more of `total` independent events of that probability happen in over `FALSE_ALARMS`."""
    fewer = math.fsum(
        math.comb(total, found) * probability**found * (1 - probability) ** (total - found) for found in range(count)
    )
    return 1 - fewer > FALSE_ALARMS


def change_of(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, _LARGEST_LOG))


def trend_of(
    places: Sequence[float],
    logs: Sequence[float],
    *groupings: Sequence[Hashable],
    length: float,
    confidence: float = 1 - FALSE_ALARMS,
) -> Drift | None:
    """The change of values, given by their logs, over `length` places; None if places and groups are not separable."""
    # Least squares of the logs on the place, with a mean for each group of each grouping, so that what differs between
    # configurations (or cycles) is not taken for a trend.
    steps, left = without_means(places, *groupings), without_means(logs, *groupings)
    squares = math.fsum(step * step for step in steps)
    if squares < 1e-6:
        return None
    slope = math.fsum(step * log for step, log in zip(steps, left, strict=True)) / squares
    total = slope * length
    freedom = len(logs) - sum(len(set(labels)) for labels in groupings) + len(groupings) - 2
    if freedom < 1:
        return Drift(change_of(total), None, None, confidence)
    rest = math.fsum((log - slope * step) ** 2 for step, log in zip(steps, left, strict=True))
    half = student_t_quantile((1 + confidence) / 2, freedom) * math.sqrt(rest / freedom / squares) * length
    return Drift(change_of(total), change_of(total - half), change_of(total + half), confidence)


def without_means(values: Sequence[float], *groupings: Sequence[Hashable]) -> list[float]:
    left = list(values)
    for _ in range(100):
        before = left
        for labels in groupings:
            members: dict[Hashable, list[float]] = {}
            for value, label in zip(left, labels, strict=True):
                members.setdefault(label, []).append(value)
            means = {label: math.fsum(items) / len(items) for label, items in members.items()}
            left = [value - means[label] for value, label in zip(left, labels, strict=True)]
        if len(groupings) < 2 or max(map(abs, map(operator.sub, before, left)), default=0.0) < 1e-12:
            break
    return left


def ran_apart(one: Configuration, other: Configuration) -> bool:
    (first, last), (begin, end) = one.span, other.span
    return min(one.n_cycles, other.n_cycles) > 1 and (last < begin or end < first)


def ran_later(run: Run) -> list[Configuration]:
    several = [item for item in run.with_results if item.n_cycles > 1]
    ended_first = min((item.span[1] for item in several), default="")
    return [item for item in several if item.span[0] > ended_first]


def is_same_order(run: Run) -> bool:
    orders = [tuple(digest for *_, digest in found) for found in _in_order(run).values()]
    most = max(map(len, orders), default=0)
    whole = [order for order in orders if len(order) == most]
    return most > 1 and len(whole) > 1 and len(set(whole)) == 1


def _in_order(run: Run) -> dict[Cycle, list[tuple[int, int, str, str]]]:
    """What each cycle measured: the number of the experiment, and the number, name and hash of its configuration."""
    # A resume with an edited plan can leave two experiments of a cycle with the same number.
    cycles: dict[Cycle, list[tuple[int, int, str, str]]] = {}
    for number, item in enumerate(run.with_results):
        name, digest = item.name, item.config_hash
        for cycle, members in item.cycles.items():
            cycles.setdefault(cycle, []).extend([(it.identity.order_index, number, name, digest) for it in members])
    return {cycle: sorted(found) for cycle, found in cycles.items()}


@dataclass(frozen=True)
class Course:
    """How a metric moves over the experiments of a run."""

    run: Run
    metric: Metric

    @cached_property
    def _values(self) -> list[tuple[str, Cycle, int, float]]:
        """With the name of the configuration, the cycle, and the number of the experiment in the order."""
        return [
            (item.name, cycle, record.identity.order_index, value)
            for item in self.run.with_results
            for cycle, members in item.cycles.items()
            for record in members
            if (value := self.metric.read(record)[0]) is not None and value > 0
        ]

    @cached_property
    def _cycle_means(self) -> Mapping[Cycle, tuple[float, float]]:
        """Of the places, and of the logs less the mean of their configuration."""
        logs = without_means([math.log(value) for *_, value in self._values], [name for name, *_ in self._values])
        cycles: dict[Cycle, list[tuple[int, float]]] = {}
        for (_, cycle, order, _), log in zip(self._values, logs, strict=True):
            cycles.setdefault(cycle, []).append((order, log))
        return {
            cycle: (fmean(place for place, _ in found), fmean(log for _, log in found))
            for cycle, found in sorted(cycles.items())
        }

    @cached_property
    def drift(self) -> Drift | None:
        """From the first experiment to the last: the slope over cycle means; None with too few."""
        # The experiments of a cycle share its conditions, so cycles and not experiments are the independent
        # observations. The confidence is divided among the metrics watched, so that all of them together have the
        # stated false alarms.
        cycles = self._cycle_means
        orders = [order for _, _, order, _ in self._values]
        length = max(orders, default=0) - min(orders, default=0)
        places, means = zip(*cycles.values(), strict=True) if cycles else ((), ())
        confidence = 1 - FALSE_ALARMS / len(WATCHED)
        return trend_of(places, means, [key[:2] for key in cycles], length=length, confidence=confidence)

    @property
    def autocorrelation(self) -> Autocorrelation | None:
        """From cycle to cycle; None with too few."""
        series: dict[tuple[str, str], list[float]] = {}
        for key, (_, mean) in self._cycle_means.items():
            series.setdefault(key[:2], []).append(mean)
        return autocorrelation_of(max(series.values(), key=len)) if series else None

    @property
    def position_effect(self) -> Drift | None:
        """From the first place within a cycle to the last; None where every cycle has the same order."""
        rows, cycles = self._values, _in_order(self.run)
        place_of = {
            (name, cycle, order): place
            for cycle, found in cycles.items()
            for place, (order, _, name, _) in enumerate(found)
        }
        places = [place_of[name, cycle, order] for name, cycle, order, _ in rows]
        logs, length = [math.log(value) for *_, value in rows], max(places, default=0)
        names, numbers = [name for name, *_ in rows], [cycle[2] for _, cycle, _, _ in rows]
        effect = trend_of(places, logs, names, numbers, length=length)
        return effect if effect is not None and effect.ci_lower is not None else None


def course_of(run: Run, metric: Metric) -> Course:
    course: Course = run.courses.setdefault(metric.name, Course(run, metric))
    return course


def autocorrelation_notes(found: Sequence[tuple[str, Autocorrelation]]) -> Iterable[str]:
    """That of ratios, by name, with the power of the test; nothing where there are none."""
    if found:
        (name, most), least = max(found, key=lambda item: item[1].lag_1), min(it.lag_1 for _, it in found)
        lags = " to ".join(dict.fromkeys((f"{least:.2f}", f"{most.lag_1:.2f}")))
        is_clear = most.p_value * len(found) < FALSE_ALARMS
        clear = f", found in {name}: its interval is too narrow" if is_clear else ""
        yield (
            f"autocorrelation of the ratios from cycle to cycle: {lags}{clear}; a test at {percent(FALSE_ALARMS)} "
            f"finds {AUTOCORRELATION_SOUGHT:g} in {percent(most.power)} of campaigns of {most.n} cycles."
        )
