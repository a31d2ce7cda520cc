"""The tensorrt backend: TensorRT-LLM's `LLM`, in its default PyTorch flow. It awaits a run on hardware.

TensorRT-LLM runs on NVIDIA GPUs alone, so what is known of it here comes from its documentation (1.0 to 1.3) and was
tried against a stub that takes the documented arguments and no others. What an installation found has or lacks is
looked up in its own classes when it loads, and an option that it cannot honour is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lem.config.experiment import ExperimentConfig
from lem.engines.common import SessionBackend, explain_import
from lem.engines.protocol import Backend

if TYPE_CHECKING:
    from lem.engines.tensorrt.session import Session


_IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"


class TensorRTBackend(SessionBackend["Session"]):
    """`Backend` on TensorRT-LLM.

    Args:
        find_gpus: the UUIDs of the GPUs that CUDA sees, in its order; by default as PyTorch tells.
    """

    name = "tensorrt"
    packages = ("tensorrt_llm",)
    package_hint = f"run it in NVIDIA's image ({_IMAGE}), or name another Python with --python"

    def __init__(self, find_gpus: Callable[[], tuple[str, ...]] | None = None) -> None:
        super().__init__()
        self._find_gpus = find_gpus

    def open_session(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> Session:
        """Import TensorRT-LLM and start its engine."""
        os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
        try:
            from lem.engines.tensorrt.session import Session
        except (ImportError, OSError, RuntimeError) as error:
            hint = f"it needs a GPU, its driver, and an image of its own: {_IMAGE}"
            raise explain_import("TensorRT-LLM", error, hint) from error
        return Session(config, secrets, self._find_gpus)


def create() -> Backend:
    """The backend, nothing loaded."""
    return TensorRTBackend()
