from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lem import __version__
from lem.base import durable
from lem.base.answers import OUTPUT_IDS_FILE, read_answers
from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.config.sections import WarmupConfig
from lem.engines.protocol import Completion, EngineReport, TokenRequest
from lem.meters.requestlog import REQUESTS_FILENAME, read_requests
from lem.record import Record, decode_record, encode_record
from lem.worker.channel import RunRequest
from lem.worker.harness import ResidentEngine, run_experiment, variation_of, warm_up
from lem.worker.prompts import read_prompt_file, write_prompts
from lem.worker.recording import WarmupOutcome
from lem.worker.requests import DisjointRequests
from lem.worker.shapes import Prompt
from tests.doubles.trivial_engine import TrivialEngine
from tests.unit.worker.timed_backend import NS_PER_MS, SteppedClock, TimedBackend, make_requests
from tests.worker_rig import IDENTITY, PHASES

PROMPTS = [Prompt(f"prompt number {number} of eight") for number in range(8)]  # 6 tokens each


@dataclass
class Listener:
    phases: list[str] = field(default_factory=list)
    told: list[tuple[int, int | None, str]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def progress(self, done: int, total: int | None, text: str) -> None:
        self.told.append((done, total, text))


_FIELDS = ("secrets", "gap_s", "gap_end_code", "identity", "draw")


@dataclass
class Bench:
    folder: Path
    backend: TimedBackend
    engine: ResidentEngine
    listener: Listener

    @property
    def clock(self) -> SteppedClock:
        return self.backend.clock

    def run(self, requested: Mapping[str, Any] | None = None, **given: Any) -> Record:
        """The record of an experiment; `given` are fields of the request, all else options of the experiment."""
        fields: dict[str, Any] = {name: given.pop(name) for name in _FIELDS if name in given}
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
    engine = ResidentEngine(backend.load, backend.clock)
    return Bench(tmp_path, backend, engine, Listener())


def test_phases_are_told_in_order_and_a_reused_engine_skips_the_load(bench: Bench) -> None:
    first = bench.run()
    assert tuple(bench.listener.phases) == PHASES
    second = bench.run()
    assert tuple(bench.listener.phases[len(PHASES) :]) == tuple(phase for phase in PHASES if phase != "load")
    assert (first.validity.engine_reused, second.validity.engine_reused) == (False, True)
    assert first.window.load_s == pytest.approx(3.0)
    loaded = Reason.of("engine_was_loaded", load_id=first.validity.engine_load_id)
    assert (second.window.load_s, second.window.null_reasons["load_s"]) == (None, loaded)


def test_closed_batch_figures(bench: Bench) -> None:
    # eight prompts in pairs: four turns of a 10 ms prefill and 128 steps of 1 ms
    record = bench.run(measurement={"min_window_sec": 0})
    window, work, rates = record.window, record.work, record.throughput
    assert (window.traffic_mode, window.window_repeats) == ("closed_batch", 1)
    assert window.window_s == pytest.approx(4 * 0.138)
    assert (work.requests_ok, work.requests_failed, work.input_tok, work.output_tok) == (8, 0, 8 * 6, 8 * 128)
    found = (rates.output_tok_per_s, rates.total_tok_per_s, rates.requests_per_s)
    assert found == pytest.approx((8 * 128 / 0.552, 8 * 134 / 0.552, 8 / 0.552))
    assert (record.validity.valid, record.validity.invalid_reasons) == (True, ())
    assert {total for _, total, _ in bench.listener.told if total is not None} == {8}, "the first pass has an end"


def test_what_was_not_measured_is_null_with_its_reason(bench: Bench) -> None:
    record = bench.run(measurement={"grid_g_per_kwh": 300, "pue": 1.2})
    for section, name, code in (
        (record.window, "warmup_s", "warmup_off"),
        (record.validity, "warmup_converged", "warmup_off"),
        (record.latency, "ttft_s", "tokens_not_observed"),
        (record.energy, "gpu_energy_j", "on_cpu"),
        (record.energy, "cpu_package_energy_j", "sampler_reports"),
        (record.carbon, "price_per_kwh", "option_not_given"),
    ):
        assert (getattr(section, name), section.null_reasons[name].code) == (None, code), name
    assert record.idle.idle_loaded_power_w is None
    assert record.efficiency.energy_per_output_tok_j is None
    carbon = record.carbon
    assert (carbon.grid_g_per_kwh, carbon.pue, carbon.co2e_g) == (300.0, 1.2, None)


def test_warmup_is_not_measured_and_shares_no_prompt_with_the_window(bench: Bench) -> None:
    record = bench.run(warmup={"enabled": True, "min_prompts": 5}, measurement={"min_window_sec": 0})
    assert record.window.window_s == pytest.approx(4 * 0.138)
    assert record.window.warmup_s is not None
    assert record.window.warmup_prompts >= 5
    assert record.validity.warmup_converged is True
    measured = [request.token_ids for batch in bench.backend.batches[-4:] for request in batch]
    before = [request.token_ids for batch in bench.backend.batches[:-4] for request in batch]
    assert (len(measured), len(before)) == (8, record.window.warmup_prompts)
    assert set(measured).isdisjoint(before)
    assert {len(ids) for ids in before} == {len(ids) for ids in measured}


def test_streaming_measures_each_request_alone(bench: Bench) -> None:
    record = bench.run(streaming=True, measurement={"min_window_sec": 0})
    assert {len(batch) for batch in bench.backend.batches} == {1}
    ttft_s, icl_s = record.latency.ttft_s, record.latency.icl_s
    assert ttft_s is not None
    assert icl_s is not None
    assert (ttft_s.mean, icl_s.mean, ttft_s.n) == pytest.approx((0.011, 0.001, 8))


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


def test_arrivals_follow_the_seed_of_the_experiment(bench: Bench) -> None:
    def queue_times(seed: int) -> Any:
        return bench.run(traffic_simulation={"enabled": True, "target_qps": 50.0}, random_seed=seed).latency

    first = queue_times(1)
    assert queue_times(1) == first
    assert queue_times(2) != first


@pytest.mark.parametrize(("prompts", "is_valid"), [(99, False), (100, True)])
def test_failed_requests_above_one_percent_are_invalid_and_others_a_warning(
    bench: Bench, prompts: int, is_valid: bool
) -> None:
    write_prompts(bench.folder, [Prompt(f"prompt {number}") for number in range(prompts)])
    bench.backend.fails = lambda request: request.index == 3
    record = bench.run(max_output_tokens=4, measurement={"min_window_sec": 0})
    reason = Reason.of("requests_failed", failed=1, total=prompts, first="scripted failure")
    assert record.validity.valid is is_valid
    assert record.validity.invalid_reasons == (() if is_valid else (reason,))
    assert (reason in record.validity.warnings) is is_valid
    assert (record.work.requests_ok, record.work.requests_failed) == (prompts - 1, 1)


def test_no_output_at_all_is_invalid(bench: Bench) -> None:
    bench.backend.output_of = lambda _: 0
    assert bench.run(measurement={"min_window_sec": 0}).validity.invalid_reasons == (Reason.of("no_output"),)


@pytest.mark.parametrize(
    ("parameters", "embeddings", "counted", "confidence"),
    [(1000, 400, 600, "medium"), (1000, None, 1000, "low"), (None, None, None, None)],
)
def test_flops_leave_known_embeddings_out(
    bench: Bench, parameters: int | None, embeddings: int | None, counted: int | None, confidence: str | None
) -> None:
    sizes = {"model_parameters": parameters, "embedding_parameters": embeddings, "active_parameters": parameters}
    bench.backend.report = replace(bench.backend.report, **sizes)  # type: ignore[arg-type]
    compute = bench.run(measurement={"min_window_sec": 0}).compute
    assert compute.flops_total == (None if counted is None else 2 * counted * (8 * 6 + 8 * 128))
    assert (compute.model_parameters, compute.flops_confidence) == (parameters, confidence)
    assert ("flops_total" in compute.null_reasons) == (counted is None)


def test_flops_of_a_mixture_count_the_experts_that_a_token_uses_or_are_absent(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, active_parameters=700)  # of 1,000, 400 in embeddings
    compute = bench.run(measurement={"min_window_sec": 0}).compute
    assert (compute.flops_total, compute.active_parameters) == (2 * 300 * (8 * 6 + 8 * 128), 700)
    bench.engine.unload()
    bench.backend.report = replace(bench.backend.report, active_parameters=None)
    compute = bench.run(measurement={"min_window_sec": 0}).compute
    assert (compute.flops_total, compute.model_parameters) == (None, 1000)
    assert compute.null_reasons["flops_total"].code == "experts_uncounted"


def test_requests_are_kept_beside_the_result_and_without_secrets(bench: Bench) -> None:
    bench.backend.fails = lambda request: request.index == 3
    record = bench.run(streaming=True, measurement={"min_window_sec": 1}, secrets={"HF_TOKEN": "scripted"})
    log = read_requests(bench.folder / REQUESTS_FILENAME)
    assert (log.traffic_mode, log.prompts, log.repeats) == ("closed_batch", 8, record.window.window_repeats)
    assert (len(log.completed), len(log.failures)) == (record.work.requests_ok, record.work.requests_failed)
    assert "scripted" not in "".join(log.failures)
    assert log.requests[0].token_times_ns == tuple(log.opened_ns + ms * NS_PER_MS for ms in range(11, 139))
    assert (record.window.in_flight_mean, record.window.in_flight_peak) == (1.0, 1)


def test_a_window_of_traffic_without_a_completed_request_is_invalid(bench: Bench) -> None:
    bench.backend.token_ms = 1000.0  # an answer takes longer than the window
    record = bench.run(
        traffic_simulation={"enabled": True, "target_qps": 9, "allow_overload": True},
        max_output_tokens=99,
        measurement={"min_window_sec": 10},
        warmup={"enabled": False},
    )
    assert record.work.output_tok
    (reason,) = record.validity.invalid_reasons
    assert (record.work.requests_ok, reason.code) == (0, "none_completed")
    assert reason.data["arrived"] > 50


@pytest.mark.parametrize("is_wanted", [False, True])
def test_a_queue_that_grows_throughout_the_window_is_invalid_unless_it_is_wanted(bench: Bench, is_wanted: bool) -> None:
    # two at once take 0.138 s, so 14.5 requests a second
    record = bench.run(
        traffic_simulation={"enabled": True, "target_qps": 30, "allow_overload": is_wanted},
        measurement={"min_window_sec": 20},
    )
    assert record.validity.valid is is_wanted
    assert [reason.code for reason in record.validity.invalid_reasons] == ([] if is_wanted else ["queue_grew"])
    assert "load_too_high" in [reason.code for reason in record.validity.warnings]


def test_goodput_is_recorded_with_its_limits(bench: Bench) -> None:
    record = bench.run(
        traffic_simulation={"enabled": True, "mode": "closed", "concurrency": 3, "slo": {"e2e_ms": 200}},
        measurement={"min_window_sec": 10},
        max_output_tokens=90,
    )
    # Two of three are answered in 100 ms; the third waits for another turn.
    work, rates = record.work, record.throughput
    assert 0 < (work.requests_good or 0) <= (work.requests_ok or 0)
    assert rates.good_requests_per_s == (work.requests_good or 0) / record.window.window_s
    assert record.efficiency.null_reasons["energy_per_good_request_j"].code == "sampler_reports"


def test_peak_memory_is_that_of_the_window(bench: Bench) -> None:
    bench.backend.memory_b = 12345
    record = bench.run(warmup={"enabled": True})
    assert record.compute.peak_memory_b == 12345
    reset = bench.backend.calls.index("reset_peak_memory")
    assert "generate" in bench.backend.calls[:reset], "the warm-up came before"
    assert "generate" in bench.backend.calls[reset:]


def test_identity_gap_and_gpus_are_recorded(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, device="cuda", gpu_uuids=("GPU-1",))
    record = bench.run(gap_s=12.5, gap_end_code="gap_recovered")
    added = {"start_utc": "2026-01-02T03:04:05.678Z", "lem_version": __version__}
    assert asdict(record.identity) == {**IDENTITY, **added}
    assert (record.window.gap_s, record.window.gap_end_reason) == (12.5, Reason.of("gap_recovered"))
    assert ([gpu.uuid for gpu in record.gpus], record.environment.gpu_uuids) == (["GPU-1"], ("GPU-1",))


def test_what_the_host_left_out_is_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match="identity") as caught:
        bench.run(identity={"experiment_id": "x"})
    assert caught.value.kind == "channel"
    (bench.folder / "config.json").unlink()
    config = ExperimentConfig.from_dict({"model": "any"})
    request = RunRequest(config.to_dict(), IDENTITY, str(bench.folder), config.engine_key(), keep_engine=False)
    with pytest.raises(EngineError, match="cannot be read") as caught:
        run_experiment(request, bench.engine, bench.listener, bench.clock)
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
        warnings=(Reason.of("verbatim", text=f"used {secret}"),),
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
    assert (record.work.input_tok or 1) % (8 * 3) == 0


