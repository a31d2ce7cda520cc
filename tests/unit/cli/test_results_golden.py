"""`lem results` on a folder in which much is damaged: both streams, as people see them."""

import pytest

from lem.record import write_record
from lem.results.store import Repository, StoppingRule, Target, write_stopping_rule
from tests.command_rig import run_lem
from tests.goldens import assert_golden
from tests.records import make_record

RUN, LATER = "20260714T100000Z-3fa1", "20260715T100000Z-0b0b"


def _store(folder, record, campaign="demo"):
    attempt = Repository(folder, campaign).prepare_attempt(record.identity.run_id, record.identity.experiment_id)
    write_record(attempt.result_path, record)
    return attempt.result_path


@pytest.fixture
def folder(tmp_path):
    """Whole results, and of each kind of damage one."""
    results = tmp_path / "results"
    for cycle in range(3):
        _store(results, make_record(cycle=cycle, output_tok_per_s=100.0 + cycle))
        _store(results, make_record(run_id=LATER, cycle=cycle, output_tok_per_s=110.0 + cycle))
    write_stopping_rule(results / "demo" / LATER, StoppingRule(Target(0.02), 5, 20))
    _store(results, make_record(cycle=3)).write_bytes(b"\x00")
    _store(results, make_record(cycle=4)).write_bytes(b'{"schema_version": 99}')
    write_record(_store(results, make_record(cycle=5)), make_record(cycle=5, run_id=LATER))
    half = Repository(results, "demo").prepare_attempt(RUN, "0123456789ab-c7")
    (half.path / ".lem-tmp-abc").write_bytes(b"{")
    Repository(results, "demo").prepare_attempt(RUN, "0123456789ab-c8")
    (results / "demo" / RUN / "notes.txt").write_text("a person's own file")
    return results


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("list", ["list"]),
        ("show_run", ["show", RUN]),
        ("show_added_cycles", ["show", "demo"]),
        ("show_experiment", ["show", f"{RUN}/0123456789ab-c2"]),
        ("show_damaged_experiment", ["show", f"{RUN}/0123456789ab-c4"]),
        ("export", ["export", "--columns", "result,cycle_index,valid,output_tok_per_s"]),
    ],
)
def test_what_is_whole_is_shown_and_the_rest_named(folder, name, words):
    code, out, err = run_lem("results", *words, "--results-dir", folder)
    assert code == 0
    shown = f"--- stdout\n{out}--- stderr\n{err}"
    assert_golden(f"results/command_{name}.txt", shown.replace(str(folder), "results"))
