"""What of an experiment TensorRT-LLM cannot honour here, as far as that shows before a model is loaded.

Nothing here imports an engine: what is found of it comes in as facts. lem uses the PyTorch flow, the default of its
`LLM` since 1.0, which loads checkpoints as they are: it builds no engine and quantizes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
from lem.errors import OptionRefused

__all__ = ["check_options", "check_quantization", "quantization_of"]

_BUILDING = "belongs to the flow that builds engines; the PyTorch flow, which is TensorRT-LLM's default, builds none"
_CALIBRATING = "the PyTorch flow quantizes nothing; calibrate when the checkpoint is made (NVIDIA ModelOpt)"

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

# How a checkpoint names its quantization (hf_quant_config.json of ModelOpt, quantization_config of transformers).
_ALGORITHMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp8": ("fp8",),
        "int8_sq": ("w8a8_sq", "smoothquant"),
        "int8_weight_only": ("w8a16",),
        "int4_awq": ("w4a16_awq", "awq"),
        "int4_gptq": ("w4a16_gptq", "gptq"),
    }
)


@dataclass(frozen=True)
class _Refusal:
    option: str
    reason: str


def check_options(config: ExperimentConfig, facts: EngineFacts) -> None:
    """Refuse what cannot be honoured here, everything at once.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    _raise(
        [
            *_building(config),
            *_unknown(config, facts),
            *_sampling(config, facts),
            *_extra(config, facts),
        ],
        facts,
    )


def check_quantization(config: ExperimentConfig, found: str | None, facts: EngineFacts) -> None:
    """Refuse a checkpoint that is quantized otherwise than asked for.

    Args:
        found: how the checkpoint names its quantization; None for one that has none.

    Raises:
        OptionRefused: names both.
    """
    wanted = section_of(config).quantization
    if wanted is None:
        return
    algorithms = _ALGORITHMS.get(wanted, ())
    if (found is None) != (wanted == "none") or (found is not None and not found.lower().startswith(algorithms)):
        what = "not quantized" if found is None else f"quantized to {found}"
        reason = f"{config.model.name} is {what}, and the PyTorch flow takes checkpoints as they are"
        _raise([_Refusal("tensorrt.quantization", f"{wanted}: {reason}")], facts)


def _raise(refusals: list[_Refusal], facts: EngineFacts) -> None:
    if refusals:
        listed = "; ".join(f"{refusal.option}: {refusal.reason}" for refusal in refusals)
        raise OptionRefused(f"{facts} cannot honour {listed}", "leave the option out, or change what it needs")


def _building(config: ExperimentConfig) -> Iterator[_Refusal]:
    section = section_of(config)
    for name in BUILD_OPTIONS:
        if getattr(section, name) not in (None, {}):
            yield _Refusal(f"tensorrt.{name}", _BUILDING)
    if section.calibration != TensorRTCalibrationConfig():
        yield _Refusal("tensorrt.calibration", _CALIBRATING)


def _unknown(config: ExperimentConfig, facts: EngineFacts) -> Iterator[_Refusal]:
    """Options whose argument this version does not have."""
    section = section_of(config)
    for options, known, where in (
        (ARGUMENTS, facts.arguments, "LLM"),
        (CACHE_ARGUMENTS, facts.cache_arguments, "KvCacheConfig"),
    ):
        for name, argument in options.items():
            if getattr(section, name) is not None and argument not in known:
                yield _Refusal(f"tensorrt.{name}", f"{where} has no {argument}")
    if section.draft_model is not None and not facts.draft_arguments & {*DRAFT_MODEL_ARGUMENTS}:
        yield _Refusal("tensorrt.draft_model", "DraftTargetDecodingConfig has no argument for a model")


def _sampling(config: ExperimentConfig, facts: EngineFacts) -> Iterator[_Refusal]:
    decoder = config.decoder
    for name in sorted(sampling_settings(config).keys() - facts.sampling_arguments):
        yield _Refusal(f"decoder.{name}", f"SamplingParams has no {name}")
    if not decoder.is_greedy and config.random_seed is not None:
        yield _Refusal(
            "random_seed",
            "its sampler draws for all requests of a batch from one generator, so seeds of requests do nothing; "
            "decode greedily, or set random_seed to null",
        )
    if decoder.repetition_penalty != 1.0 and not facts.has_penalties:
        yield _Refusal("decoder.repetition_penalty", "the sampler of this version knows no penalties")


def _extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[_Refusal]:
    for name in runtime_extra(config):
        reason = _reason_against(name, facts)
        if reason is not None:
            yield _Refusal(f"tensorrt.extra_runtime_args.{name}", reason)


def _reason_against(name: str, facts: EngineFacts) -> str | None:
    if name in _OWNED:
        return f"is set by {_OWNED[name]}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name not in facts.arguments:
        return f"LLM has no such argument{_nearest(name, facts.arguments - _OWNED.keys() - _REFUSED.keys())}"
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def quantization_of(documents: Mapping[str, Any]) -> str | None:
    """How a checkpoint names its quantization; None for one that has none.

    Args:
        documents: its JSON files by name: `hf_quant_config.json` (ModelOpt) and `config.json` (transformers).
    """
    modelopt = documents.get("hf_quant_config.json") or {}
    algorithm = (modelopt.get("quantization") or {}).get("quant_algo")
    if algorithm:
        return str(algorithm)
    own = (documents.get("config.json") or {}).get("quantization_config") or {}
    name = own.get("quant_algo") or own.get("quant_method")
    return str(name) if name else None
