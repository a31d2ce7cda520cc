"""Text for terminals and pipes: blocks of paragraphs and tables, colour, Markdown."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, TypedDict

from lem.base.dataclass import dataclass
from lem.base.log import WIDTH, bounded_width, is_colour_wanted, paint, terminal_columns

# The columns that a name gets in a table, and how many names a sentence lists.
NAME_WIDTH = 36
NAMES_SHOWN = 4

GAP = 2
NAME_MIN = 16

# Names are cut and wrapped after these and blanks; `_`, `=` and `.` hold words and values together.
SEPARATORS = "-,/;:|·"
# Some renderers of Markdown take no backslash before `<`, and show HTML.
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]|~#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_TOKEN = re.compile(rf"[^{SEPARATORS} ]*[{SEPARATORS} ]*")


def printable(text: str) -> str:
    spaced = " ".join(text.split())
    return spaced if spaced.isprintable() else "".join(char if char.isprintable() else "�" for char in spaced)


def name_tokens(name: str) -> list[str]:
    return [token for token in _TOKEN.findall(printable(name)) if token]


def text_width(text: str) -> int:
    """The columns that `text` takes on a terminal: wide East Asian characters two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def wrapped(text: str, width: int, lead: str = "", *, indent: str | None = None) -> list[str]:
    """`text` in lines of `width`, the first after `lead`. A longer word is not cut: usually a path, which is copied."""
    return textwrap.wrap(
        printable(text),
        width,
        initial_indent=lead,
        subsequent_indent=" " * text_width(lead) if indent is None else indent,
        break_on_hyphens=False,
        break_long_words=False,
    ) or [lead.rstrip()]


@dataclass(frozen=True)
class Column:
    heading: str
    cells: tuple[str, ...]
    is_text: bool = False  # aligned left, as names are; numbers are aligned right
    rank: int = 0  # where a table chooses: 0 is always shown, of others the lowest first

    @functools.cached_property
    def width(self) -> int:
        return max(map(text_width, (*self.heading.split("\n"), *self.cells)))


@dataclass(frozen=True)
class Table:
    heading: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    title: str = ""
    sections: tuple[str, ...] = ()  # of each row: a line comes before the first row of each


class Doc:
    """Text laid out for a terminal: blocks of paragraphs and tables with an empty line between them."""

    def __init__(self, width: int = WIDTH, *, is_colour: bool = False) -> None:
        self.width = width
        self._is_colour = is_colour
        self._blocks: list[list[str]] = [[]]

    def block(self) -> None:
        self._blocks.append([])

    def lines(self, lines: Iterable[str], style: str = "") -> None:
        self._blocks[-1] += [paint(line, style, is_colour=self._is_colour) if style else line for line in lines]

    def text(self, text: str, style: str = "", *, lead: str = "") -> None:
        self.lines(wrapped(text, self.width, lead), style)

    def labelled(self, lead: str, text: str, style: str) -> None:
        first, *rest = wrapped(text, self.width, lead)
        label = lead.rstrip()
        self.lines([paint(label, style, is_colour=self._is_colour) + first[len(label) :], *rest])

    def table(self, table: Table) -> None:
        found = columns(table.heading, table.names, table.columns, self.width, table.sections)
        n_heads = max(text.count("\n") + 1 for text in (table.heading, *(column.heading for column in table.columns)))
        if table.title:
            self.text(table.title, "bold")
        self.lines(found[:n_heads], "bold")
        self.lines(found[n_heads:])

    def render(self) -> str:
        return "\n".join("\n".join(block) + "\n" for block in self._blocks if block)


def markdown_escaped(text: str) -> str:
    """`text` so that Markdown shows it as it is: names come from files, and `_`, `*`, `<` and `|` have a meaning."""
    return printable(text).translate(_MARKDOWN)


def markdown_table(table: Table) -> list[str]:
    heads = [table.heading, *(column.heading for column in table.columns)]
    rows = [(name, *(column.cells[index] for column in table.columns)) for index, name in enumerate(table.names)]
    return [
        *([f"**{markdown_escaped(table.title)}**", ""] if table.title else []),
        "| " + " | ".join(markdown_escaped(head.replace("_\n", "_").replace("\n", " ")) for head in heads) + " |",
        "|" + "|".join([":---", *(":---" if column.is_text else "---:" for column in table.columns)]) + "|",
        *("| " + " | ".join(map(markdown_escaped, row)) + " |" for row in rows),
    ]


