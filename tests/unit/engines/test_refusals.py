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
EAGER, MISSPELT = ({"torch_compile_backend": name} for name in ("aot_eager", "aot_eagre"))
CACHE_SIZE = {"extra": {"kv_cache_memory_bytes": 1}}
SMALL_BUDGET = {"batching_strategy": "dynamic", "max_tokens_per_batch": 639, "batch_size": 4}


@pytest.mark.parametrize(
    ("facts", "section", "option", "reason"),
    [
        (PYTORCH, {"load_in_4bit": True}, "load_in_4bit", "CUDA"),
        (PYTORCH_BARE, {"load_in_8bit": True}, "load_in_8bit", "pip install bitsandbytes"),
        (PYTORCH, {"low_cpu_mem_usage": False}, "low_cpu_mem_usage", "always load without a second copy"),
        (PYTORCH_4, {"low_cpu_mem_usage": True}, "low_cpu_mem_usage", "needs accelerate"),
        (PYTORCH, {"max_memory": {"cpu": "1GiB"}}, "max_memory", "no GPU is in use"),
        (PYTORCH_BARE, {"max_memory": {"cpu": "1GiB"}}, "max_memory", "needs accelerate"),
        (PYTORCH_GPU, {"max_memory": {"0": "1GiB"}}, "max_memory", r"the GPU in use \(1\), got 0"),
        (PYTORCH, {"torch_compile": "reduce-overhead"}, "torch_compile", "CUDA graphs"),
        (PYTORCH_GPU, {"torch_compile": "max-autotune"}, "torch_compile", "cache_implementation: static"),
        (PYTORCH, {"torch_compile": "default", **MISSPELT}, "torch_compile_backend", "did you mean 'aot_eager'"),
        (PYTORCH, {"torch_compile": "max-autotune", **EAGER}, "torch_compile", "a mode of the inductor backend"),
        (PYTORCH, {"cache_implementation": "statc"}, "cache_implementation", "did you mean 'static'"),
        (PYTORCH, {"cache_implementation": "hybrid"}, "cache_implementation", "got hybrid"),
        (PYTORCH, {"cache_implementation": "static", "use_cache": False}, "cache_implementation", "has no effect"),
        (PYTORCH, {"cache_implementation": "offloaded"}, "cache_implementation", "where it already is"),
        (PYTORCH, SMALL_BUDGET, "max_tokens_per_batch", "640"),
        (PYTORCH, {"assisted_generation": {"model": "m"}, "batch_size": 2}, "assisted_generation", "batch_size 1"),
        (PYTORCH, {"assisted_generation": {"num_tokens": 3}, "beam_search": BEAMS}, "assisted_generation", "with beam"),
        (VLLM, {"swap_space": 4}, "swap_space", "no swap space"),
        (VLLM_OLD, {"attention": {"backend": "X"}}, "attention.backend", "no attention_config.backend"),
        (VLLM_OLD, {"speculative": {"method": "ngram"}}, "speculative.method", "no speculative_config.method"),
        (VLLM_CPU, {"cpu_offload_gb": 2}, "cpu_offload_gb", "already in CPU memory"),
        (VLLM_CPU, {"attention": {"backend": "FLASH_ATTN"}}, "attention.backend", "requires a GPU"),
        (VLLM_CPU, {"attention": {"flash_version": 3}}, "attention.flash_version", "requires a GPU"),
        (VLLM, {"disable_custom_all_reduce": True}, "disable_custom_all_reduce", "tensor_parallel_size 1"),
        (VLLM_CAPPED, {"gpu_memory_utilization": 0.8}, "gpu_memory_utilization", "VLLM_CPU_KVCACHE_SPACE sets"),
        (VLLM, {"gpu_memory_utilization": 0.8, **CACHE_SIZE}, "gpu_memory_utilization", "kv_cache_memory_bytes sets"),
        (TENSORRT, {"engine_path": "/engine"}, "engine_path", "builds no engines"),
        (TENSORRT, {"engine_cache_dir": "/cache"}, "engine_cache_dir", "builds no engines"),
        (TENSORRT, {"builder_opt_level": 3}, "builder_opt_level", "builds no engines"),
        (TENSORRT, {"force_rebuild": False}, "force_rebuild", "builds no engines"),
        (TENSORRT, {"extra_build_args": {"x": 1}}, "extra_build_args", "builds no engines"),
        (TENSORRT, CALIBRATED, "calibration", "when you create the checkpoint"),
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
    ("facts", "extra", "reason"),
    [
        (PYTORCH, {"zebra": 1}, "unknown argument"),
        (PYTORCH, {"supress_tokens": [1]}, "did you mean 'suppress_tokens'"),
        (PYTORCH, {"temperature": 1}, r"is set by decoder\.temperature"),
        (PYTORCH, {"max_new_tokens": 1}, "is set by max_output_tokens"),
        (PYTORCH, {"stop_strings": ["x"]}, "cannot be counted"),
        (PYTORCH, {"max_cache_len": 64}, "cache_implementation: static"),
        (PYTORCH, {"cache_config": {}}, "cache_implementation: quantized"),
        (PYTORCH, {"disable_compile": True}, "static"),
        (PYTORCH, {"assistant_confidence_threshold": 0.1}, r"assisted_generation\.model"),
        (PYTORCH, {"max_matching_ngram_size": 2}, r"assisted_generation\.num_tokens"),
        (VLLM, {"zebra": 1}, "unknown field"),
        (VLLM, {"stream_intervall": 1}, "did you mean 'stream_interval'"),
        (VLLM, {"swap_space": 1}, r"is set by vllm\.swap_space"),
        (VLLM, {"max_num_seqs": 1}, r"is set by vllm\.max_num_seqs"),
        (VLLM, {"seed": 1}, "is set by random_seed"),
        (VLLM, {"hf_token": "x"}, "the secret HF_TOKEN"),
        (VLLM, {"logprobs": 1}, r"is set by vllm\.logprobs"),
        (VLLM, {"runner": "pooling"}, "text generation"),
        (VLLM, {"disable_log_stats": True}, "times of requests"),
        (VLLM, {"data_parallel_size": 2}, "not yet tested with several copies"),
        (TENSORRT, {"zebra": 1}, "unknown argument"),
        (TENSORRT, {"atn_backend": 1}, "mean 'attn_backend'"),
        (TENSORRT, {"max_batch_size": 1}, "is set by"),
        (TENSORRT, {"backend": "tensorrt"}, "PyTorch flow"),
        (TENSORRT, {"quant_config": 1}, "already quantized"),
    ],
)
def test_an_extra_argument_is_refused_with_its_reason(facts: Facts, extra: dict[str, Any], reason: str) -> None:
    option = "extra_runtime_args" if facts is TENSORRT else "extra"
    with pytest.raises(OptionRefused, match=reason) as caught:
        check(facts, {option: extra})
    assert f".{option}.{next(iter(extra))}: " in caught.value.message


def test_an_extra_argument_cannot_replace_part_of_an_option() -> None:
    with pytest.raises(OptionRefused, match=r"extra\.speculative_config: conflicts with vllm\.speculative\.method"):
        check(VLLM, {"speculative": {"method": "ngram"}, "extra": {"speculative_config": {}}})
    with pytest.raises(OptionRefused, match=r"model_kwargs\.torch_dtype: is set by fp_precision"):
        check(TENSORRT, {"extra_runtime_args": {"model_kwargs": {"torch_dtype": "float32"}}})


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
        (PYTORCH, {"torch_compile": "default", **EAGER}),
        (PYTORCH_GPU, {"cache_implementation": "offloaded"}),
        (PYTORCH, {**SMALL_BUDGET, "max_tokens_per_batch": 640}),
        (PYTORCH, {"assisted_generation": {"model": "small", "num_tokens": 3}}),
        (PYTORCH, {"assisted_generation": {"num_tokens": 3}, "extra": {"max_matching_ngram_size": 2}}),
        (PYTORCH, {"cache_implementation": "static", "extra": {"max_cache_len": 64}}),
        (PYTORCH, {"extra": {"suppress_tokens": [1], "max_time": 9.0}}),
        (VLLM_CAPPED, {}),
        (VLLM_OLD, {"swap_space": 4}),
        (VLLM, {"cpu_offload_gb": 2}),
        (VLLM_CPU, {"cpu_offload_gb": 0}),
        (VLLM_CPU, {"attention": {"backend": "CPU_ATTN"}}),
        (VLLM, {"attention": {"backend": "FLASH_ATTN", "flash_version": 3}}),
        (VLLM, {"disable_custom_all_reduce": True, "tensor_parallel_size": 2}),
        (VLLM_CPU, {"gpu_memory_utilization": 0.8}),
        (dataclasses.replace(VLLM_CAPPED, device="cuda"), {"gpu_memory_utilization": 0.8}),
        (VLLM, CACHE_SIZE),
        (VLLM, {"extra": {"speculative_config": {"method": "ngram"}}}),
        (VLLM, {"speculative": {"model": "small", "num_tokens": 3}, "lora": {"enabled": True}}),
        (TENSORRT, {"enable_chunked_context": True, "kv_cache_type": "fp8", **DRAFT}),
    ],
)
def test_what_is_supported_is_not_refused(facts: Facts, section: dict[str, Any]) -> None:
    check(facts, section)


