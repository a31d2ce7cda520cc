"""The metric against the order of execution: whether the machine changed while it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lem.base.units import plural
from lem.record import Record
from lem.results.metrics import METRIC_BY_NAME, Metric
from lem.results.report.content import Report
from lem.results.report.markup import (
    Cell,
    Markup,
    count_cell,
    join,
    number_cell,
    number_text,
    signed_percent,
    table,
    tag,
)
from lem.results.report.plot import Scale, circle_path, figure, horizontal_axis, no_figure, plot, vertical_axis
from lem.results.stats import DRIFT_FLAGGED, Drift, change_of, trend_of, without_means

_SIZE = (640.0, 300.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 626.0, 34.0, 252.0
_NAMES = {"energy_per_output_tok_j": "Energy per output token", "output_tok_per_s": "Output throughput"}


@dataclass(frozen=True)
class _Place:
    """A value and where it stands: its configuration on the page and its place in the order."""

    number: int
    label: str
    group: int
    record: Record
    order: int
    value: float


def order_section(report: Report) -> Markup:
    """A plot of each headline metric, in percent of its configuration's own mean."""
    return tag("div", *(_figure(METRIC_BY_NAME[name], report) for name in _shown(report)), class_="pair")


def _shown(report: Report) -> tuple[str, ...]:
    return ("energy_per_output_tok_j", "output_tok_per_s") if report.has_energy else ("output_tok_per_s",)


def _places(metric: Metric, report: Report) -> list[_Place]:
    """Valid values in the order of execution, numbered from 1 over runs and hosts together."""
    position = {record.identity.key: number for number, record in enumerate(report.records, 1)}
    found = [
        _Place(entry.number, entry.label, entry.group, record, position[record.identity.key], value)
        for entry in report.entries
        for record in entry.used
        if (value := metric.read(record)[0]) is not None and value > 0
    ]
    return sorted(found, key=lambda place: place.order)


def _said(drift: Drift) -> str:
    if drift.ci_lower is None or drift.ci_upper is None:
        return f"drifts by {signed_percent(drift.change)} over the campaign (too few values for an interval)"
    interval = f"95 % {signed_percent(drift.ci_lower)} to {signed_percent(drift.ci_upper)}"
    chance = "" if drift.is_significant else "; chance alone could make this"
    return f"drifts by {signed_percent(drift.change)} over the campaign ({interval}{chance})"


def _figure(metric: Metric, report: Report) -> Markup:
    name = _NAMES[metric.name]
    identifier, heading = f"order-{metric.name}", f"{name} in the order of execution"
    places = _places(metric, report)
    numbers, orders = [place.number for place in places], [place.order for place in places]
    length = max(orders, default=0) - min(orders, default=0)
    drift = trend_of(orders, [place.value for place in places], numbers, length=length)
    if drift is None:
        reason = "No configuration has two valid cycles, so nothing can be compared over time."
        return no_figure(identifier, heading, reason)
    shares = [100 * change_of(log) for log in without_means([math.log(place.value) for place in places], numbers)]
    reach = max(100 * DRIFT_FLAGGED, *map(abs, shares)) * 1.1
    x_scale = Scale(0, places[-1].order + 1, _LEFT, _RIGHT)
    y_scale = Scale(-reach, reach, _BOTTOM, _TOP)
    estimate = report.estimate_note if metric.group == "energy" else ""
    drawing = plot(
        identifier,
        heading,
        f"{plural(len(places), 'valid value')} as percent of their configuration's mean, with a fitted line. "
        f"{name} {_said(drift)}.",
        _SIZE,
        _limits(y_scale),
        horizontal_axis(x_scale, _BOTTOM, _TOP, "Place in the order of execution", count=8),
        vertical_axis(y_scale, _LEFT, _RIGHT, f"Difference from its configuration's mean, %{estimate}", count=5),
        _dots(places, shares, x_scale, y_scale),
        _fitted(drift, x_scale, y_scale, places),
    )
    caption = [
        tag("p", tag("span", "flagged", class_="tag bad") if drift.is_flagged else "", f"{name} {_said(drift)}."),
        f"Flagged when the line rises or falls by more than the height of the shaded band, {100 * DRIFT_FLAGGED:g} %.",
    ]
    return figure(identifier, heading, drawing, caption, _data(places, shares, name))


def _limits(y_scale: Scale) -> Markup:
    """The band within which drift is not flagged."""
    top, bottom = y_scale(100 * DRIFT_FLAGGED / 2), y_scale(-100 * DRIFT_FLAGGED / 2)
    return tag("rect", x=_LEFT, y=top, width=_RIGHT - _LEFT, height=bottom - top, class_="band window")


def _dots(places: Sequence[_Place], shares: Sequence[float], x_scale: Scale, y_scale: Scale) -> Markup:
    parts = []
    for group in sorted({place.group for place in places}):
        own = [
            (x_scale(place.order), y_scale(share))
            for place, share in zip(places, shares, strict=True)
            if place.group == group
        ]
        parts.append(tag("path", d=circle_path(own), class_=f"dots g{group}"))
    return join(parts)


def _fitted(drift: Drift, x_scale: Scale, y_scale: Scale, places: Sequence[_Place]) -> Markup:
    first, last = places[0].order, places[-1].order
    half = 100 * drift.change / 2
    ends = [f"{number_text(x_scale(order))} {number_text(y_scale(y))}" for order, y in ((first, -half), (last, half))]
    return tag("path", d=f"M{ends[0]}L{ends[1]}", class_="front")


def _data(places: Sequence[_Place], shares: Sequence[float], name: str) -> Markup:
    head = ["Place", "No.", "Configuration", "Cycle", name, "Difference"]
    rows: list[list[Cell | str]] = [
        [
            count_cell(place.order),
            count_cell(place.number),
            place.label,
            count_cell(place.record.identity.cycle_index + 1),
            number_cell(place.value),
            Cell(f"{share:+.2f} %", share, is_number=True),
        ]
        for place, share in zip(places, shares, strict=True)
    ]
    return table(f"{name} in the order of execution", head, rows)
