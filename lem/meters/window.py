"""The window of an attempt: its GPUs, and what makes it doubtful or void (docs/measurement.md, steps 3 and 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any

from lem.base import measurement as names
from lem.base.dataclass import fields
from lem.base.measurement import EnergyScope, EnergySource, Measured, is_counter, is_estimate, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.attempt import AttemptLog, measured
from lem.meters.curve import Curve, NotMeasured, Span
from lem.meters.samples import HOLE_PERIODS, SLOW_PERIOD_S, GpuHeader, GpuSample, GpuSecond
from lem.meters.sources import SENSOR_LAG_S, sensor_lag_s
from lem.record import Energy, Gpu, Idle

_LIMIT_MARGIN = 1.2  # board power may overshoot its limit briefly, and a limit is kept to a few percent
_LOOK_NS = 3 * SLOW_PERIOD_S * NS_PER_S // 2
_CLOCK_MARGIN = 1.02  # clocks come in steps of 15 MHz or less
_LEAST_SAMPLES = 10  # an integral over fewer may miss a tenth of the window at each edge
_LEAST_CHECKED_S = 1.0  # a comparison over less says nothing
_EDGE_DOUBT = 0.03  # more than this share of a window's energy in doubt is worth a warning
# With fewer updates of a counter in each half, one more or less looks like a change of power; readings at known
# moments may be fewer.
_UPDATES_A_HALF = 10
_READINGS_A_HALF = 3


def samples_in(samples: Iterable[GpuSample], place: int, span: Span) -> list[GpuSample]:
    return [row for row in samples if row.gpu == place and span.opened_ns <= row.at_ns <= span.closed_ns]


def crosscheck_ratio(attempt: AttemptLog) -> float:
    """Integrated power over the counter's energy, of the GPU where they differ most; raises as `gpu_crosscheck`."""
    return max(
        (gpu_crosscheck(attempt, number) for number in range(len(attempt.sources.gpus))), key=lambda it: abs(it - 1)
    )


def gpu_crosscheck(attempt: AttemptLog, number: int) -> float:
    """Power over the energy that counts of one GPU; `NotMeasured` if one of the two cannot be had."""
    # Means over a second are taken where the driver has them. Sampled power is of a sensor that may see 25 of every 100
    # ms (A100, H100), and is off by itself on load with a rhythm near 10 Hz (Yang et al., SC24). The first moments of
    # the window are left out, since a sensor lags behind.
    window, curve, means = attempt.window, attempt.gpu_curve(number), attempt.gpu_mean_curve(number)
    header = attempt.log.header.gpus[attempt.sources.gpus[number]]
    lag_s = SENSOR_LAG_S["average"] if means else sensor_lag_s(header) or max(SENSOR_LAG_S.values())
    inner: Span | None = Span(window.opened_ns + round(lag_s * NS_PER_S), window.closed_ns)
    if means is None:
        means = attempt.gpu_power_curve(number)
    elif inner is not None:
        inner = means.whole_inside(inner)  # between two of its readings their means say nothing
    if inner is None or inner.seconds < _LEAST_CHECKED_S:
        raise NotMeasured("too_short_to_crosscheck", window_s=window.seconds)
    counted_j = curve.between_j(inner)
    if counted_j <= 0:
        raise NotMeasured("counter_still")
    return means.between_j(inner) / counted_j


