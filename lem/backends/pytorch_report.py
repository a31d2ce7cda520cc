"""What was loaded and what is in effect, for the record. Imports torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from lem.backends.effective import describe_decoder, installed_versions, plain
from lem.backends.pytorch_generation import engine_settings
from lem.backends.pytorch_loading import LoadedModel
from lem.backends.pytorch_options import section_of
from lem.backends.pytorch_trial import Trial
from lem.config.backend_config import PyTorchConfig
from lem.config.experiment_config import ExperimentConfig

__all__ = ["GENERATION_META", "describe_effective", "find_versions"]

# Distributions that can change the numbers, or that an option needs.
_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "huggingface-hub",
    "kernels",
    "numpy",
    "optimum-quanto",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)
# Fields of GenerationConfig that say nothing about how tokens are generated.
GENERATION_META = ("transformers_version", "_from_model_config")


def find_versions() -> dict[str, str]:
    """The versions of the packages that are installed, by distribution."""
    return {**installed_versions(_PACKAGES), "torch": str(torch.__version__)}


def describe_effective(
    config: ExperimentConfig, loaded: LoadedModel, settings: Mapping[str, Any], trial: Trial
) -> dict[str, Any]:
    """The engine configuration as it is, as JSON values: the options as they took effect, then the rest."""
    generation = _generation(settings, config)
    model = loaded.model
    return {
        "pytorch": _section(section_of(config), loaded, generation, trial),
        "decoder": describe_decoder(config.decoder, generation, is_sampling=bool(generation["do_sample"])),
        "fp_precision": str(model.dtype).removeprefix("torch."),
        "ignore_eos": config.ignore_eos or not loaded.tokens.end_ids,
        "random_seed": config.random_seed,
        "generation": generation,
        "generation_left_out": dict(loaded.left_out),
        "model_class": type(model).__name__,
        "attention": getattr(model.config, "_attn_implementation", None),
        "device_map": {str(key): str(value) for key, value in (getattr(model, "hf_device_map", None) or {}).items()},
        "eos_token_ids": list(loaded.tokens.end_ids),
        "pad_token_id": loaded.tokens.pad_id,
        "positions": loaded.positions,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def _generation(settings: Mapping[str, Any], config: ExperimentConfig) -> dict[str, Any]:
    """Every field of the generation config that is in effect, the defaults of transformers included."""
    given = engine_settings(settings, config.max_output_tokens, config.min_output_tokens).to_dict()
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    both = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    # The lengths of a batch follow from max_new_tokens and its prompts; how steps are compiled is in the section.
    skipped = {*GENERATION_META, "max_length", "min_length", "compile_config"}
    return {name: value for name, value in sorted(both.items()) if value is not None and name not in skipped}


def _section(
    section: PyTorchConfig, loaded: LoadedModel, generation: Mapping[str, Any], trial: Trial
) -> dict[str, Any]:
    model = loaded.model
    is_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
    quantization = getattr(model.config, "quantization_config", None) if is_4bit else None
    assistant = loaded.assistant.generation_config if loaded.assistant is not None else None
    has_beams = generation["num_beams"] > 1
    return {
        **section.to_dict(),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "torch_compile_backend": (section.torch_compile_backend or "inductor") if section.torch_compile else None,
        "use_cache": trial.cache is not None,
        "cache_implementation": trial.cache,
        # Since transformers 5 the only way there is.
        "low_cpu_mem_usage": True if section.low_cpu_mem_usage is None else section.low_cpu_mem_usage,
        "load_in_4bit": is_4bit,
        "load_in_8bit": bool(getattr(model, "is_loaded_in_8bit", False)),
        **{
            name: plain(getattr(quantization, name, None))
            for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        },
        "min_p": generation.get("min_p"),
        "no_repeat_ngram_size": generation["no_repeat_ngram_size"],
        "beam_search": {
            "enabled": has_beams,
            "num_beams": generation["num_beams"],
            "length_penalty": generation["length_penalty"] if has_beams else None,
            "early_stopping": generation["early_stopping"] if has_beams else None,
        },
        "assisted_generation": {
            "model": loaded.assistant_name,
            "num_tokens": getattr(assistant, "num_assistant_tokens", None)
            or generation.get("prompt_lookup_num_tokens")
            or (generation["num_assistant_tokens"] if assistant is not None else None),
        },
    }
