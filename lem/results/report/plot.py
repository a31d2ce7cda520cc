"""Drawing plots as SVG: axes, scales, traces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.base.doc import text_width
from lem.results.report.markup import Markup, details, join, number_text, scroller, tag

# Values that differ by more than this factor are drawn on a logarithmic scale.
_LOG_FROM = 8.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A scale from `low` at `begin` to `high` at `end`.

    Attributes:
        low, high: of the values; low < high, and low > 0 where it is logarithmic.
        begin, end: places on the drawing, in either order.
        is_log: logarithmic.
    """

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; one that is outside stays at the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, count: int = 6) -> tuple[float, ...]:
        """About `count` round values on the scale."""
        if self.is_log:
            found = _log_ticks(self.low, self.high, count)
            if len(found) > 1:
                return found
        return _linear_ticks(self.low, self.high, count)


def fitting_scale(values: Iterable[float], begin: float, end: float, *, is_from_zero: bool = False) -> Scale:
    """A scale that holds all values with a little room beside them; logarithmic where they differ by much.

    Args:
        values: at least one, all finite.
        begin, end: places on the drawing.
        is_from_zero: the scale begins at 0, and is never logarithmic.
    """
    known = list(values)
    low, high = min(known), max(known)
    if not is_from_zero and low > 0 and high / low > _LOG_FROM:
        room = (high / low) ** 0.05
        return Scale(low / room, high * room, begin, end, is_log=True)
    span = high - (0.0 if is_from_zero else low)
    room = 0.06 * span or 0.05 * abs(high) or 1.0
    return Scale(min(low, 0.0) if is_from_zero else low - room, high + room, begin, end)


def tick_text(value: float) -> str:
    """The value of a tick: round by its making, so a few digits hold all of it."""
    text = f"{value:.6g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def _linear_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    rough = (high - low) / max(count, 1)
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in _STEPS if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: tuple[float, ...] = ()
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = tuple(
            value for decade in decades for factor in factors if low <= (value := factor * 10.0**decade) <= high
        )
        if len(found) <= count + 2:
            return found
    return found[:: math.ceil(len(found) / count)]


# The colours of Okabe and Ito are the classes g0 to g7 of the style sheet; each has a shape of its own, since colour
# alone is not seen by everyone. [Okabe, Ito 2008, "Color universal design"]
GROUPS_MAX = 8
_DIGIT_WIDTH, _LETTER_WIDTH = 7.6, 6.7
_CROSS_ARM = 3.5
_SHAPES = (
    "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "m-4 -4h8v8h-8z",
    "m0 -5.2l5 8.8h-10z",
    "m0 -5.6l5 5.6l-5 5.6l-5 -5.6z",
    "m0 5.2l5 -8.8h-10z",
    "m-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "m-2.6 -4.6h5.2l2.6 4.6l-2.6 4.6h-5.2l-2.6 -4.6z",
    "m0 -5.6l1.6 3.8l4 .4l-3 2.7l.9 4l-3.5 -2.1l-3.5 2.1l.9 -4l-3 -2.7l4 -.4z",
)


def marker_path(group: int, places: Iterable[tuple[float, float]]) -> str:
    """The path of markers in the shape of a group."""
    shape = _SHAPES[group % GROUPS_MAX]
    return "".join(f"M{number_text(x)} {number_text(y)}{shape}" for x, y in places)


def circle_path(places: Iterable[tuple[float, float]]) -> str:
    """The path of dots: lines of no length, which round ends make visible, so that a thousand take few bytes."""
    return "".join(f"M{number_text(x)} {number_text(y)}h0" for x, y in places)


def ring_path(places: Iterable[tuple[float, float]]) -> str:
    """The path of small circles."""
    return "".join(
        f"M{number_text(x - 3.4)} {number_text(y)}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0" for x, y in places
    )


def cross_path(places: Iterable[tuple[float, float]]) -> str:
    """The path of diagonal crosses."""
    a, b = number_text(_CROSS_ARM), number_text(2 * _CROSS_ARM)
    return "".join(f"M{number_text(x)} {number_text(y)}m-{a} -{a}l{b} {b}m0 -{b}l-{b} {b}" for x, y in places)


