"""The table of a run, and one result in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lem.base import units
from lem.base.doc import NAME_WIDTH, NAMES_SHOWN, Column, NameShortener, columns, paint, printable, wrapped
from lem.base.log import WIDTH, bounded_width
from lem.base.reasons import alike
from lem.base.units import ABSENT, SIGNIFICANT_DIGITS, plural, some_of, with_decimals
from lem.record import Distribution, Record
from lem.results.aggregation import SHARED_LOAD, AllAttempts, ConfigAggregate, MetricEstimate, estimate_note
from lem.results.metrics import LATENCIES
from lem.results.precision import UNACCOUNTED
from lem.results.run import SINGLE_CYCLE, CampaignSummary
from lem.results.stats import bootstrap_coverage_label

_LATENCIES = (("TTFT", "ttft_p50_s"), ("e2e", "e2e_p50_s"))
_INTERVALS = (("Output throughput", "output_tok_per_s"), ("Energy per output token", "energy_per_output_tok_j"))


def render_summary(summary: CampaignSummary, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The table as text that ends in a newline.

    Per configuration the output throughput and, where it was measured, the energy per output token: geometric mean
    with its t interval and beside it the bootstrap interval, each named with what it covers; then latency and how
    many results are valid; then everything that weakens the numbers.
    """
    return _Table(summary, is_colour, width).render()


class _Alike(NamedTuple):
    """A warning, or several that differ in their numbers, of which `text` is the first."""

    text: str
    is_varied: bool
    n_results: int
    members: Sequence[ConfigAggregate]


