"""The plots over the load that is offered: energy, and the share of good requests, with the knee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lem.base.units import fmean, format_quantity, plural
from lem.results.load import GOOD_SHARE, LOADS, Knee, Series, find_series, knee_notes, knee_tables, span_text
from lem.results.metrics import Metric
from lem.results.report import plot
from lem.results.report.content import Report
from lem.results.report.plot import GROUPS_MAX, Markup, Plot, Row, Scale, join, marks, number_cell, spot, tag
from lem.results.run import ENERGY, Configuration

_TOP, _BOTTOM, _LANE = 50.0, 310.0, 10.0

_Points = Mapping[tuple[int, float], tuple[float, float, float]]
"""Value and interval (twice the value without one), by the place of the series and the load."""


def load_section(report: Report) -> Markup:
    if all(item.window.traffic_mode not in LOADS for item in report.records):
        return Markup()
    found = find_series(report.run.with_results)
    if not found:
        return plot.no_plot("load-energy", "Load", "No two configurations differ only in their load.")
    label = f"Energy per output token, J{report.estimate_note}"
    parts: list[Markup] = [*_knees(found)]
    for option in dict.fromkeys(item.option for item in found):
        members = [item for item in found if item.option == option]
        for at in range(0, len(members), GROUPS_MAX):
            shown, suffix = members[at : at + GROUPS_MAX], f"-{option}-{at // GROUPS_MAX + 1}"
            key = ((marks([spot(7, 7, plot.shape(n))], f"m g{n}"), item.label) for n, item in enumerate(shown))
            if report.headline is ENERGY:
                drawn = [_figure(shown, ENERGY, f"load-energy{suffix}", label)]
            else:
                drawn = [_figure(shown, report.headline, f"load-throughput{suffix}", "Output throughput, tok/s")]
            if any(item.slo for item in shown):
                drawn.append(_figure(shown, GOOD_SHARE, f"load-good{suffix}", "Share of good requests, %"))
            parts += [plot.legend(key), tag("div", *drawn, class_="pair")]
    return join(parts)


def _knees(found: Sequence[Series]) -> Iterator[Markup]:
    for item in knee_tables(found):
        heads = [item.heading, *(column.heading for column in item.columns)]
        cells = zip(*(column.cells for column in item.columns), strict=True)
        rows: list[Row] = [[name, *map(plot.number, row)] for name, row in zip(item.names, cells, strict=True)]
        yield tag("h3", item.title)
        yield plot.scroller(item.title, plot.table(item.title, heads, rows))
    yield from (tag("p", note) for note in knee_notes(found))


def _point(item: Configuration, metric: Metric) -> tuple[float, float, float] | None:
    found, is_share = item.estimate(metric), metric is GOOD_SHARE
    # A share may be 0, which has no geometric mean.
    value = fmean(found.values) if is_share and found.values else found.value
    if value is None:
        return None
    low, high = (value, value) if found.low is None or found.high is None else (found.low, found.high)
    return (100 * value, 100 * low, 100 * min(high, 1.0)) if is_share else (value, low, high)


def _figure(shown: Sequence[Series], metric: Metric, identifier: str, label: str) -> Markup:
    everything = [(n, load, item) for n, each in enumerate(shown) for load, item in each.levels]
    points = {(n, load): found for n, load, item in everything if (found := _point(item, metric)) is not None}
    gross = f"{metric.label} (gross)" if metric is ENERGY else metric.label
    if not points:
        return plot.no_plot(identifier, gross, "No configuration has a valid result.")
    x_scale = plot.fitting_scale((load for _, load, _ in everything), plot.LEFT, plot.RIGHT)
    centres = [value for value, _, _ in points.values()]
    attained = sorted({item.slo.attainment_pct for item in shown if item.slo} if metric is GOOD_SHARE else ())
    # Intervals must not press all points into a corner.
    ends = (end for _, *span in points.values() for end in span)
    within = (min(max(end, min(centres) / 2), 2 * max(centres)) for end in ends)
    is_from_zero = metric is GOOD_SHARE and min(centres) < 50  # a share has no logarithmic axis
    y_scale = plot.fitting_scale([*centres, *within, *attained], _BOTTOM, _TOP, is_from_zero=is_from_zero)
    known = [(n, item.knee) for n, item in enumerate(shown) if item.knee is not None]
    knees = [(n, knee) for n, knee in known if knee.load is not None or knee.interval is not None]
    axis_y = _BOTTOM + (_LANE * len(knees) + 4 if knees else 0)
    missing = [str(item.number) for n, load, item in everything if (n, load) not in points]
    below = "Below: the knee (tick, if it is between two loads) and its interval (bar), which may be open to one side."
    told = (
        f"Knee of {shown[n].label or 'all'}: {knee.text}, interval {span_text(knee.interval)}." for n, knee in known
    )
    return Plot(
        identifier,
        f"{gross} against {shown[0].option}",
        f"{plural(len(shown), 'line')} over the load that was offered, with a point for each configuration and its "
        f"interval as a vertical bar. {' '.join(told)}",
        (plot.WIDTH, axis_y + 46),
        [
            plot.horizontal_axis(x_scale, axis_y, _TOP, f"Offered load: {shown[0].option}, {shown[0].unit}"),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, label, rise=20),
            *(marks([plot.line_to((plot.LEFT, y_scale(it)), (plot.RIGHT, y_scale(it)))], "front") for it in attained),
            # Beside each other, so that no interval hides another.
            *(
                _line(n, item, points, x_scale.shifted(3 * n - 1.5 * (len(shown) - 1)), y_scale)
                for n, item in enumerate(shown)
            ),
            *(_lane(lane, n, knee, x_scale) for lane, (n, knee) in enumerate(knees)),
        ],
        [
            "Vertical bars: 95 % t intervals."
            + (" Dashed and level: the share that the SLO demands." if attained else ""),
            *([below] if knees else []),
            *([f"Without a valid result: number {', '.join(missing)}."] if missing else []),
        ],
        _table(shown, points, metric, label),
    ).render()


def _line(n: int, item: Series, points: _Points, x_scale: Scale, y_scale: Scale) -> Markup:
    own = [(x_scale(load), *points[n, load]) for load, _ in item.levels if (n, load) in points]
    places = [(x, y_scale(value)) for x, value, _, _ in own]
    bars = [spot(x, y_scale(low), f"V{plot.number_text(y_scale(high))}") for x, _, low, high in own if low < high]
    dots = marks([spot(*place, plot.shape(n)) for place in places], "m")
    line = [plot.line_to(*places)] if len(places) > 1 else []
    return tag("g", marks(line, f"line g{n}"), marks(bars, "span"), dots, class_=f"g{n}")


def _lane(lane: int, n: int, knee: Knee, x_scale: Scale) -> Markup:
    y, bar = _BOTTOM + _LANE * (lane + 0.5) + 2, []
    if knee.interval is not None:
        low, high = knee.interval
        begin, end = x_scale(low) if low else plot.LEFT, x_scale(high) if high < math.inf else plot.RIGHT
        bar = [spot(begin, y, f"H{plot.number_text(end)}")]
    tick = [spot(x_scale(knee.load), y - 4, "v8")] if knee.load is not None else []
    return join([marks(bar, f"bar g{n}"), marks(tick, "mean")])


def _table(shown: Sequence[Series], points: _Points, metric: Metric, label: str) -> Markup:
    rows: list[Row] = []
    for n, item in enumerate(shown):
        for load, configuration in item.levels:
            value, low, high = points.get((n, load), (None, 0.0, 0.0))
            interval = f"{format_quantity(low)} – {format_quantity(high)}" if low < high else "none"
            cells = number_cell(load), number_cell(value, configuration.estimate(metric).null_reason)
            rows.append([configuration.number, item.label or configuration.name, *cells, plot.number(interval)])
    head = ["No.", "Configuration", f"{shown[0].option}, {shown[0].unit}", label, "95 % t interval"]
    return plot.table(f"{label} against {shown[0].option}", head, rows, row_head=1)
