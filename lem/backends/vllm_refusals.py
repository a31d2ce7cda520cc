"""What of an experiment vLLM cannot honour here, as far as that shows before a model is loaded.

Nothing here imports an engine: what is found of it comes in as facts. What the engine changes on its own is seen after
the load, by `vllm_effective`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from lem.backends.refusals import Refusal, refuse
from lem.backends.vllm_options import (
    ARGUMENTS,
    NESTED_ARGUMENTS,
    SAMPLING_OPTIONS,
    EngineFacts,
    extra_of,
    given_options,
    section_of,
)
from lem.config.backend_config import VllmConfig
from lem.config.experiment_config import ExperimentConfig
from lem.config.problems import did_you_mean

__all__ = ["check_options"]

# Arguments of the engine that an option outside the section decides.
_OWNED = MappingProxyType(
    {
        **{argument: f"vllm.{option}" for option, argument in ARGUMENTS.items()},
        "model": "model.name",
        "revision": "model.revision",
        "code_revision": "model.revision",
        "tokenizer": "model.tokenizer",
        "tokenizer_revision": "model.tokenizer",
        "trust_remote_code": "model.trust_remote_code",
        "dtype": "fp_precision",
        "seed": "random_seed",
        "device_ids": "gpus",
        "hf_token": "the secret HF_TOKEN",
        "attention_backend": "vllm.attention.backend",
        "spec_method": "vllm.speculative.method",
        "spec_model": "vllm.speculative.model",
        "spec_tokens": "vllm.speculative.num_tokens",
    }
)

_NO_TEXT = "one language model that generates tokens is measured"
_REFUSED = MappingProxyType(
    {
        "disable_log_stats": "the times of requests are among these statistics",
        "skip_tokenizer_init": "prompts are turned into tokens with the engine's tokenizer",
        "override_generation_config": "lem gives every sampling value itself",
        "max_num_queued_reqs": "requests that the engine turns away would be counted as failed",
        "max_num_queued_tokens": "requests that the engine turns away would be counted as failed",
        **dict.fromkeys(("runner", "convert", "task", "pooler_config"), _NO_TEXT),
    }
)
_DATA_PARALLEL = "several copies of the engine were not yet run with lem"
_SEVERAL = ("data_parallel_", "nnodes", "node_rank", "enable_elastic_ep")

_WHY_GONE = MappingProxyType(
    {"swap_space": "it has no swap space: a request that has to make room is computed again (the V1 engine)"}
)
_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def check_options(config: ExperimentConfig, facts: EngineFacts) -> None:
    """Refuse what cannot be honoured here, everything at once.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    refusals = [
        *_device(config, facts),
        *_unknown(config, facts),
        *_idle_on_cpu(config, facts),
        *_memory(config, facts),
        *_extra(config, facts),
    ]
    refuse(refusals, facts)


def _device(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    if config.gpus is None:
        return
    if config.gpus and facts.device == "cpu":
        yield Refusal("gpus", "this build runs on the CPU alone; name no GPU, or take a build for them")
    if not config.gpus and facts.device != "cpu":
        yield Refusal("gpus", f"this build runs on {facts.device} and not on the CPU, which [] asks for")


def _unknown(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    """Options whose argument this version does not have."""
    for name in given_options(config):
        if name in ARGUMENTS and ARGUMENTS[name] not in facts.arguments:
            yield Refusal(f"vllm.{name}", _WHY_GONE.get(name, f"EngineArgs has no {ARGUMENTS[name]}"))
        if name in NESTED_ARGUMENTS:
            outer, inner = NESTED_ARGUMENTS[name]
            if outer not in facts.arguments or inner not in facts.nested.get(outer, frozenset()):
                yield Refusal(f"vllm.{name}", f"EngineArgs has no {outer}.{inner}")


def _idle_on_cpu(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    """What vLLM takes on the CPU, and then does nothing with."""
    section = section_of(config)
    if facts.device != "cpu":
        return
    if section.cpu_offload_gb:
        yield Refusal("vllm.cpu_offload_gb", "the weights are in CPU memory already")
    backend = section.attention.backend
    if backend is not None and not backend.upper().startswith(("CPU_", "AMX_")):
        yield Refusal("vllm.attention.backend", f"{backend} needs a GPU; vLLM would use its own for the CPU instead")
    if section.attention.flash_version is not None:
        yield Refusal("vllm.attention.flash_version", "flash attention needs a GPU")


def _memory(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    section = section_of(config)
    if section.disable_custom_all_reduce is not None and _degree(section) == 1:
        yield Refusal("vllm.disable_custom_all_reduce", "there is nothing to reduce with tensor_parallel_size 1")
    if section.gpu_memory_utilization == VllmConfig().gpu_memory_utilization:
        return
    ruling = "extra.kv_cache_memory_bytes" if "kv_cache_memory_bytes" in section.extra else None
    if facts.device == "cpu" and facts.environment.get(_KV_CACHE_VARIABLE):
        ruling = f"the variable {_KV_CACHE_VARIABLE}"
    if ruling is not None:
        yield Refusal("vllm.gpu_memory_utilization", f"{ruling} decides on the size of the cache")


def _degree(section: VllmConfig) -> int:
    return section.tensor_parallel_size or 1


def _extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    taken = {NESTED_ARGUMENTS[name][0]: name for name in given_options(config) if name in NESTED_ARGUMENTS}
    for name in extra_of(config):
        reason = _reason_against(name, facts)
        if reason is None and name in taken:
            reason = f"stands beside vllm.{taken[name]}, which is a part of it; give all of it here or there"
        if reason is not None:
            yield Refusal(f"vllm.extra.{name}", reason)


def _reason_against(name: str, facts: EngineFacts) -> str | None:
    if name in _OWNED:
        return f"is set by {_OWNED[name]}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name.startswith(_SEVERAL):
        return _DATA_PARALLEL
    if name in SAMPLING_OPTIONS:
        return f"is set by vllm.{name}"
    if name not in facts.arguments:
        usable = sorted(facts.arguments - _OWNED.keys() - _REFUSED.keys())
        return f"EngineArgs has no such field{did_you_mean(name, usable)}"
    return None
