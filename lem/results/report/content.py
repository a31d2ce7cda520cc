"""What the report shows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lem.base import units
from lem.base.doc import SEPARATORS, name_tokens, printable, text_width
from lem.record import Gpu, Record
from lem.results.aggregation import Configuration, estimate_note
from lem.results.check import Finding, check_run
from lem.results.metrics import METRIC_BY_NAME, Metric
from lem.results.report.markup import Cell, Markup, absent, count_cell, details, scroller, table
from lem.results.report.plot import GROUPS_MAX, Trace
from lem.results.run import Run
from lem.results.store import Problem

_LABEL_WIDTH = 32
# Names stand in every table: with many configurations they are most of the page.
_MANY, _LABEL_WIDTH_OF_MANY = 300, 20
# As in `layout`: names are cut after these.

# What a requested configuration holds beside what can change its numbers.
_NO_SETTINGS = frozenset({"config_name", "extra_metadata", "io"})
# What configurations are grouped by, in colour and shape, when there are too many for one each.
_GROUPINGS = ("backend", "model.name", "fp_precision")


@dataclass(frozen=True)
class FailedSettings:
    """The settings of a configuration of which there is no result at all."""

    name: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class TraceNote:
    """An experiment whose power over time is not shown, and why."""

    path: str
    message: str


@dataclass(frozen=True)
class Entry:
    """A configuration on the page.

    Attributes:
        number: from 1, in the order of merit.
        label: its name without what all names share, short enough for a plot.
        aggregate: both intervals of every metric.
        records: all its results.
        used: those that the estimates stand on.
        settings: of its requested configuration, by dotted name.
        group: which colour and shape.
    """

    number: int
    name: str
    label: str
    aggregate: Configuration
    records: tuple[Record, ...]
    used: tuple[Record, ...]
    settings: Mapping[str, str]
    group: int

    @property
    def is_estimate(self) -> bool:
        """Whether its energy was not measured but worked out from the design power of the CPU."""
        return self.aggregate.is_estimate

    @property
    def has_energy(self) -> bool:
        """Whether a valid result has energy per output token."""
        return bool(self.aggregate.estimate("energy_per_output_tok_j").values)

    def centre(self, metric: str) -> float | None:
        """The geometric mean over the cycles."""
        return self.aggregate.estimate(metric).value

    def span(self, metric: str) -> tuple[float, float] | None:
        """The t interval; None where there is none."""
        estimate = self.aggregate.estimate(metric)
        return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


@dataclass(frozen=True)
class Report:
    """Everything that is on the page.

    Attributes:
        findings: what `lem check` says of the results.
        headline: the metric that the verdict is about: energy per output token, or throughput where nobody measured
            energy.
        entries: best first; those without a value last.
        groups: what each colour and shape stands for; () where there is but one.
        grouped_by: in words.
        traces, trace_notes: power over time of some experiments, and which others could not be read.
        n_logs: how many experiments have a sample log.
    """

    run: Run
    findings: tuple[Finding, ...]
    headline: Metric
    entries: tuple[Entry, ...]
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    failed_settings: tuple[FailedSettings, ...]
    groups: tuple[str, ...]
    grouped_by: str
    traces: tuple[tuple[Record, Trace], ...] = ()
    trace_notes: tuple[TraceNote, ...] = ()
    n_logs: int = 0

    @property
    def has_energy(self) -> bool:
        """Whether the page is about energy."""
        return self.headline.group == "energy"

    @property
    def estimate_note(self) -> str:
        """What to put beside every axis of energy where some of it is an estimate; else empty."""
        note = estimate_note(entry.aggregate for entry in self.entries if entry.has_energy)
        return f" {note}" if note else ""


def compose(run: Run, failed_settings: Sequence[FailedSettings] = ()) -> Report:
    """The content of the page.

    Args:
        failed_settings: of configurations that appear in no record.
    """
    headline = _headline(run)
    by_name = {item.name: item.records for item in run.configurations}
    known = {item.name: item.settings for item in failed_settings}
    settings = {name: flat_settings(found[0].requested) if found else known.get(name, {})
                for name, found in by_name.items()}  # fmt: skip
    grouped_by, group_of, groups = _grouping(list(by_name), settings)
    labels = _labels(list(by_name))
    entries = tuple(
        Entry(
            number=number,
            name=printable(item.name),
            label=labels[item.name],
            aggregate=item,
            records=item.records,
            used=item.used,
            settings=settings[item.name],
            group=group_of[item.name],
        )
        for number, item in enumerate(_by_merit(run.configurations, headline), 1)
    )
    return Report(
        run=run,
        findings=check_run(run).findings,
        headline=headline,
        entries=_with_groups_of_merit(entries) if grouped_by == "configuration" else entries,
        records=tuple(sorted(run.records, key=_moment)),
        problems=run.problems,
        failed_settings=tuple(failed_settings),
        groups=tuple(entry.label for entry in entries) if grouped_by == "configuration" else groups,
        grouped_by=grouped_by,
    )


def flat_settings(requested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A requested configuration by dotted names, each value as text; names and metadata left out."""
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


def _headline(run: Run) -> Metric:
    energy = "energy_per_output_tok_j"
    estimates = [item.estimate(energy) for item in run.configurations]
    is_measured = any(estimate.values or estimate.all_attempts for estimate in estimates)
    return METRIC_BY_NAME[energy if is_measured else "output_tok_per_s"]


