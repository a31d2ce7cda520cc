"""What vLLM cannot honour is refused before a model is loaded, with the option, the version and the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.vllm.options import OPTIONS, EngineFacts, check_options

NESTED = {
    "attention_config": frozenset({"backend", "flash_attn_version"}),
    "speculative_config": frozenset(places[0].rpartition(".")[2] for places in OPTIONS.values()),
}
FIELDS = frozenset(places[0] for places in OPTIONS.values()) - {"swap_space"} | {
    *NESTED,
    "compilation_config",
    "kv_cache_memory_bytes",
    "stream_interval",
    "num_gpu_blocks_override",
    "runner",
    "hf_token",
    "seed",
    "data_parallel_size",
    "disable_log_stats",
}
GPU = EngineFacts("0.32.0", "cuda", FIELDS, NESTED)
CPU = dataclasses.replace(GPU, device="cpu")
CAPPED = dataclasses.replace(CPU, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
OLD = dataclasses.replace(
    GPU, version="0.6.0", arguments=FIELDS - {"attention_config", "speculative_config"} | {"swap_space"}
)


def experiment(section: dict[str, Any], **options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "backend": "vllm", "vllm": section, **options})


@pytest.mark.parametrize(
    ("section", "facts", "option", "reason"),
    [
        ({"swap_space": 4}, GPU, "vllm.swap_space", "no swap space"),
        ({"attention": {"backend": "FLASHINFER"}}, OLD, "vllm.attention.backend", "no attention_config.backend"),
        ({"speculative": {"method": "ngram"}}, OLD, "vllm.speculative.method", "no speculative_config.method"),
        ({"cpu_offload_gb": 2}, CPU, "vllm.cpu_offload_gb", "in CPU memory already"),
        ({"attention": {"backend": "FLASH_ATTN"}}, CPU, "vllm.attention.backend", "needs a GPU"),
        ({"attention": {"flash_version": 3}}, CPU, "vllm.attention.flash_version", "needs a GPU"),
        ({"disable_custom_all_reduce": True}, GPU, "vllm.disable_custom_all_reduce", "tensor_parallel_size 1"),
        ({"gpu_memory_utilization": 0.8}, CAPPED, "vllm.gpu_memory_utilization", "VLLM_CPU_KVCACHE_SPACE decides"),
        (
            {"gpu_memory_utilization": 0.8, "extra": {"kv_cache_memory_bytes": 1}},
            GPU,
            "vllm.gpu_memory_utilization",
            "extra.kv_cache_memory_bytes decides",
        ),
        ({"extra": {"zebra": 1}}, GPU, "vllm.extra.zebra", "no such field"),
        ({"extra": {"stream_intervall": 1}}, GPU, "vllm.extra.stream_intervall", "did you mean 'stream_interval'"),
        ({"extra": {"swap_space": 1}}, GPU, "vllm.extra.swap_space", "is set by vllm.swap_space"),
        ({"extra": {"max_num_seqs": 1}}, GPU, "vllm.extra.max_num_seqs", "is set by vllm.max_num_seqs"),
        ({"extra": {"seed": 1}}, GPU, "vllm.extra.seed", "is set by random_seed"),
        ({"extra": {"hf_token": "x"}}, GPU, "vllm.extra.hf_token", "the secret HF_TOKEN"),
        ({"extra": {"logprobs": 1}}, GPU, "vllm.extra.logprobs", "is set by vllm.logprobs"),
        ({"extra": {"runner": "pooling"}}, GPU, "vllm.extra.runner", "generates tokens"),
        ({"extra": {"disable_log_stats": True}}, GPU, "vllm.extra.disable_log_stats", "times of requests"),
        ({"extra": {"data_parallel_size": 2}}, GPU, "vllm.extra.data_parallel_size", "not yet run with lem"),
        (
            {"speculative": {"method": "ngram"}, "extra": {"speculative_config": {}}},
            GPU,
            "vllm.extra.speculative_config",
            r"beside vllm\.speculative\.method",
        ),
    ],
)
def test_an_option_is_refused_with_version_and_reason(
    section: dict[str, Any], facts: EngineFacts, option: str, reason: str
) -> None:
    with pytest.raises(OptionRefused, match=reason) as caught:
        check_options(experiment(section), facts)
    assert f"{option}: " in caught.value.message
    assert f"vLLM {facts.version} on {facts.device}" in caught.value.message
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("section", "facts"),
    [
        ({}, GPU),
        ({}, CPU),
        ({}, CAPPED),
        ({"swap_space": 4}, OLD),
        ({"cpu_offload_gb": 2}, GPU),
        ({"cpu_offload_gb": 0}, CPU),
        ({"attention": {"backend": "CPU_ATTN"}}, CPU),
        ({"attention": {"backend": "FLASH_ATTN", "flash_version": 3}}, GPU),
        ({"disable_custom_all_reduce": True, "tensor_parallel_size": 2}, GPU),
        ({"gpu_memory_utilization": 0.8}, CPU),
        ({"gpu_memory_utilization": 0.8}, dataclasses.replace(CAPPED, device="cuda")),
        ({"extra": {"kv_cache_memory_bytes": 1}}, GPU),
        ({"extra": {"speculative_config": {"method": "ngram"}}}, GPU),
        ({"speculative": {"model": "small", "num_tokens": 3}, "lora": {"enabled": True}}, GPU),
    ],
)
def test_what_can_be_honoured_is_not_refused(section: dict[str, Any], facts: EngineFacts) -> None:
    check_options(experiment(section), facts)


def test_a_device_that_the_build_does_not_run_on_is_refused() -> None:
    with pytest.raises(OptionRefused, match="gpus: this build runs on the CPU alone"):
        check_options(experiment({}, gpus=[0]), CPU)
    with pytest.raises(OptionRefused, match="gpus: this build runs on cuda"):
        check_options(experiment({}, gpus=[]), GPU)
    check_options(experiment({}, gpus=[]), CPU)
    check_options(experiment({}, gpus=[0]), GPU)


def test_everything_is_refused_at_once() -> None:
    with pytest.raises(OptionRefused) as caught:
        check_options(experiment({"swap_space": 4, "extra": {"zebra": 1}}), GPU)
    assert "vllm.swap_space" in caught.value.message
    assert "vllm.extra.zebra" in caught.value.message
