"""Latencies: the percentiles of every configuration, and so the shape of their distributions."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from lem.record import OBSERVATIONS_NEEDED, Distribution
from lem.results.report.content import Entry, Report
from lem.results.report.markup import (
    Cell,
    Markup,
    count_cell,
    details,
    join,
    latency_cell,
    number_text,
    scroller,
    table,
    tag,
)
from lem.results.report.plot import (
    Scale,
    circle_path,
    figure,
    fitting_scale,
    horizontal_axis,
    label_room,
    no_figure,
    plot,
    ring_path,
    row_labels,
    text,
)

_WIDTH, _RIGHT, _TOP, _ROW = 640.0, 626.0, 14.0, 22.0
_PER_PLOT = 40
_DRAWN = 200
_KINDS = {
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
    "itl_s": "Time between tokens",
    "e2e_s": "End to end",
    "queue_s": "Time in the queue",
}
_LEVELS = ("p50", "p90", "p95", "p99")

_Percentiles = dict[str, float]


def latency_section(report: Report) -> Markup:
    """A figure for each kind that any configuration has, and why the others are not there."""
    parts, absences = [], []
    for kind, name in _KINDS.items():
        found = {entry.number: _percentiles(entry, kind) for entry in report.entries}
        if any(found.values()):
            parts.append(_figures(kind, name, report.entries, found))
        else:
            absences.append(tag("p", f"{name}: not measured: {_reason(report, kind)}"))
    if not parts:
        parts.append(no_figure("latency", "Latency percentiles", "No latency was measured."))
    left_out = tag("div", *absences, class_="absent") if absences else Markup()
    return join([tag("div", *parts, class_="pair"), left_out])


def _percentiles(entry: Entry, kind: str) -> _Percentiles:
    """The mean over the cycles of each percentile that all of them have; geometric unless one is zero."""
    seen: list[Distribution] = [value for record in entry.used if (value := getattr(record.latency, kind)) is not None]
    found: _Percentiles = {}
    for level in ("mean", *_LEVELS):
        values = [getattr(item, level) for item in seen]
        if values and None not in values:
            # A queue can be empty: then a time is 0, and has no log.
            is_positive = min(values) > 0
            found[level] = (
                math.exp(statistics.fmean(map(math.log, values))) if is_positive else statistics.fmean(values)
            )
    return found


def _reason(report: Report, kind: str) -> str:
    reasons = (record.latency.null_reasons.get(kind) for record in report.records)
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "no valid result"


def _figures(kind: str, name: str, entries: Sequence[Entry], found: dict[int, _Percentiles]) -> Markup:
    values = [value for item in found.values() for value in item.values()]
    scale = fitting_scale(values, label_room(entry.label for entry in entries), _RIGHT)
    drawn_entries = entries[:_DRAWN]
    pages = [drawn_entries[at : at + _PER_PLOT] for at in range(0, len(drawn_entries), _PER_PLOT)]
    drawn = [_figure(kind, name, page, found, scale, number) for number, page in enumerate(pages)]
    folded = [
        details(f"{name}: configurations {page[0].number} to {page[-1].number}", content)
        for page, content in zip(pages[1:], drawn[1:], strict=True)
    ]
    return tag("div", drawn[0], *folded, _undrawn(kind, name, entries[_DRAWN:], found))


def _undrawn(kind: str, name: str, entries: Sequence[Entry], found: dict[int, _Percentiles]) -> Markup:
    """The table of the configurations after those that are drawn."""
    if not entries:
        return Markup()
    label = f"{name}: configurations {entries[0].number} to {entries[-1].number}, as a table alone"
    return details(label, scroller(label, _data(name, kind, entries, found)))


def _figure(
    kind: str, name: str, entries: Sequence[Entry], found: dict[int, _Percentiles], scale: Scale, page: int
) -> Markup:
    identifier = f"latency-{kind.removesuffix('_s')}" + (f"-{page + 1}" if page else "")
    height = _TOP + _ROW * len(entries)
    rows = [(entry, found[entry.number], _TOP + _ROW * (index + 0.5)) for index, entry in enumerate(entries)]
    drawing = plot(
        identifier,
        name,
        f"A row for each of {len(entries)} configurations: a tick at the median, bars that thin out to the 90th, 95th "
        "and 99th percentile, a ring at the mean, a small dot for the median of each cycle.",
        (_WIDTH, height + 46),
        horizontal_axis(scale, height, _TOP, f"{name}, s", count=5),
        row_labels([(entry.number, entry.label, y) for entry, _, y in rows], scale.begin),
        *_bars(rows, scale),
        *_centres(rows, kind, scale),
    )
    caption = [
        "Tick: median. Bars, thick to thin: to p90, p95, p99. Ring: mean. Small dots: the median of each cycle.",
        "p95 needs {p95} requests, p99 {p99}. Geometric means over the cycles.".format_map(OBSERVATIONS_NEEDED),
    ]
    return figure(identifier, f"{name}, percentiles", drawing, caption, _data(name, kind, entries, found))


_Row = tuple[Entry, _Percentiles, float]


def _bars(rows: Sequence[_Row], scale: Scale) -> Iterable[Markup]:
    """From percentile to percentile, one path for each group and thickness: a thousand rows must take few bytes."""
    for group in sorted({entry.group for entry, _, _ in rows}):
        for low, high in itertools.pairwise(_LEVELS):
            parts = [
                f"M{number_text(scale(found[low]))} {number_text(y)}H{number_text(scale(found[high]))}"
                for entry, found, y in rows
                if entry.group == group and low in found and high in found
            ]
            if parts:
                yield tag("path", d="".join(parts), class_=f"g{group} to-{high}")


def _centres(rows: Sequence[_Row], kind: str, scale: Scale) -> Iterable[Markup]:
    """Medians, means, and the median of each cycle; or that there is none."""
    known = [(entry, found, y) for entry, found, y in rows if "p50" in found]
    ticks = "".join(f"M{number_text(scale(found['p50']))} {number_text(y - 8)}v16" for _, found, y in known)
    yield tag("path", d=ticks, class_="mean")
    medians = [
        (scale(value.p50), y)
        for entry, _, y in known
        for record in entry.used
        if (value := getattr(record.latency, kind)) is not None
    ]
    yield tag("path", d=circle_path(medians), class_="dots small")
    yield tag("path", d=ring_path((scale(found["mean"]), y) for _, found, y in known if "mean" in found), class_="ring")
    for entry, found, y in rows:
        if "p50" not in found:
            yield text(scale.begin + 8, y + 4, "not measured" if entry.used else "no valid result", "absent")


def _data(name: str, kind: str, entries: Sequence[Entry], found: dict[int, _Percentiles]) -> Markup:
    head = ["No.", "Configuration", "Mean", *_LEVELS, "Requests"]
    rows = [[*_cells(entry, found[entry.number], kind)] for entry in entries]
    return table(f"{name}, percentiles", head, rows, row_head=1)


def _cells(entry: Entry, found: _Percentiles, kind: str) -> Iterable[Cell | str]:
    seen = [value for record in entry.used if (value := getattr(record.latency, kind)) is not None]
    count = sum(item.n for item in seen)
    fewest = min((item.n for item in seen), default=0)
    yield count_cell(entry.number)
    yield entry.label
    for level in ("mean", *_LEVELS):
        needed = OBSERVATIONS_NEEDED.get(level, 1)
        few = f"needs {needed} requests, there are {fewest}" if seen and fewest < needed else None
        yield latency_cell(found.get(level), few or next(_null_reasons(entry, kind), None))
    yield count_cell(count) if seen else Cell("none", None, is_number=True)


def _null_reasons(entry: Entry, kind: str) -> Iterator[str]:
    return iter([*dict.fromkeys(filter(None, (item.latency.null_reasons.get(kind) for item in entry.records)))])
