"""Options of the vllm backend: the engine argument behind each, its effective value, and what is refused.

Imports no vLLM.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lem.base.dataclass import dataclass, field
from lem.base.errors import OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.common import Arguments, Folders, Signature, look_up, plain, section_of

# The options of the section that belong to the engine: fields of EngineArgs, and places in a loaded VllmConfig.
OPTIONS: Arguments = MappingProxyType(
    {
        "max_num_seqs": ("max_num_seqs", "scheduler_config.max_num_seqs"),
        "max_num_batched_tokens": ("max_num_batched_tokens", "scheduler_config.max_num_batched_tokens"),
        "max_model_len": ("max_model_len", "model_config.max_model_len"),
        "gpu_memory_utilization": ("gpu_memory_utilization", "cache_config.gpu_memory_utilization"),
        "swap_space": ("swap_space", "cache_config.swap_space"),
        "cpu_offload_gb": ("cpu_offload_gb", "offload_config.uva.cpu_offload_gb", "cache_config.cpu_offload_gb"),
        "tensor_parallel_size": ("tensor_parallel_size", "parallel_config.tensor_parallel_size"),
        "pipeline_parallel_size": ("pipeline_parallel_size", "parallel_config.pipeline_parallel_size"),
        "distributed_backend": ("distributed_executor_backend", "parallel_config.distributed_executor_backend"),
        "enable_prefix_caching": ("enable_prefix_caching", "cache_config.enable_prefix_caching"),
        "enable_chunked_prefill": ("enable_chunked_prefill", "scheduler_config.enable_chunked_prefill"),
        "enforce_eager": ("enforce_eager", "model_config.enforce_eager"),
        "disable_custom_all_reduce": ("disable_custom_all_reduce", "parallel_config.disable_custom_all_reduce"),
        "kv_cache_dtype": ("kv_cache_dtype", "cache_config.cache_dtype"),
        "block_size": ("block_size", "cache_config.block_size"),
        "load_format": ("load_format", "load_config.load_format"),
        "quantization": ("quantization", "model_config.quantization"),
        "attention.backend": ("attention_config.backend",),
        "attention.flash_version": ("attention_config.flash_attn_version",),
        "attention.disable_sliding_window": ("disable_sliding_window", "model_config.disable_sliding_window"),
        "speculative.model": ("speculative_config.model",),
        "speculative.num_tokens": ("speculative_config.num_speculative_tokens",),
        "speculative.method": ("speculative_config.method",),
        "speculative.prompt_lookup_min": ("speculative_config.prompt_lookup_min",),
        "speculative.prompt_lookup_max": ("speculative_config.prompt_lookup_max",),
        "speculative.draft_tp_size": ("speculative_config.draft_tensor_parallel_size",),
        "lora.enabled": ("enable_lora",),
        "lora.max_loras": ("max_loras", "lora_config.max_loras"),
        "lora.max_rank": ("max_lora_rank", "lora_config.max_lora_rank"),
    }
)

# Options of a request, which need no reload.
SAMPLING_OPTIONS = ("min_p", "logprobs", "logit_bias")

# Words in vLLM's complaints about a request, and the options they are about.
OPTION_OF_PARAMETER: Mapping[str, str] = MappingProxyType(
    {
        **{name: f"decoder.{name}" for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
        **{name: f"vllm.{name}" for name in SAMPLING_OPTIONS},
        "lora": "model.adapter",
    }
)

# Why an argument of the engine is not taken from `extra`.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **common.set_by_options("vllm", OPTIONS),
        **common.set_by("vllm", SAMPLING_OPTIONS),
        **common.SET_BY_MODEL,
        "code_revision": "is set by model.revision",
        "seed": "is set by random_seed",
        "device_ids": "is set by gpus",
        "hf_token": "is set by the secret HF_TOKEN",
        "attention_backend": "is set by vllm.attention.backend",
        "spec_method": "is set by vllm.speculative.method",
        "spec_model": "is set by vllm.speculative.model",
        "spec_tokens": "is set by vllm.speculative.num_tokens",
        "disable_log_stats": "lem needs these statistics for the times of requests",
        "skip_tokenizer_init": "lem tokenizes prompts with the engine's tokenizer",
        "override_generation_config": "lem sets every sampling value itself",
        **dict.fromkeys(("max_num_queued_reqs", "max_num_queued_tokens"), "rejected requests would count as failed"),
        **dict.fromkeys(("runner", "convert", "task", "pooler_config"), "lem only measures text generation"),
    }
)
_DATA_PARALLEL = ("data_parallel_", "nnodes", "node_rank", "enable_elastic_ep")

_PARTS = (
    *("model_config", "cache_config", "scheduler_config", "parallel_config", "load_config", "attention_config"),
    *("compilation_config", "speculative_config", "lora_config", "offload_config", "kernel_config"),
    "optimization_level",
)
# Fields that say where or by what name, and differ from load to load without meaning anything; and secrets.
_NOISE = re.compile(
    r"token$|port|_ip$|addr|path|_dir$|uuid|hash$|rank|hf_config|hf_text_config|^model$|^tokenizer$|served_model|^seed$"
)
_LEVELS = 3


@dataclass(frozen=True)
class EngineFacts(Signature):
    device: str  # what this build runs on: cpu, cuda, …
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that vLLM reads and that are set

    def __str__(self) -> str:
        return f"vLLM {self.version} on {self.device}"


def given_options(config: ExperimentConfig) -> dict[str, Any]:
    given = common.given_options(section_of(config, VllmConfig), OPTIONS)
    if config.model.adapter is not None:
        given["lora.enabled"] = True  # an adapter can only be used if there is room for it
    elif not given["lora.enabled"]:
        del given["lora.enabled"]
    return given


def engine_arguments(config: ExperimentConfig, folders: Folders, engine_seed: int) -> dict[str, Any]:
    """Keywords of EngineArgs; only requests without a seed use the generator that `engine_seed` is for."""
    given = given_options(config)
    if "speculative.model" in given:
        given["speculative.model"] = folders.drafter
    arguments: dict[str, Any] = {
        "model": folders.model,
        "dtype": config.fp_precision,
        "seed": engine_seed,
        "trust_remote_code": config.model.trust_remote_code,
        # Times of single requests are statistics to vLLM; its own offline benchmark leaves them on as well.
        "disable_log_stats": False,
        **config.engine_lengths(),
    }
    if folders.tokenizer is not None:
        arguments["tokenizer"] = folders.tokenizer
    return {**arguments, **common.engine_keywords(given, OPTIONS), **common.extra_of(config)}


def sampling_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Keywords of SamplingParams that all requests share; no backend detokenizes inside a window."""
    section, decoder = section_of(config, VllmConfig), config.decoder
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


