"""How the files of a manifest are protected: the checksum of the snapshot, and the journal of the changes since.

A snapshot begins with its schema version and the SHA-256 of all that follows, which also tells it from every other.

The journal has a line for each change, so that a change costs the same in any plan. A line is a check, a space and a
JSON document; the check is the beginning of the SHA-256 of the check before it and the document. So a line that is
damaged, missing or out of place is found, wherever it is. The first line names the snapshot that the rest continues:
a journal of another one is ignored. A crash leaves such a journal between a new snapshot, which holds its changes, and
the journal's removal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lem.base import durable

# Version 1, of the first build, had no checksum, and no digests of results.
SCHEMA_VERSION = 2
_START = b'{\n  "schema_version": %d,\n  "sha256": "' % SCHEMA_VERSION
_DIGITS = 64
_END = b'",\n'
_CHECK_LENGTH = 16


def sealed(rest: Callable[[], Iterable[bytes]]) -> Iterator[bytes]:
    """A snapshot in parts, of which all but the first are made twice: one of 10,000 experiments takes megabytes."""
    yield b"".join([_START, _sha256(rest()).encode(), _END])
    yield from rest()


def is_intact(data: bytes) -> bool:
    rest = memoryview(data)[len(_START) + _DIGITS + len(_END) :]  # no copy: it may be long
    return data.startswith(b"".join([_START, _sha256([rest]).encode(), _END]))


def snapshot_of(data: bytes) -> str:
    """What tells a snapshot from every other: its checksum, or that of the whole file where it has none."""
    return data[len(_START) :][:_DIGITS].decode("ascii", "replace") if data.startswith(_START) else _sha256([data])


def find_snapshot(path: Path) -> str | None:
    try:
        with durable.open_regular(path) as stream:
            data = stream.read(len(_START) + _DIGITS)
            return snapshot_of(data if data.startswith(_START) else data + stream.read())
    except FileNotFoundError:
        return None


# What comes before them is names and hashes.
_FACTS_WITHIN_B = 65536


def find_fact(path: Path, name: str) -> str | None:
    try:
        with durable.open_regular(path) as stream:
            start = stream.read(_FACTS_WITHIN_B)
        found = re.search(rb'^  "%s": (".*"),$' % name.encode(), start, re.MULTILINE)
        return str(durable.parse_json(found[1])) if found else None
    except (OSError, ValueError):
        return None


class DamagedJournal(ValueError):
    """A journal that is not as it was written, apart from a last line that was cut off."""


class Journal:
    def __init__(self, manifest_path: Path) -> None:
        suffix = ".journal" if manifest_path.suffix != ".journal" else ".journal.journal"
        self.path = manifest_path.with_suffix(suffix)
        self.size_b = 0  # what was appended since `begin`
        self._snapshot: str | None = None
        self._last_check = b""

    @property
    def has_begun(self) -> bool:
        return self._snapshot is not None

    def begin(self, snapshot: str) -> None:
        """Continue that snapshot, which is on disk and contains all changes; OSError if an older file cannot go."""
        self.stop()
        if self.path.exists():
            self.path.unlink()
        self._snapshot = snapshot

    def stop(self) -> None:
        self._snapshot, self.size_b, self._last_check = None, 0, b""

    def append(self, document: bytes) -> None:
        """Append JSON in one line and sync it; after an OSError (it may be there in part) only `begin` is possible."""
        snapshot, at_b, check, data = self._snapshot, self.size_b, self._last_check, b""
        for text in (document,) if at_b else (_first_line(snapshot), document):
            check = _check_of(check, text)
            data += check + b" " + text + b"\n"
        self.stop()
        durable.append_bytes(self.path, data, at_b=at_b)
        self._snapshot, self.size_b, self._last_check = snapshot, at_b + len(data), check

    def read(self, snapshot: str) -> list[Any]:
        """The changes since that snapshot, without a last line that was cut off; OSError, or DamagedJournal."""
        try:
            data = durable.read_bytes(self.path)
        except FileNotFoundError:
            return []
        *lines, last = data.split(b"\n")
        check, documents = b"", []
        for number, line in enumerate([*lines, *([last] if last else [])], start=1):
            if not _is_whole(line, check):
                # A crash cuts a line short; one that is only one byte too long lost its newline to damage.
                if number > len(lines) and not _is_whole(line[:-1], check):
                    break
                raise DamagedJournal(f"line {number} is damaged")
            check = line[:_CHECK_LENGTH]
            documents.append(durable.parse_json(line[_CHECK_LENGTH + 1 :]))
            if number == 1 and line[_CHECK_LENGTH + 1 :] != _first_line(snapshot):
                return []
        return documents[1:]


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    import hashlib  # OpenSSL, which not every process of lem needs

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _first_line(snapshot: str | None) -> bytes:
    return json.dumps({"snapshot": snapshot}).encode()


def _check_of(before: bytes, text: bytes) -> bytes:
    return _sha256([before, text])[:_CHECK_LENGTH].encode()


def _is_whole(line: bytes, before: bytes) -> bool:
    text = line[_CHECK_LENGTH + 1 :]
    return line == _check_of(before, text) + b" " + text
