"""Every cycle as a dot, and the interval over them: what the means are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lem.record import Record
from lem.results.aggregation import METRICS, Metric
from lem.results.report.content import Entry, Report
from lem.results.report.drawing import circle_path, cross_path, figure, horizontal_axis, no_figure, plot, text
from lem.results.report.figures import number_cell
from lem.results.report.markup import Cell, Markup, details, number_text, table, tag
from lem.results.report.scales import Scale, fitting_scale

__all__ = ["cycles_section"]

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760.0, 250.0, 744.0, 14.0, 22.0
_PER_PLOT = 40
_METRICS = {metric.name: metric for metric in METRICS}
_TITLES = {
    "energy_per_output_tok_j": ("Energy per output token, J", "Energy per output token, by cycle"),
    "output_tok_per_s": ("Output throughput, tok/s", "Output throughput, by cycle"),
}


def cycles_section(report: Report) -> Markup:
    """A strip of dots for each configuration, of energy where there is any and of throughput."""
    names = ["energy_per_output_tok_j"] if report.has_energy else []
    parts: list[Markup] = []
    for name in [*names, "output_tok_per_s"]:
        parts += _figures(_METRICS[name], report)
    return tag("div", *parts, class_="pair")


def _figures(metric: Metric, report: Report) -> Iterable[Markup]:
    """One figure, and for many configurations the others folded away behind it."""
    label, heading = _TITLES[metric.name]
    label += report.estimate_note if metric.group == "energy" else ""
    values = [value for record in report.records if (value := metric.read(record)[0]) is not None]
    if not values:
        yield no_figure(f"cycles-{metric.name}", heading, "No result has a value.")
        return
    scale = fitting_scale(values, _LEFT, _RIGHT)
    pages = [report.entries[at : at + _PER_PLOT] for at in range(0, len(report.entries), _PER_PLOT)]
    figures = [_figure(metric, label, heading, entries, scale, page) for page, entries in enumerate(pages)]
    folded = [
        details(f"{heading}: configurations {entries[0].number} to {entries[-1].number}", drawn)
        for entries, drawn in zip(pages[1:], figures[1:], strict=True)
    ]
    yield tag("div", figures[0], *folded)


def _figure(metric: Metric, label: str, heading: str, entries: Sequence[Entry], scale: Scale, page: int) -> Markup:
    identifier = f"cycles-{metric.name}" + (f"-{page + 1}" if page else "")
    height = _TOP + _ROW * len(entries)
    rows = [_row(metric, entry, _TOP + _ROW * (index + 0.5), scale) for index, entry in enumerate(entries)]
    drawing = plot(
        identifier,
        heading,
        f"A row for each of {len(entries)} configurations: a dot for every valid cycle, a diagonal cross for every "
        "invalid attempt, a bar for the t interval with a tick at the geometric mean.",
        (_WIDTH, height + 46),
        horizontal_axis(scale, height, _TOP, label, count=5),
        *rows,
    )
    caption = ["Dot: a valid cycle. ×: an invalid attempt, left out. Bar and tick: 95 % t interval, geometric mean."]
    return figure(identifier, heading, drawing, caption, _data(metric, label, entries))


def _row(metric: Metric, entry: Entry, y: float, scale: Scale) -> Markup:
    used = {record.identity.key for record in entry.used}
    counted = [(value, True) for value in _values(metric, entry.records, used, is_used=True)]
    left_out = [(value, False) for value in _values(metric, entry.records, used, is_used=False)]
    parts = [text(_LEFT - 12, y + 4, f"{entry.number}  {entry.label}", anchor="end")]
    span, centre = entry.span(metric.name), entry.centre(metric.name)
    if span:
        low, high = scale(span[0]), scale(span[1])
        parts.append(tag("path", d=f"M{number_text(low)} {number_text(y)}H{number_text(high)}", class_="bar"))
    if centre is not None:
        x = number_text(scale(centre))
        parts.append(tag("path", d=f"M{x} {number_text(y - 8)}V{number_text(y + 8)}", class_="mean"))
    else:
        reason = entry.aggregate.metrics[metric.name].null_reason
        parts.append(text(_LEFT + 8, y + 4, "not measured" if entry.used else "no valid result", "absent"))
        parts.append(tag("title", reason) if reason else Markup())
    if counted:
        parts.append(tag("path", d=circle_path((scale(value), y) for value, _ in counted), class_="dots"))
    if left_out:
        parts.append(tag("path", d=cross_path((scale(value), y) for value, _ in left_out), class_="out"))
    return tag("g", *parts, class_=f"g{entry.group}")


def _values(
    metric: Metric, records: Sequence[Record], used: set[tuple[str, str, str, int, int]], *, is_used: bool
) -> Iterable[float]:
    for record in records:
        value, _ = metric.read(record)
        if value is not None and (record.identity.key in used) == is_used:
            yield value


def _data(metric: Metric, label: str, entries: Sequence[Entry]) -> Markup:
    head = ["No.", "Configuration", "Cycle", "Attempt", label, "Counts"]
    rows: list[list[Cell | str]] = []
    for entry in entries:
        used = {record.identity.key for record in entry.used}
        for record in entry.records:
            value, reason = metric.read(record)
            identity = record.identity
            counts = "yes" if identity.key in used else "no, invalid" if not record.validity.valid else "no"
            cycle, attempt = str(identity.cycle_index + 1), str(identity.attempt)
            rows.append([str(entry.number), entry.label, cycle, attempt, number_cell(value, reason=reason), counts])
    return table(f"{label}, every attempt", head, rows, row_head=1)
