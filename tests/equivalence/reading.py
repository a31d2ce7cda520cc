"""What a command wrote, as facts that can be compared: a value for each JSON path, or the lines of a text."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import yaml

from tests.equivalence.masks import mask_text, mask_values, without_noise

# A number as tables and messages write it. A sign belongs to it where no word comes before.
NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+\u2212±])?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


@dataclass(frozen=True)
class Facts:
    """The content of one output.

    Attributes:
        kind: how it was read; two outputs of different kinds differ.
        values: by JSON path, in the order of the document. Of a text: nothing.
        lines: of a text. Of a document: nothing.
    """

    kind: str
    values: Mapping[str, Any]
    lines: tuple[str, ...] = ()


def read_facts(content: Any, name: str, *, is_live: bool, ignore_text: bool) -> Facts:
    """What is in an output, masked.

    Args:
        content: a text; or what the driver puts in the place of one.
        name: of a file, or like one (`stdout`).
        is_live: mask what is measured, too.
        ignore_text: leave out words that are for people.
    """
    if not isinstance(content, str):
        return Facts("other", {"": content})
    name = name.removesuffix(".gz")
    document = _document(content)
    if document is not None:
        document = without_noise(document) if is_live else document
        values = mask_values(dict(flatten(document)), is_live)
        if ignore_text:
            values = {_path_without_words(path): _without_words(value) for path, value in values.items()}
        return Facts("document", values)
    content = mask_text(content, is_live)
    if not ignore_text:
        return Facts("text", {}, _lines(content))
    if name.endswith(".csv") or _is_table_of_commas(content):
        return Facts("csv", {path: _without_words(value) for path, value in _cells(content)})
    if content.lstrip().lower().startswith("<!doctype html"):
        return _page_facts(content)
    return _text_facts(content, name)


def _document(content: str) -> Any:
    """What JSON, or JSON lines, hold; None for anything else."""
    text = content.strip()
    if not text.startswith(("{", "[")):
        return None
    with contextlib.suppress(ValueError):
        return json.loads(text)
    with contextlib.suppress(ValueError):
        return [json.loads(line) for line in text.splitlines()]
    return None


def flatten(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """The scalars of a document by JSON path. An empty list or mapping is a value too.

    Things that name a `field` are found by it, so that one that is gone moves no other.
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            name = item.get("field", index) if isinstance(item, dict) else index
            yield from flatten(item, f"{path}[{name}]")
    else:
        yield path, value


def _lines(content: str) -> tuple[str, ...]:
    if content.lstrip().lower().startswith("<!doctype html"):
        content = content.replace("><", ">\n<")
    return tuple(content.splitlines(keepends=True))


def _without_words(value: Any) -> Any:
    """A value; of a text for people (it has a space in it) its numbers alone."""
    if isinstance(value, str) and " " in value.strip():
        return {"numbers": numbers(value)}
    return value


def _path_without_words(path: str) -> str:
    """A path; of a key for people (a warning that is counted, say) its numbers alone."""
    return f"{path[: path.index(' ')].rpartition('.')[0]}.{numbers(path)}" if " " in path else path


def numbers(text: str) -> list[str]:
    """The numbers in a text, in order."""
    return [found.replace("\u2212", "-") for found in NUMBER.findall(text)]


def _cells(content: str) -> Iterator[tuple[str, str]]:
    rows = list(csv.reader(io.StringIO(content)))
    for row_index, row in enumerate(rows):
        for column, cell in enumerate(row):
            title = rows[0][column] if column < len(rows[0]) else str(column)
            yield f"$[{row_index}].{title}", cell


def _is_table_of_commas(content: str) -> bool:
    first = content.partition("\n")[0]
    return first.count(",") > 3 and " " not in first


def _text_facts(content: str, name: str) -> Facts:
    """Numbers in their order; of a help text and of messages, which may say things in another order, sorted.

    YAML, which `lem config show` and `lem config new` write, is read as such, and the options that it comments out
    count as lines.
    """
    if name == "stdout" and content.startswith(("usage:", "Usage:")):
        return Facts("help", {"options": sorted(set(OPTION.findall(content)))})
    if name == "stdout" and re.search(r"^#?[a-z_]+:( |$)", content, re.MULTILINE):
        mapping = _yaml(content)
        if mapping is not None:
            options = re.findall(r"^ *#([a-z_0-9.]+:.*)$", content, re.MULTILINE)
            return Facts("yaml", {**dict(flatten(mapping)), "commented out": options})
    found = numbers(content)
    values = {"numbers": sorted(found) if name == "stderr" else found, "is empty": not content.strip()}
    return Facts("numbers", values)


def _yaml(content: str) -> Any:
    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:
        return None
    return json.loads(json.dumps(loaded, default=str)) if isinstance(loaded, dict) else None


class _Page(HTMLParser):
    """The figures of a page: numbers in texts and in the attributes of drawings, and how often each element occurs."""

    _GEOMETRY = re.compile("d|points|[xy][12]?|c[xy]|r[xy]?|width|height|viewbox|transform|colspan|rowspan")

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.numbers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        for name, value in attrs:
            if self._GEOMETRY.fullmatch(name):
                self.numbers += numbers(value or "")

    def handle_data(self, data: str) -> None:
        self.numbers += numbers(data)


_LAYOUT = ("table", "tr", "th", "td", "svg", "path", "rect", "circle", "line", "polyline", "polygon", "section")


def _page_facts(content: str) -> Facts:
    page = _Page()
    page.feed(content)
    return Facts("page", {**{f"elements.{tag}": page.elements[tag] for tag in _LAYOUT}, "numbers": page.numbers})
