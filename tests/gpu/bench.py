"""What steps work with: a GPU, an engine process on it, samplers, and the time that is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lem.base.clock import Clock
from lem.base.launch import own_command
from lem.meters.samples import PartReader, SampleLog
from lem.worker.children import SamplerProcess, wait_until_ready
from tests.gpu.engine_client import Engine
from tests.gpu.extent import Extent
from tests.gpu.finding import Finding, LeftOut
from tests.gpu.rehearsed import Rehearsal

INTERVAL_MS = 100
_READY_S = 30.0
_STOP_S = 10.0


@dataclass
class Sampled:
    """A stretch of time with a sampler beside it."""

    path: Path

    def log(self) -> SampleLog:
        """Its samples; whole once the stretch is over."""
        log = PartReader(self.path).read()
        error = log.header.gpus[0].counter_error
        if error is not None:
            raise LeftOut(error)
        return log


@dataclass
class Bench:
    out: Path  # the folder of everything that is kept
    models: Path  # the folder of the models, which are too large to be kept
    extent: Extent
    uuid: str  # the GPU
    environ: Mapping[str, str]  # the environment of programs that measure
    rehearsal: Rehearsal | None = None  # the double that stands for a GPU; None on a machine with one
    clock: Clock = field(default_factory=Clock)
    begun_s: float = field(default_factory=time.monotonic)
    versions: dict[str, str] = field(default_factory=dict)
    _engine: Engine | None = None

    def left_s(self) -> float:
        """Seconds until no step begins any more."""
        return self.extent.limit_s - (time.monotonic() - self.begun_s)

    def rest(self, duration_s: float) -> None:
        self.clock.sleep(duration_s)

    @property
    def samples(self) -> Path:
        return self.out / "samples"

    @contextlib.contextmanager
    def sampling(self, name: str, interval_ms: int = INTERVAL_MS) -> Iterator[Sampled]:
        """A sampler of lem's within the block."""
        self.samples.mkdir(parents=True, exist_ok=True)
        path = self.samples / f"{name}.part"
        path.unlink(missing_ok=True)
        sampler = SamplerProcess(own_command(sys.executable), path, (self.uuid,), interval_ms)
        try:
            deadline_ns = self.clock.monotonic_ns() + round(_READY_S * 1e9)
            if not wait_until_ready(path, deadline_ns, self.clock):
                raise RuntimeError(f"the sampler does not write {path}: {sampler.death() or 'no header'}")
            yield Sampled(path)
            died = sampler.death()
            if died is not None:
                raise RuntimeError(died)
        finally:
            sampler.stop(_STOP_S)

    def engine(self) -> Engine:
        """The engine process, started when it is not there."""
        if self._engine is None or not self._engine.is_running():
            rehearsed = None if self.rehearsal is None else (self.uuid, self.rehearsal.load_log)
            self._engine = Engine(self.out / "engine.log", rehearsed)
            self.versions |= self._engine.versions
            if self._engine.uuid != self.uuid:
                raise RuntimeError(f"PyTorch works on {self._engine.uuid}, sampled is {self.uuid}")
        return self._engine

    def close_engine(self) -> None:
        """End the engine process, so that nothing but what is measured is on the GPU."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class Step(Protocol):
    """Something to find out about a GPU. Steps know nothing of each other; each may fail by itself."""

    name: str  # for the command line
    title: str  # for people
    is_brief: bool = False  # whether it only reads what is there, so that it runs when time is over, too

    def run(self, bench: Bench) -> Iterator[Finding]:
        """Findings, each as soon as it is known; raises LeftOut where it cannot be found out here."""
