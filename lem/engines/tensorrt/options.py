"""Options of the tensorrt backend: arguments, refusals, effective values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lem.base.reasons import Reason
from lem.config.backends import TensorRTCalibrationConfig, TensorRTConfig
from lem.config.experiment import ExperimentConfig
from lem.config.problems import did_you_mean
from lem.engines.common import Refusal, describe_decoder, plain, refuse, refuse_changes

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


_BUILDING = "belongs to the flow that builds engines; the PyTorch flow, which is TensorRT-LLM's default, builds none"
_CALIBRATING = "the PyTorch flow quantizes nothing; calibrate when the checkpoint is made (NVIDIA ModelOpt)"

# Under either name a configuration of transformers tells the type of the weights.
TYPE_KEYS = ("dtype", "torch_dtype")

# Arguments of LLM that an option decides.
_OWNED = MappingProxyType(
    {
        **{argument: f"tensorrt.{option}" for option, argument in ARGUMENTS.items()},
        "model": "model.name",
        "tokenizer": "model.tokenizer",
        "revision": "model.revision",
        "tokenizer_revision": "model.tokenizer",
        "trust_remote_code": "model.trust_remote_code",
        "dtype": "fp_precision",
        "max_input_len": "tensorrt.max_input_len",
        "max_seq_len": "tensorrt.max_output_len",
        "kv_cache_config": "tensorrt.gpu_memory_utilization, enable_kv_cache_reuse and kv_cache_type",
        "speculative_config": "tensorrt.draft_model and num_draft_tokens",
    }
)
_REFUSED = MappingProxyType(
    {
        "backend": "lem uses the PyTorch flow",
        "build_config": _BUILDING,
        "quant_config": "the PyTorch flow takes checkpoints that are quantized already",
        "skip_tokenizer_init": "prompts are turned into tokens with the engine's tokenizer",
        "return_perf_metrics": "the times of requests are among these metrics",
        "max_beam_width": "one answer a request is counted",
    }
)


def check_options(config: ExperimentConfig, facts: EngineFacts) -> None:
    """Refuse what cannot be honoured here, everything at once.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    refuse(
        [
            *_building(config),
            *_adapter(config),
            *_unknown(config, facts),
            *_sampling(config, facts),
            *_extra(config, facts),
        ],
        facts,
    )


def _building(config: ExperimentConfig) -> Iterator[Refusal]:
    section = section_of(config)
    for name in BUILD_OPTIONS:
        if getattr(section, name) not in (None, {}):
            yield Refusal(f"tensorrt.{name}", _BUILDING)
    if section.calibration != TensorRTCalibrationConfig():
        yield Refusal("tensorrt.calibration", _CALIBRATING)


def _adapter(config: ExperimentConfig) -> Iterator[Refusal]:
    if config.model.adapter is not None:
        yield Refusal("model.adapter", "adapters were not yet run with this backend; merge it into the checkpoint")