class _Table:
    def __init__(self, summary: CampaignSummary, is_colour: bool, width: int) -> None:
        self._summary = summary
        self._configurations = summary.configurations
        self._is_colour = is_colour
        self._width = bounded_width(width)
        self._shortener = NameShortener([item.config_name for item in summary.configurations], NAME_WIDTH)

    def render(self) -> str:
        if not self._configurations:
            return "No results.\n"
        blocks = (
            self._heading(),
            self._estimates("output_tok_per_s", "Output throughput, tok/s"),
            self._estimates(
                "energy_per_output_tok_j", f"Energy per output token, J\n{estimate_note(self._configurations)}".rstrip()
            ),
            self._outcomes(),
            self._notes(),
            self._warnings(),
            [SINGLE_CYCLE] if self._summary.is_single_cycle else [],
        )
        return "\n".join("\n".join(block) + "\n" for block in blocks if block)

    def _heading(self) -> list[str]:
        summary = self._summary
        runs = f"run {summary.run_ids[0]}" if len(summary.run_ids) == 1 else f"{len(summary.run_ids)} runs"
        cycles = {item.n_cycles for item in self._configurations}
        most = plural(max(cycles), "cycle") if max(cycles) else "no valid result"
        title = [
            summary.campaign_name,
            runs if summary.run_ids else "",
            plural(len(self._configurations), "configuration"),
            most if len(cycles) == 1 else f"up to {most}",
        ]
        lines = [self._paint(line, "bold") for line in wrapped(_listed(title), self._width)]
        shared = _listed([*summary.shared.values(), *(summary.hosts if len(summary.hosts) == 1 else ())])
        for text in (shared, self._shortener.explanation):
            lines += [self._paint(line, "dim") for line in wrapped(text, self._width)] if text else []
        return lines

    def _estimates(self, metric: str, heading: str) -> list[str]:
        """One metric of every configuration with both intervals; nothing when nobody measured it."""
        estimates = [item.metrics[metric] for item in self._configurations]
        if not any(estimate.values or estimate.all_attempts for estimate in estimates):
            return []
        percent = f"{100 * self._summary.confidence:g} %"
        decimals = _common_decimals(estimates)
        names: list[str] = []
        cells: list[tuple[str, ...]] = []
        for item, estimate in zip(self._configurations, estimates, strict=True):
            names.append(self._shortener(item.config_name))
            cells.append(_estimate_cells(estimate, decimals))
            if estimate.all_attempts is not None:
                names.append("· over all attempts")
                cells.append(_all_attempts_cells(estimate.all_attempts, decimals))
        headings = ("n", "geom.\nmean", f"{percent}\nt interval", "bootstrap\ninterval")
        table = [Column(text, tuple(row[index] for row in cells)) for index, text in enumerate(headings)]
        return self._headed(columns(heading, names, table, self._width), n_heads=2)

    def _outcomes(self) -> list[str]:
        """Latency, and how many results there are of which kind."""
        names = [self._shortener(item.config_name) for item in self._configurations]
        table = [
            Column(f"{label}\np50", tuple(_latency_cell(item.metrics[metric]) for item in self._configurations))
            for label, metric in _LATENCIES
            if any(item.metrics[metric].values for item in self._configurations)
        ]
        counts: tuple[tuple[str, Callable[[ConfigAggregate], int]], ...] = (
            ("valid", lambda item: item.n_results - item.n_invalid),
            ("invalid", lambda item: item.n_invalid),
            ("failed", lambda item: item.n_failed),
        )
        table += [Column(label, tuple(str(count(item)) for item in self._configurations)) for label, count in counts]
        has_latency = len(table) > len(counts)
        heading = "Latency, results" if has_latency else "Results"
        return self._headed(columns(heading, names, table, self._width), n_heads=1 + has_latency)

    def _notes(self) -> list[str]:
        """What the numbers are, and why some are missing."""
        notes = [*self._interval_notes()]
        if any(item.metrics[metric].values for item in self._configurations for _, metric in _LATENCIES):
            notes.append("Latency: median over the requests of a cycle, geometric mean over the cycles.")
        if any(item.is_by_board_sensors for item in self._configurations):
            notes.append("Energy: board sensors carry ±5 % per card; compare configurations on one card, not cards.")
        for label, metric in (*_LATENCIES, *_INTERVALS):
            notes += self._gaps(label, metric)
        lines = [line for note in notes for line in wrapped(note, self._width, "  ")]
        return [self._paint(line, "dim") for line in lines]

    def _interval_notes(self) -> Iterable[str]:
        percent = f"{100 * self._summary.confidence:g} %"
        shared = [item for item in self._configurations if item.is_load_shared]
        if shared:
            yield f"No interval{self._of(shared, 'for')}: {SHARED_LOAD}."
        sizes = sorted(
            {item.n_cycles for item in self._configurations if item.n_cycles > 1 and not item.is_load_shared}
        )
        if sizes:
            yield (
                f"t interval: Student t on the logs of n cycles, around their geometric mean; it covers {percent} "
                "at any n."
            )
            yield (
                f"Bootstrap interval: percentiles of the resampled arithmetic mean, {percent} in name; "
                f"{_coverage(sizes, self._summary.confidence)}."
            )
        if self._summary.stopping is not None:
            yield f"Cycles were added {self._summary.stopping.describe()}: {UNACCOUNTED}."

    def _gaps(self, label: str, metric: str) -> Iterable[str]:
        """Why numbers are missing, one line a reason; a configuration without a valid result has said so already."""
        measurable = [item for item in self._configurations if item.n_cycles]
        by_reason: dict[str, list[ConfigAggregate]] = {}
        for item in measurable:
            for reason in _gaps_of(item.metrics[metric]):
                by_reason.setdefault(reason, []).append(item)
        for reason, members in by_reason.items():
            of = "" if len(members) == len(measurable) else self._of(members, "for")
            yield f"{label}{of}: {reason.rstrip('.')}."

    def _warnings(self) -> list[str]:
        lines: list[str] = []
        for attribute, lead, style in (("invalid_reasons", "invalid: ", "red"), ("warnings", "warning: ", "yellow")):
            for found in self._alike(attribute):
                total = plural(sum(item.n_results for item in found.members), "result")
                where = f"{found.n_results} of {total}{self._of(found.members, 'of')}"
                text = f"{found.text} ({where}{'; numbers differ' if found.is_varied else ''})"
                lines += self._labelled(lead, text, style)
        empty = [item for item in self._configurations if not item.n_cycles]
        if empty:
            lines += self._labelled("no valid result: ", self._names(empty), "red")
        return lines

    def _labelled(self, lead: str, text: str, style: str) -> list[str]:
        first, *rest = wrapped(text, self._width, lead)
        label = lead.rstrip()
        return [self._paint(label, style) + first[len(label) :], *rest]

    def _alike(self, attribute: str) -> Iterable[_Alike]:
        """Reasons of one kind, each kind once."""
        found = (
            (reason, (item, count))
            for item in self._configurations
            for reason, count in getattr(item, attribute).items()
        )
        for entries in alike(found):
            yield _Alike(
                text=entries[0][0].text,
                is_varied=len({reason for reason, _ in entries}) > 1,
                n_results=sum(count for _, (_, count) in entries),
                members=list({item.config_name: item for _, (item, _) in entries}.values()),
            )

    def _of(self, members: Sequence[ConfigAggregate], preposition: str) -> str:
        """Which configurations something is said about; empty when it is all."""
        if len(members) == len(self._configurations):
            return ""
        return f" {preposition} {self._names(members)}"

    def _names(self, members: Sequence[ConfigAggregate]) -> str:
        return some_of([self._shortener(item.config_name) for item in members], NAMES_SHOWN, "; ")

    def _headed(self, lines: list[str], n_heads: int) -> list[str]:
        return [self._paint(line, "bold") for line in lines[:n_heads]] + lines[n_heads:]

    def _paint(self, text: str, style: str) -> str:
        return paint(text, style, is_colour=self._is_colour)


