"""What TensorRT-LLM cannot honour is refused before a model is loaded, with the option, the version and the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.tensorrt.options import (
    EngineFacts,
    check_options,
    engine_arguments,
    gpus_needed,
    sampling_settings,
)

GREEDY = {"decoder": {"preset": "deterministic"}}
FACTS = EngineFacts(
    version="1.3.0",
    arguments=frozenset(
        {
            "max_batch_size",
            "max_num_tokens",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "enable_chunked_prefill",
            "attn_backend",
            "stream_interval",
            "backend",
            "max_input_len",
            "model_kwargs",
            "return_perf_metrics",
        }
    ),
    nested={
        "kv_cache_config": frozenset({"free_gpu_memory_fraction", "enable_block_reuse", "dtype"}),
        "speculative_config": frozenset({"max_draft_len", "speculative_model"}),
    },
    sampling_arguments=frozenset(
        {
            "max_tokens",
            "ignore_eos",
            "detokenize",
            "return_perf_metrics",
            "temperature",
            "top_k",
            "top_p",
            "repetition_penalty",
        }
    ),
    has_penalties=True,
)


def experiment(section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
    given = {"model": "m", "backend": "tensorrt", "tensorrt": section or {}, **GREEDY, **options}
    return ExperimentConfig.from_dict(given)


@pytest.mark.parametrize(
    ("section", "option", "reason"),
    [
        ({"engine_path": "/engine"}, "tensorrt.engine_path", "builds none"),
        ({"engine_cache_dir": "/cache"}, "tensorrt.engine_cache_dir", "builds none"),
        ({"force_rebuild": True}, "tensorrt.force_rebuild", "builds none"),
        ({"force_rebuild": False}, "tensorrt.force_rebuild", "builds none"),
        ({"builder_opt_level": 3}, "tensorrt.builder_opt_level", "builds none"),
        ({"extra_build_args": {"x": 1}}, "tensorrt.extra_build_args", "builds none"),
        (
            {"quantization": "fp8", "calibration": {"num_samples": 8}},
            "tensorrt.calibration",
            "when the checkpoint is made",
        ),
        ({"extra_runtime_args": {"zebra": 1}}, "tensorrt.extra_runtime_args.zebra", "no such argument"),
        ({"extra_runtime_args": {"atn_backend": 1}}, "tensorrt.extra_runtime_args.atn_backend", "mean 'attn_backend'"),
        (
            {"extra_runtime_args": {"max_batch_size": 1}},
            "tensorrt.extra_runtime_args.max_batch_size",
            "is set by tensorrt.max_batch_size",
        ),
        ({"extra_runtime_args": {"backend": "tensorrt"}}, "tensorrt.extra_runtime_args.backend", "PyTorch flow"),
        ({"extra_runtime_args": {"quant_config": 1}}, "tensorrt.extra_runtime_args.quant_config", "quantized already"),
        (
            {"extra_runtime_args": {"model_kwargs": {"torch_dtype": "float32"}}},
            "tensorrt.extra_runtime_args.model_kwargs.torch_dtype",
            "is set by fp_precision",
        ),
    ],
)
def test_an_option_is_refused_with_version_and_reason(section: dict[str, Any], option: str, reason: str) -> None:
    with pytest.raises(OptionRefused, match=reason) as caught:
        check_options(experiment(section), FACTS)
    assert f"{option}: " in caught.value.message
    assert "TensorRT-LLM 1.3.0" in caught.value.message
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("section", "missing", "reason"),
    [
        ({"enable_chunked_context": True}, "enable_chunked_prefill", "LLM has no enable_chunked_prefill"),
        ({"kv_cache_type": "fp8"}, "dtype", "KvCacheConfig has no dtype"),
        ({"draft_model": "small", "num_draft_tokens": 3}, "speculative_model", "no argument for a model"),
    ],
)
def test_an_argument_that_is_missing_in_this_version_is_refused(
    section: dict[str, Any], missing: str, reason: str
) -> None:
    nested = {name: fields - {missing} for name, fields in FACTS.nested.items()}
    facts = dataclasses.replace(FACTS, arguments=FACTS.arguments - {missing}, nested=nested)
    check_options(experiment(section), FACTS)
    with pytest.raises(OptionRefused, match=reason):
        check_options(experiment(section), facts)


def test_seeds_of_requests_are_refused_since_the_sampler_has_one_generator() -> None:
    decoder = {"temperature": 0.7}
    with pytest.raises(OptionRefused, match="random_seed: its sampler draws for all requests of a batch from one"):
        check_options(experiment(decoder=decoder), FACTS)
    check_options(experiment(decoder=decoder, random_seed=None), FACTS)


def test_an_adapter_is_refused_since_no_request_would_use_it() -> None:
    with pytest.raises(OptionRefused, match=r"model\.adapter: .*merge it into the checkpoint"):
        check_options(experiment(model={"name": "m", "adapter": "a"}), FACTS)


def test_penalties_need_a_sampler_that_knows_them() -> None:
    config = experiment(decoder={"preset": "deterministic", "repetition_penalty": 1.2})
    check_options(config, FACTS)
    with pytest.raises(OptionRefused, match=r"decoder\.repetition_penalty: the sampler of this version"):
        check_options(config, dataclasses.replace(FACTS, has_penalties=False))


def test_options_become_documented_arguments() -> None:
    section = {
        "max_batch_size": 4,
        "max_num_tokens": 64,
        "tp_size": 2,
        "pp_size": 2,
        "enable_chunked_context": True,
        "extra_runtime_args": {"attn_backend": "FLASHINFER"},
    }
    made = engine_arguments(experiment(section, max_input_tokens=10, max_output_tokens=5), FACTS, "/m")
    assert made == {
        "model": "/m",
        "dtype": "float16",
        "trust_remote_code": False,
        "max_input_len": 10,
        "max_seq_len": 15,
        "return_perf_metrics": True,
        "max_batch_size": 4,
        "max_num_tokens": 64,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "enable_chunked_prefill": True,
        "attn_backend": "FLASHINFER",
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False},
    }


def test_what_lem_can_do_without_is_left_out_where_it_is_unknown() -> None:
    facts = dataclasses.replace(FACTS, arguments=FACTS.arguments - {"max_input_len", "return_perf_metrics"})
    made = engine_arguments(experiment(), facts, "/m")
    assert set(made) == {"model", "dtype", "trust_remote_code", "max_seq_len", "max_batch_size", "kv_cache_config"}


def test_every_kind_of_parallelism_takes_gpus() -> None:
    assert gpus_needed(experiment()) == 1
    assert gpus_needed(experiment({"tp_size": 2, "pp_size": 3})) == 6
    assert gpus_needed(experiment({"tp_size": 2, "extra_runtime_args": {"context_parallel_size": 2}})) == 4


def test_prompts_are_not_kept_unless_that_is_asked_for() -> None:
    def cache(section: dict[str, Any]) -> Any:
        return engine_arguments(experiment(section), FACTS, "/m")["kv_cache_config"]

    assert cache({}) == {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False}
    asked = cache({"enable_kv_cache_reuse": True, "kv_cache_type": "fp8"})
    assert asked == {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": True, "dtype": "fp8"}


def test_greedy_decoding_takes_the_one_likeliest_token() -> None:
    assert sampling_settings(experiment())["top_k"] == 1
    assert "temperature" not in sampling_settings(experiment())
    sampled = sampling_settings(experiment(decoder={"temperature": 0.7, "top_k": 0, "top_p": 0.9}, random_seed=None))
    assert {name: sampled[name] for name in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
    }
