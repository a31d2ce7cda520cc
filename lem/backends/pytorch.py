"""The pytorch backend: transformers' `generate` on CPU or CUDA. PyTorch is imported when a model is loaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lem.backends.protocol import Backend, Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError

if TYPE_CHECKING:
    from lem.backends.pytorch_session import Session

__all__ = ["PyTorchBackend", "create"]


class PyTorchBackend:
    """`Backend` on transformers."""

    name = "pytorch"

    def __init__(self) -> None:
        self._session: Session | None = None

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        self.unload()
        _require_packages()
        try:
            from lem.backends.pytorch_session import Session, free_memory
        except (ImportError, OSError) as error:
            raise EngineError(
                f"PyTorch or transformers cannot be imported by {sys.executable}: {error}",
                "do their versions fit each other, and are the libraries they need there?",
                kind="engine",
                is_permanent=True,
            ) from error
        try:
            self._session = Session(config, secrets)
        except BaseException as error:
            free_memory(error)
            raise
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
        self._there.synchronize()

    def reset_peak_memory(self) -> None:
        self._there.reset_peak_memory()

    def peak_memory_b(self) -> int | None:
        return self._there.peak_memory_b()

    def unload(self) -> None:
        if self._session is None:
            return
        from lem.backends.pytorch_session import free_memory

        self._session = None
        free_memory()

    @property
    def _there(self) -> Session:
        if self._session is None:
            raise EngineError("no model is loaded")
        return self._session


def create() -> Backend:
    """The backend, nothing loaded."""
    return PyTorchBackend()


def _require_packages() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(
            f"the pytorch backend needs {' and '.join(missing)}, which {sys.executable} does not have",
            f"{sys.executable} -m pip install {' '.join(missing)}, or name another Python with --python",
            kind="engine",
            is_permanent=True,
        )
