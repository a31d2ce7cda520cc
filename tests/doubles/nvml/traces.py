"""Scripted GPUs: what they draw, what their meters say about it, and the script that has the NVML double say the same.

    trace = random_trace(1, 0.5, with_window=(open_ns, close_ns))   # or a Trace written out
    NvmlDouble(path).say(*trace.lines())                            # a process then meters it by NVML, in real time
    log = simulate_log(trace, start_ns, end_ns)                     # or this is what it would have logged
    trace.energy_j(open_ns, close_ns)                               # what was really drawn

Times of a GPU are seconds since the trace's origin, which is a time of CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from lem.meters.samples import (
    ClockPair,
    CounterChange,
    GpuHeader,
    GpuSample,
    ProcessesSeen,
    RaplReading,
    RaplZone,
    SampleHeader,
    SampleLog,
)
from tests.doubles.nvml.gpus import AVERAGE, NS_PER_S, Events, GpuProcess, GpuTrace, Load, Thermal
from tests.doubles.nvml.power import Level, Point, PowerSignal, Ripple
from tests.doubles.nvml.sensors import Counter, Sensor
from tests.doubles.powercap import Zone

__all__ = [
    "AVERAGE",
    "NS_PER_S",
    "Counter",
    "Events",
    "GpuProcess",
    "GpuTrace",
    "Level",
    "Load",
    "Point",
    "PowerSignal",
    "Ripple",
    "Sensor",
    "Thermal",
    "Trace",
    "random_trace",
    "simulate_log",
]


@dataclass(frozen=True)
class Trace:
    """What GPUs do, and the questions that have an exact answer. Every `at_ns` is a time of CLOCK_MONOTONIC."""

    origin_ns: int
    gpus: tuple[GpuTrace, ...]
    driver: str = "580.65.06"

    def lines(self) -> list[str]:
        """The script of the NVML double."""
        head = [f"driver {self.driver}", f"count {len(self.gpus)}", f"origin {self.origin_ns}"]
        return [*head, *(line for index, gpu in enumerate(self.gpus) for line in gpu.lines(index))]

    def after_load(self, logs: Mapping[int, str] | None = None) -> Trace:
        """The trace with what the engines have written by now; `logs` by GPU stands for the files."""
        texts = logs if logs is not None else {i: _text_of(gpu.load) for i, gpu in enumerate(self.gpus)}
        gpus = [gpu.after_load(texts.get(index, ""), self.origin_ns) for index, gpu in enumerate(self.gpus)]
        return dataclasses.replace(self, gpus=tuple(gpus))

    def energy_j(self, from_ns: int, to_ns: int, gpu: int = 0) -> float:
        """What the GPU truly drew between the two."""
        return self._signal(gpu).energy_j(self.seconds(from_ns), self.seconds(to_ns))

    def power_w(self, at_ns: int, gpu: int = 0) -> float:
        """What the GPU truly draws then."""
        return self._signal(gpu).power_w(self.seconds(at_ns))

    def counter_mj(self, at_ns: int, gpu: int = 0) -> int:
        """What the energy counter says then.

        Raises:
            ValueError: the GPU has none.
        """
        counter = self.gpus[gpu].counter
        if counter is None:
            raise ValueError(f"GPU {gpu} has no energy counter")
        return counter.read_mj(self._signal(gpu), self.seconds(at_ns))

    def instant_w(self, at_ns: int, gpu: int = 0) -> float:
        """What field 186 says then, to the milliwatt.

        Raises:
            ValueError: the GPU does not have it.
        """
        return self._read_w(self.gpus[gpu].instant, at_ns, gpu)

    def average_w(self, at_ns: int, gpu: int = 0) -> float:
        """What `nvmlDeviceGetPowerUsage` says then.

        Raises:
            ValueError: the GPU does not have it.
        """
        return self._read_w(self.gpus[gpu].average, at_ns, gpu)

    def temp_c(self, at_ns: int, gpu: int = 0) -> int:
        """What the temperature sensor says then, whole degrees."""
        item = self.gpus[gpu]
        return item.thermal.read_c(self._signal(gpu), self.seconds(at_ns)) if item.thermal else item.temp_c

    def event_mask(self, at_ns: int, gpu: int = 0) -> int:
        """The clock-event bits then."""
        at_s, mask = self.seconds(at_ns), 0
        for item in self.gpus[gpu].events:
            mask |= item.mask if item.from_s <= at_s < item.to_s else 0
        return mask

    def sm_clock_mhz(self, at_ns: int, gpu: int = 0) -> int:
        """The SM clock then."""
        return _step(self.gpus[gpu].sm_clocks_mhz, self.seconds(at_ns), 1980)

    def utilisation_percent(self, at_ns: int, gpu: int = 0) -> int:
        """The GPU's utilisation then."""
        return _step(self.gpus[gpu].utilisation_percent, self.seconds(at_ns), 0)

    def pids(self, at_ns: int, gpu: int = 0) -> tuple[int, ...]:
        """The processes on the GPU then."""
        at_s = self.seconds(at_ns)
        return tuple(held.pid for held in self.gpus[gpu].processes if held.from_s <= at_s < held.to_s)

    def seconds(self, at_ns: int) -> float:
        """That time as the times of the GPUs are."""
        return (at_ns - self.origin_ns) / NS_PER_S

    def nanoseconds(self, at_s: float) -> int:
        """A time of the GPUs on CLOCK_MONOTONIC."""
        return self.origin_ns + round(at_s * NS_PER_S)

    def _read_w(self, sensor: Sensor | None, at_ns: int, gpu: int) -> float:
        if sensor is None:
            raise ValueError(f"GPU {gpu} has no such power sensor")
        return sensor.read_mw(self._signal(gpu), self.seconds(at_ns)) / 1000

    def _signal(self, gpu: int) -> PowerSignal:
        if self.gpus[gpu].load is not None:
            raise ValueError(f"GPU {gpu} follows an engine: ask after_load()")
        return self.gpus[gpu].signal


