"""Power and temperature over time of some experiments, with what happened when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lem.base import measurement, units
from lem.base.units import plural
from lem.record import Record
from lem.results.report.content import Report
from lem.results.report.markup import NOT_MEASURED, Cell, Markup, details, join, number_text, table, tag
from lem.results.report.plot import (
    POWER,
    TEMPERATURE,
    Band,
    Scale,
    Series,
    Trace,
    figure,
    fitting_scale,
    horizontal_axis,
    key_list,
    line_legend,
    no_figure,
    plot,
    swatch,
    text,
    vertical_axis,
)

_WIDTH, _LEFT, _RIGHT, _TOP = 640.0, 58.0, 626.0, 56.0
_POWER_HEIGHT, _TEMPERATURE_HEIGHT, _BETWEEN = 170.0, 90.0, 46.0
_FIRST = 4
_NAMES = {
    measurement.IDLE_BARE: "idle, bare",
    measurement.LOAD: "load",
    measurement.IDLE_LOADED: "idle, loaded",
    measurement.WARMUP: "warm-up",
    measurement.GUARD_BEFORE: "guard",
    measurement.WINDOW: "window",
    measurement.GUARD_AFTER: "guard",
    measurement.PREFILL_GUARD_BEFORE: "guard",
    measurement.PREFILL: "prefill",
    measurement.PREFILL_GUARD_AFTER: "guard",
    measurement.IDLE_POST: "idle, after",
    "gap": "gap",
}


def traces_section(report: Report) -> Markup:
    """A plot for each experiment chosen, the first of them unfolded."""
    notes = [tag("p", f"Not shown: {note.path}: {note.message}", class_="absent") for note in report.trace_notes]
    if not report.traces:
        reason = "No experiment has a sample log: no meter ran, or timeseries.save is off."
        if report.n_logs:
            reason = "None of the sample logs can be read."
        return join([no_figure("trace", "Power and temperature over time", reason), *notes])
    figures = [_figure(number, record, trace) for number, (record, trace) in enumerate(report.traces, 1)]
    chosen = ""
    if len(figures) < report.n_logs:
        chosen = (
            f"{len(figures)} of {report.n_logs} experiments with a sample log: the invalid and throttled ones first, "
            "then one cycle of each configuration in the order of the table."
        )
    folded = details(
        f"{plural(len(figures) - _FIRST, 'more experiment')}", tag("div", *figures[_FIRST:], class_="pair")
    )
    parts = [tag("p", chosen) if chosen else Markup(), _key(), tag("div", *figures[:_FIRST], class_="pair")]
    return join([*parts, folded if len(figures) > _FIRST else Markup(), *notes])


def _key() -> Markup:
    """What the shades mean."""
    items: list[tuple[Markup, str]] = []
    for name, label in (
        (measurement.LOAD, "load"),
        (measurement.IDLE_LOADED, "idle"),
        (measurement.WARMUP, "warm-up"),
        (measurement.GUARD_BEFORE, "guard"),
        (measurement.WINDOW, "window"),
        ("gap", "gap"),
    ):
        items.append((_shade(f"band {name}"), label))
    items.append((_shade("spell fault"), "throttled"))
    items.append((_shade("spell cap"), "at the power limit"))
    return key_list(items)


def _shade(class_: str) -> Markup:
    return swatch(tag("rect", x=1.0, y=1.0, width=12.0, height=12.0, class_=class_))


def _figure(number: int, record: Record, trace: Trace) -> Markup:
    identity = record.identity
    attempt = f", attempt {identity.attempt}" if identity.attempt > 1 else ""
    validity = "" if record.validity.valid else " (invalid)"
    heading = f"{identity.config_name}, cycle {identity.cycle_index + 1}{attempt}{validity}"
    power = [series for series in trace.series if series.quantity == POWER]
    temperature = [series for series in trace.series if series.quantity == TEMPERATURE]
    bands = _with_gap(trace.bands, record.window.gap_s)
    end = max(
        [band.end_s for band in bands] + [point[0] for series in trace.series for point in series.points if point]
    )
    begin = min(band.begin_s for band in bands) if bands else 0.0
    time = Scale(begin, max(end, begin + 1), _LEFT, _RIGHT)
    bottom = _TOP
    panels: list[Markup] = []
    for series, quantity, height in (
        (power, "Power, W", _POWER_HEIGHT),
        (temperature, "Temperature, °C", _TEMPERATURE_HEIGHT),
    ):
        if any(point for item in series for point in item.points):
            top = bottom if not panels else bottom + _BETWEEN
            bottom = top + height
            panels.append(_panel(series, quantity, time, top, bottom, is_from_zero=series is power))
    if not panels:
        return no_figure(f"trace-{number}", heading, "Its sample log holds no power and no temperature.")
    identifier = f"trace-{number}"
    drawing = plot(
        identifier,
        heading,
        f"Power{' and temperature' if temperature else ''} over {units.format_duration(end - begin)}: "
        + ", ".join(f"{_name(band.name)} {units.format_duration(band.end_s - band.begin_s)}" for band in bands)
        + (f"; throttled in {plural(len(trace.slowed_s), 'spell')}" if trace.slowed_s else "; not throttled"),
        (_WIDTH, bottom + 44),
        *_bands(bands, time, bottom),
        *panels,
        *_spells(trace, time, bottom),
        horizontal_axis(time, bottom, bottom, "Time, s", count=8),
    )
    names = line_legend([item.label for item in power or temperature])
    return figure(identifier, heading, drawing, [names, *_caption(record, trace, bands)], _data(trace, bands))


def _with_gap(bands: Sequence[Band], gap_s: float | None) -> tuple[Band, ...]:
    """The bands with the gap before them, which was waited for before the log began."""
    if not gap_s or not bands:
        return tuple(bands)
    begin = bands[0].begin_s
    return (Band("gap", begin - gap_s, begin), *bands)


def _name(mark: str) -> str:
    return _NAMES.get(mark, mark)


def _bands(bands: Sequence[Band], time: Scale, bottom: float) -> Iterable[Markup]:
    """Shades behind the lines, named above where there is room."""
    free_from = 0.0
    for band in bands:
        left, right = time(band.begin_s), time(band.end_s)
        label, width = _name(band.name), max(right - left, 0.5)
        class_ = f"band {'guard_before' if 'guard' in band.name else band.name.partition('_post')[0]}"
        yield tag("rect", x=left, y=_TOP - 18, width=width, height=bottom - _TOP + 18, class_=class_)
        middle, half = (left + right) / 2, 3.4 * len(label)
        if width > 2 * half and middle - half > free_from:
            free_from = middle + half + 4
            yield text(middle, _TOP - 6, label, "hint", "middle")


def _panel(
    series: Sequence[Series], label: str, time: Scale, top: float, bottom: float, *, is_from_zero: bool
) -> Markup:
    values = [point[1] for item in series for point in item.points if point]
    scale = fitting_scale(values, bottom, top, is_from_zero=is_from_zero)
    scale = Scale(scale.low, scale.high, scale.begin, scale.end)
    lines = [tag("path", d=_line(item, time, scale), class_=f"line g{index % 8}") for index, item in enumerate(series)]
    axis = vertical_axis(scale, _LEFT, _RIGHT, "", count=4 if is_from_zero else 3)
    y = top - 24 if top == _TOP else top - 16
    return join([axis, text(4, y, label, "axis"), *lines])


def _line(series: Series, time: Scale, scale: Scale) -> str:
    parts, is_pen_up = [], True
    for point in series.points:
        if point is None:
            is_pen_up = True
            continue
        parts.append(f"{'M' if is_pen_up else 'L'}{number_text(time(point[0]))} {number_text(scale(point[1]))}")
        is_pen_up = False
    return "".join(parts)


def _spells(trace: Trace, time: Scale, bottom: float) -> Iterable[Markup]:
    """A bar at the top of the plot for each time the GPU was slowed down."""
    for spell in trace.spells:
        left, right = time(spell.begin_s), time(spell.end_s)
        kind = "fault" if spell.is_fault else "cap"
        bar = tag(
            "rect",
            x=left,
            y=_TOP - 2 if spell.is_fault else _TOP + 5,
            width=max(right - left, 1.5),
            height=5.0,
            class_=f"spell {kind}",
        )
        yield tag("g", tag("title", f"{spell.reason}, {units.format_duration(spell.end_s - spell.begin_s)}"), bar)
        if spell.is_fault:
            yield tag("path", d=f"M{number_text(left)} {number_text(_TOP)}V{number_text(bottom)}", class_="fault-line")


def _caption(record: Record, trace: Trace, bands: Sequence[Band]) -> list[str]:
    lines = []
    reasons: dict[str, float] = {}
    for spell in trace.spells:
        reasons[spell.reason] = reasons.get(spell.reason, 0.0) + spell.end_s - spell.begin_s
    lines += [f"{reason.capitalize()}: {units.format_duration(length)}." for reason, length in sorted(reasons.items())]
    if record.window.gap_s and bands:
        why = f": {record.window.gap_end_reason}" if record.window.gap_end_reason else ""
        lines.append(f"The gap before it ended after {units.format_duration(record.window.gap_s)}{why}.")
    lines.append(f"Read every {units.format_duration(trace.interval_s)}; drawn thinned, peaks kept.")
    return lines


def _data(trace: Trace, bands: Sequence[Band]) -> Markup:
    """A row for each phase: what people would read off the plot."""
    head = ["Phase", "Begin, s", "Length, s", "Mean power, W", "Greatest power, W", "Temperature, °C", "Throttled, s"]
    rows: list[list[Cell | str]] = []
    for band in bands[:1]:
        if band.name == "gap":
            length = _decimal(band.end_s - band.begin_s)
            rows.append(["gap", _decimal(band.begin_s), length, *[_decimal(None)] * 4])
    for phase in trace.phases:
        low, high = phase.temp_min_c, phase.temp_max_c
        span = NOT_MEASURED if low is None or high is None else f"{low:.0f} – {high:.0f}"
        rows.append(
            [
                _name(phase.name),
                _decimal(phase.begin_s),
                _decimal(phase.length_s),
                _decimal(phase.power_mean_w),
                _decimal(phase.power_max_w),
                Cell(span, low, is_number=True),
                _decimal(phase.throttled_s),
            ]
        )
    return table("Power and temperature by phase", head, rows)


def _decimal(value: float | None) -> Cell:
    return Cell(NOT_MEASURED if value is None else f"{value:.1f}", value, is_number=True)
