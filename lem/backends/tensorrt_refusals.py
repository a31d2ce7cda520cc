"""What of an experiment TensorRT-LLM cannot honour here, as far as that shows before a model is loaded.

Nothing here imports an engine: what is found of it comes in as facts. lem uses the PyTorch flow, the default of its
`LLM` since 1.0, which loads checkpoints as they are: it builds no engine and quantizes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lem.backends.refusals import Refusal, refuse
from lem.backends.tensorrt_options import (
    ARGUMENTS,
    BUILD_OPTIONS,
    CACHE_ARGUMENTS,
    DRAFT_MODEL_ARGUMENTS,
    EngineFacts,
    runtime_extra,
    sampling_settings,
    section_of,
)
from lem.config.backend_config import TensorRTCalibrationConfig
from lem.config.experiment_config import ExperimentConfig
from lem.config.problems import did_you_mean

__all__ = ["TYPE_KEYS", "check_options"]

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
