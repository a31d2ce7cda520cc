"""The headline metric over two axes of the grid."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lem.base import units
from lem.base.units import plural
from lem.config.backends import WIDTH_OPTIONS
from lem.results.report.content import Entry, Report
from lem.results.report.markup import Cell, Markup, table, tag
from lem.results.report.plot import figure, fitting_scale, no_figure, plot, text

_CELL = (74.0, 34.0)
_TOP = 62.0
_MOST = 24
_HALF_PAGE = 600
_FACETS = 6
_NOT_GIVEN = "not given"
# How wide each backend computes is one axis, where backends differ.
_BATCH = {f"{backend}.{option}": option for backend, option in WIDTH_OPTIONS.items()}
# One hue from light to dark, so that order is seen without a key and without colour.
_RAMP = ((226, 238, 248), (90, 162, 207), (8, 48, 107))


@dataclass(frozen=True)
class _Plan:
    """Which settings are the axes, with their values in order, and what else varies."""

    across: str
    up: str
    across_values: tuple[str, ...]
    up_values: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Named:
    """A configuration with or without a result."""

    name: str
    settings: Mapping[str, str]
    entry: Entry | None


def heatmap_section(report: Report) -> Markup:
    """A map for each value of what else varies, where these are few; else one with the best in each cell."""
    named = _named(report)
    plan = _plan([item.settings for item in named])
    heading = "Energy per output token over the grid" if report.has_energy else "Output throughput over the grid"
    if plan is None:
        return no_figure("grid", heading, _why_no_grid([item.settings for item in named]))
    values = [value for item in named if (value := _value(item, report)) is not None]
    if not values:
        return no_figure("grid", heading, "No configuration has a valid result.")
    facets: dict[tuple[str, ...], list[_Named]] = {}
    for item in named:
        facets.setdefault(tuple(item.settings.get(key, _NOT_GIVEN) for key in plan.others), []).append(item)
    if len(facets) > _FACETS:
        facets = {(): named}
    limits = (min(values), max(values))
    figures = []
    for number, (chosen, members) in enumerate(sorted(facets.items()), 1):
        where = ", ".join(f"{_short(key)} {value}" for key, value in zip(plan.others, chosen, strict=False))
        identifier = f"grid-{number}" if len(facets) > 1 else "grid"
        title = f"{heading}: {where}" if chosen and where else heading
        figures.append(_figure(identifier, title, plan, members, limits, report))
    return tag("div", *figures, class_="pair" if len(figures) > 1 else None)


def _why_no_grid(settings: Sequence[Mapping[str, str]]) -> str:
    long = {key: len(found) for key, found in _values_of(settings).items() if len(found) > _MOST}
    if not long:
        return "Fewer than two settings vary over the configurations, so there is no grid to draw."
    counts = ", ".join(f"{key} has {count} values" for key, count in long.items())
    return f"No grid to draw: {counts}, an axis has at most {_MOST}, and fewer than two other settings vary."


def _values_of(settings: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    keys = sorted({key for item in settings for key in item})
    return {key: _ordered({item.get(key, _NOT_GIVEN) for item in settings}) for key in keys}


def _named(report: Report) -> list[_Named]:
    found = [_Named(entry.name, entry.settings, entry) for entry in report.entries if entry.settings]
    known = {item.name for item in found}
    found += [_Named(item.name, item.settings, None) for item in report.failed_settings if item.name not in known]
    used = sorted({key for item in found for key in item.settings} & set(_BATCH))
    if len(used) < 2:
        return found
    axis = " / ".join(_BATCH[key] for key in used)
    return [
        replace(item, settings={axis if key in _BATCH else key: value for key, value in item.settings.items()})
        for item in found
    ]


def _plan(settings: Sequence[Mapping[str, str]]) -> _Plan | None:
    """The two settings whose combinations are there most, with the most cells."""
    values = _values_of(settings)
    varied = _without_doubles({key: found for key, found in values.items() if 1 < len(found) <= _MOST}, settings)

    def worth(pair: tuple[str, str]) -> tuple[float, int, int]:
        cells = {(item.get(pair[0], _NOT_GIVEN), item.get(pair[1], _NOT_GIVEN)) for item in settings}
        size = len(values[pair[0]]) * len(values[pair[1]])
        is_absent = sum(_NOT_GIVEN in values[key] for key in pair)
        return (len(cells) / size > 0.5, -is_absent, len(cells))

    pairs = list(itertools.combinations(varied, 2))
    if not pairs:
        return None
    across, up = max(pairs, key=worth)
    if len(values[up]) > len(values[across]):
        across, up = up, across
    others = tuple(key for key in varied if key not in (across, up))
    return _Plan(across, up, values[across], values[up], others)


def _without_doubles(varied: Mapping[str, tuple[str, ...]], settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings without those that say the same as another: a backend, and an option only it has."""
    kept: dict[frozenset[frozenset[int]], str] = {}
    for key in sorted(varied, key=lambda name: (_NOT_GIVEN in varied[name], name)):
        parts: dict[str, set[int]] = {}
        for index, item in enumerate(settings):
            parts.setdefault(item.get(key, _NOT_GIVEN), set()).add(index)
        kept.setdefault(frozenset(map(frozenset, parts.values())), key)
    return list(kept.values())


