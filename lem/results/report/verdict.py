"""What the campaign answers, in a sentence, as far as its results can bear one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lem.reasons import Reason
from lem.results.compare import Row, RunResults, Subject, compare_configurations
from lem.results.cycles import by_cycle, distinct, used_cycles
from lem.results.effect import Effect
from lem.results.metrics import Metric
from lem.results.report.content import Entry, Report
from lem.results.report.figures import four_digits
from lem.units import plural, some_of

__all__ = ["Verdict", "verdict_of"]

_NAMED = 3


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        sentence: what can be said.
        remarks: how, and what could not be said and why.
        has_winner: the first configuration was told apart from the next.
    """

    sentence: str
    remarks: tuple[str, ...] = ()
    has_winner: bool = False


def verdict_of(report: Report) -> Verdict:
    """The best configuration by the headline metric, and from which others it can be told: as `lem compare` would."""
    metric = report.headline
    ranked = [entry for entry in report.entries if entry.centre(metric.name) is not None]
    if not report.entries:
        return Verdict("No results.")
    if not ranked:
        return Verdict("No configuration has a valid result, so there is nothing to compare.")
    first, others = ranked[0], ranked[1:]
    if not others:
        return Verdict(f"{_of(first)}: {_figure(first, metric)}.", _lacking(report))
    verb = "uses the least energy per output token" if report.has_energy else "makes the most output tokens per second"
    found = f"{_of(first)} {verb}: {_figure(first, metric)}."
    rows = [(entry, row) for entry, row in zip(others, _rows(first, others, metric), strict=True)]
    told = [(entry, row) for entry, row in rows if row.p_adjusted is not None and row.effect is not None]
    refused = [(entry, row.reason) for entry, row in rows if row.p_adjusted is None]
    is_next_told = bool(told) and told[0][0].number == others[0].number
    compared = [_against(*told[0])] if told else []
    if is_next_told:
        remarks = []
        sentence = " ".join([found, *compared])
    else:
        remarks = compared
        sentence = f"{found} That is its estimate alone: no verdict on the next best."
    remarks += [*_told(told, len(others)), *_refused(refused), *_lacking(report)]
    return Verdict(sentence, tuple(remarks), has_winner=is_next_told and told[0][1].is_found)


def _rows(first: Entry, others: Sequence[Entry], metric: Metric) -> list[Row]:
    """The comparison of each of the others with the first, in their order."""
    subjects = [_subject(entry) for entry in others]
    best = _subject(first)
    run = RunResults("", best.run_id, (best, *subjects))
    return [pair.rows[0] for pair in compare_configurations(run, best, subjects, metrics=(metric,)).pairs]


def _subject(entry: Entry) -> Subject:
    identity = entry.used[0].identity
    return Subject(
        name=entry.label,
        config_hash=identity.config_hash,
        run_id=identity.run_id,
        cycles=used_cycles(by_cycle(distinct(entry.records))),
        aggregate=entry.aggregate,
        settings=entry.settings,
    )


def _against(entry: Entry, row: Row) -> str:
    """How much another differs, with the ratio the way round in which the best comes first."""
    effect = row.effect
    if effect is None or row.p_adjusted is None:
        return ""
    relation = row.metric.relation.format(f"{1 / effect.ratio:#.3g} ×")
    p_text = "< 0.001" if row.p_adjusted < 0.001 else f"= {row.p_adjusted:.3f}"
    is_told = "" if row.is_found else ", which chance alone could make"
    cycles = plural(effect.n_cycles[0], "cycle")
    return f"It {relation} {_of(entry)}{_within(effect)}, {cycles}, Holm-adjusted p {p_text}{is_told}."


def _told(told: Sequence[tuple[Entry, Row]], n_others: int) -> list[str]:
    if not told:
        return []
    close = [entry for entry, row in told if not row.is_found]
    found = f"Told apart from {len(told) - len(close)} of {plural(n_others, 'other configuration')}"
    lines = [f"{found}: pair by pair within cycles, Holm's correction over {plural(len(told), 'comparison')}."]
    if close:
        lines.append(f"Not told apart from {_names(close)}; more cycles would tell.")
    return lines


def _refused(refused: Sequence[tuple[Entry, Reason | None]]) -> list[str]:
    """Why there is no verdict, each code once."""
    by_code: dict[str, list[tuple[Entry, Reason]]] = {}
    for entry, reason in refused:
        if reason is not None:
            by_code.setdefault(reason.code, []).append((entry, reason))
    lines = []
    for members in by_code.values():
        entries, (entry, reason) = [item for item, _ in members], members[0]
        if len(members) == 1:
            lines.append(f"No verdict against {_names(entries)}: {reason}.")
        else:
            lines.append(f"No verdict against {_numbers(entries)}; against {entry.number}, {reason}.")
    return lines


def _lacking(report: Report) -> tuple[str, ...]:
    lacking = [entry for entry in report.entries if entry.centre(report.headline.name) is None]
    return (f"No value of {_names(lacking)}.",) if lacking else ()


def _of(entry: Entry) -> str:
    return f"“{entry.name}”"


def _names(entries: Sequence[Entry]) -> str:
    return some_of([f"{entry.number} “{entry.label}”" for entry in entries], _NAMED)


def _numbers(entries: Sequence[Entry]) -> str:
    """`3 others (2, 5, 6)`; a long list is cut."""
    shown = ", ".join(str(entry.number) for entry in entries[:12])
    return f"{len(entries)} others ({shown}{' …' if len(entries) > 12 else ''})"


def _within(effect: Effect) -> str:
    interval = effect.interval()
    return f" (95 % {1 / interval[1]:#.3g} – {1 / interval[0]:#.3g})" if interval else ""


def _figure(entry: Entry, metric: Metric) -> str:
    value, span = entry.centre(metric.name) or 0.0, entry.span(metric.name)
    unit = "J" if metric.group == "energy" else "tok/s"
    estimate = ", an estimate from TDP" if metric.group == "energy" and entry.is_estimate else ""
    interval = f" (95 % {four_digits(span[0])} – {four_digits(span[1])})" if span else ""
    return f"{four_digits(value)} {unit}{interval}{estimate}, {plural(entry.aggregate.n_cycles, 'cycle')}"