def _by_merit(configurations: Iterable[Configuration], metric: Metric) -> list[Configuration]:
    sign = 1 if metric.group == "energy" else -1

    def merit(item: Configuration) -> tuple[bool, float]:
        value = item.estimate(metric).value
        return value is None, 0.0 if value is None else sign * value

    return sorted(configurations, key=merit)


def _grouping(
    names: Sequence[str], settings: Mapping[str, Mapping[str, str]]
) -> tuple[str, Mapping[str, int], tuple[str, ...]]:
    """What the colours mean: each configuration, or a setting that has few values; else all look the same."""
    if len(names) <= GROUPS_MAX:
        return "configuration", {name: index for index, name in enumerate(names)}, tuple(names)
    for key in (*_GROUPINGS, *sorted({key for item in settings.values() for key in item})):
        values = tuple(dict.fromkeys(settings[name].get(key, "not given") for name in names))
        if 2 <= len(values) <= GROUPS_MAX:
            return key, {name: values.index(settings[name].get(key, "not given")) for name in names}, values
    return "", dict.fromkeys(names, 0), ()


def _with_groups_of_merit(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(replace(entry, group=index) for index, entry in enumerate(entries))


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Names short enough for a plot: what all of them share goes first, then the keys of `key=value`."""
    width = _LABEL_WIDTH if len(names) <= _MANY else _LABEL_WIDTH_OF_MANY
    tokens = {name: name_tokens(name) for name in names}
    common = set.intersection(*map(set, tokens.values())) if len(names) > 1 else set()
    labels = {}
    for name in names:
        whole = [*tokens[name]]
        own = [token for token in whole if token not in common] or whole
        values = [token.partition("=")[2] or token for token in own]
        forms = ("".join(form).rstrip(f"{SEPARATORS} ") for form in (whole, own, values))
        labels[name] = next((form for form in forms if text_width(form) <= width), _cut("".join(values), width))
    return labels


def _cut(name: str, width: int) -> str:
    """The name, its middle left out."""
    keep = width // 2 - 1
    return f"{name[:keep]}…{name[-keep:]}"


def _moment(record: Record) -> tuple[str, str, int, int, int]:
    identity = record.identity
    return (identity.run_id, identity.host, identity.order_index, identity.cycle_index, identity.attempt)


_LABEL = "More figures of every configuration"


@dataclass(frozen=True)
class _Figure:
    """A column: its heading, its value, the reason where it is absent, and whether it is energy or follows from it."""

    heading: str
    read: Callable[[Record], float | None]
    why: Callable[[Record], str | None] = lambda _: None
    is_energy: bool = False


def _net_per_token(record: Record) -> float | None:
    net, tokens = record.energy.gpu_energy_net_j, record.work.output_tok
    return None if net is None or not tokens else net / tokens


def _of_gpus(
    read: Callable[[Gpu], float | None], fold: Callable[[list[float]], float]
) -> Callable[[Record], float | None]:
    """One value of all GPUs, where each of them has one."""

    def of(record: Record) -> float | None:
        values = [value for gpu in record.gpus if (value := read(gpu)) is not None]
        return fold(values) if values and len(values) == len(record.gpus) else None

    return of


_FIGURES = (
    _Figure(
        "Net energy per output token, J",
        _net_per_token,
        lambda record: record.energy.null_reasons.get("gpu_energy_net_j"),
        is_energy=True,
    ),
    _Figure(
        "Energy per request, J",
        lambda record: record.efficiency.energy_per_request_j,
        lambda record: record.efficiency.null_reasons.get("energy_per_request_j"),
        is_energy=True,
    ),
    _Figure("Prefill, J", lambda record: record.energy.prefill_energy_j, is_energy=True),
    _Figure("Decode, J", lambda record: record.energy.decode_energy_j, is_energy=True),
    _Figure("CPU packages, J", lambda record: record.energy.cpu_package_energy_j, is_energy=True),
    _Figure("GPU power, mean, W", _of_gpus(lambda gpu: gpu.power_mean_w, math.fsum)),
    _Figure("GPU temperature, greatest, °C", _of_gpus(lambda gpu: gpu.temp_max_c, max)),
    _Figure(
        "Engine load, s",
        lambda record: record.window.load_s,
        lambda record: record.window.null_reasons.get("load_s"),
    ),
    _Figure("CO₂e, g", lambda record: record.carbon.co2e_g, is_energy=True),
    _Figure("Cost", lambda record: record.carbon.cost, is_energy=True),
)


def more_figures(report: Report) -> Markup:
    """A folded table of what any configuration has; nothing where none has any of it.

    The figures are geometric means over the cycles that measured them.
    """
    known = [
        figure
        for figure in _FIGURES
        if any(figure.read(item) is not None for entry in report.entries for item in entry.used)
    ]
    if not known:
        return Markup()
    head = ["No.", "Configuration", *(f"{item.heading}{_estimate(item, report)}" for item in known)]
    rows: list[list[Cell | str]] = [
        [count_cell(entry.number), entry.label, *(_cell(entry, item) for item in known)] for entry in report.entries
    ]
    return details(_LABEL, scroller(_LABEL, table(_LABEL, head, rows, row_head=1)))


def _estimate(figure: _Figure, report: Report) -> str:
    return report.estimate_note if figure.is_energy else ""


def _cell(entry: Entry, figure: _Figure) -> Cell:
    values = [value for record in entry.used if (value := figure.read(record)) is not None]
    if not values:
        return absent(next((reason for record in entry.used if (reason := figure.why(record))), None))
    is_positive = min(values) > 0
    mean = math.exp(statistics.fmean(map(math.log, values))) if is_positive else statistics.fmean(values)
    return Cell(units.format_quantity(mean), mean, is_number=True)