def _ordered(values: Iterable[str]) -> tuple[str, ...]:
    """Numbers by size, then texts by name."""

    def place(value: str) -> tuple[int, float, str]:
        is_number = re.fullmatch(r"-?[0-9]+([.][0-9]+)?([eE]-?[0-9]+)?", value) is not None
        return (0, float(value), value) if is_number else (1, 0.0, value)

    return tuple(sorted(values, key=place))


def _value(item: _Named, report: Report) -> float | None:
    return item.entry.centre(report.headline.name) if item.entry else None


def _figure(
    identifier: str,
    heading: str,
    plan: _Plan,
    members: Sequence[_Named],
    limits: tuple[float, float],
    report: Report,
) -> Markup:
    cells = _cells(plan, members)
    left = 34 + 7.6 * max(min(len(value), 22) for value in (*plan.up_values, _short(plan.up)))
    width = max(left + _CELL[0] * len(plan.across_values) + 16, 280)
    bottom = _TOP + _CELL[1] * len(plan.up_values)
    parts: list[Markup] = [
        _hatch(identifier),
        text(left, 18, f"{_short(plan.across)} →", "axis"),
        text(left - 10, _TOP - 10, f"{_short(plan.up)} ↓", "axis", "end"),
    ]
    for column, value in enumerate(plan.across_values):
        parts.append(text(left + _CELL[0] * (column + 0.5), _TOP - 10, _clip(value, 11), anchor="middle"))
    for row, up in enumerate(plan.up_values):
        y = _TOP + _CELL[1] * row
        parts.append(text(left - 10, y + _CELL[1] / 2 + 4, _clip(up, 22), anchor="end"))
        for column, across in enumerate(plan.across_values):
            place = (left + _CELL[0] * column, y)
            parts.append(_cell(cells.get((across, up), []), place, limits, identifier, report))
    description = (
        f"{_short(plan.across)} across, {_short(plan.up)} down; darker is "
        f"{'more energy' if report.has_energy else 'more throughput'}; hatched cells have no valid result."
    )
    drawing = plot(identifier, heading, description, (width, bottom + 12), *parts, class_="plot small")
    is_wide = width > _HALF_PAGE
    return figure(identifier, heading, drawing, _caption(cells, report), _data(plan, cells, report), is_wide=is_wide)


def _cells(plan: _Plan, members: Sequence[_Named]) -> dict[tuple[str, str], list[_Named]]:
    found: dict[tuple[str, str], list[_Named]] = {}
    for item in members:
        key = (item.settings.get(plan.across, _NOT_GIVEN), item.settings.get(plan.up, _NOT_GIVEN))
        found.setdefault(key, []).append(item)
    return found


def _best(items: Sequence[_Named], report: Report) -> tuple[_Named, float] | None:
    measured = [(item, value) for item in items if (value := _value(item, report)) is not None]
    if not measured:
        return None
    return (min if report.has_energy else max)(measured, key=lambda pair: pair[1])


