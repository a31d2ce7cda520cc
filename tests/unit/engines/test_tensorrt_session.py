"""The tensorrt backend on a TensorRT-LLM that takes the documented arguments and no others (tests/doubles)."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.backends import TensorRTConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import walk
from lem.engines.common import EngineRaised
from lem.engines.protocol import Completion, Engine, EngineReport, TokenRequest, say_nothing
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


def test_lengths_bound_requests(bench: Bench) -> None:
    report = bench.load({"max_input_len": 5, "max_output_len": 7})
    assert (bench.arguments.max_input_len, bench.arguments.max_seq_len) == (5, 12)
    assert (report.effective["tensorrt"]["max_input_len"], report.effective["tensorrt"]["max_output_len"]) == (5, 7)
    requests = [TokenRequest(0, (1,) * 5, 7), TokenRequest(1, (1,) * 6, 2), TokenRequest(2, (1,) * 5, 8)]
    found = bench.engine.generate(requests, observe_tokens=False)
    assert [item.error is None for item in found] == [True, False, False]


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


def test_requests_are_answered_alone_in_a_batch_and_in_traffic(bench: Bench) -> None:
    bench.load()
    requests = [TokenRequest(0, (10, 5), 4, 2), TokenRequest(1, (903,), 3), TokenRequest(2, (901,), 3)]
    arrivals = Arrivals(requests[:1], requests[1:])
    bench.engine.serve(arrivals)
    for found in (
        bench.engine.generate(requests, observe_tokens=False),
        bench.engine.generate(requests, observe_tokens=True),
        sorted(arrivals.completions, key=lambda item: item.index),
    ):
        assert [item.output_ids for item in found] == [(11, 12, 13, 14), (904, 905, 906), ()]
        assert found[2].error == "no memory for this request"
        assert all(item.started_ns <= item.finished_ns for item in found)


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


# Requests through `generate_async`

S = 1_000_000_000


class Clock:
    """Goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now_s = 100

    def __call__(self) -> int:
        self.now_s += 1
        return self.now_s * S


class Answer:
    """As scripted: groups of ids, then how it ends."""

    def __init__(
        self, groups: Sequence[Sequence[int]], reason: str | None, timing: Any, error: Exception | None
    ) -> None:
        self._groups, self._reason, self._error = groups, reason, error
        metrics = None if timing is None else SimpleNamespace(timing_metrics=timing)
        self.outputs = [SimpleNamespace(token_ids=[], finish_reason=None, request_perf_metrics=metrics)]

    def _parts(self) -> Iterator[Answer]:
        for group in self._groups:
            self.outputs[0].token_ids += group
            yield self
        if self._error is not None:
            raise self._error
        self.outputs[0].finish_reason = self._reason

    def result(self) -> Answer:
        for _ in self._parts():
            pass
        return self

    async def __aiter__(self) -> AsyncIterator[Answer]:
        for part in self._parts():
            await asyncio.sleep(0)
            yield part


class ScriptedEngine:
    """Gives the answers it was made with, by the first id of the prompt."""

    def __init__(self, **answers: Any) -> None:
        self.handed: list[tuple[Any, Any, bool]] = []
        self._answers = answers

    def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Answer:
        self.handed.append((inputs, sampling_params, streaming))
        script: dict[str, Any] = {"groups": [[5], [6], [7]], "reason": "length", "timing": None, "error": None}
        script.update(self._answers.get(f"at_{inputs['prompt_token_ids'][0]}", {}))
        if script.get("refused"):
            raise ValueError("not\nthis one")
        script.pop("refused", None)
        return Answer(**script)


def request(index: int, first_id: int = 1, length: int = 2, maximum: int = 3) -> TokenRequest:
    return TokenRequest(index, (first_id, *range(length - 1)), maximum)


def server(
    engine: ScriptedEngine, clock: Clock | None = None, parameters: Any = lambda made: ("parameters", made.index)
) -> Any:
    from lem.engines.tensorrt.session import Server

    return Server(engine, parameters, longest_input=10, longest=16, clock=clock or Clock())


def run(name: str, tried: Any, requests: list[TokenRequest]) -> list[Completion]:
    """Has a server answer requests in one of its three ways."""
    if name != "serve":
        return list(getattr(tried, name)(requests, say_nothing))
    arrivals = Arrivals(requests[:2], requests[2:])
    tried.serve(arrivals)
    return sorted(arrivals.completions, key=lambda item: item.index)


def timing(scheduled_s: float, last_s: float) -> SimpleNamespace:
    return SimpleNamespace(
        first_scheduled_time=timedelta(seconds=scheduled_s), last_token_time=timedelta(seconds=last_s)
    )


def test_a_closed_set_is_handed_over_at_once_as_ids() -> None:
    engine, done = ScriptedEngine(), list[int]()
    found = server(engine).run_closed([request(0), request(1, 2)], done.append)
    assert done == [1, 2]
    assert engine.handed == [
        ({"prompt_token_ids": [1, 0]}, ("parameters", 0), False),
        ({"prompt_token_ids": [2, 0]}, ("parameters", 1), False),
    ]
    assert [(item.index, item.output_ids, item.token_times_ns, item.padding_tok) for item in found] == [
        (0, (5, 6, 7), None, 0),
        (1, (5, 6, 7), None, 0),
    ]


