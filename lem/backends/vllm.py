"""The vllm backend: vLLM's engine, on whatever its build runs on. vLLM is imported when a model is loaded.

One engine answers closed sets, single requests and traffic: vLLM's `LLMEngine`, driven by `add_request` and `step`.
These two calls are all that `LLM.generate`, which vLLM's own offline benchmark measures, makes for a batch, so a batch
here is as fast as there; and unlike `LLM.generate` they tell how far it is, when each request was taken up and done,
and let requests join while others run. Traffic needs an engine that takes requests while it computes. The default has
it in a process of its own, exactly the one that `AsyncLLM` and the server talk to, and a thread hands requests over as
they arrive: they wait no longer for their first step than under `AsyncLLM`, without its event loop between the engine
and the clock. An engine of `AsyncLLM` could not be stepped through a closed set as `LLM` does, and a second engine for
one load would need the memory twice.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
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
    from lem.backends.vllm_session import Session

__all__ = ["VllmBackend", "create"]

# Both spellings, of older and newer versions.
_NO_TELEMETRY = ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK")


class VllmBackend:
    """`Backend` on vLLM."""

    name = "vllm"

    def __init__(self) -> None:
        self._session: Session | None = None

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        self.unload()
        _require_package()
        for name in _NO_TELEMETRY:
            os.environ.setdefault(name, "1")
        try:
            from lem.backends.vllm_session import Session
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(
                f"vLLM cannot be imported by {sys.executable}: {error}",
                "do the versions of vllm, torch and what stands beside them fit each other?",
                kind="engine",
                is_permanent=True,
            ) from error
        self._session = Session(config, secrets)
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
    return VllmBackend()


def _require_package() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            f"the vllm backend needs vllm, which {sys.executable} does not have",
            f"{sys.executable} -m pip install vllm, or name another Python with --python",
            kind="engine",
            is_permanent=True,
        )
