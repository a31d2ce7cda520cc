"""The index of a run: it saves reading, and never hides or invents a change."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lem.base.codec import decode_hint, unpack
from lem.record import parse_record, read_record
from lem.results.check import check_run
from lem.results.compare import compare_configurations
from lem.results.comparison import render_text
from lem.results.index import INDEX_FILE
from lem.results.run import read_run
from lem.results.store import Repository, Scan, StoredResult
from tests.synthetic_campaign import Campaign, Configuration, Written

CAMPAIGN = Campaign(
    (Configuration("one", ttft_s=0.05), Configuration("two", backend="pytorch", invalid_attempts={1: 1})),
    cycles=2,
    has_samples=False,
)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return CAMPAIGN.write(tmp_path)


def scan(written: Written, *, is_checked: bool = False) -> Scan:
    return Repository(written.results_dir, written.campaign).scan(written.run_id, is_checked=is_checked)


def index_of(written: Written) -> Path:
    return written.results_dir / written.campaign / written.run_id / INDEX_FILE


def results_of(written: Written) -> list[Path]:
    return sorted(index_of(written).parent.glob("*/attempt-*/result.json"))


def record_all(written: Written) -> None:
    """What a campaign does when its results come in."""
    repository, results = Repository(written.results_dir, written.campaign), scan(written).results
    index_of(written).unlink()
    for item in results:
        repository.record_result(written.run_id, item)


def change(
    path: Path, old: str = '"schema_version": ', new: str = '"schema_versiom": ', *, is_hidden: bool = False
) -> None:
    """Change a file in its place; hidden, it also keeps its time."""
    before, text = path.stat(), path.read_text(encoding="utf-8")
    assert old in text
    with path.open("r+", encoding="utf-8") as file:
        file.write(text.replace(old, new))
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if is_hidden else 1)))


def entries_of(written: Written) -> list[tuple[str, list[Any]]]:
    """The lines of the index: what each is of, and its values."""
    lines = (json.loads(line) for line in index_of(written).read_bytes().splitlines())
    return [(kind, values) for line in lines for kind, values in line.items() if kind != "check"]


def n_results(written: Written) -> int:
    return sum(kind == "result" for kind, _ in entries_of(written))


def lines_with_checks(documents: Iterable[Mapping[str, Any]]) -> bytes:
    rests = [json.dumps(document, separators=(",", ":"))[1:].encode() + b"\n" for document in documents]
    return b"".join(b'{"check":"' + hashlib.sha256(rest).hexdigest()[:16].encode() + b'",' + rest for rest in rests)


def kinds(found: Scan) -> list[str]:
    return [item.kind for item in found.problems]


def test_a_result_is_not_opened_while_its_line_counts(written: Written) -> None:
    first = scan(written)
    for path in results_of(written):
        change(path, is_hidden=True)
    assert scan(written) == first
    assert kinds(scan(written, is_checked=True)) == ["corrupt"] * len(first.results)


def test_a_record_from_the_index_is_the_one_in_the_file(written: Written) -> None:
    whole = [read_record(path) for path in results_of(written)]
    for _ in range(2):  # as it is made, and as it is read
        found = scan(written).results
        assert [item.record for item in found] == whole
        assert len({id(item.record.environment) for item in found}) == len({str(item.environment) for item in whole})
    assert len(whole) == 5


def calls_of(functions: Iterable[Callable[..., Any]], action: Callable[[], object]) -> Counter[str]:
    names = {function.__code__: function.__name__ for function in functions}
    found = Counter[str]()

    def seen(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            found[names[frame.f_code]] += 1

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def test_a_comparison_decodes_no_record_however_many_there_are(tmp_path: Path) -> None:
    found = []
    for cycles in (3, 9):
        written = dataclasses.replace(CAMPAIGN, cycles=cycles).write(tmp_path / str(cycles))
        record_all(written)

        def read(written: Written = written) -> None:
            run = read_run(written.results_dir, written.campaign, written.run_id)
            assert len(run.records) == 2 * len(run.configurations[0].cycles) + 1
            baseline, *others = run.configurations
            render_text(compare_configurations(run, baseline, others))
            check_run(run)

        read()  # what is kept for later is not counted
        found.append(calls_of((parse_record, unpack, decode_hint), read))
    few, many = found
    assert few["parse_record"] == many["parse_record"] == 0
    assert few["unpack"] == many["unpack"] > 0  # one example of each template
    assert few["decode_hint"] == many["decode_hint"]


def test_a_changed_file_is_read_again_where_nothing_is_known_of_its_measurement(written: Written) -> None:
    scan(written)
    change(results_of(written)[0], '"host": "lab1"', '"host": "lab2"')
    for _ in range(2):
        assert {item.record.identity.host for item in scan(written).results} == {"lab1", "lab2"}


@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_result_that_is_not_as_it_was_measured_is_not_used_and_no_reader_changes_that(
    written: Written, is_hidden: bool
) -> None:
    record_all(written)
    path = results_of(written)[0]
    change(path, '"host": "lab1"', '"host": "lab2"', is_hidden=is_hidden)
    for _ in range(3):
        found = scan(written, is_checked=True)
        assert [(item.kind, item.path) for item in found.problems] == [("altered", path)]
        assert len(found.results) == 4
    assert kinds(scan(written)) == ([] if is_hidden else ["altered"])  # the index has the value that was measured
    change(path, '"host": "lab2"', '"host": "lab1"')
    assert kinds(scan(written, is_checked=True)) == []


def test_digests_that_were_recorded_go_with_a_copy(written: Written, tmp_path: Path) -> None:
    record_all(written)
    shutil.copytree(written.results_dir, tmp_path / "copy" / "results")
    copy = Written(tmp_path / "copy" / "results", tmp_path, tmp_path, written.campaign, written.run_id)
    assert all(item.is_recorded for item in scan(copy).results)
    assert n_results(copy) == 10  # the lines of the copies, too
    assert scan(copy) == scan(copy)
    change(results_of(copy)[2], '"host": "lab1"', '"host": "lab2"')
    assert kinds(scan(copy)) == ["altered"]


def test_a_reader_does_not_record_what_it_finds_as_measured(written: Written) -> None:
    scan(written)
    assert not any(item.is_recorded for item in scan(written).results)


def test_a_recorded_digest_counts_whatever_line_comes_after_it(written: Written) -> None:
    record_all(written)
    measured = index_of(written).read_bytes()
    index_of(written).unlink()
    path = results_of(written)[0]
    change(path, '"host": "lab1"', '"host": "lab2"')
    scan(written)
    index_of(written).write_bytes(measured + index_of(written).read_bytes())
    assert kinds(scan(written)) == ["altered"]


def test_a_torn_line_is_ignored_and_the_next_one_starts_anew(written: Written) -> None:
    first = scan(written)
    whole = index_of(written).read_bytes()
    for cut in (1, 2, 500, len(whole) - 3):
        index_of(written).write_bytes(whole[:-cut])
        assert scan(written) == first
        assert scan(written) == first
        lines = index_of(written).read_bytes().splitlines()
        assert sum(line in whole.splitlines() for line in lines) >= 5


def test_any_bit_of_a_line_may_flip(written: Written) -> None:
    record_all(written)
    first = scan(written)
    whole = index_of(written).read_bytes()
    for place in range(0, len(whole) * 8, len(whole) * 8 // 150):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        index_of(written).write_bytes(data)
        found = scan(written)
        assert [(item.path, item.record, item.sha256) for item in found.results] == [
            (item.path, item.record, item.sha256) for item in first.results
        ]
        assert found.problems == ()


def test_the_last_line_of_a_result_counts(written: Written) -> None:
    scan(written)
    before = index_of(written).read_bytes()
    change(results_of(written)[0], '"host": "lab1"', '"host": "lab2"')
    scan(written)
    after = index_of(written).read_bytes()
    assert after.startswith(before)
    for path in results_of(written):
        change(path, is_hidden=True)
    assert sorted(item.record.identity.host for item in scan(written).results) == ["lab1"] * 4 + ["lab2"]


@pytest.mark.parametrize("what", ["folder", "pipe", "link"])
def test_without_an_index_that_can_be_written_everything_is_read_and_nothing_said(
    written: Written, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = scan(written)
    index_of(written).unlink()
    if what == "folder":
        index_of(written).mkdir()
    elif what == "pipe":
        os.mkfifo(index_of(written))
    else:
        (tmp_path / "elsewhere").write_bytes(b"")
        index_of(written).symlink_to(tmp_path / "elsewhere")
    assert scan(written) == first
    assert caplog.records == []
    if what == "link":
        assert (tmp_path / "elsewhere").read_bytes() == b""


def _of_version_1(values: list[Any]) -> dict[str, Any]:
    facts = dict(zip(("path", "size_b", "mtime_ns", "inode", "sha256", "is_recorded"), values, strict=False))
    return {**facts, "layout": "0" * 12, "record": {"identity": "[1]"}}


def _of_version_2(values: list[Any]) -> dict[str, Any]:
    return {"result": [*values[:8], ["exp", 1, 2.5]]}


def _of_a_later_version(values: list[Any]) -> dict[str, Any]:
    return {"result": [*values, "more"]}


@pytest.mark.parametrize("line_of", [_of_version_1, _of_version_2, _of_a_later_version])
def test_lines_of_another_lem_are_not_used_but_their_digests_are(
    written: Written, line_of: Callable[[list[Any]], dict[str, Any]]
) -> None:
    record_all(written)
    lines = [line_of(values) for kind, values in entries_of(written) if kind == "result"]
    index_of(written).write_bytes(lines_with_checks(lines))
    first = scan(written)
    assert len(first.results) == 5
    assert all(item.is_recorded for item in first.results)
    assert len(entries_of(written)) > 10  # with five in the form of this lem
    for path in results_of(written):
        change(path, is_hidden=True)
    assert scan(written) == first
    change(results_of(written)[0], '"host": "lab1"', '"host": "lab2"')
    assert kinds(scan(written)) == ["altered"]


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 10**40])
def test_an_integer_of_any_size_is_kept(written: Written, number: int) -> None:
    for path in results_of(written):
        (before,) = re.findall(r'"order_index": [0-9]+', path.read_text(encoding="utf-8"))
        change(path, before, f'"order_index": {number}')
    for _ in range(2):
        assert {item.record.identity.order_index for item in scan(written).results} == {number}


def test_a_text_with_the_mark_that_ends_texts_is_kept(written: Written) -> None:
    for path in results_of(written):
        change(path, '"config_name": "', '"config_name": "a|b|')
    for _ in range(2):
        assert {item.record.identity.config_name for item in scan(written).results} == {"a|b|one", "a|b|two"}


def test_numbers_that_no_record_can_have_are_not_used(written: Written) -> None:
    record_all(written)
    first, whole = scan(written), entries_of(written)

    def nans(text: str) -> str:
        return base64.b64encode(struct.pack("<d", math.nan) * (len(base64.b64decode(text)) // 8)).decode()

    for damaged in (lambda _: "", lambda _: "AAAA", lambda _: "A", nans):
        documents = [
            {kind: [*values[:8], damaged(values[8]), *values[9:]] if kind == "result" else values}
            for kind, values in whole
        ]
        index_of(written).write_bytes(lines_with_checks(documents))
        assert scan(written) == first


def test_what_results_share_is_in_the_index_once(written: Written) -> None:
    record_all(written)
    found = entries_of(written)
    names = [values[0] for kind, values in found if kind != "result"]
    assert len(names) == len(set(names))
    assert names == [values[0] for kind, values in entries_of(written) if kind != "result"]
    for place, (kind, values) in enumerate(found):
        if kind == "shape":
            assert {*values[2:]} <= {values[0] for kind, values in found[:place] if kind == "template"}


def test_a_result_whose_template_is_missing_is_read_again(written: Written) -> None:
    first = scan(written)
    whole = index_of(written).read_bytes().splitlines(keepends=True)
    for place, line in enumerate(whole):
        if b'"template":' in line:
            index_of(written).write_bytes(b"".join(whole[:place] + whole[place + 1 :]))
            assert scan(written) == first
            for path in results_of(written):
                change(path, is_hidden=True)
            assert scan(written) == first  # by the line that took its place
            for path in results_of(written):
                change(path, '"schema_versiom": ', '"schema_version": ', is_hidden=True)


def test_an_index_does_not_grow_for_ever_where_times_never_match(written: Written) -> None:
    for number in range(12):
        for path in results_of(written):
            os.utime(path, ns=(0, 1_000_000 + number))
        assert len(scan(written).results) == 5
    assert n_results(written) <= 20


def test_a_result_that_cannot_be_put_into_the_index_is_a_warning(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    index_of(written).mkdir()
    (result, *_) = scan(written).results
    assert isinstance(result, StoredResult)
    Repository(written.results_dir, written.campaign).record_result(written.run_id, result)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def _of_another_lem(template: list[Any]) -> None:
    template[1] = [1]


def _with_another_reason(template: list[Any]) -> None:
    text = json.dumps(template[1])
    template[1] = json.loads(re.sub(r'{"code": "\w+"', '{"code": "of_a_later_lem"', text))


def _infinite(template: list[Any]) -> None:
    template[1] = {**template[1], "batch_size": math.inf} if isinstance(template[1], dict) else template[1]


@pytest.mark.parametrize("change_it", [_of_another_lem, _with_another_reason, _infinite])
def test_a_result_whose_template_cannot_be_read_is_read_from_its_file(
    written: Written, change_it: Callable[[list[Any]], None]
) -> None:
    record_all(written)
    first = scan(written)
    documents = [{kind: values} for kind, values in entries_of(written)]
    changed = json.dumps(documents)
    for document in documents:
        if "template" in document:
            change_it(document["template"])
    assert json.dumps(documents) != changed
    index_of(written).write_bytes(lines_with_checks(documents))
    again = scan(written)
    assert again == first
    assert all(item.is_recorded for item in again.results)