def test_in_a_closed_set_requests_are_timed_by_the_engine() -> None:
    # Handed over at 101 s, 102 s and 103 s; looked at from 104 s on.
    just_before = SimpleNamespace(
        first_scheduled_time=timedelta(seconds=102, microseconds=999_999), last_token_time=None
    )
    engine = ScriptedEngine(
        at_1={"timing": timing(101.5, 102.5)}, at_2={"timing": timing(500.0, 501.0)}, at_3={"timing": just_before}
    )
    first, second, third = server(engine).run_closed([request(0), request(1, 2), request(2, 3)], say_nothing)
    assert (first.started_ns, first.finished_ns) == (101.5 * S, 102.5 * S)
    assert (second.started_ns, second.finished_ns) == (102 * S, 105 * S)  # of another clock: not used
    assert third.started_ns == 103 * S  # cut to microseconds, it seems to be before the request


def test_alone_each_token_has_the_time_it_was_seen_at() -> None:
    engine = ScriptedEngine(at_2={"groups": [[5], [6, 7], []]})
    done: list[int] = []
    first, second = server(engine).run_alone([request(0), request(1, 2)], done.append)
    assert done == [1, 2]
    assert first.token_times_ns == (102 * S, 103 * S, 104 * S)
    assert first.finished_ns == 104 * S
    assert second.token_times_ns is not None
    assert second.output_ids == (5, 6, 7)
    assert second.token_times_ns[1] == second.token_times_ns[2] > second.token_times_ns[0]
    assert {streaming for _inputs, _parameters, streaming in engine.handed} == {True}


@pytest.mark.parametrize("name", ["run_closed", "run_alone", "serve"])
def test_a_request_that_fails_fails_alone(name: str) -> None:
    engine = ScriptedEngine(
        at_2={"refused": True}, at_3={"error": RuntimeError("on the way")}, at_4={"reason": "cancelled"}
    )
    requests = [request(0), request(1, 2), request(2, 3), request(3, 4), request(4, 5, length=11), request(5, 6, 9, 8)]
    found = run(name, server(engine), requests)
    cancelled = "TensorRT-LLM ended the request with 'cancelled'"
    assert [item.error for item in found[:4]] == [None, "not this one", "on the way", cancelled]
    assert all("max_input_len 10, 16 in total" in str(item.error) for item in found[4:])
    assert len(engine.handed) == 4
    times = found[0].token_times_ns
    assert (times is None) == (name == "run_closed")
    assert times is None or (len(times) == 3 and found[0].started_ns <= times[0] < times[1] < times[2])


def test_requests_join_while_others_run() -> None:
    """The second arrives when the first has begun: they are answered in turns."""
    has_begun = threading.Event()
    seen: list[int] = []

    class Slow(Answer):
        async def __aiter__(self) -> AsyncIterator[Answer]:
            for part in self._parts():
                seen.append(part.outputs[0].token_ids[0])
                has_begun.set()
                while len(set(seen)) < 2:
                    await asyncio.sleep(0)
                yield part

    class Watched(ScriptedEngine):
        def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Answer:
            first = 10 * inputs["prompt_token_ids"][0]
            return Slow([[first], [first + 1]], "length", None, None)

    class Joining(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if len(self._groups) == 1:
                assert has_begun.wait(30)
            return tuple(self._groups.pop(0)) if self._groups else ()

    arrivals = Joining([request(0, 1)], [request(1, 2)])
    server(Watched()).serve(arrivals)
    assert sorted(item.output_ids for item in arrivals.completions) == [(10, 11), (20, 21)]


class Broken(Arrivals):
    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        raise EngineError("the queue is broken")


class Refusing(Arrivals):
    def complete(self, completion: Completion) -> None:
        super().complete(completion)
        raise EngineError("it did not have this request")


@pytest.mark.parametrize(("kind", "reason"), [(Broken, "is broken"), (Refusing, "did not have")])
def test_a_queue_that_fails_or_refuses_an_answer_fails_serving(kind: type[Arrivals], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        server(ScriptedEngine()).serve(kind([request(0)], [request(1)]))


@pytest.mark.parametrize("name", ["run_closed", "run_alone", "serve"])
def test_an_engine_that_fails_is_no_failure_of_a_request(name: str) -> None:
    engine = ScriptedEngine(at_2={"error": AssertionError("a check of its own")})
    with pytest.raises(EngineRaised) as caught:
        run(name, server(engine), [request(0), request(1, 2)])
    assert isinstance(caught.value.error, AssertionError)


def test_parameters_that_the_engine_refuses_fail_the_request() -> None:
    def refuse(_request: TokenRequest) -> Any:
        raise EngineRaised(TypeError("no such argument"))

    (found,) = server(ScriptedEngine(), parameters=refuse).run_closed([request(0)], say_nothing)
    assert found.error == "no such argument"


class WhatLemRaises(TypeError):
    """A bug of lem that looks like something an engine raises."""


@pytest.mark.parametrize("name", ["run_alone", "serve"])
def test_a_bug_in_timing_tokens_is_not_the_engines(name: str) -> None:
    class Stuck(Clock):
        def __call__(self) -> int:
            if self.now_s > 101:
                raise WhatLemRaises
            return super().__call__()

    with pytest.raises(WhatLemRaises):
        run(name, server(ScriptedEngine(), Stuck()), [request(0)])
