"""What an engine does not support is refused before a model is loaded, with the option, the version and the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.pytorch import options as pytorch
from lem.engines.tensorrt import options as tensorrt
from lem.engines.vllm import options as vllm

PACKAGES = {"transformers": "5.23.0", "torch": "2.13.0+cpu"}
ALL_PACKAGES = {**PACKAGES, **dict.fromkeys(("accelerate", "bitsandbytes", "peft"), "1.0")}
GENERATE = (
    *("max_new_tokens", "stop_strings", "suppress_tokens", "max_time", "max_cache_len", "cache_config", "temperature"),
    *("disable_compile", "max_matching_ngram_size", "assistant_confidence_threshold"),
)
PYTORCH = pytorch.EngineFacts(PACKAGES, "cpu", None, ("inductor", "aot_eager"), GENERATE)
PYTORCH_GPU = pytorch.EngineFacts(ALL_PACKAGES, "cuda", 1, ("inductor", "aot_eager"), GENERATE)
PYTORCH_BARE = pytorch.EngineFacts(PACKAGES, "cuda", 0)
PYTORCH_4 = pytorch.EngineFacts({**PACKAGES, "transformers": "4.57.0"}, "cpu")

NESTED = {
    "attention_config": frozenset({"backend", "flash_attn_version"}),
    "speculative_config": frozenset(places[0].rpartition(".")[2] for places in vllm.OPTIONS.values()),
}
FIELDS = frozenset(places[0] for places in vllm.OPTIONS.values()) - {"swap_space"} | {
    *NESTED,
    *("compilation_config", "kv_cache_memory_bytes", "stream_interval", "num_gpu_blocks_override", "runner"),
    *("hf_token", "seed", "data_parallel_size", "disable_log_stats"),
}
VLLM = vllm.EngineFacts("0.32.0", FIELDS, NESTED, "cuda")
VLLM_CPU = dataclasses.replace(VLLM, device="cpu")
VLLM_CAPPED = dataclasses.replace(VLLM_CPU, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
VLLM_OLD = dataclasses.replace(
    VLLM, version="0.6.0", arguments=FIELDS - {"attention_config", "speculative_config"} | {"swap_space"}
)

TENSORRT = tensorrt.EngineFacts(
    version="1.3.0",
    arguments=frozenset(
        {
            *("max_batch_size", "max_num_tokens", "tensor_parallel_size", "pipeline_parallel_size", "attn_backend"),
            *("enable_chunked_prefill", "stream_interval", "backend", "max_input_len", "model_kwargs"),
            *("return_perf_metrics", "kv_cache_config", "speculative_config"),
        }
    ),
    nested={
        "kv_cache_config": frozenset({"free_gpu_memory_fraction", "enable_block_reuse", "dtype"}),
        "speculative_config": frozenset({"max_draft_len", "speculative_model"}),
    },
    sampling_arguments=frozenset(
        {
            *("max_tokens", "ignore_eos", "detokenize", "return_perf_metrics", "temperature", "top_k", "top_p"),
            "repetition_penalty",
        }
    ),
    has_penalties=True,
)

Facts = pytorch.EngineFacts | vllm.EngineFacts | tensorrt.EngineFacts


def without(argument: str) -> tensorrt.EngineFacts:
    """A TensorRT-LLM in which an argument is missing, wherever it is."""
    nested = {name: fields - {argument} for name, fields in TENSORRT.nested.items()}
    return dataclasses.replace(TENSORRT, arguments=TENSORRT.arguments - {argument}, nested=nested)


def check(facts: Facts, section: dict[str, Any], **options: Any) -> None:
    backend = type(facts).__module__.split(".")[2]
    decoder = {"decoder": {"preset": "deterministic"}} if backend == "tensorrt" else {}
    config = ExperimentConfig.from_dict({"model": "m", "backend": backend, backend: section, **decoder, **options})
    {"pytorch": pytorch, "vllm": vllm, "tensorrt": tensorrt}[backend].check(config, facts)


BEAMS = {"enabled": True, "num_beams": 2}
DRAFT = {"draft_model": "small", "num_draft_tokens": 3}
CALIBRATED = {"quantization": "fp8", "calibration": {"num_samples": 8}}


@pytest.mark.parametrize(
    ("facts", "section", "option", "reason"),
    [
        (PYTORCH, {"load_in_4bit": True}, "load_in_4bit", "CUDA"),
        (PYTORCH, {"load_in_8bit": True}, "load_in_8bit", "CUDA"),
        (PYTORCH_BARE, {"load_in_8bit": True}, "load_in_8bit", "pip install bitsandbytes"),
        (PYTORCH, {"low_cpu_mem_usage": False}, "low_cpu_mem_usage", "always load without a second copy"),
        (PYTORCH_4, {"low_cpu_mem_usage": True}, "low_cpu_mem_usage", "needs accelerate"),
        (PYTORCH, {"max_memory": {"cpu": "1GiB"}}, "max_memory", "no GPU is in use"),
        (PYTORCH_BARE, {"max_memory": {"cpu": "1GiB"}}, "max_memory", "needs accelerate"),
        (PYTORCH_GPU, {"max_memory": {"0": "1GiB"}}, "max_memory", r"the GPU in use \(1\), got 0"),
        (PYTORCH, {"torch_compile": "reduce-overhead"}, "torch_compile", "CUDA graphs"),
        (PYTORCH_GPU, {"torch_compile": "max-autotune"}, "torch_compile", "cache_implementation: static"),
        (
            PYTORCH,
            {"torch_compile": "default", "torch_compile_backend": "aot_eagre"},
            "torch_compile_backend",
            "did you mean 'aot_eager'",
        ),
        (
            PYTORCH,
            {"torch_compile": "max-autotune", "torch_compile_backend": "aot_eager"},
            "torch_compile",
            "a mode of the inductor backend",
        ),
        (PYTORCH, {"cache_implementation": "statc"}, "cache_implementation", "did you mean 'static'"),
        (PYTORCH, {"cache_implementation": "hybrid"}, "cache_implementation", "got hybrid"),
        (PYTORCH, {"cache_implementation": "static", "use_cache": False}, "cache_implementation", "has no effect"),
        (PYTORCH, {"cache_implementation": "offloaded"}, "cache_implementation", "where it already is"),
        (
            PYTORCH,
            {"batching_strategy": "dynamic", "max_tokens_per_batch": 639, "batch_size": 4},
            "max_tokens_per_batch",
            "640",
        ),
        (
            PYTORCH,
            {"assisted_generation": {"model": "small"}, "batch_size": 2},
            "assisted_generation",
            "requires batch_size 1",
        ),
        (
            PYTORCH,
            {"assisted_generation": {"num_tokens": 3}, "beam_search": BEAMS},
            "assisted_generation",
            "beam_search",
        ),
        (PYTORCH, {"extra": {"zebra": 1}}, "extra.zebra", "unknown argument"),
        (PYTORCH, {"extra": {"supress_tokens": [1]}}, "extra.supress_tokens", "did you mean 'suppress_tokens'"),
        (PYTORCH, {"extra": {"temperature": 1}}, "extra.temperature", "is set by decoder.temperature"),
        (PYTORCH, {"extra": {"max_new_tokens": 1}}, "extra.max_new_tokens", "is set by max_output_tokens"),
        (PYTORCH, {"extra": {"stop_strings": ["x"]}}, "extra.stop_strings", "cannot be counted"),
        (PYTORCH, {"extra": {"max_cache_len": 64}}, "extra.max_cache_len", "cache_implementation: static"),
        (PYTORCH, {"extra": {"cache_config": {}}}, "extra.cache_config", "cache_implementation: quantized"),
        (PYTORCH, {"extra": {"disable_compile": True}}, "extra.disable_compile", "static"),
        (
            PYTORCH,
            {"extra": {"assistant_confidence_threshold": 0.1}},
            "extra.assistant_confidence_threshold",
            "assisted_generation.model",
        ),
        (
            PYTORCH,
            {"extra": {"max_matching_ngram_size": 2}},
            "extra.max_matching_ngram_size",
            "assisted_generation.num_tokens",
        ),
        (VLLM, {"swap_space": 4}, "swap_space", "no swap space"),
        (VLLM_OLD, {"attention": {"backend": "X"}}, "attention.backend", "no attention_config.backend"),
        (VLLM_OLD, {"speculative": {"method": "ngram"}}, "speculative.method", "no speculative_config.method"),
        (VLLM_CPU, {"cpu_offload_gb": 2}, "cpu_offload_gb", "already in CPU memory"),
        (VLLM_CPU, {"attention": {"backend": "FLASH_ATTN"}}, "attention.backend", "requires a GPU"),
        (VLLM_CPU, {"attention": {"flash_version": 3}}, "attention.flash_version", "requires a GPU"),
        (VLLM, {"disable_custom_all_reduce": True}, "disable_custom_all_reduce", "tensor_parallel_size 1"),
        (VLLM_CAPPED, {"gpu_memory_utilization": 0.8}, "gpu_memory_utilization", "VLLM_CPU_KVCACHE_SPACE sets"),
        (
            VLLM,
            {"gpu_memory_utilization": 0.8, "extra": {"kv_cache_memory_bytes": 1}},
            "gpu_memory_utilization",
            "extra.kv_cache_memory_bytes sets",
        ),
        (VLLM, {"extra": {"zebra": 1}}, "extra.zebra", "unknown field"),
        (VLLM, {"extra": {"stream_intervall": 1}}, "extra.stream_intervall", "did you mean 'stream_interval'"),
        (VLLM, {"extra": {"swap_space": 1}}, "extra.swap_space", "is set by vllm.swap_space"),
        (VLLM, {"extra": {"max_num_seqs": 1}}, "extra.max_num_seqs", "is set by vllm.max_num_seqs"),
        (VLLM, {"extra": {"seed": 1}}, "extra.seed", "is set by random_seed"),
        (VLLM, {"extra": {"hf_token": "x"}}, "extra.hf_token", "the secret HF_TOKEN"),
        (VLLM, {"extra": {"logprobs": 1}}, "extra.logprobs", "is set by vllm.logprobs"),
        (VLLM, {"extra": {"runner": "pooling"}}, "extra.runner", "text generation"),
        (VLLM, {"extra": {"disable_log_stats": True}}, "extra.disable_log_stats", "times of requests"),
        (VLLM, {"extra": {"data_parallel_size": 2}}, "extra.data_parallel_size", "not yet tested with several copies"),
        (
            VLLM,
            {"speculative": {"method": "ngram"}, "extra": {"speculative_config": {}}},
            "extra.speculative_config",
            r"conflicts with vllm\.speculative\.method",
        ),
        (TENSORRT, {"engine_path": "/engine"}, "engine_path", "builds no engines"),
        (TENSORRT, {"engine_cache_dir": "/cache"}, "engine_cache_dir", "builds no engines"),
        (TENSORRT, {"builder_opt_level": 3}, "builder_opt_level", "builds no engines"),
        (TENSORRT, {"force_rebuild": False}, "force_rebuild", "builds no engines"),
        (TENSORRT, {"extra_build_args": {"x": 1}}, "extra_build_args", "builds no engines"),
        (TENSORRT, CALIBRATED, "calibration", "when you create the checkpoint"),
        (TENSORRT, {"extra_runtime_args": {"zebra": 1}}, "extra_runtime_args.zebra", "unknown argument"),
        (TENSORRT, {"extra_runtime_args": {"atn_backend": 1}}, "extra_runtime_args.atn_backend", "mean 'attn_backend'"),
        (TENSORRT, {"extra_runtime_args": {"max_batch_size": 1}}, "extra_runtime_args.max_batch_size", "is set by"),
        (TENSORRT, {"extra_runtime_args": {"backend": "tensorrt"}}, "extra_runtime_args.backend", "PyTorch flow"),
        (TENSORRT, {"extra_runtime_args": {"quant_config": 1}}, "extra_runtime_args.quant_config", "already quantized"),
        (
            TENSORRT,
            {"extra_runtime_args": {"model_kwargs": {"torch_dtype": "float32"}}},
            "extra_runtime_args.model_kwargs.torch_dtype",
            "is set by fp_precision",
        ),
        (without("enable_chunked_prefill"), {"enable_chunked_context": True}, "enable_chunked_context", "LLM has no"),
        (without("dtype"), {"kv_cache_type": "fp8"}, "kv_cache_type", "KvCacheConfig has no dtype"),
        (without("speculative_model"), DRAFT, "draft_model", "no argument for a model"),
    ],
)
def test_an_option_is_refused_with_version_and_reason(
    facts: Facts, section: dict[str, Any], option: str, reason: str
) -> None:
    with pytest.raises(OptionRefused, match=reason) as caught:
        check(facts, section)
    assert f".{option}: " in caught.value.message
    assert str(facts) in caught.value.message
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("facts", "section"),
    [
        (PYTORCH, {}),
        (PYTORCH_GPU, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (PYTORCH, {"low_cpu_mem_usage": True}),
        (PYTORCH_4, {"low_cpu_mem_usage": False}),
        (PYTORCH_GPU, {"max_memory": {"1": "1GiB", "cpu": "1GiB"}}),
        (PYTORCH_GPU, {"torch_compile": "reduce-overhead", "cache_implementation": "static"}),
        (PYTORCH, {"torch_compile": "max-autotune"}),
        (PYTORCH, {"torch_compile": "default", "torch_compile_backend": "aot_eager"}),
        (PYTORCH_GPU, {"cache_implementation": "offloaded"}),
        (PYTORCH, {"batching_strategy": "dynamic", "max_tokens_per_batch": 640, "batch_size": 4}),
        (PYTORCH, {"assisted_generation": {"model": "small", "num_tokens": 3}}),
        (PYTORCH, {"assisted_generation": {"num_tokens": 3}, "extra": {"max_matching_ngram_size": 2}}),
        (PYTORCH, {"cache_implementation": "static", "extra": {"max_cache_len": 64}}),
        (PYTORCH, {"extra": {"suppress_tokens": [1], "max_time": 9.0}}),
        (VLLM, {}),
        (VLLM_CAPPED, {}),
        (VLLM_OLD, {"swap_space": 4}),
        (VLLM, {"cpu_offload_gb": 2}),
        (VLLM_CPU, {"cpu_offload_gb": 0}),
        (VLLM_CPU, {"attention": {"backend": "CPU_ATTN"}}),
        (VLLM, {"attention": {"backend": "FLASH_ATTN", "flash_version": 3}}),
        (VLLM, {"disable_custom_all_reduce": True, "tensor_parallel_size": 2}),
        (VLLM_CPU, {"gpu_memory_utilization": 0.8}),
        (dataclasses.replace(VLLM_CAPPED, device="cuda"), {"gpu_memory_utilization": 0.8}),
        (VLLM, {"extra": {"kv_cache_memory_bytes": 1}}),
        (VLLM, {"extra": {"speculative_config": {"method": "ngram"}}}),
        (VLLM, {"speculative": {"model": "small", "num_tokens": 3}, "lora": {"enabled": True}}),
        (TENSORRT, {"enable_chunked_context": True, "kv_cache_type": "fp8", **DRAFT}),
    ],
)
def test_what_is_supported_is_not_refused(facts: Facts, section: dict[str, Any]) -> None:
    check(facts, section)


@pytest.mark.parametrize(
    ("facts", "other", "options", "reason"),
    [
        (PYTORCH, PYTORCH_GPU, {"model": {"name": "m", "adapter": "a"}}, r"model\.adapter: needs peft \(pip install"),
        (VLLM_CPU, VLLM, {"gpus": [0]}, "gpus: this build only runs on the CPU"),
        (VLLM, VLLM_CPU, {"gpus": []}, "but this build runs on cuda"),
        (TENSORRT, None, {"model": {"name": "m", "adapter": "a"}}, r"model\.adapter: .*merge it into the checkpoint"),
        (TENSORRT, None, {"decoder": {"temperature": 0.7}}, "random_seed: the sampler has one generator for all"),
        (
            dataclasses.replace(TENSORRT, has_penalties=False),
            TENSORRT,
            {"decoder": {"preset": "deterministic", "repetition_penalty": 1.2}},
            r"decoder\.repetition_penalty: the sampler of this version",
        ),
        (
            dataclasses.replace(TENSORRT, sampling_arguments=TENSORRT.sampling_arguments - {"ignore_eos"}),
            TENSORRT,
            {},
            r"decoder\.ignore_eos: SamplingParams has no ignore_eos",
        ),
    ],
)
def test_options_outside_of_the_section_are_refused_too(
    facts: Facts, other: Facts | None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionRefused, match=reason):
        check(facts, {}, **options)
    if other is not None:
        check(other, {}, **options)


@pytest.mark.parametrize(
    ("facts", "section", "options"),
    [
        (PYTORCH, {"load_in_8bit": True, "extra": {"zebra": 1}}, ("pytorch.load_in_8bit", "pytorch.extra.zebra")),
        (VLLM, {"swap_space": 4, "extra": {"zebra": 1}}, ("vllm.swap_space", "vllm.extra.zebra")),
    ],
)
def test_everything_is_refused_at_once(facts: Facts, section: dict[str, Any], options: tuple[str, ...]) -> None:
    with pytest.raises(OptionRefused) as caught:
        check(facts, section)
    assert all(option in caught.value.message for option in options)


def test_a_seed_does_no_harm_without_sampling_and_none_is_needed() -> None:
    check(TENSORRT, {}, random_seed=5)
    check(TENSORRT, {}, decoder={"temperature": 0.7}, random_seed=None)
