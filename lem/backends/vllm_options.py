"""What an experiment asks of vLLM, in the words of `EngineArgs` and `SamplingParams`; imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lem.config.backend_config import VllmConfig
from lem.config.experiment_config import ExperimentConfig
from lem.reasons import Reason

__all__ = [
    "ARGUMENTS",
    "NESTED_ARGUMENTS",
    "SAMPLING_OPTIONS",
    "EngineFacts",
    "Places",
    "engine_arguments",
    "extra_of",
    "given_options",
    "idle_options",
    "sampling_settings",
    "section_of",
    "seed_of",
]

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
