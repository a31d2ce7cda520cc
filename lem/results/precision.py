"""How narrow the intervals of a campaign are, and the rule by which cycles are added until they are narrow enough."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.codec import build_from, typed_fields
from lem.base.durable import make_folder, reason_of
from lem.base.units import parse_percentage, percent
from lem.record import Record
from lem.results.aggregation import SHARED_LOAD, MetricEstimate, aggregate_config
from lem.results.metrics import METRICS
from lem.results.stats import LogTInterval
from lem.results.store import stopping_campaign

_logger = logging.getLogger(__name__)

# Fewer cycles are never looked at: three that happen to lie together say nothing about the next one.
LEAST_CYCLES = 5
MOST_CYCLES = 20

# Looking at an interval and stopping once it is narrow favours the cycles that happen to lie together. Simulated by
# tests/bench/stopping.py (log-normal cycles, 5 to 20 of them): 92 % where the standard deviation between cycles is
# twice the half width asked for, 95 % where it is a quarter or five times it.
UNACCOUNTED = "the intervals do not account for that; in simulations they then covered 92 to 95 %, not 95 %"

STOPPING_FILE = "stopping.json"
_SCHEMA_VERSION = 1

# What is looked at when nothing is named: the first that every configuration measured.
_DEFAULT_METRICS = ("energy_per_output_tok_j", "output_tok_per_s")
_METRIC_NAMES = tuple(metric.name for metric in METRICS)

_TARGET = re.compile(r"ci=(?P<half_width>[^:]+)(?::(?P<metric>[a-z0-9_]+))?")


@dataclass(frozen=True)
class Target:
    """How narrow every configuration's interval is to become.

    Attributes:
        half_width: of the 95 % interval over the mean: 0.02 is ±2 %.
        metric: a name of `aggregation.METRICS`; None takes energy per output token where it is measured, else the
            output throughput.
    """

    half_width: float
    metric: str | None = None

    def describe(self) -> str:
        """`±2 %`."""
        return percent_text(self.half_width)


@dataclass(frozen=True)
class StoppingRule:
    """By what rule a run ended, as it is kept beside its results.

    Attributes:
        target: what was to be reached.
        least_cycles, most_cycles: between which the number of cycles was left open.
    """

    target: Target
    least_cycles: int
    most_cycles: int

    def describe(self) -> str:
        """`until every interval of output_tok_per_s is within ±2 % (5 to 20)`."""
        metric = "" if self.target.metric is None else f" of {self.target.metric}"
        return (
            f"until every interval{metric} is within {self.target.describe()} "
            f"({self.least_cycles} cycles at least, {self.most_cycles} at most)"
        )


@dataclass(frozen=True)
class Precision:
    """One configuration's interval.

    Attributes:
        half_width: over the mean; None where there is no interval.
    """

    config_name: str
    n_cycles: int
    half_width: float | None

    def describe(self) -> str:
        """`pytorch-float16 ±3.1 %`."""
        return f"{self.config_name} {'no interval' if self.half_width is None else percent_text(self.half_width)}"


@dataclass(frozen=True)
class PrecisionReport:
    """How narrow the intervals are.

    Attributes:
        metric: what was looked at.
        narrow: within the target, and of enough cycles.
        wide: not within it, or of too few cycles; further cycles help.
        without: names of configurations that further cycles would not give an interval either, with the reason.
    """

    metric: str
    narrow: tuple[Precision, ...]
    wide: tuple[Precision, ...]
    without: tuple[tuple[str, str], ...]


def parse_target(text: str) -> Target:
    """The target in `ci=2%` or `ci=2%:METRIC`.

    Raises:
        ValueError: anything else.
    """
    match = _TARGET.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no target; write it like ci=2% or ci=2%:output_tok_per_s")
    metric = match["metric"]
    try:
        half_width = parse_percentage(match["half_width"])
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if not 0 < half_width < 1:
        raise ValueError(f"{text!r}: a width over 0 and under 100 % is due")
    if metric is not None and metric not in _METRIC_NAMES:
        raise ValueError(f"{text!r}: no metric {metric}; there are {', '.join(_METRIC_NAMES)}")
    return Target(half_width, metric)


def percent_text(half_width: float) -> str:
    """`±2 %`, `±0.35 %`."""
    return f"±{percent(half_width)}"


def half_width_ratio(interval: LogTInterval) -> float | None:
    """How far the upper end lies above the mean, over the mean: 0.02 is ±2 %; None without an interval."""
    if interval.geometric_mean is None or interval.ci_upper is None:
        return None
    return interval.ci_upper / interval.geometric_mean - 1


def measure_precision(records: Iterable[Record], target: Target, least_cycles: int = LEAST_CYCLES) -> PrecisionReport:
    """How narrow the t interval of each configuration is, on its valid results.

    Args:
        records: all whole results of one run, of every attempt.
        least_cycles: fewer values than this are never narrow.
    """
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.identity.config_name, []).append(record)
    metric = target.metric or _metric_measured(by_name.values())
    narrow: list[Precision] = []
    wide: list[Precision] = []
    without: list[tuple[str, str]] = []
    for name, members in by_name.items():
        aggregate = aggregate_config(name, members)
        estimate = aggregate.metrics[metric]
        if estimate.t_log is None or estimate.t_log.geometric_mean is None or aggregate.is_load_shared:
            without.append((name, _why_none(estimate)))
            continue
        found = Precision(name, len(estimate.values), half_width_ratio(estimate.t_log))
        is_narrow = found.half_width is not None and found.half_width <= target.half_width
        (narrow if is_narrow and found.n_cycles >= least_cycles else wide).append(found)
    return PrecisionReport(metric, tuple(narrow), tuple(wide), tuple(without))


def write_stopping_rule(run_folder: Path, rule: StoppingRule) -> None:
    """Keep the rule beside the results of the run, for everybody who shows their intervals.

    Raises:
        InfrastructureError: it cannot be written.
    """
    path = run_folder / STOPPING_FILE
    document = {"schema_version": _SCHEMA_VERSION, **stopping_document(rule)}
    with stopping_campaign(path):
        make_folder(run_folder)
        durable.write_json(path, document)


def stopping_document(rule: StoppingRule) -> dict[str, Any]:
    """The rule as JSON values."""
    return dataclasses.asdict(rule)


def read_stopping_rule(run_folder: Path) -> StoppingRule | None:
    """The rule by which a run ended; None where its number of cycles was fixed.

    A broken file is warned about and taken for none.
    """
    path = run_folder / STOPPING_FILE
    try:
        return _decode_rule(durable.read_json(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("%s: %s: whether the number of cycles was fixed is not known", path, reason_of(error))
    except ValueError:
        _logger.warning("%s is broken: whether the number of cycles was fixed is not known", path)
    return None


def _decode_rule(document: Any) -> StoppingRule:
    """The rule that `stopping_document` gave.

    Raises:
        ValueError: something else.
    """
    if not isinstance(document, dict):
        raise ValueError("not a stopping rule")
    found = {name: document.get(name) for name in ("target", "least_cycles", "most_cycles")}
    values = {**found, "target": build_from(Target, found["target"], "target")}
    return StoppingRule(**typed_fields(StoppingRule, values, "rule"))


def _why_none(estimate: MetricEstimate) -> str:
    """Why further cycles would not give an interval either."""
    if estimate.t_log is None:
        return estimate.null_reason or ""
    if estimate.t_log.geometric_mean is None:
        return estimate.t_log.warning or ""
    return "1 sample" if estimate.t_log.n_samples == 1 else SHARED_LOAD.text


def _metric_measured(groups: Iterable[Sequence[Record]]) -> str:
    """The first of the default metrics that every configuration with a valid result measured."""
    aggregates = [aggregate_config("", members) for members in groups]
    measurable = [item for item in aggregates if item.n_cycles]
    for name in _DEFAULT_METRICS:
        if measurable and all(item.metrics[name].values for item in measurable):
            return name
    return _DEFAULT_METRICS[-1]
