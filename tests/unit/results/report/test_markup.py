"""Markup: what is not markup is escaped, and what is left out of HTML may be left out."""

from __future__ import annotations

from html.parser import HTMLParser

from lem.results.report.plot import Cell, Markup, breakable, join, number_text, table, tag


def test_text_and_attributes_are_escaped() -> None:
    element = tag("p", "<b>&\"'", title='"><script>')
    assert element == '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;&quot;&#x27;</p>'


def test_markup_is_taken_as_it_is() -> None:
    assert tag("p", tag("b", "x"), "<") == "<p><b>x</b>&lt;</p>"
    assert join(["a", Markup("<br>")], "&") == "a&<br>"


def test_what_cannot_be_printed_is_replaced() -> None:
    assert tag("p", "a\x00b\u202ec\ud800") == "<p>a�b�c�</p>"
    tag("p", "\ud800").encode("utf-8")


def test_attributes_of_none_are_left_out_and_names_are_those_of_html() -> None:
    assert tag("i", class_="x", aria_label="y", title=None) == '<i class="x" aria-label="y"></i>'


def test_coordinates_are_short() -> None:
    assert [number_text(value) for value in (1.0, -0.04, 1.26, 100.0, -2.5)] == ["1", "0", "1.3", "100", "-2.5"]


def test_a_name_breaks_after_separators_and_stays_text() -> None:
    assert breakable("a-b<c, d") == "a-<wbr>b&lt;c,<wbr> d"


class _Table(HTMLParser):
    """The texts of the cells, row by row, as a parser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.attributes.append({"tag": tag, **dict(attrs)})

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_a_table_holds_its_cells_and_heads() -> None:
    found = _Table()
    found.feed(table("Things", ["Name", "n"], [["a<", Cell("1.5", 1.5, is_number=True)], ["b", "x"]]))
    assert found.rows == [["Name", "n"], ["a<", "1.5"], ["b", "x"]]
    assert [item["tag"] for item in found.attributes] == ["th", "th", "th", "td", "th", "td"]
    assert [item.get("scope") for item in found.attributes] == ["col", "col", "row", None, "row", None]


def test_a_sortable_table_says_its_order_and_what_to_sort_by() -> None:
    found = _Table()
    rows: list[list[Cell | str]] = [
        ["a", Cell("2 ms", 0.002, is_number=True)],
        ["b", Cell("not measured", None, is_number=True)],
    ]
    text = table("Things", ["Name", "n"], rows, sorted_by=(1, "descending"))
    found.feed(text)
    assert 'class="overview sortable"' in text
    assert [item.get("aria-sort") for item in found.attributes[:2]] == [None, "descending"]
    assert [item.get("data-v") for item in found.attributes if item["tag"] == "td"] == ["0.002", ""]
