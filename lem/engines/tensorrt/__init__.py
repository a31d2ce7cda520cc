"""The tensorrt backend: TensorRT-LLM's `LLM`, in its default PyTorch flow. It awaits a run on hardware.

TensorRT-LLM runs on NVIDIA GPUs only, so this code follows its documentation (1.0 to 1.3) and was tested with a stub
that takes the documented arguments and no others. What the installed version supports is read from its own classes
when it loads; an option that it does not support is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from lem.config.experiment import ExperimentConfig
from lem.engines.common import importing
from lem.engines.protocol import Engine

_IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"


def load(
    config: ExperimentConfig, secrets: Mapping[str, str], find_gpus: Callable[[], tuple[str, ...]] | None = None
) -> Engine:
    """See `Engine`; `find_gpus` replaces PyTorch's answer: the UUIDs of the GPUs that CUDA sees, in its order."""
    os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
    hint = f"it requires a GPU with its driver, and its own image: {_IMAGE}"
    with importing("tensorrt", "TensorRT-LLM", hint, f"run it in NVIDIA's image ({_IMAGE})"):
        from lem.engines.tensorrt.session import Session
    return Session(config, secrets, find_gpus)
