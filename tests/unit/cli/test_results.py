"""`lem results`: lists and shows from the files alone, damaged ones included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lem.record import Record, decode_record, write_record
from lem.results.run import SINGLE_CYCLE
from lem.results.store import Repository
from tests.command_rig import Output, run_lem
from tests.records import make_record

RUN = "20260714T100000Z-3fa1"
LATER = "20260715T100000Z-0b0b"


def results(*words: str) -> Output:
    return run_lem("results", *words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs of one campaign and one of another."""
    for run_id in (RUN, LATER):
        for cycle in range(3):
            store(tmp_path, "demo", make_record(run_id=run_id, cycle=cycle, output_tok_per_s=100 + cycle))
    store(tmp_path, "other", make_record(run_id="20260101T000000Z-aaaa", config_hash="f" * 16, is_valid=False))
    return tmp_path


def store(results_dir: Path, campaign: str, record: Record) -> Path:
    attempt = Repository(results_dir, campaign).prepare_attempt(record.identity.run_id, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    return attempt.result_path


def test_list_shows_every_run_with_its_counts(folder: Path) -> None:
    code, out, err = results("list", "--results-dir", str(folder))
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["campaign", "run", "configurations", "valid", "invalid", "failed"],
        ["demo", RUN, "1", "3", "0", "0"],
        ["demo", LATER, "1", "3", "0", "0"],
        ["other", "20260101T000000Z-aaaa", "1", "0", "1", "0"],
    ]


def test_list_as_json_has_the_same_counts(folder: Path) -> None:
    code, out, _ = results("list", "-o", str(folder), "--json")
    runs = json.loads(out)
    assert code == 0
    assert [(item["campaign"], item["run_id"], item["valid"]) for item in runs] == [
        ("demo", RUN, 3),
        ("demo", LATER, 3),
        ("other", "20260101T000000Z-aaaa", 0),
    ]


def test_list_of_an_empty_or_missing_folder_says_so(tmp_path: Path) -> None:
    assert results("list", "-o", str(tmp_path / "nowhere")) == (0, "", f"no results in {tmp_path / 'nowhere'}\n")
    assert results("list", "-o", str(tmp_path), "--json") == (0, "[]\n", "")


def test_list_names_damage_and_goes_on(folder: Path) -> None:
    store(folder, "demo", make_record(run_id=RUN, cycle=3)).write_bytes(b"\x00")
    code, out, err = results("list", "-o", str(folder))
    assert code == 0
    assert err.startswith("corrupt: ")
    assert ["demo", RUN, "1", "3", "0", "1"] in [line.split() for line in out.splitlines()]


def test_list_of_a_folder_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("no folder")
    code, out, err = results("list", "-o", str(tmp_path / "results"))
    assert (code, out) == (2, "")
    assert "expected a folder, found a file" in err


@pytest.mark.parametrize("wanted", [RUN, RUN[:10]])
def test_a_run_is_shown_as_a_table_by_name_or_by_its_beginning(folder: Path, wanted: str) -> None:
    code, out, err = results("show", wanted, "-o", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith(f"demo · run {RUN} · 1 configuration · 3 cycles")
    assert "t interval" in out


def test_a_campaign_shows_its_last_run(folder: Path) -> None:
    assert results("show", "demo", "-o", str(folder))[1].startswith(f"demo · run {LATER}")


def test_a_single_cycle_is_told(tmp_path: Path) -> None:
    store(tmp_path, "demo", make_record())
    assert SINGLE_CYCLE in results("show", "demo", "-o", str(tmp_path))[1].splitlines()


def test_a_run_as_json_holds_aggregates_and_problems(folder: Path) -> None:
    Repository(folder, "demo").prepare_attempt(RUN, "0123456789ab-c4")
    document = json.loads(results("show", RUN, "-o", str(folder), "--json")[1])
    assert document["configurations"][0]["n_cycles"] == 3
    assert document["configurations"][0]["n_failed"] == 1
    assert [problem["kind"] for problem in document["problems"]] == ["missing"]


def test_a_run_without_a_whole_result_is_shown_as_failed(tmp_path: Path) -> None:
    Repository(tmp_path, "demo").prepare_attempt(RUN, "0123456789ab-c1").write_config({}, {"config_name": "small"})
    code, out, err = results("show", RUN, "-o", str(tmp_path))
    assert code == 0
    assert out.startswith(f"demo · run {RUN}")
    assert "no valid result: small" in out
    assert err.startswith("missing: ")


def test_an_experiment_is_shown_in_full_with_its_path(folder: Path) -> None:
    code, out, err = results("show", f"{RUN}/0123456789ab-c2", "-o", str(folder))
    assert (code, err) == (0, "")
    assert "cycle 2 · attempt 1" in out
    assert "output 101 tok/s" in out
    assert out.rstrip().endswith(f"demo/{RUN}/0123456789ab-c2/attempt-1/result.json")


def test_every_attempt_of_an_experiment_is_shown(folder: Path) -> None:
    store(folder, "demo", make_record(run_id=RUN, attempt=2, is_valid=False, invalid_reasons=("too hot",)))
    Repository(folder, "demo").prepare_attempt(RUN, "0123456789ab-c1")
    _, out, err = results("show", f"{RUN}/0123456789ab-c1", "-o", str(folder))
    assert "attempt 1\n" in out
    assert "attempt 2\n" in out
    assert "no: too hot" in out
    assert err.startswith("missing: ")


def test_an_experiment_as_json_holds_whole_records(folder: Path) -> None:
    document = json.loads(results("show", f"{RUN}/0123456789ab-c2", "-o", str(folder), "--json")[1])
    assert decode_record(document["attempts"][0]["record"]).identity.cycle_index == 1
    assert Path(document["attempts"][0]["path"]).is_file()


def test_an_experiment_without_a_result_says_so(folder: Path) -> None:
    Repository(folder, "demo").prepare_attempt(RUN, "abcabcabcabc-c1")
    code, out, err = results("show", "abcabcabcabc-c1", "-o", str(folder))
    assert (code, out) == (0, "abcabcabcabc-c1: no complete result\n")
    assert err.startswith("missing: ")


def test_an_experiment_known_to_one_run_needs_no_run(folder: Path) -> None:
    assert "other" not in results("show", "ffffffffffff-c1", "-o", str(folder))[2]
    assert results("show", "ffff", "-o", str(folder))[0] == 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("0123456789ab-c1", "is ambiguous"),
        ("2026", "is ambiguous"),
        ("nix", "no campaign, run or experiment 'nix' in "),
    ],
)
def test_a_name_of_several_or_none_is_a_usage_error_that_lists_them(folder: Path, wanted: str, expected: str) -> None:
    code, out, err = results("show", wanted, "-o", str(folder))
    assert (code, out) == (2, "")
    assert expected in err
    assert "hint: " in err


def test_a_name_that_was_meant_is_suggested(folder: Path) -> None:
    assert "(did you mean 'demo'?)" in results("show", "dmo", "-o", str(folder))[2]


@pytest.mark.parametrize("wanted", ["", "../demo", "/", "demo/../other"])
def test_a_name_that_leads_elsewhere_is_unknown(folder: Path, wanted: str) -> None:
    assert results("show", wanted, "-o", str(folder))[0] == 2


def test_many_problems_are_cut_short(folder: Path) -> None:
    for number in range(15):
        Repository(folder, "demo").prepare_attempt(RUN, f"{number:012x}-c1")
    err = results("show", RUN, "-o", str(folder))[2]
    assert len(err.splitlines()) == 11
    assert "and 5 more" in err
