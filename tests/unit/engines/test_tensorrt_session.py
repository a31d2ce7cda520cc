"""The tensorrt backend on a TensorRT-LLM that takes the documented arguments and no others (tests/doubles)."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.backends import TensorRTConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import walk
from lem.engines.protocol import Completion, Engine, EngineReport, TokenRequest
from lem.engines.tensorrt import load
from tests.integration.engine_answers import Arrivals

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers"), pytest.mark.usefixtures("tensorrt_llm")]

GPUS = ("GPU-aaaa", "GPU-bbbb")


class Bench:
    """A checkpoint, and engines loaded from it."""

    def __init__(self, folder: Path, engines: list[Any]) -> None:
        self.folder = folder
        self.engines = engines
        self.loaded: list[Engine] = []
        self.write("config.json", {"model_type": "of no kind that is known", "dtype": "float16"})

    def write(self, name: str, document: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_text(json.dumps(document), encoding="utf-8")

    def experiment(self, section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
        given: dict[str, Any] = {
            "model": str(self.folder),
            "backend": "tensorrt",
            "decoder": {"preset": "deterministic"},
            "max_input_tokens": 32,
            "max_output_tokens": 16,
        }
        return ExperimentConfig.from_dict({**given, **options, "tensorrt": section or {}})

    def load(self, section: dict[str, Any] | None = None, **options: Any) -> EngineReport:
        self.close()
        self.loaded.append(load(self.experiment(section, **options), {}, lambda: GPUS))
        return self.engine.report

    @property
    def engine(self) -> Engine:
        return self.loaded[-1]

    def close(self) -> None:
        while self.loaded:
            self.loaded.pop().close()

    @property
    def arguments(self) -> Any:
        return self.engines[-1].args

    def refusal(self, section: dict[str, Any], **options: Any) -> str:
        with pytest.raises(OptionRefused) as caught:
            self.load(section, **options)
        assert "TensorRT-LLM 1.3.0" in caught.value.message
        return caught.value.message


@pytest.fixture
def bench(tmp_path: Path, tensorrt_llm: Any) -> Iterator[Bench]:
    there = Bench(tmp_path / "model", tensorrt_llm.LLM.made)
    yield there
    there.close()


def test_quantization_is_that_of_the_checkpoint(bench: Bench) -> None:
    assert "is not quantized" in bench.refusal({"quantization": "fp8"})
    assert bench.engines == []
    bench.write("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    bench.load({"quantization": "fp8"})
    assert "is quantized to FP8" in bench.refusal({"quantization": "none"})
    # Before anything else is fetched, such as a drafting model that does not exist.
    assert "is quantized to FP8" in bench.refusal(
        {"quantization": "none", "draft_model": "no/model", "num_draft_tokens": 3}
    )


def test_lengths_bound_requests(bench: Bench) -> None:
    report = bench.load({"max_input_len": 5, "max_output_len": 7})
    assert (bench.arguments.max_input_len, bench.arguments.max_seq_len) == (5, 12)
    assert (report.effective["tensorrt"]["max_input_len"], report.effective["tensorrt"]["max_output_len"]) == (5, 7)


REACHING: list[tuple[str, Any, str]] = [
    ("max_batch_size", 4, "max_batch_size"),
    ("max_num_tokens", 64, "max_num_tokens"),
    ("tp_size", 2, "tensor_parallel_size"),
    ("pp_size", 2, "pipeline_parallel_size"),
    ("enable_chunked_context", True, "enable_chunked_prefill"),
    ("kv_cache_type", "fp8", "kv_cache_config.dtype"),
    ("enable_kv_cache_reuse", True, "kv_cache_config.enable_block_reuse"),
    ("gpu_memory_utilization", 0.7, "kv_cache_config.free_gpu_memory_fraction"),
]


@pytest.mark.parametrize(("option", "value", "argument"), REACHING)
def test_the_option_reaches_the_engine(bench: Bench, option: str, value: Any, argument: str) -> None:
    report = bench.load({option: value}, gpus=["GPU-aaaa", "GPU-bbbb"])
    assert operator.attrgetter(argument)(bench.arguments) == value
    assert report.effective["tensorrt"][option] == value


def test_a_model_drafts(bench: Bench) -> None:
    drafter = bench.folder.parent / "small"
    drafter.mkdir()
    (drafter / "config.json").write_text("{}", encoding="utf-8")
    section = {"draft_model": str(drafter), "num_draft_tokens": 3}
    report = bench.load(section)
    found = bench.arguments.speculative_config
    assert (found.speculative_model, found.max_draft_len) == (str(drafter), 3)
    assert {name: report.effective["tensorrt"][name] for name in section} == section


def test_extra_arguments_reach_the_engine(bench: Bench) -> None:
    report = bench.load({"extra_runtime_args": {"attn_backend": "FLASHINFER"}})
    assert bench.arguments.attn_backend == report.effective["engine"]["attn_backend"] == "FLASHINFER"


def test_every_declared_option_is_checked_here_or_refused() -> None:
    # See test_refusals.py.
    refused = {
        *("engine_path", "engine_cache_dir", "force_rebuild", "builder_opt_level", "extra_build_args"),
        *("calibration.dataset", "calibration.split", "calibration.num_samples", "calibration.max_length"),
    }
    others = {"quantization", "max_input_len", "max_output_len", "draft_model", "num_draft_tokens"}
    checked = {*(option for option, _value, _argument in REACHING), *others, "extra_runtime_args"}
    assert {key for key, _item, _section in walk(TensorRTConfig)} == checked | refused


def test_a_request_asks_for_what_the_experiment_asks_for(bench: Bench) -> None:
    decoder = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    bench.load(decoder=decoder, random_seed=None, ignore_eos=True)
    bench.engine.generate([TokenRequest(0, (10,), 4, 2)], observe_tokens=False)
    token_ids, parameters, streaming = bench.engines[-1].requests[-1]
    assert (token_ids, streaming) == ([10], False)
    wanted = {**decoder, "max_tokens": 4, "min_tokens": 2, "ignore_eos": True, "detokenize": False, "seed": None}
    assert {name: getattr(parameters, name) for name in wanted} == wanted


def test_the_report_tells_what_was_loaded(bench: Bench) -> None:
    report = bench.load(gpus=["0"])
    assert (report.engine_name, report.engine_version, report.device) == ("tensorrt_llm", "1.3.0", "cuda")
    assert report.gpu_uuids == GPUS[:1]
    assert report.effective["fp_precision"] == "float16"
    assert report.effective["decoder"]["do_sample"] is False
    assert report.effective["engine"]["kv_cache_config"]["enable_block_reuse"] is False
    assert report.warnings[0].code == "tensorrt_no_reuse"
    assert json.loads(json.dumps(report.effective)) == report.effective


def test_a_tokenizer_of_another_model_is_told(bench: Bench) -> None:
    described = {"model_type": "of no kind that is known", "dtype": "float16"}
    bench.write("config.json", {**described, "vocab_size": ord("s") + 4})
    bench.load()
    assert bench.engine.encode("s") == [1, ord("s") + 3]
    assert bench.engine.decode(bench.engine.encode("sea")) == "sea"
    bench.write("config.json", {**described, "text_config": {"vocab_size": ord("s") + 3}})
    bench.load()
    with pytest.raises(EngineError, match="the model only has ids below 118") as caught:
        bench.engine.encode("s")
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_another_experiment_is_set_up_without_a_reload(bench: Bench) -> None:
    bench.load()
    loads = len(bench.engines)
    bench.engine.configure(bench.experiment(ignore_eos=True))
    assert bench.engine.report.effective["ignore_eos"] is True
    assert len(bench.engines) == loads
    with pytest.raises(EngineError, match="a different engine load"):
        bench.engine.configure(bench.experiment({"max_batch_size": 3}))
    with pytest.raises(OptionRefused, match="random_seed"):
        bench.engine.configure(bench.experiment(decoder={"temperature": 0.5}))


def test_unload_ends_the_engine_and_gives_the_environment_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaaa,GPU-bbbb")
    seen: list[str] = []

    def find_gpus() -> tuple[str, ...]:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return tuple(seen[-1].split(","))

    engine = load(bench.experiment(gpus=["1"]), {}, find_gpus)
    assert engine.report.gpu_uuids == ("GPU-bbbb",)
    assert seen == ["GPU-bbbb"]
    engine.close()
    assert bench.engines[-1].is_shut_down
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa,GPU-bbbb"


@pytest.mark.parametrize(
    ("gpus", "found", "section", "reason"),
    [
        (["GPU-aaaa", "GPU-cccc"], ("GPU-aaaa",), {}, "gpus: GPU-cccc not found"),
        (None, (), {}, "requires a GPU"),
        (None, GPUS, {"tp_size": 2, "extra_runtime_args": {"context_parallel_size": 2}}, "needs 4 GPUs, but 2 are"),
    ],
)
def test_gpus_that_are_not_there_are_an_error(bench: Bench, gpus: Any, found: Any, section: Any, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        load(bench.experiment(section, gpus=gpus), {}, lambda: found)
    assert (caught.value.kind, caught.value.is_permanent) == ("option", True)


def test_a_copy_of_the_model_can_be_spread_over_all_gpus(bench: Bench) -> None:
    assert bench.load({"extra_runtime_args": {"context_parallel_size": 2}}).gpu_uuids == GPUS


def test_a_silent_change_is_refused_except_of_what_is_left_to_the_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm.llmapi import KvCacheConfig

    init = KvCacheConfig.__init__
    monkeypatch.setattr(KvCacheConfig, "__init__", lambda self, **given: init(self, **{**given, "dtype": "fp8"}))
    assert bench.load({"kv_cache_type": "auto"}).effective["tensorrt"]["kv_cache_type"] == "fp8"
    assert "tensorrt.kv_cache_type: nvfp4 became fp8" in bench.refusal({"kv_cache_type": "nvfp4"})
    assert bench.engines[-1].is_shut_down


def test_too_little_memory_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import LLM

    def fail(self: Any, **_arguments: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LLM, "__init__", fail)
    with pytest.raises(EngineError) as caught:
        bench.load()
    assert (caught.value.kind, caught.value.is_permanent) == ("out_of_memory", True)


# Requests

WAYS = pytest.mark.parametrize("way", ["closed", "alone", "serve"])


def run(way: str, engine: Engine, requests: list[TokenRequest]) -> list[Completion]:
    """Have an engine answer requests in one of its three ways."""
    if way != "serve":
        return list(engine.generate(requests, observe_tokens=way == "alone"))
    arrivals = Arrivals(requests[:2], requests[2:])
    engine.serve(arrivals)
    return sorted(arrivals.completions, key=lambda item: item.index)


@WAYS
def test_requests_are_answered_and_one_that_fails_fails_alone(bench: Bench, way: str) -> None:
    bench.load()
    handed = len(bench.engines[-1].requests)
    requests = [TokenRequest(index, (first, 5), 4, 2) for index, first in enumerate((10, 903, 900, 901, 902))]
    requests += [TokenRequest(5, (1,) * 33, 3), TokenRequest(6, (1,) * 32, 17)]
    good, in_pairs, *failed = run(way, bench.engine, requests)
    assert (good.output_ids, in_pairs.output_ids) == ((11, 12, 13, 14), (904, 905, 906, 907))
    cancelled = "TensorRT-LLM ended the request with 'cancelled'"
    told = [None, None, "this request is too long", "no memory for this request", cancelled]
    assert [item.error for item in (good, in_pairs, *failed[:3])] == told
    assert all("max_input_len 32, 48 in total" in str(item.error) for item in failed[3:])
    assert len(bench.engines[-1].requests) == handed + 5
    assert (good.token_times_ns is None) == (way == "closed")
    if good.token_times_ns is not None and in_pairs.token_times_ns is not None:
        assert good.started_ns <= good.token_times_ns[0]
        assert list(good.token_times_ns) == sorted(good.token_times_ns)
        assert good.finished_ns == good.token_times_ns[-1]
        first, second, third, fourth = in_pairs.token_times_ns
        assert first == second <= third == fourth


def test_in_a_closed_set_requests_are_timed_by_the_engine(bench: Bench) -> None:
    bench.load()
    before_ns = time.monotonic_ns()
    own, other = bench.engine.generate([TokenRequest(0, (10,), 3), TokenRequest(1, (904,), 3)], observe_tokens=False)
    timing = bench.engines[-1].answers[-2].outputs[0].request_perf_metrics.timing_metrics
    by_engine_ns = [value.total_seconds() * 1e9 for value in (timing.first_scheduled_time, timing.last_token_time)]
    assert [own.started_ns, own.finished_ns] == pytest.approx(by_engine_ns, abs=1000)
    # Times of another clock are not used.
    assert before_ns <= other.started_ns <= other.finished_ns <= time.monotonic_ns()


def test_requests_join_while_others_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second arrives when the first has begun, which does not go on before that."""
    from tensorrt_llm.llm import Answer

    bench.load()
    handed, parts = len(bench.engines[-1].requests), Answer.__aiter__
    has_begun = threading.Event()

    async def wait_for_the_second(self: Any) -> AsyncIterator[Any]:
        async for part in parts(self):
            has_begun.set()
            while len(bench.engines[-1].requests) < handed + 2:
                await asyncio.sleep(0)
            yield part

    class Joining(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if len(self._groups) == 1:
                assert has_begun.wait(30)
            return tuple(self._groups.pop(0)) if self._groups else ()

    monkeypatch.setattr(Answer, "__aiter__", wait_for_the_second)
    arrivals = Joining([TokenRequest(0, (10,), 2)], [TokenRequest(1, (20,), 2)])
    bench.engine.serve(arrivals)
    assert sorted(item.output_ids for item in arrivals.completions) == [(11, 12), (21, 22)]


class Broken(Arrivals):
    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        raise EngineError("the queue is broken")


class Refusing(Arrivals):
    def complete(self, completion: Completion) -> None:
        super().complete(completion)
        raise EngineError("it did not have this request")


@pytest.mark.parametrize(("kind", "reason"), [(Broken, "is broken"), (Refusing, "did not have")])
def test_a_queue_that_fails_or_refuses_an_answer_fails_serving(bench: Bench, kind: type[Arrivals], reason: str) -> None:
    bench.load()
    with pytest.raises(EngineError, match=reason):
        bench.engine.serve(kind([TokenRequest(0, (10,), 2)], [TokenRequest(1, (20,), 2)]))


@WAYS
def test_an_engine_that_fails_is_no_failure_of_a_request(bench: Bench, way: str) -> None:
    bench.load()
    with pytest.raises(EngineError, match="failed while generating: AssertionError: a check of its own"):
        run(way, bench.engine, [TokenRequest(0, (10,), 2), TokenRequest(1, (905,), 2)])


def test_parameters_that_the_engine_refuses_fail_the_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import SamplingParams

    def refuse(self: Any, **_given: Any) -> None:
        raise TypeError("no such argument")

    bench.load()
    monkeypatch.setattr(SamplingParams, "__init__", refuse)
    (found,) = bench.engine.generate([TokenRequest(0, (10,), 2)], observe_tokens=False)
    assert found.error == "no such argument"