def _gaps_of(estimate: MetricEstimate) -> Iterable[str]:
    if estimate.null_reason is not None:
        yield f"not measured: {estimate.null_reason}"
    if estimate.warning is not None:
        yield estimate.warning
    if estimate.t_log is not None and estimate.t_log.geometric_mean is None and estimate.t_log.warning is not None:
        yield estimate.t_log.warning


def _estimate_cells(estimate: MetricEstimate, decimals: int | None) -> tuple[str, ...]:
    bootstrap, t_log = estimate.bootstrap, estimate.t_log
    if bootstrap is None or t_log is None:
        return ("0", ABSENT, ABSENT, ABSENT)
    return (
        str(len(estimate.values)),
        _number(t_log.geometric_mean, decimals),
        _interval(t_log.ci_lower, t_log.ci_upper, decimals),
        _interval(bootstrap.ci_lower, bootstrap.ci_upper, decimals),
    )


def _all_attempts_cells(estimate: AllAttempts, decimals: int | None) -> tuple[str, ...]:
    return (str(estimate.n_cycles), _number(estimate.geometric_mean, decimals), "", "")


def _latency_cell(estimate: MetricEstimate) -> str:
    """The geometric mean over the cycles of their medians."""
    return units.format_latency(estimate.t_log.geometric_mean if estimate.t_log else None)


def _common_decimals(estimates: Sequence[MetricEstimate]) -> int | None:
    """How many decimals all numbers of a table get; None when they differ so much that each needs its own.

    Enough for four significant digits of the smallest, and more where an interval would else look like a point.
    """
    values = [value for estimate in estimates for value in estimate.values if value > 0]
    if not values or max(values) > 30 * min(values):
        return None
    decimals = max(0, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(min(values))))
    intervals = [
        (item.ci_lower, item.ci_upper)
        for estimate in estimates
        for item in (estimate.t_log, estimate.bootstrap)
        if item
    ]
    for _ in range(3):
        if any(
            low is not None and high is not None and low < high and _number(low, decimals) == _number(high, decimals)
            for low, high in intervals
        ):
            decimals += 1
    return decimals


def _number(value: float | None, decimals: int | None) -> str:
    if value is None:
        return ABSENT
    return with_decimals(value, decimals)


def _interval(lower: float | None, upper: float | None, decimals: int | None) -> str:
    if lower is None or upper is None:
        return ABSENT
    return f"{_number(lower, decimals)} – {_number(upper, decimals)}"


def _coverage(sizes: Sequence[int], confidence: float) -> str:
    labels = {size: bootstrap_coverage_label(size, confidence) for size in sizes}
    if None in labels.values():
        return "it truly covers less"
    said = ", ".join(f"{label} with {plural(size, 'cycle')}" for size, label in labels.items())
    return f"it truly covers {said}"


def _listed(parts: Iterable[str]) -> str:
    return " · ".join(printable(part) for part in parts if part)


_LABEL_WIDTH = 12
_PERCENTILES = ("mean", "p50", "p90", "p95", "p99")


