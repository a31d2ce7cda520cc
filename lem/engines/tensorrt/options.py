"""Options of the tensorrt backend: the engine argument behind each, what is refused, and checkpoints.

Imports no TensorRT-LLM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem.base import durable
from lem.base.codec import shown
from lem.base.dataclass import dataclass
from lem.base.reasons import Reason
from lem.config.backends import TensorRTConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.common import Arguments, Folders, Signature, look_up, plain, section_of

# The options of the section that are arguments of LLM, and have the same places in a loaded engine's arguments.
OPTIONS: Arguments = MappingProxyType(
    {
        "max_batch_size": ("max_batch_size",),
        "max_num_tokens": ("max_num_tokens",),
        "tp_size": ("tensor_parallel_size",),
        "pp_size": ("pipeline_parallel_size",),
        "enable_chunked_context": ("enable_chunked_prefill",),
        "gpu_memory_utilization": ("kv_cache_config.free_gpu_memory_fraction",),
        "enable_kv_cache_reuse": ("kv_cache_config.enable_block_reuse",),
        "kv_cache_type": ("kv_cache_config.dtype",),
        "num_draft_tokens": ("speculative_config.max_draft_len",),
    }
)
_CLASSES = {"": "LLM", "kv_cache_config": "KvCacheConfig", "speculative_config": "DraftTargetDecodingConfig"}
# Draft models go by one of these names, depending on the version.
_DRAFT_MODEL = ("speculative_model", "speculative_model_dir")
# Arguments that help if they exist: lem bounds requests itself, and can do without the engine's times.
_HELPFUL = frozenset({"max_input_len", "return_perf_metrics"})

_BUILDING = "not supported by the PyTorch flow, TensorRT-LLM's default, which builds no engines"
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("engine_path", "engine_cache_dir", "force_rebuild"), _BUILDING),
        **dict.fromkeys(("builder_opt_level", "extra_build_args"), _BUILDING),
        "calibration": "the PyTorch flow does not quantize; calibrate when you create the checkpoint (NVIDIA ModelOpt)",
    }
)

# Why an argument of LLM is not taken from `extra_runtime_args`.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **common.set_by_options("tensorrt", OPTIONS),
        **common.SET_BY_MODEL,
        "max_input_len": "is set by tensorrt.max_input_len",
        "max_seq_len": "is set by tensorrt.max_output_len",
        "kv_cache_config": "is set by tensorrt.gpu_memory_utilization, enable_kv_cache_reuse and kv_cache_type",
        "speculative_config": "is set by tensorrt.draft_model and num_draft_tokens",
        "backend": "lem uses the PyTorch flow",
        "build_config": _BUILDING,
        "quant_config": "the PyTorch flow loads checkpoints that are already quantized",
        "skip_tokenizer_init": "lem tokenizes prompts with the engine's tokenizer",
        "return_perf_metrics": "lem needs these metrics for the times of requests",
        "max_beam_width": "lem counts one answer per request",
    }
)

_EXTRA = "extra_runtime_args"
_SECRETS = ("token", "key", "secret")


@dataclass(frozen=True)
class EngineFacts(Signature):
    sampling_arguments: frozenset[str]  # the fields of SamplingParams
    has_penalties: bool  # its sampler has repetition penalties

    def __str__(self) -> str:
        return f"TensorRT-LLM {self.version}"


def gpus_needed(config: ExperimentConfig) -> int:
    return config.parallel_degree * int(common.extra_of(config, _EXTRA).get("context_parallel_size") or 1)


def _given(config: ExperimentConfig) -> dict[str, Any]:
    """{option: value} of OPTIONS, without what is left to the engine."""
    # The set of prompts is repeated until a window is long enough, and TensorRT-LLM has no call that empties its cache
    # of prompts: so it keeps none unless the experiment asks for just that.
    return {"enable_kv_cache_reuse": False, **common.given_options(section_of(config, TensorRTConfig), OPTIONS)}


def engine_arguments(config: ExperimentConfig, facts: EngineFacts, folders: Folders) -> dict[str, Any]:
    longest_input, longest_output = config.engine_lengths().values()
    arguments: dict[str, Any] = {
        "model": folders.model,
        "dtype": config.fp_precision,
        "trust_remote_code": config.model.trust_remote_code,
        "max_input_len": longest_input,
        "max_seq_len": longest_input + longest_output,
        # Among these metrics are the times at which a request left the queue and was done.
        "return_perf_metrics": True,
    }
    if folders.tokenizer is not None:
        arguments["tokenizer"] = folders.tokenizer
    arguments |= common.engine_keywords(_given(config), OPTIONS)
    if folders.drafter is not None:
        name = next(name for name in _DRAFT_MODEL if name in facts.nested["speculative_config"])
        arguments["speculative_config"][name] = folders.drafter
    unknown = _HELPFUL - facts.arguments
    return {name: value for name, value in arguments.items() if name not in unknown} | common.extra_of(config, _EXTRA)


def sampling_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Keywords of SamplingParams that all requests of the experiment share."""
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
    is_chosen = section_of(config, TensorRTConfig).enable_kv_cache_reuse is not None
    return () if is_chosen else (Reason.of("tensorrt_no_reuse"),)


