"""What the report says: configurations in order of merit, what is drawn of them, and the verdict."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.doc import SEPARATORS, name_tokens, printable, text_width
from lem.base.reasons import Reason
from lem.base.units import format_quantity, plural, some_of
from lem.record import Record
from lem.results.axes import settings_without_record, with_one_width
from lem.results.check import Finding, check_run
from lem.results.comparability import share_workload
from lem.results.compare import Comparison, compare_configurations
from lem.results.comparison import best_of, headline_of, remarks_of
from lem.results.metrics import Metric
from lem.results.report.plot import GROUPS_MAX, Markup, escape
from lem.results.run import ENERGY, THROUGHPUT, Configuration, Run, estimate_note
from lem.results.store import config_of_problem, configuration_of

NOT_GIVEN = "not given"

_LABEL_WIDTH = 32
# Names are in every table: with many configurations they are most of the page.
_MANY, _LABEL_WIDTH_OF_MANY = 300, 20
# What colour and shape mean, when there are too many configurations for one each.
_GROUPINGS = ("backend", "model", "precision")
AXIS_MOST = 24  # values on an axis of the grid
_TRACES_SHOWN, _FAULTY_FIRST = 12, 4
_PLACE = attrgetter("run_id", "host", "order_index", "cycle_index", "attempt")  # of an identity in the execution
_NAMED = 3  # configurations that a sentence of the verdict names


@dataclass(frozen=True)
class Phase:
    name: str
    begin_s: float
    end_s: float
    power_mean_w: float | None = None
    power_max_w: float | None = None
    temp_min_c: float | None = None
    temp_max_c: float | None = None
    throttled_s: float | None = None


@dataclass(frozen=True)
class Slowdown:
    begin_s: float
    end_s: float
    is_fault: bool  # by heat or a power brake, not by its power limit
    reason: str


@dataclass(frozen=True)
class Series:
    label: str  # of the device
    points: tuple[tuple[float, float] | None, ...]  # (seconds, value) in order; None where readings are missing


@dataclass(frozen=True)
class Trace:
    phases: tuple[Phase, ...]
    power: tuple[Series, ...]  # in watts
    temperature: tuple[Series, ...]  # in °C
    slowdowns: tuple[Slowdown, ...]
    interval_s: float  # between two readings

    @property
    def slowed_s(self) -> Sequence[tuple[float, float]]:
        """When a GPU was slowed down for any reason but its power limit: (begin, end), in the order of time."""
        return union((slowdown.begin_s, slowdown.end_s) for slowdown in self.slowdowns if slowdown.is_fault)


def union(spans: Iterable[tuple[float, float]], hole_s: float = 0.0) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin - found[-1][1] <= hole_s:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


Reading = tuple[float | None, Reason | None]


@dataclass(frozen=True)
class Entry:
    number: int  # in every table of the run
    name: str
    label: str  # without what all names share, short enough for a plot
    configuration: Configuration
    settings: Mapping[str, str]  # by label, as tables have them
    group: int  # colour and shape

    @property
    def records(self) -> tuple[Record, ...]:
        return self.configuration.records

    @property
    def used(self) -> tuple[Record, ...]:
        return self.configuration.used

    @functools.cached_property
    def are_used(self) -> Sequence[bool]:
        """Of each record, whether the estimates rest on it."""
        if len(self.used) == len(self.records):
            return [True] * len(self.records)
        used = {record.identity.key for record in self.used}
        return [record.identity.key in used for record in self.records]

    @functools.cached_property
    def is_estimate(self) -> bool:
        return self.configuration.is_estimate

    def readings(self, metric: Metric) -> Sequence[Reading]:
        """What each record says of the metric."""
        if metric.name not in self._readings:
            self._readings[metric.name] = [*map(metric.read, self.records)]
        return self._readings[metric.name]

    def measured(self, metric: Metric, *, is_used: bool) -> list[float]:
        found = zip(self.readings(metric), self.are_used, strict=True)
        return [value for (value, _), it in found if it == is_used and value is not None]

    @functools.cached_property
    def _readings(self) -> dict[str, Sequence[Reading]]:
        return {}

    def centre(self, metric: str | Metric) -> float | None:
        return self.configuration.estimate(metric).value

    def span(self, metric: str | Metric) -> tuple[float, float] | None:
        found = self.configuration.estimate(metric).t_log
        if found is None or found.ci_lower is None or found.ci_upper is None:
            return None
        return found.ci_lower, found.ci_upper


def workloads_of(entries: Iterable[Entry]) -> list[list[Entry]]:
    found: list[list[Entry]] = []
    for entry in entries:
        if entry.used:
            same = next((group for group in found if share_workload(group[0].used, entry.used)), None)
            if same is None:
                found.append([entry])
            else:
                same.append(entry)
    return found


def frontier(costs: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """The indices of the points that no other is at most as costly as in both and less in one; cheapest first."""
    kept: list[int] = []
    least, last = math.inf, None
    for index in sorted(range(len(costs)), key=lambda index: costs[index]):
        if costs[index][1] < least or costs[index] == last:
            kept.append(index)
            least, last = costs[index][1], costs[index]
    return tuple(kept)


@dataclass(frozen=True)
class Report:
    run: Run
    findings: tuple[Finding, ...]  # of `lem check`
    headline: Metric  # of the verdict: energy per output token, or throughput where no energy was measured
    comparison: Comparison | None  # of all others with the baseline, as `lem compare` has it; None for fewer than two
    entries: tuple[Entry, ...]  # in the order of their numbers
    records: tuple[Record, ...]  # in the order of execution
    grouped_by: str
    groups: tuple[str, ...]  # the meaning of each colour and shape; () where all look the same
    traces: tuple[tuple[Record, Trace], ...] = ()
    unread: tuple[str, ...] = ()  # sample logs that could not be read, and why
    n_logs: int = 0  # experiments with a sample log

    @property
    def has_energy(self) -> bool:
        return self.headline is ENERGY

    def unbroken(self, text: str) -> Markup:
        """The text; a name that does not fit on a line is on the next one, whole, with its number and punctuation."""
        shown = escape(text)
        found = {name for name in self._names if name in shown}
        if not found:
            return shown
        longest_first = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
        around = r"(?<![\w-])\(?(?:\d+ )?[(“]?", r"(?![\w-])[”),.;:]*"
        pattern = f"{around[0]}(?<![\\w-])(?:{longest_first}){around[1]}"
        return Markup(re.sub(pattern, r"<span class=name>\g<0></span>", shown))

    @functools.cached_property
    def _names(self) -> set[str]:
        return {escape(name) for entry in self.entries for name in (entry.name, entry.label) if "-" in name}

    @functools.cached_property
    def workloads(self) -> list[list[Entry]]:
        return workloads_of(self.entries)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (ENERGY, THROUGHPUT) if self.has_energy else (THROUGHPUT,)

    @functools.cached_property
    def estimate_note(self) -> str:
        found = (entry.configuration for entry in self.entries)
        note = estimate_note(item for item in found if item.estimate(ENERGY).values)
        return f" {note}" if note else ""


def compose(run: Run, baseline: Configuration | None = None) -> Report:
    estimates = [item.estimate(ENERGY) for item in run.configurations]
    is_measured = any(estimate.values or estimate.all_attempts for estimate in estimates)
    headline = ENERGY if is_measured else THROUGHPUT
    lost = _lost_settings(run)
    known = [item.settings for item in run.configurations if item.settings]
    settings = with_one_width([
        item.settings or (settings_without_record(lost[item.name], known) if item.name in lost else {})
        for item in run.configurations
    ])  # fmt: skip
    grouped_by, groups, meanings = _grouping(settings)
    labels = _labels([item.name for item in run.configurations])

    entries = tuple(
        Entry(it.number, printable(it.name), labels[it.name], it, settings[index], groups[index] if groups else index)
        for index, it in enumerate(run.configurations)
    )
    first = baseline or next(iter(run.with_results), None)
    others = [item for item in run.with_results if item is not first]
    comparison = compare_configurations(run, first, others) if first and others else None
    return Report(
        run=run,
        findings=check_run(run),
        headline=headline,
        comparison=comparison,
        entries=entries,
        records=tuple(sorted(run.records, key=lambda record: _PLACE(record.identity))),
        grouped_by=grouped_by,
        groups=meanings if groups else tuple(entry.label for entry in entries),
    )


def _grouping(settings: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[int], tuple[str, ...]]:
    """What colour and shape mean (each configuration, or a setting with few values), each one's, and their meanings."""
    if len(settings) <= GROUPS_MAX:
        return "configuration", (), ()
    for key in (*_GROUPINGS, *sorted({key for item in settings for key in item})):
        values = [item.get(key, NOT_GIVEN) for item in settings]
        meanings = tuple(dict.fromkeys(values))
        if 2 <= len(meanings) <= GROUPS_MAX:
            return key, [meanings.index(value) for value in values], meanings
    return "", [0] * len(settings), ()


