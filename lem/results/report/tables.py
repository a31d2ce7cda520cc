"""The tables of the report that say how far its numbers can be used, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import PurePath
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.doc import Column
from lem.base.reasons import Reason, alike
from lem.base.units import format_latency, plural, some_of
from lem.record import Gpu, Record
from lem.results.agreement import NOTE as AGREEMENT_NOTE
from lem.results.axes import Key
from lem.results.bootstrap import bootstrap_coverage_label, coverage_notes
from lem.results.compare import Comparison
from lem.results.compare import Row as ComparisonRow
from lem.results.comparison import ratio_notes_of
from lem.results.metrics import METRIC_BY_NAME, Metric, mean_of
from lem.results.report import plot
from lem.results.report.content import Entry, Report, verdict_of
from lem.results.report.plot import (
    Cells,
    Markup,
    Row,
    counts,
    details,
    escape,
    join,
    paragraphs,
    quantities,
    scroller,
    table,
    table_of,
    tag,
    texts,
)
from lem.results.run import ENERGY, carbon_basis
from lem.results.uncertainty import why_unknown
from lem.results.views import ComparisonTables, decimals_of, effect_cells

# --- how many results can be used, and what weakens them

_SHOWN = 8
_PROBLEMS_SHOWN = 200
# Findings that the verdict, the invalid results and the plots show as well.
_SHOWN_ELSEWHERE = frozenset({"damaged", "indistinguishable", "unequal_exclusions", "invalid"})
_KINDS = ("missing", "half-written", "corrupt", "altered", "foreign", "unreadable")


def validity_section(report: Report) -> Markup:
    items = [*_findings(report)]
    shown = [tag("p", "lem found nothing that weakens these numbers.")]
    if items:
        shown = [tag("ul", *items[:_SHOWN], class_="findings")]
    if more := items[_SHOWN:]:
        shown.append(details(f"{len(more)} more", tag("ul", *more, class_="findings")))
    return join([_tiles(report), *shown, _problems(report)])


def _n_damaged(report: Report) -> int:
    return sum(problem.kind != "missing" for problem in report.run.problems)


def _tiles(report: Report) -> Markup:
    configurations = [entry.configuration for entry in report.entries]
    results, invalid = sum(len(item.records) for item in configurations), sum(item.n_invalid for item in configurations)
    tiles = (
        (f"{results - invalid} of {results}", "results valid", invalid),
        (str(invalid), "invalid", invalid),
        (str(failed := sum(item.n_failed for item in configurations)), "experiments failed", failed),
        (str(damaged := _n_damaged(report)), "files left out", damaged),
    )
    items = (tag("li", tag("b", value), label, class_="bad" if bad else "good") for value, label, bad in tiles)
    return tag("ul", *items, class_="tiles")


def _findings(report: Report) -> Iterator[Markup]:
    found = ((why, (entry, n)) for entry in report.entries for why, n in entry.configuration.invalid_reasons.items())
    for same in alike(found):
        text = same[0][0].text + ("; numbers differ" if len({reason for reason, _ in same}) > 1 else "")
        members = list({entry.number: entry for _, (entry, _) in same}.values())
        count, total = sum(n for _, (_, n) in same), sum(len(entry.configuration.records) for entry in members)
        whom = f"({count} of {plural(total, 'result')}: {_members(members, report)})"
        yield _finding("bad", "invalid", report.unbroken(f"{text} {whom}"))
    for item in report.findings:
        if item.kind == "damaged":
            text = f"{plural(_n_damaged(report), 'result')} cannot be used and were left out; they are listed below"
            yield _finding("bad", "damaged", text, item.remedy)
    by_name = {entry.configuration.name: entry for entry in report.entries}
    for item in report.findings:
        if item.kind not in _SHOWN_ELSEWHERE:
            entries = (by_name[name] for name in item.configurations if name in by_name)
            members = sorted(entries, key=lambda entry: entry.number)
            concerned = f" ({_members(members, report)})" if members and len(report.entries) > 1 else ""
            kind, label = "bad" if item.is_weak else "warn", item.kind.replace("_", " ")
            yield _finding(kind, label, report.unbroken(f"{item.text}{concerned}"), item.remedy)
    if not report.has_energy and report.entries:
        reasons = dict.fromkeys(entry.configuration.estimate(ENERGY).null_reason or "" for entry in report.entries)
        why = "; ".join(filter(None, reasons)) or "no reason given"
        yield _finding("warn", "no energy", f"not measured: {why}. This page shows throughput instead.")


def _finding(kind: str, label: str, text: str, remedy: str = "") -> Markup:
    what_to_do = [tag("div", f"→ {remedy}", class_="remedy")] if remedy else []
    return tag("li", tag("span", label, class_=f"tag {kind}"), text, *what_to_do)


def _members(members: Sequence[Entry], report: Report) -> str:
    if len(members) == len(report.entries):
        return "all configurations" if len(members) > 1 else "the only configuration"
    return some_of([f"{entry.number} {entry.label}" for entry in members], 4)


def _problems(report: Report) -> Markup:
    problems = report.run.problems
    if not problems:
        return Markup()
    kinds = [problem.kind for problem in problems]
    found = {"without a result" if kind == "missing" else kind: kinds.count(kind) for kind in _KINDS}
    counts = ", ".join(f"{count} {words}" for words, count in found.items() if count)
    rows = [[it.kind, "/".join(PurePath(it.path).parts[-4:]), it.message] for it in problems[:_PROBLEMS_SHOWN]]
    content = table("Attempts that were left out", ["Kind", "File", "Problem"], rows, row_head=None)
    left = len(problems) - len(rows)
    more = tag("p", f"And {left} more: `lem results list --json` lists all of them.") if left else Markup()
    label = f"Left out: {plural(len(problems), 'attempt')} ({counts})"
    is_open = _n_damaged(report) > 0 and len(rows) <= _SHOWN
    return details(label, scroller("Attempts that were left out", content), more, is_open=is_open)


# --- the verdict, and the table it is based on

# A longer table scrolls in a box of its own, so that the plots stay in reach.
_TALL_FROM = 40


def results_section(report: Report) -> Markup:
    verdict = verdict_of(report)
    sentence = tag("p", report.unbroken(verdict.sentence), class_="verdict")
    answer = tag("div", sentence, *(tag("p", report.unbroken(text)) for text in verdict.remarks))
    content = _overview(report, best=verdict.best)
    class_ = "scroll tall" if len(report.entries) > _TALL_FROM else "scroll"
    overview = scroller("Table of all configurations", content, class_)
    explanations = paragraphs(_explanations(report))
    return join([answer, overview, *explanations, *_agreements(report), _more_figures(report)])


def _agreements(report: Report) -> Iterator[Markup]:
    tables = ComparisonTables(report.comparison, (), ()).agreements() if report.comparison is not None else ()
    for found in tables:
        heads = [found.heading, *(column.heading.replace("\n", " ") for column in found.columns)]
        cells = zip(*(column.cells for column in found.columns), strict=True)
        rows: list[Row] = [[name, *row] for name, row in zip(found.names, cells, strict=True)]
        yield join([tag("h3", found.title), scroller(found.title, table(found.title, heads, rows))])
        yield from paragraphs([f"{AGREEMENT_NOTE}."])


def _overview(report: Report, *, best: int | None) -> Markup:
    entries, comparison = report.entries, report.comparison
    first, *others = _axes(entries)
    numbers = [f'<i class="dot g{entry.group}"></i>{entry.number}' for entry in entries]
    columns = [
        Cells("No.", numbers, is_number=True, values=[entry.number for entry in entries]),
        Cells(first.heading.replace("\n", ""), [*map(_badged, first.cells, entries)]),
        *(texts(column.heading.replace("\n", ""), column.cells) for column in others),
    ]
    for metric in report.metrics:
        columns.append(_estimates(metric, f"{metric.heading}{report.estimate_note * (metric is ENERGY)}", entries))
        if metric is report.headline and comparison is not None:
            columns.append(_ratios(comparison, metric, entries))
    for heading, name in (("TTFT p50", "ttft_p50_s"), ("End-to-end p50", "e2e_p50_s")):
        found = [entry.configuration.estimate(name) for entry in entries]
        if any(estimate.values for estimate in found):
            centres = [estimate.value for estimate in found]
            contents = [
                plot.absent(estimate.null_reason) if value is None else escape(format_latency(value))
                for estimate, value in zip(found, centres, strict=True)
            ]
            columns.append(Cells(heading, contents, is_number=True, values=centres))
    cycles = [entry.configuration.n_cycles for entry in entries]
    columns.append(Cells("Cycles", [*map(str, cycles)], is_number=True, values=cycles))
    caption = f"Every configuration of {report.run.campaign_name}, sortable by each column"
    place = next((place for place, entry in enumerate(entries) if entry.number == best), None)
    return table_of(caption, columns, sorted_by=(0, "ascending"), best=place)


def _estimates(metric: Metric, heading: str, entries: Sequence[Entry]) -> Cells:
    centres = [entry.centre(metric) for entry in entries]
    decimals = plot.decimals_of(centres)
    contents = [
        plot.interval_of(
            entry.configuration.estimate(metric), decimals, is_estimate=entry.is_estimate and metric is ENERGY
        )
        for entry in entries
    ]
    return Cells(heading, contents, is_number=True, values=centres)


def _ratios(comparison: Comparison, metric: Metric, entries: Sequence[Entry]) -> Cells:
    rows = {pair.other.number: row for pair, row in reversed(comparison.rows(metric))}
    baseline = comparison.pairs[0].baseline.number
    found = [("baseline", 1.0) if entry.number == baseline else _ratio(rows.get(entry.number)) for entry in entries]
    contents, values = [it for it, _ in found], [it for _, it in found]
    return Cells(f"Ratio to {baseline}", contents, is_number=True, values=values)


def _axes(entries: Sequence[Entry]) -> Sequence[Column]:
    names = Column("configuration", tuple(entry.label for entry in entries), is_text=True)
    numbers, settings = [str(entry.number) for entry in entries], [entry.settings for entry in entries]
    found = Key(numbers, settings, [entry.name for entry in entries]).columns
    return [names if column.heading == names.heading else column for column in found or [names]]


def _ratio(row: ComparisonRow | None) -> tuple[Markup, float | None]:
    if row is None or row.effect is None:
        why = row.reason.text if row is not None and row.reason else None
        return tag("span", "none", class_="absent", title=why), None
    ratio, interval, _, p_value, _ = effect_cells(row, decimals_of(row))
    title = None if row.p_adjusted is None else f"p {p_value}, adjusted by Holm"
    return join([ratio, Markup(" "), tag("small", interval, title=title)]), row.effect.ratio


def _badged(shown: str, entry: Entry) -> Markup:
    configuration = entry.configuration
    badges = [
        (configuration.n_failed, f"{configuration.n_failed} failed", "bad"),
        (configuration.n_invalid, f"{configuration.n_invalid} invalid", "bad"),
        (configuration.is_load_shared, "shared load", "bad"),
        (any(record.validity.steady is False for record in entry.used), "not steady", "warn"),
        (len(configuration.warnings), plural(len(configuration.warnings), "warning"), "warn"),
    ]
    found = [tag("span", text, class_=f"tag {kind}") for is_there, text, kind in badges if is_there]
    return join([tag("span", shown, title=entry.name), tag("div", *found) if found else Markup()])


def _explanations(report: Report) -> Iterator[str]:
    if report.run.stopping is not None:
        yield f"Cycles were added {report.run.stopping.describe()}: {report.run.stopping.correction}."
    sizes = sorted({entry.configuration.n_cycles for entry in report.entries if entry.span(report.headline)})
    if not sizes:
        return
    labels = ((size, bootstrap_coverage_label(size)) for size in sizes)
    covers = ", ".join(f"{label} with {plural(size, 'cycle')}" for size, label in labels if label)
    yield (
        "Means are geometric means over the cycles of a configuration. The t interval is Student's t on log values and "
        "covers 95 % at any number of cycles. The bootstrap interval is for the arithmetic mean, nominally 95 %"
        + (f"; its actual coverage is {covers}." if covers else ".")
    )
    yield from coverage_notes(record.window for entry in report.entries for record in entry.used)
    yield from ratio_notes_of(report.comparison) if report.comparison is not None else ()
    estimates = [entry.configuration.estimate(metric) for entry in report.entries for metric in report.metrics]
    if any(estimate.combined.value for estimate in estimates):
        yield (
            "“Combined” is the 95 % uncertainty of the geometric mean from the spread of cycles and all errors of the "
            "meter that cycles share (GUM); its causes are shown when you point at the word."
        )
    if why := why_unknown(estimate.combined for estimate in estimates):
        yield f"The combined uncertainty of an energy, with the errors of its meter, is not known: {'; '.join(why)}."
    if any(estimate.all_attempts for estimate in estimates):
        yield "“All attempts” is the mean including invalid results; it is shown where it differs and never used."


@dataclass(frozen=True)
class _OfGpus:
    heading: str
    of_one: Callable[[Gpu], Any]
    fold: Callable[[list[float]], float]
    group = section = "gpus"

    def read(self, record: Record) -> tuple[float | None, Reason | None]:
        values = [*map(self.of_one, record.gpus)]
        return self.fold(values) if values and None not in values else None, None


_FIGURES: tuple[Metric | _OfGpus, ...] = (
    *(
        METRIC_BY_NAME[name]
        for name in (
            *("gpu_energy_net_per_output_tok_j", "energy_per_request_j", "gpu_energy_net_per_request_j"),
            *("energy_per_good_request_j", "good_requests_per_s", "good_requests_ratio"),
            *("prefill_energy_per_input_tok_j", "decode_energy_per_output_tok_j"),
            *("cpu_package_energy_per_output_tok_j", "dram_energy_per_output_tok_j"),
            *("external_energy_per_output_tok_j", "load_energy_per_load_j", "warmup_energy_per_prompt_j"),
            *("co2e_per_output_tok_g", "co2e_per_request_g", "cost_per_million_output_tok", "cost_per_1000_requests"),
        )
    ),
    Metric("tok_per_step", "throughput", "", "throughput", "tok_per_step", "Tokens per step"),
    Metric("draft_accepted_ratio", "throughput", "ratio", "throughput", "draft_accepted_ratio", "Drafts accepted"),
    Metric("in_flight_mean", "throughput", "mean", "window", "in_flight_mean", "Requests in flight"),
    Metric("fill_drain_ratio", "throughput", "ratio", "window", "fill_drain_ratio", "Filling or draining"),
    _OfGpus("GPU power, mean, W", attrgetter("power_mean_w"), math.fsum),
    _OfGpus("GPU temperature, maximum, °C", attrgetter("temp_max_c"), max),
    Metric("load_s", "throughput", "s", "window", "load_s", "Engine load"),
)


def _more_figures(report: Report) -> Markup:
    entries = report.entries
    basis = f" ({carbon_basis(entry.configuration for entry in entries)})"
    columns = [counts("No.", (entry.number for entry in entries)), texts("Configuration", (it.label for it in entries))]
    figures = [*_recorded([record for entry in entries for record in entry.used])]
    rows = [[_mean_or_why([*map(figure.read, entry.used)]) for figure in figures] for entry in entries]
    for figure, column in zip(figures, zip(*rows, strict=True), strict=True):
        if any(value is not None for value, _ in column):
            notes = basis * (figure.section == "carbon") + report.estimate_note * (figure.group == "energy")
            columns.append(quantities(figure.heading + notes, column))
    if len(columns) == 2:
        return Markup()
    label = "More figures of every configuration"
    return details(label, scroller(label, table_of(label, columns, row_head=1)))


def _recorded(records: Sequence[Record]) -> Sequence[Metric | _OfGpus]:
    """The figures of which some record has what they are made of, which is found quicker than they are read."""
    metrics = [figure for figure in _FIGURES if isinstance(figure, Metric)]
    read = attrgetter(*(f"{metric.section}.{metric.field}" for metric in metrics))
    found = zip(metrics, zip(*map(read, records), strict=True), strict=False)  # nothing without a record
    recorded = {metric.name for metric, column in found if column.count(None) < len(column)}
    return [figure for figure in _FIGURES if isinstance(figure, _OfGpus) or figure.name in recorded] if records else ()


def _mean_or_why(found: Sequence[tuple[float | None, Reason | None]]) -> tuple[float | None, Reason | None]:
    values = [value for value, _ in found if value is not None]
    return (mean_of(values), None) if values else (None, next((why for _, why in found if why is not None), None))
