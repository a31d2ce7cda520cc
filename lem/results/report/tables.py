"""Verdict and overview of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from lem.base.reasons import Reason, alike
from lem.base.units import plural, some_of
from lem.results.aggregation import Estimate
from lem.results.bootstrap import bootstrap_coverage_label
from lem.results.compare import Row, compare_configurations
from lem.results.metrics import Metric
from lem.results.report.content import Entry, Report, more_figures
from lem.results.report.markup import (
    Cell,
    Markup,
    breakable,
    count_cell,
    decimals_of,
    details,
    four_digits,
    interval_cells,
    join,
    latency_cell,
    scroller,
    table,
    tag,
)
from lem.results.run import UNACCOUNTED, Run
from lem.results.stats import Effect

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
    rows = [(entry, row) for entry, row in zip(others, _rows(report.run, first, others, metric), strict=True)]
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


def _rows(run: Run, first: Entry, others: Sequence[Entry], metric: Metric) -> list[Row]:
    """The comparison of each of the others with the first, in their order."""
    best, *rest = (replace(entry.aggregate, name=entry.label) for entry in (first, *others))
    return [pair.rows[0] for pair in compare_configurations(run, best, rest, metrics=(metric,)).pairs]


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


_SHOWN = 8
# A longer table scrolls in a box of its own, so that the plots stay in reach.
_TALL_FROM = 40
_PROBLEMS_SHOWN = 200
# Findings that the verdict, the invalid results at the top and the plots tell already.
_TOLD_ELSEWHERE = frozenset({"damaged", "indistinguishable", "unequal_exclusions", "invalid"})
_KINDS = {
    "missing": "without a result",
    "half-written": "half-written",
    "corrupt": "corrupt",
    "foreign": "foreign",
    "unreadable": "unreadable",
}


def validity_section(report: Report) -> Markup:
    """How many results can be used, and everything that weakens them."""
    items = [*_findings(report)]
    shown = [tag("ul", *items[:_SHOWN], class_="findings")] if items else []
    if len(items) > _SHOWN:
        rest = tag("ul", *items[_SHOWN:], class_="findings")
        shown.append(details(f"{len(items) - _SHOWN} more", rest))
    if not items:
        shown.append(tag("p", "Nothing weakens these numbers that lem looks for."))
    return join([_tiles(report), *shown, _problems(report)])


def results_section(report: Report) -> Markup:
    """The answer in a sentence, how far it goes, and the table it stands on."""
    verdict = verdict_of(report)
    return join([_answer(verdict), _overview(report, has_winner=verdict.has_winner)])


def _answer(verdict: Verdict) -> Markup:
    return tag("div", tag("p", verdict.sentence, class_="verdict"), *(tag("p", text) for text in verdict.remarks))


def _overview(report: Report, *, has_winner: bool) -> Markup:
    """Every configuration with both intervals, best first, and what the intervals mean."""
    metrics = [("energy_per_output_tok_j", "J/tok" + report.estimate_note)] if report.has_energy else []
    metrics += [("output_tok_per_s", "tok/s")]
    columns = {name: [entry.aggregate.estimate(name) for entry in report.entries] for name, _ in metrics}
    decimals = {name: decimals_of(_centres(estimates)) for name, estimates in columns.items()}
    latencies = [
        (label, name)
        for label, name in (("TTFT p50", "ttft_p50_s"), ("End to end p50", "e2e_p50_s"))
        if any(entry.aggregate.estimate(name).values for entry in report.entries)
    ]
    head = ["No.", "Configuration"]
    for name, unit in metrics:
        short = "Energy per output token" if name == "energy_per_output_tok_j" else "Output throughput"
        head += [f"{short}, {unit}", "95 % intervals"]
    head += [*(label for label, _ in latencies), "Cycles"]
    rows: list[list[Cell | str]] = []
    for entry in report.entries:
        row: list[Cell | str] = [count_cell(entry.number), Cell(_name(entry))]
        for name, _ in metrics:
            estimate = entry.aggregate.estimate(name)
            is_estimate = entry.is_estimate and name.startswith("energy")
            row += interval_cells(estimate, decimals[name], is_estimate=is_estimate)
        for _, name in latencies:
            row.append(latency_cell(entry.centre(name), entry.aggregate.estimate(name).null_reason))
        row.append(count_cell(entry.aggregate.n_cycles))
        rows.append(row)
    order = "ascending" if report.has_energy else "descending"
    caption = f"Every configuration of {report.run.campaign_name}, sortable by each column"
    content = table(
        caption, head, rows, row_head=1, sorted_by=(2, order), class_="overview", best=0 if has_winner else None
    )
    class_ = "scroll tall" if len(rows) > _TALL_FROM else "scroll"
    return join(
        [
            scroller("Table of all configurations", content, class_),
            *(tag("p", text) for text in _explanations(report)),
            more_figures(report),
        ]
    )


def _centres(estimates: Iterable[Estimate]) -> Iterable[float]:
    return (item.value for item in estimates if item.value)


def _name(entry: Entry) -> Markup:
    swatch = tag("i", class_=f"dot g{entry.group}")
    badges = _badges(entry)
    return join([swatch, breakable(entry.name), tag("div", badges) if badges else Markup()])


def _badges(entry: Entry) -> Markup:
    aggregate = entry.aggregate
    found = [
        (aggregate.n_failed, f"{aggregate.n_failed} failed", "bad"),
        (aggregate.n_invalid, f"{aggregate.n_invalid} invalid", "bad"),
        (aggregate.is_load_shared, "shared load", "bad"),
        (any(record.validity.steady is False for record in entry.used), "not steady", "warn"),
        (len(aggregate.warnings), plural(len(aggregate.warnings), "warning"), "warn"),
    ]
    return join([tag("span", text, class_=f"tag {kind}") for is_there, text, kind in found if is_there])


def _tiles(report: Report) -> Markup:
    aggregates = [entry.aggregate for entry in report.entries]
    results = sum(item.n_results for item in aggregates)
    invalid = sum(item.n_invalid for item in aggregates)
    failed = sum(item.n_failed for item in aggregates)
    damaged = sum(problem.kind != "missing" for problem in report.problems)
    figures = (
        (f"{results - invalid} of {results}", "results valid", "bad" if invalid else "good"),
        (str(invalid), "invalid", "bad" if invalid else "good"),
        (str(failed), "experiments failed", "bad" if failed else "good"),
        (str(damaged), "files left out", "bad" if damaged else "good"),
    )
    return tag(
        "ul", *(tag("li", tag("b", value), label, class_=kind) for value, label, kind in figures), class_="tiles"
    )


def _findings(report: Report) -> Iterable[Markup]:
    """Why results are invalid, then what `lem check` finds, each with what to do about it."""
    for text, count, members in _alike(report.entries):
        total = sum(entry.aggregate.n_results for entry in members)
        yield _finding("bad", "invalid", f"{text} ({count} of {plural(total, 'result')}: {_members(members, report)})")
    damaged = sum(problem.kind != "missing" for problem in report.problems)
    for item in report.findings:
        if item.kind == "damaged":
            text = f"{plural(damaged, 'result')} cannot be used, and left out: named below"
            yield _finding("bad", "damaged", text, item.remedy)
    by_name = {entry.aggregate.name: entry for entry in report.entries}
    for item in report.findings:
        if item.kind in _TOLD_ELSEWHERE:
            continue
        members = sorted(
            (by_name[name] for name in item.configurations if name in by_name), key=lambda entry: entry.number
        )
        concerned = f" ({_members(members, report)})" if members and len(report.entries) > 1 else ""
        kind, label = "bad" if item.is_weak else "warn", item.kind.replace("_", " ")
        yield _finding(kind, label, f"{item.text}{concerned}", item.remedy)
    if not report.has_energy and report.entries:
        reasons = dict.fromkeys(
            entry.aggregate.estimate("energy_per_output_tok_j").null_reason or "" for entry in report.entries
        )
        said = "; ".join(filter(None, reasons)) or "no reason given"
        yield _finding("warn", "no energy", f"not measured: {said}. The page is about throughput instead.")


def _finding(kind: str, label: str, text: str, remedy: str = "") -> Markup:
    what_to_do = tag("div", f"→ {remedy}", class_="remedy") if remedy else Markup()
    return tag("li", tag("span", label, class_=f"tag {kind}"), text, what_to_do)


def _alike(entries: Sequence[Entry]) -> Iterable[tuple[str, int, list[Entry]]]:
    """Why results are invalid, each kind once, whatever its numbers: the first text, of how many results, whose."""
    found = ((why, (entry, n)) for entry in entries for why, n in entry.aggregate.invalid_reasons.items())
    for same in alike(found):
        is_varied = len({reason for reason, _ in same}) > 1
        text = same[0][0].text + ("; numbers differ" if is_varied else "")
        members = {entry.number: entry for _, (entry, _) in same}
        yield text, sum(count for _, (_, count) in same), list(members.values())


def _members(members: Sequence[Entry], report: Report) -> str:
    if len(members) == len(report.entries):
        return "all configurations" if len(members) > 1 else "the only configuration"
    shown = ", ".join(f"{entry.number} {entry.label}" for entry in members[:4])
    return shown + (f" and {len(members) - 4} more" if len(members) > 4 else "")


def _problems(report: Report) -> Markup:
    """What was left out, by name: a page that is silent about damage is taken for a whole one."""
    if not report.problems:
        return Markup()
    counts = {kind: sum(problem.kind == kind for problem in report.problems) for kind in _KINDS}
    said = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in counts.items() if count)
    rows = [
        [problem.kind, "/".join(PurePath(problem.path).parts[-4:]), problem.message]
        for problem in report.problems[:_PROBLEMS_SHOWN]
    ]
    content = table("Attempts that were left out", ["Kind", "File", "What was found"], rows, row_head=None)
    left = len(report.problems) - len(rows)
    more = tag("p", f"And {left} more: lem results list --json names all.") if left else Markup()
    label = f"Left out: {plural(len(report.problems), 'attempt')} ({said})"
    is_open = any(problem.kind != "missing" for problem in report.problems) and len(rows) <= _SHOWN
    return details(label, scroller("Attempts that were left out", content), more, is_open=is_open)


def _explanations(report: Report) -> Iterable[str]:
    sizes = sorted({entry.aggregate.n_cycles for entry in report.entries if entry.span(report.headline.name)})
    covers = [(size, bootstrap_coverage_label(size)) for size in sizes]
    said = ", ".join(f"{label} with {plural(size, 'cycle')}" for size, label in covers if label)
    if report.run.stopping is not None:
        yield f"Cycles were added {report.run.stopping.describe()}: {UNACCOUNTED}."
    if not sizes:
        return
    yield (
        "Means are geometric, over the cycles of a configuration. The t interval is Student's, on log values: it "
        "covers 95 % at any number of cycles. The bootstrap interval is that of the arithmetic mean, 95 % in name"
        + (f"; it truly covers {said}." if said else ".")
    )
    every = any(
        entry.aggregate.estimate(name).all_attempts
        for entry in report.entries
        for name in ("energy_per_output_tok_j", "output_tok_per_s")
    )
    if every:
        yield "“All attempts” is the mean with invalid results counted in: shown where it differs, never used instead."