def _labels(names: Sequence[str]) -> dict[str, str]:
    width = _LABEL_WIDTH if len(names) <= _MANY else _LABEL_WIDTH_OF_MANY
    tokens = {name: name_tokens(name) for name in names}
    common = set.intersection(*map(set, tokens.values())) if len(names) > 1 else set()
    labels = {}
    for name in names:
        whole = [*tokens[name]]
        own = [token for token in whole if token not in common] or whole
        values = [token.partition("=")[2] or token for token in own]
        forms = ("".join(form).rstrip(f"{SEPARATORS} ") for form in (whole, own, values))
        shortest, half = "".join(values), width // 2 - 1
        cut = f"{shortest[:half]}…{shortest[-half:]}"
        labels[name] = next((form for form in forms if text_width(form) <= width), cut)
    return labels


def _lost_settings(run: Run) -> Mapping[str, Mapping[str, Any]]:
    known = {configuration_of(record.identity.experiment_id) for record in run.records}
    found: dict[str, Mapping[str, Any]] = {}
    for problem in run.problems:
        key = configuration_of(problem.exp_id)
        if problem.exp_id and key not in known:
            name, requested = config_of_problem(problem)
            if requested is not None:
                found.setdefault(name or key, requested)
                known.add(key)
    return found


def select_traced(entries: Sequence[Entry], records: Sequence[Record]) -> tuple[Record, ...]:
    """The results whose power over time is drawn: all where they are few."""
    # Else some that were invalid or throttled, then one of each configuration in the order of merit.
    if len(records) <= _TRACES_SHOWN:
        return tuple(records)
    faulty = (item for item in records if not item.validity.valid or any(gpu.was_slowed for gpu in item.gpus))
    chosen = dict.fromkeys(itertools.islice((item.identity.key for item in faulty), _FAULTY_FIRST))
    by_key = {item.identity.key: item for item in records}
    for entry in entries:
        own = (record.identity.key for record in entry.used if record.identity.key in by_key)
        if len(chosen) < _TRACES_SHOWN:
            chosen.update(dict.fromkeys(itertools.islice(own, 1)))
    return tuple(by_key[key] for key in chosen)


