"""How far the energy of a window may be off, by cause (GUM): standard uncertainties, which add up as squares."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lem.base import measurement as names
from lem.base.measurement import is_counter, is_nvml_source
from lem.base.units import NS_PER_S
from lem.meters.attempt import AttemptLog, measured, need
from lem.meters.curve import Curve, NotMeasured, Span
from lem.meters.machine import MOST_LAG_S
from lem.record import Idle

# NVML reference, nvmlDeviceGetPowerUsage: to 5 % of the draw, the same on every day for one board.
_SENSOR = 0.05
# A counter shows energy up to this much later where its lag could not be estimated: 50 to 100 ms were seen.
_UNKNOWN_LAG_S = 0.1
_RECTANGLE = math.sqrt(3)  # from half the width of a range to its standard deviation

# Power is taken from a stretch beside each edge, without what belongs to the edge itself.
_BESIDE_S, _BESIDE_UPDATES, _SETTLED_S = 1.5, 6, 0.3
_LAGS_AGREE_S = 0.05


def counter_lag_s(attempt: AttemptLog) -> float:
    """How late the slowest counter shows energy, by the window's edges or as it was probed; raises NotMeasured."""
    if not is_counter(attempt.sources.gpu_method):
        raise NotMeasured("counter_absent")
    try:
        return max(_window_lag_s(attempt, number) for number in range(len(attempt.sources.gpus)))
    except NotMeasured:
        probed_s = [attempt.log.header.gpus[place].counter_lag_s for place in attempt.sources.gpus]
        known_s = [lag_s for lag_s in probed_s if lag_s is not None]
        if len(known_s) < len(probed_s):
            raise
        return max(known_s)


def _window_lag_s(attempt: AttemptLog, number: int) -> float:
    guard = attempt.span(names.GUARD_BEFORE)
    if attempt.is_steady_mode or guard is None:
        raise NotMeasured("lag_under_load")
    curve = attempt.gpu_curve(number)
    return lag_s(curve, guard, attempt.window, max(_BESIDE_S, _BESIDE_UPDATES * curve.usual_spacing_s))


def lag_s(curve: Curve, rest: Span, work: Span, beside_s: float) -> float:
    """How late a counter shows energy, by work that begins after a rest, and `beside_s` from its edges at most."""
    # Work begins and ends at known moments. The line of the energy at work meets those at rest later by the lag, and by
    # what power takes to rise and fall. Both edges must agree, else NotMeasured: load that begins slowly is no lag.
    settled_ns, beside_ns = round(_SETTLED_S * NS_PER_S), round(beside_s * NS_PER_S)
    opened_ns, closed_ns = work.opened_ns, work.closed_ns
    resting = curve.whole_inside(rest)
    begun = curve.whole_inside(Span(opened_ns + settled_ns, min(opened_ns + beside_ns, closed_ns)))
    ending = curve.whole_inside(Span(max(closed_ns - beside_ns, opened_ns + settled_ns), closed_ns))
    after = curve.whole_inside(Span(closed_ns + settled_ns, closed_ns + beside_ns))
    if resting is None or begun is None or ending is None or after is None:
        raise NotMeasured("lag_unseen", what=curve.what)
    idle_w = curve.mean_power_w(after)
    # Where the line of the energy at work meets that at rest, less the moment at which work began or ended.
    lags_s = []
    for at_work, at_rest, edge_ns in ((begun, resting, opened_ns), (ending, after, closed_ns)):
        power_w = curve.mean_power_w(at_work)
        if power_w <= idle_w:
            raise NotMeasured("lag_unseen", what=curve.what)
        working_j = _extended_j(curve, at_work.closed_ns, power_w, edge_ns)
        lags_s.append((_extended_j(curve, at_rest.closed_ns, idle_w, edge_ns) - working_j) / (power_w - idle_w))
    if abs(lags_s[0] - lags_s[1]) > _LAGS_AGREE_S or not -_LAGS_AGREE_S <= min(lags_s) <= max(lags_s) < MOST_LAG_S:
        raise NotMeasured("lag_unseen", what=curve.what)
    return max(0.0, sum(lags_s) / 2)


def _extended_j(curve: Curve, knot_ns: int, power_w: float, at_ns: int) -> float:
    return curve.value_j(knot_ns) + power_w * (at_ns - knot_ns) / NS_PER_S


def budget_j(attempt: AttemptLog, energy_j: float, lag_s: float | None, ratio: float | None) -> Mapping[str, float]:
    """Standard uncertainties in J by cause, of the energy that counts; NotMeasured where an accuracy is unknown."""
    if not is_nvml_source(attempt.sources.primary):
        raise NotMeasured("accuracy_unknown")
    curves, window = attempt.primary_curves(), attempt.window
    edges_ns = (window.opened_ns, window.closed_ns)
    idle_w = attempt.baselines.loaded_power_w
    if (rest := attempt.span(names.IDLE_LOADED)) is not None:
        idle_w = measured(lambda: attempt.rest_power_w(rest)).value
    found = {
        names.EDGES: math.hypot(*(_placement_j(curve, at_ns) for curve in curves for at_ns in edges_ns)),
        "closing": sum(attempt.closing_doubt_j(curve) for curve in curves) / 2 / _RECTANGLE,
        names.SENSOR: _SENSOR * energy_j / _RECTANGLE,
    }
    if is_counter(attempt.sources.primary) and not attempt.is_steady_mode:
        rise_w = max(0.0, energy_j / window.seconds - (idle_w or 0.0))
        found["lag"] = (_UNKNOWN_LAG_S if lag_s is None else lag_s) * rise_w / _RECTANGLE
    if ratio is not None and abs(ratio - 1) > names.CROSSCHECK_TOLERANCE:
        found["crosscheck"] = abs(ratio - 1) * energy_j / _RECTANGLE
    return found


def net_energy_j(gross_j: float, idle: Idle, window_s: float) -> float:
    """Gross energy less the power at rest; `NotMeasured` where it is small beside what that power moved meanwhile."""
    # A window of 87 W over 72 W at rest: if these move by 5 %, the net energy moves by 24 %.
    rest_w: float = need(idle.measured("idle_net_power_w"))
    net_j = gross_j - rest_w * window_s
    before_w, after_w = idle.idle_loaded_power_w, idle.idle_loaded_post_power_w
    if before_w is not None and after_w is not None:
        shift_j = abs(after_w - before_w) * window_s
        if shift_j > names.NET_SHIFT_MOST * net_j:
            raise NotMeasured("net_shifted", before_w=before_w, after_w=after_w, shift_j=shift_j, net_j=net_j)
    return net_j


def net_budget_j(gross: Mapping[str, float], net_j: float, idle: Idle, window_s: float) -> Mapping[str, float]:
    """Standard uncertainties of the net energy by cause, from those of the gross one."""
    # One sensor reads load and rest, so its error is a share of their difference. Power at rest in the window lies
    # between those before and after it, if both were measured.
    rest_w: float = need(idle.measured("idle_net_power_w"))
    before_w, after_w = idle.idle_loaded_power_w, idle.idle_loaded_post_power_w
    half_w = names.REST_TOLERANCE * rest_w
    if before_w is not None and after_w is not None:
        half_w = abs(after_w - before_w) / 2
    return {**gross, names.SENSOR: _SENSOR * abs(net_j) / _RECTANGLE, "idle_shift": half_w * window_s / _RECTANGLE}


def _placement_j(curve: Curve, at_ns: int) -> float:
    width_s, power_w = curve.doubt_at(at_ns)
    return width_s * power_w / 2 / _RECTANGLE