def text(x: float, y: float, content: str, class_: str | None = None, anchor: str | None = None) -> Markup:
    """A line of text."""
    return tag("text", content, x=x or None, y=y, class_=class_, text_anchor=anchor)


def horizontal_axis(scale: Scale, y: float, top: float, label: str, *, count: int = 6) -> Markup:
    """The axis below a plot at `y`, its grid lines up to `top`, its name below; ticks without room are left out."""
    grid, labels = [], []
    free_from = -math.inf
    for value in scale.ticks(count):
        x = scale(value)
        half = _DIGIT_WIDTH * len(tick_text(value)) / 2
        if x - half < free_from:
            continue
        free_from = x + half + _DIGIT_WIDTH
        grid.append(f"M{number_text(x)} {number_text(top)}V{number_text(y)}")
        labels.append(text(x, y + 16, tick_text(value), anchor="middle"))
    middle = (scale.begin + scale.end) / 2
    name = text(middle, y + 36, label, "axis", "middle") if label else Markup()
    return join([tag("path", d="".join(grid), class_="grid"), *labels, name])


def vertical_axis(scale: Scale, x: float, right: float, label: str, *, count: int = 6) -> Markup:
    """The axis at the left of a plot, its grid lines to `right`, its name above."""
    grid, labels = [], []
    for value in scale.ticks(count):
        y = scale(value)
        grid.append(f"M{number_text(x)} {number_text(y)}H{number_text(right)}")
        labels.append(text(x - 6, y + 4, tick_text(value), anchor="end"))
    name = text(4, min(scale.begin, scale.end) - 10, label, "axis") if label else Markup()
    return join([tag("path", d="".join(grid), class_="grid"), *labels, name])


def row_labels(rows: Sequence[tuple[int, str, float]], right: float) -> Markup:
    """The number at the left of each row, and the name before its drawing begins at `right`."""
    numbers = [text(0, y + 4, str(number)) for number, _, y in rows]
    names = [text(0, y + 4, label) for _, label, y in rows]
    return join(
        [
            tag("g", *numbers, class_="keys", transform="translate(22)"),
            tag("g", *names, class_="names", transform=f"translate({number_text(right - 10)})"),
        ]
    )


def label_room(labels: Iterable[str]) -> float:
    """Where the drawing of rows with these names may begin."""
    return 50 + _LETTER_WIDTH * max(map(text_width, labels), default=0)


def plot(
    identifier: str, title: str, description: str, size: tuple[float, float], *content: Markup, class_: str = "plot"
) -> Markup:
    """A drawing with its title and description, for those who see it and those who do not."""
    width, height = map(number_text, size)
    return tag(
        "svg",
        tag("title", title, id=f"{identifier}-title"),
        tag("desc", description, id=f"{identifier}-desc"),
        *content,
        class_=class_,
        role="img",
        aria_labelledby=f"{identifier}-title",
        aria_describedby=f"{identifier}-desc",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )


def figure(
    identifier: str, heading: str, drawing: Markup, caption: Sequence[str], data: Markup, *, is_wide: bool = False
) -> Markup:
    """A plot with its heading, what to know about it, and its data table folded away below."""
    return tag(
        "figure",
        tag("h3", heading),
        scroller(f"Plot: {heading}", drawing, "scroll drawing"),
        tag("figcaption", *(item if isinstance(item, Markup) else tag("p", item) for item in caption)),
        details(f"Data table: {heading}", scroller(f"Data table: {heading}", data)),
        id=identifier,
        class_="wide" if is_wide else None,
    )


def no_figure(identifier: str, heading: str, reason: str) -> Markup:
    """What stands in the place of a plot that cannot be drawn."""
    return tag("figure", tag("h3", heading), tag("p", reason, class_="absent"), id=identifier)


