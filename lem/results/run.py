"""The results of a run: its configurations with their estimates, how precise they are, and how long they took."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lem.base import durable
from lem.base.clock import parse_time
from lem.base.codec import decode
from lem.base.durable import make_folder, reason_of
from lem.base.units import parse_percentage, percent
from lem.record import Record, ResultKey
from lem.results.aggregation import SHARED_LOAD, Configuration, Estimate, configuration_document
from lem.results.export import cell_text, make_table
from lem.results.metrics import METRIC_BY_NAME, Metric, distinct, headline_settings, shared_settings
from lem.results.stats import CONFIDENCE
from lem.results.store import Problem, Repository, StoredResult, count_failed, stopping_campaign

_logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SINGLE_CYCLE = "Single cycle: use --cycles 3+ for confidence intervals"

ENERGY, THROUGHPUT = METRIC_BY_NAME["energy_per_output_tok_j"], METRIC_BY_NAME["output_tok_per_s"]


@dataclass(frozen=True)
class Target:
    """How narrow the interval of every configuration should become."""

    half_width: float  # of the 95 % interval over the mean: 0.02 is ±2 %
    metric: str | None = None  # None: energy per output token where it is measured, else the output throughput

    def describe(self) -> str:
        """`±2 %`."""
        return _plus_minus(self.half_width)


@dataclass(frozen=True)
class StoppingRule:
    """The rule by which cycles were added to a run; it is kept with its results."""

    target: Target
    least_cycles: int
    most_cycles: int

    def describe(self) -> str:
        """`until every interval of output_tok_per_s is within ±2 % (5 cycles at least, 20 at most)`."""
        metric = "" if self.target.metric is None else f" of {self.target.metric}"
        return (
            f"until every interval{metric} is within {self.target.describe()} "
            f"({self.least_cycles} cycles at least, {self.most_cycles} at most)"
        )


@dataclass(frozen=True)
class Run:
    """The results of one run of a campaign, grouped by configuration."""

    campaign_name: str
    run_ids: tuple[str, ...]
    records: tuple[Record, ...]  # every whole result, valid or not, of all attempts
    failed: Mapping[str, int] = field(default_factory=dict)  # per configuration name, experiments without a result
    problems: tuple[Problem, ...] = ()  # attempts without a usable result
    stopping: StoppingRule | None = None  # the rule by which cycles were added; None where their number was fixed
    folder: Path | None = None  # where it is: <results_dir>/<campaign>/<run>
    paths: Mapping[ResultKey, Path] = field(default_factory=dict)  # of each result

    @property
    def run_id(self) -> str:
        """Identifies the run."""
        return self.run_ids[0] if self.run_ids else ""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts that measured."""
        return _distinct(record.identity.host for record in _in_order(self.records))

    @cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """In the order in which they ran first, those without any result last."""
        # By name: a configuration that several hosts ran has a name for each host.
        groups: dict[str, list[Record]] = {}
        for record in distinct(_in_order(self.records)):
            groups.setdefault(record.identity.config_name, []).append(record)
        found = [Configuration(name, tuple(members), self.failed.get(name, 0)) for name, members in groups.items()]
        return (*found, *(Configuration(name, (), n) for name, n in self.failed.items() if name not in groups))

    @property
    def with_results(self) -> tuple[Configuration, ...]:
        """The configurations with a whole result, valid or not."""
        return tuple(item for item in self.configurations if item.records)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The settings of the heading that all configurations have in common, by label."""
        return shared_settings(map(headline_settings, _in_order(self.records)))

    @property
    def is_single_cycle(self) -> bool:
        """There are results, and no configuration has more than one cycle."""
        return max((item.n_cycles for item in self.configurations), default=0) == 1

    @property
    def primary_metric(self) -> Metric:
        """Energy per output token if every configuration with a valid result measured it, else the throughput."""
        valid = [item for item in self.configurations if item.n_cycles]
        return ENERGY if valid and all(item.estimate(ENERGY).values for item in valid) else THROUGHPUT

    def find(self, name: str) -> Configuration | None:
        """The configuration of that name, with results."""
        return next((item for item in self.with_results if item.name == name), None)

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict per experiment, ready for `pandas.DataFrame`: the columns and texts of `lem results export`."""
        base = self.folder.parents[1] if self.folder else Path()
        stored = [StoredResult(item.path.relative_to(base), item.record) for item in self.results]
        return [
            {name: cell_text(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}
            for row in make_table(stored).rows
        ]

    @property
    def results(self) -> tuple[StoredResult, ...]:
        """Every record with its path."""
        return tuple(StoredResult(self.paths.get(item.identity.key, Path()), item) for item in self.records)


def make_run(
    records: Iterable[Record],
    failed: Mapping[str, int] | None = None,
    *,
    campaign_name: str = "",
    run_id: str = "",
    **others: Any,
) -> Run:
    """The run with these results.

    Args:
        campaign_name, run_id: used when there is no result that names them.
        others: further fields of `Run`.
    """
    given = tuple(records)
    ordered = _in_order(given)
    return Run(
        campaign_name=", ".join(_distinct(item.identity.campaign_name for item in ordered)) or campaign_name,
        run_ids=_distinct(item.identity.run_id for item in ordered) or ((run_id,) if run_id else ()),
        records=given,
        failed=failed or {},
        **others,
    )


def read_run(results_dir: Path, campaign: str, run_id: str) -> Run:
    """The results of a run; what cannot be used is in `problems`.

    Raises:
        UserError: a name that cannot name a folder.
    """
    repository = Repository(results_dir, campaign)
    scan = repository.scan(run_id)
    return make_run(
        [item.record for item in scan.results],
        count_failed(scan),
        campaign_name=campaign,
        run_id=run_id,
        problems=scan.problems,
        stopping=read_stopping_rule(repository.folder / run_id),
        folder=repository.folder / run_id,
        paths={item.record.identity.key: item.path for item in scan.results},
    )


def run_document(run: Run) -> dict[str, Any]:
    """The run as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign_name": run.campaign_name,
        "run_ids": list(run.run_ids),
        "hosts": list(run.hosts),
        "confidence": CONFIDENCE,
        "shared": dict(run.shared),
        "configurations": [configuration_document(item) for item in run.configurations],
        "stopping": None if run.stopping is None else dataclasses.asdict(run.stopping),
        "note": SINGLE_CYCLE if run.is_single_cycle else None,
    }


def _in_order(records: Iterable[Record]) -> list[Record]:
    """The records in the order of execution."""
    return sorted(
        records, key=lambda item: (item.identity.order_index, item.identity.cycle_index, item.identity.attempt)
    )


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


# With fewer cycles a rule never stops: three that happen to lie together say nothing about the next one.
LEAST_CYCLES = 5
MOST_CYCLES = 20

# Stopping once an interval is narrow favours the cycles that happen to lie together. Simulated by
# tests/bench/stopping.py (log-normal cycles, 5 to 20 of them): 92 % where the standard deviation between cycles is
# twice the half width asked for, 95 % where it is a quarter or five times it.
UNACCOUNTED = "the intervals do not account for that; in simulations they covered 92 to 95 % instead of 95 %"

STOPPING_FILE = "stopping.json"
_STOPPING_SCHEMA_VERSION = 1
_TARGET = re.compile(r"ci=(?P<half_width>[^:]+)(?::(?P<metric>[a-z0-9_]+))?")


class Precision(NamedTuple):
    """How narrow the intervals of a run are."""

    metric: str
    narrow: dict[str, float]  # half width over the mean, by name: within the target, and of enough cycles
    wide: dict[str, float]  # others, inf without an interval; further cycles help
    without: dict[str, str]  # why further cycles would not give an interval either, by name

    @property
    def widest(self) -> list[str]:
        """The wide ones, the widest first: `pytorch-float16 ±3.1 %`."""
        ordered = sorted(self.wide.items(), key=lambda item: item[1], reverse=True)
        return [f"{name} {_plus_minus(width) if math.isfinite(width) else 'no interval'}" for name, width in ordered]


def parse_target(text: str) -> Target:
    """The target in `ci=2%` or `ci=2%:METRIC`.

    Raises:
        ValueError: anything else.
    """
    match = _TARGET.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a target such as ci=2% or ci=2%:output_tok_per_s, got {text!r}")
    metric = match["metric"]
    try:
        half_width = parse_percentage(match["half_width"])
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if not 0 < half_width < 1:
        raise ValueError(f"{text!r}: the width must be more than 0% and less than 100%")
    if metric is not None and metric not in METRIC_BY_NAME:
        raise ValueError(f"{text!r}: unknown metric {metric!r}; known: {', '.join(METRIC_BY_NAME)}")
    return Target(half_width, metric)


def measure_precision(records: Iterable[Record], target: Target, least_cycles: int = LEAST_CYCLES) -> Precision:
    """How narrow the t interval of each configuration is; fewer cycles than `least_cycles` are never narrow."""
    run = make_run(records)
    metric = run.primary_metric if target.metric is None else METRIC_BY_NAME[target.metric]
    found = Precision(metric.name, {}, {}, {})
    for item in run.configurations:
        estimate = item.estimate(metric)
        if estimate.value is None or item.is_load_shared:
            found.without[item.name] = _why_none(estimate)
            continue
        width = math.inf if estimate.half_width is None else estimate.half_width
        is_narrow = width <= target.half_width and estimate.n >= least_cycles
        (found.narrow if is_narrow else found.wide)[item.name] = width
    return found


def write_stopping_rule(run_folder: Path, rule: StoppingRule) -> None:
    """Keep the rule with the results of the run.

    Raises:
        InfrastructureError: it cannot be written.
    """
    path = run_folder / STOPPING_FILE
    with stopping_campaign(path):
        make_folder(run_folder)
        durable.write_json(path, {"schema_version": _STOPPING_SCHEMA_VERSION, **dataclasses.asdict(rule)})


def read_stopping_rule(run_folder: Path) -> StoppingRule | None:
    """The rule by which a run ended; None where its number of cycles was fixed. A broken file is logged."""
    path = run_folder / STOPPING_FILE
    try:
        document = durable.read_json(path)
        if not isinstance(document, dict):
            raise ValueError("not a stopping rule")
        found = {name: document.get(name) for name in ("target", "least_cycles", "most_cycles")}
        return decode(StoppingRule, found, "rule")
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("%s: %s: unknown whether the number of cycles was fixed", path, reason_of(error))
    except ValueError:
        _logger.warning("%s is corrupt: unknown whether the number of cycles was fixed", path)
    return None


def _plus_minus(half_width: float) -> str:
    return f"±{percent(half_width)}"


def _why_none(estimate: Estimate) -> str:
    """Why further cycles would not give an interval either."""
    if estimate.t_log is None:
        return estimate.null_reason or ""
    if estimate.value is None:
        return estimate.t_log.warning or ""
    return "1 sample" if estimate.n == 1 else SHARED_LOAD.text


# If the unexplained time between two starts is longer than this, the campaign was interrupted.
_PAUSE_S = 3600.0


class EarlierTimes(NamedTuple):
    """Seconds that experiments took; medians."""

    measured: Mapping[str, float]  # an experiment without its load: baselines, warm-up, window, …; by config_hash
    load: Mapping[str, float]  # a load of a configuration's engine, by config_hash
    gap: float | None  # the gap before an experiment; None where there was none


def earlier_times(records: Iterable[Record]) -> EarlierTimes:
    """How long the experiments of a campaign took.

    A record knows its load, warm-up and window. The time around them (baselines, guards, prompts) follows from the
    start of the next experiment; where there is none, the median of the others is taken.
    """
    known = list(records)
    around = _around(known)
    usual_s = statistics.median(around.values()) if around else 0.0
    measured = ((item, _inner_s(item) + around.get(item.identity.key, usual_s)) for item in known)
    loads = ((item, item.window.load_s) for item in known if item.window.load_s is not None)
    gaps = [gap for item in known if (gap := item.window.gap_s)]
    return EarlierTimes(_medians(measured), _medians(loads), statistics.median(gaps) if gaps else None)


def _medians(values: Iterable[tuple[Record, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for record, value in values:
        found.setdefault(record.identity.config_hash, []).append(value)
    return {digest: statistics.median(members) for digest, members in found.items()}


def _around(records: Sequence[Record]) -> dict[ResultKey, float]:
    """What each experiment took besides load, warm-up and window, where another followed it at once."""
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.identity.run_id, record.identity.host), []).append(record)
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
