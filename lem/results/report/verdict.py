"""What the campaign answers, in a sentence, as far as its results can bear one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lem import units
from lem.results.aggregation import Metric
from lem.results.effect import Effect, paired_effect
from lem.results.report.content import Entry, Report
from lem.results.report.figures import plural
from lem.results.statistics import holm

__all__ = ["Verdict", "verdict_of"]

_LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        sentence: what can be said.
        remarks: how, and what could not be said and why.
    """

    sentence: str
    remarks: tuple[str, ...] = ()


def verdict_of(report: Report) -> Verdict:
    """The best configuration by the headline metric, and from which others it can be told."""
    metric = report.headline
    ranked = [entry for entry in report.entries if entry.centre(metric.name) is not None]
    if not report.entries:
        return Verdict("No results.")
    if not ranked:
        return Verdict("No configuration has a valid result, so there is nothing to compare.")
    first = ranked[0]
    if len(ranked) == 1:
        return Verdict(f"{_of(first)} {_figure(first, metric)}.", _no_rival(report))
    verb = (
        "uses the least energy per output token" if report.has_energy else "generates the most output tokens a second"
    )
    found = f"{_of(first)} {verb}: {_figure(first, metric)}."
    obstacle = _obstacle(first)
    if obstacle:
        return Verdict(f"{found} By its estimate alone: {obstacle}.", ())
    rivals = [(entry, _ratio(first, entry, metric)) for entry in ranked[1:]]
    told = [(entry, ratio) for entry, ratio in rivals if isinstance(ratio, Effect)]
    refused = [(entry, ratio) for entry, ratio in rivals if isinstance(ratio, str)]
    return _compared(found, ranked, told, refused, report)


def _compared(
    found: str,
    ranked: Sequence[Entry],
    told: Sequence[tuple[Entry, Effect]],
    refused: Sequence[tuple[Entry, str]],
    report: Report,
) -> Verdict:
    remarks: list[str] = []
    adjusted = holm([1.0 if ratio.p_value is None else ratio.p_value for _, ratio in told])
    close = [entry for (entry, _), p_value in zip(told, adjusted, strict=True) if p_value >= _LEVEL]
    sentence = found
    if told:
        entry, ratio = told[0]
        p_text = f"Holm-adjusted p {'< 0.001' if adjusted[0] < 0.001 else f'= {adjusted[0]:.3f}'}"
        sentence += f" That is {ratio.ratio:.3g} × {_of(entry)}{_within(ratio)}, {plural(ratio.n_cycles[0], 'cycle')}, {p_text}."
        apart = len(told) - len(close)
        remarks.append(
            f"Compared pair by pair within cycles, with Holm's correction over {plural(len(told), 'comparison')}: "
            f"told apart from {apart} of {len(ranked) - 1} other configurations."
        )
    if close:
        remarks.append(f"Not told apart from it: {_names(close)}. More cycles would tell.")
    by_reason: dict[str, list[Entry]] = {}
    for entry, reason in refused:
        by_reason.setdefault(reason, []).append(entry)
    remarks += [f"No verdict against {_names(members)}: {reason}." for reason, members in by_reason.items()]
    remarks += _no_rival(report)
    return Verdict(sentence, tuple(remarks))


def _no_rival(report: Report) -> tuple[str, ...]:
    lacking = [entry for entry in report.entries if entry.centre(report.headline.name) is None]
    return (f"No value of {_names(lacking)}.",) if lacking else ()


def _obstacle(entry: Entry) -> str:
    """Why this configuration can be compared with no other; empty when it can."""
    if entry.aggregate.is_load_shared:
        return "its cycles share an engine load, so they are no replicates"
    if entry.aggregate.n_cycles < 2:
        return "a single cycle says nothing of how much it varies; use 3 cycles or more"
    return ""


def _ratio(first: Entry, other: Entry, metric: Metric) -> Effect | str:
    """The ratio in the cycles that both have; or why there is no verdict."""
    obstacle = _obstacle(other)
    if obstacle:
        return obstacle
    if _excluded(first) != _excluded(other):
        return "unequal exclusions (invalid and failed results differ in number)"
    if metric.group == "energy":
        if first.aggregate.energy_sources != other.aggregate.energy_sources:
            return "their energy was measured by different means"
        if _cards(first) != _cards(other):
            return "they ran on different cards, whose sensors differ by up to ±5 % each"
    mine, theirs = _by_cycle(first, metric), _by_cycle(other, metric)
    common = sorted(set(mine) & set(theirs))
    if len(common) < 2:
        return "fewer than two cycles in common"
    return paired_effect([mine[cycle] for cycle in common], [theirs[cycle] for cycle in common])


def _by_cycle(entry: Entry, metric: Metric) -> Mapping[tuple[str, str, int], float]:
    values: dict[tuple[str, str, int], list[float]] = {}
    for record in entry.used:
        value, _ = metric.read(record)
        if value is not None and value > 0:
            identity = record.identity
            values.setdefault((identity.run_id, identity.host, identity.cycle_index), []).append(value)
    return {cycle: statistics.fmean(found) for cycle, found in values.items()}


def _excluded(entry: Entry) -> tuple[int, int]:
    return entry.aggregate.n_invalid, entry.aggregate.n_failed


def _cards(entry: Entry) -> frozenset[str]:
    return frozenset(uuid for record in entry.used for uuid in record.environment.gpu_uuids)


def _of(entry: Entry) -> str:
    return f"“{entry.name}”"


def _names(entries: Sequence[Entry]) -> str:
    shown = ", ".join(f"{entry.number} “{entry.label}”" for entry in entries[:6])
    return shown + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")


def _within(effect: Effect) -> str:
    interval = effect.interval()
    return f" (95 % {interval[0]:.3g} – {interval[1]:.3g})" if interval else ""


def _figure(entry: Entry, metric: Metric) -> str:
    value, span = entry.centre(metric.name), entry.span(metric.name)
    unit = "J per output token" if metric.group == "energy" else "output tok/s"
    estimate = ", an estimate from TDP" if metric.group == "energy" and entry.is_estimate else ""
    interval = f" (95 % {units.format_quantity(span[0])} – {units.format_quantity(span[1])})" if span else ""
    return f"{units.format_quantity(value)} {unit}{interval}{estimate}, {plural(entry.aggregate.n_cycles, 'cycle')}"
