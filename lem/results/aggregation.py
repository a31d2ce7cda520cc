"""The cycles of one configuration together: one value per cycle, and both intervals over the cycles."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lem.base.codec import shown
from lem.base.measurement import is_estimate, is_gpu_source
from lem.base.reasons import Reason
from lem.record import Record, RecordError, decode_record
from lem.results.bootstrap import (
    BootstrapResult,
    LogTInterval,
    bootstrap_ci,
    bootstrap_coverage_label,
    log_t_interval,
)
from lem.results.metrics import (
    METRICS,
    Cycles,
    Metric,
    by_cycle,
    cycle_values,
    distinct,
    parse_metric,
    settings_of,
    share_a_load,
    used_cycles,
)
from lem.results.stats import CONFIDENCE, check_confidence

__all__ = [
    "NO_INTERVAL",
    "SHARED_LOAD",
    "AllAttempts",
    "Configuration",
    "Estimate",
    "aggregate_campaign_results",
    "configuration_document",
    "estimate_note",
]

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
class Estimate:
    """One metric over the cycles of a configuration.

    Attributes:
        metric: which.
        values: one per cycle that measured the metric, in the order of the cycles.
        bootstrap: arithmetic mean and percentile bootstrap interval; None when no cycle measured the metric.
        t_log: geometric mean and Student t interval on log values; None when no cycle measured the metric.
        all_attempts: where it differs from the estimate over valid attempts.
        null_reason: why no cycle measured the metric.
        warning: what is missing or unreliable.
    """

    metric: Metric
    values: tuple[float, ...] = ()
    bootstrap: BootstrapResult | None = None
    t_log: LogTInterval | None = None
    all_attempts: AllAttempts | None = None
    null_reason: str | None = None
    warning: str | None = None

    @property
    def value(self) -> float | None:
        """The geometric mean over the cycles, in `unit`; None with `null_reason`, or where a value is not positive."""
        return self.t_log.geometric_mean if self.t_log else None

    @property
    def low(self) -> float | None:
        """The lower end of the 95 % Student t interval; None without one."""
        return self.t_log.ci_lower if self.t_log else None

    @property
    def high(self) -> float | None:
        """The upper end of the 95 % Student t interval; None without one."""
        return self.t_log.ci_upper if self.t_log else None

    @property
    def n(self) -> int:
        """The number of cycles that measured the metric."""
        return len(self.values)

    @property
    def unit(self) -> str:
        """The unit of value, low and high."""
        return self.metric.unit

    @property
    def half_width(self) -> float | None:
        """How far the upper end lies above the mean, over the mean: 0.02 is ±2 %; None without an interval."""
        return None if self.value is None or self.high is None else self.high / self.value - 1


@dataclass(frozen=True)
class Configuration:
    """One configuration of a run over its cycles. Estimates are worked out when they are asked for.

    Attributes:
        name: of the configuration.
        records: every whole result, valid or not, of all attempts, in the order of execution.
        n_failed: experiments without a result.
        confidence: of every interval.
    """

    name: str
    records: tuple[Record, ...] = ()
    n_failed: int = 0
    confidence: float = CONFIDENCE

    @property
    def config_hash(self) -> str:
        """Identifies the configuration in every run; empty when there is no result."""
        return self.records[0].identity.config_hash if self.records else ""

    @property
    def run_id(self) -> str:
        """The run of its first result; empty when there is none."""
        return self.records[0].identity.run_id if self.records else ""

    @cached_property
    def attempts(self) -> Cycles:
        """Every attempt, by cycle."""
        return by_cycle(self.records)

    @cached_property
    def cycles(self) -> Cycles:
        """The records that the estimates rest on: of each cycle the last valid attempt."""
        return used_cycles(self.attempts)

    @cached_property
    def used(self) -> tuple[Record, ...]:
        """The records that the estimates rest on, cycle by cycle."""
        return tuple(record for members in self.cycles.values() for record in members)

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """What was configured, by label."""
        return settings_of(self.records[0]) if self.records else {}

    @property
    def n_cycles(self) -> int:
        """Cycles with a valid result."""
        return len(self.cycles)

    @property
    def n_results(self) -> int:
        """Whole results, valid or not."""
        return len(self.records)

    @cached_property
    def n_invalid(self) -> int:
        """Whole results that are invalid."""
        return sum(not record.validity.valid for record in self.records)

    @property
    def n_excluded(self) -> int:
        """Invalid results and experiments without a result."""
        return self.n_invalid + self.n_failed

    @cached_property
    def invalid_reasons(self) -> Mapping[Reason, int]:
        """In how many results each reason occurs."""
        return Counter(reason for record in self.records for reason in record.validity.invalid_reasons)

    @cached_property
    def warnings(self) -> Mapping[Reason, int]:
        """In how many results each warning occurs."""
        found = Counter(reason for record in self.records for reason in record.validity.warnings)
        return {**found, **dict.fromkeys(self._mixtures(), len(self.records))}

    @cached_property
    def energy_sources(self) -> tuple[str, ...]:
        """The meters of the energy that counts."""
        return tuple(sorted({record.energy.primary_j.source or "" for record in self.records} - {""}))

    @cached_property
    def is_load_shared(self) -> bool:
        """Cycles share an engine load, so there is no interval."""
        return share_a_load(self.cycles)

    @property
    def is_estimate(self) -> bool:
        """Whether some of its energy is an estimate, which must be labelled as one."""
        return any(map(is_estimate, self.energy_sources))

    @property
    def is_all_estimate(self) -> bool:
        """Whether all of its energy is an estimate."""
        return bool(self.energy_sources) and all(map(is_estimate, self.energy_sources))

    @property
    def is_by_board_sensors(self) -> bool:
        """Whether some of its energy comes from the sensors on GPU boards, which are off by up to 5 % per card."""
        return any(map(is_gpu_source, self.energy_sources))

    def estimate(self, metric: str | Metric) -> Estimate:
        """The estimate of a metric, or of its name: `energy_per_output_tok_j`, or short `energy`.

        One cycle is one value, since attempts within it share everything that varies between cycles.

        Raises:
            UserError: there is no such metric.
        """
        chosen = metric if isinstance(metric, Metric) else parse_metric(metric)
        if chosen.name not in self._estimates:
            self._estimates[chosen.name] = self._estimated(chosen)
        return self._estimates[chosen.name]

    @cached_property
    def _estimates(self) -> dict[str, Estimate]:
        return {}

    def _estimated(self, metric: Metric) -> Estimate:
        values = tuple(cycle_values(metric, self.cycles).values())
        all_attempts = self._all_attempts(metric, values)
        reasons = "; ".join(dict.fromkeys(reason for record in self.used if (reason := metric.read(record)[1])))
        if not values:
            return Estimate(metric, all_attempts=all_attempts, null_reason=reasons or "no valid result")
        bootstrap = bootstrap_ci(values, confidence=self.confidence)
        t_log = log_t_interval(values, self.confidence)
        if self.is_load_shared and len(values) > 1:
            bootstrap = dataclasses.replace(bootstrap, ci_lower=None, ci_upper=None, warning=NO_INTERVAL.text)
            t_log = dataclasses.replace(t_log, ci_lower=None, ci_upper=None, warning=t_log.warning or NO_INTERVAL.text)
        is_partial = len(values) < self.n_cycles
        warning = f"measured in {len(values)} of {self.n_cycles} cycles: {reasons}" if is_partial else None
        return Estimate(metric, values, bootstrap, t_log, all_attempts, None, warning)

    def _all_attempts(self, metric: Metric, valid_values: tuple[float, ...]) -> AllAttempts | None:
        values = tuple(cycle_values(metric, self.attempts).values())
        if not values or values == valid_values:
            return None
        n_attempts = sum(metric.read(record)[0] is not None for record in self.records)
        geometric = math.exp(statistics.fmean(map(math.log, values))) if min(values) > 0 else None
        return AllAttempts(statistics.fmean(values), geometric, len(values), n_attempts)

    def _mixtures(self) -> Iterable[Reason]:
        parts = {"config_hash": "mixed_configurations", "host": "mixed_hosts", "run_id": "mixed_runs"}
        for part, code in parts.items():
            count = len({getattr(record.identity, part) for record in self.records})
            if count > 1:
                yield Reason.of(code, count=count)


def estimate_note(configurations: Iterable[Configuration]) -> str:
    """The label of an energy of these configurations that is, or is partly, an estimate; empty when it was measured."""
    with_energy = [item for item in configurations if item.energy_sources]
    if not any(item.is_estimate for item in with_energy):
        return ""
    return f"({'' if all(item.is_all_estimate for item in with_energy) else 'partly '}an estimate from TDP)"


def aggregate_campaign_results(
    results: Mapping[str, Sequence[Record | Mapping[str, Any] | None]], confidence: float = CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """The aggregate of each configuration as JSON values, by configuration name.

    Each has `n_cycles` and, under `energy`, `throughput`, `tokens` and `latency`, every metric with its values by
    cycle, the `bootstrap` interval of the mean and the `t_log` interval of the geometric mean. Only valid attempts
    count, and of each cycle the last of them.

    Args:
        results: per configuration its results of all cycles and attempts: records, or documents as `result.json`
            holds them; None is an experiment that failed without a result.
        confidence: of both intervals.

    Raises:
        RecordError: a document that is not a whole record.
        ValueError: a confidence outside (0, 1).
    """
    check_confidence(confidence)
    return {
        name: configuration_document(
            Configuration(
                name,
                distinct(_as_record(name, index, item) for index, item in enumerate(items) if item is not None),
                sum(item is None for item in items),
                confidence,
            )
        )
        for name, items in results.items()
    }


def configuration_document(configuration: Configuration) -> dict[str, Any]:
    """The configuration as JSON values, metrics in their groups: `["throughput"]["output_tok_per_s"]`."""
    document: dict[str, Any] = {
        "config_name": configuration.name,
        "n_cycles": configuration.n_cycles,
        "n_results": configuration.n_results,
        "n_invalid": configuration.n_invalid,
        "n_failed": configuration.n_failed,
        "invalid_reasons": {reason.text: count for reason, count in configuration.invalid_reasons.items()},
        "warnings": {reason.text: count for reason, count in configuration.warnings.items()},
        "energy_sources": list(configuration.energy_sources),
        "is_load_shared": configuration.is_load_shared,
        "no_interval_reason": NO_INTERVAL.text if configuration.is_load_shared else None,
    }
    for metric in METRICS:
        document.setdefault(metric.group, {})[metric.name] = _estimate_document(configuration.estimate(metric))
    return document


def _estimate_document(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON values; an interval names its method and what it covers."""
    bootstrap, t_log = estimate.bootstrap, estimate.t_log
    return {
        "unit": estimate.unit,
        "n": estimate.n,
        "values": list(estimate.values),
        "bootstrap": bootstrap
        and {
            "method": "percentile bootstrap of the arithmetic mean",
            "true_coverage": None
            if bootstrap.ci_lower is None
            else bootstrap_coverage_label(bootstrap.n_samples, bootstrap.confidence),
            **dataclasses.asdict(bootstrap),
        },
        "t_log": t_log and {"method": "Student t on log values around the geometric mean", **dataclasses.asdict(t_log)},
        "all_attempts": dataclasses.asdict(estimate.all_attempts) if estimate.all_attempts else None,
        "null_reason": estimate.null_reason,
        "warning": estimate.warning,
    }


def _as_record(config_name: str, index: int, item: Record | Mapping[str, Any]) -> Record:
    if isinstance(item, Record):
        return item
    if not isinstance(item, Mapping):
        raise RecordError(f"{config_name}: result {index + 1}: expected an object, got {shown(item)}")
    try:
        return decode_record(dict(item))
    except RecordError as error:
        raise RecordError(f"{config_name}: result {index + 1}: {error}") from error
