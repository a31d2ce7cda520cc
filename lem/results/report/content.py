"""What the report says: configurations in order of merit, what is drawn of them, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base.doc import SEPARATORS, name_tokens, printable, text_width
from lem.base.reasons import Reason
from lem.base.units import format_quantity, plural, some_of
from lem.record import Record
from lem.results.aggregation import ConfigAggregate, estimate_note
from lem.results.check import check_run
from lem.results.check_results import Finding
from lem.results.compare import Row, RunResults, Subject, compare_configurations
from lem.results.metrics import METRIC_BY_NAME, Metric, by_cycle, distinct, used_cycles, used_records
from lem.results.precision import StoppingRule
from lem.results.report.plot import GROUPS_MAX
from lem.results.run import CampaignSummary, summarise
from lem.results.store import Problem, Scan, StoredResult, config_beside, configuration_of, configured_name

ENERGY, THROUGHPUT = "energy_per_output_tok_j", "output_tok_per_s"
NOT_GIVEN = "not given"

_LABEL_WIDTH = 32
# Names are in every table: with many configurations they are most of the page.
_MANY, _LABEL_WIDTH_OF_MANY = 300, 20
# Parts of a requested configuration that cannot change its numbers.
_NO_SETTINGS = frozenset({"config_name", "extra_metadata", "io"})
# What colour and shape mean, when there are too many configurations for one each.
_GROUPINGS = ("backend", "model.name", "fp_precision")
_TRACES_SHOWN, _FAULTY_FIRST = 12, 4
_NAMED = 3  # configurations that a sentence of the verdict names

POWER, TEMPERATURE = "power", "temperature"


@dataclass(frozen=True)
class Band:
    """A phase of the measurement, in seconds from the begin of the first."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Spell:
    """A time in which the GPU was slowed down."""

    begin_s: float
    end_s: float
    is_fault: bool  # by heat or a power brake, not by its power limit
    reason: str


@dataclass(frozen=True)
class Series:
    """A line over time."""

    label: str  # of the device
    quantity: str  # POWER in watts or TEMPERATURE in °C
    points: tuple[tuple[float, float] | None, ...]  # (seconds, value) in order; None where readings are missing


@dataclass(frozen=True)
class Phase:
    """A row of the table below the plot; what was not read in it is None."""

    name: str
    begin_s: float
    length_s: float
    power_mean_w: float | None
    power_max_w: float | None
    temp_min_c: float | None
    temp_max_c: float | None
    throttled_s: float | None


@dataclass(frozen=True)
class Trace:
    """One experiment over time."""

    bands: tuple[Band, ...]
    series: tuple[Series, ...]
    spells: tuple[Spell, ...]
    phases: tuple[Phase, ...]
    interval_s: float  # between two readings

    @property
    def slowed_s(self) -> tuple[tuple[float, float], ...]:
        """When a GPU was slowed down for any reason but its power limit: (begin, end), in the order of time."""
        return slowed_s(self.spells)


def slowed_s(spells: Iterable[Spell]) -> tuple[tuple[float, float], ...]:
    """When there was a fault, (begin, end): reasons that hold at the same time are not added up."""
    found: list[tuple[float, float]] = []
    for spell in sorted((item for item in spells if item.is_fault), key=lambda item: item.begin_s):
        if found and spell.begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], spell.end_s))
        else:
            found.append((spell.begin_s, spell.end_s))
    return tuple(found)


@dataclass(frozen=True)
class FailedSettings:
    """The settings of a configuration without any result."""

    name: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class TraceNote:
    """A sample log that could not be read, and why."""

    path: str
    message: str


