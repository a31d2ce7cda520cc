"""The output ids of a result, by which answers of configurations are compared: a file beside the record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lem.base import durable
from lem.base.codec import MOST, DecodeError, decode
from lem.base.units import GIB, MIB

OUTPUT_IDS_FILE = "output_ids.jsonl.gz"
_SCHEMA_VERSION = 1
_REQUEST_DIGITS = 16


class AnswersError(ValueError):
    """A file that is not a whole list of answers of this schema."""


class Answer(NamedTuple):
    prompt: int  # its place in the prompt set, from 0
    request: str  # `request_digest`: two configurations were asked the same where it is the same
    output_ids: tuple[int, ...]


def request_digest(*parts: Any) -> str:
    """16 hex digits over everything that a request asks for, as JSON values."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:_REQUEST_DIGITS]


def write_answers(path: Path, answers: Iterable[Answer]) -> str:
    """Write the answers, whole or not at all; the SHA-256 of the file. Raises as `durable.write_bytes`."""
    import gzip  # imported here to keep the start-up fast

    rows = [{"schema_version": _SCHEMA_VERSION}, *(item._asdict() for item in answers)]
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    data = gzip.compress(text.encode(), compresslevel=6, mtime=0)
    durable.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_answers(path: Path, sha256: str) -> tuple[Answer, ...]:
    """The answers; OSError, or AnswersError if they are not those that were measured."""
    import gzip

    if (found := durable.sha256_of(path)) != sha256:
        raise AnswersError(f"{path}: its SHA-256 is {found}, but it was {sha256} when it was measured")
    try:
        with contextlib.closing(durable.unpacked_lines(path, GIB, free_b=64 * MIB)) as lines:
            if json.loads(next(lines, b"null")) != {"schema_version": _SCHEMA_VERSION}:
                raise AnswersError(f"{path}: this lem reads schema_version {_SCHEMA_VERSION}")
            return tuple(_read_row(json.loads(line)) for line in lines)
    except (EOFError, RecursionError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise AnswersError(f"{path}: not a list of answers: {error}") from error


def _read_row(row: Any) -> Answer:
    if not isinstance(row, dict) or row.keys() != set(Answer._fields):
        raise DecodeError("expected prompt, request and output_ids")
    ids = decode(tuple[int, ...], row["output_ids"], "output_ids")
    prompt = decode(int, row["prompt"], "prompt")
    if not all(0 <= item < MOST for item in (prompt, *ids)):
        raise DecodeError("a number is out of range")
    return Answer(prompt, decode(str, row["request"], "request"), ids)