def _step(steps: Sequence[tuple[float, int]], at_s: float, before: int) -> int:
    """The last value since then; the first holds before it, too."""
    value = steps[0][1] if steps else before
    for since_s, later in steps:
        value = later if since_s <= at_s else value
    return value


def _text_of(load: Load | None) -> str:
    path = Path(load.path) if load else None
    return path.read_text(encoding="ascii") if path and path.exists() else ""


def simulate_log(
    trace: Trace,
    start_ns: int,
    end_ns: int,
    *,
    poll_ms: float = 20.0,
    interval_ms: int = 100,
    poll_jitter_ms: float = 0.0,
    seed: int = 0,
    gaps: Sequence[tuple[int, int]] = (),
    zones: Sequence[Zone] = (),
) -> SampleLog:
    """What an ideal sampler would log of that trace: it polls from `start_ns` until `end_ns`, and no poll takes time.

    Args:
        poll_jitter_ms: every poll is late by up to that; more than `poll_ms` makes no sense.
        gaps: (from, to) during which the sampler sleeps.
        zones: RAPL zones, read once a second; pairs of clocks come every ten.
    """
    jitter = random.Random(seed)
    step_ns = round(poll_ms * 1e6)
    polls = [at_ns + round(jitter.random() * poll_jitter_ms * 1e6) for at_ns in range(start_ns, end_ns + 1, step_ns)]
    polls = [at_ns for at_ns in polls if not any(from_ns <= at_ns < to_ns for from_ns, to_ns in gaps)]
    ticks = _every(polls, interval_ms * 1_000_000)
    seconds = _every(polls, NS_PER_S)
    log = SampleLog(
        header=_header(trace, start_ns, interval_ms, zones),
        counters=tuple(row for gpu in range(len(trace.gpus)) for row in _changes(trace, gpu, polls)),
        samples=tuple(_sample(trace, gpu, at_ns) for at_ns in ticks for gpu in range(len(trace.gpus))),
        rapl=tuple(
            RaplReading(index, at_ns, zone.energy_uj(at_ns)) for at_ns in seconds for index, zone in enumerate(zones)
        ),
        processes=tuple(row for gpu in range(len(trace.gpus)) for row in _processes(trace, gpu, seconds)),
        clocks=tuple(ClockPair(at_ns, _utc(at_ns, start_ns)) for at_ns in _every(polls, 10 * NS_PER_S)[1:]),
    )
    return dataclasses.replace(
        log,
        counters=tuple(sorted(log.counters, key=lambda row: row.at_ns)),
        processes=tuple(sorted(log.processes, key=lambda row: row.at_ns)),
    )


def _utc(at_ns: int, start_ns: int) -> str:
    """The time of day then, in a log that was begun as 2026 was."""
    return (datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=(at_ns - start_ns) / 1000)).isoformat()


