"""The pytorch backend on the CPU, which says that it runs on the double's GPU and tells the double when it works."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import (
    Completion,
    Engine,
    EngineReport,
    OnProgress,
    RequestQueue,
    TokenRequest,
    say_nothing,
)
from tests.gpu.load import say_busy
from tests.gpu.rehearsed import UUID, Rehearsal


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """The engine."""
    from lem.engines.pytorch.session import Session

    rehearsal = Rehearsal.under_way()
    if rehearsal is None:
        raise RuntimeError("the rehearsed backend is for rehearsals")
    engine: Engine = RehearsedEngine(Session(_on_cpu(config), secrets), rehearsal.load_log)
    return engine


def pulse(pulse_s: float) -> Iterator[tuple[int, int]]:
    """Pulses of work, with rests between."""
    rehearsal = Rehearsal.under_way()
    if rehearsal is None:
        raise RuntimeError("the rehearsed backend is for rehearsals")
    for _ in range(2):
        time.sleep(pulse_s)
        opened_ns = say_busy(rehearsal.load_log, 1)
        time.sleep(pulse_s)
        yield opened_ns, say_busy(rehearsal.load_log, 0)
    time.sleep(pulse_s)


class RehearsedEngine:
    """The engine; what is not here is the real one's."""

    def __init__(self, real: Any, load_log: Path) -> None:
        self._real = real
        self._load_log = load_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def report(self) -> EngineReport:
        report: EngineReport = self._real.report
        return dataclasses.replace(report, device="cuda", gpu_uuids=(UUID,))

    def configure(self, config: ExperimentConfig) -> None:
        self._real.configure(_on_cpu(config))

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
