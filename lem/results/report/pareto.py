"""Energy against speed: which configurations no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.base import units
from lem.base.units import plural, some_of
from lem.results.report.content import Entry, Report
from lem.results.report.markup import Cell, Markup, count_cell, join, number_cell, number_text, table, tag
from lem.results.report.plot import (
    Scale,
    figure,
    fitting_scale,
    horizontal_axis,
    legend,
    marker_path,
    no_figure,
    plot,
    text,
    vertical_axis,
)

_SIZE = (560.0, 420.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 540.0, 34.0, 372.0
# Beyond this many, only the points of the frontier are numbered and tell their names.
_NAMED = 24
_SHOWN = 12
# Where a number may stand beside its point, the best side first.
_SIDES = ((1.0, 0.0), (-1.0, 0.0), (0.7, -0.8), (-0.7, -0.8), (0.7, 0.8), (-0.7, 0.8), (0.0, -1.0), (0.0, 1.0))


@dataclass(frozen=True)
class _Axis:
    """A metric on an axis, and which way is better."""

    metric: str
    label: str
    is_less_better: bool


@dataclass(frozen=True)
class _Point:
    entry: Entry
    x: float
    y: float
    x_span: tuple[float, float] | None
    y_span: tuple[float, float] | None


_ENERGY = _Axis("energy_per_output_tok_j", "Energy per output token, J", is_less_better=True)
_THROUGHPUT = _Axis("output_tok_per_s", "Output throughput, tok/s", is_less_better=False)


def pareto_section(report: Report) -> Markup:
    """Both plots; without energy that of throughput against latency."""
    latency = _latency_axis(report)
    if not report.has_energy:
        parts = [_figure("pareto-latency", "Throughput against latency", latency, _THROUGHPUT, report)]
    else:
        parts = [
            _figure("pareto-throughput", "Energy against throughput", _THROUGHPUT, _ENERGY, report),
            _figure("pareto-latency", "Energy against latency", latency, _ENERGY, report),
        ]
    shown = legend(report.groups)
    by = f"Colour and shape: {report.grouped_by}." if report.groups and report.grouped_by != "configuration" else ""
    note = tag("p", by) if by else Markup()
    return join([note, shown, tag("div", *parts, class_="pair")])


def _latency_axis(report: Report) -> _Axis:
    """Time to first token where every measured configuration has it, else end to end."""
    measured = [entry for entry in report.entries if entry.used]
    if measured and all(entry.centre("ttft_p50_s") is not None for entry in measured):
        return _Axis("ttft_p50_s", "Time to first token, median, s", is_less_better=True)
    return _Axis("e2e_p50_s", "End-to-end latency, median, s", is_less_better=True)


def _figure(identifier: str, heading: str, across: _Axis, up: _Axis, report: Report) -> Markup:
    points = [*_points(report.entries, across, up)]
    if not points:
        return no_figure(identifier, heading, "No configuration has a valid result with both figures.")
    front = frontier(
        [
            (point.x if across.is_less_better else -point.x, point.y if up.is_less_better else -point.y)
            for point in points
        ]
    )
    best = [points[index] for index in front]
    estimate = report.estimate_note if up is _ENERGY else ""
    x_scale = fitting_scale(_values((point.x, point.x_span) for point in points), _LEFT, _RIGHT)
    y_scale = fitting_scale(_values((point.y, point.y_span) for point in points), _BOTTOM, _TOP)
    drawing = plot(
        identifier,
        heading,
        f"{plural(len(points), 'configuration')} as points with crosses for their intervals; on the frontier: "
        + ", ".join(f"{point.entry.number} {point.entry.label}" for point in best[:_SHOWN]),
        _SIZE,
        horizontal_axis(x_scale, _BOTTOM, _TOP, across.label),
        vertical_axis(y_scale, _LEFT, _RIGHT, up.label + estimate),
        text(_RIGHT, _TOP - 10, _better(across, up), "hint", "end"),
        _drawn(points, set(front), x_scale, y_scale),
    )
    return figure(identifier, heading, drawing, _caption(points, best), _data(points, set(front), across, up))


def frontier(costs: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """The indices of the points that no other is at most as costly as in both and less in one; cheapest first."""
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    kept: list[int] = []
    least = float("inf")
    last: tuple[float, float] | None = None
    for index in order:
        if costs[index][1] < least or costs[index] == last:
            kept.append(index)
            least, last = costs[index][1], costs[index]
    return tuple(kept)


def _points(entries: Iterable[Entry], across: _Axis, up: _Axis) -> Iterable[_Point]:
    for entry in entries:
        x, y = entry.centre(across.metric), entry.centre(up.metric)
        if x is not None and y is not None:
            yield _Point(entry, x, y, entry.span(across.metric), entry.span(up.metric))


def _values(points: Iterable[tuple[float, tuple[float, float] | None]]) -> Iterable[float]:
    """What an axis must hold: every point, and of intervals what does not press all points into a corner."""
    known = list(points)
    centres = [centre for centre, _ in known]
    yield from centres
    low, high = min(centres) / 2, max(centres) * 2
    for _, span in known:
        if span is not None:
            yield max(span[0], low)
            yield min(span[1], high)


def _drawn(points: Sequence[_Point], front: set[int], x_scale: Scale, y_scale: Scale) -> Markup:
    """Dominated points first, in few paths, so that a thousand stay small; the frontier above them."""
    grey = [point for index, point in enumerate(points) if index not in front]
    best = sorted((points[index] for index in front), key=lambda point: point.x)
    parts = [tag("path", d="".join(_cross(point, x_scale, y_scale) for point in grey), class_="span grey")]
    for group in sorted({point.entry.group for point in grey}):
        places = [(x_scale(point.x), y_scale(point.y)) for point in grey if point.entry.group == group]
        parts.append(tag("path", d=marker_path(group, places), class_="m grey"))
    if len(best) > 1:
        line = "L".join(f"{number_text(x_scale(point.x))} {number_text(y_scale(point.y))}" for point in best)
        parts.append(tag("path", d=f"M{line}", class_="front"))
    for point in best:
        x, y = x_scale(point.x), y_scale(point.y)
        parts.append(
            tag(
                "g",
                tag("title", f"{point.entry.number} {point.entry.name}"),
                tag("path", d=_cross(point, x_scale, y_scale), class_="span"),
                tag("path", d=marker_path(point.entry.group, [(x, y)]), class_="m"),
                class_=f"g{point.entry.group}",
            )
        )
    named = points if len(points) <= _NAMED else best[:_NAMED]
    places = [(x_scale(point.x), y_scale(point.y)) for point in points]
    parts += _numbers([(x_scale(point.x), y_scale(point.y), str(point.entry.number)) for point in named], places)
    return join(parts)


def _numbers(points: Sequence[tuple[float, float, str]], markers: Sequence[tuple[float, float]]) -> Iterable[Markup]:
    """Numbers beside their points, where each is nearer to its own than to others; left out where there is no room."""
    taken: list[tuple[float, float]] = []
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


def _cross(point: _Point, x_scale: Scale, y_scale: Scale) -> str:
    x, y = x_scale(point.x), y_scale(point.y)
    parts = []
    if point.x_span:
        low, high = map(x_scale, point.x_span)
        parts.append(f"M{number_text(low)} {number_text(y)}H{number_text(high)}")
    if point.y_span:
        low, high = map(y_scale, point.y_span)
        parts.append(f"M{number_text(x)} {number_text(low)}V{number_text(high)}")
    return "".join(parts)


def _better(across: _Axis, up: _Axis) -> str:
    """The corner that everybody wants."""
    is_left, is_low = across.is_less_better, up.is_less_better
    arrow = {(True, True): "↙", (False, True): "↘", (True, False): "↖", (False, False): "↗"}[is_left, is_low]
    return f"better: {arrow} {'lower' if is_low else 'upper'} {'left' if is_left else 'right'}"


def _caption(points: Sequence[_Point], best: Sequence[_Point]) -> list[str]:
    shown = some_of([f"{point.entry.number} {point.entry.label}" for point in best], _SHOWN)
    grey = len(points) - len(best)
    lines = [f"On the frontier: {shown}."]
    lines.append(
        (f"Grey: {grey} that another beats in both by their means. " if grey else "")
        + "Crosses: 95 % t intervals; where they overlap, the order may be chance."
    )
    return lines


def _data(points: Sequence[_Point], front: set[int], across: _Axis, up: _Axis) -> Markup:
    head = ["No.", "Configuration", across.label, "95 % t interval", up.label, "95 % t interval", "On the frontier"]
    rows = []
    for index, point in enumerate(points):
        row: list[Cell | str] = [count_cell(point.entry.number), point.entry.label]
        row += [number_cell(point.x), _span(point.x_span), number_cell(point.y), _span(point.y_span)]
        rows.append([*row, "yes" if index in front else "no"])
    return table(f"{up.label} against {across.label}", head, rows, row_head=1)


def _span(span: tuple[float, float] | None) -> Cell:
    if span is None:
        return Cell("none", None, is_number=True)
    low, high = (units.format_quantity(value) for value in span)
    return Cell(f"{low} – {high}", span[0], is_number=True)