def render_record(record: Record, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The result as text that ends in a newline; the whole of it is in its JSON."""
    identity = record.identity
    title = f"{identity.config_name} · cycle {identity.cycle_index + 1} · attempt {identity.attempt}"
    where = f"{identity.campaign_name} · run {identity.run_id} · {identity.host} · {identity.start_utc}"
    lines = [paint(line, "bold", is_colour=is_colour) for line in wrapped(title, width)]
    lines += [paint(line, "dim", is_colour=is_colour) for line in wrapped(where, width)]
    lines.append("")
    for label, text in _facts(record):
        lines += wrapped(text, width, label.ljust(_LABEL_WIDTH))
    lines += ["", *_latency_lines(record, width)]
    lines += [""] if record.validity.warnings else []
    for reason in record.validity.warnings:
        first, *rest = wrapped(reason.text, width, "warning: ")
        lines += [paint("warning:", "yellow", is_colour=is_colour) + first[len("warning:") :], *rest]
    return "\n".join(lines) + "\n"


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    validity, window, work, environment = record.validity, record.window, record.work, record.environment
    yield "valid", "yes" if validity.valid else "no: " + "; ".join(map(str, validity.invalid_reasons))
    yield "model", f"{record.identity.model} on {record.identity.backend}"
    yield "engine", f"{environment.engine_name} {environment.engine_version} on {environment.device}"
    yield "load", _load(record)
    yield "warm-up", _warmup(record)
    repeats = {0: "not every prompt once", 1: "all prompts once"}.get(
        window.window_repeats, f"all prompts {window.window_repeats} times"
    )
    mode, steady = window.traffic_mode.replace("_", " "), ", not steady" if validity.steady is False else ""
    yield "window", f"{units.format_duration(window.window_s)}, {mode}, {repeats}{steady}"
    requests = f"{work.requests_ok} requests, {work.requests_failed} failed"
    yield "work", f"{requests}; {work.input_tok} tokens in, {work.output_tok} out ({work.token_source})"
    yield "throughput", _throughput(record)
    yield "energy", _energy(record)
    yield (
        "memory",
        _or_reason(record.compute.peak_memory_b, units.format_bytes, record.compute.null_reasons.get("peak_memory_b")),
    )


def _load(record: Record) -> str:
    validity, window = record.validity, record.window
    if validity.engine_reused:
        return f"none, engine reused: {validity.engine_load_id}"
    took = _or_reason(window.load_s, units.format_duration, window.null_reasons.get("load_s"))
    compiled = "" if window.compile_s is None else f", compiled in {units.format_duration(window.compile_s)}"
    return f"{took}{compiled}, fresh engine: {validity.engine_load_id}"


def _warmup(record: Record) -> str:
    window = record.window
    took = _or_reason(window.warmup_s, units.format_duration, window.null_reasons.get("warmup_s"))
    converged = {True: ", converged", False: ", not converged", None: ""}[record.validity.warmup_converged]
    return f"{took}, {window.warmup_prompts} prompts{converged}"


def _throughput(record: Record) -> str:
    throughput = record.throughput
    output = _or_reason(throughput.output_tok_per_s, units.format_rate, throughput.null_reasons.get("output_tok_per_s"))
    if throughput.total_tok_per_s is None or throughput.requests_per_s is None:
        return f"output {output}"
    total, requests = (
        units.format_rate(throughput.total_tok_per_s),
        units.format_quantity(throughput.requests_per_s, "requests/s"),
    )
    return f"output {output}, with input {total}, {requests}"


def _energy(record: Record) -> str:
    energy_j, per_tok = record.energy.primary_j, record.efficiency.energy_per_output_tok_j
    if energy_j.value is None:
        return _or_reason(None, units.format_energy, energy_j.null_reason)
    parts = [units.format_energy(energy_j.value) + (" (an estimate)" if energy_j.is_estimate else "")]
    parts += [f"{per_tok:.4g} J per output token"] if per_tok is not None else []
    return ", ".join([*parts, f"by {energy_j.source}"])


def _latency_lines(record: Record, width: int) -> list[str]:
    latency = record.latency
    kinds = {name: getattr(latency, f"{name}_s") for name in LATENCIES}
    seen: dict[str, Distribution] = {name: value for name, value in kinds.items() if value is not None}
    lines: list[str] = []
    if seen:
        table = [
            Column(name, tuple(units.format_latency(getattr(value, name)) for value in seen.values()))
            for name in _PERCENTILES
        ]
        table.append(Column("n", tuple(str(value.n) for value in seen.values())))
        lines = columns("latency", list(seen), table, width)
    by_reason: dict[str, list[str]] = {}
    for name, value in kinds.items():
        if value is None:
            by_reason.setdefault(latency.null_reasons.get(f"{name}_s", ""), []).append(name)
    for reason, names in by_reason.items():
        lines += wrapped(f"{', '.join(names)}: not measured: {reason}", width)
    return lines


def _or_reason(value: float | None, form: Callable[[float], str], reason: str | None) -> str:
    return form(value) if value is not None else f"not measured: {reason}"
