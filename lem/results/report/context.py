"""The plots of what surrounds the numbers: the grid, the order of execution, power and temperature over time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter

from lem.base import measurement
from lem.base.dataclass import dataclass, replace
from lem.base.units import format_duration, format_quantity, plural
from lem.record import Record
from lem.results.metrics import Metric
from lem.results.report import content, plot
from lem.results.report.content import NOT_GIVEN, Entry, Phase, Report, Trace
from lem.results.report.plot import (
    GROUPS_MAX,
    Cells,
    Markup,
    Number,
    Plot,
    Row,
    Scale,
    counts,
    join,
    marks,
    number,
    quantities,
    spot,
    table,
    table_of,
    tag,
    text,
    texts,
)
from lem.results.run import ENERGY
from lem.results.trends import DRIFT_FLAGGED, FALSE_ALARMS, change_of, course_of, without_means

# --- the headline metric over two axes of the grid

_CELL_WIDTH, _CELL_HEIGHT, _GRID_TOP = 74.0, 34.0, 76.0
_FACETS = 6
_HALF_PAGE = 600


@dataclass(frozen=True)
class _Square:
    members: Sequence[Entry]
    best: float | None  # of the members' values

    @property
    def is_partial(self) -> bool:
        return self.best is not None and any(
            entry.configuration.n_invalid + entry.configuration.n_failed for entry in self.members
        )

    @property
    def text(self) -> str:
        if self.best is not None:
            return format_quantity(self.best)
        if not self.members:
            return "not in the grid"
        return "no value" if any(entry.used for entry in self.members) else "failed"


@dataclass(frozen=True)
class _Grid:
    across: str
    up: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    scale: Scale


def heatmap_section(report: Report) -> Markup:
    entries = [entry for entry in report.entries if entry.settings]
    settings = [entry.settings for entry in entries]
    heading = f"{'Energy per output token' if report.has_energy else 'Output throughput'} over the grid"
    values_of = content.values_by_setting(settings)
    axes = content.grid_axes(values_of, settings)
    if axes is None:
        reason = "Fewer than two settings vary, so there is no grid to draw."
        long = [f"{key} has {len(them)} values" for key, them in values_of.items() if len(them) > content.AXIS_MOST]
        if long:
            why = f"an axis has at most {content.AXIS_MOST}, and fewer than two other settings vary"
            reason = f"No grid to draw: {', '.join(long)}; {why}."
        return plot.no_plot("grid", heading, reason)
    known = [value for entry in entries if (value := entry.centre(report.headline)) is not None]
    if not known:
        return plot.no_plot("grid", heading, "No configuration has a valid result.")
    across, up, *others = axes
    grid = _Grid(across, up, values_of[across], values_of[up], plot.fitting_scale((min(known), max(known)), 0.0, 1.0))
    facets: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        facets.setdefault(tuple(entry.settings.get(key, NOT_GIVEN) for key in others), []).append(entry)
    if len(facets) > _FACETS:
        facets = {(): entries}
    figures = []
    for place, (chosen, members) in enumerate(sorted(facets.items()), 1):
        where = ", ".join(f"{_short(key)} {value}" for key, value in zip(others, chosen, strict=False))
        identifier = f"grid-{place}" if len(facets) > 1 else "grid"
        figures.append(_heatmap(identifier, f"{heading}: {where}" if where else heading, grid, members, report))
    return tag("div", *figures, class_="pair" if len(figures) > 1 else None)


def _heatmap(identifier: str, heading: str, grid: _Grid, members: Sequence[Entry], report: Report) -> Markup:
    by_place: dict[tuple[str, str], list[Entry]] = {}
    for entry in members:
        key = (entry.settings.get(grid.across, NOT_GIVEN), entry.settings.get(grid.up, NOT_GIVEN))
        by_place.setdefault(key, []).append(entry)
    squares = {}
    for key, found in by_place.items():
        values = [value for entry in found if (value := entry.centre(report.headline)) is not None]
        squares[key] = _Square(found, (min if report.has_energy else max)(values, default=None))
    across, up = _short(grid.across), _short(grid.up)
    left = 20 + 8.4 * max(min(len(value), 22) for value in grid.rows)
    names_width = plot.AXIS_LETTER_WIDTH * (max(len(across), len(up)) + 2)
    width = max(left + _CELL_WIDTH * len(grid.columns) + 4, names_width, 280)
    unit = f"J per output token{report.estimate_note}" if report.has_energy else "output tok/s"
    what = "energy" if report.has_energy else "throughput"
    caption = [f"Geometric means, {unit}; darker means more. Hatched: every attempt failed or was invalid."]
    crowd = max(map(len, by_place.values()))
    if crowd > 1:
        caption.append(f"Up to {plural(crowd, 'configuration')} share a cell, which shows the best of them.")
    if any(square.is_partial for square in squares.values()):
        caption.append("†: some attempts in this cell failed or were invalid.")
    rows: list[Row] = []
    for row in grid.rows:
        found_here = [squares.get((column, row), _Square((), None)) for column in grid.columns]
        rows.append([row, *(number(it.text) for it in found_here)])
    return Plot(
        identifier,
        heading,
        f"{across} across, {up} down; darker means more {what}; hatched cells have no valid result.",
        (width, _GRID_TOP + _CELL_HEIGHT * len(grid.rows) + 12),
        _squares(identifier, grid, squares, left),
        caption,
        table(f"{up} down, {across} across", [f"{up} \\ {across}", *grid.columns], rows),
        class_="plot small",
        is_wide=width > _HALF_PAGE,
    ).render()


def _squares(identifier: str, grid: _Grid, squares: Mapping[tuple[str, str], _Square], left: float) -> Iterator[Markup]:
    hatch = marks(["M-2 2L2 -2M0 8L8 0M6 10L10 6"], "hatch")
    name = f"{identifier}-hatch"
    yield tag("defs", tag("pattern", hatch, id=name, width="8", height="8", patternUnits="userSpaceOnUse"))
    yield text(2, 18, f"{_short(grid.across)} →", "axis")
    yield text(2, 40, f"{_short(grid.up)} ↓", "axis")
    for column, value in enumerate(grid.columns):
        yield text(left + _CELL_WIDTH * (column + 0.5), _GRID_TOP - 10, _clip(value, 11), anchor="middle")
    for row, up in enumerate(grid.rows):
        y = _GRID_TOP + _CELL_HEIGHT * row
        yield text(left - 10, y + _CELL_HEIGHT / 2 + 4, _clip(up, 22), anchor="end")
        for column, across in enumerate(grid.columns):
            yield _square(squares.get((across, up)), left + _CELL_WIDTH * column, y, name, grid.scale)


def _square(square: _Square | None, x: float, y: float, hatch: str, scale: Scale) -> Markup:
    def box(class_: str | None = None, fill: str | None = None) -> Markup:
        return tag("rect", x=x, y=y, width=_CELL_WIDTH - 2, height=_CELL_HEIGHT - 2, class_=class_, fill=fill)

    if square is None:
        return box("empty")
    middle = (x + (_CELL_WIDTH - 2) / 2, y + (_CELL_HEIGHT - 2) / 2 + 4)
    tooltip = tag("title", ", ".join(f"{entry.number} {entry.name}" for entry in square.members[:4]))
    if square.best is None:
        plate = tag("rect", x=middle[0] - 28, y=middle[1] - 13, width=56, height=18, class_="plate")
        return tag("g", tooltip, box("failed", f"url(#{hatch})"), plate, text(*middle, square.text, anchor="middle"))
    fill, ink = plot.shade(scale(square.best))
    is_short = 1e-3 <= abs(square.best) < 1000
    shown = f"{square.best:#.3g}".rstrip(".") if is_short else square.text
    return tag("g", tooltip, box(fill=fill), text(*middle, shown + "†" * square.is_partial, ink, "middle"))


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _clip(value: str, width: int) -> str:
    tail = value.rpartition("/")[2]
    return tail if len(tail) <= width else f"{tail[: width - 1]}…"


# --- the metrics in the order of execution: whether the machine changed during the campaign

_ORDER_HEIGHT, _ORDER_TOP, _ORDER_BOTTOM = 300.0, 34.0, 252.0


def order_section(report: Report) -> Markup:
    orders = {record.identity.key: number for number, record in enumerate(report.records, 1)}
    results = [
        (orders[record.identity.key], record.identity.cycle_index + 1, entry, record)
        for entry in report.entries
        for record in entry.used
    ]
    results.sort(key=itemgetter(0))
    return tag("div", *(_order(metric, results, report) for metric in report.metrics), class_="pair")


def _order(metric: Metric, results: Iterable[tuple[int, int, Entry, Record]], report: Report) -> Markup:
    name, identifier = metric.label, f"order-{metric.name}"
    heading = f"{name} in the order of execution"
    found = [
        (place, cycle, entry, value)
        for place, cycle, entry, record in results
        if (value := metric.read(record)[0]) is not None and value > 0
    ]
    drift = course_of(report.run, metric).drift
    if drift is None:
        reason = "There are no two cycles with a value, so nothing can be compared over time."
        return plot.no_plot(identifier, heading, reason)
    places, cycles, entries, values = zip(*found, strict=True)
    numbers = [entry.number for entry in entries]
    shares = [100 * change_of(log) for log in without_means([*map(math.log, values)], numbers)]
    flagged = 100 * DRIFT_FLAGGED
    reach = max(flagged, *map(abs, shares)) * 1.1
    x_scale = Scale(0, places[-1] + 1, plot.LEFT, plot.RIGHT)
    y_scale = Scale(-reach, reach, _ORDER_BOTTOM, _ORDER_TOP)
    top, bottom, half = y_scale(flagged / 2), y_scale(-flagged / 2), 100 * drift.change / 2
    fitted = [(x_scale(places[0]), y_scale(-half)), (x_scale(places[-1]), y_scale(half))]
    dots: dict[int, list[str]] = {entry.group: [] for entry in entries}
    for entry, x, y in zip(entries, map(x_scale, places), map(y_scale, shares), strict=True):
        dots[entry.group].append(spot(x, y, plot.DOT))
    columns = [
        counts("Position", places),
        counts("No.", numbers),
        texts("Configuration", (entry.label for entry in entries)),
        counts("Cycle", cycles),
        quantities(name, ((value, None) for value in values)),
        Cells("Difference", [f"{share:+.2f}\u00a0%" for share in shares], is_number=True),
    ]
    chance = "" if drift.is_significant or drift.ci_lower is None else "; this may be chance"
    note = report.estimate_note if metric is ENERGY else ""
    finding = f"{name}{note} {drift.moved} from the first experiment to the last ({drift.interval}{chance})."
    return Plot(
        identifier,
        heading,
        f"{plural(len(values), 'valid value')} in percent of their configuration's mean, with a fitted line. {finding}",
        (plot.WIDTH, _ORDER_HEIGHT),
        [
            tag("rect", x=plot.LEFT, y=top, width=plot.RIGHT - plot.LEFT, height=bottom - top, class_="band window"),
            plot.horizontal_axis(x_scale, _ORDER_BOTTOM, _ORDER_TOP, "Position in the order of execution", count=5),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, "Difference from its configuration's mean, %", count=5),
            *(marks(dots[group], f"dots g{group}") for group in sorted(dots)),
            marks([plot.line_to(*fitted)], "front"),
        ],
        [
            tag("p", tag("span", "flagged", class_="tag bad") if drift.is_found else "", finding),
            (
                f"Flagged when the line rises or falls by more than the height of the shaded band, {flagged:g} %, and "
                f"the interval does not contain 0: in at most {100 * FALSE_ALARMS:g} % of campaigns without drift."
            ),
        ],
        table_of(heading, columns),
    ).render()


# --- power and temperature over time of some experiments

_TRACE_TOP, _PANEL_GAP = 56.0, 46.0
_UNFOLDED = 4
_GAP = "gap"
_PHASES = {
    measurement.IDLE_BARE: "idle, bare",
    measurement.IDLE_LOADED: "idle, loaded",
    measurement.WARMUP: "warm-up",
    measurement.IDLE_POST: "idle, after",
}  # other phases are called as they are
_SHADES = {
    f"band {measurement.LOAD}": "load",
    f"band {measurement.IDLE_LOADED}": "idle",
    f"band {measurement.WARMUP}": "warm-up",
    f"band {measurement.GUARD_BEFORE}": "guard",
    f"band {measurement.WINDOW}": "window",
    f"band {_GAP}": "gap",
    "slowdown fault": "throttled",
    "slowdown cap": "at the power limit",
}


def traces_section(report: Report) -> Markup:
    notes = [tag("p", f"Not shown: {note}", class_="absent") for note in report.unread]
    traces = [(record, trace) for record, trace in report.traces if _moments(trace)]
    if not traces:
        reason = "No experiment has a sample log: no meter ran, or timeseries.save is off."
        if report.n_logs:
            found = "contains power or temperature" if report.traces else "can be read"
            reason = f"None of the sample logs {found}."
        return join([plot.no_plot("trace", "Power and temperature over time", reason), *notes])
    figures = [_trace(f"trace-{number}", record, trace) for number, (record, trace) in enumerate(traces, 1)]
    parts: list[Markup] = []
    if len(figures) < report.n_logs:
        order = "the invalid and throttled ones first, then one cycle of each configuration in the order of the table"
        parts.append(tag("p", f"{len(figures)} of {report.n_logs} experiments with a sample log: {order}."))
    swatch = partial(tag, "rect", x=1.0, y=1.0, width=12.0, height=12.0)
    parts.append(plot.legend((swatch(class_=class_), name) for class_, name in _SHADES.items()))
    parts.append(tag("div", *figures[:_UNFOLDED], class_="pair"))
    if more := figures[_UNFOLDED:]:
        parts.append(plot.details(plural(len(more), "more experiment"), tag("div", *more, class_="pair")))
    return join([*parts, *notes])


def _moments(trace: Trace) -> list[float]:
    return [point[0] for series in (*trace.power, *trace.temperature) for point in series.points if point]


def _trace(identifier: str, record: Record, trace: Trace) -> Markup:
    identity, gap_s = record.identity, record.window.gap_s
    attempt = f", attempt {identity.attempt}" if identity.attempt > 1 else ""
    validity = "" if record.validity.valid else " (invalid)"
    heading = f"{identity.config_name}, cycle {identity.cycle_index + 1}{attempt}{validity}"
    phases = trace.phases
    if gap_s and phases:  # it was before the log began
        phases = (Phase(_GAP, phases[0].begin_s - gap_s, phases[0].begin_s), *phases)
    end = max([*(phase.end_s for phase in phases), *_moments(trace)], default=0.0)
    begin = min((phase.begin_s for phase in phases), default=0.0)
    time = Scale(begin, max(end, begin + 1), plot.LEFT, plot.RIGHT)
    panels, bottom = _panels(trace, time)
    faults = trace.slowed_s
    lines = [item.label for item in trace.power or trace.temperature]
    return Plot(
        identifier,
        heading,
        f"Power{' and temperature' if trace.temperature else ''} over {format_duration(end - begin)}: "
        + ", ".join(f"{_phase(phase)} {format_duration(phase.end_s - phase.begin_s)}" for phase in phases)
        + (f"; throttled in {plural(len(faults), 'period')}" if faults else "; not throttled"),
        (plot.WIDTH, bottom + 44),
        [
            *_shades(phases, time, bottom),
            *panels,
            *_slowdowns(trace, time, bottom),
            plot.horizontal_axis(time, bottom, bottom, "Time, s", count=5),
        ],
        [
            plot.legend(((marks(["M0 7h28"], f"line g{n % GROUPS_MAX}"), name) for n, name in enumerate(lines)), 28),
            *_trace_caption(record, trace),
        ],
        _trace_table(phases),
    ).render()


def _phase(phase: Phase) -> str:
    return "guard" if "guard" in phase.name else _PHASES.get(phase.name, phase.name)


def _panels(trace: Trace, time: Scale) -> tuple[list[Markup], float]:
    panels: list[Markup] = []
    bottom = _TRACE_TOP
    for lines, label, height, count in (
        (trace.power, "Power, W", 170.0, 4),
        (trace.temperature, "Temperature, °C", 90.0, 3),
    ):
        values = [point[1] for item in lines for point in item.points if point]
        if not values:
            continue
        top = bottom + (_PANEL_GAP if panels else 0.0)
        rise = 16.0 if panels else 24.0  # above the first panel are the names of the phases
        bottom = top + height
        scale = replace(plot.fitting_scale(values, bottom, top, is_from_zero=lines is trace.power), is_log=False)
        axis = plot.vertical_axis(scale, plot.LEFT, plot.RIGHT, label, count=count, rise=rise)
        paths = []
        for index, item in enumerate(lines):
            strokes = (list(points) for is_there, points in itertools.groupby(item.points, bool) if is_there)
            drawn = [plot.line_to(*((time(at[0]), scale(at[1])) for at in points if at)) for points in strokes]
            paths.append(marks(drawn, f"line g{index % GROUPS_MAX}"))
        panels.append(join([axis, *paths]))
    return panels, bottom


def _shades(phases: Sequence[Phase], time: Scale, bottom: float) -> Iterator[Markup]:
    free_from = 0.0
    for phase in phases:
        left, right = time(phase.begin_s), time(phase.end_s)
        label, width = _phase(phase), max(right - left, 0.5)
        class_ = f"band {'guard_before' if 'guard' in phase.name else phase.name.partition('_post')[0]}"
        yield tag("rect", x=left, y=_TRACE_TOP - 18, width=width, height=bottom - _TRACE_TOP + 18, class_=class_)
        middle, half = (left + right) / 2, 3.4 * len(label)
        if width > 2 * half and middle - half > free_from:
            free_from = middle + half + 4
            yield text(middle, _TRACE_TOP - 6, label, "hint", "middle")


def _slowdowns(trace: Trace, time: Scale, bottom: float) -> Iterator[Markup]:
    for slowdown in trace.slowdowns:
        left, right = time(slowdown.begin_s), time(slowdown.end_s)
        class_, y = ("slowdown fault", _TRACE_TOP - 2) if slowdown.is_fault else ("slowdown cap", _TRACE_TOP + 5)
        bar = tag("rect", x=left, y=y, width=max(right - left, 1.5), height=5.0, class_=class_)
        yield tag("g", tag("title", f"{slowdown.reason}, {format_duration(slowdown.end_s - slowdown.begin_s)}"), bar)
        if slowdown.is_fault:
            yield marks([spot(left, _TRACE_TOP, f"V{plot.number_text(bottom)}")], "fault-line")


def _trace_caption(record: Record, trace: Trace) -> Iterator[str]:
    reasons: dict[str, float] = {}
    for slowdown in trace.slowdowns:
        reasons[slowdown.reason] = reasons.get(slowdown.reason, 0.0) + slowdown.end_s - slowdown.begin_s
    for reason, length_s in sorted(reasons.items()):
        yield f"{reason.capitalize()}: {format_duration(length_s)}."
    window = record.window
    if window.gap_s and trace.phases:
        why = f": {window.gap_end_reason}" if window.gap_end_reason else ""
        yield f"The gap before it lasted {format_duration(window.gap_s)}{why}."
    yield f"Sampled every {format_duration(trace.interval_s)}; the lines are thinned, peaks are kept."


def _trace_table(phases: Iterable[Phase]) -> Markup:
    rows: list[Row] = []
    for phase in phases:
        low, high = phase.temp_min_c, phase.temp_max_c
        span = plot.NOT_MEASURED if low is None or high is None else f"{low:.0f} – {high:.0f}"
        numbers = (phase.begin_s, phase.end_s - phase.begin_s, phase.power_mean_w, phase.power_max_w)
        rows.append([_phase(phase), *map(_decimal, numbers), number(span), _decimal(phase.throttled_s)])
    head = ["Phase", "Start, s", "Length, s", "Mean power, W", "Maximum power, W", "Temperature, °C", "Throttled, s"]
    return table("Power and temperature by phase", head, rows)


def _decimal(value: float | None) -> Number:
    return number(plot.NOT_MEASURED if value is None else f"{value:.1f}")