@dataclass(frozen=True)
class Entry:
    """A configuration on the page."""

    number: int  # from 1, in the order of merit
    name: str
    label: str  # without what all names share, short enough for a plot
    aggregate: ConfigAggregate
    records: tuple[Record, ...]
    used: tuple[Record, ...]  # those that the estimates are made of
    settings: Mapping[str, str]  # as requested, by dotted name
    group: int  # colour and shape

    @property
    def is_estimate(self) -> bool:
        """Whether its energy was estimated from the design power of the CPU."""
        return self.aggregate.is_estimate

    def centre(self, metric: str) -> float | None:
        """The geometric mean over the cycles."""
        interval = self.aggregate.metrics[metric].t_log
        return interval.geometric_mean if interval else None

    def span(self, metric: str) -> tuple[float, float] | None:
        """The t interval."""
        interval = self.aggregate.metrics[metric].t_log
        if interval is None or interval.ci_lower is None or interval.ci_upper is None:
            return None
        return interval.ci_lower, interval.ci_upper


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    summary: CampaignSummary
    findings: tuple[Finding, ...]  # of `lem check`
    headline: Metric  # of the verdict: energy per output token, or throughput where no energy was measured
    entries: tuple[Entry, ...]  # best first, those without a value last
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    failed_settings: tuple[FailedSettings, ...]
    groups: tuple[str, ...]  # the meaning of each colour and shape; () where all look the same
    grouped_by: str
    traces: tuple[tuple[Record, Trace], ...] = ()
    trace_notes: tuple[TraceNote, ...] = ()
    n_logs: int = 0  # experiments with a sample log

    @property
    def has_energy(self) -> bool:
        """Whether the page is about energy."""
        return self.headline.group == "energy"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the page."""
        return tuple(METRIC_BY_NAME[name] for name in ((ENERGY, THROUGHPUT) if self.has_energy else (THROUGHPUT,)))

    @property
    def estimate_note(self) -> str:
        """What follows every label of energy where some of it is an estimate; else empty."""
        note = estimate_note(entry.aggregate for entry in self.entries if entry.aggregate.metrics[ENERGY].values)
        return f" {note}" if note else ""


def compose(
    records: Sequence[Record],
    *,
    problems: Sequence[Problem] = (),
    failed: Mapping[str, int] | None = None,
    failed_settings: Sequence[FailedSettings] = (),
    stopping: StoppingRule | None = None,
    campaign_name: str = "",
    run_id: str = "",
) -> Report:
    """The content of the page from all whole results of one campaign, valid or not.

    `failed` counts the experiments without a result by configuration; `campaign_name` and `run_id` name a campaign
    without results.
    """
    check = check_run(records, failed=failed, problems=problems, stopping=stopping)
    summary = summarise(records, failed=failed, campaign_name=campaign_name, run_id=run_id, stopping=stopping)
    estimates = [item.metrics[ENERGY] for item in summary.configurations]
    is_measured = any(estimate.values or estimate.all_attempts for estimate in estimates)
    headline = METRIC_BY_NAME[ENERGY if is_measured else THROUGHPUT]
    ordered = sorted(records, key=_moment)
    by_name: dict[str, list[Record]] = {item.config_name: [] for item in summary.configurations}
    for record in ordered:
        by_name[record.identity.config_name].append(record)
    known = {item.name: item.settings for item in failed_settings}
    settings = {
        name: flat_settings(found[0].requested) if found else known.get(name, {}) for name, found in by_name.items()
    }
    ranked = sorted(summary.configurations, key=lambda item: _merit(item, headline))
    grouped_by, group_of, groups = _grouping([item.config_name for item in ranked], list(by_name), settings)
    labels = _labels(list(by_name))
    entries = tuple(
        Entry(
            number=number,
            name=printable(item.config_name),
            label=labels[item.config_name],
            aggregate=item,
            records=tuple(by_name[item.config_name]),
            used=used_records(by_name[item.config_name]),
            settings=settings[item.config_name],
            group=group_of[item.config_name],
        )
        for number, item in enumerate(ranked, 1)
    )
    return Report(
        summary=summary,
        findings=check.findings,
        headline=headline,
        entries=entries,
        records=tuple(ordered),
        problems=tuple(problems),
        failed_settings=tuple(failed_settings),
        groups=tuple(entry.label for entry in entries) if grouped_by == "configuration" else groups,
        grouped_by=grouped_by,
    )


def flat_settings(requested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A requested configuration by dotted name, each value as text, without names and metadata."""
    found: dict[str, str] = {}
    for key, value in requested.items():
        if not prefix and key in _NO_SETTINGS:
            continue
        if isinstance(value, Mapping) and value:
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found[f"{prefix}{key}"] = printable(shown)
    return found


