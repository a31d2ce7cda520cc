"""The results of a run: its configurations over their cycles, and each metric's estimate with both intervals."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lem.base.dataclass import dataclass, field, replace
from lem.base.measurement import ENERGY_COUNTED, Measured, is_estimate, is_nvml_source
from lem.base.reasons import Reason
from lem.base.units import fmean
from lem.config.experiment import PROGRAM
from lem.record import Record, ResultKey
from lem.results import axes, metrics
from lem.results.bootstrap import BootstrapResult, LogTInterval, bootstrap_ci, geometric_mean, log_t_interval
from lem.results.comparability import Conditions, conditions_of
from lem.results.configurations import Listing, Reading, group_of, listing_of, numbers_of, read_list
from lem.results.metrics import METRIC_BY_NAME, Cycles, Metric
from lem.results.rows import cell_text, make_table
from lem.results.stats import CONFIDENCE
from lem.results.stopping import StoppingRule, read_stopping_rule
from lem.results.store import Digests, Problem, Repository, StoredResult, count_failed
from lem.results.uncertainty import Causes, Combined, common_causes, uncertainty_of

ENERGY, THROUGHPUT = METRIC_BY_NAME["energy_per_output_tok_j"], METRIC_BY_NAME["output_tok_per_s"]

# Simulated: with 1 % between loads and 0.5 % between runs, a 95 % t interval over cycles that share one load covers
# 64, 43 and 27 % at 3, 5 and 10 cycles.
SHARED_LOAD = Reason.of("shared_load")
NO_INTERVAL = Reason.of("no_interval", why=SHARED_LOAD)
REPLAYED = Reason.of("replayed_arrivals")

_SINGLE_CYCLE = "Single cycle: use --cycles 3+ for confidence intervals"
_SINGLE_RUN = "Single run: use lem measure -r 3 or more for confidence intervals"

# By the part of the identity that results under one name should have in common.
_MIXTURES = {
    operator.attrgetter("config_hash"): "mixed_configurations",
    operator.attrgetter("machine"): "mixed_hosts",
    operator.attrgetter("run_id"): "mixed_runs",
}


@dataclass(frozen=True)
class AllAttempts:
    mean: float
    geometric_mean: float | None
    n_cycles: int
    n_attempts: int


@dataclass(frozen=True)
class Estimate:
    """One metric over the cycles of a configuration."""

    metric: Metric
    values: tuple[float, ...] = ()  # one per cycle that measured the metric, in the order of the cycles
    confidence: float = CONFIDENCE  # of every interval
    share: float = 1.0  # of the error that this allows, what is left for the last test of a run with added cycles
    no_interval: Reason | None = None  # why several values have no interval
    all_attempts: AllAttempts | None = None  # where it differs from the estimate over valid attempts
    null_reason: str | None = None  # why no cycle measured the metric
    warning: str | None = None  # what is missing or unreliable
    records: Sequence[Record] = field(default=(), repr=False, compare=False)  # that it rests on

    @cached_property
    def bootstrap(self) -> BootstrapResult | None:
        """The arithmetic mean and its interval; None when no cycle measured the metric."""
        if not self.values:
            return None
        found, why = bootstrap_ci(self.values, confidence=self.confidence), self.no_interval
        return found if why is None else replace(found, ci_lower=None, ci_upper=None, warning=why.text)

    @cached_property
    def t_log(self) -> LogTInterval | None:
        """The geometric mean and its t interval; None when no cycle measured the metric."""
        if not self.values:
            return None
        level = 1 - (1 - self.confidence) * self.share
        found, why = log_t_interval(self.values, level), self.no_interval
        if found.confidence != self.confidence:
            found = replace(found, confidence=self.confidence)
        if why is None:
            return found
        return replace(found, ci_lower=None, ci_upper=None, reason=found.reason or why)

    @cached_property
    def value(self) -> float | None:
        """The geometric mean over the cycles, in `unit`; None with `null_reason`, or where a value is not positive."""
        return geometric_mean(self.values) if self.values else None

    @cached_property
    def combined(self) -> Measured[Combined]:
        """Of an energy: the spread of the cycles and the meter, as one uncertainty."""
        return uncertainty_of(self.metric, self.records, self.values, self.confidence, self.no_interval)

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
        return len(self.values)

    @property
    def unit(self) -> str:
        return self.metric.unit

    @property
    def half_width(self) -> float | None:
        """How far the upper end lies above the mean, over the mean: 0.02 is ±2 %; None without an interval."""
        return None if self.value is None or self.high is None else self.high / self.value - 1


@dataclass(frozen=True)
class Configuration:
    """One configuration of a run over its cycles. Estimates are worked out when they are asked for."""

    name: str
    records: tuple[Record, ...] = ()  # every whole result, valid or not, of all attempts, in the order of execution
    n_failed: int = 0  # experiments without a result
    confidence: float = CONFIDENCE  # of every interval
    is_removed: bool = False  # the campaign has it no more: it is shown, and compared only by name
    share: float = 1.0  # of the error that this allows, what is left for the last test of a run with added cycles
    number: int = 1  # in every table of its run
    paths: Mapping[ResultKey, str] = field(default_factory=dict)  # of the results of its run

    @property
    def config_hash(self) -> str:
        """Identifies the configuration in every run; empty when there is no result."""
        return self.records[0].identity.config_hash if self.records else ""

    @property
    def run_id(self) -> str:
        """The run of its first result; empty when there is none."""
        return self.records[0].identity.run_id if self.records else ""

    @property
    def is_program(self) -> bool:
        """Whether these are runs of a program that `lem measure` metered."""
        return bool(self.records) and self.records[0].identity.backend == PROGRAM

    @cached_property
    def attempts(self) -> Cycles:
        return metrics.by_cycle(self.records)

    @cached_property
    def cycles(self) -> Cycles:  # with the records that the estimates rest on
        return metrics.used_cycles(self.attempts)

    @cached_property
    def used(self) -> tuple[Record, ...]:
        """The records that the estimates rest on, cycle by cycle."""
        return tuple(record for members in self.cycles.values() for record in members)

    @cached_property
    def settings(self) -> Mapping[str, str]:
        return axes.settings_of(self.records[0]) if self.records else {}

    @property
    def n_cycles(self) -> int:
        return len(self.cycles)

    @cached_property
    def n_invalid(self) -> int:
        return sum(not record.validity.valid for record in self.records)

    @property
    def n_lost(self) -> int:
        """Cycles without a valid result: an invalid attempt whose rerun is valid costs none."""
        return len(self.attempts) - self.n_cycles + self.n_failed

    @property
    def lost_ratio(self) -> float:
        return self.n_lost / max(len(self.attempts) + self.n_failed, 1)

    @cached_property
    def invalid_reasons(self) -> Mapping[Reason, int]:
        return Counter(reason for record in self.records for reason in record.validity.invalid_reasons)

    @cached_property
    def warnings(self) -> Mapping[Reason, int]:
        found = Counter(reason for record in self.records for reason in record.validity.warnings)
        identities = [record.identity for record in self.records]
        for part, code in _MIXTURES.items():
            count = len(set(map(part, identities)))
            if count > 1:
                found[Reason.of(code, count=count)] = len(self.records)
        return found

    @cached_property
    def energy_sources(self) -> tuple[str, ...]:
        return tuple(sorted({record.energy.source or "" for record in self.records} - {""}))

    @cached_property
    def is_load_shared(self) -> bool:  # then there is no interval
        return metrics.share_a_load(self.cycles)

    @cached_property
    def no_interval(self) -> Reason | None:
        """Why there is no interval over its cycles: they are no independent repeats of one measurement."""
        if self.is_load_shared:
            return NO_INTERVAL
        # Nothing keeps a server from being replaced between two cycles.
        versions = sorted({it.environment.engine_version for it in self.used if it.identity.backend == "server"})
        if len(versions) < 2:
            return None
        return Reason.of("no_interval", why=Reason.of("server_versions", versions=", ".join(versions)))

    @property
    def is_replayed(self) -> bool:
        """Whether its cycles, of an older build, replayed the same random arrivals."""
        poisson = [item for item in self.used if item.window.traffic_mode == "poisson" and _has_seed(item.requested)]
        return len(poisson) > 1 and len({item.work.prompt_source.get("draw") for item in poisson}) == 1

    @property
    def is_estimate(self) -> bool:
        """Whether some of its energy is an estimate, which must be labelled as one."""
        return any(map(is_estimate, self.energy_sources))

    @property
    def is_by_board_sensors(self) -> bool:
        """Whether some of its energy comes from the sensors on GPU boards, which are off by up to 5 % per card."""
        return any(map(is_nvml_source, self.energy_sources))

    def values(self, metric: Metric, *, of_attempts: bool = False) -> Mapping[metrics.Cycle, float]:
        """One value for each cycle that measured the metric; with `of_attempts`, over every attempt in it."""
        key = metric.name, of_attempts and len(self.used) < len(self.records)
        if key not in self._values:
            self._values[key] = metrics.cycle_values(metric, self.attempts if key[1] else self.cycles)
        return self._values[key]

    @cached_property
    def _values(self) -> dict[tuple[str, bool], Mapping[metrics.Cycle, float]]:
        return {}

    @cached_property
    def span(self) -> tuple[str, str]:
        """When the first and the last of the records started that the estimates rest on."""
        times = [record.identity.start_utc for record in self.used]
        return min(times, default=""), max(times, default="")

    def estimate(self, metric: str | Metric) -> Estimate:
        """The estimate of a metric, or of its name or alias; UserError where there is no such metric."""
        # One cycle is one value, since attempts within it share everything that varies between cycles.
        chosen = metric if isinstance(metric, Metric) else metrics.parse_metric(metric)
        if chosen.name not in self._estimates:
            self._estimates[chosen.name] = self._estimated(chosen)
        return self._estimates[chosen.name]

    def interval_as_best(self, metric: str | Metric, of: int) -> tuple[float, float] | None:
        """The interval of a configuration that was chosen for its value from `of` ones: it holds for all of them."""
        found = self.estimate(metric)
        if found.low is None or found.high is None:
            return None
        chosen = log_t_interval(found.values, 1 - (1 - self.confidence) * self.share / of)
        return None if chosen.ci_lower is None or chosen.ci_upper is None else (chosen.ci_lower, chosen.ci_upper)

    @cached_property
    def _estimates(self) -> dict[str, Estimate]:
        return {}

    def _estimated(self, metric: Metric) -> Estimate:
        values = tuple(self.values(metric).values())
        attempts, all_attempts = tuple(self.values(metric, of_attempts=True).values()), None
        if attempts and attempts != values:
            n_attempts = sum(metric.read(record)[0] is not None for record in self.records)
            geometric = math.exp(fmean(map(math.log, attempts))) if min(attempts) > 0 else None
            all_attempts = AllAttempts(fmean(attempts), geometric, len(attempts), n_attempts)
        if not values:
            null_reason = self._why_missing(metric) or "no valid result"
            return Estimate(metric, all_attempts=all_attempts, null_reason=null_reason)
        warning = None
        if len(values) < self.n_cycles:
            warning = f"measured in {len(values)} of {self.n_cycles} cycles: {self._why_missing(metric)}"
        no_interval = self.no_interval if len(values) > 1 else None
        given = (self.confidence, self.share, no_interval, all_attempts, None, warning, self.used)
        return Estimate(metric, values, *given)

    def common_causes(self, metric: Metric) -> Measured[Causes]:
        """What the windows of all cycles share of the uncertainty of an energy."""
        if metric.name not in self._causes:
            self._causes[metric.name] = common_causes(metric, self.used)
        return self._causes[metric.name]

    @cached_property
    def _causes(self) -> dict[str, Measured[Causes]]:
        return {}

    @cached_property
    def are_answers_asked(self) -> bool:  # by `measurement.agreement`
        return any(
            work.output_ids_sha256 is not None or work.why_none("output_ids_sha256").code == "ids_not_returned"
            for work in (record.work for record in self.used)
        )

    @cached_property
    def conditions(self) -> Conditions:
        return conditions_of(self.used)

    @cached_property
    def cards(self) -> frozenset[tuple[str, ...]]:
        """The cards of its windows: more than one tuple where they are not the same in all."""
        return frozenset(record.environment.gpu_uuids for record in self.used)

    def _why_missing(self, metric: Metric) -> str:
        reasons = (metric.read(record)[1] for record in self.used)
        return "; ".join(dict.fromkeys(reason.text for reason in reasons if reason))


def _has_seed(requested: Mapping[str, Any]) -> bool:
    traffic = requested.get("traffic_simulation") or {}
    return requested.get("random_seed", "default") is not None or traffic.get("seed") is not None


def estimate_note(configurations: Iterable[Configuration]) -> str:
    """The label of an energy of these configurations that is, or is partly, an estimate; empty when it was measured."""
    sources = [source for item in configurations for source in item.energy_sources]
    if not any(map(is_estimate, sources)):
        return ""
    return f"({'' if all(map(is_estimate, sources)) else 'partly '}an estimate from TDP)"


def carbon_basis(configurations: Iterable[Configuration]) -> str:
    """What the emissions and the cost of these configurations contain: `GPU energy only × PUE`; empty if unknown."""
    scopes = sorted({record.energy.energy_scope or "" for item in configurations for record in item.used} - {""})
    return f"{' or '.join(ENERGY_COUNTED.get(scope, scope) for scope in scopes)} × PUE" if scopes else ""


@dataclass(frozen=True)
class Run:
    """The results of one run of a campaign, grouped by configuration."""

    campaign_name: str
    run_ids: tuple[str, ...]
    records: tuple[Record, ...]  # every whole result, valid or not, of all attempts
    failed: Mapping[str, int] = field(default_factory=dict)  # per configuration name, experiments without a result
    left: Mapping[str, int] = field(default_factory=dict)  # the same for those that had no turn or were interrupted
    remedy: str = ""  # how to measure what is missing; empty where no manifest continues the run
    problems: tuple[Problem, ...] = ()  # attempts without a usable result
    stopping: StoppingRule | None = None  # the rule by which cycles were added; None where their number was fixed
    folder: Path | None = None  # where it is: <results_dir>/<campaign>/<run>
    listing: Listing | None = None  # the configurations that the campaign has now; None where unknown
    numbered: tuple[str, ...] = ()  # hashes in the order of the numbers; () where they follow the execution
    paths: Mapping[ResultKey, str] = field(default_factory=dict)  # of each result

    @property
    def run_id(self) -> str:
        return self.run_ids[0] if self.run_ids else ""

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.identity.host for record in _in_order(self.records)))

    @cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """In the order of their numbers, which is that of the campaign or else of the execution; those removed last."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in metrics.distinct(_in_order(self.records)):
            groups.setdefault(group_of(record.identity), []).append(record)
        found = [(digest, _last_name(members), tuple(members)) for (digest, _), members in groups.items()]
        known = {name for _, name, _ in found}
        found += [("", name, ()) for name in self.failed if name not in known]
        numbers = numbers_of(self.numbered, self.listing, [(digest, name) for digest, name, _ in found])
        share, listing = self.share, self.listing
        items = (
            Configuration(
                *(name, members, self.failed.get(name, 0)),
                is_removed=listing is not None and bool(members) and digest not in listing,
                share=share,
                number=number,
                paths=self.paths,
            )
            for (digest, name, members), number in zip(found, numbers, strict=True)
        )
        return tuple(sorted(items, key=lambda item: (item.is_removed, item.number)))

    @property
    def share(self) -> float:
        """The part of the usual error that is left for its intervals and verdicts, after tests of fewer cycles."""
        return self.stopping.share if self.stopping else 1.0

    @cached_property
    def with_results(self) -> tuple[Configuration, ...]:
        """The configurations with a whole result, valid or not, that were not removed from the campaign."""
        return tuple(item for item in self.configurations if item.records and not item.is_removed)

    @cached_property
    def used(self) -> tuple[Record, ...]:
        """The records that the estimates of these rest on."""
        return tuple(record for item in self.with_results for record in item.used)

    @cached_property
    def removed(self) -> tuple[Configuration, ...]:
        return tuple(item for item in self.configurations if item.is_removed)

    @cached_property
    def courses(self) -> dict[str, Any]:
        """Those of `lem.results.trends`, by the name of their metric."""
        return {}

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The settings of the heading that all configurations have in common, by label."""
        return axes.shared_headlines(self.records)

    @property
    def single_cycle(self) -> str | None:
        """What to tell people about a run without any interval; None with one."""
        if max((item.n_cycles for item in self.configurations), default=0) != 1:
            return None
        return _SINGLE_RUN if all(item.is_program for item in self.with_results) else _SINGLE_CYCLE

    @property
    def primary_metric(self) -> Metric:
        """Energy per output token if every configuration with a valid result measured it, else the throughput."""
        valid = [item for item in self.with_results if item.n_cycles]
        return ENERGY if valid and all(item.estimate(ENERGY).values for item in valid) else THROUGHPUT

    def find(self, name: str) -> Configuration | None:
        return next((item for item in self.configurations if item.records and item.name == name), None)

    def select(self, wanted: str) -> Configuration:
        """The configuration with results that a number, a name, settings (`axis=value`) or a part of a name means.

        Raises:
            LemError: there is none, or more than one.
        """
        return axes.select([*self.with_results, *self.removed], wanted, f"run {self.run_id}")

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict per experiment, ready for `pandas.DataFrame`: the columns and texts of `lem results export`."""
        base = self.folder.parents[1] if self.folder else Path()
        return [
            {name: cell_text(value) if isinstance(value, list) else value for name, (value, _) in row.items()}
            for row in make_table(self.results, base=base).rows()
        ]

    @property
    def results(self) -> tuple[StoredResult, ...]:
        return tuple(StoredResult(self.paths.get(item.identity.key, "."), item) for item in self.records)


