"""What vLLM made of the options: its configuration after the load, laid beside the requested one. Imports no engine."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lem.backends.effective import describe_decoder, plain, refuse_changes
from lem.backends.vllm_options import SAMPLING_OPTIONS, EngineFacts, extra_of, given_options, section_of, seed_of
from lem.config.experiment_config import ExperimentConfig
from lem.errors import OptionRefused

__all__ = ["describe_effective", "effective_options", "refuse_differences", "refuse_seeds"]

# Where each option stands in vLLM's VllmConfig; the first place that is there counts.
_OFFLOAD = ("offload_config.uva.cpu_offload_gb", "cache_config.cpu_offload_gb")
_SLIDING = ("model_config.disable_sliding_window",)
_PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "max_num_seqs": ("scheduler_config.max_num_seqs",),
        "max_num_batched_tokens": ("scheduler_config.max_num_batched_tokens",),
        "max_model_len": ("model_config.max_model_len",),
        "gpu_memory_utilization": ("cache_config.gpu_memory_utilization",),
        "swap_space": ("cache_config.swap_space",),
        "cpu_offload_gb": _OFFLOAD,
        "tensor_parallel_size": ("parallel_config.tensor_parallel_size",),
        "pipeline_parallel_size": ("parallel_config.pipeline_parallel_size",),
        "distributed_backend": ("parallel_config.distributed_executor_backend",),
        "enable_prefix_caching": ("cache_config.enable_prefix_caching",),
        "enable_chunked_prefill": ("scheduler_config.enable_chunked_prefill",),
        "enforce_eager": ("model_config.enforce_eager",),
        "disable_custom_all_reduce": ("parallel_config.disable_custom_all_reduce",),
        "kv_cache_dtype": ("cache_config.cache_dtype",),
        "block_size": ("cache_config.block_size",),
        "load_format": ("load_config.load_format",),
        "quantization": ("model_config.quantization",),
        "attention.backend": ("attention_config.backend",),
        "attention.flash_version": ("attention_config.flash_attn_version",),
        "attention.disable_sliding_window": _SLIDING,
        "speculative.model": ("speculative_config.model",),
        "speculative.num_tokens": ("speculative_config.num_speculative_tokens",),
        "speculative.method": ("speculative_config.method",),
        "speculative.prompt_lookup_min": ("speculative_config.prompt_lookup_min",),
        "speculative.prompt_lookup_max": ("speculative_config.prompt_lookup_max",),
        "speculative.draft_tp_size": ("speculative_config.draft_tensor_parallel_size",),
        "lora.max_loras": ("lora_config.max_loras",),
        "lora.max_rank": ("lora_config.max_lora_rank",),
    }
)

_PARTS = (
    "model_config",
    "cache_config",
    "scheduler_config",
    "parallel_config",
    "load_config",
    "attention_config",
    "compilation_config",
    "speculative_config",
    "lora_config",
    "offload_config",
    "kernel_config",
    "optimization_level",
)
# Fields that say where or by what name, and differ from load to load without meaning anything; and secrets.
_NOISE = re.compile(
    r"token$|port|_ip$|addr|path|_dir$|uuid|hash$|rank|hf_config|hf_text_config|^model$|^tokenizer$|served_model|^seed$"
)
_LEVELS = 3
_ABSENT = object()


def effective_options(config: ExperimentConfig, vllm_config: Any) -> dict[str, Any]:
    """{dotted option: value} of the section as vLLM has it; without the options of requests."""
    found = {name: plain(_look_up(vllm_config, places)) for name, places in _PLACES.items()}
    found["lora.enabled"] = getattr(vllm_config, "lora_config", None) is not None
    if config.section.to_dict()["speculative"]["model"] is not None and found["speculative.model"] is not None:
        # vLLM has the folder that the name stands for.
        found["speculative.model"] = section_of(config).speculative.model
    return found


def refuse_differences(config: ExperimentConfig, vllm_config: Any, facts: EngineFacts) -> None:
    """Refuse the load when vLLM has another value than the one asked for.

    Raises:
        OptionRefused: as `refuse_changes`.
    """
    effective = effective_options(config, vllm_config)
    wanted = {name: value for name, value in given_options(config).items() if name not in SAMPLING_OPTIONS}
    pairs = {f"vllm.{name}": (value, effective[name]) for name, value in wanted.items()}
    for name, value in extra_of(config).items():
        found = _find(vllm_config, name)
        if found is not _ABSENT and isinstance(value, (bool, int, float, str)):
            pairs[f"vllm.extra.{name}"] = (value, plain(found))
    pairs["fp_precision"] = (config.fp_precision, plain(vllm_config.model_config.dtype))
    if "attention.disable_sliding_window" in wanted and not _has_window(vllm_config):
        pairs["vllm.attention.disable_sliding_window"] = (True, "nothing, since the model has no such window")
    refuse_changes(pairs, facts)


def refuse_seeds(config: ExperimentConfig, vllm_config: Any, facts: EngineFacts, *, can_rewind: bool) -> None:
    """Refuse seeds of requests where they would end the engine.

    When a step holds a part of a prompt, the token drawn after it is thrown away and the request's random generator is
    set back, which torch's generators for CPUs cannot be (seen with vLLM 0.32.0 and torch 2.13).

    Args:
        can_rewind: the generators of this torch can be set back on this device.

    Raises:
        OptionRefused: names random_seed and the version.
    """
    scheduler = vllm_config.scheduler_config
    fits = scheduler.max_num_seqs * vllm_config.model_config.max_model_len <= scheduler.max_num_batched_tokens
    is_split = scheduler.enable_chunked_prefill and not fits
    if seed_of(config, 0) is not None and is_split and not can_rewind:
        raise OptionRefused(
            f"random_seed: {config.random_seed}: {facts} fails where it samples with a seed and splits a prompt",
            "decode greedily, set random_seed to null, or vllm.enable_chunked_prefill to false",
        )


def describe_effective(
    config: ExperimentConfig, vllm_config: Any, sampling: Mapping[str, Any], facts: EngineFacts
) -> dict[str, Any]:
    """The engine configuration as it is, as JSON values: the options as they took effect, then the rest.

    Args:
        sampling: the fields of SamplingParams in effect.
    """
    return {
        "vllm": _section(config, vllm_config, sampling),
        "decoder": describe_decoder(
            # "All tokens" is -1 to vLLM, and 0 here.
            config.decoder,
            {**sampling, "top_k": max(sampling["top_k"], 0)},
            is_sampling=not config.decoder.is_greedy,
        ),
        "fp_precision": plain(vllm_config.model_config.dtype),
        "ignore_eos": bool(sampling["ignore_eos"]),
        "random_seed": config.random_seed,
        "sampling": {name: plain(value) for name, value in sampling.items()},
        "engine": {part: _describe(getattr(vllm_config, part, None)) for part in _PARTS},
        "environment": dict(facts.environment),
    }


def _section(config: ExperimentConfig, vllm_config: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = section_of(config).to_dict()
    for name, value in effective_options(config, vllm_config).items():
        outer, _, inner = name.rpartition(".")
        (section[outer] if outer else section)[inner] = value
    greedy = config.decoder.is_greedy
    section["min_p"] = None if greedy else sampling["min_p"]
    section["logprobs"] = sampling["logprobs"]
    section["logit_bias"] = {str(token): bias for token, bias in (sampling["logit_bias"] or {}).items()} or None
    return section


def _look_up(vllm_config: Any, places: tuple[str, ...]) -> Any:
    for place in places:
        value = vllm_config
        for name in place.split("."):
            value = getattr(value, name, _ABSENT)
        if value is not _ABSENT:
            return value
    return None


def _find(vllm_config: Any, name: str) -> Any:
    """The value of a field with this name, where exactly one part of the configuration has it."""
    parts = (getattr(vllm_config, part, None) for part in _PARTS)
    found = [getattr(part, name) for part in parts if part is not None and hasattr(part, name)]
    return found[0] if len(found) == 1 else _ABSENT


def _has_window(vllm_config: Any) -> bool:
    text_config = getattr(vllm_config.model_config, "hf_text_config", None)
    return getattr(text_config, "sliding_window", None) is not None


def _describe(value: Any, level: int = 0) -> Any:
    """A configuration as JSON values: its plain fields, and those of what it holds."""
    if isinstance(value, enum.Enum):
        return value.name
    if not dataclasses.is_dataclass(value):
        return plain(value)
    if level >= _LEVELS:
        return None
    out = {}
    for item in dataclasses.fields(value):
        if item.name.startswith("_") or _NOISE.search(item.name):
            continue
        found = getattr(value, item.name, None)
        described = _describe(found, level + 1)
        if described is not None or found is None:
            out[item.name] = described
    return out