def _every(polls: Sequence[int], interval_ns: int) -> list[int]:
    """The first poll of every interval, and the last one."""
    chosen: list[int] = []
    for at_ns in polls:
        if not chosen or (at_ns - polls[0]) // interval_ns > (chosen[-1] - polls[0]) // interval_ns:
            chosen.append(at_ns)
    return chosen if not polls or chosen[-1] == polls[-1] else [*chosen, polls[-1]]


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


def random_trace(
    seed: int,
    counter_period_s: float = 0.1,
    *,
    with_window: tuple[int, int],
    idle_w: float | None = None,
    busy_w: float | None = None,
    mode: str = "closed",
    counter_jitter: float = 0.05,
) -> Trace:
    """One GPU that works in the window and about as real ones do: the same for the same arguments.

    In `closed` mode it idles, works from the window's start to its end, and relaxes: most of the way within some
    10 ms, the rest over seconds. In `steady` mode it works from 5 s before until 5 s after. The work changes its power
    every few seconds, in steps and ramps, with ripples of 10 and 20 Hz and of a frequency of its own.

    Args:
        with_window: its edges on CLOCK_MONOTONIC; the trace's origin is the first.
        counter_jitter: by how much of the period the counter's updates are off, at most.
    """
    chance = random.Random(f"{seed}/{mode}")
    length_s = (with_window[1] - with_window[0]) / NS_PER_S
    idle_w = chance.uniform(45.0, 130.0) if idle_w is None else idle_w
    busy_w = chance.uniform(2.5, 6.0) * idle_w if busy_w is None else busy_w
    before_s = 5.0 if mode == "steady" else 0.0
    signal = PowerSignal(
        points=_ramps(chance, 0.0 - before_s, length_s + before_s, 0.05 * busy_w),
        levels=_work(chance, 0.0 - before_s, length_s + before_s, idle_w, busy_w),
        ripples=_ripples(chance, 0.0 - before_s, length_s + before_s, busy_w),
    )
    counter = Counter(
        period_s=counter_period_s,
        jitter_s=counter_jitter * counter_period_s,
        phase_s=chance.uniform(0.0, counter_period_s),
        offset_mj=chance.randrange(10**8, 10**10),
        seed=chance.randrange(2**32),
    )
    instant = Sensor(window_s=chance.choice((0.025, 0.1)), jitter_s=0.005, phase_s=chance.uniform(0.0, 0.1), seed=seed)
    limit_w = math.ceil(1.3 * busy_w / 50) * 50.0
    gpu = GpuTrace(signal=signal, counter=counter, instant=instant, thermal=Thermal(), power_limit_w=limit_w)
    return Trace(origin_ns=with_window[0], gpus=(gpu,))


def _work(chance: random.Random, from_s: float, to_s: float, idle_w: float, busy_w: float) -> tuple[Level, ...]:
    """Idle, work whose level changes now and then, and back in two stages."""
    levels = [Level(from_s - 1.0, idle_w)]
    at_s = from_s
    while at_s < to_s:
        levels.append(Level(at_s, busy_w * chance.uniform(0.85, 1.0), chance.uniform(0.01, 0.06)))
        at_s += chance.uniform(0.5, 4.0)
    relaxing_w = idle_w + chance.uniform(0.0, 0.04) * (busy_w - idle_w)
    fast_s = chance.uniform(0.01, 0.05)
    return (*levels, Level(to_s, relaxing_w, fast_s), Level(to_s + 8 * fast_s, idle_w, chance.uniform(0.5, 2.0)))


def _ramps(chance: random.Random, from_s: float, to_s: float, most_w: float) -> tuple[Point, ...]:
    """Straight pieces between 0 and `most_w` while it works, nothing outside."""
    points = [Point(from_s, 0.0)]
    at_s = from_s + chance.uniform(0.2, 2.0)
    while at_s < to_s:
        points.append(Point(at_s, chance.uniform(0.0, most_w)))
        at_s += chance.uniform(0.2, 2.0)
    return (*points, Point(to_s, points[-1].power_w), Point(to_s, 0.0))


def _ripples(chance: random.Random, from_s: float, to_s: float, busy_w: float) -> tuple[Ripple, ...]:
    frequencies_hz = (10.0, 20.0, chance.uniform(1.0, 50.0))
    return tuple(
        Ripple(from_s, to_s, busy_w * chance.uniform(0.0, 0.08), hz, chance.uniform(0.0, 2 * math.pi))
        for hz in frequencies_hz
    )
