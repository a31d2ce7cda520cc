"""The plots over configurations: energy against speed, every cycle, and latency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lem.base.dataclass import dataclass
from lem.base.measurement import PROMPTS_NEEDED, Distribution
from lem.base.reasons import Reason
from lem.base.units import format_latency, format_quantity, plural, some_of
from lem.record import Record
from lem.results.comparability import workload_of
from lem.results.metrics import LATENCIES, METRIC_BY_NAME, READABLE_LATENCIES, Metric, mean_of
from lem.results.report import plot
from lem.results.report.content import Entry, Report, frontier
from lem.results.report.plot import (
    Cells,
    Markup,
    Plot,
    Scale,
    counts,
    escape,
    join,
    marks,
    quantities,
    spot,
    table_of,
    tag,
    text,
    texts,
)
from lem.results.run import ENERGY, THROUGHPUT

# --- energy against speed: which configurations no other beats in both

_TOP, _BOTTOM = 50.0, 330.0
# With more points only those on the frontier have a number and a tooltip.
_NUMBERED = 24
_NAMED = 12
# Where the number of a point may be, the best side first.
_SIDES = ((1.0, 0.0), (-1.0, 0.0), (0.7, -0.8), (-0.7, -0.8), (0.7, 0.8), (-0.7, 0.8), (0.0, -1.0), (0.0, 1.0))


@dataclass(frozen=True)
class _Axis:
    metric: Metric
    label: str
    is_less_better: bool = True
    note: str = ""


class _Point(NamedTuple):
    entry: Entry
    x: float
    y: float
    x_span: tuple[float, float] | None
    y_span: tuple[float, float] | None
    workload: int  # from 0
    is_best: bool  # on the frontier of its workload


def pareto_section(report: Report) -> Markup:
    entries = report.entries
    energy = _Axis(ENERGY, "Energy per output token, J", note=report.estimate_note)
    throughput = _Axis(THROUGHPUT, "Output throughput, tok/s", is_less_better=False)
    latency = _Axis(METRIC_BY_NAME["e2e_p50_s"], "End-to-end latency, median, s")
    ttft = METRIC_BY_NAME["ttft_p50_s"]
    if all(entry.centre(ttft) is not None for entry in entries if entry.used):
        latency = _Axis(ttft, "Time to first token, median, s")
    if report.has_energy:
        parts = [
            _pareto("pareto-throughput", "Energy against throughput", throughput, energy, report),
            _pareto("pareto-latency", "Energy against latency", latency, energy, report),
        ]
    else:
        parts = [_pareto("pareto-latency", "Throughput against latency", latency, throughput, report)]
    is_explained = report.groups and report.grouped_by != "configuration"
    note = tag("p", f"Colour and shape: {report.grouped_by}.") if is_explained else Markup()
    key = plot.legend((marks([spot(7, 7, plot.shape(n))], f"m g{n}"), name) for n, name in enumerate(report.groups))
    return join([note, key, tag("div", *parts, class_="pair")])


def _pareto(identifier: str, title: str, across: _Axis, up: _Axis, report: Report) -> Markup:
    points = [
        point for number, entries in enumerate(report.workloads) for point in _points(number, entries, across, up)
    ]
    if not points:
        return plot.no_plot(identifier, title, "No configuration has a valid result with both values.")
    best = sorted((point for point in points if point.is_best), key=lambda p: p.x, reverse=not across.is_less_better)
    fronts = [*_fronts(best)]
    x_scale = plot.fitting_scale(_extent((point.x, point.x_span) for point in points), plot.LEFT, plot.RIGHT)
    y_scale = plot.fitting_scale(_extent((point.y, point.y_span) for point in points), _BOTTOM, _TOP)
    grey = len(points) - len(best)
    corner = {(True, True): "↙ lower left", (True, False): "↘ lower right", (False, True): "↖ upper left"}
    better = corner.get((up.is_less_better, across.is_less_better), "↗ upper right")
    return Plot(
        identifier,
        title,
        f"{plural(len(points), 'configuration')} as points with crosses for their intervals. {' '.join(fronts)}",
        (plot.WIDTH, _BOTTOM + 46),
        [
            plot.horizontal_axis(x_scale, _BOTTOM, _TOP, across.label),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, up.label, rise=32),
            text(4, _TOP - 12, " · ".join(filter(None, (up.note.strip(), f"better: {better}"))), "hint"),
            *_pareto_marks(points, x_scale, y_scale),
        ],
        [
            *(tag("p", report.unbroken(front)) for front in fronts),
            (f"Grey: {grey} that another configuration of the same workload beats in both means. " if grey else "")
            + "Crosses: 95 % t intervals; where they overlap, the order may be chance.",
        ],
        _pareto_table(points, across, up),
    ).render()


def _points(workload: int, entries: Iterable[Entry], across: _Axis, up: _Axis) -> list[_Point]:
    found = [
        (entry, x, y)
        for entry in entries
        if (x := entry.centre(across.metric)) is not None and (y := entry.centre(up.metric)) is not None
    ]
    signs = [1 if axis.is_less_better else -1 for axis in (across, up)]
    best = {*frontier([(signs[0] * x, signs[1] * y) for _, x, y in found])}
    return [
        _Point(entry, x, y, entry.span(across.metric), entry.span(up.metric), workload, index in best)
        for index, (entry, x, y) in enumerate(found)
    ]


def _fronts(best: Sequence[_Point]) -> Iterator[str]:
    fronts: dict[int, list[_Point]] = {}
    for point in best:
        fronts.setdefault(point.workload, []).append(point)
    for front in fronts.values():
        of = f" of {workload_of(front[0].entry.used[0])}" if len(fronts) > 1 else ""
        yield f"On the frontier{of}: {some_of([f'{it.entry.number} {it.entry.label}' for it in front], _NAMED)}."


def _extent(points: Iterable[tuple[float, tuple[float, float] | None]]) -> Iterator[float]:
    """What an axis must hold: every point, and of intervals what does not press all points into a corner."""
    known = list(points)
    centres = [centre for centre, _ in known]
    yield from centres
    low, high = min(centres) / 2, max(centres) * 2
    for _, span in known:
        if span is not None:
            yield max(span[0], low)
            yield min(span[1], high)


def _pareto_marks(points: Sequence[_Point], x_scale: Scale, y_scale: Scale) -> Iterator[Markup]:
    """Dominated points first, in few paths, so that a thousand stay small; the frontier above them."""

    def place(point: _Point) -> plot.Place:
        return x_scale(point.x), y_scale(point.y)

    def cross(point: _Point) -> str:
        x, y = place(point)
        lines = [_bar(x_scale(point.x_span[0]), y, x_scale(point.x_span[1]))] if point.x_span else []
        if point.y_span:
            lines.append(spot(x, y_scale(point.y_span[0]), f"V{plot.number_text(y_scale(point.y_span[1]))}"))
        return "".join(lines)

    grey = [point for point in points if not point.is_best]
    best = sorted((point for point in points if point.is_best), key=lambda point: point.x)
    yield marks(map(cross, grey), "span grey")
    for group in _groups(point.entry for point in grey):
        yield marks((spot(*place(point), plot.shape(group)) for point in grey if point.entry.group == group), "m grey")
    for workload in sorted({point.workload for point in best}):
        line = [place(point) for point in best if point.workload == workload]
        if len(line) > 1:
            yield marks([plot.line_to(*line)], "front")
    for point in best:
        group = point.entry.group
        tooltip = tag("title", f"{point.entry.number} {point.entry.name}")
        marker = marks([spot(*place(point), plot.shape(group))], "m")
        yield tag("g", tooltip, marks([cross(point)], "span"), marker, class_=f"g{group}")
    named = points if len(points) <= _NUMBERED else best[:_NUMBERED]
    yield from _numbers([(*place(point), str(point.entry.number)) for point in named], [*map(place, points)])


def _numbers(points: Iterable[tuple[float, float, str]], markers: Sequence[plot.Place]) -> Iterator[Markup]:
    """Numbers beside their points, each nearer to its own than to others; left out where there is no room."""
    taken: list[plot.Place] = []
    for x, y, number in points:
        half = 3.6 * len(number)
        for dx, dy in _SIDES:
            centre = (x + dx * (9 + half), y + dy * 13)
            reach = math.dist(centre, (x, y))
            is_clear = all(math.dist(centre, other) > reach + 2 for other in markers if other != (x, y))
            if is_clear and all(abs(centre[0] - a) > 2 * half + 3 or abs(centre[1] - b) > 13 for a, b in taken):
                taken.append(centre)
                yield text(centre[0], centre[1] + 4, number, "key", "middle")
                break


def _pareto_table(points: Sequence[_Point], across: _Axis, up: _Axis) -> Markup:
    columns = [
        counts("No.", (point.entry.number for point in points)),
        texts("Configuration", (point.entry.label for point in points)),
        quantities(across.label, ((point.x, None) for point in points)),
        _intervals(point.x_span for point in points),
        quantities(up.label, ((point.y, None) for point in points)),
        _intervals(point.y_span for point in points),
        texts("On the frontier", ("yes" if point.is_best else "no" for point in points)),
    ]
    return table_of(f"{up.label} against {across.label}", columns, row_head=1)


def _intervals(spans: Iterable[tuple[float, float] | None]) -> Cells:
    contents = [f"{format_quantity(span[0])} – {format_quantity(span[1])}" if span else "none" for span in spans]
    return Cells("95 % t interval", contents, is_number=True)


# --- rows of configurations: cycles and latency

_ROWS_TOP, _ROW = 14.0, 22.0
_PER_PLOT = 40

_Rows = Sequence[tuple[Entry, float]]


def _groups(entries: Iterable[Entry]) -> list[int]:
    return sorted({entry.group for entry in entries})


def _bar(begin: float, y: float, end: float) -> str:
    return spot(begin, y, f"H{plot.number_text(end)}")


def _paged(heading: str, entries: Sequence[Entry], draw: Callable[[str, _Rows, float], Plot]) -> list[Markup]:
    """The plot of the first configurations, and those of the others folded away behind it."""
    parts = []
    for at in range(0, len(entries), _PER_PLOT):
        page = entries[at : at + _PER_PLOT]
        rows = [(entry, _ROWS_TOP + _ROW * (index + 0.5)) for index, entry in enumerate(page)]
        drawn = draw(f"-{at // _PER_PLOT + 1}" if at else "", rows, _ROWS_TOP + _ROW * len(page)).render()
        label = f"{heading}: configurations {page[0].number} to {page[-1].number}"
        parts.append(plot.details(label, drawn) if at else drawn)
    return parts


# --- every cycle as a dot, and the interval over them

# Two drawings, one above the other: the values, and their distances from the configuration's mean, which would be
# invisible among the values of configurations that differ by much.
_BETWEEN, _SHARES_BEGIN, _REACH_MAX = 36.0, 40.0, 50.0


def cycles_section(report: Report) -> Markup:
    return tag("div", *(_cycles(metric, report) for metric in report.metrics), class_="pair")


def _cycles(metric: Metric, report: Report) -> Markup:
    identifier, heading = f"cycles-{metric.name}", f"{metric.label}, by cycle"
    label = f"{metric.label}, {'J' if metric is ENERGY else metric.unit}"
    readings = itertools.chain.from_iterable(entry.readings(metric) for entry in report.entries)
    values = [value for value, _ in readings if value is not None]
    if not values:
        return plot.no_plot(identifier, heading, "No result has a value.")
    begin = plot.label_room(_cycles_label(entry, metric) for entry in report.entries)
    reach = _reach(metric, report.entries)
    scales = (plot.fitting_scale(values, begin, plot.RIGHT), Scale(-reach, reach, _SHARES_BEGIN, plot.RIGHT))

    def draw(suffix: str, rows: _Rows, bottom: float) -> Plot:
        entries, below = [entry for entry, _ in rows], bottom + _BETWEEN
        caption = [
            "Dot: a valid cycle. ×: an invalid attempt, excluded; drawn at the edge when it is farther off.",
            "Bar: 95 % t interval. Tick: geometric mean.",
        ]
        if any(entry.is_estimate for entry in entries) and metric is ENERGY:
            caption.append("(est.): an estimate from the design power (TDP) of the CPU, not a measurement.")
        return Plot(
            identifier + suffix,
            heading,
            f"{plural(len(entries), 'configuration')} as rows, the values above and their difference from the mean "
            "below: a dot for every valid cycle, a diagonal cross for every invalid attempt, a bar for the t interval "
            "with a tick at the geometric mean.",
            (plot.WIDTH, bottom + below + 46),
            [
                plot.horizontal_axis(scales[0], bottom, _ROWS_TOP, label, count=4),
                plot.horizontal_axis(scales[1], bottom + below, _ROWS_TOP + below, "Difference from its mean, %"),
                plot.row_labels([(entry.number, _cycles_label(entry, metric), y) for entry, y in rows], begin),
                plot.row_labels([(entry.number, "", y + below) for entry, y in rows], begin),
                *_cycles_marks(metric, rows, *scales, below),
            ],
            caption,
            _cycles_table(metric, label, entries),
        )

    return tag("div", *_paged(heading, report.entries, draw))


def _cycles_label(entry: Entry, metric: Metric) -> str:
    return f"{entry.label} (est.)" if entry.is_estimate and metric is ENERGY else entry.label


def _reach(metric: Metric, entries: Sequence[Entry]) -> float:
    found = [1.0]
    for entry in entries:
        centre, span = entry.centre(metric), entry.span(metric)
        if centre:
            known = [*entry.measured(metric, is_used=True), *(span or ())]
            found += [abs(100 * (value / centre - 1)) for value in known]
    return min(1.08 * max(found), _REACH_MAX)


def _cycles_marks(metric: Metric, rows: _Rows, values: Scale, shares: Scale, below: float) -> Iterator[Markup]:
    """Bars, ticks, dots and crosses, one path for each group: a thousand rows must take few bytes."""
    bars: dict[int, list[str]] = {group: [] for group in _groups(entry for entry, _ in rows)}
    dots: dict[int, list[str]] = {group: [] for group in bars}
    ticks: list[str] = []
    crosses: list[str] = []
    remarks: list[Markup] = []
    for entry, y in rows:
        counted, left_out = (entry.measured(metric, is_used=is_used) for is_used in (True, False))
        centre, span = entry.centre(metric), entry.span(metric)
        dots[entry.group] += plot.spots(map(values, counted), y, plot.DOT)
        crosses += plot.spots(map(values, left_out), y, plot.CROSS)
        if centre is None:
            remark = "no geometric mean" if counted else "not measured" if entry.used else "no valid result"
            remarks.append(text(shares.begin + 8, y + below + 4, remark, "absent"))
            continue
        dots[entry.group] += plot.spots([shares(100 * (value / centre - 1)) for value in counted], y + below, plot.DOT)
        crosses += plot.spots([shares(100 * (value / centre - 1)) for value in left_out], y + below, plot.CROSS)
        ticks += [spot(values(centre), y - 8, plot.TICK), spot(shares(0), y + below - 8, plot.TICK)]
        if span:
            low, high = ([values(end), shares(100 * (end / centre - 1))] for end in span)
            bars[entry.group] += [_bar(low[0], y, high[0]), _bar(low[1], y + below, high[1])]
    for group, own in bars.items():
        yield marks(own, f"bar g{group}")
        yield marks(dots[group], f"dots g{group}")
    yield marks(ticks, "mean")
    yield marks(crosses, "out")
    yield from remarks


def _cycles_table(metric: Metric, label: str, entries: Sequence[Entry]) -> Markup:
    rows = [
        (entry.number, _cycles_label(entry, metric), record.identity, "yes" if it else _why_left_out(record))
        for entry in entries
        for record, it in zip(entry.records, entry.are_used, strict=True)
    ]
    columns = [
        counts("No.", (number for number, *_ in rows)),
        texts("Configuration", (name for _, name, _, _ in rows)),
        counts("Cycle", (identity.cycle_index + 1 for _, _, identity, _ in rows)),
        counts("Attempt", (identity.attempt for _, _, identity, _ in rows)),
        quantities(label, itertools.chain.from_iterable(entry.readings(metric) for entry in entries)),
        texts("Counts", (is_used for *_, is_used in rows)),
    ]
    return table_of(f"{label}, every attempt", columns, row_head=1)


def _why_left_out(record: Record) -> str:
    return "no" if record.validity.valid else "no, invalid"


# --- latency: the percentiles of every configuration

_DRAWN = 200  # of more configurations the others are in a table alone
_LEVELS = ("p50", "p90", "p95", "p99")
_LATENCY_KEY = "Tick: median. Bars, thick to thin: to p90, p95, p99. Ring: mean. Small dots: the median of each cycle."

_Percentiles = Mapping[str, float]


def latency_section(report: Report) -> Markup:
    parts, absences = [], []
    # Thousands of results share few of them.
    null_reasons = {id(whys): whys for whys in (record.latency.null_reasons for record in report.records)}.values()
    for short, name in READABLE_LATENCIES.items():
        kind = f"{short}_s"
        is_recorded = not all(kind in whys for whys in null_reasons)
        found = {entry.number: _percentiles(entry, kind) if is_recorded else {} for entry in report.entries}
        if any(found.values()):
            parts.append(_latency(kind, name, report.entries, found))
        elif short in LATENCIES:
            reasons = (whys.get(kind) for whys in null_reasons)
            reason = "; ".join(dict.fromkeys(reason.text for reason in reasons if reason)) or "no valid result"
            absences.append(tag("p", f"{name}: not measured: {reason}"))
    if not parts:
        parts.append(plot.no_plot("latency", "Latency percentiles", "No latency was measured."))
    left_out = tag("div", *absences, class_="absent") if absences else Markup()
    return join([tag("div", *parts, class_="pair"), left_out])


def _distributions(entry: Entry, kind: str) -> list[Distribution]:
    return [value for record in entry.used if (value := getattr(record.latency, kind)) is not None]


def _percentiles(entry: Entry, kind: str) -> _Percentiles:
    if not (distributions := _distributions(entry, kind)):
        return {}
    each = {level: [getattr(item, level) for item in distributions] for level in ("mean", *_LEVELS)}
    return {level: mean_of(values) for level, values in each.items() if None not in values}


def _latency(kind: str, name: str, entries: Sequence[Entry], found: Mapping[int, _Percentiles]) -> Markup:
    values = [value for item in found.values() for value in item.values()]
    scale = plot.fitting_scale(values, plot.label_room(entry.label for entry in entries), plot.RIGHT)

    def draw(suffix: str, rows: _Rows, bottom: float) -> Plot:
        page = [entry for entry, _ in rows]
        return Plot(
            f"latency-{kind.removesuffix('_s')}{suffix}",
            name,
            f"{plural(len(page), 'configuration')} as rows: a tick at the median, bars that get thinner at the 90th, "
            "95th and 99th percentile, a ring at the mean, a small dot for the median of each cycle.",
            (plot.WIDTH, bottom + 46),
            [
                plot.horizontal_axis(scale, bottom, _ROWS_TOP, f"{name}, s", count=5),
                plot.row_labels([(entry.number, entry.label, y) for entry, y in rows], scale.begin),
                *_latency_marks([(entry, found[entry.number], y) for entry, y in rows], kind, scale),
            ],
            [
                _LATENCY_KEY,
                "p95 needs {p95} different prompts, p99 {p99}. Geometric means over the cycles.".format_map(
                    PROMPTS_NEEDED
                ),
            ],
            _latency_table(name, kind, page, found),
            heading=f"{name}, percentiles",
        )

    parts = _paged(name, entries[:_DRAWN], draw)
    if others := entries[_DRAWN:]:
        label = f"{name}: configurations {others[0].number} to {others[-1].number}, as a table only"
        parts.append(plot.details(label, plot.scroller(label, _latency_table(name, kind, others, found))))
    return tag("div", *parts)


def _latency_marks(rows: Sequence[tuple[Entry, _Percentiles, float]], kind: str, scale: Scale) -> Iterator[Markup]:
    """Bars, medians, means and the median of each cycle, one path for each group and thickness."""
    for group in _groups(entry for entry, _, _ in rows):
        for low, high in itertools.pairwise(_LEVELS):
            parts = [
                _bar(scale(found[low]), y, scale(found[high]))
                for entry, found, y in rows
                if entry.group == group and low in found and high in found
            ]
            if parts:
                yield marks(parts, f"g{group} to-{high}")
    known = [row for row in rows if "p50" in row[1]]
    yield marks((spot(scale(found["p50"]), y - 8, plot.TICK) for _, found, y in known), "mean")
    medians = ((scale(item.p50), y) for entry, _, y in known for item in _distributions(entry, kind))
    yield marks((spot(x, y, plot.DOT) for x, y in medians), "dots small")
    yield marks((spot(scale(found["mean"]) - 3.4, y, plot.RING) for _, found, y in known if "mean" in found), "ring")
    for entry, found, y in rows:
        if "p50" not in found:
            yield text(scale.begin + 8, y + 4, "not measured" if entry.used else "no valid result", "absent")


def _latency_table(name: str, kind: str, entries: Sequence[Entry], found: Mapping[int, _Percentiles]) -> Markup:
    def percentile(heading: str, level: str) -> Cells:
        known = (found[entry.number].get(level) for entry in entries)
        contents = [
            plot.absent(_why_absent(entry, kind, level)) if value is None else escape(format_latency(value))
            for entry, value in zip(entries, known, strict=True)
        ]
        return Cells(heading, contents, is_number=True)

    requests = ([item.n for item in _distributions(entry, kind)] for entry in entries)
    columns = [
        counts("No.", (entry.number for entry in entries)),
        texts("Configuration", (entry.label for entry in entries)),
        percentile("Mean", "mean"),
        *(percentile(level, level) for level in _LEVELS),
        Cells("Requests", [str(sum(each)) if each else "none" for each in requests], is_number=True),
    ]
    return table_of(f"{name}, percentiles", columns, row_head=1)


def _why_absent(entry: Entry, kind: str, level: str) -> Reason | None:
    of_level = (item.null_reasons.get(level) for item in _distributions(entry, kind))
    of_kind = (record.latency.null_reasons.get(kind) for record in entry.records)
    return next(filter(None, (*of_level, *of_kind)), None)
