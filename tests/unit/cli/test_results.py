from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lem.record import Record, decode_record, write_record
from lem.results.configurations import ListedConfiguration, write_listing
from lem.results.stopping import StoppingRule, Target, write_stopping_rule
from lem.results.store import Repository
from tests.command_rig import Output, run_lem
from tests.records import make_record

RUN = "20260714T100000Z-3fa1"
LATER = "20260715T100000Z-0b0b"
OTHER = "20260101T000000Z-aaaa"
EXPERIMENT = "0123456789ab"


def store(results_dir: Path, record: Record, campaign: str = "demo") -> Path:
    attempt = Repository(results_dir, campaign).prepare_attempt(record.identity.run_id, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    return attempt.result_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    for run_id in (RUN, LATER):
        for cycle in range(3):
            store(results, make_record(run_id=run_id, cycle=cycle, output_tok_per_s=100 + cycle))
    store(results, make_record(run_id=OTHER, config_hash="f" * 16, is_valid=False), "other")
    return results


@pytest.fixture
def damaged(folder: Path) -> Path:
    """The folder with one experiment of each kind of damage in the first run."""
    store(folder, make_record(run_id=RUN, cycle=3)).write_bytes(b"\x00")
    store(folder, make_record(run_id=RUN, cycle=4)).write_bytes(b'{"schema_version": 99}')
    write_record(store(folder, make_record(run_id=RUN, cycle=5)), make_record(cycle=5, run_id=LATER))
    half = Repository(folder, "demo").prepare_attempt(RUN, f"{EXPERIMENT}-c7")
    (half.path / ".lem-tmp-abc").write_bytes(b"{")
    Repository(folder, "demo").prepare_attempt(RUN, f"{EXPERIMENT}-c8")
    (folder / "demo" / RUN / "notes.txt").write_text("a person's own file")
    return folder


def run(*words: str) -> Output:
    return run_lem("results", *words)


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def kinds_of(err: str) -> list[str]:
    return [line.partition(": ")[0] for line in err.splitlines()]


def test_list_shows_every_run_with_its_counts(folder: Path) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert rows_of(out) == [
        ["campaign", "run", "configurations", "valid", "invalid", "failed", "left"],
        ["demo", RUN, "1", "3", "0", "0", "0"],
        ["demo", LATER, "1", "3", "0", "0", "0"],
        ["other", OTHER, "1", "0", "1", "0", "0"],
    ]
    documents = json.loads(run("list", "--results-dir", str(folder), "--json").out)
    found = [[item[key] for key in ("campaign", "run_id", "valid", "invalid")] for item in documents]
    assert found == [["demo", RUN, 3, 0], ["demo", LATER, 3, 0], ["other", OTHER, 0, 1]]


def test_list_of_an_empty_or_missing_folder_says_so(tmp_path: Path) -> None:
    assert run("list", "--results-dir", str(tmp_path / "nowhere")) == (0, "", f"no results in {tmp_path / 'nowhere'}\n")
    assert run("list", "--results-dir", str(tmp_path), "--json") == (0, "[]\n", "")
    (tmp_path / "results").write_text("no folder")
    code, out, err = run("list", "--results-dir", str(tmp_path / "results"))
    assert (code, out, "expected a folder, found a file" in err) == (2, "", True)


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (("list",), ["demo", RUN, "1", "3", "0", "5", "0"]),
        (("show", RUN), ["1", "small", "250.0", "ms", "3", "0", "5"]),
        (("export", RUN, LATER, "--columns", "run_id,cycle_index"), [f"{LATER},2"]),
    ],
)
def test_what_is_whole_is_shown_and_the_rest_named(damaged: Path, words: tuple[str, ...], row: list[str]) -> None:
    code, out, err = run(*words)
    assert code == 0
    assert row in rows_of(out)
    assert kinds_of(err)[:4] == ["corrupt", "corrupt", "foreign", "half-written"]
    assert f"demo/{RUN}/{EXPERIMENT}-c4/attempt-1/result.json: not JSON" in err
    assert ("\nmissing: " in err) == (words[0] == "show")
    assert ("left out, no complete result: 5 of 11 experiments" in err) == (words[0] == "export")


