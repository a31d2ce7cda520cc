"""Scripted GPUs: what they draw, what their meters say about it, and the script that has the NVML double say the same.

    trace = random_trace(1, 0.5, with_window=(open_ns, close_ns))   # or a Trace written out
    NvmlDouble(path).say(*trace.lines())                            # a process then meters it by NVML, in real time
    log = simulate_log(trace, start_ns, end_ns)                     # or this is what it would have logged
    trace.energy_j(open_ns, close_ns)                               # what was really drawn

Times of a GPU are seconds since the trace's origin, which is a time of CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import math
import random

from tests.doubles.nvml.gpus import AVERAGE, NS_PER_S, Events, GpuProcess, GpuTrace, Load, Thermal
from tests.doubles.nvml.power import Level, Point, PowerSignal, Ripple
from tests.doubles.nvml.sampled import simulate_log
from tests.doubles.nvml.sensors import Counter, Sensor
from tests.doubles.nvml.trace import Trace

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
