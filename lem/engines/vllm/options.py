"""Options of the vllm backend: engine arguments, and the values that a loaded engine has."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lem.base.errors import OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.common import describe_decoder, plain, refuse_changes

# The field of EngineArgs behind each option of the section.
ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_model_len": "max_model_len",
        "gpu_memory_utilization": "gpu_memory_utilization",
        "swap_space": "swap_space",
        "cpu_offload_gb": "cpu_offload_gb",
        "tensor_parallel_size": "tensor_parallel_size",
        "pipeline_parallel_size": "pipeline_parallel_size",
        "distributed_backend": "distributed_executor_backend",
        "enable_prefix_caching": "enable_prefix_caching",
        "enable_chunked_prefill": "enable_chunked_prefill",
        "enforce_eager": "enforce_eager",
        "disable_custom_all_reduce": "disable_custom_all_reduce",
        "kv_cache_dtype": "kv_cache_dtype",
        "block_size": "block_size",
        "load_format": "load_format",
        "quantization": "quantization",
        "attention.disable_sliding_window": "disable_sliding_window",
        "lora.enabled": "enable_lora",
        "lora.max_loras": "max_loras",
        "lora.max_rank": "max_lora_rank",
    }
)

# Options that are fields of a configuration inside EngineArgs.
NESTED_ARGUMENTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "attention.backend": ("attention_config", "backend"),
        "attention.flash_version": ("attention_config", "flash_attn_version"),
        "speculative.model": ("speculative_config", "model"),
        "speculative.num_tokens": ("speculative_config", "num_speculative_tokens"),
        "speculative.method": ("speculative_config", "method"),
        "speculative.prompt_lookup_min": ("speculative_config", "prompt_lookup_min"),
        "speculative.prompt_lookup_max": ("speculative_config", "prompt_lookup_max"),
        "speculative.draft_tp_size": ("speculative_config", "draft_tensor_parallel_size"),
    }
)

# Options of a request, which need no reload.
SAMPLING_OPTIONS = ("min_p", "logprobs", "logit_bias")


@dataclass(frozen=True)
class EngineFacts:
    """What was found.

    Attributes:
        version: of vLLM.
        device: what this build runs on: `cpu`, `cuda`, …
        arguments: the fields of EngineArgs.
        nested: the fields of the configurations inside it that options reach, by their name in EngineArgs.
        environment: variables that vLLM reads and that are set.
    """

    version: str
    device: str
    arguments: frozenset[str]
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"vLLM {self.version} on {self.device}"


@dataclass(frozen=True)
class Places:
    """Where what the experiment names lies on this machine; None what it does not name."""

    model: str
    tokenizer: str | None = None
    drafter: str | None = None


def section_of(config: ExperimentConfig) -> VllmConfig:
    """The options of this backend, defaults where the experiment gives none."""
    section = config.section
    if not isinstance(section, VllmConfig):
        raise TypeError(f"an experiment of the backend {config.backend} came to vllm")
    return section


def given_options(config: ExperimentConfig) -> dict[str, Any]:
    """{dotted option: value} of the section, without `extra` and without what is left to the engine."""
    given: dict[str, Any] = {}
    for name, value in section_of(config).to_dict().items():
        if name == "extra":
            continue
        if name in {"attention", "speculative", "lora"}:
            given.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            given[name] = value
    if given["lora.enabled"] is False:
        # An adapter can only be used where there is room for it.
        given["lora.enabled"] = True if config.model.adapter is not None else None
    return {name: value for name, value in given.items() if value is not None}


def engine_arguments(config: ExperimentConfig, places: Places, engine_seed: int) -> dict[str, Any]:
    """Keywords of EngineArgs.

    Args:
        engine_seed: seed of the engine's own generator, which only requests without a seed draw from.
    """
    arguments: dict[str, Any] = {
        "model": places.model,
        "dtype": config.fp_precision,
        "seed": engine_seed,
        "trust_remote_code": config.model.trust_remote_code,
        # Times of single requests are statistics to vLLM; its own offline benchmark leaves them on as well.
        "disable_log_stats": False,
        "max_model_len": config.max_input_tokens + config.max_output_tokens,
    }
    if places.tokenizer is not None:
        arguments["tokenizer"] = places.tokenizer
    for name, value in given_options(config).items():
        if name in ARGUMENTS:
            arguments[ARGUMENTS[name]] = value
        elif name in NESTED_ARGUMENTS:
            outer, inner = NESTED_ARGUMENTS[name]
            given = places.drafter if name == "speculative.model" else value
            arguments.setdefault(outer, {})[inner] = given
    return arguments | extra_of(config)


def extra_of(config: ExperimentConfig) -> dict[str, Any]:
    """The extra arguments as JSON has them: a section freezes lists into tuples, which vLLM does not take."""
    extra: dict[str, Any] = section_of(config).to_dict()["extra"]
    return extra


def sampling_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Keywords of SamplingParams that all requests of the experiment share.

    Text is left out: no backend turns tokens into text inside a window.
    """
    section, decoder = section_of(config), config.decoder
    settings: dict[str, Any] = {
        "temperature": 0.0 if decoder.is_greedy else decoder.temperature,
        "repetition_penalty": decoder.repetition_penalty,
        "ignore_eos": config.ignore_eos,
        "logprobs": section.logprobs,
        "detokenize": False,
    }
    if not decoder.is_greedy:
        # -1 is "all tokens" in every version; 0 in newer ones only.
        settings |= {"top_k": decoder.top_k or -1, "top_p": decoder.top_p, "min_p": section.min_p or 0.0}
    if section.logit_bias:
        settings["logit_bias"] = {int(token): float(bias) for token, bias in section.logit_bias.items()}
    return settings


def seed_of(config: ExperimentConfig, index: int) -> int | None:
    """The seed of a request: the same request draws the same numbers in whatever batch it runs; None is unseeded."""
    if config.random_seed is None or config.decoder.is_greedy:
        return None
    return config.random_seed + index


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    """What the experiment asks for in vain or at a price; the rules across fields tell of the decoder."""
    notes = []
    if section_of(config).min_p is not None and config.decoder.is_greedy:
        notes.append(Reason.of("min_p_unused", backend="vllm"))
    if seed_of(config, 0) is not None:
        notes.append(Reason.of("vllm_seeded"))
    return tuple(notes)


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
