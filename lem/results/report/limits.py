"""The plots along a power limit or a clock of the GPU: energy against throughput, and the setting with least energy."""

from __future__ import annotations

from collections.abc import Sequence

from lem.base.units import format_quantity, plural
from lem.results.limits import Sweep, change_text, find_sweeps, least_text, limit_notes
from lem.results.report import plot
from lem.results.report.content import Report
from lem.results.report.plot import Markup, Number, Plot, Row, join, marks, number, number_cell, spot, tag, text
from lem.results.run import ENERGY, THROUGHPUT, Estimate

_TOP, _BOTTOM, _NAME_ROOM = 50.0, 330.0, 50.0
_RING = "m-7,0a7,7 0 1 0 14,0a7,7 0 1 0 -14,0"


def limits_section(report: Report) -> Markup:
    found = find_sweeps(report.run.with_results)
    if not found:
        return Markup()
    drawn = [_figure(number, sweep, f"J{report.estimate_note}") for number, sweep in enumerate(found, 1)]
    return join([tag("div", *drawn, class_="pair"), *(tag("p", note) for note in [*limit_notes(found)][-1:])])


def _figure(number: int, sweep: Sweep, unit: str) -> Markup:
    identifier, title = f"limits-{number}", f"Energy against throughput along {sweep.setting}"
    title += f", {sweep.label}" if sweep.label else ""
    known = [(value, item) for value, item in sweep.points if item.estimate(THROUGHPUT).value is not None]
    if not known:
        return plot.no_plot(identifier, title, "No configuration has a throughput.")
    pairs = [(item.estimate(THROUGHPUT), item.estimate(ENERGY)) for _, item in known]
    x_scale = plot.fitting_scale(_extent([x for x, _ in pairs]), plot.LEFT, plot.RIGHT)
    y_scale = plot.fitting_scale(_extent([y for _, y in pairs]), _BOTTOM, _TOP)
    places = [(x_scale(x.value or 0.0), y_scale(y.value or 0.0)) for x, y in pairs]
    bars = []
    for (x, y), (across, up) in zip(places, pairs, strict=True):
        if across.low is not None and across.high is not None:
            bars.append(spot(x_scale(across.low), y, f"H{plot.number_text(x_scale(across.high))}"))
        if up.low is not None and up.high is not None:
            bars.append(spot(x, y_scale(up.low), f"V{plot.number_text(y_scale(up.high))}"))
    least = sweep.least
    chosen = None if least is None else sweep.points[least.index][1]
    rings = [spot(*place, _RING) for place, (_, item) in zip(places, known, strict=True) if item is chosen]
    line = marks([plot.line_to(*places)] if len(places) > 1 else [], "line g0")
    points = marks([spot(*place, plot.shape(0)) for place in places], "m")
    told = [] if least is None else [f"{least_text(sweep, least)}."]
    return Plot(
        identifier,
        title,
        f"{plural(len(known), 'setting')} as points, joined in the order of the setting, with crosses for their "
        f"intervals. {' '.join(told)}",
        (plot.WIDTH, _BOTTOM + 46),
        [
            plot.horizontal_axis(x_scale, _BOTTOM, _TOP, "Output throughput, tok/s"),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, f"Energy per output token, {unit}", rise=20),
            tag("g", line, marks(bars, "span"), marks(rings, "ring"), points, class_="g0"),
            *(_name(x, y, sweep.text(value)) for (x, y), (value, _) in zip(places, known, strict=True)),
        ],
        [*told, "Ring: the setting with the least energy. Crosses: 95 % t intervals."],
        _table(title, sweep),
    ).render()


def _name(x: float, y: float, name: str) -> Markup:
    is_at_end = x > plot.RIGHT - _NAME_ROOM
    return text(x - 8 if is_at_end else x + 8, y - 8, name, "key", "end" if is_at_end else None)


def _extent(estimates: Sequence[Estimate]) -> list[float]:
    """Every mean, and of intervals what does not press all points into a corner."""
    centres = [item.value for item in estimates if item.value is not None]
    ends = (end for item in estimates for end in (item.low, item.high) if end is not None)
    return [*centres, *(min(max(end, min(centres) / 2), 2 * max(centres)) for end in ends)]


def _table(title: str, sweep: Sweep) -> Markup:
    rows: list[Row] = []
    for index, (value, item) in enumerate(sweep.points):
        cells: list[Number] = []
        for metric in (THROUGHPUT, ENERGY):
            found = item.estimate(metric)
            cells += [number_cell(found.value, found.null_reason), _interval(found)]
            cells.append(number(change_text(sweep.change(index, metric))))
        is_least = sweep.least is not None and sweep.least.index == index
        rows.append([item.number, sweep.text(value), *cells, "yes" if is_least else "no"])
    change = f"Against {sweep.text(sweep.points[-1][0])}"
    head = ["No.", f"gpu.{sweep.setting}", "Output throughput, tok/s", "95 % t interval", change]
    head += ["Energy per output token, J", "95 % t interval", change, "Least energy"]
    return plot.table(title, head, rows, row_head=1)


def _interval(found: Estimate) -> Number:
    if found.low is None or found.high is None:
        return number("none")
    return number(f"{format_quantity(found.low)} – {format_quantity(found.high)}")
