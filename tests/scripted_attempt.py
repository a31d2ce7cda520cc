"""An attempt on scripted GPUs, with its log, its marks and its true energy: what the figures are tested with.

Seconds since the trace's origin: at rest 0–4, load 4–7, at rest with the engine 8–11, warm-up 12–14, guard, window
15–25, guard, prefill alone 27–28 between guards, at rest 30–34.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base import measurement as names
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import AttemptLog
from lem.meters.energy import EnergyFindings, measure
from lem.meters.samples import Mark, SampleHeader, SampleLog
from lem.meters.sources import Sources, choose_sources
from tests.doubles.nvml.traces import NS_PER_S, Counter, GpuTrace, Level, PowerSignal, Trace, simulate_log
from tests.doubles.powercap import Zone

ORIGIN_NS = 5000 * NS_PER_S
BARE_W, LOADING_W, IDLE_W, LOAD_W, PREFILL_W = 60.0, 120.0, 70.0, 300.0, 400.0
END_S = 35.0

LEVELS = (
    Level(0.0, BARE_W),
    Level(4.0, LOADING_W),
    Level(7.0, IDLE_W),
    Level(12.0, LOAD_W),
    Level(14.0, IDLE_W),
    Level(15.0, LOAD_W),
    Level(25.0, IDLE_W),
    Level(27.0, PREFILL_W),
    Level(28.0, IDLE_W),
)
SPANS = {
    names.IDLE_BARE: (0.2, 3.8),
    names.LOAD: (4.0, 7.0),
    names.IDLE_LOADED: (8.0, 11.0),
    names.WARMUP: (12.0, 14.0),
    names.GUARD_BEFORE: (14.8, 15.0),
    names.WINDOW: (15.0, 25.0),
    names.GUARD_AFTER: (25.0, 25.2),
    names.IDLE_POST: (30.0, 34.0),
}
PREFILL_SPANS = {
    names.PREFILL_GUARD_BEFORE: (26.8, 27.0),
    names.PREFILL: (27.0, 28.0),
    names.PREFILL_GUARD_AFTER: (28.0, 28.2),
}


@dataclass(frozen=True)
class Attempt:
    """A log and its marks; `measured` gives the figures."""

    log: SampleLog
    marks: tuple[Mark, ...]
    trace: Trace | None = None

    def without(self, *marks: str) -> Attempt:
        return dataclasses.replace(self, marks=tuple(mark for mark in self.marks if mark.name not in marks))

    def with_header(self, **changes: Any) -> Attempt:
        header: SampleHeader = dataclasses.replace(self.log.header, **changes)
        return dataclasses.replace(self, log=dataclasses.replace(self.log, header=header))

    def with_gpu_header(self, place: int = 0, **changes: Any) -> Attempt:
        gpus = list(self.log.header.gpus)
        gpus[place] = dataclasses.replace(gpus[place], **changes)
        return self.with_header(gpus=tuple(gpus))

    def with_log(self, **changes: Any) -> Attempt:
        return dataclasses.replace(self, log=dataclasses.replace(self.log, **changes))

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(gpu.uuid for gpu in self.log.header.gpus)

    def sources(self, options: Mapping[str, Any] | None = None) -> Sources:
        return choose_sources(config(**(options or {})), self.log.header, self.uuids)

    def measured(self, *, options: Mapping[str, Any] | None = None, **arguments: Any) -> EnergyFindings:
        given = {"window_repeats": 4, **arguments}
        known = {name: given.pop(name) for name in ("baselines", "is_steady_mode") if name in given}
        return measure(AttemptLog(self.log, self.marks, self.sources(options), **known), **given)


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


def at(seconds: float) -> int:
    """A second of the script on CLOCK_MONOTONIC."""
    return ORIGIN_NS + round(seconds * NS_PER_S)


def span(name: str) -> tuple[int, int]:
    """When something was, on CLOCK_MONOTONIC."""
    opened_s, closed_s = {**SPANS, **PREFILL_SPANS}[name]
    return at(opened_s), at(closed_s)


def gpu_attempt(
    count: int = 1,
    *,
    has_prefill: bool = False,
    gaps: Sequence[tuple[float, float]] = (),
    zones: Sequence[Zone] = (),
    levels: Sequence[Level] = LEVELS,
    **changes: Any,
) -> Attempt:
    """An attempt on GPUs that are alike; `changes` are fields of their `GpuTrace`."""
    gpu = GpuTrace(signal=PowerSignal(levels=tuple(levels)), counter=Counter(phase_s=0.037))
    gpus = tuple(dataclasses.replace(gpu, **{"memory_used_b": 1000 * (place + 1), **changes}) for place in range(count))
    trace = Trace(ORIGIN_NS, gpus)
    log = simulate_log(trace, at(-1.0), at(END_S), gaps=[(at(a), at(b)) for a, b in gaps], zones=zones)
    spans = {**SPANS, **(PREFILL_SPANS if has_prefill else {})}
    return Attempt(log, tuple(Mark(name, *span(name)) for name in spans), trace)


def cpu_attempt(*zones: Zone) -> Attempt:
    """An attempt on the CPU; guards of two readings."""
    spans = {**SPANS, names.GUARD_BEFORE: (12.9, 15.0), names.GUARD_AFTER: (25.0, 27.1)}
    marks = tuple(Mark(name, at(a), at(b)) for name, (a, b) in spans.items() if name != names.WARMUP)
    log = simulate_log(Trace(ORIGIN_NS, ()), at(-1.0), at(END_S), zones=zones)
    return Attempt(log, marks)