@pytest.mark.parametrize(("wanted", "run_id"), [(RUN, RUN), (RUN[:10], RUN), ("demo", LATER)])
def test_a_run_is_shown_as_a_table_by_name_or_beginning_and_of_a_campaign_the_last(
    folder: Path, wanted: str, run_id: str
) -> None:
    write_stopping_rule(folder / "demo" / LATER, StoppingRule(Target(0.02), 5, 20))
    code, out, err = run("show", wanted)
    assert (code, err) == (0, f"next: lem check {wanted}\n")
    assert out.startswith(f"demo · run {run_id} · 1 configuration · 3 cycles")
    assert ["1", "small", "3", "101.0", "98.5", "–", "103.5", "100.0", "–", "102.0"] in rows_of(out)
    assert ("Cycles were added until every interval is within ±2 %" in out) == (run_id == LATER)


def test_a_run_as_json_holds_aggregates_and_problems(damaged: Path) -> None:
    document = json.loads(run("show", RUN, "--json").out)
    (found,) = document["configurations"]
    assert (found["n_cycles"], found["n_failed"]) == (3, 5)
    assert sorted(item["kind"] for item in document["problems"]) == kinds_of(run("show", RUN).err)[:-1]


def test_an_experiment_is_shown_in_full_with_its_path(folder: Path) -> None:
    code, out, err = run("show", f"{RUN}/{EXPERIMENT}-c2")
    path = f"results/demo/{RUN}/{EXPERIMENT}-c2/attempt-1/result.json"
    assert (code, err) == (0, "")
    assert out.startswith("small · cycle 2 · attempt 1\n")
    assert "output 101 tok/s" in out
    assert out.endswith(f"\n{path}\n")
    (attempt,) = json.loads(run("show", f"{RUN}/{EXPERIMENT}-c2", "--json").out)["attempts"]
    assert (attempt["path"], decode_record(attempt["record"]).identity.cycle_index) == (path, 1)


@pytest.mark.parametrize("wanted", [f"{RUN}/1", f"{RUN}/small"])
def test_a_configuration_is_shown_exported_and_recomputed_in_all_its_cycles(folder: Path, wanted: str) -> None:
    out = run("show", wanted).out
    assert [f"small · cycle {number} · attempt 1" in out for number in (1, 2, 3, 4)] == [True, True, True, False]
    lines = run("export", wanted, "--columns", "run_id,cycle_index").out.splitlines()
    assert lines[1:] == [f"{RUN},{number}" for number in range(3)]


def test_every_attempt_of_an_experiment_is_shown(folder: Path) -> None:
    store(folder, make_record(run_id=RUN, attempt=2, is_valid=False, invalid_reasons=("too hot",)))
    Repository(folder, "demo").prepare_attempt(RUN, f"{EXPERIMENT}-c1")
    _, out, err = run("show", f"{RUN}/{EXPERIMENT}-c1")
    assert [text in out for text in ("attempt 1\n", "attempt 2\n", "no: too hot")] == [True] * 3
    assert kinds_of(err) == ["missing"]


def test_an_experiment_without_a_result_says_so(damaged: Path) -> None:
    code, out, err = run("show", f"{RUN}/{EXPERIMENT}-c4")
    assert (code, out, kinds_of(err)) == (0, f"{EXPERIMENT}-c4: no complete result\n", ["corrupt"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (f"{EXPERIMENT}-c1", "is ambiguous"),
        ("2026", "is ambiguous"),
        ("nix", "no campaign, run or experiment 'nix' in "),
        ("dmo", "(did you mean 'demo'?)"),
        ("", "no campaign, run or experiment ''"),
        ("../demo", "no campaign"),
        ("/", "no campaign"),
        ("demo/../other", "has no configuration '../other'"),
        ("demo/2", "has no configuration '2'"),
    ],
)
def test_a_name_of_several_or_none_is_a_usage_error(folder: Path, wanted: str, expected: str) -> None:
    code, out, err = run("show", wanted)
    assert (code, out) == (2, "")
    assert expected in err
    assert "hint: " in err


