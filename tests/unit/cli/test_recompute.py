from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lem.base import durable
from lem.base.answers import OUTPUT_IDS_FILE
from lem.meters.requestlog import REQUESTS_FILENAME, read_requests
from lem.meters.samples import FINISHED_FILENAME, write_finished
from lem.record import PROMPTS_FILE, Record, read_record, write_record
from lem.results.configurations import ListedConfiguration, write_listing
from lem.results.store import Repository
from lem.worker.channel import RunRequest
from lem.worker.harness import ResidentEngine, run_experiment
from lem.worker.prompts import write_prompts
from lem.worker.shapes import Prompt
from tests.command_rig import Output, run_lem
from tests.records import make_record, with_measured
from tests.scripted_attempt import config, gpu_attempt
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend

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
    found: list[dict[str, Any]] = json.loads(recompute(wanted, "--results-dir", str(folder), "--json").out)["results"]
    return found


def test_results_that_agree_say_so_and_one_can_be_asked_for(folder: Path) -> None:
    code, out, err = recompute("demo", "--results-dir", str(folder))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.partition("(small): ")[2].partition(",")[0] for line in lines[:2]] == ["agrees", "agrees"]
    figures = sum(item["compared"] for item in documents(folder, "demo"))
    assert figures > 2 * 30
    assert lines[2] == f"2 of 2 results agree with their raw data ({figures} figures recomputed)"
    exp_id = measured_record(1).identity.experiment_id
    assert [item["experiment_id"] for item in documents(folder, exp_id)] == [exp_id]


def test_a_result_that_differs_is_shown_and_is_the_exit_code(folder: Path) -> None:
    record = measured_record(2)
    store(folder, dataclasses.replace(record, energy=dataclasses.replace(record.energy, counter_update_period_s=1.5)))
    code, out, _ = recompute("demo", "--results-dir", str(folder))
    assert code == 1
    assert "energy.counter_update_period_s: recorded 1.5, recomputed " in out
    figures = sum(item["compared"] for item in documents(folder, "demo"))
    assert out.splitlines()[-1] == f"2 of 3 results agree with their raw data ({figures} figures recomputed)"
    (bad,) = [item for item in documents(folder, "demo") if item["status"] == "differs"]
    assert [item["field"] for item in bad["differences"]] == ["energy.counter_update_period_s"]


@pytest.mark.parametrize(
    ("record", "code", "told"),
    [
        (measured_record(2), 1, f"impossible: no such file: {FINISHED_FILENAME}"),
        (make_record(run_id=RUN, cycle=2), 0, "unmeasured: no energy was measured, and requests were not kept"),
    ],
)
def test_without_samples_energy_cannot_be_recomputed_and_none_is_no_contradiction(
    folder: Path, record: Record, code: int, told: str
) -> None:
    store(folder, record, has_samples=False)
    ended = recompute("demo", "--results-dir", str(folder))
    assert (ended.code, told in ended.out) == (code, True)


@pytest.mark.parametrize("name", ["config.json", FINISHED_FILENAME])
def test_a_damaged_file_is_told(folder: Path, name: str) -> None:
    (store(folder, measured_record(2)) / name).write_bytes(b"{}")
    code, out, _ = recompute("demo", "--results-dir", str(folder))
    assert (code, "impossible: " in out, name in out) == (1, True, True)


def test_a_result_that_is_not_whole_is_told_too(folder: Path) -> None:
    (store(folder, measured_record(2)) / "result.json").unlink()
    code, out, err = recompute("demo", "--results-dir", str(folder))
    assert (code, "2 of 2" in out, err.startswith("missing: ")) == (0, True, True)


def test_a_damaged_result_is_the_exit_code_too(folder: Path) -> None:
    path = store(folder, measured_record(2)) / "result.json"
    path.write_bytes(path.read_bytes()[:-100])
    code, out, err = recompute("demo", "--results-dir", str(folder))
    assert (code, "2 of 2" in out, err.startswith("corrupt: ")) == (1, True, True)
    for whole in folder.rglob("result.json"):
        whole.write_bytes(b"{}")
    assert recompute("demo", "--results-dir", str(folder)).code == 1


# Requests