def _unknown(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    """Options whose argument this version does not have."""
    section = section_of(config)
    for options, known, where in (
        (ARGUMENTS, facts.arguments, "LLM"),
        (CACHE_ARGUMENTS, facts.cache_arguments, "KvCacheConfig"),
    ):
        for name, argument in options.items():
            if getattr(section, name) is not None and argument not in known:
                yield Refusal(f"tensorrt.{name}", f"{where} has no {argument}")
    if section.draft_model is not None and not facts.draft_arguments & {*DRAFT_MODEL_ARGUMENTS}:
        yield Refusal("tensorrt.draft_model", "DraftTargetDecodingConfig has no argument for a model")


def _sampling(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    decoder = config.decoder
    for name in sorted(sampling_settings(config).keys() - facts.sampling_arguments):
        yield Refusal(f"decoder.{name}", f"SamplingParams has no {name}")
    if not decoder.is_greedy and config.random_seed is not None:
        yield Refusal(
            "random_seed",
            "its sampler draws for all requests of a batch from one generator, so seeds of requests do nothing; "
            "decode greedily, or set random_seed to null",
        )
    if decoder.repetition_penalty != 1.0 and not facts.has_penalties:
        yield Refusal("decoder.repetition_penalty", "the sampler of this version knows no penalties")


def _extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    extra = runtime_extra(config)
    for name in extra:
        reason = _reason_against(name, facts)
        if reason is not None:
            yield Refusal(f"tensorrt.extra_runtime_args.{name}", reason)
    overriding = extra.get("model_kwargs")
    for key in TYPE_KEYS:
        if isinstance(overriding, Mapping) and key in overriding:
            yield Refusal(f"tensorrt.extra_runtime_args.model_kwargs.{key}", "is set by fp_precision")


def _reason_against(name: str, facts: EngineFacts) -> str | None:
    if name in _OWNED:
        return f"is set by {_OWNED[name]}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name not in facts.arguments:
        usable = sorted(facts.arguments - _OWNED.keys() - _REFUSED.keys())
        return f"LLM has no such argument{did_you_mean(name, usable)}"
    return None


_SECRETS = ("token", "key", "secret")


def refuse_differences(config: ExperimentConfig, arguments: Any, facts: EngineFacts) -> None:
    """Refuse the load when TensorRT-LLM has another value than the one asked for.

    Args:
        arguments: the engine's own, `LLM.args`.

    Raises:
        OptionRefused: as `refuse_changes`.
    """
    section = section_of(config)
    cache = getattr(arguments, "kv_cache_config", None)
    longest_input, longest_output = lengths_of(config)
    pairs: dict[str, tuple[Any, Any]] = {
        "fp_precision": (config.fp_precision, getattr(arguments, "dtype", None)),
        "tensorrt.max_output_len": (longest_input + longest_output, getattr(arguments, "max_seq_len", None)),
    }
    for option, name in ARGUMENTS.items():
        pairs[f"tensorrt.{option}"] = (getattr(section, option), getattr(arguments, name, None))
    wanted_cache = cache_arguments(config)
    for option, name in CACHE_ARGUMENTS.items():
        pairs[f"tensorrt.{option}"] = (wanted_cache.get(name), getattr(cache, name, None))
    drafting = getattr(arguments, "speculative_config", None)
    pairs["tensorrt.num_draft_tokens"] = (section.num_draft_tokens, getattr(drafting, "max_draft_len", None))
    for name, value in runtime_extra(config).items():
        if isinstance(value, (bool, int, float, str)):
            pairs[f"tensorrt.extra_runtime_args.{name}"] = (value, plain(getattr(arguments, name, None)))
    refuse_changes({name: pair for name, pair in pairs.items() if pair[0] is not None}, facts)


def describe_effective(config: ExperimentConfig, arguments: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The engine configuration as it is, as JSON values: the options as they took effect, then the rest."""
    return {
        "tensorrt": _section(config, arguments),
        "decoder": describe_decoder(config.decoder, sampling, is_sampling=not config.decoder.is_greedy),
        "fp_precision": getattr(arguments, "dtype", None),
        "ignore_eos": config.ignore_eos,
        "random_seed": config.random_seed,
        "sampling": dict(sampling),
        "engine": _describe(arguments),
    }


def _section(config: ExperimentConfig, arguments: Any) -> dict[str, Any]:
    section: dict[str, Any] = section_of(config).to_dict()
    longest_input, longest_output = lengths_of(config)
    section |= {name: plain(getattr(arguments, argument, None)) for name, argument in ARGUMENTS.items()}
    cache = getattr(arguments, "kv_cache_config", None)
    section |= {name: plain(getattr(cache, argument, None)) for name, argument in CACHE_ARGUMENTS.items()}
    section |= {"max_input_len": longest_input, "max_output_len": longest_output}
    drafting = getattr(arguments, "speculative_config", None)
    section["num_draft_tokens"] = getattr(drafting, "max_draft_len", None)
    has_drafter = any(getattr(drafting, name, None) is not None for name in DRAFT_MODEL_ARGUMENTS)
    section["draft_model"] = section["draft_model"] if has_drafter else None
    return section


def _describe(arguments: Any) -> dict[str, Any]:
    """The plain ones of the engine's arguments; those that are objects of their own, one level deep."""
    out: dict[str, Any] = {}
    for name in sorted(getattr(type(arguments), "model_fields", None) or vars(arguments)):
        if name.startswith("_") or any(word in name.split("_") for word in _SECRETS) or name in {"model", "tokenizer"}:
            continue
        value = getattr(arguments, name, None)
        fields = getattr(type(value), "model_fields", None)
        if fields is None:
            out[name] = plain(value)
        else:
            out[name] = {inner: plain(getattr(value, inner, None)) for inner in sorted(fields)}
    return out
