"""What the results of a campaign add up to: JSON documents, the precision of a run, and what a plan may expect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from lem.base.clock import parse_time
from lem.base.codec import shown
from lem.base.dataclass import asdict, dataclass, replace
from lem.base.units import hash_label, percent
from lem.record import Record, RecordError, ResultKey, decode_record
from lem.results.axes import find_axes
from lem.results.bootstrap import bootstrap_coverage_label
from lem.results.compare import Row, compare_configurations, find_effect
from lem.results.limits import find_sweeps, sweep_document
from lem.results.load import find_series, series_document
from lem.results.metrics import METRICS, PROGRAM_METRICS, Metric, distinct, parse_metric
from lem.results.run import Configuration, Estimate, Run, carbon_basis, make_run
from lem.results.stats import CONFIDENCE, Autocorrelation, Verdict, check_confidence
from lem.results.stopping import StoppingRule, Target, gate_of
from lem.results.student import cycles_needed, power_of, smallest_difference
from lem.results.trends import change_of
from lem.results.uncertainty import combined_document

__all__ = ["aggregate_campaign_results"]

SCHEMA_VERSION = 1


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
    documents = {}
    for name, items in results.items():
        records = distinct(_as_record(name, index, item) for index, item in enumerate(items) if item is not None)
        n_failed = sum(item is None for item in items)
        documents[name] = configuration_document(Configuration(name, records, n_failed, confidence))
    return documents


def configuration_document(configuration: Configuration) -> dict[str, Any]:
    document: dict[str, Any] = {
        "number": configuration.number,
        "config_name": configuration.name,
        "config_hash": hash_label(configuration.config_hash),
        "n_cycles": configuration.n_cycles,
        "n_results": len(configuration.records),
        "n_invalid": configuration.n_invalid,
        "n_failed": configuration.n_failed,
        "is_removed": configuration.is_removed,
        "invalid_reasons": {reason.text: count for reason, count in configuration.invalid_reasons.items()},
        "warnings": {reason.text: count for reason, count in configuration.warnings.items()},
        "energy_sources": list(configuration.energy_sources),
        "carbon_basis": carbon_basis([configuration]) or None,
        "is_load_shared": configuration.is_load_shared,
        "no_interval_reason": configuration.no_interval.text if configuration.no_interval else None,
    }
    for metric in (*METRICS, *(PROGRAM_METRICS if configuration.is_program else ())):
        document.setdefault(metric.group, {})[metric.name] = _estimate_document(configuration.estimate(metric))
    return document


def run_document(run: Run) -> dict[str, Any]:
    labels = [axis.label for axis in find_axes([item.settings for item in run.with_results])]
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign_name": run.campaign_name,
        "run_ids": list(run.run_ids),
        "hosts": list(run.hosts),
        "confidence": CONFIDENCE,
        "shared": dict(run.shared),
        "configurations": [
            {**configuration_document(item), "axes": {label: item.settings.get(label) for label in labels}}
            for item in run.configurations
        ],
        "series": [series_document(item) for item in find_series(run.with_results)],
        "gpu_settings": [sweep_document(item) for item in find_sweeps(run.with_results)],
        "stopping": None if run.stopping is None else asdict(run.stopping),
        "note": run.single_cycle,
    }


def _estimate_document(estimate: Estimate) -> dict[str, Any]:
    bootstrap, t_log = estimate.bootstrap, estimate.t_log
    coverage = bootstrap_coverage_label(bootstrap.n_samples, bootstrap.confidence) if bootstrap else None
    return {
        "unit": estimate.unit,
        "n": estimate.n,
        "values": list(estimate.values),
        "bootstrap": bootstrap
        and {
            "method": "percentile bootstrap of the arithmetic mean",
            "true_coverage": coverage if bootstrap.ci_lower is not None else None,
            **asdict(bootstrap),
        },
        "t_log": t_log
        and {
            "method": "Student t on log values around the geometric mean",
            **{name: value for name, value in vars(t_log).items() if name != "reason"},
            "warning": t_log.warning,
        },
        "combined": combined_document(estimate.combined),
        "all_attempts": asdict(estimate.all_attempts) if estimate.all_attempts else None,
        "null_reason": estimate.null_reason,
        "warning": estimate.warning,
    }


def _as_record(config_name: str, index: int, item: Record | Mapping[str, Any]) -> Record:
    if isinstance(item, Record):
        return item
    try:
        if not isinstance(item, Mapping):
            raise RecordError(f"expected an object, got {shown(item)}")
        return decode_record(dict(item))
    except RecordError as error:
        raise RecordError(f"{config_name}: result {index + 1}: {error}") from error


def row_document(row: Row) -> dict[str, Any]:
    effect, judgement = row.effect, row.judgement
    low, high = row.interval or (None, None)
    return {
        "unit": row.metric.unit,
        "baseline": row.means[0],
        "other": row.means[1],
        "ratio": effect.ratio if effect else None,
        "ci_lower": low,
        "ci_upper": high,
        "df": effect.df if effect else None,
        "n_cycles": list(effect.n_cycles) if effect else [],
        "p_value": effect.p_value if effect else None,
        "p_holm": row.p_adjusted,
        "autocorrelation": _autocorrelation_document(effect.autocorrelation) if effect else None,
        "combined": combined_document(row.combined),
        "raw_ratio": row.raw_ratio,
        "all_attempts_ratio": row.all_attempts_ratio,
        "reason": row.reason and row.reason.text,
        "reason_code": row.reason and row.reason.code,
        "gate": judgement
        and {
            "threshold": judgement.gate.threshold,
            "verdict": judgement.verdict.value,
            "reason": judgement.reason and judgement.reason.text,
            "further_cycles": judgement.further_cycles,
        },
    }


def _autocorrelation_document(found: Autocorrelation | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"lag_1": found.lag_1, "n": found.n, "p_value": found.p_value, "power": found.power}


class Precision(NamedTuple):
    metric: str
    narrow: dict[str, float]  # half width over the value, by name, of what reached the target with enough cycles
    wide: dict[str, float]  # others, inf without an interval; further cycles help
    without: dict[str, str]  # why further cycles would not help, by name

    @property
    def widest(self) -> list[str]:
        ordered = sorted(self.wide.items(), key=lambda item: item[1], reverse=True)
        widths = {name: f"±{percent(width)}" if math.isfinite(width) else "no interval" for name, width in ordered}
        return [f"{name} {width}" for name, width in widths.items()]


def measure_precision(run: Run, rule: StoppingRule) -> Precision:
    """How far each configuration is from the target of the rule, in the one metric that the target is about."""
    # Ratios and verdicts are those of `lem compare`, with the first configuration as the baseline. With fewer cycles
    # than the rule requires nothing is narrow. A single configuration has no ratio: its own interval counts.
    target, run = rule.target or Target(math.inf), replace(run, stopping=rule)
    metric = parse_metric(target.metric) if target.metric else run.primary_metric
    found = Precision(metric.name, {}, {}, {})
    if target.kind == "each" or len(run.configurations) < 2:
        for item in run.configurations:
            estimate = item.estimate(metric)
            if estimate.value is None:
                found.without[item.name] = (estimate.t_log.warning if estimate.t_log else estimate.null_reason) or ""
            elif item.no_interval is not None:
                found.without[item.name] = "1 sample" if estimate.n == 1 else str(item.no_interval.data["why"])
            else:
                width = math.inf if estimate.half_width is None else estimate.half_width
                is_narrow = width <= target.half_width and estimate.n >= rule.least_cycles
                (found.narrow if is_narrow else found.wide)[item.name] = width
        return found
    baseline, *others = run.configurations
    gates = (gate_of(target),) if target.kind == "gate" else ()
    for pair in compare_configurations(run, baseline, others, metrics=(metric,), gates=gates).pairs:
        (row,), name = pair.rows, pair.other.name
        if row.reason and row.reason.code != "one_cycle":
            found.without[name] = row.reason.text
            continue
        width = math.inf if row.interval is None or row.effect is None else row.interval[1] / row.effect.ratio - 1
        is_met = width <= target.half_width
        if row.judgement is not None:
            is_met = row.judgement.verdict is not Verdict.INCONCLUSIVE
        is_met &= row.effect is not None and min(row.effect.n_cycles) >= rule.least_cycles
        (found.narrow if is_met else found.wide)[name] = width
    return found


# If the unexplained time between two starts is longer than this, the campaign was interrupted.
_PAUSE_S = 3600.0


class EarlierTimes(NamedTuple):
    measured: Mapping[str, float]  # an experiment without its load: baselines, warm-up, window, …; by config_hash
    load: Mapping[str, float]  # a load of a configuration's engine, by config_hash
    gap: float | None  # the gap before an experiment; None where there was none


def earlier_times(records: Iterable[Record]) -> EarlierTimes:
    # A record knows its load, warm-up and window. The time around them (baselines, guards, prompts) follows from the
    # start of the next experiment; where there is none, the median of the others is taken.
    import statistics  # imported here to keep the start-up fast

    known = list(records)
    around = _around(known)
    usual_s = statistics.median(around.values()) if around else 0.0
    gaps = [gap for item in known if (gap := item.window.gap_s)]
    measured: dict[str, list[float]] = {}
    loads: dict[str, list[float]] = {}
    for item in known:
        whole_s = _inner_s(item) + around.get(item.identity.key, usual_s)
        measured.setdefault(item.identity.config_hash, []).append(whole_s)
        if item.window.load_s is not None:
            loads.setdefault(item.identity.config_hash, []).append(item.window.load_s)
    median_measured, median_loads = (
        {digest: statistics.median(times) for digest, times in found.items()} for found in (measured, loads)
    )
    return EarlierTimes(median_measured, median_loads, statistics.median(gaps) if gaps else None)


def _around(records: Sequence[Record]) -> dict[ResultKey, float]:
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.identity.run_id, record.identity.machine), []).append(record)
    found = {}
    for members in runs.values():
        for record, following in pairwise(sorted(members, key=lambda item: item.identity.start_utc)):
            start, end = (parse_time(item.identity.start_utc) for item in (record, following))
            if start is None or end is None or (start.tzinfo is None) != (end.tzinfo is None):
                continue
            whole_s = (end - start) / timedelta(seconds=1)
            around_s = whole_s - (following.window.gap_s or 0.0) - (record.window.load_s or 0.0) - _inner_s(record)
            if 0 <= around_s <= _PAUSE_S:
                found[record.identity.key] = around_s
    return found


def _inner_s(record: Record) -> float:
    return (record.window.warmup_s or 0.0) + record.window.window_s


# Standard deviations assumed before there are results: of runs on one load of an engine, and of loads.
RUN_NOISE, LOAD_NOISE = 0.005, 0.01


@dataclass(frozen=True)
class Sensitivity:
    metric: Metric
    spread: float  # standard deviation of the log of the ratio within a cycle
    n_pairs: int = 0  # degrees of freedom of `spread`; 0 where it is assumed
    run_ids: tuple[str, ...] = ()  # the earlier runs that it comes from
    load_noise: float = 0.0  # of loads, where it is assumed; 0 where both sides share one

    @classmethod
    def assumed(cls, metric: Metric, *, is_load_shared: bool) -> Sensitivity:
        """The noise that is assumed; with shared loads, that of loads is the same on both sides of a ratio."""
        load_noise = 0.0 if is_load_shared else LOAD_NOISE
        return cls(metric, math.sqrt(2 * (RUN_NOISE**2 + load_noise**2)), load_noise=load_noise)

    def smallest(self, cycles: int, n_comparisons: int = 1) -> float:
        return change_of(smallest_difference(cycles, self.spread, _holm_confidence(n_comparisons)))

    def power(self, cycles: int, difference: float, n_comparisons: int) -> float:
        error = self.spread / math.sqrt(cycles)
        return power_of(math.log1p(difference), error, cycles - 1, _holm_confidence(n_comparisons))

    def needed(self, difference: float, n_comparisons: int = 1, *, is_gate: bool = False) -> int | None:
        distances = [math.log1p(difference)] * (2 if is_gate else 1)
        return cycles_needed(distances, self.spread, _holm_confidence(n_comparisons))


def _holm_confidence(n_comparisons: int) -> float:
    """Of the interval of the first of as many comparisons, which Holm's procedure makes the widest."""
    return 1 - (1 - CONFIDENCE) / n_comparisons


def earlier_sensitivity(records: Iterable[Record], metric: Metric) -> Sensitivity | None:
    """The spread of the ratios to the first configuration, pooled over runs; None where no two cycles measured one."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.identity.run_id, []).append(record)
    n_pairs, squares, used = 0, 0.0, []
    for run_id, members in runs.items():
        first, *others = make_run(members).with_results
        effects = [find_effect(metric, first, other)[0] for other in others]
        known = [(it.n_cycles[0], it.std_error) for it in effects if it is not None and it.std_error is not None]
        n_pairs += sum(n - 1 for n, _ in known)
        squares += sum((n - 1) * n * std_error**2 for n, std_error in known)
        used += [run_id] if known else []
    return Sensitivity(metric, math.sqrt(squares / n_pairs), n_pairs, tuple(used)) if n_pairs else None
