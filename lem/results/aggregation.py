"""What the cycles of one configuration say together: one value a cycle, and both intervals over the cycles."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lem.base.codec import shown
from lem.base.measurement import is_estimate, is_gpu_source
from lem.base.reasons import Reason
from lem.record import Record, RecordError, decode_record
from lem.results.bootstrap import CONFIDENCE, BootstrapResult, bootstrap_ci, check_confidence
from lem.results.metrics import METRICS, Cycles, Metric, by_cycle, cycle_values, distinct, share_a_load, used_cycles
from lem.results.stats import LogTInterval, bootstrap_coverage_label, log_t_interval

__all__ = [
    "NO_INTERVAL",
    "SHARED_LOAD",
    "AllAttempts",
    "ConfigAggregate",
    "MetricEstimate",
    "aggregate_campaign_results",
    "aggregate_config",
    "estimate_note",
]


_Countable = TypeVar("_Countable")

# Simulated: with 1 % between loads and 0.5 % between runs, a 95 % t interval over cycles that share one load covers
# 64, 43 and 27 % at 3, 5 and 10 cycles.
SHARED_LOAD = Reason.of("shared_load")
NO_INTERVAL = Reason.of("no_interval", why=SHARED_LOAD)


@dataclass(frozen=True)
class AllAttempts:
    """An estimate over every attempt, invalid ones too: shown beside the valid one, never instead of it."""

    mean: float
    geometric_mean: float | None
    n_cycles: int
    n_attempts: int


@dataclass(frozen=True)
class MetricEstimate:
    """One metric over the cycles of a configuration.

    Attributes:
        metric: which.
        values: one a cycle that measured it, in the order of the cycles.
        bootstrap: arithmetic mean with the percentile bootstrap interval; None when no cycle measured it.
        t_log: geometric mean with the Student t interval on log values; None when no cycle measured it.
        all_attempts: where it differs from the estimate over valid attempts.
        null_reason: why no cycle measured it.
        warning: what is missing or not to be relied on.
    """

    metric: Metric
    values: tuple[float, ...]
    bootstrap: BootstrapResult | None
    t_log: LogTInterval | None
    all_attempts: AllAttempts | None = None
    null_reason: str | None = None
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values; an interval says its kind and what it covers."""
        document: dict[str, Any] = {"unit": self.metric.unit, "n": len(self.values), "values": list(self.values)}
        document["bootstrap"] = None
        document["t_log"] = None
        if self.bootstrap is not None and self.t_log is not None:
            coverage = bootstrap_coverage_label(self.bootstrap.n_samples, self.bootstrap.confidence)
            document["bootstrap"] = {
                "method": "percentile bootstrap of the arithmetic mean",
                "true_coverage": coverage if self.bootstrap.ci_lower is not None else None,
                **dataclasses.asdict(self.bootstrap),
            }
            document["t_log"] = {
                "method": "Student t on log values around the geometric mean",
                **dataclasses.asdict(self.t_log),
            }
        document["all_attempts"] = dataclasses.asdict(self.all_attempts) if self.all_attempts else None
        document["null_reason"] = self.null_reason
        document["warning"] = self.warning
        return document


@dataclass(frozen=True)
class ConfigAggregate:
    """One configuration over its cycles.

    Attributes:
        config_name: its name.
        n_cycles: cycles with a valid result; they are what the estimates stand on.
        n_results, n_invalid: results looked at, and how many of them are invalid.
        n_failed: experiments that gave no result.
        invalid_reasons, warnings: reason to how many results carry it.
        energy_sources: where the energy that counts comes from.
        is_load_shared: cycles share an engine load, so there is no interval.
        metrics: estimates by the metric's name.
    """

    config_name: str
    n_cycles: int
    n_results: int
    n_invalid: int
    n_failed: int
    invalid_reasons: Mapping[Reason, int]
    warnings: Mapping[Reason, int]
    energy_sources: tuple[str, ...]
    is_load_shared: bool
    metrics: Mapping[str, MetricEstimate]

    @property
    def is_estimate(self) -> bool:
        """Whether some of its energy is an estimate, which must be shown as one."""
        return any(map(is_estimate, self.energy_sources))

    @property
    def is_all_estimate(self) -> bool:
        """Whether all of its energy is an estimate."""
        return bool(self.energy_sources) and all(map(is_estimate, self.energy_sources))

    @property
    def is_by_board_sensors(self) -> bool:
        """Whether some of its energy comes from the sensors on GPU boards, which are off by up to 5 % per card."""
        return any(map(is_gpu_source, self.energy_sources))

    def to_dict(self) -> dict[str, Any]:
        """The aggregate as JSON values, metrics in their groups: `["throughput"]["output_tok_per_s"]`."""
        document: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "metrics"
        }
        document["invalid_reasons"] = {reason.text: count for reason, count in self.invalid_reasons.items()}
        document["warnings"] = {reason.text: count for reason, count in self.warnings.items()}
        document["energy_sources"] = list(self.energy_sources)
        document["no_interval_reason"] = NO_INTERVAL.text if self.is_load_shared else None
        for estimate in self.metrics.values():
            document.setdefault(estimate.metric.group, {})[estimate.metric.name] = estimate.to_dict()
        return document


