"""HTML and table cells for the report."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.base import units
from lem.base.doc import SEPARATORS, printable
from lem.base.units import SIGNIFICANT_DIGITS, with_decimals
from lem.results.aggregation import Estimate

Value = str | float | None

_TOKEN = re.compile(rf"[^{SEPARATORS}@]+[{SEPARATORS}@]*|[{SEPARATORS}@]+")
_VOID = frozenset({"meta", "br", "circle", "line", "path", "rect", "use"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """The text as content or value of an attribute, on one line, what cannot be printed replaced."""
    return Markup(html.escape(printable(text)))


def breakable(name: str) -> Markup:
    """A name that may be broken after its separators, rather than inside a word."""
    return Markup("<wbr>".join(html.escape(token) for token in _TOKEN.findall(printable(name))))


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """The parts in a row, each escaped unless it is markup."""
    return Markup(separator.join(part if isinstance(part, Markup) else escape(part) for part in parts))


def number_text(value: float) -> str:
    """A coordinate with at most one decimal, as short as it can be written."""
    text = f"{value:.1f}"
    text = text.removesuffix(".0")
    return "0" if text == "-0" else text


def tag(name: str, /, *children: str, **attributes: Value) -> Markup:
    """An element; `class_` is the attribute `class`, `data_v` is `data-v`, an attribute of None is left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = value if isinstance(value, str) else number_text(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{text if isinstance(text, Markup) else escape(text)}"')
    head = " ".join(parts)
    if name in _VOID and not children:
        return Markup(f"<{head}/>" if name not in ("meta", "br") else f"<{head}>")
    return Markup(f"<{head}>{join(children)}</{name}>")


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and the number it is sorted by where that is another thing.

    Attributes:
        text: escaped unless it is markup.
        value: what sorting looks at; None sorts last where `is_number`.
        is_number: set to the right, and compared as a number.
    """

    text: str
    value: float | None = None
    is_number: bool = False

    @property
    def content(self) -> Markup:
        """What is shown."""
        return self.text if isinstance(self.text, Markup) else escape(self.text)

    def render(self, *, is_sortable: bool) -> Markup:
        """The element, without the end tag and quotes that it does not need: a large page has tens of thousands."""
        content = self.content
        if not self.is_number:
            return Markup(f"<td class=t>{content}")
        if not is_sortable:
            return Markup(f"<td>{content}")
        return Markup(f'<td data-v="{"" if self.value is None else f"{self.value:.7g}"}">{content}')


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],
    *,
    row_head: int | None = 0,
    sorted_by: tuple[int, str] | None = None,
    class_: str | None = None,
    best: int | None = None,
) -> Markup:
    """A table; with `sorted_by` (column, `ascending` or `descending`) one that people can sort.

    Args:
        caption: for those who hear the page; hidden from sight.
        head: a text for each column.
        rows: cells, or texts for plain ones.
        row_head: the column that names the row; None for a table without.
        sorted_by: the order in which the rows come.
        class_: beside the one of sortable tables.
        best: the row that stands out.
    """
    is_sortable = sorted_by is not None
    kept = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    numbers = {index for index, cell in enumerate(kept[0]) if cell.is_number} if kept else set()
    heads = [
        tag(
            "th",
            text,
            scope="col",
            class_="n" if index in numbers else None,
            aria_sort=sorted_by[1] if sorted_by and sorted_by[0] == index else None,
        )
        for index, text in enumerate(head)
    ]
    lines = []
    for number, row in enumerate(kept):
        cells = [
            Markup(f"<th scope=row>{cell.content}") if index == row_head else cell.render(is_sortable=is_sortable)
            for index, cell in enumerate(row)
        ]
        lines.append(Markup(f"<tr{' class=best' if number == best else ''}>{join(cells)}"))
    classes = " ".join(filter(None, (class_, "sortable" if is_sortable else None))) or None
    return tag(
        "table",
        tag("caption", caption, class_="unseen"),
        tag("thead", tag("tr", *heads)),
        tag("tbody", join(lines, "\n")),
        class_=classes,
    )


def scroller(label: str, content: Markup, class_: str = "scroll") -> Markup:
    """A box that scrolls by itself where its content is wider than the page, with the keyboard too."""
    return tag("div", content, class_=class_, role="group", aria_label=label, tabindex="0")


def details(summary: str, *content: Markup, is_open: bool = False) -> Markup:
    """Something folded away behind a line of text."""
    return tag("details", tag("summary", summary), *content, open="" if is_open else None)


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


def interval_cells(estimate: Estimate, decimals: int | None, *, is_estimate: bool = False) -> tuple[Cell, ...]:
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
