"""The tensorrt backend on a TensorRT-LLM that takes the documented arguments and no others (tests/doubles).

`CHECKS` has one entry an option; an option that is declared and not in it fails the first test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.backends import TensorRTConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import walk
from lem.engines.protocol import Completion, Engine, EngineReport, TokenRequest
from lem.engines.tensorrt import load

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]

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
        """Of the engine made last."""
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


def belongs_to_building(bench: Bench) -> None:
    for name, value in (
        ("engine_path", "/engine"),
        ("engine_cache_dir", "/cache"),
        ("force_rebuild", True),
        ("builder_opt_level", 3),
        ("extra_build_args", {"x": 1}),
    ):
        assert f"tensorrt.{name}: belongs to the flow that builds engines" in bench.refusal({name: value})


def belongs_to_quantizing(bench: Bench) -> None:
    for name, value in (("dataset", "cnn"), ("split", "train"), ("num_samples", 8), ("max_length", 64)):
        told = bench.refusal({"quantization": "fp8", "calibration": {name: value}})
        assert "tensorrt.calibration: the PyTorch flow quantizes nothing" in told


def quantization_is_that_of_the_checkpoint(bench: Bench) -> None:
    assert "is not quantized" in bench.refusal({"quantization": "fp8"})
    bench.write("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    bench.load({"quantization": "fp8"})
    assert "is quantized to FP8" in bench.refusal({"quantization": "none"})


def lengths_bound_requests(bench: Bench) -> None:
    report = bench.load({"max_input_len": 5, "max_output_len": 7})
    assert (bench.arguments.max_input_len, bench.arguments.max_seq_len) == (5, 12)
    assert (report.effective["tensorrt"]["max_input_len"], report.effective["tensorrt"]["max_output_len"]) == (5, 7)
    requests = [TokenRequest(0, (1,) * 5, 7), TokenRequest(1, (1,) * 6, 2), TokenRequest(2, (1,) * 5, 8)]
    found = bench.engine.generate(requests, observe_tokens=False)
    assert [item.error is None for item in found] == [True, False, False]


def reaches_the_engine(option: str, value: Any, argument: str) -> Callable[[Bench], None]:
    def check(bench: Bench) -> None:
        report = bench.load({option: value}, gpus=["GPU-aaaa", "GPU-bbbb"])
        found = bench.arguments
        for name in argument.split("."):
            found = getattr(found, name)
        assert found == value
        assert report.effective["tensorrt"][option] == value

    check.__name__ = f"{option}_reaches_the_engine"
    return check


def a_model_drafts(bench: Bench) -> None:
    drafter = bench.folder.parent / "small"
    drafter.mkdir()
    (drafter / "config.json").write_text("{}", encoding="utf-8")
    report = bench.load({"draft_model": str(drafter), "num_draft_tokens": 3})
    assert bench.arguments.speculative_config.speculative_model == str(drafter)
    assert bench.arguments.speculative_config.max_draft_len == 3
    assert report.effective["tensorrt"]["num_draft_tokens"] == 3
    assert report.effective["tensorrt"]["draft_model"] == str(drafter)


def extra_arguments_reach_the_engine(bench: Bench) -> None:
    report = bench.load({"extra_runtime_args": {"attn_backend": "FLASHINFER"}})
    assert bench.arguments.attn_backend == "FLASHINFER"
    assert report.effective["engine"]["attn_backend"] == "FLASHINFER"
    assert "tensorrt.extra_runtime_args.zebra: LLM has no such argument" in bench.refusal(
        {"extra_runtime_args": {"zebra": 1}}
    )


CHECKS: dict[str, Callable[[Bench], None]] = {
    **dict.fromkeys(
        ("engine_path", "engine_cache_dir", "force_rebuild", "builder_opt_level", "extra_build_args"),
        belongs_to_building,
    ),
    **dict.fromkeys(
        ("calibration.dataset", "calibration.split", "calibration.num_samples", "calibration.max_length"),
        belongs_to_quantizing,
    ),
    "quantization": quantization_is_that_of_the_checkpoint,
    "max_input_len": lengths_bound_requests,
    "max_output_len": lengths_bound_requests,
    "max_batch_size": reaches_the_engine("max_batch_size", 4, "max_batch_size"),
    "max_num_tokens": reaches_the_engine("max_num_tokens", 64, "max_num_tokens"),
    "tp_size": reaches_the_engine("tp_size", 2, "tensor_parallel_size"),
    "pp_size": reaches_the_engine("pp_size", 2, "pipeline_parallel_size"),
    "enable_chunked_context": reaches_the_engine("enable_chunked_context", True, "enable_chunked_prefill"),
    "kv_cache_type": reaches_the_engine("kv_cache_type", "fp8", "kv_cache_config.dtype"),
    "enable_kv_cache_reuse": reaches_the_engine("enable_kv_cache_reuse", True, "kv_cache_config.enable_block_reuse"),
    "gpu_memory_utilization": reaches_the_engine(
        "gpu_memory_utilization", 0.7, "kv_cache_config.free_gpu_memory_fraction"
    ),
    "draft_model": a_model_drafts,
    "num_draft_tokens": a_model_drafts,
    "extra_runtime_args": extra_arguments_reach_the_engine,
}


def test_every_declared_option_is_checked_here() -> None:
    assert set(CHECKS) == {key for key, _item, _section in walk(TensorRTConfig)}


@pytest.mark.parametrize("check", list(dict.fromkeys(CHECKS.values())), ids=lambda check: check.__name__)
def test_the_option_takes_effect_or_is_refused(check: Callable[[Bench], None], bench: Bench) -> None:
    check(bench)


def by_index(found: list[Completion]) -> dict[int, Completion]:
    return {item.index: item for item in found}


def test_requests_are_answered_alone_in_a_batch_and_in_traffic(bench: Bench) -> None:
    bench.load()
    requests = [TokenRequest(0, (10, 5), 4, 2), TokenRequest(1, (903,), 3), TokenRequest(2, (901,), 3)]

    class Queue:
        def __init__(self) -> None:
            self.completions: list[Completion] = []
            self._waiting = [tuple(requests[:1]), tuple(requests[1:]), ()]

        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            return self._waiting.pop(0)

        def complete(self, completion: Completion) -> None:
            self.completions.append(completion)

    queue = Queue()
    bench.engine.serve(queue)
    for found in (
        by_index(bench.engine.generate(requests, observe_tokens=False)),
        by_index(bench.engine.generate(requests, observe_tokens=True)),
        by_index(queue.completions),
    ):
        assert found[0].output_ids == (11, 12, 13, 14)
        assert found[1].output_ids == (904, 905, 906)
        assert found[2].error == "no memory for this request"
        assert all(item.started_ns <= item.finished_ns for item in found.values())
    assert [len(item.token_times_ns or ()) for item in sorted(queue.completions, key=lambda item: item.index)] == [
        4,
        3,
        0,
    ]


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


def test_text_goes_to_tokens_and_back(bench: Bench) -> None:
    bench.load()
    assert bench.engine.decode(bench.engine.encode("sea")) == "sea"


def test_a_tokenizer_of_another_model_is_told(bench: Bench) -> None:
    described = {"model_type": "of no kind that is known", "dtype": "float16"}
    bench.write("config.json", {**described, "vocab_size": ord("s") + 4})
    bench.load()
    assert bench.engine.encode("s") == [1, ord("s") + 3]
    bench.write("config.json", {**described, "text_config": {"vocab_size": ord("s") + 3}})
    bench.load()
    with pytest.raises(EngineError, match="the model knows ids below 118") as caught:
        bench.engine.encode("s")
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_a_silent_change_is_refused_and_the_engine_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.llmapi import KvCacheConfig

    init = KvCacheConfig.__init__

    def keep_blocks(self: Any, **given: Any) -> None:
        init(self, **{**given, "enable_block_reuse": True})

    monkeypatch.setattr(KvCacheConfig, "__init__", keep_blocks)
    assert "tensorrt.enable_kv_cache_reuse: False became True" in bench.refusal({})
    assert bench.engines[-1].is_shut_down


def test_another_experiment_is_set_up_without_a_reload(bench: Bench) -> None:
    bench.load()
    loads = len(bench.engines)
    bench.engine.configure(bench.experiment(ignore_eos=True))
    assert bench.engine.report.effective["ignore_eos"] is True
    assert len(bench.engines) == loads
    with pytest.raises(EngineError, match="another engine load"):
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


def test_a_gpu_that_is_not_there_is_told(bench: Bench) -> None:
    with pytest.raises(EngineError, match="gpus: GPU-cccc is not there") as caught:
        load(bench.experiment(gpus=["GPU-aaaa", "GPU-cccc"]), {}, lambda: ("GPU-aaaa",))
    assert (caught.value.kind, caught.value.is_permanent) == ("option", True)
    with pytest.raises(EngineError, match="needs a GPU"):
        load(bench.experiment(), {}, tuple)


def test_more_gpus_than_can_be_seen_are_refused_by_name(bench: Bench) -> None:
    with pytest.raises(EngineError, match="spread over 4 GPUs, and 2 can be seen") as caught:
        bench.load({"tp_size": 2, "extra_runtime_args": {"context_parallel_size": 2}})
    assert (caught.value.kind, caught.value.is_permanent) == ("option", True)
    assert bench.load({"extra_runtime_args": {"context_parallel_size": 2}}).gpu_uuids == GPUS


def test_what_is_left_to_the_engine_may_become_anything(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.llmapi import KvCacheConfig

    init = KvCacheConfig.__init__
    monkeypatch.setattr(
        KvCacheConfig, "__init__", lambda self, **given: init(self, **{**given, "dtype": "fp8"}), raising=True
    )
    assert bench.load({"kv_cache_type": "auto"}).effective["tensorrt"]["kv_cache_type"] == "fp8"
    assert "tensorrt.kv_cache_type: nvfp4 became fp8" in bench.refusal({"kv_cache_type": "nvfp4"})


def test_a_checkpoint_of_another_type_is_refused_before_it_is_loaded(bench: Bench) -> None:
    loads = len(bench.engines)
    assert "fp_precision: bfloat16" in bench.refusal({}, fp_precision="bfloat16")
    assert len(bench.engines) == loads


def test_too_little_memory_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import LLM

    def fail(self: Any, **_arguments: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LLM, "__init__", fail)
    with pytest.raises(EngineError) as caught:
        bench.load()
    assert (caught.value.kind, caught.value.is_permanent) == ("out_of_memory", True)


def test_a_model_that_is_not_there_is_told(bench: Bench) -> None:
    with pytest.raises(EngineError, match="there is no folder") as caught:
        bench.load(model="/nowhere/at/all")
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_without_the_package_the_remedy_is_told() -> None:
    with pytest.raises(EngineError, match="needs tensorrt_llm, which ") as caught:
        load(ExperimentConfig.from_dict({"model": "m", "backend": "tensorrt"}), {})
    assert "nvcr.io/nvidia/tensorrt-llm" in caught.value.hint