def legend(names: Sequence[str]) -> Markup:
    """What each colour and shape means; nothing where there is but one."""
    if len(names) < 2:
        return Markup()
    marks = [tag("path", d=marker_path(group, [(7, 7)]), class_=f"m g{group}") for group in range(len(names))]
    return key_list([(swatch(mark), name) for mark, name in zip(marks, names, strict=True)])


def line_legend(names: Sequence[str]) -> Markup:
    """What each line means, by colour and dashes; nothing where there is but one."""
    if len(names) < 2:
        return Markup()
    lines = [tag("path", d="M0 7h28", class_=f"line g{index % GROUPS_MAX}") for index in range(len(names))]
    return key_list([(swatch(line, 28), name) for line, name in zip(lines, names, strict=True)])


def swatch(mark: Markup, width: int = 14) -> Markup:
    """A mark as it stands in a legend; the name beside it says what it is."""
    return tag(
        "svg", mark, viewBox=f"0 0 {width} 14", width=str(width), height="14", aria_hidden="true", class_="swatch"
    )


def key_list(items: Iterable[tuple[Markup, str]]) -> Markup:
    """A legend of swatches and names."""
    return tag("ul", *(tag("li", mark, name) for mark, name in items), class_="legend")


POWER = "power"
TEMPERATURE = "temperature"


@dataclass(frozen=True)
class Band:
    """Something that lasted: load, warm-up, window …, in seconds from the beginning of the first."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Spell:
    """A time in which the GPU was slowed down; `is_fault` when by heat or a power brake, not by its power limit."""

    begin_s: float
    end_s: float
    is_fault: bool
    reason: str


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: whose.
        quantity: `POWER` in watts or `TEMPERATURE` in °C.
        points: (seconds, value) in the order of time; None where readings are missing.
    """

    label: str
    quantity: str
    points: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Phase:
    """A row of the table below the plot; what was not read in it is None."""

    name: str
    begin_s: float
    length_s: float
    power_mean_w: float | None
    power_max_w: float | None
    temp_min_c: float | None
    temp_max_c: float | None
    throttled_s: float | None


@dataclass(frozen=True)
class Trace:
    """One experiment over time."""

    bands: tuple[Band, ...]
    series: tuple[Series, ...]
    spells: tuple[Spell, ...]
    phases: tuple[Phase, ...]
    interval_s: float

    @property
    def slowed_s(self) -> tuple[tuple[float, float], ...]:
        """When a GPU was slowed down for any reason but its power limit: (begin, end), in the order of time."""
        return slowed_s(self.spells)


def slowed_s(spells: Iterable[Spell]) -> tuple[tuple[float, float], ...]:
    """When there was a fault, (begin, end): reasons that hold at the same time are not added up."""
    found: list[tuple[float, float]] = []
    for spell in sorted(spells, key=lambda item: item.begin_s):
        if not spell.is_fault:
            continue
        if found and spell.begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], spell.end_s))
        else:
            found.append((spell.begin_s, spell.end_s))
    return tuple(found)


def thin(
    points: Sequence[tuple[float, float]], n_buckets: int, hole_s: float
) -> tuple[tuple[float, float] | None, ...]:
    """At most twice `n_buckets` points and the holes: of each bucket of time the least and the greatest value.

    Peaks stay where they were, which a mean would flatten; a pause longer than `hole_s` becomes a None.
    """
    if not points:
        return ()
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / n_buckets or 1.0
    found: list[tuple[float, float] | None] = []
    bucket: list[tuple[float, float]] = []
    number = 0
    before: float | None = None
    for point in points:
        is_hole = before is not None and point[0] - before > hole_s
        current = int((point[0] - begin) / width)
        if bucket and (is_hole or current != number):
            found += _extremes(bucket)
            bucket = []
        if is_hole:
            found.append(None)
        bucket.append(point)
        number, before = current, point[0]
    return (*found, *_extremes(bucket))


def _extremes(bucket: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    low = min(bucket, key=lambda point: point[1])
    high = max(bucket, key=lambda point: point[1])
    return [low] if low[1] == high[1] else sorted((low, high))