def power_change(attempt: AttemptLog, window_repeats: int) -> float | None:
    """Power of the second half of the window less that of the first, over their mean; None if too little to compare."""
    # In a closed window the halves are whole passes over the prompts, without an odd middle one, so that both have the
    # same share of prefill and decode.
    window, curves = attempt.window, attempt.primary_curves()
    length_ns = window.closed_ns - window.opened_ns
    half_ns = length_ns // 2
    if not attempt.is_steady_mode:
        if window_repeats < 2:
            return None
        half_ns = length_ns * (window_repeats // 2) // window_repeats
    halves = Span(window.opened_ns, window.opened_ns + half_ns), Span(window.closed_ns - half_ns, window.closed_ns)
    needed = _UPDATES_A_HALF if is_counter(attempt.sources.primary) else _READINGS_A_HALF
    if any(curve.count_in(half) < needed for curve in curves for half in halves):
        return None
    first_w, second_w = (sum(curve.mean_power_w(half) for curve in curves) for half in halves)
    return (second_w - first_w) / ((first_w + second_w) / 2) if first_w + second_w > 0 else None


def slowdowns(attempt: AttemptLog, span: Span, what: str = "window") -> Iterator[Reason]:
    for place in attempt.sources.gpus:
        rows = samples_in(attempt.log.samples, place, span)
        for bit, name in names.SLOWDOWN_BITS.items():
            seen = sum(bool((row.event_mask or 0) & bit) for row in rows)
            if seen:
                uuid = attempt.log.header.gpus[place].uuid
                yield Reason.of("slowdown", uuid=uuid, name=name, bit=bit, seen=seen, samples=len(rows), span=what)
        slowed_s = _slowed_s(attempt.log.seconds, place, span)
        if slowed_s > 0 and not any((row.event_mask or 0) & names.SLOWDOWN_MASK for row in rows):
            uuid = attempt.log.header.gpus[place].uuid
            yield Reason.of("slowdown_counted", uuid=uuid, slowed_s=slowed_s, span=what)


def _slowed_s(seconds: Iterable[GpuSecond], place: int, span: Span) -> float:
    found_s = 0.0
    rows = [(row.at_ns, row.slowed_s) for row in seconds if row.gpu == place and row.slowed_s is not None]
    for (before_ns, before_s), (after_ns, after_s) in pairwise(rows):
        outside_ns = max(0, span.opened_ns - before_ns) + max(0, after_ns - span.closed_ns)
        if after_ns > span.opened_ns and before_ns < span.closed_ns:
            found_s += max(0.0, after_s - before_s - outside_ns / NS_PER_S)
    return found_s


def invalid_reasons(attempt: AttemptLog, own_pids: Collection[int] | None) -> Iterator[Reason]:
    """Why the window does not measure what it should: slowdowns, and processes that are not the experiment's."""
    window = attempt.span(names.WINDOW)
    if window is None:
        return
    yield from slowdowns(attempt, window)
    for place in attempt.sources.gpus:
        yield from _other_settings(attempt, place, window)
        before: set[int] = set()
        within: set[int] = set()
        for row in attempt.log.processes:
            if row.gpu == place and row.at_ns <= window.opened_ns:
                before = set(row.pids)
            elif row.gpu == place and row.at_ns <= window.closed_ns:
                within |= set(row.pids)
        foreign = within - before if own_pids is None else (within | before) - set(own_pids)
        if foreign:
            uuid = attempt.log.header.gpus[place].uuid
            yield Reason.of("foreign_process", uuid=uuid, pids=", ".join(map(str, sorted(foreign))))


def _other_settings(attempt: AttemptLog, place: int, window: Span) -> Iterator[Reason]:
    """A power limit or a clock in the window that is not the one that was set, or a limit that changed in it."""
    wanted, uuid = attempt.sources.settings, attempt.log.header.gpus[place].uuid
    seen = [row for row in attempt.log.limits if row.gpu == place]
    before_w = [row.limit_w for row in seen if row.at_ns <= window.opened_ns][-1:]
    # What changed since the last look in the window is seen by the next.
    within_w = [row.limit_w for row in seen if window.opened_ns < row.at_ns <= window.closed_ns + _LOOK_NS]
    limits_w = [*before_w, *within_w]
    if other_w := [limit_w for limit_w in limits_w if limit_w != limits_w[0]]:
        yield Reason.of("limit_changed", uuid=uuid, before_w=limits_w[0], after_w=other_w[0])
    elif wanted.power_limit_w and limits_w and abs(limits_w[0] - wanted.power_limit_w) > names.LIMIT_TOLERANCE_W:
        yield Reason.of("limit_not_kept", uuid=uuid, wanted_w=wanted.power_limit_w, found_w=limits_w[0])
    if wanted.lock_clock_mhz is not None:
        rows = samples_in(attempt.log.samples, place, window)
        clocks = [row.sm_clock_hz / 1e6 for row in rows if row.sm_clock_hz is not None]
        if above := sum(clock > _CLOCK_MARGIN * wanted.lock_clock_mhz for clock in clocks):
            found = {"most_mhz": max(clocks), "seen": above, "samples": len(clocks)}
            yield Reason.of("clock_not_locked", uuid=uuid, locked_mhz=wanted.lock_clock_mhz, **found)


def sample_gap_max_s(attempt: AttemptLog) -> float:
    window, log = attempt.window, attempt.log
    if places := attempt.sources.sensors or attempt.sources.gpus:
        series = [[row.at_ns for row in log.samples if row.gpu == place] for place in places]
    else:
        series = [[row.at_ns for row in log.rapl if row.zone == zone] for zone in range(len(log.header.zones))]
        series = series if any(series) else [[row.at_ns for row in log.loads]]
    gaps_s = []
    for times in series:
        inside = [at_ns for at_ns in times if window.opened_ns < at_ns < window.closed_ns]
        if not inside:
            raise NotMeasured("window_not_sampled")
        edges = pairwise([window.opened_ns, *inside, window.closed_ns])
        gaps_s.append(max(after - before for before, after in edges) / NS_PER_S)
    return max(gaps_s)


def warnings_of(attempt: AttemptLog, energy: Energy, idle: Idle) -> Iterator[Reason]:
    if attempt.sources.gpus and not attempt.sources.is_watched:
        yield Reason.of("clocks_unwatched")
    yield from _fallbacks(attempt)
    if is_estimate(attempt.sources.primary) and energy.cpu_package_energy_j is not None:
        yield Reason.of("energy_estimated")
    if attempt.sources.scope == EnergyScope.MODULE:
        yield Reason.of("energy_of_module")
    if attempt.sources.scope == EnergyScope.CARD:
        yield Reason.of("energy_of_card")
    if attempt.sources.sensors and attempt.sources.scope == EnergyScope.MACHINE:
        yield Reason.of("energy_of_machine")
    ratio = energy.energy_crosscheck_ratio
    if ratio is not None and abs(ratio - 1) > names.CROSSCHECK_TOLERANCE:
        yield Reason.of("crosscheck", ratio=ratio)
    if attempt.span(names.WINDOW) is not None:
        yield from _rest_moved(energy, idle, attempt.window.seconds)
        yield from _meter_warnings(attempt, energy.sample_gap_max_s)


def _rest_moved(energy: Energy, idle: Idle, window_s: float) -> Iterator[Reason]:
    before_w, after_w = idle.idle_loaded_power_w, idle.idle_loaded_post_power_w
    if not before_w:
        return
    most_w = names.REST_TOLERANCE * before_w
    net_j = energy.gpu_energy_net_j
    if net_j is not None:
        allowed_w = names.NET_SHIFT_TOLERANCE * net_j / window_s
        if after_w is None and most_w > allowed_w > 0:
            yield Reason.of("rest_unchecked", tolerance=names.REST_TOLERANCE, share=most_w * window_s / net_j)
        most_w = allowed_w
    elif energy.why_none("gpu_energy_net_j").code == "net_shifted":
        most_w = 0.0
    if after_w is not None and abs(after_w - before_w) > most_w:
        code = "rest_power_rose" if after_w > before_w else "rest_power_fell"
        yield Reason.of(code, before_w=before_w, after_w=after_w, change_percent=100 * abs(after_w / before_w - 1))


def _fallbacks(attempt: AttemptLog) -> Iterator[Reason]:
    for place in attempt.sources.gpus:
        gpu = attempt.log.header.gpus[place]
        if gpu.counter_error and any(row.gpu == place for row in attempt.log.counters):
            yield Reason.of("counter_frozen", uuid=gpu.uuid, error=gpu.counter_error)


def _meter_warnings(attempt: AttemptLog, gap_s: float | None) -> Iterator[Reason]:
    window, period_s = attempt.window, attempt.sources.sample_period_s
    errors = (error for error in attempt.log.errors if window.opened_ns <= error.at_ns <= window.closed_ns)
    for meter, message in {error.meter: error.message for error in errors}.items():
        yield Reason.of("meter_failed", meter=attempt.log.header.describe_meter(meter), error=message)
    is_sampled = attempt.sources.sensors or attempt.sources.gpus
    if is_sampled and gap_s is not None and gap_s > HOLE_PERIODS * period_s:
        yield Reason.of("samples_missing", gap_s=gap_s, periods=HOLE_PERIODS, period_s=period_s)
    after, least_s = attempt.span(names.GUARD_AFTER), attempt.sources.least_guard_s
    if not attempt.is_steady_mode and after is not None and after.seconds < least_s:
        yield Reason.of("guard_short", guard_s=after.seconds, least_s=least_s)
    with contextlib.suppress(NotMeasured):  # then the energy is null for that reason, and nothing of it in doubt
        for curve in attempt.primary_curves():
            spacing_s = max(curve.spacing_s(window.opened_ns), curve.spacing_s(window.closed_ns))
            if spacing_s > HOLE_PERIODS * curve.usual_spacing_s:
                yield Reason.of("edge_unread", what=curve.what, spacing_s=spacing_s)
            doubt_j = attempt.closing_doubt_j(curve)
            if doubt_j > _EDGE_DOUBT * curve.between_j(window):
                yield Reason.of("edge_doubtful", what=curve.what, doubt_j=doubt_j)


# A sample, and the seconds of the window that it represents: half-way to both its neighbours.
_Weighted = tuple[GpuSample, float]


def describe_gpu(attempt: AttemptLog, number: int) -> Gpu:
    place, untold = attempt.sources.gpus[number], Reason.of("not_reported")
    header = attempt.log.header.gpus[place]
    rows = _weighted(attempt, place, attempt.span(names.WINDOW))
    nothing = Reason.of("window_not_sampled")
    if not attempt.sources.is_watched:
        nothing = Reason.of("gpus_unwatched")
    elif header.power_error and not rows:
        nothing = Reason.of("sampler_reports", error=header.power_error)
    silent = untold if rows else nothing
    energy_j = measured(lambda: _gpu_j(attempt, number))
    power_mean_w = _mean(rows, "power_w", nothing)
    if energy_j.value is not None:
        power_mean_w = Measured(energy_j.value / attempt.window.seconds)
    temps, masks = _known(rows, "temp_c"), _known(rows, "event_mask")

    def throttled_s(bits: int) -> Measured[float]:
        return known(sum((seconds for mask, seconds in masks if mask & bits), start=0.0) if masks else None, silent)

    return Gpu.of(
        uuid=header.uuid,
        name=header.name,
        energy_j=energy_j,
        power_mean_w=power_mean_w,
        power_max_w=_max(rows, "power_w", Reason.of("power_not_read") if rows else nothing),
        power_limit_w=known(_limit_w(attempt, number), untold),
        temp_start_c=known(temps[0][0] if temps else None, silent),
        temp_end_c=known(temps[-1][0] if temps else None, silent),
        temp_max_c=_max(rows, "temp_c", silent),
        sm_clock_mean_hz=_mean(rows, "sm_clock_hz", silent),
        throttle_power_s=throttled_s(names.POWER_CAP_BIT),
        throttle_thermal_s=throttled_s(names.THERMAL_BITS),
        slowdown_min_s=_slowdown_min_s(header, rows, attempt.span(names.WINDOW), silent),
        event_reasons_mask=known(reduce(or_, (mask for mask, _ in masks)) if masks else None, silent),
        util_mean_ratio=_mean(rows, "util_ratio", silent),
        mem_peak_b=_max(rows, "memory_b", silent),
        persistence_mode=known(header.persistence_mode, untold),
        mig_mode=known(header.mig_mode, untold),
        clocks_set=known(any(mask & names.CLOCKS_SET_BIT for mask, _ in masks) if masks else None, silent),
        **{item.name: known(getattr(header.settings, item.name), untold) for item in fields(header.settings)},
    )


def _slowdown_min_s(
    header: GpuHeader, rows: Sequence[_Weighted], window: Span | None, silent: Reason
) -> Measured[float]:
    """The longest time between two looks at the clock events; none where the driver counts slowdowns."""
    if header.counts_slowdowns:
        return known(None, "slowdowns_counted")
    looks_ns = [row.at_ns for row, _ in rows if row.event_mask is not None]
    if window is None or not looks_ns:
        return known(None, silent)
    edges = pairwise([window.opened_ns, *looks_ns, window.closed_ns])
    return Measured(max(after - before for before, after in edges) / NS_PER_S)


def check_read_often(curve: Curve, window: Span) -> None:
    """Anything may have been drawn between two samples of power."""
    if (seen := curve.count_in(window)) < _LEAST_SAMPLES:
        data = {"seen": seen, "window_s": window.seconds, "least": _LEAST_SAMPLES}
        raise NotMeasured("read_too_rarely", what=curve.what, **data)


def _gpu_j(attempt: AttemptLog, number: int) -> float:
    """The energy of a GPU if it is possible: 0 < ΔE ≤ 1.2 × power limit × Δt; a module may draw more than the limit."""
    curve, window = attempt.gpu_curve(number), attempt.window
    window_s = window.seconds
    if not is_counter(attempt.sources.gpu_method):
        check_read_often(curve, window)
    found_j = attempt.window_j(curve, 1 / len(attempt.sources.gpus))
    gpu = attempt.log.header.gpus[attempt.sources.gpus[number]]
    if found_j <= 0:
        raise NotMeasured("no_energy_drawn", energy_j=found_j, window_s=window_s)
    limit_w = _limit_w(attempt, number)
    if limit_w is not None and gpu.energy_scope in (EnergyScope.GPU, EnergyScope.CARD):
        most_j = _LIMIT_MARGIN * limit_w * window_s
        if found_j > most_j:
            allowed = {"most_j": most_j, "margin": _LIMIT_MARGIN, "limit_w": limit_w}
            raise NotMeasured("above_power_limit", energy_j=found_j, window_s=window_s, **allowed)
    _check_against_power(attempt, number, gpu)
    return found_j


def _limit_w(attempt: AttemptLog, number: int) -> float | None:
    place, window = attempt.sources.gpus[number], attempt.span(names.WINDOW)
    until_ns = 0 if window is None else window.closed_ns + NS_PER_S
    later_w = (row.limit_w for row in attempt.log.seconds if row.gpu == place and row.at_ns <= until_ns)
    return max(filter(None, (attempt.log.header.gpus[place].power_limit_w, *later_w)), default=None)


def _check_against_power(attempt: AttemptLog, number: int, gpu: GpuHeader) -> None:
    method = attempt.sources.gpu_method
    if method == EnergySource.INSTANT_POWER and gpu.average_source == "none":
        raise NotMeasured("power_unconfirmed", uuid=gpu.uuid)
    if method == EnergySource.INSTANT_POWER and attempt.gpu_mean_curve(number) is None:
        return
    ratio = measured(lambda: gpu_crosscheck(attempt, number)).value
    if ratio is None or method in (EnergySource.AVERAGE_POWER, EnergySource.HWMON_POWER):
        return
    if method == EnergySource.INSTANT_POWER and abs(ratio - 1) > names.CROSSCHECK_TOLERANCE:
        raise NotMeasured("power_disputed", uuid=gpu.uuid, ratio=ratio)
    if abs(ratio - 1) > names.CROSSCHECK_FAILED:
        raise NotMeasured("crosscheck_failed", uuid=gpu.uuid, ratio=ratio)


def _weighted(attempt: AttemptLog, place: int, span: Span | None) -> list[_Weighted]:
    if span is None:
        return []
    rows = samples_in(attempt.log.samples, place, span)
    longest_ns = HOLE_PERIODS * attempt.sources.sample_period_s * NS_PER_S
    between = ((before.at_ns + after.at_ns) / 2 for before, after in pairwise(rows))
    edges = [span.opened_ns, *between, span.closed_ns]
    return [
        (row, (min(end_ns, row.at_ns + longest_ns) - max(start_ns, row.at_ns - longest_ns)) / NS_PER_S)
        for row, start_ns, end_ns in zip(rows, edges, edges[1:], strict=False)
    ]


def _known(rows: Iterable[_Weighted], name: str) -> list[tuple[Any, float]]:
    return [(value, seconds) for row, seconds in rows if (value := getattr(row, name)) is not None]


def _max(rows: Iterable[_Weighted], name: str, nothing: Reason) -> Measured[float]:
    return known(max((value for value, _ in _known(rows, name)), default=None), nothing)


def _mean(rows: Iterable[_Weighted], name: str, nothing: Reason) -> Measured[float]:
    values = _known(rows, name)
    total_s = sum(seconds for _, seconds in values)
    return known(sum(value * seconds for value, seconds in values) / total_s if total_s > 0 else None, nothing)
