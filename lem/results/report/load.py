"""The plots over the load that is offered: energy, and the share of good requests, with the knee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lem.base.units import format_quantity, plural
from lem.results.load import GOOD_SHARE, Knee, Series, find_series, knee_notes, knee_tables
from lem.results.metrics import Metric
from lem.results.report import plot
from lem.results.report.content import Report
from lem.results.report.plot import (
    GROUPS_MAX,
    Cell,
    Markup,
    Plot,
    Row,
    Scale,
    join,
    marks,
    number_cell,
    spot,
    tag,
    text,
)
from lem.results.run import ENERGY, Configuration

_TOP, _BOTTOM, _LANE = 50.0, 310.0, 10.0


@dataclass(frozen=True)
class _Measure:
    name: str  # of the figure
    title: str
    label: str  # of the axis
    metric: Metric


@dataclass(frozen=True)
class _Point:
    value: float
    low: float
    high: float
    has_interval: bool


def load_section(report: Report) -> Markup:
    if all(item.window.traffic_mode == "closed_batch" for item in report.records):
        return Markup()
    found = find_series(report.run.with_results)
    if not found:
        return plot.no_plot("load-energy", "Load", "No two configurations differ only in their load.")
    measure = _Measure("load-throughput", "Output throughput", "Output throughput, tok/s", report.headline)
    if report.headline is ENERGY:
        label = f"Energy per output token, J{report.estimate_note}"
        measure = _Measure("load-energy", "Energy per output token (gross)", label, ENERGY)
    share = _Measure("load-good", "Share of good requests", "Share of good requests, %", GOOD_SHARE)
    parts: list[Markup] = [*_knees(found)]
    for option in dict.fromkeys(item.option for item in found):
        members = [item for item in found if item.option == option]
        for at in range(0, len(members), GROUPS_MAX):
            shown, suffix = members[at : at + GROUPS_MAX], f"-{option}-{at // GROUPS_MAX + 1}"
            key = ((marks([spot(7, 7, plot.shape(n))], f"m g{n}"), item.label) for n, item in enumerate(shown))
            measures = (measure, share) if any(item.slo for item in shown) else (measure,)
            drawn = [figure for each in measures if (figure := _figure(shown, each, suffix))]
            parts += [plot.legend(key), tag("div", *drawn, class_="pair")]
    return join(parts)


def _knees(found: Sequence[Series]) -> Iterator[Markup]:
    for item in knee_tables(found):
        heads = [item.heading, *(column.heading for column in item.columns)]
        rows: list[Row] = [
            [name, *(Cell(column.cells[place], is_number=True) for column in item.columns)]
            for place, name in enumerate(item.names)
        ]
        yield tag("h3", item.title)
        yield plot.scroller(item.title, plot.table(item.title, heads, rows))
    yield from (tag("p", note) for note in knee_notes(found))


def _point(item: Configuration, metric: Metric) -> _Point | None:
    estimate, factor = item.estimate(metric), 100.0 if metric is GOOD_SHARE else 1.0
    # A share may be 0, which has no geometric mean.
    centre = fmean(estimate.values) if metric is GOOD_SHARE and estimate.values else estimate.value
    if centre is None:
        return None
    if estimate.low is None or estimate.high is None:
        return _Point(factor * centre, factor * centre, factor * centre, has_interval=False)
    high = min(estimate.high, 1.0) if metric is GOOD_SHARE else estimate.high
    return _Point(factor * centre, factor * estimate.low, factor * high, has_interval=True)


def _figure(shown: Sequence[Series], measure: _Measure, suffix: str) -> Markup:
    points = {(n, load): found for n, item in enumerate(shown) for load, configuration in item.levels
              if (found := _point(configuration, measure.metric)) is not None}  # fmt: skip
    if not points:
        return plot.no_plot(measure.name + suffix, measure.title, "No configuration has a valid result.")
    x_scale = plot.fitting_scale((load for item in shown for load in item.loads), plot.LEFT, plot.RIGHT)
    least, most = (pick(it.value for it in points.values()) for pick in (min, max))
    attained = sorted({item.slo.attainment_pct for item in shown if item.slo} if measure.metric is GOOD_SHARE else ())
    ends = [max(it.low, least / 2) for it in points.values()] + [min(it.high, 2 * most) for it in points.values()]
    y_scale = plot.fitting_scale([least, most, *ends, *attained], _BOTTOM, _TOP)
    knees = [(n, knee) for n, item in enumerate(shown) if (knee := item.knee) is not None]
    axis_y = _BOTTOM + (_LANE * len(knees) + 4 if knees else 0)
    missing = [str(item.number) for n, it in enumerate(shown) for load, item in it.levels if (n, load) not in points]
    name = f"Offered load: {shown[0].option}, {shown[0].unit}"
    return Plot(
        measure.name + suffix,
        f"{measure.title} against {shown[0].option}",
        f"{plural(len(shown), 'line')} over the load that was offered, with a point for each configuration and its "
        "interval as a vertical bar. " + " ".join(f"{_knee_text(shown[n], knee)}." for n, knee in knees),
        (plot.WIDTH, axis_y + 46),
        [
            plot.horizontal_axis(x_scale, axis_y, _TOP, name),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, measure.label, rise=20),
            *(marks([plot.line_to((plot.LEFT, y_scale(it)), (plot.RIGHT, y_scale(it)))], "front") for it in attained),
            *_lines(shown, points, x_scale, y_scale),
            *_lanes(knees, x_scale),
        ],
        [
            "Vertical bars: 95 % t intervals." + (" Dashed: the share that the SLO demands." if attained else ""),
            *(["Below: the knee (tick) and its interval (bar), which may begin below or end beyond what was tried."]
              if knees else []),
            *([f"Without a valid result: number {', '.join(missing)}."] if missing else []),
        ],
        _table(shown, points, measure),
    ).render()  # fmt: skip


def _knee_text(series: Series, knee: Knee) -> str:
    return f"Knee{f' of {series.label}' if series.label else ''}: {knee.text}, interval {knee.interval_text}"


def _lines(
    shown: Sequence[Series], points: Mapping[tuple[int, float], _Point], x_scale: Scale, y_scale: Scale
) -> Iterator[Markup]:
    for n, item in enumerate(shown):
        own = [(x_scale(load), points[n, load]) for load in item.loads if (n, load) in points]
        bars = (spot(x, y_scale(it.low), f"V{plot.number_text(y_scale(it.high))}") for x, it in own if it.has_interval)
        places = [(x, y_scale(it.value)) for x, it in own]
        line = [plot.line_to(*places)] if len(places) > 1 else []
        dots = marks([spot(*place, plot.shape(n)) for place in places], "m")
        yield tag("g", marks(line, f"line g{n}"), marks(bars, "span"), dots, class_=f"g{n}")


def _lanes(knees: Sequence[tuple[int, Knee]], x_scale: Scale) -> Iterator[Markup]:
    for lane, (n, knee) in enumerate(knees):
        y = _BOTTOM + _LANE * (lane + 0.5) + 2
        if knee.interval is not None:
            low, high = knee.interval
            begin, end = x_scale(low) if low else plot.LEFT, x_scale(high) if high < math.inf else plot.RIGHT
            yield marks([spot(begin, y, f"H{plot.number_text(end)}")], f"bar g{n}")
        if knee.load is not None:
            yield marks([spot(x_scale(knee.load), y - 4, "v8")], "mean")
            if knee.censored:
                yield text(x_scale(knee.load) + 4, y + 4, "≥", "key")


def _table(shown: Sequence[Series], points: Mapping[tuple[int, float], _Point], measure: _Measure) -> Markup:
    rows: list[Row] = []
    for n, item in enumerate(shown):
        for load, configuration in item.levels:
            found = points.get((n, load))
            interval = (
                f"{format_quantity(found.low)} – {format_quantity(found.high)}"
                if found and found.has_interval
                else "none"
            )
            value = number_cell(found.value if found else None, configuration.estimate(measure.metric).null_reason)
            cells = (number_cell(load), value, Cell(interval, is_number=True))
            rows.append([configuration.number, item.label or configuration.name, *cells])
    head = ["No.", "Configuration", f"{shown[0].option}, {shown[0].unit}", measure.label, "95 % t interval"]
    return plot.table(f"{measure.label} against {shown[0].option}", head, rows, row_head=1)
