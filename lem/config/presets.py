"""Presets: values of an experiment under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lem.base.errors import ConfigurationError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """Values that an experiment starts from."""

    name: str
    description: str
    values: Mapping[str, Any]  # as an experiment file would have them


def _preset(name: str, description: str, tokens: tuple[int, int], **engine: Mapping[str, Any]) -> Preset:
    values: dict[str, Any] = {
        "max_input_tokens": tokens[0],
        "max_output_tokens": tokens[1],
        "decoder": {"preset": "deterministic"},  # all are greedy, so that two runs do the same work
    }
    for backend, options in engine.items():
        values.update({"backend": backend, backend: options})
    return Preset(name, description, values)


_PRESETS = (
    _preset("quick-test", "Short prompts and outputs, for a first test.", (64, 32)),
    _preset("benchmark", "Long prompts and outputs, for results to compare.", (2048, 512)),
    _preset("throughput", "Medium lengths, for tokens per second.", (512, 256)),
    _preset(
        "vllm-throughput",
        "vLLM with many requests at a time, chunked prefill and prefix caching.",
        (2048, 512),
        vllm={"max_num_seqs": 256, "enable_chunked_prefill": True, "enable_prefix_caching": True},
    ),
    _preset(
        "vllm-speculative",
        "vLLM drafting 5 tokens at a time from n-grams of the prompt.",
        (2048, 256),
        vllm={"speculative": {"method": "ngram", "num_tokens": 5, "prompt_lookup_max": 4}},
    ),
    _preset("vllm-memory-efficient", "vLLM with an fp8 key-value cache.", (4096, 512), vllm={"kv_cache_dtype": "fp8"}),
    _preset(
        "vllm-low-latency",
        "vLLM with few requests at a time and no CUDA graphs.",
        (512, 128),
        vllm={"max_num_seqs": 32, "enforce_eager": True},
    ),
    _preset(
        "pytorch-optimized",
        "transformers with flash attention 2, compiled.",
        (2048, 512),
        pytorch={"attn_implementation": "flash_attention_2", "torch_compile": "default"},
    ),
    _preset(
        "pytorch-speculative",
        "transformers drafting 5 tokens at a time from n-grams of the prompt.",
        (2048, 256),
        pytorch={"assisted_generation": {"num_tokens": 5}},
    ),
    _preset(
        "pytorch-compatible",
        "transformers with eager attention, which runs every model.",
        (512, 128),
        pytorch={"attn_implementation": "eager"},
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _PRESETS}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: the preset is unknown.
    """
    found = PRESETS.get(name)
    if found is None:
        near = did_you_mean(name, list(PRESETS))
        raise ConfigurationError(f"unknown preset {name!r}{near}", f"one of: {', '.join(PRESETS)}")
    return found
