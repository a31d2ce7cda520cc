"""The curve of each kind of meter, from the rows of a sample log, and how often a counter is brought up to date."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from lem.meters.curve import HOLE_PERIODS, Curve, Hole, NotMeasured, Span
from lem.meters.samples import CounterChange, CpuLoad, GpuSample, RaplReading
from lem.units import NS_PER_S

__all__ = [
    "counter_curve",
    "load_curve",
    "may_have_wrapped_twice",
    "power_curve",
    "rapl_curve",
    "update_period_s",
]

# Enough updates on either side of one for polls that share no rhythm with the counter to have seen it at every phase:
# 19 polls of 19 ms, whatever whole number of milliseconds lies between updates.
_NEIGHBOURS = 10

# No CPU package takes so much: a zone that was not read for as long as this would need to wrap may have wrapped twice.
_MOST_PACKAGE_W = 1000.0


def counter_curve(changes: Iterable[CounterChange], gpu: int, what: str) -> Curve:
    """The energy counter of one GPU of the log.

    `nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded (NVML reference), so a value
    that falls means that it was loaded anew. A change lies between two polls; where polling had stalled, it still
    came at most one update period before it was seen. Updates are regular (an H200 kept 100.000 ms to within 1 ms over
    a minute), so the changes around one narrow down when it came.
    """
    rows = [row for row in changes if row.gpu == gpu and row.before_ns < row.at_ns]
    spacings = [after.at_ns - before.at_ns for before, after in pairwise(rows)]
    longest_ns = round(statistics.median(spacings)) if spacings else 0
    seen = [(max(row.before_ns, row.at_ns - longest_ns) if longest_ns else row.before_ns, row.at_ns) for row in rows]
    bounds = _narrowed(seen)
    energy_j, holes = [0.0] * len(rows), []
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        step_mj = after.energy_mj - before.energy_mj
        if step_mj < 0:
            fall = f"fell from {before.energy_mj} to {after.energy_mj} mJ: the driver was loaded anew"
            holes.append(Hole(Span(before.at_ns, after.at_ns), f"{what} {fall}"))
        energy_j[place] = energy_j[place - 1] + max(step_mj, 0) / 1000
    at_ns = tuple((low + high) / 2 for low, high in bounds)
    earliest, latest = tuple(low for low, _ in bounds), tuple(high for _, high in bounds)
    return Curve(what, earliest, at_ns, latest, tuple(energy_j), tuple(holes))


def _narrowed(seen: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """When each change came, (earliest, latest), by its own two polls and by those of its neighbours.

    Regular updates lie on a line, so what bounds one bounds the next ones, a period later each. Where updates are less
    regular than polls are dense, the neighbours contradict each other; the bounds are then as wide as they do.
    """
    if len(seen) <= 2 * _NEIGHBOURS:
        return list(seen)
    middles = [(low + high) / 2 for low, high in seen]
    usual_ns = statistics.median(after - before for before, after in pairwise(middles))
    if usual_ns < 2 * statistics.median(high - low for low, high in seen):
        return list(seen)  # polls are too far apart to tell how many updates lie between two changes
    counts = [0]
    for before, after in pairwise(middles):
        counts.append(counts[-1] + max(1, round((after - before) / usual_ns)))
    begun_ns = seen[0][0]
    period_ns = statistics.linear_regression(counts, [middle - begun_ns for middle in middles]).slope
    lows = [low - count * period_ns for (low, _), count in zip(seen, counts, strict=True)]
    highs = [high - count * period_ns for (_, high), count in zip(seen, counts, strict=True)]
    bounds = []
    for place, (low, high) in enumerate(seen):
        around = slice(max(0, place - _NEIGHBOURS), place + _NEIGHBOURS + 1)
        since_ns = counts[place] * period_ns
        first, last = sorted((max(lows[around]) + since_ns, min(highs[around]) + since_ns))
        bounds.append((round(min(max(first, low), high)), round(max(min(last, high), low))))
    return bounds


def power_curve(samples: Iterable[GpuSample], gpu: int, period_s: float, what: str, lag_s: float = 0.0) -> Curve:
    """The integral of a GPU's sampled power by trapezoids; more than three periods without a sample are a hole.

    A sensor that sees 25 of every 100 ms (A100, H100) aliases load with a rhythm near 10 Hz, and no sum over its
    samples undoes that (Yang et al., SC24).
    """
    rows = [(row.at_ns, row.power_w) for row in samples if row.gpu == gpu and row.power_w is not None]
    energy_j, holes = [0.0] * len(rows), []
    for place, ((before_ns, before_w), (after_ns, after_w)) in enumerate(pairwise(rows), start=1):
        length_s = (after_ns - before_ns) / NS_PER_S
        if length_s > HOLE_PERIODS * period_s:
            text = f"{what} was not read for {length_s:.2f} s, more than {HOLE_PERIODS} periods of {period_s:g} s"
            holes.append(Hole(Span(before_ns, after_ns), text))
        energy_j[place] = energy_j[place - 1] + (before_w + after_w) / 2 * length_s
    curve = _exact(what, [at_ns for at_ns, _ in rows], energy_j, holes)
    return replace(curve, lag_s=lag_s, period_s=period_s)


def rapl_curve(readings: Iterable[RaplReading], zone: int, max_uj: int, what: str) -> Curve:
    """A powercap zone, its wraps at `max_energy_range_uj` undone (Linux, Documentation/power/powercap).

    Where it was not read for as long as it may need to wrap twice, the wraps cannot be counted.
    """
    rows = [row for row in readings if row.zone == zone]
    energy_j, holes = [0.0] * len(rows), []
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        length_s = (after.at_ns - before.at_ns) / NS_PER_S
        if may_have_wrapped_twice(length_s, max_uj):
            text = f"{what} was not read for {length_s:.0f} s, in which it may have wrapped more than once"
            holes.append(Hole(Span(before.at_ns, after.at_ns), text))
        step_uj = after.energy_uj - before.energy_uj
        energy_j[place] = energy_j[place - 1] + (step_uj if step_uj >= 0 else step_uj + max_uj) / 1e6
    return _exact(what, [row.at_ns for row in rows], energy_j, holes)


def may_have_wrapped_twice(length_s: float, max_uj: int) -> bool:
    """Whether a powercap zone that was not read for so long may have wrapped more than once."""
    return length_s * _MOST_PACKAGE_W > max_uj / 1e6


def load_curve(loads: Sequence[CpuLoad], design_power_w: float, what: str) -> Curve:
    """An estimate and no measurement: the design power of the CPU times the share of its time that was busy."""
    rows = [row for place, row in enumerate(loads) if place == 0 or row.busy_ratio is not None]
    energy_j = [0.0] * len(rows)
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        busy_s = (after.busy_ratio or 0.0) * (after.at_ns - before.at_ns) / NS_PER_S
        energy_j[place] = energy_j[place - 1] + design_power_w * busy_s
    return _exact(what, [row.at_ns for row in rows], energy_j, [])


def update_period_s(changes: Iterable[CounterChange], gpu: int, span: Span) -> float:
    """How often the counter of a GPU was brought up to date in the span, which must have been under load.

    The mean spacing of the changes, without those longer than one and a half times the median by more than polls lie
    apart: there, one was missed. The resolution of the counter is set by this (20 to 100 ms seen, 500 ms a documented
    default).

    Raises:
        NotMeasured: fewer than three changes.
    """
    rows = [row for row in changes if row.gpu == gpu and row.before_ns < row.at_ns]
    rows = [row for row in rows if span.opened_ns <= row.at_ns <= span.closed_ns]
    spacings = [after.at_ns - before.at_ns for before, after in pairwise(rows)]
    if len(spacings) < 2:
        raise NotMeasured("the counter changed fewer than three times in the window")
    longest_ns = 1.5 * statistics.median(spacings) + statistics.median(row.at_ns - row.before_ns for row in rows)
    return statistics.fmean(item for item in spacings if item <= longest_ns) / NS_PER_S


def _exact(what: str, at_ns: Sequence[int], energy_j: Sequence[float], holes: Sequence[Hole]) -> Curve:
    """A curve whose knots lie where they were read."""
    times = tuple(at_ns)
    return Curve(what, times, times, times, tuple(energy_j), tuple(holes))