class Silent:
    def phase(self, name: str) -> None:
        """Discard it."""

    def progress(self, done: int, total: int | None, text: str) -> None:
        """Discard it."""


TRAFFIC = {"traffic_simulation": {"enabled": True, "target_qps": 9, "slo": {"ttft_ms": 30, "e2e_ms": 900}}}


def run(results_dir: Path, **options: Any) -> Path:
    """The folder of an attempt as a worker leaves it, without any meter."""
    chosen = config(warmup={"enabled": False}, streaming=True, max_output_tokens=30, **options)
    identity = {**dataclasses.asdict(make_record(run_id=RUN).identity), "config_name": "small"}
    del identity["start_utc"], identity["lem_version"]
    folder = Repository(results_dir, "demo").prepare_attempt(RUN, identity["experiment_id"]).path
    durable.write_json(folder / "config.json", {"requested": options, "resolved": chosen.to_dict()})
    write_prompts(folder, [Prompt(f"prompt number {number}") for number in range(12)])
    backend = TimedBackend(SteppedClock(), width=2)
    engine = ResidentEngine(backend.load, backend.clock)
    request = RunRequest(chosen.to_dict(), identity, str(folder), chosen.engine_key(), keep_engine=False)
    write_record(folder / "result.json", run_experiment(request, engine, Silent(), backend.clock))
    return folder


@pytest.mark.parametrize("options", [{}, TRAFFIC], ids=["closed batch", "traffic"])
def test_every_figure_of_the_requests_is_recomputed_where_nothing_was_sampled(
    options: dict[str, Any], tmp_path: Path
) -> None:
    record = read_record(run(tmp_path, **options) / "result.json")
    code, out, _ = recompute("demo", "--results-dir", str(tmp_path))
    (found,) = documents(tmp_path, "demo")
    assert (code, found["status"], found["differences"]) == (0, "agrees", [])
    # Of the window, of work, of throughput, and mean, median, p90 and both counts of each latency
    assert found["compared"] == (6 + 5 + 6 + 5 * 5 if options else 6 + 4 + 4 + 4 * 5)
    assert out.splitlines()[-1] == f"1 of 1 results agree with their raw data ({found['compared']} figures recomputed)"
    assert (record.work.requests_good is not None) == bool(options)