ADAPTED = {"model": {"name": "m", "adapter": "a"}}
SAMPLED = {"decoder": {"temperature": 0.7}}
PENALISED = {"decoder": {"preset": "deterministic", "repetition_penalty": 1.2}}
PLAIN = dataclasses.replace(TENSORRT, has_penalties=False)
OLD = dataclasses.replace(TENSORRT, sampling_arguments=TENSORRT.sampling_arguments - {"ignore_eos"})


@pytest.mark.parametrize(
    ("facts", "options", "reason", "good"),
    [
        (PYTORCH, ADAPTED, r"model\.adapter: needs peft \(pip install", (PYTORCH_GPU, ADAPTED)),
        (VLLM_CPU, {"gpus": [0]}, "gpus: this build only runs on the CPU", (VLLM, {"gpus": [0]})),
        (VLLM, {"gpus": []}, "but this build runs on cuda", (VLLM_CPU, {"gpus": []})),
        (TENSORRT, ADAPTED, r"model\.adapter: .*merge it into the checkpoint", (TENSORRT, {"random_seed": 5})),
        (TENSORRT, SAMPLED, "random_seed: the sampler has one", (TENSORRT, {**SAMPLED, "random_seed": None})),
        (PLAIN, PENALISED, r"decoder\.repetition_penalty: the sampler of this version", (TENSORRT, PENALISED)),
        (OLD, {}, r"decoder\.ignore_eos: SamplingParams has no ignore_eos", (TENSORRT, {})),
    ],
)
def test_options_outside_of_the_section_are_refused_too(
    facts: Facts, options: dict[str, Any], reason: str, good: tuple[Facts, dict[str, Any]]
) -> None:
    with pytest.raises(OptionRefused, match=reason):
        check(facts, {}, **options)
    check(good[0], {}, **good[1])


def test_everything_is_refused_at_once() -> None:
    with pytest.raises(OptionRefused, match=r"pytorch\.load_in_8bit: .*; pytorch\.extra\.zebra: "):
        check(PYTORCH, {"load_in_8bit": True, "extra": {"zebra": 1}})
