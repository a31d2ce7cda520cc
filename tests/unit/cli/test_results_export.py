"""`lem results export`: which results, into which file, and what it reports about those left out."""

import json

import pytest

from lem.record import write_record
from lem.results.store import Repository
from tests.command_rig import run_lem
from tests.records import make_record

RUN, LATER = "20260714T100000Z-3fa1", "20260715T100000Z-0b0b"


def _store(folder, record, campaign="demo"):
    attempt = Repository(folder, campaign).prepare_attempt(record.identity.run_id, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    return attempt.result_path


@pytest.fixture
def folder(tmp_path):
    for run_id in (RUN, LATER):
        for cycle in range(2):
            _store(tmp_path / "results", make_record(run_id=run_id, cycle=cycle))
    _store(tmp_path / "results", make_record(run_id="20260101T000000Z-aaaa", config_hash="f" * 16), "other")
    return tmp_path


def _export(folder, *words):
    return run_lem("results", "export", "--results-dir", folder / "results", *words)


def _rows(folder, *words):
    code, out, err = _export(folder, "--format", "jsonl", *words)
    assert (code, err) == (0, "")
    return [(row["run_id"], row["cycle_index"]) for row in map(json.loads, out.splitlines())]


def test_everything_is_exported_by_default(folder):
    assert sorted(_rows(folder)) == [("20260101T000000Z-aaaa", 0), (RUN, 0), (RUN, 1), (LATER, 0), (LATER, 1)]


def test_of_a_campaign_its_last_run_is_exported(folder):
    assert _rows(folder, "demo") == [(LATER, 0), (LATER, 1)]


def test_runs_and_experiments_may_be_named_and_each_result_is_there_once(folder):
    assert _rows(folder, RUN) == [(RUN, 0), (RUN, 1)]
    assert _rows(folder, f"{RUN}/0123456789ab-c2") == [(RUN, 1)]
    assert _rows(folder, RUN, f"{RUN}/0123456789ab-c2") == [(RUN, 0), (RUN, 1)]


def test_paths_are_relative_to_the_results(folder):
    _, out, _ = _export(folder, RUN, "--columns", "result")
    assert out.splitlines()[1] == f"demo/{RUN}/0123456789ab-c1/attempt-1/result.json"


@pytest.mark.parametrize(
    ("name", "start"), [("x.csv", "result,"), ("x.json", "["), ("x.jsonl", "{"), ("x.md", "| config"), ("x", "result,")]
)
def test_a_file_gets_the_format_of_its_name(folder, name, start):
    code, out, _ = _export(folder, "-o", str(folder / name))
    assert (code, out) == (0, "")
    assert (folder / name).read_text().startswith(start)


def test_a_format_that_is_asked_for_wins_over_the_name(folder):
    _export(folder, "-o", str(folder / "x.csv"), "--format", "json")
    assert len(json.loads((folder / "x.csv").read_text())) == 5


def test_a_file_that_cannot_be_written_is_told(folder):
    code, _, err = _export(folder, "-o", str(folder / "nowhere" / "x.csv"))
    assert code == 2
    assert "name another file with --output" in err


def test_damage_is_named_and_left_out(folder):
    broken = _store(folder / "results", make_record(run_id=RUN, cycle=2))
    broken.write_bytes(b'{"schema_version": 1')
    foreign = _store(folder / "results", make_record(run_id=RUN, cycle=3))
    write_record(foreign, make_record(run_id=LATER, cycle=3))
    code, out, err = _export(folder, RUN)
    assert (code, len(out.splitlines())) == (0, 3)
    assert f"corrupt: {broken}" in err
    assert f"foreign: {foreign}" in err
    assert "left out, no complete result: 2 of 4 experiments" in err


def test_an_experiment_without_a_result_is_counted(folder):
    Repository(folder / "results", "demo").prepare_attempt(RUN, "0123456789ab-c3")
    assert _export(folder, RUN)[2] == "left out, no complete result: 1 of 3 experiments\n"


def test_an_empty_folder_gives_an_empty_file(tmp_path):
    assert _export(tmp_path, "--format", "json") == (0, "[]\n", "")
