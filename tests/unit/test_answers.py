"""The file with output ids: it is read as it was written, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from lem.base.answers import OUTPUT_IDS_FILE, Answer, AnswersError, read_answers, request_digest, write_answers

ANSWERS = (Answer(0, request_digest([1, 2], 4, 0, ""), (7, 8, 9, 2)), Answer(3, request_digest([1], 4, 0, ""), ()))


def packed(path: Path, *rows: object) -> str:
    """The digest of a file with these rows, which another program wrote."""
    data = gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / OUTPUT_IDS_FILE
    digest = write_answers(path, ANSWERS)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_answers(path, digest) == ANSWERS
    assert [item.name for item in tmp_path.iterdir()] == [OUTPUT_IDS_FILE]


def test_the_same_request_has_the_same_digest_and_no_other() -> None:
    digests = {
        request_digest(ids, most, least, "") for ids in ([1, 2], [12], [1]) for most in (4, 8) for least in (0, 4)
    }
    assert len(digests) == 12
    assert request_digest((1, 2), 4, 0, "") == request_digest([1, 2], 4, 0, "")


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / OUTPUT_IDS_FILE
    digest = write_answers(path, ANSWERS)
    write_answers(path, ANSWERS[:1])
    with pytest.raises(AnswersError, match="its SHA-256 is"):
        read_answers(path, digest)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"schema_version": 2}],
        [{"schema_version": 1}, []],
        [{"schema_version": 1}, {"prompt": 0, "request": "a"}],
        [{"schema_version": 1}, {"prompt": -1, "request": "a", "output_ids": []}],
        [{"schema_version": 1}, {"prompt": 0, "request": "a", "output_ids": [True]}],
        [{"schema_version": 1}, {"prompt": 0, "request": 5, "output_ids": [1]}],
    ],
)
def test_what_is_no_list_of_answers_is_refused(tmp_path: Path, rows: list[object]) -> None:
    digest = packed(tmp_path / OUTPUT_IDS_FILE, *rows)
    with pytest.raises(AnswersError):
        read_answers(tmp_path / OUTPUT_IDS_FILE, digest)
