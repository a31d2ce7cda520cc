"""The sample log of a synthetic attempt: idle, load, warm-up, window, idle again, with the energy it must come to."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lem.base.measurement import GUARD_AFTER, GUARD_BEFORE, IDLE_BARE, IDLE_LOADED, IDLE_POST, LOAD, WARMUP, WINDOW
from lem.meters.samples import CounterChange, GpuHeader, GpuSample, Mark, SampleHeader, SampleLog

# Bits of nvmlClocksEventReasons.
EVENT_IDLE = 0x1
EVENT_POWER_CAP = 0x4
EVENT_THERMAL = 0x40

_COUNTER_PERIOD_S = 0.1
_POLL_S = 0.02
_NS = 1_000_000_000


@dataclass(frozen=True)
class LogPlan:
    """What a log shows.

    Attributes:
        gpus: their headers.
        window_power_w, window_s: of one GPU; their product is the energy of its window.
        load_s: None when the engine was reused: then there is neither load nor bare idle.
        throttled_s, capped_s: how long the window was slowed by heat, or held by the power limit.
    """

    host: str
    gpus: Sequence[GpuHeader]
    started_ns: int
    started_utc: str
    window_power_w: float
    window_s: float
    idle_bare_power_w: float
    idle_loaded_power_w: float
    load_s: float | None
    warmup_s: float
    temp_start_c: float
    temp_end_c: float
    throttled_s: float = 0.0
    capped_s: float = 0.0
    interval_ms: int = 100


def make_log(plan: LogPlan, noise: random.Random) -> tuple[SampleLog, tuple[Mark, ...]]:
    """The log and its marks; the counters are exact, the power carries a ripple of 1 %."""
    marks = _marks(plan)
    header = SampleHeader(
        plan.started_ns, plan.started_utc, plan.host, plan.interval_ms, tuple(plan.gpus), rapl_error="not readable"
    )
    powers = [_power(plan, mark.name) for mark in marks]
    ends = [mark.closed_ns for mark in marks]
    duration_ns = ends[-1] - plan.started_ns
    counters: list[CounterChange] = []
    samples: list[GpuSample] = []
    for gpu in range(len(plan.gpus)):
        counters += _counter(gpu, plan.started_ns, duration_ns, ends, powers)
        for offset_ns in range(0, duration_ns, plan.interval_ms * 1_000_000):
            at_ns = plan.started_ns + offset_ns
            index = min(bisect.bisect_right(ends, at_ns), len(ends) - 1)
            samples.append(_sample(plan, gpu, at_ns, marks[index], powers[index], noise))
    return SampleLog(header, counters=tuple(counters), samples=tuple(samples)), marks


def _marks(plan: LogPlan) -> tuple[Mark, ...]:
    phases = [(IDLE_BARE, 10.0), (LOAD, plan.load_s)] if plan.load_s is not None else []
    phases += [
        (IDLE_LOADED, 10.0),
        (WARMUP, plan.warmup_s),
        (GUARD_BEFORE, 2 * _COUNTER_PERIOD_S),
        (WINDOW, plan.window_s),
        (GUARD_AFTER, 2 * _COUNTER_PERIOD_S),
        (IDLE_POST, 5.0),
    ]
    marks = []
    now_ns = plan.started_ns
    for name, seconds in phases:
        marks.append(Mark(name, now_ns, now_ns := now_ns + round((seconds or 0.0) * _NS)))
    return tuple(marks)


def _power(plan: LogPlan, phase: str) -> float:
    if phase == IDLE_BARE:
        return plan.idle_bare_power_w
    if phase == LOAD:
        return 1.5 * plan.idle_loaded_power_w
    return plan.window_power_w if phase in (WARMUP, WINDOW) else plan.idle_loaded_power_w


def _counter(
    gpu: int, started_ns: int, duration_ns: int, ends: Sequence[int], powers: Sequence[float]
) -> list[CounterChange]:
    changes = []
    energy_j, last_ns, index = 1000.0, started_ns, 0
    for step in range(int(duration_ns / _NS / _COUNTER_PERIOD_S) + 1):
        at_ns = started_ns + round(step * _COUNTER_PERIOD_S * _NS)
        while index < len(ends) - 1 and ends[index] < at_ns:
            energy_j += powers[index] * (ends[index] - last_ns) / _NS
            last_ns = ends[index]
            index += 1
        energy_j += powers[index] * (at_ns - last_ns) / _NS
        last_ns = at_ns
        before_ns = at_ns - round(_POLL_S * _NS) if step else at_ns
        changes.append(CounterChange(gpu, before_ns, at_ns, round(1000 * energy_j)))
    return changes


def _sample(plan: LogPlan, gpu: int, at_ns: int, mark: Mark, power_w: float, noise: random.Random) -> GpuSample:
    is_busy = mark.name in (WARMUP, WINDOW)
    into_s = (at_ns - mark.opened_ns) / _NS
    share = min(into_s / max(plan.window_s, 1e-9), 1.0) if mark.name == WINDOW else float(mark.name == IDLE_POST)
    mask = 0 if is_busy else EVENT_IDLE
    if mark.name == WINDOW:
        mask |= EVENT_THERMAL * (into_s < plan.throttled_s) | EVENT_POWER_CAP * (into_s < plan.capped_s)
    return GpuSample(
        gpu,
        at_ns,
        power_w=round(power_w * (1 + noise.gauss(0, 0.01)), 3),
        temp_c=round(plan.temp_start_c + share * (plan.temp_end_c - plan.temp_start_c)),
        sm_clock_hz=1.2e9 if mask & EVENT_THERMAL else 1.98e9 if is_busy else 3.45e8,
        util_ratio=0.98 if is_busy else 0.0,
        memory_b=(1 << 30) if mark.name == IDLE_BARE else (60 << 30),
        event_mask=mask,
    )