def _moment(record: Record) -> tuple[str, str, int, int, int]:
    identity = record.identity
    return (identity.run_id, identity.host, identity.order_index, identity.cycle_index, identity.attempt)


def _merit(item: ConfigAggregate, metric: Metric) -> tuple[bool, float]:
    interval = item.metrics[metric.name].t_log
    value = interval.geometric_mean if interval else None
    return value is None, (1 if metric.group == "energy" else -1) * (value or 0.0)


def _grouping(
    ranked: Sequence[str], names: Sequence[str], settings: Mapping[str, Mapping[str, str]]
) -> tuple[str, Mapping[str, int], tuple[str, ...]]:
    """What the colours mean: each configuration, or a setting that has few values; else all look the same."""
    if len(names) <= GROUPS_MAX:
        return "configuration", {name: index for index, name in enumerate(ranked)}, ()
    for key in (*_GROUPINGS, *sorted({key for item in settings.values() for key in item})):
        values = tuple(dict.fromkeys(settings[name].get(key, NOT_GIVEN) for name in names))
        if 2 <= len(values) <= GROUPS_MAX:
            return key, {name: values.index(settings[name].get(key, NOT_GIVEN)) for name in names}, values
    return "", dict.fromkeys(names, 0), ()


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Names short enough for a plot: the parts that all share go first, then the keys of `key=value`."""
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


def failed_settings(scan: Scan) -> tuple[FailedSettings, ...]:
    """The settings of configurations without any whole result, from the `config.json` beside what is missing."""
    known = {configuration_of(item.record.identity.experiment_id) for item in scan.results}
    found: dict[str, FailedSettings] = {}
    for problem in scan.problems:
        key = configuration_of(problem.exp_id)
        if not problem.exp_id or key in known or key in found:
            continue
        config = config_beside(problem)
        requested = config.get("requested")
        if isinstance(requested, dict):
            found[key] = FailedSettings(configured_name(config) or key, flat_settings(requested))
    return tuple(found.values())


def select_traced(entries: Sequence[Entry], results: Sequence[StoredResult]) -> tuple[StoredResult, ...]:
    """The results whose power over time is drawn: all where they are few.

    Else some that were invalid or throttled, then one of each configuration in the order of merit.
    """
    if len(results) <= _TRACES_SHOWN:
        return tuple(results)
    faulty = (item for item in results if not item.record.validity.valid or any(g.was_slowed for g in item.record.gpus))
    chosen = list(faulty)[:_FAULTY_FIRST]
    by_key = {item.record.identity.key: item for item in results}
    for entry in entries:
        own = (by_key[record.identity.key] for record in entry.used if record.identity.key in by_key)
        first = next(own, None)
        if len(chosen) < _TRACES_SHOWN and first is not None and first not in chosen:
            chosen.append(first)
    return tuple(chosen)


@dataclass(frozen=True)
class Verdict:
    """The answer of the page."""

    sentence: str
    remarks: tuple[str, ...] = ()  # how it was found, and what could not be decided and why
    has_winner: bool = False  # the first configuration was told apart from the next


def verdict_of(report: Report) -> Verdict:
    """The best configuration by the headline metric, and how it compares with the others (as `lem compare` would)."""
    metric = report.headline
    if not report.entries:
        return Verdict("No results.")
    ranked = [entry for entry in report.entries if entry.centre(metric.name) is not None]
    if not ranked:
        return Verdict("No configuration has a valid result, so there is nothing to compare.")
    first, *others = ranked
    missing = [entry for entry in report.entries if entry.centre(metric.name) is None]
    remarks = [f"No value of {_names(missing)}."] if missing else []
    if not others:
        return Verdict(f"“{first.name}”: {_amount(first, metric)}.", tuple(remarks))
    rows = list(zip(others, _rows(first, others, metric), strict=True))
    compared = [(entry, row) for entry, row in rows if row.p_adjusted is not None and row.effect is not None]
    refused = [(entry, row.reason) for entry, row in rows if row.p_adjusted is None and row.reason is not None]
    remarks = [*_separated(compared, len(others)), *_refusals(refused), *remarks]
    ratio = _against(*compared[0]) if compared else ""
    verb = "uses the least energy per output token" if report.has_energy else "makes the most output tokens per second"
    found = f"“{first.name}” {verb}: {_amount(first, metric)}."
    if compared and compared[0][0] is others[0]:
        return Verdict(f"{found} {ratio}", tuple(remarks), has_winner=compared[0][1].is_found)
    sentence = f"{found} That is its estimate alone: no verdict on the next best."
    return Verdict(sentence, (ratio, *remarks) if ratio else tuple(remarks))


def _rows(first: Entry, others: Sequence[Entry], metric: Metric) -> list[Row]:
    """The comparison of each of the others with the first, in their order."""
    best, *subjects = map(_subject, (first, *others))
    run = RunResults("", best.run_id, (best, *subjects))
    return [pair.rows[0] for pair in compare_configurations(run, best, subjects, metrics=(metric,)).pairs]


def _subject(entry: Entry) -> Subject:
    identity = entry.used[0].identity
    cycles = used_cycles(by_cycle(distinct(entry.records)))
    return Subject(entry.label, identity.config_hash, identity.run_id, cycles, entry.aggregate, entry.settings)


def _against(entry: Entry, row: Row) -> str:
    """How much another differs, with the ratio the way round in which the best comes first."""
    effect, p = row.effect, row.p_adjusted
    if effect is None or p is None:
        return ""
    relation = row.metric.relation.format(f"{1 / effect.ratio:#.3g} ×")
    interval = effect.interval()
    within = f" (95 % {1 / interval[1]:#.3g} – {1 / interval[0]:#.3g})" if interval else ""
    chance = "" if row.is_found else ", which chance alone could make"
    p_text = "< 0.001" if p < 0.001 else f"= {p:.3f}"
    cycles = plural(effect.n_cycles[0], "cycle")
    return f"It {relation} “{entry.name}”{within}, {cycles}, Holm-adjusted p {p_text}{chance}."


def _separated(compared: Sequence[tuple[Entry, Row]], n_others: int) -> list[str]:
    if not compared:
        return []
    close = [entry for entry, row in compared if not row.is_found]
    found = f"Told apart from {len(compared) - len(close)} of {plural(n_others, 'other configuration')}"
    lines = [f"{found}: pair by pair within cycles, Holm's correction over {plural(len(compared), 'comparison')}."]
    return [*lines, f"Not told apart from {_names(close)}; more cycles would tell."] if close else lines


def _refusals(refused: Sequence[tuple[Entry, Reason]]) -> Iterable[str]:
    """Why there is no verdict, each code once."""
    by_code: dict[str, list[tuple[Entry, Reason]]] = {}
    for entry, reason in refused:
        by_code.setdefault(reason.code, []).append((entry, reason))
    for members in by_code.values():
        entries, (first, reason) = [entry for entry, _ in members], members[0]
        if len(members) == 1:
            yield f"No verdict against {_names(entries)}: {reason}."
        else:
            shown = ", ".join(str(entry.number) for entry in entries[:12]) + (" …" if len(entries) > 12 else "")
            yield f"No verdict against {len(entries)} others ({shown}); against {first.number}, {reason}."


def _names(entries: Sequence[Entry]) -> str:
    return some_of([f"{entry.number} “{entry.label}”" for entry in entries], _NAMED)


def _amount(entry: Entry, metric: Metric) -> str:
    value, span = entry.centre(metric.name) or 0.0, entry.span(metric.name)
    unit = "J" if metric.group == "energy" else "tok/s"
    estimate = ", an estimate from TDP" if metric.group == "energy" and entry.is_estimate else ""
    interval = f" (95 % {_four_digits(span[0])} – {_four_digits(span[1])})" if span else ""
    return f"{_four_digits(value)} {unit}{interval}{estimate}, {plural(entry.aggregate.n_cycles, 'cycle')}"


def _four_digits(value: float) -> str:
    """The value with four significant digits, zeros at its end included."""
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else format_quantity(value)
