"""What cannot be honoured is refused before a model is loaded, with the option, the versions and the reason."""

from __future__ import annotations

from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.pytorch.options import EngineFacts, check_options

ARGUMENTS = (
    "max_new_tokens",
    "stop_strings",
    "suppress_tokens",
    "max_time",
    "max_cache_len",
    "cache_config",
    "disable_compile",
    "max_matching_ngram_size",
    "assistant_confidence_threshold",
    "temperature",
)
PACKAGES = {"transformers": "5.23.0", "torch": "2.13.0+cpu"}
ALL_PACKAGES = {**PACKAGES, **dict.fromkeys(("accelerate", "bitsandbytes", "peft"), "1.0")}
CPU = EngineFacts(PACKAGES, "cpu", compile_backends=("inductor", "aot_eager"), generate_arguments=ARGUMENTS)
GPU = EngineFacts(ALL_PACKAGES, "cuda", 1, ("inductor", "aot_eager"), ARGUMENTS)


def experiment(section: dict[str, Any], **options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "pytorch": section, **options})


@pytest.mark.parametrize(
    ("section", "facts", "option", "reason"),
    [
        ({"load_in_4bit": True}, CPU, "pytorch.load_in_4bit", "CUDA"),
        ({"load_in_8bit": True}, CPU, "pytorch.load_in_8bit", "CUDA"),
        ({"load_in_8bit": True}, EngineFacts(PACKAGES, "cuda", 0), "pytorch.load_in_8bit", "pip install bitsandbytes"),
        ({"low_cpu_mem_usage": False}, CPU, "pytorch.low_cpu_mem_usage", "always load without a second copy"),
        ({"max_memory": {"cpu": "1GiB"}}, CPU, "pytorch.max_memory", "no GPU is in use"),
        ({"max_memory": {"cpu": "1GiB"}}, EngineFacts(PACKAGES, "cuda", 0), "pytorch.max_memory", "needs accelerate"),
        ({"max_memory": {"0": "1GiB"}}, GPU, "pytorch.max_memory", r"the GPU in use \(1\), got 0"),
        ({"torch_compile": "reduce-overhead"}, CPU, "pytorch.torch_compile", "CUDA graphs"),
        ({"torch_compile": "max-autotune"}, GPU, "pytorch.torch_compile", "cache_implementation: static"),
        (
            {"torch_compile": "default", "torch_compile_backend": "aot_eagre"},
            CPU,
            "pytorch.torch_compile_backend",
            "did you mean 'aot_eager'",
        ),
        (
            {"torch_compile": "max-autotune", "torch_compile_backend": "aot_eager"},
            CPU,
            "pytorch.torch_compile",
            "a mode of the inductor backend",
        ),
        ({"cache_implementation": "statc"}, CPU, "pytorch.cache_implementation", "did you mean 'static'"),
        ({"cache_implementation": "hybrid"}, CPU, "pytorch.cache_implementation", "got hybrid"),
        ({"cache_implementation": "static", "use_cache": False}, CPU, "pytorch.cache_implementation", "does nothing"),
        ({"cache_implementation": "offloaded"}, CPU, "pytorch.cache_implementation", "where it is already"),
        (
            {"batching_strategy": "dynamic", "max_tokens_per_batch": 639, "batch_size": 4},
            CPU,
            "pytorch.max_tokens_per_batch",
            "640",
        ),
        (
            {"assisted_generation": {"model": "small"}, "batch_size": 2},
            CPU,
            "pytorch.assisted_generation",
            "one request at a time",
        ),
        (
            {"assisted_generation": {"num_tokens": 3}, "beam_search": {"enabled": True, "num_beams": 2}},
            CPU,
            "pytorch.assisted_generation",
            "beam_search",
        ),
        ({"extra": {"zebra": 1}}, CPU, "pytorch.extra.zebra", "no such argument"),
        ({"extra": {"supress_tokens": [1]}}, CPU, "pytorch.extra.supress_tokens", "did you mean 'suppress_tokens'"),
        ({"extra": {"temperature": 1}}, CPU, "pytorch.extra.temperature", "decoder.temperature"),
        ({"extra": {"max_new_tokens": 1}}, CPU, "pytorch.extra.max_new_tokens", "max_output_tokens"),
        ({"extra": {"stop_strings": ["x"]}}, CPU, "pytorch.extra.stop_strings", "could not be counted"),
        ({"extra": {"max_cache_len": 64}}, CPU, "pytorch.extra.max_cache_len", "cache_implementation: static"),
        ({"extra": {"cache_config": {}}}, CPU, "pytorch.extra.cache_config", "cache_implementation: quantized"),
        ({"extra": {"disable_compile": True}}, CPU, "pytorch.extra.disable_compile", "static"),
        (
            {"extra": {"assistant_confidence_threshold": 0.1}},
            CPU,
            "pytorch.extra.assistant_confidence_threshold",
            "assisted_generation.model",
        ),
        (
            {"extra": {"max_matching_ngram_size": 2}},
            CPU,
            "pytorch.extra.max_matching_ngram_size",
            "assisted_generation.num_tokens",
        ),
    ],
)
def test_an_option_is_refused_with_version_and_reason(
    section: dict[str, Any], facts: EngineFacts, option: str, reason: str
) -> None:
    with pytest.raises(OptionRefused, match=reason) as caught:
        check_options(experiment(section), facts)
    assert f"{option}: " in caught.value.message
    assert "transformers 5.23.0 with torch 2.13.0+cpu" in caught.value.message
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("section", "facts"),
    [
        ({}, CPU),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, GPU),
        ({"low_cpu_mem_usage": True}, CPU),
        ({"low_cpu_mem_usage": False}, EngineFacts({**ALL_PACKAGES, "transformers": "4.57.0"}, "cpu")),
        ({"max_memory": {"1": "1GiB", "cpu": "1GiB"}}, GPU),
        ({"torch_compile": "reduce-overhead", "cache_implementation": "static"}, GPU),
        ({"torch_compile": "max-autotune"}, CPU),
        ({"torch_compile": "default", "torch_compile_backend": "aot_eager"}, CPU),
        ({"cache_implementation": "offloaded"}, GPU),
        ({"batching_strategy": "dynamic", "max_tokens_per_batch": 640, "batch_size": 4}, CPU),
        ({"assisted_generation": {"model": "small", "num_tokens": 3}}, CPU),
        ({"assisted_generation": {"num_tokens": 3}, "extra": {"max_matching_ngram_size": 2}}, CPU),
        ({"cache_implementation": "static", "extra": {"max_cache_len": 64}}, CPU),
        ({"extra": {"suppress_tokens": [1], "max_time": 9.0}}, CPU),
    ],
)
def test_what_can_be_honoured_is_not_refused(section: dict[str, Any], facts: EngineFacts) -> None:
    check_options(experiment(section), facts)


def test_an_adapter_without_peft_is_refused_with_the_remedy() -> None:
    config = ExperimentConfig.from_dict({"model": {"name": "m", "adapter": "lora"}})
    with pytest.raises(OptionRefused, match=r"model\.adapter: needs peft \(pip install peft\)"):
        check_options(config, CPU)
    check_options(config, GPU)


def test_everything_is_refused_at_once() -> None:
    with pytest.raises(OptionRefused) as caught:
        check_options(experiment({"load_in_8bit": True, "extra": {"zebra": 1}}), CPU)
    assert "pytorch.load_in_8bit" in caught.value.message
    assert "pytorch.extra.zebra" in caught.value.message
