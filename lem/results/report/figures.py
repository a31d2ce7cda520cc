"""Numbers as they stand in the tables of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lem import units
from lem.results.aggregation import MetricEstimate
from lem.results.report.markup import Cell, Markup, join, tag
from lem.units import SIGNIFICANT_DIGITS, with_decimals

__all__ = [
    "NOT_MEASURED",
    "absent",
    "count_cell",
    "decimals_of",
    "four_digits",
    "interval_cells",
    "latency_cell",
    "number_cell",
    "signed_percent",
]

NOT_MEASURED = "not measured"


def four_digits(value: float) -> str:
    """The value with four significant digits, zeros at its end included."""
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else units.format_quantity(value)


def signed_percent(ratio: float) -> str:
    """`+1.2 %` for 0.012."""
    return f"{100 * ratio:+.2f} %".replace("-", "\N{MINUS SIGN}")


def decimals_of(values: Iterable[float]) -> int | None:
    """How many decimals all numbers of a column get; None when they differ so much that each needs its own."""
    known = [value for value in values if value > 0]
    if not known or max(known) > 30 * min(known):
        return None
    return max(0, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(min(known))))


def absent(reason: str | None) -> Cell:
    """The cell of a number that is not there, with its reason for those who look closer."""
    text = f"{NOT_MEASURED}: {reason}" if reason else NOT_MEASURED
    return Cell(tag("span", NOT_MEASURED, class_="absent", title=text), None, is_number=True)


def count_cell(count: int) -> Cell:
    """A whole number."""
    return Cell(str(count), count, is_number=True)


def number_cell(value: float | None, reason: str | None = None) -> Cell:
    """A number, or that it was not measured."""
    return absent(reason) if value is None else Cell(units.format_quantity(value), value, is_number=True)


def latency_cell(value_s: float | None, reason: str | None = None) -> Cell:
    """A latency with its unit."""
    return absent(reason) if value_s is None else Cell(units.format_latency(value_s), value_s, is_number=True)


def interval_cells(estimate: MetricEstimate, decimals: int | None, *, is_estimate: bool = False) -> tuple[Cell, ...]:
    """The geometric mean, and below each other its t interval and the bootstrap interval."""
    t_log, bootstrap = estimate.t_log, estimate.bootstrap
    every = estimate.all_attempts
    notes: list[Markup] = []
    if every is not None and every.geometric_mean is not None:
        notes.append(tag("small", f"all attempts {with_decimals(every.geometric_mean, decimals)}"))
    if t_log is None or bootstrap is None or t_log.geometric_mean is None:
        reason = estimate.null_reason or (t_log.warning if t_log else None)
        said = "no geometric mean" if estimate.values else NOT_MEASURED  # a zero was measured
        lacking = tag("span", said, class_="absent", title=reason)
        return (Cell(join([lacking, *notes]), None, is_number=True), Cell("", None, is_number=True))
    if is_estimate:
        notes.insert(0, tag("small", "estimate", class_="tag estimate"))
    shown = join([with_decimals(t_log.geometric_mean, decimals), *notes])
    if t_log.ci_lower is None and bootstrap.ci_lower is None:
        why = None if t_log.n_samples == 1 else t_log.warning or bootstrap.warning
        none = tag("span", "no interval", class_="absent", title=why)
        return (Cell(shown, t_log.geometric_mean, is_number=True), Cell(none, None, is_number=True))
    rows = [
        ("t", _interval(t_log.ci_lower, t_log.ci_upper, decimals)),
        ("bootstrap", _interval(bootstrap.ci_lower, bootstrap.ci_upper, decimals)),
    ]
    both = join([tag("div", tag("span", kind, class_="kind"), Markup(" "), text) for kind, text in rows])
    width = None if t_log.ci_lower is None or t_log.ci_upper is None else t_log.ci_upper - t_log.ci_lower
    return (Cell(shown, t_log.geometric_mean, is_number=True), Cell(both, width, is_number=True))


def _interval(low: float | None, high: float | None, decimals: int | None) -> str:
    if low is None or high is None:
        return "none"
    more = decimals
    while more is not None and low < high and with_decimals(low, more) == with_decimals(high, more) and more < 9:
        more += 1
    return f"{with_decimals(low, more)} – {with_decimals(high, more)}"