# --- before the load


def check(config: ExperimentConfig, facts: EngineFacts) -> None:
    common.refuse([*_unsupported(config, facts), *_refused_extra(config, facts)], facts)


def _unsupported(config: ExperimentConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    section, default, decoder = section_of(config, TensorRTConfig), TensorRTConfig(), config.decoder
    for name, reason in _UNSUPPORTED.items():
        if getattr(section, name) != getattr(default, name):
            yield f"tensorrt.{name}", reason
    if config.model.adapter is not None:
        yield "model.adapter", "lem was not yet tested with adapters on this backend; merge it into the checkpoint"
    for name in common.given_options(section, OPTIONS):
        outer, _, inner = OPTIONS[name][0].rpartition(".")
        if not facts.has(OPTIONS[name][0]):
            yield f"tensorrt.{name}", f"{_CLASSES[outer]} has no {inner}"
    if section.draft_model is not None and not facts.nested["speculative_config"] & {*_DRAFT_MODEL}:
        yield "tensorrt.draft_model", "DraftTargetDecodingConfig has no argument for a model"
    for name in sorted(sampling_settings(config).keys() - facts.sampling_arguments):
        yield f"decoder.{name}", f"SamplingParams has no {name}"
    if not decoder.is_greedy and config.random_seed is not None:
        yield "random_seed", "the sampler has one generator for all requests; use greedy decoding, or random_seed: null"
    if decoder.repetition_penalty != 1.0 and not facts.has_penalties:
        yield "decoder.repetition_penalty", "the sampler of this version has no penalties"


def _refused_extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    extra = common.extra_of(config, _EXTRA)
    for name in extra:
        if reason := common.reason_against(name, _REFUSED, facts.arguments, "unknown argument of LLM"):
            yield f"tensorrt.extra_runtime_args.{name}", reason
    overriding = extra.get("model_kwargs")
    for key in _TYPE_KEYS:
        if isinstance(overriding, Mapping) and key in overriding:
            yield f"tensorrt.extra_runtime_args.model_kwargs.{key}", "is set by fp_precision"


# --- after the load


def refuse_differences(config: ExperimentConfig, arguments: Any, facts: EngineFacts) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        "fp_precision": (config.fp_precision, look_up(arguments, "dtype")),
        "tensorrt.max_output_len": (sum(config.engine_lengths().values()), look_up(arguments, "max_seq_len")),
    }
    effective = common.effective_values(arguments, OPTIONS)
    pairs |= {f"tensorrt.{name}": (value, effective[name]) for name, value in _given(config).items()}
    for name, value in common.extra_of(config, _EXTRA).items():
        if isinstance(value, (bool, int, float, str)):
            pairs[f"tensorrt.extra_runtime_args.{name}"] = (value, plain(getattr(arguments, name, None)))
    common.refuse_changes(pairs, facts)


def describe_effective(config: ExperimentConfig, arguments: Any) -> dict[str, Any]:
    section = section_of(config, TensorRTConfig).to_dict() | common.effective_values(arguments, OPTIONS)
    section |= config.engine_lengths()
    has_drafter = any(look_up(arguments, f"speculative_config.{name}") is not None for name in _DRAFT_MODEL)
    section["draft_model"] = section["draft_model"] if has_drafter else None
    sampling = sampling_settings(config)
    return {
        "tensorrt": section,
        "decoder": common.describe_decoder(config.decoder, sampling, is_sampling=not config.decoder.is_greedy),
        "fp_precision": getattr(arguments, "dtype", None),
        "ignore_eos": config.ignore_eos,
        "random_seed": config.random_seed,
        "sampling": sampling,
        "engine": _describe(arguments),
    }


