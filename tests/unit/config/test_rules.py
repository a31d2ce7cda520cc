"""What a person is warned about, with and without knowledge of the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lem.config import rules
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import dotted


@dataclass(frozen=True)
class Gpu:
    name: str = "NVIDIA H200"
    compute_capability: tuple[int, int] = (9, 0)
    memory_b: int = 141 * 10**9
    index: int = 0
    uuid: str = "GPU-0"


V100 = Gpu("Tesla V100", (7, 0), 16 * 10**9)
A100 = Gpu("NVIDIA A100", (8, 0), 80 * 10**9)
H200 = Gpu()


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def warnings(*gpus: Gpu, **options: Any) -> list[str]:
    known = gpus or None
    found = rules.warnings(experiment(**options), known)
    return [f"{dotted(item.path)} {item.reason.code}" for item in found if item.reason is not None]


def test_a_plain_experiment_has_no_findings():
    assert warnings() == []
    assert warnings(H200) == []
    for backend in ("vllm", "tensorrt"):
        assert warnings(H200, backend=backend) == []


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"decoder": {"do_sample": False, "temperature": 0.7, "top_p": 0.9}},
            "decoder.temperature greedy_ignores_several",
        ),
        ({"decoder": {"preset": "deterministic", "top_k": 10}}, "decoder.top_k greedy_ignores_one"),
        (
            {"traffic_simulation": {"enabled": True, "mode": "closed", "target_qps": 5}},
            "traffic_simulation.target_qps other_traffic_mode",
        ),
        (
            {"traffic_simulation": {"enabled": True, "mode": "closed", "seed": 5}},
            "traffic_simulation.seed other_traffic_mode",
        ),
        (
            {"traffic_simulation": {"enabled": True, "mode": "constant", "concurrency": 8}},
            "traffic_simulation.concurrency other_traffic_mode",
        ),
        ({"decoder": {"preset": "creative"}}, "decoder.top_p sampling_compounds"),
        ({"pytorch": {"cache_implementation": "static"}}, "pytorch.cache_implementation static_cache"),
        (
            {"pytorch": {"batching_strategy": "dynamic", "max_tokens_per_batch": 99}},
            "pytorch.batch_size dynamic_batch_of_one",
        ),
        ({"backend": "vllm", "vllm": {"gpu_memory_utilization": 0.96}}, "vllm.gpu_memory_utilization memory_tight"),
        ({"backend": "vllm", "vllm": {"enable_prefix_caching": True}}, "vllm.enable_prefix_caching cached_repeats"),
        (
            {"backend": "tensorrt", "tensorrt": {"enable_kv_cache_reuse": True}},
            "tensorrt.enable_kv_cache_reuse cached_repeats",
        ),
        (
            {
                "backend": "server",
                "server": {"engine": "vllm", "command": ["v", "{port}"], "options": {"enable_prefix_caching": True}},
            },
            "server cached_repeats",
        ),
        ({"backend": "vllm", "vllm": {"quantization": "awq"}}, "vllm.quantization needs_quantized_checkpoint"),
        (
            {"backend": "tensorrt", "tensorrt": {"quantization": "int4_gptq"}},
            "tensorrt.quantization needs_quantized_checkpoint",
        ),
        ({"backend": "vllm", "vllm": {"tensor_parallel_size": 2}}, "vllm needs_gpus"),
        ({"dataset": "alpacca"}, "dataset.name no_dataset_alias"),
        ({"baseline": {"duration_sec": 5}, "measurement": {"energy": "none"}}, "baseline.duration_sec unused_with"),
        (
            {"baseline": {"sample_interval_ms": 50}, "measurement": {"energy": "tdp_estimate"}},
            "baseline.sample_interval_ms unused_with",
        ),
        ({"measurement": {"external_unit": "kW"}}, "measurement.external_unit unused_with"),
        ({"warmup": {"convergence_detection": False, "cv_threshold": 0.1}}, "warmup.cv_threshold unused_with"),
        ({"prompts": {"type": "huggingface", "dataset": "a/b", "seed": 5}}, "prompts.seed unused_with"),
    ],
)
def test_what_a_person_should_know_is_warned_about(options: dict[str, Any], warning: str):
    assert warnings(**options) == [warning]


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": {"duration_sec": 5}, "measurement": {"energy": "rapl"}},
        {"baseline": {"enabled": False, "duration_sec": 5}, "measurement": {"energy": "none"}},
        {"measurement": {"external_csv": "meter.csv", "external_unit": "kW"}},
        {"warmup": {"cv_threshold": 0.1}},
        {"prompts": {"type": "huggingface", "dataset": "a/b", "shuffle": True, "seed": 5}},
    ],
)
def test_options_that_have_an_effect_or_are_switched_off_are_not_warned_about(options: dict[str, Any]) -> None:
    assert warnings(**options) == []


def test_a_checkpoint_named_as_quantized_is_not_warned_about():
    assert warnings(model="org/Llama-AWQ", backend="vllm", vllm={"quantization": "awq"}) == []


@pytest.mark.parametrize("name", ["0", "GPU-8c7a11ee", "GPU-8C7A"])
def test_a_gpu_is_known_by_index_and_by_uuid_also_shortened(name: str):
    old = Gpu("Tesla V100", (7, 0), 16 * 10**9, index=0, uuid="GPU-8c7a11ee")
    new = Gpu(index=1, uuid="GPU-90")
    options: dict[str, Any] = {"backend": "tensorrt"}
    assert len(warnings(old, new, gpus=[name], **options)) == 1
    assert warnings(old, new, gpus=["GPU-9"], **options) == []


@pytest.mark.parametrize(
    ("gpu", "options", "path"),
    [
        (V100, {"pytorch": {"attn_implementation": "flash_attention_2"}}, "pytorch.attn_implementation"),
        (V100, {"backend": "tensorrt"}, "backend"),
        (A100, {"backend": "vllm", "vllm": {"kv_cache_dtype": "fp8"}}, "vllm.kv_cache_dtype"),
        (A100, {"backend": "vllm", "vllm": {"quantization": "fp8"}}, "vllm.quantization"),
        (A100, {"backend": "tensorrt", "tensorrt": {"kv_cache_type": "fp8"}}, "tensorrt.kv_cache_type"),
        (V100, {"backend": "vllm", "vllm": {"attention": {"backend": "FLASH_ATTN"}}}, "vllm.attention"),
    ],
)
def test_capability_is_checked_when_the_gpu_is_known(gpu: Gpu, options: dict[str, Any], path: str) -> None:
    assert warnings(**options) == []
    assert warnings(gpu, **options) == [f"{path} needs_capability"]
    assert warnings(H200, **options) == []


def test_only_the_gpus_in_use_are_looked_at():
    old = Gpu("Tesla V100", (7, 0), index=1, uuid="GPU-1")
    options = {"pytorch": {"attn_implementation": "flash_attention_2"}}
    assert warnings(H200, old, **options) == []
    assert len(warnings(H200, old, gpus=[1], **options)) == 1
    assert len(warnings(H200, old, gpus=["GPU-1"], **options)) == 1
    assert warnings(old, gpus=[], **options) == []


def test_too_few_gpus_are_warned_about_when_known() -> None:
    found = warnings(H200, backend="vllm", vllm={"tensor_parallel_size": 2})
    assert found == ["vllm needs_gpus", "vllm host_has_fewer_gpus"]


@pytest.mark.parametrize(
    ("model", "options", "is_short"),
    [
        ("org/Model-7B", {}, False),
        ("org/Model-7B", {"fp_precision": "float32"}, True),
        ("org/Model-13b-chat", {}, True),
        ("org/Model-13b-chat", {"pytorch": {"load_in_4bit": True}}, False),
        ("org/Model-13b", {"backend": "vllm"}, True),
        ("org/Model-13b", {"backend": "vllm", "vllm": {"quantization": "compressed-tensors"}}, False),
        ("org/Model-30b", {"backend": "tensorrt", "tensorrt": {"quantization": "int8_sq"}}, True),
    ],
)
def test_a_model_that_does_not_fit_is_warned_about(model: str, options: dict[str, Any], is_short: bool) -> None:
    small = Gpu("RTX A4000", (8, 9), 16 * 10**9)
    assert warnings(small, model=model, **options) == ["model.name memory_short"] * is_short


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen2.5-0.5B", 0.5e9),
        ("pythia-160m", 160e6),
        ("gpt2", None),
        ("bert-base", None),
        ("7b-models/gpt2", None),
    ],
)
def test_parameters_by_name(name: str, parameters: float | None):
    assert rules.parameters_by_name(name) == parameters