def test_good_requests_are_counted_by_the_limits_of_the_reader_else_of_the_campaign(tmp_path: Path) -> None:
    path = run(tmp_path, **TRAFFIC) / "result.json"
    record, before = read_record(path), path.read_bytes()
    log = read_requests(path.with_name(REQUESTS_FILENAME))
    e2e_ms = sorted(item.e2e_ns / 1e6 for item in log.completed)
    limit_ms, tried = e2e_ms[len(e2e_ms) // 3], record.work.tried
    met = sum(item <= limit_ms for item in e2e_ms)
    assert record.work.requests_good != met

    def exported(*words: str) -> list[str]:
        columns = "requests_good,good_requests_per_s,good_requests_ratio"
        found = run_lem("results", "export", "demo", "--results-dir", str(tmp_path), "--columns", columns, *words)
        return found.out.splitlines()[1].split(",")

    listed = ListedConfiguration(record.identity.config_hash, "small", {}, {"e2e_ms": limit_ms})
    write_listing(tmp_path / "demo" / RUN, [listed])
    figures = met, met / record.window.window_s, met / tried
    assert [float(text) for text in exported()] == pytest.approx(figures)
    assert exported("--slo", "e2e_ms=1e9")[0::2] == [str(record.work.requests_ok), "1.0"]
    assert exported("--slo", "ttft_ms=30,e2e_ms=900")[0] == str(record.work.requests_good), "as it was measured"
    assert recompute("demo", "--results-dir", str(tmp_path)).code == 0, "compares with what was recorded"
    assert path.read_bytes() == before
    write_listing(tmp_path / "demo" / RUN, [dataclasses.replace(listed, slo={})])
    assert exported() == ["", "", ""]
    path.with_name(REQUESTS_FILENAME).unlink()
    words = ("--results-dir", str(tmp_path), "--format", "json", "--slo", "e2e_ms=5")
    (row,) = json.loads(run_lem("results", "export", "demo", *words).out)
    assert row["requests_good"] is None
    assert REQUESTS_FILENAME in row["null_reasons"]["requests_good"]
    for refused in ("ttft_ms=0", "ttft=5", "ttft_ms", "attainment_pct=90", "ttft_ms=1,ttft_ms=2"):
        assert run_lem("results", "show", "demo", "--slo", refused).code == 2
    for option in ("--slo=ttft_ms=null", "--slo=ttft_ms=~", "--slo=tpot_ms=", "--pue=null", "--price-per-kwh="):
        found = run_lem("results", "show", "demo", option)
        assert found.code == 2, option
        assert "expected a number, got" in found.err


@pytest.mark.parametrize(
    ("section", "field", "place"),
    [
        ("window", "in_flight_mean", "window.in_flight_mean"),
        ("throughput", "tok_per_step", "throughput.tok_per_step"),
        ("latency", "icl_s", "latency.icl_s.mean"),
    ],
)
def test_a_figure_that_does_not_follow_from_the_requests_is_named(
    section: str, field: str, place: str, tmp_path: Path
) -> None:
    path = run(tmp_path) / "result.json"
    record = read_record(path)
    part = getattr(record, section)
    old = getattr(part, field)
    new = dataclasses.replace(old, mean=7.0) if field == "icl_s" else 7.0
    write_record(path, dataclasses.replace(record, **{section: dataclasses.replace(part, **{field: new})}))
    (found,) = documents(tmp_path, "demo")
    assert (found["status"], [item["field"] for item in found["differences"]]) == ("differs", [place])
    assert found["differences"][0]["recorded"] == 7.0


ANSWERS = {"measurement": {"agreement": True}, "decoder": {"temperature": 0}}


@pytest.mark.parametrize("missing", [OUTPUT_IDS_FILE, PROMPTS_FILE])
def test_without_the_output_ids_or_prompts_the_figures_are_recomputed_and_the_gap_is_named(
    missing: str, tmp_path: Path
) -> None:
    folder = run(tmp_path, **ANSWERS)
    ((whole,), other) = (documents(tmp_path, "demo"), ({OUTPUT_IDS_FILE, PROMPTS_FILE} - {missing}).pop())
    assert whole["status"] == "agrees"
    (folder / missing).unlink()
    (found,) = documents(tmp_path, "demo")
    expected = {"status": "incomplete", "message": f"no such file: {missing}"}
    assert found == {**whole, **expected}
    assert recompute("demo", "--results-dir", str(tmp_path)).code == 1
    (folder / other).write_bytes(b'{"prompt": "other"}\n')
    (found,) = documents(tmp_path, "demo")
    assert (found["status"], found["message"]) == ("differs", f"no such file: {missing}")


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_requests_that_are_missing_or_damaged_are_no_agreement(content: bytes | None, tmp_path: Path) -> None:
    path = run(tmp_path) / REQUESTS_FILENAME
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    ended = recompute("demo", "--results-dir", str(tmp_path))
    assert (ended.code, "impossible: " in ended.out, REQUESTS_FILENAME in ended.out) == (1, True, True)
    assert ended.out.splitlines()[-1] == "0 of 1 results agree with their raw data (0 figures recomputed)"


def test_other_prompts_than_those_of_the_record_differ(tmp_path: Path) -> None:
    folder = run(tmp_path)
    ((agreeing,), prompts) = (documents(tmp_path, "demo"), [Prompt(f"prompt number {number}") for number in range(12)])
    write_prompts(folder, [*prompts[:-1], Prompt("another")])
    (found,) = documents(tmp_path, "demo")
    assert (found["status"], [item["field"] for item in found["differences"]]) == (
        "differs",
        ["work.prompt_source.sha256"],
    )
    (folder / PROMPTS_FILE).write_text(" ", encoding="utf-8")
    assert documents(tmp_path, "demo")[0]["status"] == "impossible"
    (folder / PROMPTS_FILE).unlink()
    (found,) = documents(tmp_path, "demo")
    assert (found["status"], PROMPTS_FILE in found["message"]) == ("incomplete", True)
    write_prompts(folder, prompts)
    assert documents(tmp_path, "demo") == [agreeing]
