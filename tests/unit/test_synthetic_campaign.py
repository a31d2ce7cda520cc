"""Synthetic campaigns: what they leave is what lem reads, and what is true of them is in the records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lem.base.measurement import WINDOW
from lem.meters.samples import FINISHED_FILENAME, read_finished
from lem.orchestration.manifest import COMPLETED, FAILED, PENDING, RUNNING, ManifestManager
from lem.results.store import Repository, count_failed
from tests.command_rig import run_lem
from tests.synthetic_campaign import Campaign, Configuration, Written

TWO = (
    Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900, ttft_s=0.2),
    Configuration("vllm", energy_per_output_tok_j=0.2, throttled_cycles=(1,), failed_cycles=(2,)),
)
SMALL = Campaign(TWO, cycles=3, window_s=5)


def repository_of(written: Written) -> Repository:
    return Repository(written.results_dir, written.campaign)


def test_what_is_written_is_what_the_repository_reads(tmp_path: Path) -> None:
    written = SMALL.write(tmp_path)
    scan = repository_of(written).scan(written.run_id)
    assert {item.record.identity.key: item.record for item in scan.results} == {
        record.identity.key: record for record in SMALL.records()
    }
    assert count_failed(scan) == {"vllm": 1}
    assert {problem.kind for problem in scan.problems} == {"missing"}


def test_the_manifest_names_every_experiment_and_what_became_of_it(tmp_path: Path) -> None:
    manifest = ManifestManager(SMALL.write(tmp_path / "a").manifest_path).load_strict()
    assert manifest is not None
    assert [entry.status for entry in manifest.experiments] == [COMPLETED] * 5 + [FAILED]
    throttled = manifest.experiments[3]
    assert [attempt.valid for attempt in throttled.attempts] == [False, True]
    assert Path(throttled.result_path or "").is_file()
    assert manifest.experiments[5].error == TWO[1].error
    written = dataclasses.replace(SMALL, stop_after=2).write(tmp_path / "b")
    manifest = ManifestManager(written.manifest_path).load_strict()
    assert manifest is not None
    assert [entry.status for entry in manifest.experiments] == [COMPLETED] * 2 + [RUNNING] + [PENDING] * 3
    assert len(repository_of(written).scan().results) == 2


def test_without_noise_the_record_says_what_is_true() -> None:
    quiet = dataclasses.replace(SMALL, load_sd=0, run_sd=0)
    for record in quiet.records():
        truth = next(item for item in TWO if item.name == record.identity.config_name)
        if record.validity.valid:
            assert record.efficiency.energy_per_output_tok_j == pytest.approx(truth.energy_per_output_tok_j)
            assert record.throughput.output_tok_per_s == truth.output_tok_per_s
        assert record.throughput.output_tok_per_s == pytest.approx(
            (record.work.output_tok or 0) / record.window.window_s
        )


def test_the_counter_in_the_log_comes_to_the_energy_of_the_record(tmp_path: Path) -> None:
    written = SMALL.write(tmp_path)
    for item in repository_of(written).scan().results:
        log, marks = read_finished(item.path.parent / FINISHED_FILENAME)
        window = next(mark for mark in marks if mark.name == WINDOW)
        inside = [row for row in log.counters if window.opened_ns <= row.at_ns <= window.closed_ns]
        slope_w = (inside[-1].energy_mj - inside[0].energy_mj) / 1e3 / ((inside[-1].at_ns - inside[0].at_ns) / 1e9)
        energy_j = slope_w * item.record.window.window_s
        assert energy_j == pytest.approx(item.record.energy.gpu_energy_j, rel=1e-4)


def test_the_same_experiment_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="same experiment"):
        Campaign((TWO[0], dataclasses.replace(TWO[0], name="other")))


def test_a_verifiable_campaign_agrees_with_its_raw_data_and_digests(tmp_path: Path) -> None:
    Campaign(TWO[:1], cycles=4, window_s=5, is_verifiable=True).write(tmp_path)
    code, out, err = run_lem(
        "verify", "demo", "--results-dir", str(tmp_path / "results"), "--state-dir", str(tmp_path / ".state")
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "4 of 4 results agree with digest and raw data."
    assert out.count("index and manifest") == 4