def effective_sampling(made: Any, settings: Mapping[str, Any], facts: EngineFacts) -> dict[str, Any]:
    for name, requested in settings.items():
        found = getattr(made, name)
        is_all_tokens = name == "top_k" and {requested, found} <= {-1, 0}
        if found != requested and not is_all_tokens:
            option = OPTION_OF_PARAMETER.get(name, name)
            raise OptionRefused(f"{facts} changed requested values: {option}: {requested} became {found}")
    names = (*settings, "top_k", "top_p", "min_p", "logit_bias", "presence_penalty", "frequency_penalty")
    return {name: getattr(made, name) for name in dict.fromkeys(names)}


def seed_of(config: ExperimentConfig, index: int) -> int | None:
    """The seed of a request: it draws the same numbers in any batch; None without a seed."""
    if config.random_seed is None or config.decoder.is_greedy:
        return None
    return config.random_seed + index


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    if not config.decoder.is_greedy:
        return () if config.random_seed is None else (Reason.of("vllm_seeded"),)
    is_unused = section_of(config, VllmConfig).min_p is not None
    return (Reason.of("min_p_unused", backend="vllm"),) if is_unused else ()


# --- before the load


def check(config: ExperimentConfig, facts: EngineFacts) -> None:
    common.refuse([*_unsupported(config, facts), *_refused_extra(config, facts)], facts)


