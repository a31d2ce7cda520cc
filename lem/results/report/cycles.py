"""Every cycle as a dot, and the interval over them: what the means are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.results.metrics import METRIC_BY_NAME, Metric
from lem.results.report.content import Entry, Report
from lem.results.report.markup import Cell, Markup, count_cell, details, number_cell, number_text, table, tag
from lem.results.report.plot import (
    Scale,
    circle_path,
    cross_path,
    figure,
    fitting_scale,
    horizontal_axis,
    label_room,
    no_figure,
    plot,
    row_labels,
    text,
)

# Two drawings side by side: the values, and how far each is from its configuration's mean, which values of
# configurations that differ by much would hide.
_WIDTH, _TOP, _ROW = 640.0, 14.0, 22.0
_BETWEEN, _RIGHT = 26.0, 626.0
_REACH_MAX = 50.0
_VALUES_SHARE = 0.38
_PER_PLOT = 40
_TITLES = {
    "energy_per_output_tok_j": ("Energy per output token, J", "Energy per output token, by cycle"),
    "output_tok_per_s": ("Output throughput, tok/s", "Output throughput, by cycle"),
}


def cycles_section(report: Report) -> Markup:
    """A strip of dots for each configuration, of energy where there is any and of throughput."""
    names = ["energy_per_output_tok_j"] if report.has_energy else []
    parts: list[Markup] = []
    for name in [*names, "output_tok_per_s"]:
        parts += _figures(METRIC_BY_NAME[name], report)
    return tag("div", *parts, class_="pair")


@dataclass(frozen=True)
class _Scales:
    """Of the values, and of their differences in percent; and where the first begins."""

    values: Scale
    shares: Scale
    begin: float


def _figures(metric: Metric, report: Report) -> Iterable[Markup]:
    """One figure, and for many configurations the others folded away behind it."""
    label, heading = _TITLES[metric.name]
    values = [value for record in report.records if (value := metric.read(record)[0]) is not None]
    if not values:
        yield no_figure(f"cycles-{metric.name}", heading, "No result has a value.")
        return
    reach = _reach(metric, report.entries)
    begin = label_room(_label(entry, metric) for entry in report.entries)
    middle = begin + _VALUES_SHARE * (_RIGHT - begin)
    scales = _Scales(fitting_scale(values, begin, middle), Scale(-reach, reach, middle + _BETWEEN, _RIGHT), begin)
    pages = [report.entries[at : at + _PER_PLOT] for at in range(0, len(report.entries), _PER_PLOT)]
    figures = [_figure(metric, label, heading, entries, scales, page) for page, entries in enumerate(pages)]
    folded = [
        details(f"{heading}: configurations {entries[0].number} to {entries[-1].number}", drawn)
        for entries, drawn in zip(pages[1:], figures[1:], strict=True)
    ]
    yield tag("div", figures[0], *folded)


def _reach(metric: Metric, entries: Sequence[Entry]) -> float:
    """The largest difference in percent that is drawn to scale."""
    found = [1.0]
    for entry in entries:
        centre, span = entry.centre(metric.name), entry.span(metric.name)
        if centre:
            known = [*_values(metric, entry, is_used=True), *(span or ())]
            found += [abs(100 * (value / centre - 1)) for value in known]
    return min(1.08 * max(found), _REACH_MAX)


def _figure(metric: Metric, label: str, heading: str, entries: Sequence[Entry], scales: _Scales, page: int) -> Markup:
    identifier = f"cycles-{metric.name}" + (f"-{page + 1}" if page else "")
    bottom = _TOP + _ROW * len(entries)
    rows = [_row(metric, entry, _TOP + _ROW * (index + 0.5)) for index, entry in enumerate(entries)]
    drawing = plot(
        identifier,
        heading,
        f"A row for each of {len(entries)} configurations, the values at the left and their difference from the mean "
        "at the right: a dot for every valid cycle, a diagonal cross for every invalid attempt, a bar for the t "
        "interval with a tick at the geometric mean.",
        (_WIDTH, bottom + 46),
        horizontal_axis(scales.values, bottom, _TOP, label, count=3),
        horizontal_axis(scales.shares, bottom, _TOP, "Difference from its mean, %", count=5),
        row_labels([(row.entry.number, _label(row.entry, metric), row.y) for row in rows], scales.begin),
        *_layers(rows, scales),
    )
    caption = [
        "Dot: a valid cycle. ×: an invalid attempt, left out; at the edge when further off.",
        "Bar: 95 % t interval. Tick: geometric mean.",
    ]
    if any(entry.is_estimate for entry in entries) and metric.group == "energy":
        caption.append("(est.): an estimate from the design power (TDP) of the CPU, not a measurement.")
    return figure(identifier, heading, drawing, caption, _data(metric, label, entries))


def _label(entry: Entry, metric: Metric) -> str:
    return f"{entry.label} (est.)" if entry.is_estimate and metric.group == "energy" else entry.label


@dataclass(frozen=True)
class _Row:
    """A configuration at a height: its values that count, those left out, and mean and interval of the former."""

    entry: Entry
    y: float
    counted: tuple[float, ...]
    left_out: tuple[float, ...]
    centre: float | None
    span: tuple[float, float] | None


def _row(metric: Metric, entry: Entry, y: float) -> _Row:
    counted, left_out = (tuple(_values(metric, entry, is_used=is_used)) for is_used in (True, False))
    return _Row(entry, y, counted, left_out, entry.centre(metric.name), entry.span(metric.name))


def _layers(rows: Sequence[_Row], scales: _Scales) -> Iterable[Markup]:
    """Bars, ticks, dots and crosses of all rows, one path for each group: a thousand rows must take few bytes."""
    places = [place for row in rows for place in _places(row, scales)]
    for group in sorted({row.entry.group for row in rows}):
        own = [place for place in places if place.group == group]
        spans = (
            f"M{number_text(place.low)} {number_text(place.y)}H{number_text(place.high)}"
            for place in own
            if place.low is not None and place.high is not None
        )
        dots = circle_path((x, place.y) for place in own for x in place.dots)
        yield tag("path", d="".join(spans), class_=f"bar g{group}")
        yield tag("path", d=dots, class_=f"dots g{group}")
    ticks = (f"M{number_text(x)} {number_text(place.y - 8)}v16" for place in places if (x := place.tick) is not None)
    yield tag("path", d="".join(ticks), class_="mean")
    yield tag("path", d=cross_path((x, place.y) for place in places for x in place.crosses), class_="out")
    for row in rows:
        if row.centre is None:
            said = "no geometric mean" if row.counted else "not measured" if row.entry.used else "no valid result"
            yield text(scales.shares.begin + 8, row.y + 4, said, "absent")


@dataclass(frozen=True)
class _Place:
    """What is drawn of a row on one of its two scales."""

    group: int
    y: float
    dots: tuple[float, ...]
    crosses: tuple[float, ...]
    tick: float | None = None
    low: float | None = None
    high: float | None = None


def _places(row: _Row, scales: _Scales) -> Iterable[_Place]:
    group, centre = row.entry.group, row.centre
    if centre is None:
        dots, crosses = tuple(map(scales.values, row.counted)), tuple(map(scales.values, row.left_out))
        yield _Place(group, row.y, dots, crosses)
        return

    def share(value: float) -> float:
        return scales.shares(100 * (value / centre - 1))

    for place in (scales.values, share):
        low, high = map(place, row.span) if row.span else (None, None)
        dots, crosses = tuple(map(place, row.counted)), tuple(map(place, row.left_out))
        yield _Place(group, row.y, dots, crosses, place(centre), low, high)


def _values(metric: Metric, entry: Entry, *, is_used: bool) -> Iterable[float]:
    used = {record.identity.key for record in entry.used}
    for record in entry.records:
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
            numbers = [count_cell(identity.cycle_index + 1), count_cell(identity.attempt)]
            rows.append(
                [count_cell(entry.number), _label(entry, metric), *numbers, number_cell(value, reason=reason), counts]
            )
    return table(f"{label}, every attempt", head, rows, row_head=1)
