"""Records as flat rows for other programs: one row per experiment, with the same columns in the same order.

A column has the name of the record's field, with its unit. Repeated sections have a prefix (`gpu0_energy_j`,
`ttft_p50_s`), options a dotted one (`requested.fp_precision`). Fixed columns come first, those of GPUs and options
last, so that a wider campaign only adds columns at the end. All values of a column are of one kind, so that the rows
convert to Parquet: numbers, truth values, texts, or lists of these. The same results give the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.doc import json_text, markdown_escaped
from lem.base.errors import UserError, did_you_mean
from lem.base.log import escaped
from lem.base.measurement import Distribution, parts_of_source
from lem.base.reasons import Reason
from lem.base.units import hash_label, plain
from lem.config.option import leaves
from lem.record import Gpu, Record, ResultKey
from lem.results.metrics import LATENCIES, METRICS, READABLE_LATENCIES, used_records
from lem.results.store import StoredResult

FORMATS = ("csv", "json", "jsonl", "markdown")

_SECTIONS = ("validity", "window", "energy", "idle", "work", "throughput")
_LATER_SECTIONS = ("compute", "efficiency", "carbon", "environment")
_GPU = tuple(item.name for item in dataclasses.fields(Gpu) if item.name != "null_reasons")
_NOT_GIVEN = (None, "not given for this experiment")
_HASHES = frozenset({"config_hash", "campaign_id", "engine_load_id", "fingerprint"})  # short ones

# A value and, where it is None, why.
_Cell = tuple[Any, str]


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, _Cell], ...]  # JSON values with their null reasons, by column


def make_table(results: Iterable[StoredResult], *, is_every_attempt: bool = False) -> Table:
    """The rows of the results (with paths relative to their folder), by campaign, run, host and order of execution."""
    known = sorted(results, key=_place)
    used = {record.identity.key for record in used_records(item.record for item in known)}
    chosen = known if is_every_attempt else _one_an_experiment(known, used)
    cells = [dict(_cells(item, is_used=item.record.identity.key in used)) for item in chosen]
    columns = _ordered_columns(cells)
    rows = [{name: row.get(name, _NOT_GIVEN) for name in columns} for row in cells]
    return Table(columns, _of_one_kind(columns, rows))


def _of_one_kind(columns: Iterable[str], rows: list[dict[str, _Cell]]) -> tuple[Mapping[str, _Cell], ...]:
    for name in columns:
        if len({_kind(row[name][0]) for row in rows} - {None}) > 1:
            for row in rows:
                value, why = row[name]
                row[name] = (None if value is None else cell_text(value), why)
    return tuple(rows)


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if value is None else "number" if is_number else type(value).__name__


def summary_columns(results: Iterable[StoredResult]) -> tuple[str, ...]:
    energies = [item.record.energy for item in results]
    parts = ((energy, name) for energy in energies for name in parts_of_source(energy.primary_j.source or ""))
    counted = dict.fromkeys(name for energy, name in parts if getattr(energy, name) is not None)
    first = ("config_name", "cycle_index", "attempt", "valid", "output_tok_per_s", "energy_per_output_tok_j")
    return (*first, *(counted or ("gpu_energy_j",)), "ttft_p50_s", "e2e_p50_s", "window_s")


def with_values(table: Table) -> Table:
    named = [name for name in table.columns if any(row[name][0] not in (None, "", []) for row in table.rows)]
    return with_columns(table, named)


def with_columns(table: Table, names: Sequence[str]) -> Table:
    unknown = [name for name in names if name not in table.columns]
    if unknown and table.rows:
        guess = did_you_mean(unknown[0], table.columns)
        raise UserError(f"unknown column {unknown[0]!r}{guess}", "`lem results export --format json` has all columns")
    return Table(tuple(names), tuple({name: row[name] for name in names} for row in table.rows))


def render(table: Table, form: str) -> str:
    if form == "csv":
        return _as_csv(table)
    if form == "markdown":
        return _as_markdown(table)
    documents = [{name: value for name, (value, _) in row.items()} for row in table.rows]
    reasons = [{name: why for name, (value, why) in row.items() if value is None} for row in table.rows]
    if any(reasons):  # Parquet has no objects without members
        documents = [{**document, "null_reasons": why} for document, why in zip(documents, reasons, strict=True)]
    if form == "json":
        return escaped(json_text(documents))
    if form == "jsonl":
        return escaped("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in documents))
    raise ValueError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")


def _place(item: StoredResult) -> tuple[Any, ...]:
    found = item.record.identity
    run = (found.campaign_name, found.run_id, found.host)
    return (*run, found.order_index, found.cycle_index, found.experiment_id, found.attempt, item.path.as_posix())


def _one_an_experiment(results: Sequence[StoredResult], used: set[ResultKey]) -> list[StoredResult]:
    chosen: dict[tuple[str, str, str, int], StoredResult] = {}
    for item in results:
        key = item.record.identity.key
        before = chosen.get(key[:4])
        if before is None or before.record.identity.key not in used:
            chosen[key[:4]] = item
    return list(chosen.values())


def _cells(item: StoredResult, *, is_used: bool) -> Iterator[tuple[str, _Cell]]:
    record = item.record
    yield "result", (item.path.as_posix(), "")
    yield from _section(record.identity)
    yield "used", (is_used, "")
    for name in _SECTIONS:
        yield from _section(getattr(record, name))
    for name in READABLE_LATENCIES if record.latency.itl_s else LATENCIES:
        yield from _distribution(f"{name}_s", record)
    for name in _LATER_SECTIONS:
        yield from _section(getattr(record, name))
    for metric in METRICS:
        if metric.per is not None:  # others are fields, or such a field in another unit
            value, why = metric.read(record)
            yield metric.name, (value, "" if why is None else why.text)
    for index, gpu in enumerate(record.gpus):
        for name, cell in _section(gpu):
            yield f"gpu{index}_{name}", cell
    yield from _dotted("requested", record.requested)
    yield from _dotted("extra_metadata", record.extra_metadata)


def _section(section: Any) -> Iterator[tuple[str, _Cell]]:
    for item in dataclasses.fields(section):
        if item.name != "null_reasons":
            value = getattr(section, item.name)
            if item.name in _HASHES and value is not None:
                value = hash_label(value)
            yield from _flat(item.name, value, _why(section, item.name))


def _why(section: Any, name: str) -> str:
    reason: Reason | None = section.null_reasons.get(name)
    return "" if reason is None else reason.text


def _distribution(name: str, record: Record) -> Iterator[tuple[str, _Cell]]:
    distribution: Distribution | None = getattr(record.latency, name)
    stem = name.removesuffix("_s")
    for part in (item.name for item in dataclasses.fields(Distribution)):
        column = f"{stem}_{part}" if part in ("n", "n_prompts") else f"{stem}_{part}_s"
        if distribution is None:
            yield column, (None, _why(record.latency, name))
        else:
            yield column, (getattr(distribution, part), _why(distribution, part))


def _dotted(prefix: str, mapping: Mapping[str, Any]) -> Iterator[tuple[str, _Cell]]:
    for path, value in leaves(mapping):
        yield from _flat(".".join((prefix, *map(str, path))), value, "given as null")


def _flat(name: str, value: Any, why: str) -> Iterator[tuple[str, _Cell]]:
    if isinstance(value, (list, tuple)):
        items = [item.text if isinstance(item, Reason) else item for item in value]
        if any(isinstance(item, (Mapping, list, tuple)) for item in items):
            value = dict(enumerate(items))
        else:
            value = items if len({*map(_kind, items)}) < 2 else [*map(cell_text, items)]
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item, "given as null")
    else:
        yield name, (value.text if isinstance(value, Reason) else value, why)


def _ordered_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    seen = dict.fromkeys(name for row in rows for name in row)
    fixed = [name for name in seen if _gpu_number(name) is None and "." not in name]
    gpus = sorted({number for name in seen if (number := _gpu_number(name)) is not None})
    dotted = sorted(name for name in seen if "." in name)
    return (*fixed, *(f"gpu{number}_{name}" for number in gpus for name in _GPU), *dotted)


def _gpu_number(column: str) -> int | None:
    head = column.split("_", 1)[0].removeprefix("gpu")
    return int(head) if column.startswith("gpu") and head.isdecimal() else None


def _as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_not_a_formula, table.columns))
    for row in table.rows:
        texts = [(value, cell_text(value)) for value, _ in (row[name] for name in table.columns)]
        writer.writerow([text if isinstance(value, (int, float)) else _not_a_formula(text) for value, text in texts])
    return out.getvalue()


def _not_a_formula(text: str) -> str:
    """The text, with an apostrophe before it if a spreadsheet would run it: results come from other hosts too."""
    formulas = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are wide
    return escaped(f"'{text}" if text.startswith(formulas) else text)


def _as_markdown(table: Table) -> str:
    if not table.columns:
        return ""
    columns = [[row[name][0] for row in table.rows if row[name][0] is not None] for name in table.columns]
    is_number = [bool(values) and all(isinstance(value, (int, float)) for value in values) for values in columns]
    lines: list[Sequence[str]] = [
        [*map(markdown_escaped, table.columns)],
        ["---:" if right else "---" for right in is_number],
    ]
    lines += [[_markdown_cell(row[name][0]) for name in table.columns] for row in table.rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _markdown_cell(value: Any) -> str:
    text = plain(value, ".6g") if isinstance(value, float) else cell_text(value)
    return markdown_escaped(text)


def cell_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return "; ".join(map(cell_text, value)) if isinstance(value, list) else json.dumps(value, allow_nan=False)
