"""What TensorRT-LLM made of the options: its arguments after the load, beside the requested ones. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lem.backends.effective import describe_decoder, plain, refuse_changes
from lem.backends.tensorrt_options import (
    ARGUMENTS,
    CACHE_ARGUMENTS,
    DRAFT_MODEL_ARGUMENTS,
    EngineFacts,
    cache_arguments,
    lengths_of,
    runtime_extra,
    section_of,
)
from lem.config.experiment_config import ExperimentConfig

__all__ = ["describe_effective", "refuse_differences"]

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