def _unsupported(config: ExperimentConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    section, is_on_cpu = section_of(config, VllmConfig), facts.device == "cpu"
    backend = section.attention.backend
    if config.gpus and is_on_cpu:
        yield "gpus", "this build only runs on the CPU; set gpus: [] or install a GPU build"
    if config.gpus == () and not is_on_cpu:
        yield "gpus", f"[] means the CPU, but this build runs on {facts.device}"
    for name in given_options(config):
        argument = OPTIONS[name][0]
        if not facts.has(argument):
            no_swap = "the V1 engine has no swap space: a preempted request is recomputed"
            yield f"vllm.{name}", no_swap if name == "swap_space" else f"EngineArgs has no {argument}"
    if is_on_cpu and section.cpu_offload_gb:
        yield "vllm.cpu_offload_gb", "the weights are already in CPU memory"
    if is_on_cpu and backend is not None and not backend.upper().startswith(("CPU_", "AMX_")):
        yield "vllm.attention.backend", f"{backend} requires a GPU; vLLM would silently use its CPU backend"
    if is_on_cpu and section.attention.flash_version is not None:
        yield "vllm.attention.flash_version", "flash attention requires a GPU"
    if section.disable_custom_all_reduce is not None and (section.tensor_parallel_size or 1) == 1:
        yield "vllm.disable_custom_all_reduce", "has no effect with tensor_parallel_size 1"
    if section.gpu_memory_utilization == VllmConfig().gpu_memory_utilization:
        return
    decisive = "extra.kv_cache_memory_bytes" if "kv_cache_memory_bytes" in section.extra else None
    if is_on_cpu and facts.environment.get("VLLM_CPU_KVCACHE_SPACE"):
        decisive = "the variable VLLM_CPU_KVCACHE_SPACE"
    if decisive is not None:
        yield "vllm.gpu_memory_utilization", f"has no effect: {decisive} sets the size of the cache"


def _refused_extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    given = {OPTIONS[name][0].partition(".")[0]: name for name in given_options(config)}
    for name in common.extra_of(config):
        reason = common.reason_against(name, _REFUSED, facts.arguments, "unknown field of EngineArgs")
        if name.startswith(_DATA_PARALLEL):
            reason = "lem was not yet tested with several copies of the engine"
        elif reason is None and name in given:
            reason = f"conflicts with vllm.{given[name]}, which is part of it; set all of it in one place"
        if reason is not None:
            yield f"vllm.extra.{name}", reason


# --- after the load


def effective_options(config: ExperimentConfig, vllm_config: Any) -> dict[str, Any]:
    found = common.effective_values(vllm_config, OPTIONS)
    found["lora.enabled"] = getattr(vllm_config, "lora_config", None) is not None
    drafter = section_of(config, VllmConfig).speculative.model
    if drafter is not None and found["speculative.model"] is not None:
        found["speculative.model"] = drafter  # vLLM has the folder of this name
    return found


def refuse_differences(config: ExperimentConfig, vllm_config: Any, facts: EngineFacts) -> None:
    effective, requested = effective_options(config, vllm_config), given_options(config)
    pairs = {f"vllm.{name}": (value, effective[name]) for name, value in requested.items()}
    for name, value in common.extra_of(config).items():
        parts = (getattr(vllm_config, part, None) for part in _PARTS)
        found = [getattr(part, name) for part in parts if part is not None and hasattr(part, name)]
        if len(found) == 1 and isinstance(value, (bool, int, float, str)):
            pairs[f"vllm.extra.{name}"] = (value, plain(found[0]))
    pairs["fp_precision"] = (config.fp_precision, plain(vllm_config.model_config.dtype))
    has_window = look_up(vllm_config, "model_config.hf_text_config.sliding_window") is not None
    if "attention.disable_sliding_window" in requested and not has_window:
        pairs["vllm.attention.disable_sliding_window"] = (True, "False: the model has no sliding window")
    common.refuse_changes(pairs, facts)


def refuse_seeds(config: ExperimentConfig, vllm_config: Any, facts: EngineFacts, *, can_rewind: bool) -> None:
    """Refuse seeds of requests where they would crash the engine."""
    # When a step holds part of a prompt, vLLM discards the token drawn after it and rewinds the request's random
    # generator, which torch's generators for CPUs do not support (seen with vLLM 0.32.0 and torch 2.13). With
    # `can_rewind` this torch supports it on this device.
    scheduler = vllm_config.scheduler_config
    fits = scheduler.max_num_seqs * vllm_config.model_config.max_model_len <= scheduler.max_num_batched_tokens
    is_split = scheduler.enable_chunked_prefill and not fits
    if seed_of(config, 0) is not None and is_split and not can_rewind:
        text = f"random_seed: {config.random_seed}: {facts} fails when it samples with a seed and splits a prompt"
        raise OptionRefused(text, "use greedy decoding, random_seed: null, or vllm.enable_chunked_prefill: false")


def describe_effective(
    config: ExperimentConfig, vllm_config: Any, sampling: Mapping[str, Any], facts: EngineFacts
) -> dict[str, Any]:
    section: dict[str, Any] = section_of(config, VllmConfig).to_dict()
    for name, value in effective_options(config, vllm_config).items():
        outer, _, inner = name.rpartition(".")
        (section[outer] if outer else section)[inner] = value
    is_greedy = config.decoder.is_greedy
    section["min_p"] = None if is_greedy else sampling["min_p"]
    section["logprobs"] = sampling["logprobs"]
    section["logit_bias"] = {str(token): bias for token, bias in (sampling["logit_bias"] or {}).items()} or None
    # "All tokens" is -1 in vLLM, and 0 in lem.
    values = {**sampling, "top_k": max(sampling["top_k"], 0)}
    return {
        "vllm": section,
        "decoder": common.describe_decoder(config.decoder, values, is_sampling=not is_greedy),
        "fp_precision": plain(vllm_config.model_config.dtype),
        "ignore_eos": bool(sampling["ignore_eos"]),
        "random_seed": config.random_seed,
        "sampling": {name: plain(value) for name, value in sampling.items()},
        "engine": {part: _describe(getattr(vllm_config, part, None)) for part in _PARTS},
        "environment": dict(facts.environment),
    }


def _describe(value: Any, level: int = 0) -> Any:
    if isinstance(value, enum.Enum) or not dataclasses.is_dataclass(value):
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