def _cell(
    items: Sequence[_Named], place: tuple[float, float], limits: tuple[float, float], identifier: str, report: Report
) -> Markup:
    x, y = place
    width, height = _CELL[0] - 2, _CELL[1] - 2
    if not items:
        return tag("rect", x=x, y=y, width=width, height=height, class_="empty")
    best = _best(items, report)
    middle = (x + width / 2, y + height / 2 + 4)
    if best is None:
        hatch = tag("rect", x=x, y=y, width=width, height=height, class_="failed", fill=f"url(#{identifier}-hatch)")
        back = tag("rect", x=middle[0] - 28, y=middle[1] - 13, width=56, height=18, class_="plate")
        return tag("g", tag("title", _tooltip(items)), hatch, back, text(*middle, _lacking(items), anchor="middle"))
    scale = fitting_scale(limits, 0.0, 1.0)
    share = scale(best[1])
    lower, upper = (_RAMP[0], _RAMP[1]) if share < 0.5 else (_RAMP[1], _RAMP[2])
    rest = 2 * share - (share >= 0.5)
    rgb = [round(low + rest * (high - low)) for low, high in zip(lower, upper, strict=True)]
    fill = "#" + "".join(f"{part:02x}" for part in rgb)
    mark = "†" if _is_partial(items) else ""
    return tag(
        "g",
        tag("title", _tooltip(items)),
        tag("rect", x=x, y=y, width=width, height=height, fill=fill),
        text(*middle, _three_digits(best[1]) + mark, _ink(rgb), "middle"),
    )


def _lacking(items: Sequence[_Named]) -> str:
    """What stands in a cell without a value."""
    return "no value" if any(item.entry and item.entry.used for item in items) else "failed"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1000 else units.format_quantity(value)


def _ink(rgb: Sequence[int]) -> str:
    """The class of text that can be read on a colour: by relative luminance as WCAG 2 defines it."""
    parts = [value / 255 for value in rgb]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "on-light" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "on-dark"


def _is_partial(items: Sequence[_Named]) -> bool:
    return any(item.entry is None or item.entry.aggregate.n_failed or item.entry.aggregate.n_invalid for item in items)


def _tooltip(items: Sequence[_Named]) -> str:
    return ", ".join(f"{item.entry.number} {item.name}" if item.entry else item.name for item in items[:4])


def _hatch(identifier: str) -> Markup:
    line = tag("path", d="M-2 2L2 -2M0 8L8 0M6 10L10 6", class_="hatch")
    pattern = tag("pattern", line, id=f"{identifier}-hatch", width="8", height="8", patternUnits="userSpaceOnUse")
    return tag("defs", pattern)


def _caption(cells: Mapping[tuple[str, str], Sequence[_Named]], report: Report) -> list[str]:
    unit = "J per output token" + report.estimate_note if report.has_energy else "output tok/s"
    lines = [f"Geometric means, {unit}; darker is more. Hatched: every attempt failed or was invalid."]
    crowd = max(map(len, cells.values()))
    if crowd > 1:
        lines.append(f"Up to {plural(crowd, 'configuration')} share a cell: it shows the best of them.")
    if any(_is_partial(items) and _best(items, report) for items in cells.values()):
        lines.append("†: some attempts of this cell failed or were invalid.")
    return lines


def _data(plan: _Plan, cells: Mapping[tuple[str, str], Sequence[_Named]], report: Report) -> Markup:
    rows: list[list[Cell | str]] = []
    for up in plan.up_values:
        row: list[Cell | str] = [up]
        for across in plan.across_values:
            items = cells.get((across, up), [])
            best = _best(items, report)
            shown = units.format_quantity(best[1]) if best else _lacking(items) if items else "not in the grid"
            row.append(Cell(shown, None, is_number=True))
        rows.append(row)
    head = [f"{_short(plan.up)} \\ {_short(plan.across)}", *plan.across_values]
    return table(f"{_short(plan.up)} down, {_short(plan.across)} across", head, rows)


def _short(key: str) -> str:
    """The setting's name without the section that repeats a backend or says `name`."""
    return key.removesuffix(".name").rpartition(".")[2] if key.count(".") else key


def _clip(value: str, width: int) -> str:
    tail = value.rpartition("/")[2]
    return tail if len(tail) <= width else f"{tail[: width - 1]}…"