def test_many_problems_are_cut_short_and_an_experiment_of_one_run_needs_no_run(folder: Path) -> None:
    for number in range(15):
        Repository(folder, "demo").prepare_attempt(RUN, f"{number:012x}-c1")
    lines = run("show", RUN).err.splitlines()
    assert (len(lines), lines[10]) == (12, "and 5 more: --json lists all")
    assert [run("show", wanted).err for wanted in ("ffffffffffff-c1", "ffff")] == ["", ""]


# --- export


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ((), [(OTHER, 0), (RUN, 0), (RUN, 1), (RUN, 2), (LATER, 0), (LATER, 1), (LATER, 2)]),
        (("demo",), [(LATER, 0), (LATER, 1), (LATER, 2)]),
        ((f"{RUN}/{EXPERIMENT}-c2",), [(RUN, 1)]),
        ((RUN, f"{RUN}/{EXPERIMENT}-c2"), [(RUN, 0), (RUN, 1), (RUN, 2)]),
    ],
)
def test_what_is_named_is_exported_once_and_by_default_everything(
    folder: Path, words: tuple[str, ...], rows: list[tuple[str, int]]
) -> None:
    code, out, err = run("export", "--format", "jsonl", *words)
    assert (code, err) == (0, "")
    found = [(row["run_id"], row["cycle_index"]) for row in map(json.loads, out.splitlines())]
    assert sorted(found) == rows


def test_columns_are_chosen_and_paths_are_relative_to_the_results(folder: Path) -> None:
    lines = run("export", RUN, "--columns", "result, cycle_index,output_tok_per_s").out.splitlines()
    assert lines[:2] == [
        "result,cycle_index,output_tok_per_s",
        f"demo/{RUN}/{EXPERIMENT}-c1/attempt-1/result.json,0,100.0",
    ]


@pytest.mark.parametrize(
    ("name", "words", "start"),
    [
        ("x.csv", (), "result,"),
        ("x.json", (), "["),
        ("x.jsonl", (), "{"),
        ("x.md", (), "| config"),
        ("x", (), "result,"),
        ("x.csv", ("--format", "json"), "["),
    ],
)
def test_a_file_gets_the_format_that_is_asked_for_or_that_of_its_name(
    folder: Path, name: str, words: tuple[str, ...], start: str
) -> None:
    assert run("export", "-o", name, *words) == (0, "", "")
    assert Path(name).read_text(encoding="utf-8").startswith(start)


def test_output_to_a_pipe_is_written_into_it(folder: Path) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("export", "-o", "pipe", "--columns", "campaign_name", RUN) == (0, "", "")
        assert os.read(reader, 1000) == b"campaign_name\ndemo\ndemo\ndemo\n"
    finally:
        os.close(reader)
    assert Path("pipe").is_fifo()


def test_a_file_that_cannot_be_written_is_told(folder: Path) -> None:
    code, _, err = run("export", "-o", "nowhere/x.csv")
    assert (code, "name another file with --output" in err) == (2, True)


def test_costs_and_emissions_are_by_the_rates_of_the_reader_else_of_the_campaign(folder: Path) -> None:
    record = make_record(run_id=LATER, cycle=9, energy_per_output_tok_j=3.6)  # of 1,000 tokens: 0.001 kWh
    path = store(folder, record)
    before = path.read_bytes()
    listed = ListedConfiguration(record.identity.config_hash, "small", {"price_per_kwh": 0.3, "pue": 2.0})
    write_listing(folder / "demo" / LATER, [listed])
    name = f"{LATER}/{record.identity.experiment_id}"

    def figures(*words: str) -> list[str]:
        found = run("export", name, "--columns", "cost,co2e_g,price_per_kwh", *words)
        assert found.code == 0
        return found.out.splitlines()[1].split(",")

    assert figures() == ["0.0006", "", "0.3"]
    assert figures("--price-per-kwh", "0.5", "--grid-g-per-kwh", "400") == ["0.001", "0.8", "0.5"]
    (shown,) = json.loads(run("show", name, "--json", "--pue", "1").out)["attempts"]
    assert shown["record"]["carbon"]["cost"] == pytest.approx(0.0003)
    assert path.read_bytes() == before
    refused = run("export", name, "--pue", "0.5")
    assert (refused.code, "must be at least 1" in refused.err) == (2, True)
