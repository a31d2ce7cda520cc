"""The index of a run: one line for each result, so that tables read one file instead of ten thousand.

It is a cache beside the results, with paths relative to the run's folder. A line counts while size, time and inode of
its result are as they were; otherwise the result is read again. A line that is torn or damaged is ignored, and of two
lines for one result the later counts. What is no cache is the digest of a result that the campaign itself recorded when
it was measured: it stays, and a result that no longer has it is not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lem.base import durable
from lem.base.codec import hints_of, pack, unpack
from lem.base.dataclass import dataclass
from lem.base.errors import UserError
from lem.record import Record, RecordError, parse_record

INDEX_FILE = "index.jsonl"

_CHECK = b'{"check":"'
_CHECK_DIGITS = 16
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


_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class _Line:
    path: str  # of the result, relative to the folder of the run
    size_b: int
    mtime_ns: int
    inode: int
    sha256: str
    is_recorded: bool
    layout: str  # by which the record is packed
    record: Mapping[str, str]  # the sections as JSON

    @property
    def stamp(self) -> _Stamp:
        return self.size_b, self.mtime_ns, self.inode

    def unpacked(self) -> Record:
        return Record.lazily(lambda name: _section(name, self.record[name]))

    def encode(self) -> bytes:
        rest = durable.utf8(json.dumps(vars(self), separators=(",", ":"), ensure_ascii=False)[1:]) + b"\n"
        return _CHECK + _check_of(rest) + b'",' + rest


_TYPES: Mapping[str, type] = {
    "path": str,
    "size_b": int,
    "mtime_ns": int,
    "inode": int,
    "sha256": str,
    "is_recorded": bool,
    "layout": str,
    "record": dict,
}


class Index:
    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_FILE
        self._folder = folder
        self.lines: dict[str, _Line] = {}
        self._recorded: dict[str, str] = {}
        self._n_lines = 0
        self._new: list[_Line] = []
        with contextlib.suppress(OSError), durable.open_regular(self._path, durable.MOST_B) as stream:
            for data in stream:
                self._n_lines += 1
                if (line := _decode(data)) is not None:
                    self._take(line)

    def read(self, path: Path, *, is_checked: bool = False) -> Found:
        """The result in a file of the run, by its line while that counts; OSError, RecordError or AlteredError."""
        name = path.relative_to(self._folder).as_posix()
        line, recorded = self.lines.get(name), self._recorded.get(name)
        is_recorded = recorded is not None
        is_known = line is not None and recorded in (None, line.sha256)
        if line is not None and is_known and not is_checked and _stamp(path.stat()) == line.stamp:
            return Found(line.unpacked(), line.sha256, is_recorded)
        with durable.open_regular(path) as stream:
            stamp, data = _stamp(os.fstat(stream.fileno())), stream.read()
        digest = hashlib.sha256(data).hexdigest()
        if recorded not in (None, digest):
            raise AlteredError(describe_altered(digest, str(recorded)))
        if line is None or line.sha256 != digest:
            line = _line(name, stamp, digest, parse_record(data), is_recorded=is_recorded)
            self._note(line)
        elif stamp != line.stamp:
            line = _Line(name, *stamp, digest, is_recorded, line.layout, line.record)
            self._note(line)
        # Not the record that was parsed: sections of the line are shared by all results that have the same.
        return Found(line.unpacked(), digest, is_recorded)

    def write(self) -> None:
        if self._new and self._n_lines + len(self._new) <= _MOST_LINES * len(self.lines):
            with contextlib.suppress(OSError):
                _append(self._path, self._new)
        self._new = []

    def _note(self, line: _Line) -> None:
        self._take(line)
        self._new.append(line)

    def _take(self, line: _Line) -> None:
        if line.is_recorded:
            self._recorded[line.path] = line.sha256
        if line.layout == _layout():
            self.lines[line.path] = line


def record_result(folder: Path, path: Path, record: Record, digest: str) -> None:
    name = path.relative_to(folder).as_posix()
    _append(folder / INDEX_FILE, [_line(name, _stamp(path.stat()), digest, record, is_recorded=True)])


class CopiedLines:
    """Lines of results that are copied to another run, which then need not be read again there."""

    def __init__(self) -> None:
        self._known: dict[Path, Mapping[str, _Line]] = {}
        self._new: dict[Path, list[_Line]] = {}

    def add(self, source: tuple[Path, Path], copy: Path, target: tuple[Path, Path], found: Found) -> None:
        """`copy` will be renamed to `target`. Like `source`, that is the folder of a run and the path of a result."""
        run, path = source
        if run not in self._known:
            self._known[run] = Index(run).lines
        line = self._known[run].get(path.relative_to(run).as_posix())
        # Not the record in `found`, whose configuration may have got the name of its host.
        is_known = line is not None and line.sha256 == found.sha256
        packed = line.record if line is not None and is_known else _packed(parse_record(durable.read_bytes(copy)))
        folder, name = target[0], target[1].relative_to(target[0]).as_posix()
        own = _Line(name, *_stamp(copy.stat()), found.sha256, found.is_recorded, _layout(), packed)
        self._new.setdefault(folder, []).append(own)

    def write(self) -> None:
        for folder, lines in self._new.items():
            _append(folder / INDEX_FILE, lines)


def _append(path: Path, lines: Iterable[_Line]) -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    data = b"".join(line.encode() for line in lines)
    sys.audit("lem.write", str(path))
    with open(os.open(path, flags, 0o666), "r+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        # After a line that a crash has torn, the next one starts anew.
        is_torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
        stream.write(b"\n" * is_torn + data)


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _line(name: str, stamp: _Stamp, digest: str, record: Record, *, is_recorded: bool) -> _Line:
    return _Line(name, *stamp, digest, is_recorded, _layout(), _packed(record))


def _packed(record: Record) -> dict[str, str]:
    sections = {field: pack(getattr(record, field)) for field in hints_of(Record)}
    return {field: json.dumps(item, separators=(",", ":"), ensure_ascii=False) for field, item in sections.items()}


def _check_of(rest: bytes) -> bytes:
    return hashlib.sha256(rest).hexdigest()[:_CHECK_DIGITS].encode()


def _decode(data: bytes) -> _Line | None:
    begin, end = len(_CHECK), len(_CHECK) + _CHECK_DIGITS
    rest = data[end + len(b'",') :]
    if not data.startswith(_CHECK) or data[end : end + 2] != b'",' or _check_of(rest) != data[begin:end]:
        return None
    try:
        fields = json.loads(b"{" + rest)
    except (RecursionError, ValueError):
        return None
    # By hand, since `decode` takes longer than all the rest of reading thousands of lines.
    if {name: type(value) for name, value in fields.items()} != _TYPES:
        return None
    line = _Line(**fields)
    if line.layout == _layout() and line.record.keys() != hints_of(Record).keys():
        return None
    return line if all(type(text) is str for text in line.record.values()) else None


@functools.lru_cache(4096)  # most sections are the same in every result of a configuration
def _section(name: str, text: str) -> Any:
    try:
        return unpack(hints_of(Record)[name], json.loads(text))
    except ValueError as error:  # by another program, since the line has its checksum
        raise UserError(f"an {INDEX_FILE} is corrupt: {name}: {error}", "remove it; it is made again") from error


@functools.cache
def _layout() -> str:
    kinds: list[Any] = [Record]
    names = []
    for kind in kinds:
        for name, hint in hints_of(kind).items():
            names.append(f"{kind.__name__}.{name}: {hint}")
            kinds += [item for item in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(item)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
