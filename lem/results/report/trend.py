"""The page of `lem trend`: each configuration over the runs of its campaign."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from lem.base.units import percent, plain, plural
from lem.results.history import (
    LEAST_RUNS,
    NOTHING_ELSE,
    History,
    Point,
    Series,
    anchor_note,
    chance_text,
    change_text,
    notes,
    started,
    versions_text,
)
from lem.results.report import page_body, plot, render_page
from lem.results.report.plot import Cells, Markup, Plot, Row, Scale, escape, join, marks, spot, table, tag, texts
from lem.results.trends import FALSE_ALARMS
from lem.results.views import ESTIMATED

_HEIGHT, _TOP, _BOTTOM = 300.0, 34.0, 252.0
_LEAST_REACH_PCT = 1.0

_METHOD = f"""
    A value is the geometric mean over the cycles of a run. With an anchor it is the ratio to it, cycle by cycle, so
    that what a day does to the whole machine divides out.

    A change point is where the mean level differs most before and after, judged by the variation of runs within the
    levels: the largest t statistic of all places, with the Bonferroni bound for their number (Worsley 1979). Spells
    that return to the old level are tested too; each of the two tests gets half of the error. Parts between change
    points are tested in the same way. It takes {LEAST_RUNS} runs.

    Over all series of the page together, at most {100 * FALSE_ALARMS:g} % of campaigns in which nothing changes show
    a change point, if the values of their runs are independent and normal on a log scale. A slow drift is no change at
    one run, but may be found as one or several."""


def render_trend(history: History) -> str:
    """The page as text; the same results give the same text."""
    method = (tag("p", " ".join(text.split())) for text in _METHOD.split("\n\n"))
    sections = {
        "results": ("Change points", join(_changes(history))),
        "runs": ("Over the runs", _figures(history)),
        "versions": ("Versions and settings that changed", _versions(history)),
        "methods": (
            "How a change point is found",
            join(method),
        ),
    }
    return render_page(f"{history.campaign_name} – lem trend", page_body(_heading(history), sections))


def _heading(history: History) -> Iterator[Markup]:
    runs = history.run_ids
    names = {item.name for item in history.series}
    span = f"{started(runs[0])} – {started(runs[-1])}"
    facts = (plural(len(runs), "run"), span, plural(len(names), "configuration"))
    yield tag("h1", history.campaign_name)
    yield tag("p", " · ".join(facts), class_="facts")
    yield tag("p", anchor_note(history))


def _changes(history: History) -> Iterator[Markup]:
    found = history.changes
    sentence = f"{plural(len(found), 'change point')} found." if found else "No change point was found."
    yield tag("p", sentence, class_="verdict")
    if found:
        ratios, chances = [it.ratio for _, it in found], [it.p_value for _, it in found]
        columns = [
            texts("Since run", (change.run_id for _, change in found)),
            texts("Configuration", (series.name for series, _ in found)),
            texts("Metric", (series.metric.label for series, _ in found)),
            Cells("Change", [*map(escape, map(change_text, ratios))], is_number=True, values=ratios),
            Cells("p", [*map(escape, map(chance_text, chances))], is_number=True, values=chances),
            texts("Changed with it", (versions_text(change.versions) or NOTHING_ELSE for _, change in found)),
        ]
        caption = "Change points in the order of runs"
        yield plot.scroller(caption, plot.table_of(caption, columns, sorted_by=(0, "ascending")))
    yield from (tag("p", text) for text in notes(history))


def _figures(history: History) -> Markup:
    found = [_figure(f"trend-{number}", series, history) for number, series in enumerate(history.series, 1)]
    return tag("div", *found, class_="pair")


def _figure(identifier: str, series: Series, history: History) -> Markup:
    heading = f"{series.name}: {series.metric.lower_label}" + (f" {ESTIMATED}" if series.estimate else "")
    heading += ", relative to the anchor" if series.is_relative else ""
    if not series.points:
        return plot.no_plot(identifier, heading, f"{series.missing}.")
    places = {run_id: place for place, run_id in enumerate(history.run_ids, 1)}
    levels, begin = series.levels, series.levels[0]

    def share(log: float) -> float:
        return 100 * math.expm1(log - begin)

    reach = max(_LEAST_REACH_PCT, *(abs(share(item.log)) for item in series.points)) * 1.15
    x_scale = Scale(0, len(places) + 1, plot.LEFT, plot.RIGHT)
    y_scale = Scale(-reach, reach, _BOTTOM, _TOP)

    def place(point: Point) -> float:
        return x_scale(places[point.run_id])

    lines = [
        plot.line_to((place(points[0]) - 4, y_scale(share(level))), (place(points[-1]) + 4, y_scale(share(level))))
        for points, level in zip(series.stretches, levels, strict=True)
    ]
    cuts = [spot(x_scale(places[it.run_id] - 0.5), _TOP, f"V{_BOTTOM:g}") for it in series.changes]
    changed = [item for item in history.versions if series.name in item.names]
    ticks = [
        tag("g", tag("title", f"{started(item.run_id)}: {versions_text(item.texts)}"),
            marks([spot(x_scale(places[item.run_id]), _BOTTOM - 5, "v10")], "line g1"))
        for item in changed
    ]  # fmt: skip
    texts = [f"{change_text(item.ratio)} since run {item.run_id}" for item in series.changes]
    spread = "unknown" if series.spread is None else percent(series.spread)
    return Plot(
        identifier,
        heading,
        f"{plural(len(series.points), 'run')} in percent of the first level, with the level between change points. "
        f"{'; '.join(texts) or 'No change point'}.",
        (plot.WIDTH, _HEIGHT),
        [
            plot.horizontal_axis(x_scale, _BOTTOM, _TOP, "Run", count=5),
            plot.vertical_axis(y_scale, plot.LEFT, plot.RIGHT, "Difference from the first level, %", count=5),
            marks(cuts, "fault-line"),
            *ticks,
            marks([spot(place(item), y_scale(share(item.log)), plot.DOT) for item in series.points], "dots g0"),
            marks(lines, "front"),
        ],
        [
            f"{'; '.join(texts) or 'No change point'}. From run to run: {spread}, a standard deviation.",
            *([f"Short strokes on the axis: {plural(len(changed), 'run')} with other versions."] if changed else []),
        ],
        _data(heading, series, places, share),
    ).render()


def _data(heading: str, series: Series, places: dict[str, int], share: Callable[[float], float]) -> Markup:
    rows: list[Row] = [
        [
            places[item.run_id],
            item.run_id,
            plot.number_cell(item.value),
            plot.number(plain(math.exp(item.log), ".4g") if series.is_relative else "–"),
            plot.number(f"{share(item.log):+.2f} %"),
        ]
        for item in series.points
    ]
    return table(heading, ["Number", "Run", series.heading, "Ratio to the anchor", "Difference"], rows, row_head=1)


def _versions(history: History) -> Markup:
    if not history.versions:
        return plot.no_plot("version-changes", "Versions and settings", "None changed between these runs.")
    rows: list[Row] = [[it.run_id, ", ".join(it.names), "; ".join(it.texts)] for it in history.versions]
    caption = "Versions and settings that changed, by the first run with them"
    return plot.scroller(caption, table(caption, ["Since run", "Configurations", "Changed"], rows))
