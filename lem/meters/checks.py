"""What makes a window doubtful or void: implausible energy, clocks that were slowed, other programs, change under way.

Everything here follows docs/measurement.md, steps 3 and 6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from itertools import pairwise

from lem.base import measurement as names
from lem.base.measurement import SLOWDOWN_BITS, STEADY_TOLERANCE, EnergyScope, EnergySource
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.curve import HOLE_PERIODS, Curve, NotMeasured, Span
from lem.meters.samples import GpuHeader, SampleLog
from lem.meters.sources import SENSOR_LAG_S, AttemptLog

# Board power may overshoot its limit for a moment, and a limit is kept to a few percent.
_LIMIT_MARGIN = 1.2

# An integral over fewer samples may miss a tenth of the window at each edge.
_LEAST_SAMPLES = 10

# A comparison over less than this says nothing.
_LEAST_CHECKED_S = 1.0

# More than this share of a window's energy in doubt is worth a warning.
_EDGE_DOUBT = 0.03

# With fewer updates of a counter than this in each half, one more or less looks like a change of power; what is read at
# a known moment needs fewer.
_UPDATES_A_HALF = 10
_READINGS_A_HALF = 3


def check_plausible(energy_j: float, window: Span, gpu: GpuHeader) -> None:
    """Nothing, where the energy of a GPU can be true: 0 < ΔE ≤ 1.2 × power limit × Δt.

    A module draws more than its GPU's limit, so there only the sign is looked at.

    Raises:
        NotMeasured: it cannot.
    """
    if energy_j <= 0:
        raise NotMeasured(f"{energy_j:.4g} J over {window.seconds:.3f} s cannot be: no GPU that is on draws nothing")
    if gpu.power_limit_w is None or gpu.energy_scope != EnergyScope.GPU:
        return
    most_j = _LIMIT_MARGIN * gpu.power_limit_w * window.seconds
    if energy_j > most_j:
        limit = f"{_LIMIT_MARGIN} x {gpu.power_limit_w:g} W x {window.seconds:.3f} s"
        raise NotMeasured(f"{energy_j:.4g} J cannot be: the power limit allows {most_j:.4g} J ({limit})")


def check_sampled(curve: Curve, window: Span) -> None:
    """Nothing, where integrated power was looked at often enough: between two samples anything may have been drawn.

    Raises:
        NotMeasured: it was not.
    """
    seen = curve.count_in(window)
    if seen < _LEAST_SAMPLES:
        text = f"{curve.what} was read {seen} times in the window of {window.seconds:.2f} s, {_LEAST_SAMPLES} are due"
        raise NotMeasured(f"{text}: lower timeseries.sample_interval_ms, or raise measurement.min_window_sec")


def crosscheck_ratio(attempt: AttemptLog) -> float:
    """Integrated power over the counter's energy of all GPUs, over the part of the window in which both see the load.

    The first moments are left out, since a sensor of power lags behind. A sensor that looks 25 of every 100 ms (A100,
    H100) can be off by itself on load with a rhythm (Yang et al., SC24): a deviation is a warning and no verdict.

    Raises:
        NotMeasured: one of the two cannot be had over that part.
    """
    window = attempt.window
    integrated_j = counted_j = 0.0
    for number, place in enumerate(attempt.sources.gpus):
        lag_s = SENSOR_LAG_S.get(attempt.log.header.gpus[place].power_source or "", max(SENSOR_LAG_S.values()))
        inner = Span(window.opened_ns + round(lag_s * NS_PER_S), window.closed_ns)
        if inner.seconds < _LEAST_CHECKED_S:
            raise NotMeasured(f"a window of {window.seconds:.2f} s is too short to compare counter and power")
        counted_j += attempt.gpu_curve(number).between_j(inner)
        integrated_j += attempt.gpu_power_curve(number).between_j(inner)
    if counted_j <= 0:
        raise NotMeasured("the energy counter stood still")
    return integrated_j / counted_j


def is_power_steady(attempt: AttemptLog, window_repeats: int) -> bool:
    """Whether both halves of the window drew power alike, to 2 %.

    In a closed window the halves are whole passes over the prompts, of which an odd middle one is left out: a pass
    alike in both, with its prefill and its decode, is what can be compared.

    Raises:
        NotMeasured: there is nothing to compare, or the meter is too coarse.
    """
    window, curves = attempt.window, attempt.primary_curves()
    length_ns = window.closed_ns - window.opened_ns
    half_ns = length_ns // 2
    if not attempt.is_steady_mode:
        if window_repeats < 2:
            raise NotMeasured("one pass over the prompt set: there is no second to compare it with")
        half_ns = length_ns * (window_repeats // 2) // window_repeats
    halves = (
        Span(window.opened_ns, window.opened_ns + half_ns),
        Span(window.closed_ns - half_ns, window.closed_ns),
    )
    needed = _UPDATES_A_HALF if attempt.sources.primary == EnergySource.COUNTER else _READINGS_A_HALF
    if any(curve.count_in(half) < needed for curve in curves for half in halves):
        raise NotMeasured(f"fewer than {needed} readings of the meter in each half")
    first_w, second_w = (sum(curve.mean_power_w(half) for curve in curves) for half in halves)
    return abs(first_w - second_w) < STEADY_TOLERANCE * (first_w + second_w) / 2


def slowdowns(attempt: AttemptLog, span: Span, what: str = "window") -> Iterator[Reason]:
    """One reason for every bit and GPU that makes the span invalid."""
    for place in attempt.sources.gpus:
        rows = [
            row for row in attempt.log.samples if row.gpu == place and span.opened_ns <= row.at_ns <= span.closed_ns
        ]
        for bit, name in SLOWDOWN_BITS.items():
            seen = sum(bool((row.event_mask or 0) & bit) for row in rows)
            if seen:
                uuid = attempt.log.header.gpus[place].uuid
                yield Reason.of("slowdown", uuid=uuid, name=name, bit=bit, seen=seen, samples=len(rows), span=what)


def foreign_pids(log: SampleLog, place: int, span: Span, own_pids: Collection[int] | None) -> tuple[int, ...]:
    """Processes on a GPU during the span that are not the experiment's, as the host numbers them.

    Without `own_pids` those that appear within the span: an experiment starts no process in its window.
    """
    before: set[int] = set()
    within: set[int] = set()
    for row in log.processes:
        if row.gpu != place or row.at_ns > span.closed_ns:
            continue
        if row.at_ns <= span.opened_ns:
            before = set(row.pids)
        else:
            within |= set(row.pids)
    found = within - before if own_pids is None else (within | before) - set(own_pids)
    return tuple(sorted(found))


def sample_gap_max_s(attempt: AttemptLog) -> float:
    """The longest time in the window without a reading of what is sampled: a GPU's state, else the CPU's meter.

    Raises:
        NotMeasured: nothing was sampled in the window.
    """
    window, log = attempt.window, attempt.log
    if attempt.sources.gpus:
        series = [[row.at_ns for row in log.samples if row.gpu == place] for place in attempt.sources.gpus]
    else:
        zones = range(len(log.header.zones))
        series = [[row.at_ns for row in log.rapl if row.zone == zone] for zone in zones]
        series = series if any(series) else [[row.at_ns for row in log.loads]]
    return max(_longest_gap_s(times, window) for times in series)


def meter_warnings(attempt: AttemptLog, gap_s: float | None) -> Iterator[Reason]:
    """What failed or was late in the window; a missing sample is a warning in the result."""
    window, period_s = attempt.window, attempt.sources.sample_period_s
    failed: dict[str, list[str]] = {}
    for error in attempt.log.errors:
        if window.opened_ns <= error.at_ns <= window.closed_ns:
            failed.setdefault(error.meter, []).append(error.message)
    for meter, messages in failed.items():
        name = attempt.log.header.describe_meter(meter)
        yield Reason.of("meter_failed", meter=name, error=messages[-1])
    if attempt.sources.gpus and gap_s is not None and gap_s > HOLE_PERIODS * period_s:
        yield Reason.of("samples_missing", gap_s=gap_s, periods=HOLE_PERIODS, period_s=period_s)
    after = attempt.span(names.GUARD_AFTER)
    least_s = attempt.sources.least_guard_s
    if not attempt.is_steady_mode and after is not None and after.seconds < least_s:
        yield Reason.of("guard_short", guard_s=after.seconds, least_s=least_s)
    with contextlib.suppress(NotMeasured):  # then the energy is null for that reason, and nothing of it in doubt
        for curve in attempt.primary_curves():
            yield from _edge_warnings(attempt, curve, window)


def _edge_warnings(attempt: AttemptLog, curve: Curve, window: Span) -> Iterator[Reason]:
    spacing_s = max(curve.spacing_s(window.opened_ns), curve.spacing_s(window.closed_ns))
    if spacing_s > HOLE_PERIODS * curve.usual_spacing_s:
        yield Reason.of("edge_unread", what=curve.what, spacing_s=spacing_s)
    doubt_j = attempt.closing_doubt_j(curve)
    if doubt_j > _EDGE_DOUBT * curve.between_j(window):
        yield Reason.of("edge_doubtful", what=curve.what, doubt_j=doubt_j)


def _longest_gap_s(times: list[int], window: Span) -> float:
    inside = [at_ns for at_ns in times if window.opened_ns < at_ns < window.closed_ns]
    if not inside:
        raise NotMeasured("nothing was sampled in the window")
    edges = [window.opened_ns, *inside, window.closed_ns]
    return max(after - before for before, after in pairwise(edges)) / NS_PER_S
