"""The index of a run: one short line for each result, so that tables read one file instead of ten thousand.

It is a cache beside the results, with paths relative to the run's folder. A line counts while size, time and inode of
its result are as they were; otherwise the result is read again. A line that is torn or damaged is ignored, and of two
lines for one result the later counts. What is no cache is the digest of a result that the campaign itself recorded when
it was measured: it stays, and a result that no longer has it is not used.

Results of a run differ in numbers and little else. So the line of a result has its numbers; what it shares with others
is in lines of their own: a template for each section of a record, and a shape, which names the templates of a record. A
line of a result does not count without its shape and templates.

A line is an object of JSON: a check, which is the beginning of the SHA-256 of what follows it, and a list. That of a
result has the path, the stamp and digest of the file, the names of its shape and of the template of `requested`, the
numbers, and the few texts that differ between results. The numbers are those of all sections in their order, integers
and floats of 8 bytes each, as base64: a section is unpacked when it is asked for. The list of a template has its name,
the packed section with 0 or "" in place of each value that a result has, and the places of these values, texts last.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import struct
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lem.base import durable
from lem.base.codec import hints_of, pack, unpack
from lem.base.dataclass import is_dataclass
from lem.record import Record, RecordError, parse_record

INDEX_FILE = "index.jsonl"

_VERSION = 3  # 1 had whole records in its lines, 2 numbers as JSON
_RESULT, _OF_VERSION_1 = "result", "recorded"
_CHECK = b'{"check":"'
_CHECK_DIGITS = 16
_REST = len(_CHECK) + _CHECK_DIGITS + len(b'",')
_NAME_DIGITS = 12
_AT_ONCE = 100  # lines that are parsed together
# A file system that gives a file another inode at each mount would have all lines written again each time.
_MOST_LINES = 4


class AlteredError(RecordError):
    """A result that is not the one that was measured."""


def describe_altered(found: str, recorded: str) -> str:
    return f"its SHA-256 is {found}, but it was {recorded} when the result was measured"


class Found(NamedTuple):
    record: Record
    sha256: str  # of the bytes that the record was read from
    is_recorded: bool  # whether the campaign recorded that digest when the result was measured


_Stamp = tuple[int, int, int]  # size, time, inode
_Maker = Callable[[Sequence[Any]], Any]


class _Line(NamedTuple):
    path: str  # of the result, relative to the folder of the run
    size_b: int
    mtime_ns: int
    inode: int
    sha256: str
    is_recorded: bool
    shape: str
    requested: str  # the template of the section that is another one in each configuration
    numbers: bytes  # what its templates leave out, in the order of the sections
    texts: str  # the same, each followed by `_END`

    @property
    def stamp(self) -> _Stamp:
        return self[1:4]


_FACTS = (str, int, int, int, str, bool)  # of a result, in a line of any version from 2
_TYPES = (*_FACTS, str, str, str, str)
_REQUESTED = "requested"
_FORMATS = {int: "q", float: "d"}  # of `struct`
_INTEGERS = range(-(2**63), 2**63)
# Those that are the same in many results, with all their numbers, and then one object.
_SHARED = frozenset({"environment", "extra_metadata", "served"})
# Texts that differ between results or configurations.
_OWN_TEXTS: Mapping[str, Sequence[str]] = {
    "identity": ("experiment_id", "config_name", "config_hash", "start_utc"),
    "validity": ("engine_load_id",),
}
_END = "|"  # few texts have it, and these are in the template


class _Shape:
    """What makes the sections of records from the values of their lines."""

    def __init__(self, sections: Mapping[str, tuple[_Maker, Sequence[type]]], requests: Mapping[str, Any]) -> None:
        self._requests = requests
        self._parts: dict[str, tuple[_Maker, Callable[[bytes, int], tuple[Any, ...]], int, slice | None]] = {}
        formats, n_texts = "<", 0
        for name, (make, kinds) in sections.items():
            own = "".join(_FORMATS[kind] for kind in kinds if kind is not str)
            texts = slice(n_texts, n_texts := n_texts + kinds.count(str)) if str in kinds else None
            self._parts[name] = make, struct.Struct(f"<{own}").unpack_from, struct.calcsize(formats), texts
            formats += own
        self._numbers, self._n_texts = struct.Struct(formats), n_texts

    def fits(self, line: _Line) -> bool:
        is_whole = len(line.numbers) == self._numbers.size and line.texts.count(_END) == self._n_texts
        return is_whole and math.isfinite(sum(self._numbers.unpack(line.numbers)))

    def section(self, line: _Line, name: str) -> Any:
        if name == _REQUESTED:
            return self._requests[line.requested]
        make, unpack_from, place, texts = self._parts[name]
        values = unpack_from(line.numbers, place)
        return make(values if texts is None else (*values, *line.texts.split(_END)[texts]))


class _Shapes:
    def __init__(self) -> None:
        self.templates: dict[str, Any] = {}  # as JSON values: what a section has, and the places of its values
        self.shapes: dict[str, Sequence[str]] = {}  # the templates of all sections but `requested`
        self._known: dict[str, _Shape | None] = {}
        self._makers: dict[tuple[str, str], tuple[_Maker, Sequence[type]] | None] = {}
        self._requests: dict[str, Any] = {}

    def record(self, line: _Line) -> Record | None:
        """The record of a line, each section made when it is asked for; None where the line does not count."""
        if line.shape not in self._known:
            self._known[line.shape] = self._shape(self.shapes.get(line.shape, ()))
        shape = self._known[line.shape]
        if shape is None or not shape.fits(line):
            return None
        if line.requested not in self._requests:
            self._requests[line.requested] = _requested(self.templates.get(line.requested))
        is_whole = self._requests[line.requested] is not None
        return Record.lazily(functools.partial(shape.section, line)) if is_whole else None

    def _shape(self, names: Sequence[str]) -> _Shape | None:
        if len(names) != len(_sections()) or not all(name in self.templates for name in names):
            return None
        found = {}
        for section, name in zip(_sections(), names, strict=True):
            if (section, name) not in self._makers:
                self._makers[section, name] = _maker_of(section, self.templates[name])
            found[section] = self._makers[section, name]
        checked = {section: made for section, made in found.items() if made is not None}
        return _Shape(checked, self._requests) if len(checked) == len(found) else None

    def add(self, record: Record) -> tuple[Any, ...]:
        """The shape, the template of `requested`, the numbers and the texts of a record."""
        names, numbers, texts = [], b"", ""
        for section in _sections():
            packed, found = pack(getattr(record, section)), list[tuple[list[Any], Any]]()
            if section not in _SHARED:
                packed = _without_values(packed, [], found, _own_places(section))
            found.sort(key=lambda item: type(item[1]) is str)
            own = [value for _, value in found if type(value) is not str]
            numbers += struct.pack("<" + "".join(_FORMATS[type(value)] for value in own), *own)
            texts += "".join(value + _END for _, value in found[len(own) :])
            names.append(self._named([packed, [place for place, _ in found]]))
        requested = self._named([pack(record.requested), []])
        shape = _name_of([_layout(), *names])
        if shape not in self.shapes or self._known.get(shape) is None:
            self.shapes[shape] = names
            self._known.pop(shape, None)
        return shape, requested, numbers, texts

    def _named(self, template: Any) -> str:
        name = _name_of(template)
        self.templates[name] = template
        return name

    def definitions(self, lines: Iterable[_Line], written: set[str]) -> Iterator[bytes]:
        """The lines that these need before them and that are not `written` yet, which they are then."""
        for shape, requested in dict.fromkeys((line.shape, line.requested) for line in lines):
            names = self.shapes[shape]
            for name in dict.fromkeys((*names, requested)):
                if name not in written:
                    yield _encoded("template", [name, *self.templates[name]])
            if shape not in written:
                yield _encoded("shape", [shape, _layout(), *names])
            written.update((shape, requested, *names))

    def take(self, others: _Shapes, line: _Line) -> None:
        names = self.shapes[line.shape] = others.shapes[line.shape]
        self.templates |= {name: others.templates[name] for name in (*names, line.requested)}


@functools.cache
def _sections() -> tuple[str, ...]:
    return tuple(name for name in hints_of(Record) if name != _REQUESTED)


@functools.cache
def _own_places(section: str) -> frozenset[int]:
    own = _OWN_TEXTS.get(section)
    names = hints_of(hints_of(Record)[section]) if own else ()
    return frozenset(at for at, name in enumerate(names) if own and name in own)


def _without_values(value: Any, place: list[Any], found: list[tuple[list[Any], Any]], own_texts: frozenset[int]) -> Any:
    kind = type(value)
    is_own_text = kind is str and len(place) == 1 and place[0] in own_texts and _END not in value
    if kind is float or (kind is int and value in _INTEGERS) or is_own_text:
        found.append((place, value))
        return kind()
    if kind is list:
        return [_without_values(item, [*place, at], found, own_texts) for at, item in enumerate(value)]
    if kind is dict and value and all(type(item) is float for item in value.values()):  # an uncertainty by its causes
        return {key: _without_values(item, [*place, key], found, own_texts) for key, item in value.items()}
    return value


# What cannot be read below is of another lem, since lines have checksums: its results are read from their files.


def _requested(template: Any) -> Mapping[str, Any] | None:
    found = next(iter(template or ()), None)
    with contextlib.suppress(RecursionError, ValueError):
        json.dumps(found, allow_nan=False)  # a number may be too large to be finite
        return found if isinstance(found, dict) else None
    return None


def _maker_of(section: str, template: Any) -> tuple[_Maker, Sequence[type]] | None:
    packed, places = template if isinstance(template, list) and len(template) == 2 else (None, None)
    if not isinstance(places, list) or not all(isinstance(place, list) for place in places):
        return None
    kinds = [type(_value_at(packed, place)) for place in places]
    if not {*kinds} <= {int, float, str} or kinds != sorted(kinds, key=lambda kind: kind is str):
        return None
    with contextlib.suppress(ValueError):
        example = unpack(hints_of(Record)[section], packed)
        return _maker(example, [(place, at) for at, place in enumerate(places)]), kinds
    return None


def _value_at(value: Any, place: Sequence[Any]) -> Any:
    for step in place:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        else:
            is_there = isinstance(value, list) and type(step) is int and 0 <= step < len(value)
            value = value[step] if is_there else None
    return value


def _maker(example: Any, places: Sequence[tuple[Sequence[Any], int]]) -> _Maker:
    """What makes a copy of `example` with other values in these places, given with their numbers."""
    if not places:
        return lambda _: example
    kind = type(example)
    names = tuple(hints_of(kind)) if is_dataclass(kind) else None
    fixed = vars(example) if names is not None else example
    inner: dict[Any, list[tuple[Sequence[Any], int]]] = {}
    for (first, *rest), number in places:
        inner.setdefault(first if names is None else names[first], []).append((rest, number))
    plain = [(name, found[0][1]) for name, found in inner.items() if not found[0][0]]
    nested = [(name, _maker(fixed[name], found)) for name, found in inner.items() if found[0][0]]

    def section(values: Sequence[Any]) -> Any:
        # Without the constructor, at a tenth of its time: the example went through it, and the values have its types.
        made = object.__new__(kind)
        fields = made.__dict__
        fields.update(fixed)
        for name, number in plain:
            fields[name] = values[number]
        for name, make in nested:
            fields[name] = make(values)
        return made

    def other(values: Sequence[Any]) -> Any:
        found: Any = fixed.copy() if kind is dict else list(fixed)
        for name, number in plain:
            found[name] = values[number]
        for name, make in nested:
            found[name] = make(values)
        return found if kind is dict else kind(found)

    return other if names is None else section


class Index:
    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_FILE
        self._folder = folder
        self.lines: dict[str, _Line] = {}
        self.shapes = _Shapes()
        self._recorded: dict[str, str] = {}
        self._n_lines = 0  # of results
        self._new: list[_Line] = []
        with contextlib.suppress(OSError), durable.open_regular(self._path, durable.MOST_B) as stream:
            while lines := list(itertools.islice(stream, _AT_ONCE)):
                for kind, values in _parsed(lines):
                    self._enter(kind, values)
        self._written = {*self.shapes.templates, *self.shapes.shapes}

    def read(self, name: str, *, is_checked: bool = False) -> Found:
        """The result in that file of the run, by its line while that counts; OSError, RecordError or AlteredError."""
        path = f"{self._folder}/{name}"
        line, recorded = self.lines.get(name), self._recorded.get(name)
        is_recorded = recorded is not None
        record = None if line is None else self.shapes.record(line)
        is_known = line is not None and record is not None and recorded in (None, line.sha256)
        if line and record and is_known and not is_checked and _stamp(os.stat(path)) == line.stamp:  # noqa: PTH116 - quick
            return Found(record, line.sha256, is_recorded)
        status, data = durable.read_with_status(path)
        stamp = _stamp(status)
        digest = hashlib.sha256(data).hexdigest()
        if recorded not in (None, digest):
            raise AlteredError(describe_altered(digest, str(recorded)))
        if line is None or record is None or line.sha256 != digest:
            line = _Line(name, *stamp, digest, is_recorded, *self.shapes.add(parse_record(data)))
            self._note(line)
        elif stamp != line.stamp:
            size_b, mtime_ns, inode = stamp
            line = line._replace(size_b=size_b, mtime_ns=mtime_ns, inode=inode, is_recorded=is_recorded)
            self._note(line)
        # Not the record that was parsed: what templates have is shared by all results of the same.
        return Found(self.shapes.record(line) or parse_record(data), digest, is_recorded)

    def write(self) -> None:
        if self._new and self._n_lines + len(self._new) <= _MOST_LINES * len(self.lines):
            with contextlib.suppress(OSError):
                _append(self._path, self._new, self.shapes, self._written)
        self._new = []

    def _note(self, line: _Line) -> None:
        self._take(line)
        self._new.append(line)

    def _enter(self, kind: str, values: Any) -> None:
        if not isinstance(values, list) or not values or not isinstance(values[0], str):  # by another program
            return
        if kind == _RESULT:
            self._n_lines += 1
            kinds = tuple(map(type, values))
            if kinds == _TYPES:
                values[6:9] = sys.intern(values[6]), sys.intern(values[7]), _numbers(values[8])
                self._take(_Line(*values))
            elif kinds[: len(_FACTS)] == _FACTS and values[5]:
                self._recorded[values[0]] = values[4]
        elif kind == "template" and len(values) == 3:
            self.shapes.templates[values[0]] = values[1:]
        elif kind == "shape" and values[1:2] == [_layout()] and all(isinstance(name, str) for name in values):
            self.shapes.shapes[values[0]] = values[2:]
        elif kind == _OF_VERSION_1 and len(values) == 2:
            self._recorded[values[0]] = values[1]

    def _take(self, line: _Line) -> None:
        if line.is_recorded:
            self._recorded[line.path] = line.sha256
        self.lines[line.path] = line


def _numbers(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text)
    except ValueError:  # by another program, since lines have checksums
        return b""


def record_result(folder: Path, path: Path, record: Record, digest: str, written: set[str] | None = None) -> None:
    """`written` are the names of templates and shapes that this process has already put into the index."""
    shapes, name = _Shapes(), path.relative_to(folder).as_posix()
    line = _Line(name, *_stamp(path.stat()), digest, True, *shapes.add(record))
    _append(folder / INDEX_FILE, [line], shapes, set() if written is None else written)


class CopiedLines:
    """Lines of results that are copied to another run, which then need not be read again there."""

    def __init__(self) -> None:
        self._known: dict[Path, Index] = {}
        self._shapes = _Shapes()
        self._new: dict[Path, list[_Line]] = {}

    def add(self, source: tuple[Path, Path], copy: Path, target: tuple[Path, Path], found: Found) -> None:
        """`copy` will be renamed to `target`. Like `source`, that is the folder of a run and the path of a result."""
        run, path = source
        index = self._known[run] if run in self._known else self._known.setdefault(run, Index(run))
        line = index.lines.get(path.relative_to(run).as_posix())
        # Not the record in `found`, whose configuration may have got the name of its host.
        if line is not None and line.sha256 == found.sha256 and index.shapes.record(line) is not None:
            self._shapes.take(index.shapes, line)
            parts: tuple[Any, ...] = line[6:]
        else:
            parts = self._shapes.add(parse_record(durable.read_bytes(copy)))
        folder, name = target[0], target[1].relative_to(target[0]).as_posix()
        own = _Line(name, *_stamp(copy.stat()), found.sha256, found.is_recorded, *parts)
        self._new.setdefault(folder, []).append(own)

    def write(self) -> None:
        for folder, lines in self._new.items():
            _append(folder / INDEX_FILE, lines, self._shapes, set())


def _append(path: Path, lines: Sequence[_Line], shapes: _Shapes, written: set[str]) -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    named = set(written)
    data = b"".join([*shapes.definitions(lines, named), *map(_encoded_result, lines)])
    sys.audit("lem.write", str(path))
    with open(os.open(path, flags, 0o666), "r+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        # After a line that a crash has torn, the next one starts anew.
        is_torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
        stream.write(b"\n" * is_torn + data)
    written |= named


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _text(value: Any) -> bytes:
    return durable.utf8(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def _encoded_result(line: _Line) -> bytes:
    numbers = binascii.b2a_base64(line.numbers, newline=False).decode()
    return _encoded(_RESULT, [*line[:8], numbers, line.texts])


def _encoded(kind: str, values: Sequence[Any]) -> bytes:
    rest = b'"%s":%s}\n' % (kind.encode(), _text(values))
    return _CHECK + _check_of(rest) + b'",' + rest


def _check_of(rest: bytes) -> bytes:
    return hashlib.sha256(rest).hexdigest()[:_CHECK_DIGITS].encode()


def _name_of(template: Any) -> str:
    return hashlib.sha256(_text(template)).hexdigest()[:_NAME_DIGITS]


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """What intact lines have, by kind; of those of version 1 what is no cache."""
    rests = []
    for line in lines:
        rest = line[_REST:]
        if line.startswith(_CHECK) and line[len(_CHECK) : _REST] == _check_of(rest) + b'",':
            rests.append(_of_version_1(rest) if rest.startswith(b'"path":') else rest)
    try:
        found = _json(b"[{" + b",{".join(filter(None, rests)) + b"]") if any(rests) else []
    except (RecursionError, ValueError):  # by another program, since lines have checksums
        found = list(filter(None, map(_alone, rests)))
    return itertools.chain.from_iterable(entry.items() for entry in found if isinstance(entry, dict))


def _of_version_1(rest: bytes) -> bytes:
    # A path of a result has no quotes, and at most 600 bytes.
    entry = _alone(rest) if b'"is_recorded":false' not in rest[:1000] else None
    if not isinstance(entry, dict) or entry.get("is_recorded") is not True:
        return b""
    return b'"%s":%s}' % (_OF_VERSION_1.encode(), _text([entry.get("path"), str(entry.get("sha256"))]))


def _alone(rest: bytes) -> Any:
    try:
        return _json(b"{" + rest)
    except (RecursionError, ValueError):
        return None


def _json(data: bytes) -> Any:
    return json.loads(data, parse_constant=_refuse)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


@functools.cache
def _layout() -> str:
    kinds: list[Any] = [Record]
    names = [str(_VERSION)]
    for kind in kinds:
        for name, hint in hints_of(kind).items():
            names.append(f"{kind.__name__}.{name}: {hint}")
            kinds += [item for item in (hint, *typing.get_args(hint)) if is_dataclass(item)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:_NAME_DIGITS]
