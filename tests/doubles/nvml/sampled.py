"""What an ideal sampler would log of scripted GPUs, without a library and without waiting."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

from lem.meters.sampler import COUNTER_POLL_MS
from lem.meters.samples import (
    ClockPair,
    CounterChange,
    CpuLoad,
    GpuHeader,
    GpuSample,
    ProcessesSeen,
    RaplReading,
    RaplZone,
    SampleHeader,
    SampleLog,
)
from tests.doubles.nvml.gpus import NS_PER_S, GpuTrace
from tests.doubles.nvml.trace import Trace
from tests.doubles.powercap import Zone


def simulate_log(
    trace: Trace,
    start_ns: int,
    end_ns: int,
    *,
    poll_ms: float = COUNTER_POLL_MS,
    interval_ms: int = 100,
    poll_jitter_ms: float = 0.0,
    seed: int = 0,
    gaps: Sequence[tuple[int, int]] = (),
    zones: Sequence[Zone] = (),
) -> SampleLog:
    """What an ideal sampler would log of that trace: it polls from `start_ns` until `end_ns`, and no poll takes time.

    Args:
        poll_jitter_ms: every look is late by up to that; more than `poll_ms` makes no sense.
        gaps: (from, to) during which the sampler sleeps; what was due is looked at once when it wakes.
        zones: RAPL zones, read once a second, as is the load of a CPU that does nothing; pairs of clocks come every
            ten.
    """
    jitter = random.Random(seed)

    def moments(step_ns: int) -> list[int]:
        """Of a schedule, each late by a little, or when the sampler wakes."""
        late = [at_ns + round(jitter.random() * poll_jitter_ms * 1e6) for at_ns in range(start_ns, end_ns + 1, step_ns)]
        return [at_ns for at_ns in dict.fromkeys(_awake(at_ns, gaps) for at_ns in late) if at_ns <= end_ns]

    polls = moments(round(poll_ms * 1e6))
    ticks = _ended(moments(interval_ms * 1_000_000), end_ns)
    seconds = _ended(moments(NS_PER_S), end_ns)
    pairs = _ended(moments(10 * NS_PER_S), end_ns)
    log = SampleLog(
        header=_header(trace, start_ns, interval_ms, zones),
        counters=tuple(row for gpu in range(len(trace.gpus)) for row in _changes(trace, gpu, polls)),
        samples=tuple(_sample(trace, gpu, at_ns) for at_ns in ticks for gpu in range(len(trace.gpus))),
        rapl=tuple(
            RaplReading(index, at_ns, zone.energy_uj(at_ns)) for at_ns in seconds for index, zone in enumerate(zones)
        ),
        loads=tuple(CpuLoad(at_ns, 0.0 if number else None) for number, at_ns in enumerate(seconds)),
        processes=tuple(row for gpu in range(len(trace.gpus)) for row in _processes(trace, gpu, seconds)),
        clocks=tuple(ClockPair(at_ns, _utc(at_ns, start_ns)) for at_ns in pairs[1:]),
    )
    return dataclasses.replace(
        log,
        counters=tuple(sorted(log.counters, key=lambda row: row.at_ns)),
        processes=tuple(sorted(log.processes, key=lambda row: row.at_ns)),
    )


def _utc(at_ns: int, start_ns: int) -> str:
    """The time of day then, in a log that was begun as 2026 was."""
    return (datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=(at_ns - start_ns) / 1000)).isoformat()


def _awake(at_ns: int, gaps: Sequence[tuple[int, int]]) -> int:
    """The moment, or the end of the gap it lies in."""
    return next((to_ns for from_ns, to_ns in gaps if from_ns <= at_ns < to_ns), at_ns)


def _ended(moments: list[int], end_ns: int) -> list[int]:
    """The moments and the log's end, at which everything but counters is looked at once more."""
    return moments if moments and moments[-1] == end_ns else [*moments, end_ns]


def _header(trace: Trace, start_ns: int, interval_ms: int, zones: Sequence[Zone]) -> SampleHeader:
    return SampleHeader(
        started_ns=start_ns,
        started_utc=_utc(start_ns, start_ns),
        host="double",
        interval_ms=interval_ms,
        gpus=tuple(_gpu_header(trace, index, gpu) for index, gpu in enumerate(trace.gpus)),
        gpu_error=None if trace.gpus else "there is no GPU",
        zones=tuple(RaplZone(zone.name, zone.name.rstrip("-0123456789"), zone.max_uj) for zone in zones),
        rapl_error=None if zones else "there is no powercap zone",
    )


def _gpu_header(trace: Trace, index: int, gpu: GpuTrace) -> GpuHeader:
    source = _power_source(gpu)
    missing = "MIG is on" if gpu.mig else "Not Supported"
    return GpuHeader(
        index=index,
        uuid=gpu.uuid or f"GPU-00000000-0000-4000-8000-{index:012d}",
        name=gpu.name,
        driver=trace.driver,
        vbios=gpu.vbios,
        power_limit_w=gpu.power_limit_w,
        persistence_mode=gpu.persistence,
        mig_mode=bool(gpu.mig),
        energy_scope=gpu.scope,
        power_source=source,
        counter_error=None if gpu.counter and not gpu.mig else missing,
        power_error=None if source else missing,
    )


def _power_source(gpu: GpuTrace) -> str | None:
    """What a sampler takes; a board that is cut into instances has nothing for it, a module no average."""
    if gpu.mig:
        return None
    if gpu.instant:
        return "instant"
    return "average" if gpu.average and gpu.scope == "gpu" else None


def _changes(trace: Trace, gpu: int, polls: Sequence[int]) -> list[CounterChange]:
    counter = trace.gpus[gpu].counter
    if counter is None or trace.gpus[gpu].mig or not polls:
        return []
    rows: list[CounterChange] = []
    before_ns, before = polls[0], None
    for at_ns in polls:
        at_s = trace.seconds(at_ns)
        # What brings a new value: an update, or a reset.
        state = counter.ticks.last(at_s), sum(reset_s <= at_s for reset_s in counter.resets_s)
        if state != before:
            value = trace.counter_mj(at_ns, gpu)
            if not rows or value != rows[-1].energy_mj:
                rows.append(CounterChange(gpu, before_ns, at_ns, value))
        before_ns, before = at_ns, state
    return rows


def _sample(trace: Trace, gpu: int, at_ns: int) -> GpuSample:
    source = _power_source(trace.gpus[gpu])
    power_w = None
    if source is not None:
        power_w = trace.instant_w(at_ns, gpu) if source == "instant" else trace.average_w(at_ns, gpu)
    return GpuSample(
        gpu=gpu,
        at_ns=at_ns,
        power_w=power_w,
        temp_c=float(trace.temp_c(at_ns, gpu)),
        sm_clock_hz=trace.sm_clock_mhz(at_ns, gpu) * 1e6,
        util_ratio=None if trace.gpus[gpu].mig else trace.utilisation_percent(at_ns, gpu) / 100,
        memory_b=trace.gpus[gpu].memory_used_b,
        event_mask=trace.event_mask(at_ns, gpu),
    )


def _processes(trace: Trace, gpu: int, times: Sequence[int]) -> list[ProcessesSeen]:
    rows: list[ProcessesSeen] = []
    for at_ns in times:
        pids = trace.pids(at_ns, gpu)
        if not rows or pids != rows[-1].pids:
            rows.append(ProcessesSeen(gpu, at_ns, pids))
    return rows
