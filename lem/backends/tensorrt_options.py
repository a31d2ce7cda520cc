"""What an experiment asks of TensorRT-LLM, in the words of its `LLM` and `SamplingParams`; imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lem.config.backend_config import TensorRTConfig
from lem.config.experiment_config import ExperimentConfig
from lem.reasons import Reason

__all__ = [
    "ARGUMENTS",
    "BUILD_OPTIONS",
    "CACHE_ARGUMENTS",
    "DRAFT_MODEL_ARGUMENTS",
    "EngineFacts",
    "cache_arguments",
    "draft_arguments",
    "engine_arguments",
    "gpus_needed",
    "idle_options",
    "lengths_of",
    "runtime_extra",
    "sampling_settings",
    "section_of",
]

# The argument of LLM behind each option of the section.
ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "max_batch_size": "max_batch_size",
        "max_num_tokens": "max_num_tokens",
        "tp_size": "tensor_parallel_size",
        "pp_size": "pipeline_parallel_size",
        "enable_chunked_context": "enable_chunked_prefill",
    }
)

# The argument of KvCacheConfig.
CACHE_ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "gpu_memory_utilization": "free_gpu_memory_fraction",
        "enable_kv_cache_reuse": "enable_block_reuse",
        "kv_cache_type": "dtype",
    }
)

# What belongs to the flow in which an engine is built beforehand.
BUILD_OPTIONS = ("engine_path", "engine_cache_dir", "force_rebuild", "builder_opt_level", "extra_build_args")

# Arguments that help where they are known: lem bounds requests itself, and can do without the engine's times.
_HELPFUL = frozenset({"max_input_len", "return_perf_metrics"})

# Draft models go by one of these names, depending on the version.
DRAFT_MODEL_ARGUMENTS = ("speculative_model", "speculative_model_dir")


@dataclass(frozen=True)
class EngineFacts:
    """What was found.

    Attributes:
        version: of TensorRT-LLM.
        arguments: of LLM: the fields of its LlmArgs.
        cache_arguments, draft_arguments, sampling_arguments: the fields of KvCacheConfig, DraftTargetDecodingConfig
            and SamplingParams.
        has_penalties: its sampler knows penalties.
    """

    version: str
    arguments: frozenset[str]
    cache_arguments: frozenset[str]
    draft_arguments: frozenset[str]
    sampling_arguments: frozenset[str]
    has_penalties: bool

    def __str__(self) -> str:
        return f"TensorRT-LLM {self.version}"


def section_of(config: ExperimentConfig) -> TensorRTConfig:
    """The options of this backend, defaults where the experiment gives none."""
    section = config.section
    if not isinstance(section, TensorRTConfig):
        raise TypeError(f"an experiment of the backend {config.backend} came to tensorrt")
    return section


def lengths_of(config: ExperimentConfig) -> tuple[int, int]:
    """The longest prompt and the longest output in tokens."""
    section = section_of(config)
    return section.max_input_len or config.max_input_tokens, section.max_output_len or config.max_output_tokens


def gpus_needed(config: ExperimentConfig) -> int:
    """The GPUs that one copy of the model is spread over."""
    section = section_of(config)
    along_context = runtime_extra(config).get("context_parallel_size") or 1
    return (section.tp_size or 1) * (section.pp_size or 1) * int(along_context)


def engine_arguments(config: ExperimentConfig, model: str, tokenizer: str | None, facts: EngineFacts) -> dict[str, Any]:
    """Keywords of LLM, without the configurations that are objects of their own.

    Args:
        model, tokenizer: the folders; None for the model's own tokenizer.
    """
    section = section_of(config)
    longest_input, longest_output = lengths_of(config)
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.fp_precision,
        "trust_remote_code": config.model.trust_remote_code,
        "max_input_len": longest_input,
        "max_seq_len": longest_input + longest_output,
        # When a request left the queue and when it was done is among these metrics.
        "return_perf_metrics": True,
    }
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
    given = {ARGUMENTS[name]: getattr(section, name) for name in ARGUMENTS}
    arguments |= {name: value for name, value in given.items() if value is not None}
    unknown = _HELPFUL - facts.arguments
    return {name: value for name, value in arguments.items() if name not in unknown} | runtime_extra(config)


def runtime_extra(config: ExperimentConfig) -> dict[str, Any]:
    """The further arguments as JSON has them: a section freezes lists into tuples."""
    extra: dict[str, Any] = section_of(config).to_dict()["extra_runtime_args"]
    return extra


def cache_arguments(config: ExperimentConfig) -> dict[str, Any]:
    """Keywords of KvCacheConfig.

    The set of prompts is repeated until a window is long enough, and TensorRT-LLM has no call that empties its cache
    of prompts: so it keeps none unless the experiment asks for just that.
    """
    section = section_of(config)
    arguments = {
        "free_gpu_memory_fraction": section.gpu_memory_utilization,
        "enable_block_reuse": bool(section.enable_kv_cache_reuse),
        "dtype": section.kv_cache_type,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def draft_arguments(config: ExperimentConfig, folder: str, facts: EngineFacts) -> dict[str, Any]:
    """Keywords of DraftTargetDecodingConfig."""
    name = next(name for name in DRAFT_MODEL_ARGUMENTS if name in facts.draft_arguments)
    return {"max_draft_len": section_of(config).num_draft_tokens, name: folder}


def sampling_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Keywords of SamplingParams that all requests of the experiment share.

    Greedy decoding is asked for by the one likeliest token, which every version understands. Text is left out: no
    backend turns tokens into text inside a window.
    """
    decoder = config.decoder
    settings: dict[str, Any] = {"ignore_eos": config.ignore_eos, "detokenize": False, "return_perf_metrics": True}
    if decoder.is_greedy:
        settings["top_k"] = 1
    else:
        settings |= {"temperature": decoder.temperature, "top_k": decoder.top_k, "top_p": decoder.top_p}
    if decoder.repetition_penalty != 1.0:
        settings["repetition_penalty"] = decoder.repetition_penalty
    return settings


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    """What a person should know about the options."""
    if section_of(config).enable_kv_cache_reuse is None:
        return (Reason.of("tensorrt_no_reuse"),)
    return ()