def test_prompts_that_the_host_left_are_used_else_resolved_and_left(bench: Bench) -> None:
    record = bench.run()
    assert (record.work.prompt_source["kind"], record.work.prompt_source["count"]) == ("bundled", 8)
    (bench.folder / "prompts.jsonl").unlink()
    record = bench.run(prompts={"type": "synthetic", "input_tokens": 9, "sample_size": 3, "output_tokens": 5})
    assert record.work.prompt_source["kind"] == "synthetic"
    assert len(read_prompt_file(bench.folder / "prompts.jsonl")) == 3
    assert record.work.input_tok == 9 * (record.work.requests_ok or 0)
    assert record.work.output_tok == 5 * (record.work.requests_ok or 0)


def test_a_chat_template_is_applied_where_the_tokenizer_is_and_recorded_with_its_hash(bench: Bench) -> None:
    plain = bench.run(chat_template="none").work
    assert plain.prompt_source["chat_template"] == "none"
    assert "chat_template_sha256" not in plain.prompt_source
    own = bench.run(chat_template="model").work
    assert own.prompt_source["chat_template_sha256"] == sha256(b"the model's own, tools False").hexdigest()
    assert own.requests_ok
    assert plain.requests_ok
    assert own.input_tok
    assert plain.input_tok
    assert own.input_tok / own.requests_ok == plain.input_tok / plain.requests_ok + 1  # system and answer, no begin
    (bench.folder / "chat_template.jinja").write_text("of the host")
    given = bench.run(chat_template="elsewhere/own.jinja").work.prompt_source
    assert given["chat_template"] == "elsewhere/own.jinja"
    assert given["chat_template_sha256"] == sha256(b"of the host").hexdigest()