def make_run(
    records: Iterable[Record],
    failed: Mapping[str, int] | None = None,
    *,
    campaign_name: str = "",
    run_id: str = "",
    **others: Any,
) -> Run:
    given = tuple(records)
    identities = [item.identity for item in _in_order(given)]
    name = ", ".join(dict.fromkeys(item.campaign_name for item in identities)) or campaign_name
    run_ids = tuple(dict.fromkeys(item.run_id for item in identities)) or ((run_id,) if run_id else ())
    return Run(name, run_ids, given, failed or {}, **others)


def read_run(
    results_dir: Path,
    campaign: str,
    run_id: str,
    *,
    is_checked: bool = False,
    digests: Digests | None = None,
    reading: Reading | None = None,
) -> Run:
    """The results of a run, as `Repository.scan` has them; UserError for a name that cannot name a folder."""
    repository, lists = Repository(results_dir, campaign), functools.cache(read_list)
    scan = repository.scan(run_id, is_checked=is_checked, digests=digests, reading=reading or Reading(), lists=lists)
    found = lists(repository.run_folder(run_id))
    listing = listing_of(found)
    return make_run(
        [item.record for item in scan.results],
        count_failed(scan, listing),
        campaign_name=campaign,
        run_id=run_id,
        problems=scan.problems,
        stopping=read_stopping_rule(repository.run_folder(run_id)),
        folder=repository.run_folder(run_id),
        listing=listing,
        numbered=found.numbered if found else (),
        paths={item.record.identity.key: item.file for item in scan.results},
    )


def _last_name(records: Sequence[Record]) -> str:
    return max(reversed(records), key=operator.attrgetter("identity.start_utc")).identity.config_name


def _in_order(records: Iterable[Record]) -> list[Record]:
    order = operator.attrgetter("identity.order_index", "identity.cycle_index", "identity.attempt")
    return sorted(records, key=order)
