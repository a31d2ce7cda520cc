from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lem import __version__
from lem.base import durable
from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.record import Record, decode_record, encode_record
from lem.worker.channel import RunRequest
from lem.worker.harness import ResidentEngine, run_experiment
from lem.worker.prompts import Prompt, read_prompts, write_prompts
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend
from tests.worker_rig import PHASES

IDENTITY = {
    "experiment_id": "abc-c1",
    "config_name": "any",
    "config_hash": "abc",
    "campaign_id": "c",
    "campaign_name": "campaign",
    "run_id": "r",
    "host": "here",
    "backend": "pytorch",
    "model": "any",
    "cycle_index": 0,
    "order_index": 3,
    "attempt": 1,
    "shuffle_seed": None,
}
PROMPTS = [Prompt(f"prompt number {number} of eight") for number in range(8)]  # 6 tokens each


@dataclass
class Listener:
    """Keeps what it is told."""

    phases: list[str] = field(default_factory=list)
    told: list[tuple[int, int | None, str]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def progress(self, done: int, total: int | None, text: str) -> None:
        self.told.append((done, total, text))


@dataclass
class Bench:
    """One result folder, one engine, one clock."""

    folder: Path
    backend: TimedBackend
    engine: ResidentEngine
    listener: Listener

    @property
    def clock(self) -> SteppedClock:
        return self.backend.clock

    def run(self, requested: Mapping[str, Any] | None = None, **given: Any) -> Record:
        """The record of an experiment; `given` are fields of the request, all else options of the experiment."""
        fields: dict[str, Any] = {
            name: given.pop(name) for name in ("secrets", "gap_s", "gap_end_code", "identity") if name in given
        }
        config = ExperimentConfig.from_dict({"model": "any", "warmup": {"enabled": False}, **given})
        durable.write_json(self.folder / "config.json", {"requested": requested or {"model": "any"}})
        whole: dict[str, Any] = {
            "config": config.to_dict(),
            "identity": IDENTITY,
            "result_dir": str(self.folder),
            "engine_key": config.engine_key(),
            "keep_engine": True,
            **fields,
        }
        request = RunRequest(**whole)
        record = run_experiment(request, self.engine, self.listener, self.clock)
        encode_record(record)  # refuses a null without a reason
        return record


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    backend = TimedBackend(SteppedClock())
    write_prompts(tmp_path, PROMPTS)
    engine = ResidentEngine(backend.load, backend.clock, lambda: "load-1")
    return Bench(tmp_path, backend, engine, Listener())


def test_phases_are_told_in_order(bench: Bench) -> None:
    bench.run()
    assert tuple(bench.listener.phases) == PHASES


def test_reused_engine_skips_the_load_phase_and_says_so(bench: Bench) -> None:
    first = bench.run()
    bench.listener.phases.clear()
    second = bench.run()
    assert "load" not in bench.listener.phases
    assert (first.validity.engine_reused, second.validity.engine_reused) == (False, True)
    assert first.window.load_s == pytest.approx(3.0)
    assert second.window.load_s is None
    assert "load-1" in second.window.null_reasons["load_s"]


def test_closed_batch_figures(bench: Bench) -> None:
    # eight prompts in pairs: four turns of a 10 ms prefill and 128 steps of 1 ms
    record = bench.run(measurement={"min_window_sec": 0})
    assert record.window.traffic_mode == "closed_batch"
    assert record.window.window_s == pytest.approx(4 * 0.138)
    assert record.window.window_repeats == 1
    assert (record.work.requests_ok, record.work.requests_failed) == (8, 0)
    assert (record.work.input_tok, record.work.output_tok) == (8 * 6, 8 * 128)
    assert record.throughput.output_tok_per_s == pytest.approx(8 * 128 / 0.552)
    assert record.throughput.total_tok_per_s == pytest.approx(8 * 134 / 0.552)
    assert record.throughput.requests_per_s == pytest.approx(8 / 0.552)
    assert record.validity.valid
    assert record.validity.invalid_reasons == ()


def test_window_holds_neither_load_nor_warmup(bench: Bench) -> None:
    record = bench.run(warmup={"enabled": True, "min_prompts": 5}, measurement={"min_window_sec": 0})
    assert record.window.window_s == pytest.approx(4 * 0.138)
    assert record.window.warmup_s is not None
    assert record.window.warmup_prompts >= 5
    assert record.validity.warmup_converged is True


def test_warmup_prompts_are_never_measured(bench: Bench) -> None:
    bench.run(warmup={"enabled": True}, measurement={"min_window_sec": 0})
    measured = [request.token_ids for batch in bench.backend.batches[-4:] for request in batch]
    before = [request.token_ids for batch in bench.backend.batches[:-4] for request in batch]
    assert len(measured) == 8
    assert before
    assert set(measured).isdisjoint(before)
    assert {len(ids) for ids in before} == {len(ids) for ids in measured}


def test_warmup_runs_at_the_width_of_the_measurement(bench: Bench) -> None:
    bench.backend.width = 4
    bench.run(pytorch={"batch_size": 4}, warmup={"enabled": True})
    assert {len(batch) for batch in bench.backend.batches} == {4}


def test_disabled_warmup_is_null_with_its_reason(bench: Bench) -> None:
    record = bench.run()
    assert record.window.warmup_s is None
    assert record.validity.warmup_converged is None
    assert "disabled" in record.validity.null_reasons["warmup_converged"]


def test_prompt_set_is_repeated_for_the_chosen_window(bench: Bench) -> None:
    record = bench.run(measurement={"min_window_sec": 1.0})
    assert record.window.window_repeats == 2
    assert record.validity.steady is True
    assert record.work.requests_ok == 16


def test_streaming_measures_each_request_alone(bench: Bench) -> None:
    record = bench.run(streaming=True, measurement={"min_window_sec": 0})
    assert {len(batch) for batch in bench.backend.batches} == {1}
    assert record.latency.ttft_s is not None
    assert record.latency.itl_s is not None
    assert record.latency.ttft_s.mean == pytest.approx(0.011)
    assert record.latency.itl_s.mean == pytest.approx(0.001)
    assert record.latency.ttft_s.n == 8


def test_without_streaming_token_times_are_null_with_the_remedy(bench: Bench) -> None:
    record = bench.run()
    assert record.latency.ttft_s is None
    assert "streaming" in record.latency.null_reasons["ttft_s"]


@pytest.mark.parametrize(
    "traffic", [{"mode": "closed", "concurrency": 2}, {"mode": "poisson", "target_qps": 10}, {"mode": "constant"}]
)
def test_traffic_is_served_and_measured(bench: Bench, traffic: dict[str, Any]) -> None:
    record = bench.run(
        traffic_simulation={"enabled": True, **traffic},
        warmup={"enabled": True},
        max_output_tokens=16,
        measurement={"min_window_sec": 2.0},
    )
    assert record.window.traffic_mode == traffic["mode"]
    assert record.window.window_s >= 2.0
    assert "generate" not in bench.backend.calls, "warm-up serves as the measurement does"
    assert record.latency.ttft_s is not None
    assert record.latency.queue_s is not None
    assert record.validity.valid


def test_arrivals_follow_the_seed_of_the_experiment(tmp_path: Path) -> None:
    def queue_times(seed: int) -> Any:
        backend = TimedBackend(SteppedClock())
        engine = ResidentEngine(backend.load, backend.clock)
        traffic = {"enabled": True, "target_qps": 50.0}
        folder = tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        write_prompts(folder, PROMPTS)
        return Bench(folder, backend, engine, Listener()).run(traffic_simulation=traffic, random_seed=seed).latency

    assert queue_times(1) == queue_times(1)
    assert queue_times(1) != queue_times(2)


def test_failed_requests_above_one_percent_are_invalid(bench: Bench) -> None:
    bench.backend.fails = lambda request: request.index == 3
    record = bench.run(measurement={"min_window_sec": 0})
    assert not record.validity.valid
    assert record.validity.invalid_reasons == (
        Reason.of("requests_failed", failed=1, total=8, first="scripted failure"),
    )
    assert (record.work.requests_ok, record.work.requests_failed) == (7, 1)


def test_failed_requests_up_to_one_percent_are_a_warning(bench: Bench) -> None:
    write_prompts(bench.folder, [Prompt(f"prompt {number}") for number in range(100)])
    bench.backend.fails = lambda request: request.index == 3
    record = bench.run(max_output_tokens=4, measurement={"min_window_sec": 0})
    assert record.validity.valid
    assert Reason.of("requests_failed", failed=1, total=100, first="scripted failure") in record.validity.warnings


def test_no_output_at_all_is_invalid(bench: Bench) -> None:
    bench.backend.output_of = lambda _: 0
    record = bench.run(measurement={"min_window_sec": 0})
    assert not record.validity.valid
    assert record.validity.invalid_reasons == (Reason.of("no_output"),)


def test_flops_leave_the_embeddings_out_and_say_how(bench: Bench) -> None:
    record = bench.run(measurement={"min_window_sec": 0})
    assert record.compute.flops_total == 2 * (1000 - 400) * (8 * 6 + 8 * 128)
    assert record.compute.model_parameters == 1000
    assert "non-embedding" in (record.compute.flops_method or "")
    assert record.compute.flops_confidence == "medium"


def test_flops_over_all_parameters_have_low_confidence(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, embedding_parameters=None)
    record = bench.run(measurement={"min_window_sec": 0})
    assert record.compute.flops_total == 2 * 1000 * (8 * 6 + 8 * 128)
    assert record.compute.flops_confidence == "low"


def test_flops_of_an_unknown_model_are_null(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, model_parameters=None, embedding_parameters=None)
    compute = bench.run().compute
    assert compute.flops_total is None
    assert "parameters" in compute.null_reasons["flops_total"]


def test_peak_memory_is_that_of_the_window(bench: Bench) -> None:
    bench.backend.memory_b = 12345
    record = bench.run(warmup={"enabled": True})
    assert record.compute.peak_memory_b == 12345
    reset = bench.backend.calls.index("reset_peak_memory")
    assert "generate" in bench.backend.calls[:reset], "the warm-up came before"
    assert "generate" in bench.backend.calls[reset:]


def test_energy_is_null_with_reasons_everywhere(bench: Bench) -> None:
    record = bench.run()
    assert record.energy.gpu_energy_j is None
    assert record.energy.null_reasons["gpu_energy_j"] == "the experiment runs on the CPU"
    assert record.energy.null_reasons["cpu_package_energy_j"] == "the host started no sampler"
    assert record.idle.idle_loaded_power_w is None
    assert record.efficiency.energy_per_output_tok_j is None
    assert record.carbon.co2e_g is None


def test_figures_of_the_user_are_recorded_but_no_carbon_without_energy(bench: Bench) -> None:
    carbon = bench.run(measurement={"grid_g_per_kwh": 300, "pue": 1.2}).carbon
    assert (carbon.grid_g_per_kwh, carbon.pue, carbon.price_per_kwh) == (300.0, 1.2, None)
    assert carbon.null_reasons["price_per_kwh"] == "measurement.price_per_kwh is not given"
    assert carbon.co2e_g is None


def test_an_experiment_that_demands_energy_is_refused_before_anything_is_loaded(bench: Bench) -> None:
    with pytest.raises(OptionRefused):
        bench.run(measurement={"energy": "rapl"})
    assert "load" not in bench.backend.calls


def test_gpus_are_listed_by_uuid(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, device="cuda", gpu_uuids=("GPU-1",))
    record = bench.run()
    assert [gpu.uuid for gpu in record.gpus] == ["GPU-1"]
    assert record.environment.gpu_uuids == ("GPU-1",)


def test_identity_and_gap_are_those_of_the_host(bench: Bench) -> None:
    record = bench.run(gap_s=12.5, gap_end_code="gap_recovered")
    assert record.identity.experiment_id == "abc-c1"
    assert record.identity.host == "here"
    assert record.identity.start_utc == "2026-01-02T03:04:05.678Z"
    assert record.identity.lem_version == __version__
    assert (record.window.gap_s, record.window.gap_end_reason) == (12.5, Reason.of("gap_recovered"))


def test_an_identity_with_a_hole_is_refused(bench: Bench) -> None:
    with pytest.raises(EngineError) as caught:
        bench.run(identity={"experiment_id": "x"})
    assert caught.value.kind == "channel"


def test_requested_configuration_is_recorded_as_written(bench: Bench) -> None:
    requested = {"model": "${MODEL}", "extra_metadata": {"who": "${USER}"}}
    record = bench.run(requested, extra_metadata={"who": "expanded"})
    assert record.requested == requested
    assert record.extra_metadata == {"who": "${USER}"}


def test_no_secret_reaches_the_record(bench: Bench) -> None:
    secret = 'hf_"secret"\\word'
    bench.backend.report = replace(
        bench.backend.report,
        effective={"token": f"Bearer {secret}"},
        warnings=(Reason.of("said", text=f"used {secret}"),),
    )
    record = bench.run({"model": "any", "note": secret}, secrets={"HF_TOKEN": secret})
    text = json.dumps(encode_record(record), ensure_ascii=False)
    assert "secret" not in text
    assert record.validity.warnings != ()
    assert decode_record(encode_record(record)) == record


def test_warnings_of_engine_and_prompts_are_kept(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, warnings=(Reason.of("min_p_unused", backend="vllm"),))
    record = bench.run(max_input_tokens=3)
    assert Reason.of("min_p_unused", backend="vllm") in record.validity.warnings
    assert Reason.of("prompts_cut", cut=8, total=8, limit=3) in record.validity.warnings
    assert record.work.input_tok % (8 * 3) == 0


def test_prompts_that_the_host_left_are_used(bench: Bench) -> None:
    record = bench.run()
    assert record.work.prompt_source["kind"] == "bundled"
    assert record.work.prompt_source["count"] == 8


def test_prompts_are_resolved_and_left_where_the_host_left_none(bench: Bench) -> None:
    (bench.folder / "prompts.jsonl").unlink()
    record = bench.run(prompts={"type": "synthetic", "input_tokens": 9, "sample_size": 3, "output_tokens": 5})
    assert record.work.prompt_source["kind"] == "synthetic"
    assert len(read_prompts(bench.folder) or ()) == 3
    assert record.work.input_tok == 9 * record.work.requests_ok
    assert record.work.output_tok == 5 * record.work.requests_ok


def test_broken_prompts_are_refused_for_good_before_anything_is_loaded(bench: Bench) -> None:
    (bench.folder / "prompts.jsonl").write_text("{")
    with pytest.raises(EngineError) as caught:
        bench.run()
    assert (caught.value.kind, caught.value.is_permanent) == ("prompts", True)
    assert "load" not in bench.backend.calls


def test_outputs_are_saved_when_asked(bench: Bench) -> None:
    bench.run(save_outputs=True, max_output_tokens=2)
    lines = [json.loads(line) for line in (bench.folder / "outputs.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(8))
    assert lines[0] == {"index": 0, "input_tok": 6, "output_tok": 2, "output_ids": [100, 101], "text": "t100 t101"}


def test_outputs_are_not_saved_otherwise(bench: Bench) -> None:
    bench.run()
    assert not (bench.folder / "outputs.jsonl").exists()


def test_progress_is_told_at_most_once_a_second(bench: Bench) -> None:
    bench.run(measurement={"min_window_sec": 20})
    assert 10 <= len(bench.listener.told) <= 21
    done, total, text = bench.listener.told[-1]
    assert done > 8
    assert total is None
    assert text == f"{done} requests"


def test_the_first_pass_has_an_end_that_a_person_can_wait_for(bench: Bench) -> None:
    bench.run(measurement={"min_window_sec": 0})
    assert {total for _, total, _ in bench.listener.told if total is not None} == {8}


def test_a_result_folder_without_its_configuration_is_refused(bench: Bench) -> None:
    config = ExperimentConfig.from_dict({"model": "any"})
    request = RunRequest(config.to_dict(), IDENTITY, str(bench.folder), config.engine_key(), keep_engine=False)
    with pytest.raises(EngineError) as caught:
        run_experiment(request, bench.engine, bench.listener, bench.clock)
    assert caught.value.kind == "channel"