def values_by_setting(settings: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    keys = sorted({key for item in settings for key in item})
    return {key: tuple(sorted({item.get(key, NOT_GIVEN) for item in settings}, key=_numbers_first)) for key in keys}


def grid_axes(values: Mapping[str, tuple[str, ...]], settings: Sequence[Mapping[str, str]]) -> tuple[str, ...] | None:
    varied = _without_doubles({key: found for key, found in values.items() if 1 < len(found) <= AXIS_MOST}, settings)
    if len(varied) < 2:
        return None

    def worth(pair: tuple[str, str]) -> tuple[bool, int, int]:
        cells = {tuple(item.get(key, NOT_GIVEN) for key in pair) for item in settings}
        is_absent = sum(NOT_GIVEN in values[key] for key in pair)
        return (len(cells) / (len(values[pair[0]]) * len(values[pair[1]])) > 0.5, -is_absent, len(cells))

    across, up = max(itertools.combinations(varied, 2), key=worth)
    if len(values[up]) < len(values[across]):  # a phone has more room for rows
        across, up = up, across
    return (across, up, *(key for key in varied if key not in (across, up)))


def _without_doubles(varied: Mapping[str, tuple[str, ...]], settings: Sequence[Mapping[str, str]]) -> list[str]:
    kept: dict[frozenset[frozenset[int]], str] = {}
    for key in sorted(varied, key=lambda name: (NOT_GIVEN in varied[name], name)):
        parts: dict[str, set[int]] = {}
        for index, item in enumerate(settings):
            parts.setdefault(item.get(key, NOT_GIVEN), set()).add(index)
        kept.setdefault(frozenset(map(frozenset, parts.values())), key)
    return list(kept.values())


def _numbers_first(value: str) -> tuple[int, float, str]:
    is_number = re.fullmatch(r"-?[0-9]+([.][0-9]+)?([eE]-?[0-9]+)?", value) is not None
    return (0, float(value), value) if is_number else (1, 0.0, value)


@dataclass(frozen=True)
class Verdict:
    sentence: str
    remarks: tuple[str, ...] = ()  # how it was found, and what could not be decided and why
    best: int | None = None  # the number of the best, if it differs from the baseline, or all others do


def verdict_of(report: Report) -> Verdict:
    metric, comparison = report.headline, report.comparison
    current = [entry for entry in report.entries if not entry.configuration.is_removed]
    ranked = [entry for entry in current if entry.centre(metric) is not None]
    missing = [entry for entry in current if entry.centre(metric) is None]
    remarks = [f"No value for {_names(missing)}."] if missing else []
    if not report.entries:
        return Verdict("No results.")
    if not ranked:
        return Verdict("No configuration has a valid result, so there is nothing to compare.")
    if comparison is None:
        return Verdict(f"“{ranked[0].name}”: {_amount(ranked[0], metric)}.", tuple(remarks))
    least = metric is ENERGY
    first = (min if least else max)(ranked, key=lambda entry: entry.centre(metric) or 0.0)
    remarks.insert(
        0, f"{'Lowest' if least else 'Highest'} mean: {_names([first])}, {_amount(first, metric, len(ranked))}."
    )
    best = best_of(comparison, metric)
    return Verdict(headline_of(comparison), (*remarks, *remarks_of(comparison)), best.number if best else None)


def _names(entries: Sequence[Entry]) -> str:
    return some_of([f"{entry.number} “{entry.label}”" for entry in entries], _NAMED)


def _amount(entry: Entry, metric: Metric, chosen_from: int = 1) -> str:
    value, span = entry.centre(metric) or 0.0, entry.configuration.interval_as_best(metric, chosen_from)
    unit = "J" if metric is ENERGY else "tok/s"
    estimate = ", an estimate from TDP" if metric is ENERGY and entry.is_estimate else ""
    interval = f" (95 % {_four_digits(span[0])} – {_four_digits(span[1])})" if span else ""
    return f"{_four_digits(value)} {unit}{interval}{estimate}, {plural(entry.configuration.n_cycles, 'cycle')}"


def _four_digits(value: float) -> str:
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else format_quantity(value)
