"""The pytorch backend on the CPU, which says that it runs on the double's GPU and tells the double when it works."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lem.engines
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import (
    Backend,
    Completion,
    EngineReport,
    OnProgress,
    RequestQueue,
    TokenRequest,
    say_nothing,
)
from tests.gpu.load import say_busy
from tests.gpu.rehearsed import UUID, Rehearsal

__all__ = ["RehearsedBackend", "create"]


def create() -> Backend:
    """The backend, nothing loaded.

    Raises:
        RuntimeError: this is no rehearsal.
    """
    rehearsal = Rehearsal.under_way()
    if rehearsal is None:
        raise RuntimeError("the rehearsed backend is for rehearsals")
    backend: Backend = RehearsedBackend(_real_module().create(), rehearsal.load_log)
    return backend


def _real_module() -> Any:
    """lem's own module, past the finder that put this one in its place."""
    path = Path(str(lem.engines.__file__)).with_name("pytorch.py")
    spec = importlib.util.spec_from_file_location("rehearsed_lem_backends_pytorch", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RehearsedBackend:
    """The backend; what is not here is the real one's."""

    name = "pytorch"

    def __init__(self, real: Any, load_log: Path) -> None:
        self._real = real
        self._load_log = load_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        return _on_gpu(self._real.load(_on_cpu(config), secrets))

    def configure(self, config: ExperimentConfig) -> EngineReport:
        return _on_gpu(self._real.configure(_on_cpu(config)))

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        say_busy(self._load_log, 1)
        try:
            found: list[Completion] = self._real.generate(
                requests, observe_tokens=observe_tokens, on_progress=on_progress
            )
        finally:
            say_busy(self._load_log, 0)
        return found

    def serve(self, queue: RequestQueue) -> None:
        raise NotImplementedError("no step of this program serves traffic")


def _on_cpu(config: ExperimentConfig) -> ExperimentConfig:
    return ExperimentConfig.from_dict({**config.to_dict(), "gpus": []})


def _on_gpu(report: EngineReport) -> EngineReport:
    return dataclasses.replace(report, device="cuda", gpu_uuids=(UUID,))
