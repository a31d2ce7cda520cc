"""What weakens a campaign's numbers."""

from __future__ import annotations

import collections
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lem.base.reasons import Reason
from lem.base.units import percent, plural
from lem.record import Record, ResultKey
from lem.results.bootstrap import CONFIDENCE
from lem.results.check_results import Finding, Found, check_results
from lem.results.compare import RunResults, Subject, find_effect, gather
from lem.results.effect import cycles_to_settle
from lem.results.metrics import METRIC_BY_NAME, Metric
from lem.results.precision import MOST_CYCLES, UNACCOUNTED, StoppingRule, half_width_ratio
from lem.results.stats import student_t_quantile
from lem.results.store import Problem

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


# Wider than this is no measurement of a few percent, whatever it is compared with.
_WIDE = 0.05
_LEAST_CYCLES = 3
_PAIRS_SHOWN = 5
_ROUNDS = 100

_ENERGY, _THROUGHPUT = "energy_per_output_tok_j", "output_tok_per_s"

# What is looked at; the aggregates of others would take seconds of a large campaign.
TREND_METRICS = (METRIC_BY_NAME[_ENERGY], METRIC_BY_NAME[_THROUGHPUT])


def check_trends(run: RunResults) -> Found:
    """Everything about the campaign as a whole."""
    yield from _drift(run)
    yield from _order(run)
    yield from _cycles(run)
    yield from _pairs(run)


def primary_metric(run: RunResults) -> Metric:
    """Energy per output token where every configuration with a result has it, else the output throughput."""
    measured = [item.mean(METRIC_BY_NAME[_ENERGY]) is not None for item in run.subjects if item.cycles]
    return METRIC_BY_NAME[_ENERGY if measured and all(measured) else _THROUGHPUT]


def position_effect(run: RunResults, metric: Metric) -> Drift | None:
    """How a metric moves from the first place within a cycle to the last, whichever configuration stands there.

    Least squares of log values on the place, with a mean for each configuration and for each cycle.

    Returns:
        None where places and configurations cannot be told apart: the order is the same in every cycle.
    """
    rows = [
        (subject.name, record, math.log(value))
        for subject in run.subjects
        for record in subject.used
        if (value := metric.read(record)[0]) is not None and value > 0
    ]
    places = _places([record for _, record, _ in rows])
    steps = [float(places[record.identity.key]) for _, record, _ in rows]
    names, cycles = [name for name, *_ in rows], [record.identity.cycle_index for _, record, _ in rows]
    groups: tuple[Sequence[object], ...] = (names, cycles)
    steps, logs = _without_means(steps, groups), _without_means([log for *_, log in rows], groups)
    squares = math.fsum(step * step for step in steps)
    freedom = len(rows) - len(set(names)) - len(set(cycles))
    if squares < 1e-6 or freedom < 1:
        return None
    slope = math.fsum(step * log for step, log in zip(steps, logs, strict=True)) / squares
    left = math.fsum((log - slope * step) ** 2 for step, log in zip(steps, logs, strict=True))
    length = max(places.values())
    half = student_t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(left / freedom / squares) * length
    total = slope * length
    return Drift(change_of(total), change_of(total - half), change_of(total + half), len(rows))


def _drift(run: RunResults) -> Found:
    for metric in TREND_METRICS:
        drift = drift_of(_observations(run, metric))
        if drift is None or not drift.is_flagged:
            continue
        yield Finding(
            "drift",
            drift.is_told_from_zero,
            _change("drift" if drift.is_told_from_zero else "drift_or_chance", metric, drift),
            "lengthen the gaps, use structure: shuffled, and see what warms up; ratios within cycles suffer least",
        )


def _order(run: RunResults) -> Found:
    used = [record for subject in run.subjects for record in subject.used]
    if len([item for item in run.subjects if item.used]) < 2:
        return
    orders = _orders(used)
    if _is_grouped(used):
        yield Finding(
            "grouped",
            True,
            Reason.of("blocks"),
            "use structure: interleaved or shuffled",
        )
        return
    if len(orders) > 1 and len(set(orders)) == 1:
        yield Finding(
            "same_order",
            False,
            Reason.of("same_order"),
            "use structure: shuffled, which lem check can then look at",
        )
        return
    effect = position_effect(run, primary_metric(run))
    if effect is not None and effect.is_flagged:
        yield Finding(
            "order_effect",
            effect.is_told_from_zero,
            _change("place_matters" if effect.is_told_from_zero else "place_or_chance", primary_metric(run), effect),
            "lengthen execution.config_gap_seconds, so that nothing is left of the experiment before",
        )


