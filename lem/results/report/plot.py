"""HTML and SVG of the report: elements, tables, scales, marks, and the figure around a plot."""

from __future__ import annotations

import html
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache, partial

from lem.base import units
from lem.base.dataclass import dataclass, replace
from lem.base.doc import printable, text_width
from lem.base.reasons import Reason
from lem.base.units import SIGNIFICANT_DIGITS, percent, plain, with_decimals
from lem.results.run import Estimate

NOT_MEASURED = "not measured"
_VOID = frozenset({"meta", "br", "circle", "line", "path", "rect", "use"})

Place = tuple[float, float]  # x and y on the drawing


class Markup(str):
    __slots__ = ()


_BEFORE_UNIT = re.compile(r"(?<=\d) (?=[%×]|(?:J|W|s|ms|tok/s)\b)")


@lru_cache(1 << 14)  # names and settings are in every table
def escape(text: str) -> Markup:
    return Markup(html.escape(_BEFORE_UNIT.sub("\u00a0", printable(text))))


def _markup(text: str) -> Markup:
    return text if isinstance(text, Markup) else escape(text)


def join(parts: Iterable[str], separator: str = "") -> Markup:
    return Markup(separator.join(map(_markup, parts)))


def number_text(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else number_text(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{text if isinstance(text, Markup) else escape(text)}"')
    head = " ".join(parts)
    if name in _VOID and not children:
        return Markup(f"<{head}>" if name in ("meta", "br") else f"<{head}/>")
    return Markup("".join([f"<{head}>", *map(_markup, children), f"</{name}>"]))


def paragraphs(texts: Iterable[str]) -> list[Markup]:
    return [text if isinstance(text, Markup) else tag("p", text) for text in texts]


def scroller(label: str, content: Markup, class_: str = "scroll") -> Markup:
    return tag("div", content, class_=class_, role="group", aria_label=label, tabindex="0")


def details(summary: str, *content: Markup, is_open: bool = False) -> Markup:
    return tag("details", tag("summary", summary), *content, open="" if is_open else None)


class Number(Markup):
    """A cell that is aligned right, as integers are."""

    __slots__ = ()


Row = Sequence[str | int]


def absent(reason: Reason | str | None = None) -> Markup:
    return _absent(f"{NOT_MEASURED}: {reason}" if reason else NOT_MEASURED)


@lru_cache
def _absent(title: str) -> Markup:
    return tag("span", NOT_MEASURED, class_="absent", title=title)


def number(text: str) -> Number:
    return Number(escape(text))


def number_cell(value: float | None, reason: Reason | str | None = None) -> Number:
    return Number(absent(reason)) if value is None else number(units.format_quantity(value))


@dataclass(frozen=True)
class Cells:
    """A column of a table."""

    heading: str
    contents: Sequence[str]  # markup
    is_number: bool = False  # aligned right and compared as numbers
    values: Sequence[float | None] = ()  # what numbers are sorted by; None sorts last


def texts(heading: str, found: Iterable[str]) -> Cells:
    return Cells(heading, [*map(escape, found)])


def counts(heading: str, found: Iterable[int]) -> Cells:
    return Cells(heading, [*map(str, found)], is_number=True)


def quantities(heading: str, found: Iterable[tuple[float | None, Reason | str | None]]) -> Cells:
    contents = [absent(why) if value is None else units.format_quantity(value) for value, why in found]
    return Cells(heading, contents, is_number=True)


def decimals_of(values: Iterable[float | None]) -> int | None:
    known = [value for value in values if value is not None and value > 0]
    is_alike = known and max(known) <= 30 * min(known)
    return max(0, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(min(known)))) if is_alike else None


def interval_of(estimate: Estimate, decimals: int | None, *, is_estimate: bool) -> Markup:
    t_log, bootstrap, every = estimate.t_log, estimate.bootstrap, estimate.all_attempts
    notes = ""
    if every is not None and every.geometric_mean is not None:
        notes = f"<small>all attempts {with_decimals(every.geometric_mean, decimals)}</small>"
    if t_log is None or bootstrap is None or t_log.geometric_mean is None:
        reason = estimate.null_reason or (t_log.warning if t_log else None)
        shown = "no geometric mean" if estimate.values else NOT_MEASURED  # a zero was measured
        return Markup(tag("span", shown, class_="absent", title=reason) + notes)
    if is_estimate:
        notes = f'<small class="tag estimate">estimate</small>{notes}'
    intervals = "".join([
        f'<div><span class="kind">{kind}</span> {_interval(item.ci_lower, item.ci_upper, decimals)}</div>'
        for kind, item in (("t", t_log), ("bootstrap", bootstrap))
    ])  # fmt: skip
    if t_log.ci_lower is None and bootstrap.ci_lower is None:
        why = None if t_log.n_samples == 1 else t_log.warning or bootstrap.warning
        intervals = tag("div", tag("span", "no interval", class_="absent", title=why))
    elif (combined := estimate.combined.value) is not None:
        causes = ", ".join(f"{cause.replace('_', ' ')} {percent(share)}" for cause, share in combined.budget.items())
        title = f"{causes} (k = 1), times k = {combined.factor:.2f}"
        label = tag("span", "combined", class_="kind", title=title)
        intervals += tag("div", label, Markup(" "), combined.text)
    return Markup(f"<b>{with_decimals(t_log.geometric_mean, decimals)}</b>{notes}{intervals}")


def _interval(low: float | None, high: float | None, decimals: int | None) -> str:
    if low is None or high is None:
        return "none"
    ends = with_decimals(low, decimals), with_decimals(high, decimals)
    while decimals is not None and low < high and ends[0] == ends[1] and decimals < 9:
        decimals += 1
        ends = with_decimals(low, decimals), with_decimals(high, decimals)
    return " – ".join(ends)


def table(caption: str, head: Sequence[str], rows: Iterable[Row], *, row_head: int | None = 0) -> Markup:
    columns = [*zip(*rows, strict=True)] or [()] * len(head)
    return table_of(caption, [*map(_cells, head, columns)], row_head=row_head)


def _cells(heading: str, found: Row) -> Cells:
    """A column of these, of numbers if its first one is."""
    contents = [it if isinstance(it, Markup) else escape(str(it)) for it in found]
    return Cells(heading, contents, is_number=any(isinstance(it, (int, Number)) for it in found[:1]))


def table_of(
    caption: str,
    columns: Sequence[Cells],
    *,
    row_head: int | None = 0,
    sorted_by: tuple[int, str] | None = None,
    best: int | None = None,
) -> Markup:
    """A table, which the reader can sort if it is `sorted_by` a column, `ascending` or `descending`."""
    order = dict([sorted_by]) if sorted_by else {}
    heads, cells = [], []
    for index, column in enumerate(columns):
        class_ = "n" if column.is_number and column.contents else None
        heads.append(tag("th", column.heading, scope="col", class_=class_, aria_sort=order.get(index)))
        if index == row_head:
            cells.append([f"<th scope=row>{it}" for it in column.contents])
        elif not column.is_number:
            cells.append([f"<td class={'t' if it else 'none'}>{it}" for it in column.contents])
        elif not order:
            cells.append([f"<td>{it}" for it in column.contents])
        else:
            sorted_ = ["" if it is None else f"{it:.7g}" for it in column.values]
            cells.append([f'<td data-v="{key}">{it}' for key, it in zip(sorted_, column.contents, strict=True)])
    rows = ["<tr>" + "".join(row) for row in zip(*cells, strict=True)]
    if best is not None:
        rows[best] = rows[best].replace("<tr>", "<tr class=best>", 1)
    return tag(
        "table",
        tag("caption", caption, class_="unseen"),
        tag("thead", tag("tr", *heads)),
        tag("tbody", Markup("\n".join(rows))),
        class_=("overview sortable " * bool(order) + _card_class([it.heading for it in columns])).strip() or None,
    )


# On a narrow screen, the rows of a table of more columns than this become cards.
_NARROW_COLUMNS = 2
_HEADS = re.compile(r'<table class="[^"]*\b(k[0-9]+)">.*?<thead><tr>(.*?)</tr></thead>', re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)


def _card_class(head: Sequence[str]) -> str:
    return f"cards k{zlib.crc32(repr(head).encode())}" if len(head) > _NARROW_COLUMNS else ""


def card_labels(parts: Iterable[str]) -> str:
    rules = {
        f".{name} tbody tr>:nth-child({column})::before{{content:{_css_text(html.unescape(text))}}}": None
        for part in parts
        for name, heads in _HEADS.findall(part)
        for column, text in enumerate(_HEAD.findall(heads), 1)
    }
    return "@media screen and (max-width:40rem){" + "".join(rules) + "}"


def _css_text(text: str) -> str:
    return '"' + "".join(it if it.isalnum() or it in " .,_-%" else f"\\{ord(it):x} " for it in text) + '"'


# Values that differ by more than this factor are drawn on a logarithmic scale.
_LOG_FROM = 8.0
_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, length, extent = self._lengths
        value = low if value < low else min(value, high)
        return self.begin + (math.log(value / low) if self.is_log else value - low) / length * extent

    @cached_property
    def _lengths(self) -> tuple[float, float, float, float]:
        length = math.log(self.high / self.low) if self.is_log else self.high - self.low
        return self.low, self.high, length, self.end - self.begin

    def shifted(self, by: float) -> Scale:
        return replace(self, begin=self.begin + by, end=self.end + by)

    def ticks(self, count: int = 6) -> tuple[float, ...]:
        found = self._log_ticks(count) if self.is_log else ()
        if len(found) > 1:
            return found
        rough = (self.high - self.low) / max(count, 1)
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in _STEPS if size * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(index * step for index in range(first, last + 1))

    def _log_ticks(self, count: int) -> tuple[float, ...]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            values = (factor * 10.0**decade for decade in decades for factor in factors)
            found = [value for value in values if self.low <= value <= self.high]
            if len(found) <= count + 2:
                return tuple(found)
        return tuple(found[:: math.ceil(len(found) / count)])


def fitting_scale(values: Iterable[float], begin: float, end: float, *, is_from_zero: bool = False) -> Scale:
    known = list(values)
    low, high = min(known), max(known)
    if not is_from_zero and low > 0 and high / low > _LOG_FROM:
        room = (high / low) ** 0.05
        return Scale(low / room, high * room, begin, end, is_log=True)
    span = high - (0.0 if is_from_zero else low)
    room = 0.06 * span or 0.05 * abs(high) or 1.0
    return Scale(min(low, 0.0) if is_from_zero else low - room, high + room, begin, end)


def tick_text(value: float) -> str:
    return plain(value, ".6g")


# The colours of Okabe and Ito ("Color universal design", 2008) are the classes g0 to g7 of the style sheet; each has a
# shape of its own for readers who do not see colour.
GROUPS_MAX = 8
# A drawing as wide as a phone is scaled by little there. Widths of characters are those of the larger type of a phone.
WIDTH, LEFT, RIGHT = 440.0, 68.0, 420.0
_DIGIT_WIDTH, _LETTER_WIDTH, AXIS_LETTER_WIDTH = 9.2, 7.2, 9.6
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
# A dot is a line of no length that its round ends make visible: a thousand take few bytes.
DOT = "h0"
TICK = "v16"
RING = "a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0"
CROSS = "m-3.5 -3.5l7 7m0 -7l-7 7"


def shape(group: int) -> str:
    return _SHAPES[group % GROUPS_MAX]


def spot(x: float, y: float, drawn: str = "") -> str:
    return f"M{number_text(x)} {number_text(y)}{drawn}"


def spots(places: Iterable[float], y: float, drawn: str) -> list[str]:
    rest = f" {number_text(y)}{drawn}"
    return [f"M{number_text(x)}{rest}" for x in places]


def line_to(*places: Place) -> str:
    return "M" + "L".join(f"{number_text(x)} {number_text(y)}" for x, y in places)


def marks(parts: Iterable[str], class_: str) -> Markup:
    return tag("path", d=Markup("".join(parts)), class_=class_)


def text(x: float, y: float, content: str, class_: str | None = None, anchor: str | None = None) -> Markup:
    return tag("text", content, x=x or None, y=y, class_=class_, text_anchor=anchor)


# One hue from light to dark: the order is visible without a key and without colour.
_RAMP = ((226, 238, 248), (90, 162, 207), (8, 48, 107))


def shade(share: float) -> tuple[str, str]:
    """A fill for a share between 0 (light) and 1 (dark), and the class of text that is readable on it."""
    lower, upper = _RAMP[:2] if share < 0.5 else _RAMP[1:]
    rest = 2 * share - (share >= 0.5)
    rgb = [round(low + rest * (high - low)) for low, high in zip(lower, upper, strict=True)]
    parts = [value / 255 for value in rgb]
    # Relative luminance and contrast as WCAG 2 defines them.
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    is_light = (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05)
    return "#" + "".join(f"{value:02x}" for value in rgb), "on-light" if is_light else "on-dark"


@lru_cache
def horizontal_axis(scale: Scale, y: float, top: float, label: str, *, count: int = 6) -> Markup:
    grid, labels = [], []
    free_from = -math.inf
    for value in scale.ticks(count):
        x = scale(value)
        half = _DIGIT_WIDTH * len(tick_text(value)) / 2
        if x - half >= free_from and x + half <= WIDTH:
            free_from = x + half + _DIGIT_WIDTH
            grid.append(spot(x, top, f"V{number_text(y)}"))
            labels.append(text(x, y + 16, tick_text(value), anchor="middle"))
    middle = min((scale.begin + scale.end) / 2, WIDTH - AXIS_LETTER_WIDTH * len(label) / 2)
    return join([marks(grid, "grid"), *labels, text(middle, y + 36, label, "axis", "middle")])


def vertical_axis(scale: Scale, x: float, right: float, label: str, *, count: int = 6, rise: float = 10) -> Markup:
    ticks = [(scale(value), tick_text(value)) for value in scale.ticks(count)]
    grid = marks((spot(x, y, f"H{number_text(right)}") for y, _ in ticks), "grid")
    labels = [text(x - 6, y + 4, shown, anchor="end") for y, shown in ticks]
    return join([grid, *labels, text(4, min(scale.begin, scale.end) - rise, label, "axis")])


def row_labels(rows: Sequence[tuple[int, str, float]], right: float) -> Markup:
    heights = [number_text(y + 4) for *_, y in rows]
    numbers = [f'<text y="{y}">{number}</text>' for (number, _, _), y in zip(rows, heights, strict=True)]
    names = [f'<text y="{y}">{escape(name)}</text>' for (_, name, _), y in zip(rows, heights, strict=True) if name]
    keys = tag("g", Markup("".join(numbers)), class_="keys", transform="translate(22)")
    place = f"translate({number_text(right - 10)})"
    return join([keys, tag("g", Markup("".join(names)), class_="names", transform=place)])


def label_room(labels: Iterable[str]) -> float:
    return 50 + _LETTER_WIDTH * max(map(text_width, labels), default=0)


@dataclass(frozen=True)
class Plot:
    identifier: str
    title: str
    description: str  # for readers who do not see the drawing
    size: tuple[float, float]  # width and height
    marks: Iterable[Markup]  # axes included, from back to front
    caption: Sequence[str]
    data: Markup
    heading: str = ""  # the title unless given
    class_: str = "plot"
    is_wide: bool = False

    def render(self) -> Markup:
        heading, name = self.heading or self.title, self.identifier
        width, height = map(number_text, self.size)
        drawing = tag(
            "svg",
            tag("title", self.title, id=f"{name}-title"),
            tag("desc", self.description, id=f"{name}-desc"),
            *self.marks,
            class_=self.class_,
            role="img",
            aria_labelledby=f"{name}-title",
            aria_describedby=f"{name}-desc",
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
        )
        return tag(
            "figure",
            tag("h3", heading),
            scroller(f"Plot: {heading}", drawing, "scroll drawing"),
            tag("figcaption", *paragraphs(self.caption)),
            details(f"Data table: {heading}", scroller(f"Data table: {heading}", self.data)),
            id=name,
            class_="wide" if self.is_wide else None,
        )


def no_plot(identifier: str, heading: str, reason: str) -> Markup:
    return tag("p", f"{heading}: {reason}", class_="absent", id=identifier)


def legend(items: Iterable[tuple[Markup, str]], width: int = 14) -> Markup:
    swatch = partial(tag, "svg", viewBox=f"0 0 {width} 14", width=str(width), height="14", aria_hidden="true")
    found = [tag("li", swatch(mark, class_="swatch"), name) for mark, name in items]
    return tag("ul", *found, class_="legend") if len(found) > 1 else Markup()
