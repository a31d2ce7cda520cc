"""Records as flat rows: one row per experiment, with the same columns in the same order.

A column has the name of the record's field, with its unit. Repeated sections have a prefix (`gpu0_energy_j`,
`ttft_p50_s`), options a dotted one (`requested.fp_precision`). Fixed columns come first, those of GPUs and options
last, so that a wider campaign only adds columns at the end. All values of a column are of one kind, so that the rows
convert to Parquet: numbers, truth values, texts, or lists of these.

The columns depend on all results, so each is converted once, and its row kept without what other rows have, too.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from lem.base.codec import hints_of
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import UserError, did_you_mean
from lem.base.measurement import Distribution, parts_of_source
from lem.base.reasons import Reason
from lem.base.units import hash_label
from lem.config.option import leaves
from lem.record import Gpu, Latency, Record, ResultKey
from lem.results.metrics import LATENCIES, METRICS, READABLE_LATENCIES, used_records
from lem.results.store import StoredResult

_SECTIONS = ("validity", "window", "energy", "idle", "work", "throughput")
_LATER_SECTIONS = ("compute", "efficiency", "carbon")
# With the place of the field; others are fields, or such a field in another unit.
_DIVIDED = tuple(
    (item, [*hints_of(hints_of(Record)[item.section])].index(item.field)) for item in METRICS if item.per is not None
)
_DIVIDED_NAMES = tuple(metric.name for metric, _ in _DIVIDED)
_DIVIDED_SECTIONS = frozenset(metric.section for metric, _ in _DIVIDED)
_RESULT, _USED, _NO_WHYS = ("result",), ("used",), ("",)
_NO_REASON = Reason.of("no_reason").text
_NULL, _NOT_GIVEN = "given as null", "not given for this experiment"
_HASHES = frozenset({"config_hash", "campaign_id", "engine_load_id", "fingerprint"})  # short ones

# A value and, where it is None, why.
_Cell = tuple[Any, str]
_Names = tuple[str, ...]
_Whys = tuple[str, ...]


class _Part(NamedTuple):  # names and reasons that are the same in many are one object
    names: _Names
    values: Sequence[Any]
    whys: _Whys  # why each value is None
    is_shared: bool = False  # by other rows


@dataclass
class _Column:
    kinds: set[str] = field(default_factory=set)
    has_value: bool = False
    has_text: bool = False  # whether a value's text is not empty
    is_partial: bool = False  # whether a row has no value

    def add(self, value: Any) -> None:
        self.kinds |= {kind} if (kind := _kind(value)) is not None else set()
        self.has_value = self.has_value or value not in (None, "", [])
        self.has_text = self.has_text or cell_text(value) != ""
        self.is_partial = self.is_partial or value is None


_Keep = Callable[[Sequence[Any]], Sequence[Any]]


class _Shape(NamedTuple):
    names: _Names
    whys: _Whys
    floats: Sequence[int]  # their places
    others: Sequence[int]  # those of other values that are not None
    keep_floats: _Keep
    keep_others: _Keep
    unseen: list[int]  # the places of lists, and of texts that were empty so far: others tell more about the column


class _Form(NamedTuple):
    pick: _Keep  # the values of the columns, from those of the row and the shared ones
    whys: Sequence[str]
    shared: tuple[Any, ...]  # the values of shared parts, and None
    texts: Sequence[int]  # the columns of values of the row that become texts


def _keeping(places: Sequence[int]) -> _Keep:
    if len(places) < 2:  # of which `itemgetter` gives no tuple
        return lambda values: [values[at] for at in places]
    return operator.itemgetter(*places)


class _Rows:
    def __init__(self) -> None:
        self.columns: dict[str, _Column] = {}
        self._shapes: list[_Shape] = []
        self._shape_numbers: dict[Any, int] = {}  # by identity and types
        self._shared: dict[int, int] = {}  # by identity
        self._shared_parts: list[tuple[int, _Part]] = []  # with their shapes
        self._forms: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # shapes of a row, and its shared parts
        # Its form, its floats, which are packed to a quarter of their size, and its other values; without None.
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, parts: Iterable[_Part]) -> None:
        shapes, shared = list[int](), list[int]()
        floats, others = list[float](), list[Any]()
        for part in parts:
            if not part.is_shared:
                number = self._shape_of(part)
                shape = self._shapes[number]
                shapes.append(number)
                floats += shape.keep_floats(part.values)
                others += shape.keep_others(part.values)
                continue
            if id(part) not in self._shared:
                self._shared[id(part)] = len(self._shared)
                self._shared_parts.append((self._shape_of(part), part))
            shared.append(self._shared[id(part)])
        form = (tuple(shapes), tuple(shared))
        packed = struct.pack(f"{len(floats)}d", *floats)
        self._rows.append((self._forms.setdefault(form, len(self._forms)), packed, *others))

    def _shape_of(self, part: _Part) -> int:
        types = tuple(map(type, part.values))
        key = id(part.names), id(part.whys), types
        number = self._shape_numbers.get(key)
        if number is None:
            number = self._shape_numbers[key] = len(self._shapes)
            floats = [at for at, kind in enumerate(types) if kind is float]
            others = [at for at, kind in enumerate(types) if kind not in (float, type(None))]
            unseen = [at for at, value in enumerate(part.values) if types[at] is list or value == ""]
            keep = _keeping(floats), _keeping(others)
            self._shapes.append(_Shape(part.names, part.whys, floats, others, *keep, unseen))
            for name, value in zip(part.names, part.values, strict=True):
                self.columns.setdefault(name, _Column()).add(value)
        shape = self._shapes[number]
        for at in [at for at in shape.unseen if part.values[at]]:
            self.columns[part.names[at]].add(part.values[at])
            if types[at] is str:
                shape.unseen.remove(at)
        return number

    def lists(
        self, columns: _Names, as_text: Callable[[Any], str] | None = None
    ) -> Iterator[tuple[list[Any], Sequence[str]]]:
        """Of each row its values in these columns, and why they are None; with `as_text`, only numbers are no texts."""
        texts = [at for at, it in enumerate(columns) if self.is_mixed(it) or (as_text and not self.is_number(it))]
        text_of = as_text or cell_text
        places_of = functools.lru_cache(256)(lambda own, shared: self._places(own, shared, columns))
        forms = [self._form(*form, places_of, texts, text_of) for form in self._forms]
        for row in self._rows:
            form = forms[row[0]]
            floats = struct.unpack(f"{len(row[1]) // 8}d", row[1])
            chosen = [*form.pick(row + floats + form.shared)]
            for at in form.texts:
                chosen[at] = text_of(chosen[at])
            yield chosen, form.whys

    def _form(
        self,
        shapes: tuple[int, ...],
        numbers: tuple[int, ...],
        places_of: Callable[..., tuple[Sequence[int], Sequence[str], _Keep]],
        texts: Sequence[int],
        text_of: Callable[[Any], str],
    ) -> _Form:
        parts = [self._shared_parts[number] for number in numbers]
        shared = [value for _, part in parts for value in part.values if value is not None]
        n_own = 2 + sum(len(self._shapes[shape].floats) + len(self._shapes[shape].others) for shape in shapes)
        places, whys, pick = places_of(shapes, tuple(shape for shape, _ in parts))
        for place in [place for at in texts if (place := places[at]) >= n_own]:
            shared[place - n_own] = text_of(shared[place - n_own])
        return _Form(pick, whys, (*shared, None), [at for at in texts if 0 < places[at] < n_own])

    def _places(
        self, own: tuple[int, ...], shared: tuple[int, ...], columns: _Names
    ) -> tuple[Sequence[int], Sequence[str], _Keep]:
        every = [self._shapes[shape] for shape in own + shared]
        mine, others = list(enumerate(every))[: len(own)], list(enumerate(every))[len(own) :]
        kept = [(number, shape.others) for number, shape in mine] + [(number, shape.floats) for number, shape in mine]
        kept += [(number, sorted([*shape.floats, *shape.others])) for number, shape in others]
        place_of = dict(zip(((number, at) for number, places in kept for at in places), itertools.count(2)))
        places = {  # of a name that is in two parts, the later one has the value and the reason
            name: (place_of.get((number, at), -1), shape.whys[at])
            for number, shape in enumerate(every)
            for at, name in enumerate(shape.names)
        }
        found = [places.get(name, (-1, _NOT_GIVEN)) for name in columns]
        chosen = [place for place, _ in found]
        return chosen, [why for _, why in found], _keeping(chosen)

    def has_value(self, name: str) -> bool:
        column = self.columns.get(name, _Column())
        return column.has_text if self.is_mixed(name) else column.has_value

    def is_partial(self, name: str) -> bool:
        column = self.columns.get(name)  # none of a table without rows
        return column is None or column.is_partial or not all(name in names for names in self._names_of_rows)

    @functools.cached_property
    def _names_of_rows(self) -> Sequence[Set[str]]:
        names = [shape.names for shape in self._shapes]
        forms = {(*own, *(self._shared_parts[number][0] for number in numbers)) for own, numbers in self._forms}
        return [{name for shape in each for name in names[shape]} for each in forms]

    def is_number(self, name: str) -> bool:
        return name in self.columns and self.columns[name].kinds == {"number"}

    def is_bool(self, name: str) -> bool:
        return name in self.columns and self.columns[name].kinds == {"bool"}

    def is_mixed(self, name: str) -> bool:
        return name in self.columns and len(self.columns[name].kinds) > 1


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    packed: _Rows

    def __len__(self) -> int:
        return len(self.packed)

    def rows(self) -> Iterator[Mapping[str, _Cell]]:
        """Each row as JSON values with their null reasons, by column."""
        for values, whys in self.packed.lists(self.columns):
            yield dict(zip(self.columns, zip(values, whys, strict=True), strict=True))


def make_table(results: Iterable[StoredResult], *, base: Path | None = None, is_every_attempt: bool = False) -> Table:
    """The rows of the results by campaign, run, host and order of execution; their paths are relative to `base`."""
    known = sorted(results, key=_place)
    used = {record.identity.key for record in used_records(item.record for item in known)}
    rows, converter = _Rows(), _Converter()
    chosen = known if is_every_attempt else _one_an_experiment(known, used)
    del known
    chosen.reverse()
    prefix = "" if base is None else f"{base.as_posix()}/"
    while chosen:  # each result can go when its row is made
        item = chosen.pop()
        path, is_used = item.file.removeprefix(prefix), item.record.identity.key in used
        rows.add(converter.parts(path, item.record, is_used=is_used))
    return Table(_ordered_columns(rows.columns), rows)


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if value is None else "number" if is_number else type(value).__name__


def summary_columns(results: Iterable[StoredResult]) -> tuple[str, ...]:
    counted: dict[str, None] = {}
    for energy in (item.record.section("energy") for item in results):
        parts = parts_of_source(energy.primary_j.source or "")
        counted |= dict.fromkeys(name for name in parts if getattr(energy, name) is not None)
    first = ("config_name", "cycle_index", "attempt", "valid", "output_tok_per_s", "energy_per_output_tok_j")
    return (*first, *(counted or ("gpu_energy_j",)), "ttft_p50_s", "e2e_p50_s", "window_s")


def with_values(table: Table) -> Table:
    return with_columns(table, [name for name in table.columns if table.packed.has_value(name)])


def with_columns(table: Table, names: Sequence[str]) -> Table:
    unknown = [name for name in names if name not in table.columns]
    if unknown and len(table):
        guess = did_you_mean(unknown[0], table.columns)
        raise UserError(f"unknown column {unknown[0]!r}{guess}", "`lem results export --format json` has all columns")
    return replace(table, columns=tuple(names))


def _place(item: StoredResult) -> tuple[Any, ...]:
    found = item.record.identity
    run = (found.campaign_name, found.run_id, found.host)
    return (*run, found.order_index, found.cycle_index, found.experiment_id, found.attempt, item.file)


def _one_an_experiment(results: Sequence[StoredResult], used: set[ResultKey]) -> list[StoredResult]:
    chosen: dict[tuple[str, str, str, int], StoredResult] = {}
    for item in results:
        key = item.record.identity.key
        before = chosen.get(key[:4])
        if before is None or before.record.identity.key not in used:
            chosen[key[:4]] = item
    return list(chosen.values())


class _Converter:
    """Makes the cells of records, and remembers those of what many share."""

    def __init__(self) -> None:
        # By identity, so that what has it must stay.
        self._shared: dict[int, tuple[Any, Sequence[_Part]]] = {}
        self._whys: dict[Any, tuple[Any, tuple[str, ...]]] = {}

    def parts(self, path: str, record: Record, *, is_used: bool) -> Iterator[_Part]:
        found = {name: record.section(name) for name in hints_of(Record)}
        yield _Part(_RESULT, (path,), _NO_WHYS)
        yield from self._section(found["identity"])
        yield _Part(_USED, (is_used,), _NO_WHYS)
        for name in _SECTIONS:
            yield from self._section(found[name])
        yield from self._latencies(found["latency"])
        for name in _LATER_SECTIONS:
            yield from self._section(found[name])
        yield from self._once(found["environment"], self._section)
        yield self._divided(found)
        for index, gpu in enumerate(found["gpus"]):
            for part in self._section(gpu):
                yield part._replace(names=_gpu_columns(index))
        for name in ("requested", "extra_metadata"):
            yield from self._once(found[name], functools.partial(_dotted, name))

    def _once(self, what: Any, make: Callable[[Any], Iterable[_Part]]) -> Sequence[_Part]:
        if id(what) not in self._shared:
            self._shared[id(what)] = what, [part._replace(is_shared=True) for part in make(what)]
        return self._shared[id(what)][1]

    def _section(self, section: Any) -> Iterator[_Part]:
        layout = _layout_of(section.__class__)
        values, whys, names = [*layout.read(section)], self._whys_of(section, layout), layout.names
        if not _PLAIN.issuperset(map(type, values)):
            values = [it if type(it) in _PLAIN else _plain(it) for it in values]
        for at in layout.hashes:
            values[at] = values[at] and hash_label(values[at])
        mappings = tuple(at for at in layout.mappings if values[at] is not None)
        if not mappings:
            yield _Part(names, values, whys)
            return
        rest = [value for at, value in enumerate(values) if at not in mappings]
        yield _Part(_without(names, mappings), rest, _without(whys, mappings))
        for at in mappings:
            yield _part_of(dict(_flat(names[at], values[at], "")))

    def _whys_of(self, section: Any, layout: _Layout) -> tuple[str, ...]:
        reasons = section.null_reasons
        key = layout.names, id(reasons) if "null_reasons" in vars(section) else tuple(reasons)
        if key not in self._whys:
            self._whys[key] = reasons, tuple(reasons[it].text if it in reasons else "" for it in layout.names)
        return self._whys[key][1]

    def _divided(self, found: Mapping[str, Any]) -> _Part:
        record = Record.lazily(found.__getitem__)
        absent = {name: self._whys_of(found[name], _layout_of(found[name].__class__)) for name in _DIVIDED_SECTIONS}
        values, whys = [], []
        for metric, at in _DIVIDED:
            if getattr(found[metric.section], metric.field) is None:
                value, why = None, absent[metric.section][at] or _NO_REASON
            else:
                value, reason = metric.read(record)
                why = "" if reason is None else _text_of(reason)
            values.append(value)
            whys.append(why)
        return _Part(_DIVIDED_NAMES, values, _interned(tuple(whys)))

    def _latencies(self, latency: Latency) -> Iterator[_Part]:
        for stem in READABLE_LATENCIES if latency.itl_s else LATENCIES:
            columns, found = _latency_columns(stem), getattr(latency, f"{stem}_s")
            if found is None:
                why = latency.null_reasons.get(f"{stem}_s")
                whys = _interned(("" if why is None else _text_of(why),) * len(columns))
                yield _Part(columns, (None,) * len(columns), whys)
            else:
                values = _layout_of(Distribution).read(found)
                yield _Part(columns, values, _distribution_whys(tuple(it is None for it in values), *values[_COUNTS:]))


_PLAIN = frozenset({str, int, float, bool, type(None)})


class _Layout(NamedTuple):
    names: tuple[str, ...]
    read: Callable[[Any], tuple[Any, ...]]
    hashes: tuple[int, ...]  # the places of hashes
    mappings: tuple[int, ...]


@functools.cache
def _layout_of(kind: Any) -> _Layout:
    hints = hints_of(kind)
    hashes = tuple(at for at, name in enumerate(hints) if name in _HASHES)
    mappings = tuple(at for at, hint in enumerate(hints.values()) if str(hint).startswith("collections.abc.Mapping["))
    return _Layout(tuple(hints), operator.attrgetter(*hints), hashes, mappings)


def _plain(value: Any) -> Any:
    if isinstance(value, Reason):
        return _text_of(value)
    if isinstance(value, tuple):  # of texts or reasons
        return [*map(_plain, value)]
    return str(value) if isinstance(value, str) else value  # not the member of an enumeration


@functools.lru_cache(256)
def _without(texts: tuple[str, ...], places: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(text for at, text in enumerate(texts) if at not in places)


@functools.lru_cache(4096)
def _interned(texts: tuple[str, ...]) -> tuple[str, ...]:
    return texts


def _part_of(cells: Mapping[str, _Cell]) -> _Part:
    whys = tuple(why for _, why in cells.values())
    return _Part(_interned(tuple(cells)), [value for value, _ in cells.values()], _interned(whys))


@functools.lru_cache(4096)
def _text_of(reason: Reason) -> str:
    return reason.text


@functools.cache
def _gpu_columns(index: int) -> tuple[str, ...]:
    return tuple(f"gpu{index}_{name}" for name in hints_of(Gpu))


_DISTRIBUTION = tuple(hints_of(Distribution))
_COUNTS = _DISTRIBUTION.index("n")


@functools.cache
def _latency_columns(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}_{name}" if name.startswith("n") else f"{stem}_{name}_s" for name in _DISTRIBUTION)


@functools.lru_cache(4096)
def _distribution_whys(absent: tuple[bool, ...], *counts: Any) -> tuple[str, ...]:
    values: list[Any] = [None if is_absent else 0.0 for is_absent in absent[:_COUNTS]]
    reasons = Distribution(*values, *counts).null_reasons
    return tuple(reasons[name].text if name in reasons else "" for name in _DISTRIBUTION)


def _dotted(prefix: str, mapping: Mapping[str, Any]) -> Iterator[_Part]:
    cells: dict[str, _Cell] = {}
    for path, value in leaves(mapping):
        cells.update(_flat(".".join((prefix, *map(str, path))), value, _NULL))
    yield _part_of(cells)


def _flat(name: str, value: Any, why: str) -> Iterator[tuple[str, _Cell]]:
    if isinstance(value, (list, tuple)):
        items = [item.text if isinstance(item, Reason) else item for item in value]
        if any(isinstance(item, (Mapping, list, tuple)) for item in items):
            value = dict(enumerate(items))
        else:
            value = items if len({*map(_kind, items)}) < 2 else [*map(cell_text, items)]
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item, _NULL)
    else:
        yield name, (value.text if isinstance(value, Reason) else value, why)


def _ordered_columns(seen: Iterable[str]) -> tuple[str, ...]:
    names = tuple(seen)
    numbers = {name: number for name in names if (number := _gpu_number(name)) is not None}
    fixed = [name for name in names if name not in numbers and "." not in name]
    dotted = sorted(name for name in names if "." in name)
    return (*fixed, *(name for number in sorted({*numbers.values()}) for name in _gpu_columns(number)), *dotted)


def _gpu_number(column: str) -> int | None:
    head = column.split("_", 1)[0].removeprefix("gpu")
    return int(head) if column.startswith("gpu") and head.isdecimal() else None


def cell_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "; ".join(map(cell_text, value)) if isinstance(value, list) else json.dumps(value, allow_nan=False)
