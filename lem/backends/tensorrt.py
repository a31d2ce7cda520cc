"""The tensorrt backend: TensorRT-LLM's `LLM`, in its default PyTorch flow. It awaits a run on hardware.

TensorRT-LLM runs on NVIDIA GPUs alone, so what is known of it here comes from its documentation (1.0 to 1.3) and was
tried against a stub that takes the documented arguments and no others. What an installation found has or lacks is
looked up in its own classes when it loads, and an option that it cannot honour is refused.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lem.backends.protocol import (
    Backend,
    Completion,
    EngineReport,
    OnProgress,
    RequestQueue,
    TokenRequest,
    say_nothing,
)
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError

if TYPE_CHECKING:
    from lem.backends.tensorrt_session import Session

__all__ = ["TensorRTBackend", "create"]


class TensorRTBackend:
    """`Backend` on TensorRT-LLM.

    Args:
        find_gpus: the UUIDs of the GPUs that CUDA sees, in its order; by default as PyTorch tells.
    """

    name = "tensorrt"

    def __init__(self, find_gpus: Callable[[], tuple[str, ...]] | None = None) -> None:
        self._find_gpus = find_gpus
        self._session: Session | None = None

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        self.unload()
        _require_package()
        os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
        try:
            from lem.backends.tensorrt_session import Session
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(
                f"TensorRT-LLM cannot be imported by {sys.executable}: {error}",
                "it needs a GPU, its driver, and an image of its own: nvcr.io/nvidia/tensorrt-llm/release",
                kind="engine",
                is_permanent=True,
            ) from error
        self._session = Session(config, secrets, self._find_gpus)
        return self._session.report()

    def configure(self, config: ExperimentConfig) -> EngineReport:
        self._there.configure(config)
        return self._there.report()

    def encode(self, text: str) -> list[int]:
        return self._there.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._there.decode(token_ids)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        return self._there.generate(requests, observe_tokens=observe_tokens, on_progress=on_progress)

    def serve(self, queue: RequestQueue) -> None:
        self._there.serve(queue)

    def synchronize(self) -> None:
        # A token is handed over once it was read from the device, so nothing is under way when the last one is here.
        pass

    def reset_peak_memory(self) -> None:
        # The engine takes its memory when it loads, and its processes tell of no peak.
        pass

    def peak_memory_b(self) -> int | None:
        return None

    def unload(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def _there(self) -> Session:
        if self._session is None:
            raise EngineError("no model is loaded")
        return self._session


def create() -> Backend:
    """The backend, nothing loaded."""
    return TensorRTBackend()


def _require_package() -> None:
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise EngineError(
            f"the tensorrt backend needs tensorrt_llm, which {sys.executable} does not have",
            "run it in NVIDIA's image (nvcr.io/nvidia/tensorrt-llm/release), or name another Python with --python",
            kind="engine",
            is_permanent=True,
        )