def _cycles(run: RunResults) -> Found:
    few = tuple(item.name for item in run.subjects if 0 < item.aggregate.n_cycles < _LEAST_CYCLES)
    if few:
        most = max(item.aggregate.n_cycles for item in run.subjects if item.name in few)
        what = "only_one_cycle" if most == 1 else "only_two_cycles"
        yield Finding("few_cycles", True, Reason.of(what), "use --cycles 5, or --until ci=2%", few)
    metric = primary_metric(run)
    wide = {}
    for subject in run.subjects:
        t_log = subject.aggregate.metrics[metric.name].t_log
        half = half_width_ratio(t_log) if t_log is not None and subject.name not in few else None
        if half is not None and half > _WIDE:
            wide[subject.name] = half
    if wide:
        yield Finding(
            "wide_interval",
            True,
            Reason.of("wide_interval", metric=metric.lower_label, width=percent(max(wide.values()))),
            "add cycles: lem campaign … --resume --until ci=2%; or find what makes cycles differ",
            tuple(wide),
        )


def _pairs(run: RunResults) -> Found:
    """Neighbours in rank that the cycles cannot tell apart."""
    metric = primary_metric(run)
    ranked = sorted((item for item in run.subjects if item.mean(metric)), key=lambda item: item.mean(metric) or 0.0)
    open_pairs = [found for pair in itertools.pairwise(ranked) if (found := _open_pair(metric, *pair)) is not None]
    yield from open_pairs[:_PAIRS_SHOWN]
    if len(open_pairs) > _PAIRS_SHOWN:
        more = Reason.of("more_pairs", count=len(open_pairs) - _PAIRS_SHOWN)
        yield Finding("indistinguishable", False, more, "lem compare lists them")


def _open_pair(metric: Metric, lower: Subject, upper: Subject) -> Finding | None:
    effect, reason = find_effect(metric, lower, upper)
    interval = effect.interval() if effect is not None and not reason else None
    if effect is None or interval is None or not interval[0] <= 1 <= interval[1]:
        return None
    further, n_cycles = cycles_to_settle(effect, 0.0), min(effect.n_cycles)
    low, high = (f"{100 * (bound - 1):+.2g}" for bound in interval)
    found = Reason.of(
        "pair_open",
        more=upper.name,
        difference=percent(effect.ratio - 1),
        metric=metric.lower_label,
        less=lower.name,
        low=low,
        high=high,
        cycles=n_cycles,
    )
    both = (lower.name, upper.name)
    if further is not None and n_cycles + further <= MOST_CYCLES:
        total = n_cycles + further
        remedy = f"{further} more would, if it stays: lem campaign … --resume --cycles {total}"
        return Finding("too_few_cycles", True, found, remedy, both)
    return Finding("indistinguishable", False, found, f"nor would {MOST_CYCLES}: take them as equal", both)


def _observations(run: RunResults, metric: Metric) -> list[Observation]:
    return [
        Observation(subject.name, record.identity.order_index, value)
        for subject in run.subjects
        for record in subject.used
        if (value := metric.read(record)[0]) is not None and value > 0
    ]


def _places(records: Sequence[Record]) -> dict[ResultKey, int]:
    """The place of each experiment within its cycle, from 0."""
    by_cycle: dict[int, list[Record]] = {}
    for record in records:
        by_cycle.setdefault(record.identity.cycle_index, []).append(record)
    return {
        record.identity.key: place
        for members in by_cycle.values()
        for place, record in enumerate(sorted(members, key=_order_index))
    }


