"""Rows of records in the formats of other programs, part by part; the same results give the same bytes."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lem.base.doc import markdown_escaped
from lem.base.log import escaped
from lem.base.units import plain
from lem.results.rows import Table, cell_text

FORMATS = ("csv", "json", "jsonl", "markdown")

_CHUNK = 1 << 16


def render(table: Table, form: str) -> Iterator[str]:
    """The parts of the text."""
    renderers = {"csv": _as_csv, "markdown": _as_markdown, "json": _as_json, "jsonl": _as_jsonl}
    if form not in renderers:
        raise ValueError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    return renderers[form](table)


def _chunks(lines: Iterable[str]) -> Iterator[str]:
    found, size = [], 0
    for line in lines:
        found.append(line)
        size += len(line)
        if size >= _CHUNK:
            yield "".join(found)
            found, size = [], 0
    yield "".join(found)


def _as_csv(table: Table) -> Iterator[str]:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_not_a_formula, table.columns))
    for values, _ in table.packed.lists(table.columns, _csv_text):
        writer.writerow(values)
        if out.tell() >= _CHUNK:
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    yield out.getvalue()


def _csv_text(value: Any) -> str:
    return _not_a_formula(value if type(value) is str else cell_text(value))


@functools.lru_cache(4096)
def _not_a_formula(text: str) -> str:
    """The text, with an apostrophe before it if a spreadsheet would run it: results come from other hosts too."""
    formulas = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are wide
    return escaped(f"'{text}" if text.startswith(formulas) else text)


def _documents(table: Table) -> Iterator[tuple[dict[str, Any], dict[str, str] | None]]:
    """Of each row its values and, unless no row of the table lacks one, why some are missing."""
    columns = table.columns
    is_partial = any(table.packed.is_partial(name) for name in columns)  # Parquet has no objects without members
    for values, whys in table.packed.lists(columns):
        missing = {name: why for name, value, why in zip(columns, values, whys, strict=True) if value is None}
        yield dict(zip(columns, values, strict=True)), missing if is_partial else None


def _as_jsonl(table: Table) -> Iterator[str]:
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = (encode(row if whys is None else {**row, "null_reasons": whys}) for row, whys in _documents(table))
    return _chunks(f"{escaped(line)}\n" for line in lines)


def _as_json(table: Table) -> Iterator[str]:
    return _chunks(_json_lines(table)) if len(table) else iter(("[]\n",))


def _json_lines(table: Table) -> Iterator[str]:
    lead = "[\n  "
    for row, whys in _documents(table):
        members = [*_members(row, 4)]
        if whys is not None:
            members.append(
                f'"null_reasons": {{\n      {next(_members(whys, 6))}\n    }}' if whys else '"null_reasons": {}'
            )
        inner = ",\n    ".join(members)
        yield escaped(f"{lead}{{\n    {inner}\n  }}" if members else f"{lead}{{}}")
        lead = ",\n  "
    yield "\n]\n"


def _members(mapping: Mapping[str, Any], indent: int) -> Iterator[str]:
    """The members of a JSON object, as many as possible at once: the encoder in C indents nothing by itself."""
    between = f",\n{' ' * indent}"
    encode, encode_list = _encoder(between), _encoder(f"{between}  ")
    is_list = {name: isinstance(value, list) and bool(value) for name, value in mapping.items()}
    for nested, names in itertools.groupby(mapping, is_list.__getitem__):
        if not nested:
            yield encode({name: mapping[name] for name in names})[1:-1]
            continue
        for name in names:
            yield f"{encode(name)}: [{between[1:]}  {encode_list(mapping[name])[1:-1]}{between[1:]}]"


@functools.cache
def _encoder(between: str) -> Callable[[Any], str]:
    return json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(between, ": ")).encode


def _as_markdown(table: Table) -> Iterator[str]:
    if not table.columns:
        return iter(())
    is_number = [table.packed.is_number(name) or table.packed.is_bool(name) for name in table.columns]
    head = ([*map(markdown_escaped, table.columns)], ["---:" if right else "---" for right in is_number])
    rows = ([*map(_markdown_cell, values)] for values, _ in table.packed.lists(table.columns))
    return _chunks(f"| {' | '.join(cells)} |\n" for cells in itertools.chain(head, rows))


def _markdown_cell(value: Any) -> str:
    text = plain(value, ".6g") if isinstance(value, float) else cell_text(value)
    return markdown_escaped(text)