def _describe(arguments: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in sorted(getattr(type(arguments), "model_fields", None) or vars(arguments)):
        if name.startswith("_") or any(word in name.split("_") for word in _SECRETS) or name in {"model", "tokenizer"}:
            continue
        value = getattr(arguments, name, None)
        inner = getattr(type(value), "model_fields", None)
        out[name] = plain(value if inner is None else {key: getattr(value, key, None) for key in sorted(inner)})
    return out


# --- checkpoints, which the PyTorch flow takes as they are

_broken = functools.partial(common.model_error, hint="download the checkpoint again")

# The files that describe one, with the sections that are read.
_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"hf_quant_config.json": ("quantization",), "config.json": ("text_config", "quantization_config")}
)

# How one names its quantization (hf_quant_config.json of ModelOpt, quantization_config of transformers).
_ALGORITHMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp8": ("fp8",),
        "int8_sq": ("w8a8_sq", "smoothquant"),
        "int8_weight_only": ("w8a16",),
        "int4_awq": ("w4a16_awq", "awq"),
        "int4_gptq": ("w4a16_gptq", "gptq"),
    }
)

# The type of the weights has either name. TensorRT-LLM's ModelLoader ignores `dtype` and takes what config.json says,
# or bfloat16 (ModelConfig.torch_dtype; TensorRT-LLM 1.0 to 1.3).
_TYPE_KEYS = ("dtype", "torch_dtype")
_DEFAULT_TYPE = "bfloat16"


def documents_of(folder: Path) -> dict[str, Any]:
    found = {}
    for name, sections in _FILES.items():
        path = folder / name
        try:
            document = durable.read_json(path)
        except (FileNotFoundError, ValueError):
            continue
        except OSError as error:
            raise _broken(f"{path}: cannot be read: {durable.reason_of(error)}") from error
        _check_object(document, str(path))
        for section in sections:
            _check_object(document.get(section) or {}, f"{path}: {section}")
        found[name] = document
    return found


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _broken(f"{where}: expected an object, got {shown(value)}")


def check_checkpoint(config: ExperimentConfig, documents: Mapping[str, Any], facts: EngineFacts) -> None:
    """Refuse a checkpoint of another type or quantization than requested, or with code that would run unasked."""
    name, refusals = config.model.name, []
    requested, found = section_of(config, TensorRTConfig).quantization, quantization_of(documents)
    if requested is not None:
        is_other = found is not None and not found.lower().startswith(_ALGORITHMS.get(requested, ()))
        if is_other or (found is None) != (requested == "none"):
            what = "not quantized" if found is None else f"quantized to {found}"
            reason = f"{requested}: {name} is {what}, and the PyTorch flow loads checkpoints as they are"
            refusals.append(("tensorrt.quantization", reason))
    declared = next((place[key] for place in _descriptions(documents) for key in _TYPE_KEYS if place.get(key)), None)
    precision = str(declared or _DEFAULT_TYPE).removeprefix("torch.")
    if precision != config.fp_precision:
        what = f"is {precision}" if declared else f"has no type, so it is {precision}"
        reason = f"{config.fp_precision}: {name} {what}, and the PyTorch flow loads a checkpoint in its own type"
        refusals.append(("fp_precision", reason))
    # Its ModelLoader runs any code that a checkpoint's configuration names (TensorRT-LLM 1.0 to 1.3).
    if not config.model.trust_remote_code and documents.get("config.json", {}).get("auto_map"):
        reason = f"false: {name} contains code, which TensorRT-LLM always runs"
        refusals.append(("model.trust_remote_code", reason))
    common.refuse(refusals, facts, "request what the checkpoint has, or use another checkpoint")


def _descriptions(documents: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    description = documents.get("config.json", {})
    return description, description.get("text_config") or {}


def quantization_of(documents: Mapping[str, Any]) -> str | None:
    modelopt = documents.get("hf_quant_config.json", {}).get("quantization") or {}
    own = documents.get("config.json", {}).get("quantization_config") or {}
    name = modelopt.get("quant_algo") or own.get("quant_algo") or own.get("quant_method")
    return str(name) if name else None


def vocabulary_of(documents: Mapping[str, Any]) -> int | None:
    size = next((place["vocab_size"] for place in _descriptions(documents) if place.get("vocab_size")), None)
    return size if isinstance(size, int) else None