def _orders(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The configurations of each whole cycle in the order in which they ran."""
    by_cycle: dict[int, list[Record]] = {}
    for record in records:
        by_cycle.setdefault(record.identity.cycle_index, []).append(record)
    most = max(map(len, by_cycle.values()), default=0)
    return [
        tuple(item.identity.config_name for item in sorted(members, key=_order_index))
        for members in by_cycle.values()
        if len(members) == most
    ]


def _is_grouped(records: Sequence[Record]) -> bool:
    """Whether the cycles of each configuration follow one another, with nothing in between."""
    names = [item.identity.config_name for item in sorted(records, key=_order_index)]
    blocks = sum(1 for _ in itertools.groupby(names))
    return blocks == len(set(names)) < len(names)


def _order_index(record: Record) -> int:
    return record.identity.order_index


def _without_means(values: Sequence[float], groups: Sequence[Sequence[object]]) -> list[float]:
    """The values less the means of each grouping, taken off in turn until nothing is left of them."""
    left = list(values)
    for _ in range(_ROUNDS):
        before = left
        for labels in groups:
            left = _less_means(left, labels)
        if max((abs(one - two) for one, two in zip(before, left, strict=True)), default=0.0) < 1e-12:
            break
    return left


def _less_means(values: Sequence[float], labels: Sequence[object]) -> list[float]:
    members: dict[object, list[float]] = {}
    for value, label in zip(values, labels, strict=True):
        members.setdefault(label, []).append(value)
    means = {label: statistics.fmean(items) for label, items in members.items()}
    return [value - means[label] for value, label in zip(values, labels, strict=True)]


def _change(code: str, metric: Metric, drift: Drift) -> Reason:
    moved = f"{'rises' if drift.change > 0 else 'falls'} by {percent(abs(drift.change))}"
    return Reason.of(code, metric=metric.label, moved=moved, interval=_interval(drift))


def _interval(drift: Drift) -> str:
    if drift.ci_lower is None or drift.ci_upper is None:
        return ""
    return f" (95 % {100 * drift.ci_lower:+.2g} to {100 * drift.ci_upper:+.2g} %)"


_DAMAGE_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """What was found about a run.

    Attributes:
        run: its configurations; None where there is no whole result.
        findings: the weak ones first.
        n_results: whole results looked at, of all attempts.
    """

    campaign_name: str
    run_id: str
    run: RunResults | None
    findings: tuple[Finding, ...]
    n_results: int

    @property
    def is_weak(self) -> bool:
        """Whether a finding is weak."""
        return any(item.is_weak for item in self.findings)


def check_run(
    records: Sequence[Record],
    *,
    failed: Mapping[str, int] | None = None,
    problems: Sequence[Problem] = (),
    stopping: StoppingRule | None = None,
    campaign_name: str = "",
    run_id: str = "",
) -> Check:
    """Everything that weakens the numbers of one run.

    Args:
        records: all its whole results, valid or not, of all attempts.
        failed: per configuration name, how many experiments gave no result.
        problems: what stands in the place of results.
        stopping: the rule by which cycles were added.
        campaign_name, run_id: what to call a run of which there is no result that says it.
    """
    run = gather(records, failed, metrics=TREND_METRICS) if records else None
    found = [*_damage(problems), *_failures(failed or {})]
    if run is None:
        found.append(
            Finding("no_results", True, Reason.of("no_results"), "run the campaign; lem status says how it is")
        )
    else:
        found += [*check_results(run, records), *check_trends(run), *_stopping(stopping)]
    return Check(
        run.campaign_name if run else campaign_name,
        run.run_id if run else run_id,
        run,
        tuple(sorted(found, key=lambda item: not item.is_weak)),
        len(records),
    )


def _damage(problems: Iterable[Problem]) -> Found:
    damaged = [item for item in problems if item.kind != "missing"]
    if damaged:
        named = ", ".join(f"{item.path} ({item.kind})" for item in damaged[:_DAMAGE_SHOWN])
        more = f" and {len(damaged) - _DAMAGE_SHOWN} more" if len(damaged) > _DAMAGE_SHOWN else ""
        yield Finding(
            "damaged",
            True,
            Reason.of("results_damaged", named=named + more),
            "bring them back from a copy, or measure them again: lem campaign --resume runs what has no whole result",
        )


def _failures(failed: Mapping[str, int]) -> Found:
    count = sum(failed.values())
    if count:
        yield Finding(
            "failed",
            True,
            Reason.of("results_missing", experiments=plural(count, "experiment")),
            "lem status names the reason of each that failed, and its log; lem campaign --resume runs them again",
            tuple(failed),
        )


def _stopping(rule: StoppingRule | None) -> Found:
    if rule is not None:
        yield Finding(
            "stopping",
            False,
            Reason.of("cycles_added", rule=rule.describe(), unaccounted=UNACCOUNTED),
            "for a verdict that hangs on the third digit measure a fixed number of cycles anew",
        )