def test_prompts_beyond_the_positions_of_the_model_are_refused_before_anything_runs(bench: Bench) -> None:
    bench.backend.report = replace(bench.backend.report, longest_tok=133)
    with pytest.raises(EngineError, match="8 of 8 prompts are too long for the 133 positions") as caught:
        bench.run()
    assert caught.value.is_permanent
    assert "generate" not in bench.backend.calls
    bench.backend.report = replace(bench.backend.report, longest_tok=134)
    assert bench.run().validity.valid


def test_broken_prompts_are_refused_for_good_before_anything_is_loaded(bench: Bench) -> None:
    (bench.folder / "prompts.jsonl").write_text("{")
    with pytest.raises(EngineError) as caught:
        bench.run()
    assert (caught.value.kind, caught.value.is_permanent) == ("prompts", True)
    assert "load" not in bench.backend.calls


def test_outputs_are_saved_when_asked(bench: Bench) -> None:
    bench.run(max_output_tokens=2)
    assert not (bench.folder / "outputs.jsonl").exists()
    bench.run(save_outputs=True, max_output_tokens=2)
    lines = [json.loads(line) for line in (bench.folder / "outputs.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(8))
    assert lines[0] == {"index": 0, "input_tok": 6, "output_tok": 2, "output_ids": [100, 101], "text": "t100 t101"}


def test_output_ids_of_the_first_pass_are_kept_when_asked_with_their_digest(bench: Bench) -> None:
    greedy: dict[str, Any] = {"decoder": {"preset": "deterministic"}, "max_output_tokens": 2}
    path = bench.folder / OUTPUT_IDS_FILE
    record = bench.run(**greedy)
    assert (record.work.output_ids_sha256, record.work.why_none("output_ids_sha256").code) == (None, "agreement_off")
    assert not path.exists()
    digest = bench.run(**greedy, measurement={"agreement": True, "min_window_sec": 1}).work.output_ids_sha256
    assert digest == sha256(path.read_bytes()).hexdigest()
    kept = read_answers(path, digest)
    assert [(item.prompt, item.output_ids) for item in kept] == [(number, (100, 101)) for number in range(8)]
    assert len({item.request for item in kept}) == 8
    again = read_answers(path, str(bench.run(**greedy, measurement={"agreement": True}).work.output_ids_sha256))
    assert again == kept
    longer = bench.run(**{**greedy, "max_output_tokens": 3}, measurement={"agreement": True})
    other = read_answers(path, str(longer.work.output_ids_sha256))
    assert {item.request for item in other}.isdisjoint(item.request for item in kept)


def test_under_traffic_the_first_answer_to_each_prompt_is_kept(bench: Bench) -> None:
    traffic = {"enabled": True, "mode": "closed", "concurrency": 2}
    record = bench.run(
        decoder={"temperature": 0}, traffic_simulation=traffic, measurement={"agreement": True, "min_window_sec": 2}
    )
    assert record.window.window_repeats > 1
    kept = read_answers(bench.folder / OUTPUT_IDS_FILE, str(record.work.output_ids_sha256))
    assert sorted(item.prompt for item in kept) == list(range(8))


def test_a_backend_without_output_ids_has_none_for_that_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = bench.backend.generate

    def without_ids(*given: Any, **more: Any) -> list[Completion]:
        return [replace(it, output_ids=(), counted_tok=it.output_tok, text="") for it in generate(*given, **more)]

    monkeypatch.setattr(bench.backend, "generate", without_ids)
    record = bench.run(decoder={"temperature": 0}, measurement={"agreement": True})
    assert record.work.output_tok
    why = Reason.of("ids_not_returned", engine=record.environment.engine_name)
    assert (record.work.output_ids_sha256, record.work.null_reasons["output_ids_sha256"]) == (None, why)
    assert not (bench.folder / OUTPUT_IDS_FILE).exists()


def test_progress_is_told_at_most_once_a_second(bench: Bench) -> None:
    bench.run(measurement={"min_window_sec": 20})
    assert 10 <= len(bench.listener.told) <= 21
    done, total, text = bench.listener.told[-1]
    assert done > 8
    assert (total, text) == (None, f"{done} requests")


# The resident engine

ANY = ExperimentConfig.from_dict({"model": "none"})
OTHER = ExperimentConfig.from_dict({"model": "none", "max_output_tokens": 8, "pytorch": {"batch_size": 4}})


@dataclass
class Device:
    """Has room for one engine; a load takes two seconds of its clock."""

    rules: list[dict[str, object]] = field(default_factory=list)
    checks_s: float = 0.0
    compile_s: float | None = None
    on_device: list[TrivialEngine] = field(default_factory=list)
    clock: SteppedClock = field(default_factory=SteppedClock)

    def __post_init__(self) -> None:
        self.engine = ResidentEngine(self.load, self.clock)

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> TrivialEngine:
        assert self.on_device == []
        self.clock.advance_ms(2000)
        engine = TrackedEngine({"rules": self.rules}, config)
        engine.device = self
        self.on_device.append(engine)
        return engine


class TrackedEngine(TrivialEngine):
    device: Device

    @property
    def report(self) -> EngineReport:
        return replace(super().report, checks_s=self.device.checks_s, compile_s=self.device.compile_s)

    def close(self) -> None:
        super().close()
        self.device.on_device.remove(self)


@pytest.mark.parametrize(("checks_s", "compile_s", "load_s"), [(0.0, None, 2.0), (0.5, None, 1.5), (0.25, 0.75, 1.0)])
def test_an_engine_is_reused_for_its_key_and_replaced_for_another(
    checks_s: float, compile_s: float | None, load_s: float
) -> None:
    device = Device(checks_s=checks_s, compile_s=compile_s)
    first = device.engine.ensure(ANY, "key", {})
    assert (first.is_reused, first.load_s) == (False, load_s)
    second = device.engine.ensure(OTHER, "key", {})
    assert second.engine is first.engine
    assert (second.is_reused, second.load_s, second.load_id) == (True, None, first.load_id)
    assert second.report.effective["pytorch"] == {"batch_size": 4}
    assert [device.engine.is_resident(key) for key in ("key", "other")] == [True, False]
    third = device.engine.ensure(ANY, "other", {})
    assert not third.is_reused
    assert third.load_id != first.load_id
    assert device.on_device == [third.engine]


@pytest.mark.parametrize("do", ["fail", "crash"])
def test_nothing_is_resident_after_a_load_that_fails(do: str) -> None:
    device = Device([{"at": "load", "do": do}])
    with pytest.raises((EngineError, RuntimeError)):
        device.engine.ensure(ANY, "key", {})
    assert not device.engine.is_resident("key")
    device.rules.clear()
    assert device.engine.ensure(ANY, "key", {}).is_reused is False


def test_an_engine_that_refuses_an_experiment_stays_and_one_that_fails_to_unload_is_gone() -> None:
    refuse: dict[str, object] = {"at": "configure", "do": "refuse", "when": {"max_output_tokens": 8}}
    engine = Device([refuse, {"at": "unload", "do": "crash"}]).engine
    engine.ensure(ANY, "key", {})
    with pytest.raises(OptionRefused):
        engine.ensure(OTHER, "key", {})
    assert engine.ensure(ANY, "key", {}).is_reused is True
    with pytest.raises(RuntimeError):
        engine.unload()
    assert not engine.is_resident("key")
    engine.unload()  # nothing to do


# Warm-up


def warm(backend: TimedBackend, width: int = 1, **settings: Any) -> WarmupOutcome:
    def run_step(requests: Sequence[TokenRequest]) -> list[Completion]:
        return backend.generate(requests, observe_tokens=False)

    source = DisjointRequests(make_requests(6), seed=3)
    done: list[int] = []
    found = warm_up(source, width, WarmupConfig(**settings), run_step, backend.clock, done.append)
    assert done == list(range(width, found.prompts + 1, width)), "the prompts run so far are reported after each step"
    return found


def erratic(batches: int) -> float:
    return 1.0 + batches % 2


@pytest.mark.parametrize(
    ("backend", "settings", "prompts", "converged"),
    [
        ({}, {"min_prompts": 1, "window_size": 4}, 4, True),
        ({}, {"min_prompts": 12, "window_size": 3}, 12, True),
        ({"width": 4}, {"width": 4, "min_prompts": 0, "convergence_detection": False}, 8, None),
        ({"width": 20}, {"width": 20, "max_prompts": 50, "window_size": 5}, 100, True),
        ({"slow_down": lambda batches: 5.0 - min(batches, 4)}, {"min_prompts": 1, "window_size": 3}, 4 + 3, True),
        ({"slow_down": erratic}, {"max_prompts": 20}, 20, False),
        ({"slow_down": erratic, "width": 3}, {"width": 3, "max_prompts": 26}, 24, False),
        ({"token_ms": 1000.0}, {"timeout_seconds": 5.0}, 2, False),
        ({"token_ms": 60_000.0}, {"timeout_seconds": 0}, 5, True),
        ({}, {"convergence_detection": False}, 5, None),
        # 1 ms a token, however many: steps of unequal work are compared by the token.
        ({"prefill_ms": 0.0, "output_of": lambda request: 1 + request.index % 4}, {"min_prompts": 1}, 5, True),
        (
            {"prefill_ms": 0.0, "output_of": lambda request: 1 + request.index % 4, "is_counting_only": True},
            {"min_prompts": 1}, 5, True,
        ),
    ],
    ids=[
        "steady", "least", "twice the width", "wide", "slow start", "cap", "cap within a batch", "timeout",
        "no timeout", "no detection", "by the token", "by the token without ids",
    ],
)  # fmt: skip
def test_warm_up_ends_when_the_speed_has_settled_or_at_a_cap(
    backend: dict[str, Any], settings: dict[str, Any], prompts: int, converged: bool | None
) -> None:
    engine = TimedBackend(SteppedClock(), **backend)
    found = warm(engine, **settings)
    assert (found.prompts, found.converged.value) == (prompts, converged)
    assert found.elapsed_s.value == pytest.approx((engine.clock.now_ns - engine.clock.start_ns) / 1e9)
    assert {len(batch) for batch in engine.batches} == {settings.get("width", 1)}
    assert (found.converged.null_reason is None) == (converged is not None)
    assert (found.warnings == ()) == (converged is not False)


def test_warnings_of_warm_up_say_what_was_not_reached() -> None:
    slow = warm(TimedBackend(SteppedClock(), token_ms=1000.0), timeout_seconds=5.0)
    assert slow.step_s == pytest.approx(4.01)
    assert Reason.of("warmup_too_few_steps", prompts=2) in slow.warnings
    assert Reason.of("warmup_timed_out", prompts=2, floor=5) in slow.warnings
    assert [item.code for item in warm(TimedBackend(SteppedClock(), slow_down=erratic)).warnings] == [
        "warmup_unsettled"
    ]
    failing = warm(TimedBackend(SteppedClock(), fails=lambda request: request.index == 0))
    (failed,) = [item.data for item in failing.warnings if item.code == "warmup_requests_failed"]
    assert (failed["failed"], failed["first"]) == (1, "scripted failure")


def test_prompts_of_unlike_lengths_are_compared_on_equal_steps() -> None:
    clock = SteppedClock()
    backend = TimedBackend(clock)
    lengths = (3, 400, 20, 90, 7, 250)
    unlike = [TokenRequest(index, tuple(range(length)), 4) for index, length in enumerate(lengths)]

    def run_step(requests: Sequence[TokenRequest]) -> list[Completion]:
        clock.advance_ms(sum(len(request.token_ids) for request in requests))  # prefill by length
        return backend.generate(requests, observe_tokens=False)

    found = warm_up(DisjointRequests(unlike, seed=1), 1, WarmupConfig(), run_step, clock, lambda _: None)
    ran = [len(batch[0].token_ids) for batch in backend.batches]
    assert found.converged.value is True
    assert ran == [*lengths[:5], *[90] * (len(ran) - 5)], "the measured shapes, then the one in the middle"
    assert ran.count(90) == 5


def test_variation_is_sample_deviation_over_mean_of_the_last_values() -> None:
    assert variation_of([1.0, 1.0], 3) == math.inf
    assert variation_of([99.0, 1.0, 1.0, 1.18], 3) == pytest.approx(0.098, abs=0.001)  # of the population: 0.080


TRAFFIC = {"enabled": True, "mode": "poisson", "target_qps": 20.0}


def arrivals_s(bench: Bench, draw: int, **options: Any) -> list[float]:
    """The first arrivals of a window, in seconds from the one before."""
    options = {"traffic_simulation": {**TRAFFIC, **options.pop("traffic", {})}, "random_seed": 7, **options}
    bench.run(draw=draw, measurement={"min_window_sec": 1}, **options)
    log = read_requests(bench.folder / REQUESTS_FILENAME)
    times_ns = sorted(item.arrived_ns for item in log.requests if item.arrived_ns is not None)
    return [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(times_ns)][:10]


def test_every_cycle_draws_arrivals_of_its_own_and_its_configurations_share_them(bench: Bench) -> None:
    first, second = arrivals_s(bench, 0), arrivals_s(bench, 1)
    assert first != pytest.approx(second, rel=1e-3)
    assert arrivals_s(bench, 1, max_output_tokens=3) == pytest.approx(second, abs=1e-6)
    twice = arrivals_s(bench, 1, traffic={"target_qps": 40.0})
    assert twice == pytest.approx([gap_s / 2 for gap_s in second], abs=1e-6)
    # Without a seed, a run has arrivals that no other has, and its configurations share them.
    unseeded = [
        arrivals_s(bench, 0, random_seed=None, identity={**IDENTITY, "run_id": run_id}) for run_id in ("a", "a", "b")
    ]
    assert unseeded[0] == pytest.approx(unseeded[1], abs=1e-6)
    assert unseeded[0] != pytest.approx(unseeded[2], rel=1e-3)


def test_the_draw_of_prompts_is_recorded(bench: Bench) -> None:
    assert bench.run(draw=3).work.prompt_source["draw"] == 3
