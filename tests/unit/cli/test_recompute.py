from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lem.base import durable
from lem.meters.samples import FINISHED_FILENAME, write_finished
from lem.record import Record, write_record
from lem.results.store import Repository
from tests.command_rig import Output, run_lem
from tests.records import make_record, with_measured
from tests.scripted_attempt import config, gpu_attempt

RUN = "20260714T100000Z-3fa1"
ATTEMPT = gpu_attempt()


def recompute(*words: str) -> Output:
    return run_lem("results", "recompute", *words)


def measured_record(cycle: int) -> Record:
    record = make_record(run_id=RUN, cycle=cycle)
    found = ATTEMPT.measured(window_repeats=record.window.window_repeats)
    return with_measured(record, found, config().measurement)


def store(results_dir: Path, record: Record, *, has_samples: bool = True) -> Path:
    identity = record.identity
    folder = Repository(results_dir, "demo").prepare_attempt(identity.run_id, identity.experiment_id).path
    durable.write_json(folder / "config.json", {"schema_version": 1, "requested": {}, "resolved": config().to_dict()})
    if has_samples:
        write_finished(folder / FINISHED_FILENAME, ATTEMPT.log, ATTEMPT.marks)
    write_record(folder / "result.json", record)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for cycle in range(2):
        store(tmp_path, measured_record(cycle))
    return tmp_path


def documents(folder: Path, wanted: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(recompute(wanted, "-o", str(folder), "--json").out)["results"]
    return found


def test_results_that_agree_say_so_and_one_can_be_asked_for(folder: Path) -> None:
    code, out, err = recompute("demo", "-o", str(folder))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.partition("(small): ")[2].partition(",")[0] for line in lines[:2]] == ["agrees", "agrees"]
    assert lines[2] == "2 of 2 results agree with their samples"
    exp_id = measured_record(1).identity.experiment_id
    assert [item["experiment_id"] for item in documents(folder, exp_id)] == [exp_id]


def test_a_result_that_differs_is_shown_and_is_the_exit_code(folder: Path) -> None:
    record = measured_record(2)
    store(folder, dataclasses.replace(record, energy=dataclasses.replace(record.energy, counter_update_period_s=1.5)))
    code, out, _ = recompute("demo", "-o", str(folder))
    assert code == 1
    assert "energy.counter_update_period_s: recorded 1.5, recomputed " in out
    assert out.splitlines()[-1] == "2 of 3 results agree with their samples"
    (bad,) = [item for item in documents(folder, "demo") if item["status"] == "differs"]
    assert [item["field"] for item in bad["differences"]] == ["energy.counter_update_period_s"]


@pytest.mark.parametrize(
    ("record", "code", "told"),
    [
        (measured_record(2), 1, f"impossible: no such file: {FINISHED_FILENAME}"),
        (make_record(run_id=RUN, cycle=2), 0, "unmeasured: no energy was measured"),
    ],
)
def test_without_samples_energy_cannot_be_recomputed_and_none_is_no_contradiction(
    folder: Path, record: Record, code: int, told: str
) -> None:
    store(folder, record, has_samples=False)
    ended = recompute("demo", "-o", str(folder))
    assert (ended.code, told in ended.out) == (code, True)


@pytest.mark.parametrize("name", ["config.json", FINISHED_FILENAME])
def test_a_damaged_file_is_told(folder: Path, name: str) -> None:
    (store(folder, measured_record(2)) / name).write_bytes(b"{}")
    code, out, _ = recompute("demo", "-o", str(folder))
    assert (code, "impossible: " in out, name in out) == (1, True, True)


def test_a_result_that_is_not_whole_is_told_too(folder: Path) -> None:
    (store(folder, measured_record(2)) / "result.json").unlink()
    code, out, err = recompute("demo", "-o", str(folder))
    assert (code, "2 of 2" in out, err.startswith("missing: ")) == (0, True, True)