def estimate_note(configurations: Iterable[ConfigAggregate]) -> str:
    """What to put beside an energy of these configurations: how far it is an estimate; empty when it was measured."""
    with_energy = [item for item in configurations if item.energy_sources]
    if not any(item.is_estimate for item in with_energy):
        return ""
    return f"({'' if all(item.is_all_estimate for item in with_energy) else 'partly '}an estimate from TDP)"


def aggregate_campaign_results(
    results: Mapping[str, Sequence[Record | Mapping[str, Any] | None]], confidence: float = CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """The aggregate of each configuration as JSON values, by configuration name.

    Each has `n_cycles` and, under `energy`, `throughput`, `tokens` and `latency`, every metric with its values by
    cycle, the `bootstrap` interval of the mean and the `t_log` interval of the geometric mean.

    Args:
        results: per configuration its results of all cycles and attempts: records, or documents as `result.json`
            holds them; None stands for an experiment that failed without a result.
        confidence: of both intervals.

    Raises:
        RecordError: a document that is not a whole record.
        ValueError: a confidence outside (0, 1).
    """
    return {name: aggregate_config(name, items, confidence).to_dict() for name, items in results.items()}


def aggregate_config(
    config_name: str,
    results: Sequence[Record | Mapping[str, Any] | None],
    confidence: float = CONFIDENCE,
    n_failed: int = 0,
    metrics: Sequence[Metric] = METRICS,
) -> ConfigAggregate:
    """The aggregate of one configuration.

    Only valid attempts count, and of each cycle the last of them: one cycle is one value, since attempts within it
    share everything that varies between cycles. Where one cycle holds the experiment several times, their mean counts.

    Raises:
        RecordError, ValueError: as `aggregate_campaign_results`.
    """
    check_confidence(confidence)
    records = distinct(_as_record(config_name, index, item) for index, item in enumerate(results) if item is not None)
    attempts = by_cycle(records)
    used = used_cycles(attempts)
    is_load_shared = share_a_load(used)
    return ConfigAggregate(
        config_name=config_name,
        n_cycles=len(used),
        n_results=len(records),
        n_invalid=sum(not record.validity.valid for record in records),
        n_failed=n_failed + sum(item is None for item in results),
        invalid_reasons=_count(reason for record in records for reason in record.validity.invalid_reasons),
        warnings={
            **_count(reason for record in records for reason in record.validity.warnings),
            **dict.fromkeys(_mixture_warnings(records), len(records)),
        },
        energy_sources=tuple(sorted({record.energy.primary_j.source or "" for record in records} - {""})),
        is_load_shared=is_load_shared,
        metrics={
            metric.name: _estimate(metric, used, attempts, confidence, is_load_shared=is_load_shared)
            for metric in metrics
        },
    )


def _as_record(config_name: str, index: int, item: Record | Mapping[str, Any]) -> Record:
    if isinstance(item, Record):
        return item
    if not isinstance(item, Mapping):
        raise RecordError(f"{config_name}: result {index + 1}: expected an object, got {shown(item)}")
    try:
        return decode_record(dict(item))
    except RecordError as error:
        raise RecordError(f"{config_name}: result {index + 1}: {error}") from error


def _mixture_warnings(records: Sequence[Record]) -> Iterable[Reason]:
    for identities, code in (
        ({record.identity.config_hash for record in records}, "mixed_configurations"),
        ({record.identity.host for record in records}, "mixed_hosts"),
        ({record.identity.run_id for record in records}, "mixed_runs"),
    ):
        if len(identities) > 1:
            yield Reason.of(code, count=len(identities))


def _estimate(
    metric: Metric, used: Cycles, attempts: Cycles, confidence: float, *, is_load_shared: bool
) -> MetricEstimate:
    values = tuple(cycle_values(metric, used).values())
    all_attempts = _all_attempts(metric, attempts, values)
    reasons = _count(
        reason for members in used.values() for record in members for reason in (metric.read(record)[1],) if reason
    )
    said = "; ".join(reasons)
    if not values:
        null_reason = said or "no valid result"
        return MetricEstimate(metric, (), None, None, all_attempts, null_reason)
    bootstrap = bootstrap_ci(values, confidence=confidence)
    t_log = log_t_interval(values, confidence)
    if is_load_shared and len(values) > 1:
        bootstrap = dataclasses.replace(bootstrap, ci_lower=None, ci_upper=None, warning=NO_INTERVAL.text)
        t_log = dataclasses.replace(t_log, ci_lower=None, ci_upper=None, warning=t_log.warning or NO_INTERVAL.text)
    warning = f"measured in {len(values)} of {len(used)} cycles: {said}" if len(values) < len(used) else None
    return MetricEstimate(metric, values, bootstrap, t_log, all_attempts, None, warning)


def _all_attempts(metric: Metric, attempts: Cycles, valid_values: tuple[float, ...]) -> AllAttempts | None:
    values = tuple(cycle_values(metric, attempts).values())
    if not values or values == valid_values:
        return None
    n_attempts = sum(metric.read(record)[0] is not None for members in attempts.values() for record in members)
    geometric = math.exp(statistics.fmean(map(math.log, values))) if min(values) > 0 else None
    return AllAttempts(statistics.fmean(values), geometric, len(values), n_attempts)


def _count(found: Iterable[_Countable]) -> dict[_Countable, int]:
    return dict(collections.Counter(found))
