"""What of an experiment a checkpoint stands against: TensorRT-LLM's PyTorch flow takes one as it is.

Nothing here imports an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem import durable
from lem.backends.refusals import Refusal, refuse
from lem.backends.tensorrt_options import EngineFacts, section_of
from lem.backends.tensorrt_refusals import TYPE_KEYS
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError
from lem.jsontypes import shown

__all__ = ["check_checkpoint", "documents_of", "quantization_of", "vocabulary_of"]

# Its ModelLoader hands `dtype` to nothing, and takes what the checkpoint's config.json says: bfloat16 where that says
# nothing (ModelConfig.torch_dtype; TensorRT-LLM 1.0 to 1.3).
_AS_IT_IS = "and the PyTorch flow loads a checkpoint in its own type"
_TYPE_UNTOLD = "bfloat16"

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


# The files that describe a checkpoint, with the sections that are read of them.
_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"hf_quant_config.json": ("quantization",), "config.json": ("text_config", "quantization_config")}
)


def documents_of(folder: Path) -> dict[str, Any]:
    """The JSON files of a checkpoint that describe it, by name; those that are not there or no JSON are left out.

    Raises:
        EngineError: kind `model`, one cannot be read, or does not hold what it should.
    """
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


def _broken(message: str) -> EngineError:
    return EngineError(message, "download the checkpoint again", kind="model", is_permanent=True)


def check_checkpoint(config: ExperimentConfig, documents: Mapping[str, Any], facts: EngineFacts) -> None:
    """Refuse a checkpoint that is of another type or quantization than asked for, or whose code would be run unasked.

    Args:
        documents: its JSON files by name, as `quantization_of` takes them.

    Raises:
        OptionRefused: names what was asked for and what was found.
    """
    refuse(
        [*_quantization(config, documents), *_precision(config, documents), *_own_code(config, documents)],
        facts,
        "ask for what the checkpoint has, or name one that has what you ask for",
    )


def _quantization(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    wanted, found = section_of(config).quantization, quantization_of(documents)
    if wanted is None:
        return
    algorithms = _ALGORITHMS.get(wanted, ())
    if (found is None) != (wanted == "none") or (found is not None and not found.lower().startswith(algorithms)):
        what = "not quantized" if found is None else f"quantized to {found}"
        reason = f"{config.model.name} is {what}, and the PyTorch flow takes checkpoints as they are"
        yield Refusal("tensorrt.quantization", f"{wanted}: {reason}")


def _precision(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    told = next((place[key] for place in _descriptions(documents) for key in TYPE_KEYS if place.get(key)), None)
    found = str(told or _TYPE_UNTOLD).removeprefix("torch.")
    if found != config.fp_precision:
        what = f"{config.model.name} is {found}" if told else f"{config.model.name} tells no type, so it is {found}"
        yield Refusal("fp_precision", f"{config.fp_precision}: {what}, {_AS_IT_IS}")


def _descriptions(documents: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where the model is described; models that see as well as read describe their text part apart."""
    description = documents.get("config.json") or {}
    return description, description.get("text_config") or {}


def _own_code(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    """Its ModelLoader trusts any code that a checkpoint's configuration names (TensorRT-LLM 1.0 to 1.3)."""
    if not config.model.trust_remote_code and (documents.get("config.json") or {}).get("auto_map"):
        reason = f"{config.model.name} comes with code of its own, which TensorRT-LLM runs unasked"
        yield Refusal("model.trust_remote_code", f"false: {reason}")


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


def vocabulary_of(documents: Mapping[str, Any]) -> int | None:
    """How many token ids a checkpoint knows; None where it does not tell.

    Args:
        documents: its JSON files by name.
    """
    told = next((place["vocab_size"] for place in _descriptions(documents) if place.get("vocab_size")), None)
    return told if isinstance(told, int) else None