class NameShortener:
    def __init__(self, names: Sequence[str], width: int) -> None:
        self.prefix, self.suffix = "", ""  # what was removed from every name
        distinct = list(dict.fromkeys(map(printable, names)))
        if len(distinct) > 1 and max(map(text_width, distinct)) > width:
            tokens = [_TOKEN.findall(name) for name in distinct]
            most = min(map(len, tokens)) - 1  # every name keeps something of its own
            begin = _shared_start(tokens, most)
            end = _shared_start([parts[::-1] for parts in tokens], most - len(begin))
            self.prefix, self.suffix = "".join(begin), "".join(reversed(end))

    def __call__(self, name: str) -> str:
        """The name without the shared parts, `…` in their place; one that does not have them is whole."""
        text = printable(name)
        if not (text.startswith(self.prefix) and text.endswith(self.suffix)):
            return text
        text = text[len(self.prefix) : len(text) - len(self.suffix)]
        return ("…" if self.prefix else "") + text + ("…" if self.suffix else "")

    @property
    def explanation(self) -> str:
        parts = [f"begins with “{self.prefix}”"] * bool(self.prefix)
        parts += [f"ends with “{self.suffix}”"] * bool(self.suffix)
        return f"Every name {' and '.join(parts)}." if parts else ""


def columns(
    heading: str, names: Sequence[str], others: Sequence[Column], width: int, sections: Sequence[str] = ()
) -> list[str]:
    """The lines of a table, names at the left; one that cannot fit is wider than `width`, never cut."""
    heads = [text.split("\n") for text in (heading, *(column.heading for column in others))]
    widths = [column.width for column in others]
    room = max(width - sum(widths) - GAP * len(widths), NAME_MIN)
    wrapped_names = [_wrap_name(printable(name), room) for name in names]
    widths.insert(0, max(text_width(line) for lines in (heads[0], *wrapped_names) for line in lines))
    height = max(map(len, heads))
    bottomed = [[""] * (height - len(head)) + head for head in heads]
    is_left = [True, *(column.is_text for column in others)]
    lines = [_row(cells, widths, is_left) for cells in zip(*bottomed, strict=True)]
    section = ""
    for row, (first, *rest) in enumerate(wrapped_names):
        if sections and sections[row] != section:
            section = sections[row]
            lines += wrapped(section, width)
        lines += [_row([first, *(column.cells[row] for column in others)], widths, is_left), *rest]
    return lines


def _row(cells: Sequence[str], widths: Sequence[int], is_left: Sequence[bool]) -> str:
    spaces = [" " * (width - text_width(cell)) for cell, width in zip(cells, widths, strict=True)]
    aligned = (cell + space if left else space + cell for cell, space, left in zip(cells, spaces, is_left, strict=True))
    return (" " * GAP).join(aligned).rstrip()


def _wrap_name(name: str, width: int) -> list[str]:
    indent = "  "
    lines, used = [""], 0
    for token in name_tokens(name):
        if used + text_width(token.rstrip()) > width and lines[-1].strip():
            lines.append(indent)
            used = len(indent)
        for char in token:
            used += text_width(char)
            if used > width and not char.isspace():  # one word longer than the column
                lines.append(indent)
                used = len(indent) + text_width(char)
            lines[-1] += char
    return [line.rstrip() for line in lines]


def _shared_start(names: Sequence[Sequence[str]], most: int) -> list[str]:
    shared = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*names, strict=False))
    return [tokens[0] for tokens in itertools.islice(shared, most)]


INDENTED = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)


def json_text(document: Any) -> str:
    return INDENTED.encode(document) + "\n"


def write_json(out: TextIO, document: Any) -> None:
    out.write(json_text(document))


def terminal_width(out: TextIO) -> int:
    is_known = out.isatty() or "COLUMNS" in os.environ
    return bounded_width(terminal_columns()) if is_known else WIDTH


class Screen(TypedDict):
    is_colour: bool
    width: int


def screen_of(out: TextIO) -> Screen:
    return Screen(is_colour=is_colour_wanted(out), width=terminal_width(out))
