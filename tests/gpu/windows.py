"""Energy of windows of work, by the curves that lem's own figures come from; NotMeasured where a log does not tell."""

from __future__ import annotations

from lem.base.units import NS_PER_S
from lem.meters.curve import ClosedWindow, Span, counter_curve, power_curve
from lem.meters.samples import GpuSample, SampleLog
from tests.gpu.load import Busy

COUNTER = "the energy counter"


def span_of(busy: Busy) -> Span:
    return Span(busy.opened_ns, busy.closed_ns)


def counted_j(log: SampleLog, busy: Busy, guard_s: float) -> float:
    """The energy of a window with idle guards, by the counter, as in a closed batch."""
    guard_ns = round(guard_s * NS_PER_S)
    before = Span(busy.opened_ns - guard_ns, busy.opened_ns)
    after = Span(busy.closed_ns, busy.closed_ns + guard_ns)
    return counter_curve(log.counters, 0, COUNTER).closed_j(ClosedWindow(span_of(busy), before, after))


def naive_j(log: SampleLog, busy: Busy) -> float:
    """What a program gets that reads the counter once before and once after."""
    edges_ns = (busy.opened_ns, busy.closed_ns)
    before_mj, after_mj = ([row.energy_mj for row in log.counters if row.at_ns <= edge][-1] for edge in edges_ns)
    return (after_mj - before_mj) / 1000


def integrated_j(log: SampleLog, busy: Busy, period_s: float) -> float:
    """The integral of sampled power over a window."""
    return power_curve(log.samples, 0, period_s, "power").between_j(span_of(busy))


def rested_w(log: SampleLog, span: Span) -> float:
    """Mean power over a span without work, by the counter."""
    return counter_curve(log.counters, 0, COUNTER).mean_power_w(span)


def thinned(log: SampleLog, every: int) -> tuple[GpuSample, ...]:
    return log.samples[::every]
