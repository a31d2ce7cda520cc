"""The log of one attempt and its curves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Final, TypeVar

from lem.base import measurement as names
from lem.base.dataclass import dataclass, field, replace
from lem.base.measurement import EnergySource, Measured, is_counter, is_cpu_source, is_estimate, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.curve import (
    ClosedWindow,
    Curve,
    NotMeasured,
    Span,
    counter_curve,
    load_curve,
    mean_power_curve,
    own_load_curve,
    power_curve,
)
from lem.meters.rapl import DRAM, PACKAGE, distinct_zones, rapl_curve
from lem.meters.samples import Mark, SampleLog, gpu_meter
from lem.meters.sources import Sources, sensor_lag_s

_GUARDS: Final = {
    names.WINDOW: (names.GUARD_BEFORE, names.GUARD_AFTER),
    names.PREFILL: (names.PREFILL_GUARD_BEFORE, names.PREFILL_GUARD_AFTER),
}


@dataclass(frozen=True)
class Baselines:
    bare_power_w: float | None = None  # of all GPUs, or packages, together, by the primary source
    loaded_power_w: float | None = None
    age_s: float | None = None  # how long before this experiment the loaded one was measured


_Value = TypeVar("_Value")


def measured(figure: Callable[[], _Value]) -> Measured[_Value]:
    try:
        return Measured(figure())
    except NotMeasured as error:
        return known(None, error.reason)


def need(found: Measured[_Value]) -> _Value:
    if found.value is None:
        raise NotMeasured(found.null_reason or "no_reason")
    return found.value


@dataclass(frozen=True)
class AttemptLog:
    log: SampleLog
    marks: tuple[Mark, ...]
    sources: Sources
    baselines: Baselines = field(default_factory=Baselines)
    is_steady_mode: bool = False  # the window was opened and closed under load
    _known: dict[tuple[str, int, bool], Curve] = field(default_factory=dict, repr=False, compare=False)

    @property
    def window(self) -> Span:
        return self._marked(names.WINDOW)

    @cached_property
    def why_no_dram(self) -> Reason | None:
        if "dram" in self.sources.reasons:
            return self.sources.reasons["dram"]
        for place, zone in enumerate(self.log.header.zones):
            rows = [row for row in self.log.rapl if zone.domain == DRAM and row.zone == place]
            if len(rows) > 1 and all(row.energy_uj == rows[0].energy_uj for row in rows):
                gap_s = (rows[-1].at_ns - rows[0].at_ns) / NS_PER_S
                return Reason.of("zone_still", what=f"the energy counter of {zone.name}", gap_s=gap_s)
        return None

    def span(self, name: str) -> Span | None:
        return span_of(self.marks, name)

    def primary_curves(self, *, at_rest: bool = False) -> tuple[Curve, ...]:
        if self.sources.primary is not None and self.sources.primary == self.sources.gpu_method:
            return tuple(self.gpu_curve(number, at_rest=at_rest) for number in range(len(self.sources.gpus)))
        if self.sources.sensors:
            return tuple(self._power_curve(place, at_rest=at_rest) for place in self.sources.sensors)
        if is_cpu_source(self.sources.primary):
            return self.cpu_curves(PACKAGE) + (() if self.why_no_dram else self.cpu_curves(DRAM))
        raise NotMeasured(self.sources.reasons.get("primary", "external_window_only"))

    def rest_power_w(self, span: Span) -> float:
        return sum(curve.mean_power_w(span) for curve in self.primary_curves(at_rest=True))

    def gpu_curve(self, number: int, *, at_rest: bool = False) -> Curve:
        if self.sources.gpu_method is None:
            raise NotMeasured(self.sources.reasons["gpu"])
        if not is_counter(self.sources.gpu_method):
            return self.gpu_power_curve(number, at_rest=at_rest)
        key = (EnergySource.COUNTER, number, False)
        if key not in self._known:
            place = self.sources.gpus[number]
            gpu = self.log.header.gpus[place]
            what = f"the energy counter of {gpu.uuid}"
            curve = counter_curve(self.log.counters, place, what, gpu.counter_ranges_j, gpu.power_limit_w)
            self._known[key] = self._checked(curve, gpu_meter(place, "counter"), gpu_meter(place, "handle"))
        return self._known[key]

    def gpu_power_curve(self, number: int, *, at_rest: bool = False) -> Curve:
        return self._power_curve(self.sources.gpus[number], at_rest=at_rest)

    def _power_curve(self, place: int, *, at_rest: bool) -> Curve:
        device = self.log.header.devices[place]
        if device.power_error is not None:
            raise NotMeasured("meter_unreadable", what=f"power of {device.uuid}", error=device.power_error)
        key = ("power", place, at_rest)
        if key not in self._known:
            period_s = max(self.sources.sample_period_s, self.sources.idle_period_s if at_rest else 0.0)
            what, lag_s = f"power of {device.uuid}", sensor_lag_s(device)
            curve = power_curve(self.log.samples, place, period_s, what, lag_s)
            self._known[key] = self._checked(curve, gpu_meter(place, "power"), gpu_meter(place, "handle"))
        return self._known[key]

    def gpu_mean_curve(self, number: int) -> Curve | None:
        place = self.sources.gpus[number]
        what = f"the mean power of {self.log.header.gpus[place].uuid}"
        curve = mean_power_curve(self.log.seconds, place, what)
        return curve if len(curve.at_ns) > 1 else None

    def cpu_curves(self, domain: str) -> tuple[Curve, ...]:
        if domain == DRAM and self.why_no_dram is not None:
            raise NotMeasured(self.why_no_dram)
        if self.sources.cpu_method is None:
            raise NotMeasured(self.sources.reasons["cpu"])
        if is_estimate(self.sources.cpu_method):
            power_w = self.sources.cpu_tdp_w
            if power_w is None:
                raise NotMeasured("tdp_unknown")
            window = self.span(names.WINDOW)
            inside = [row for row in self.log.usage if window is not None and window.opened_ns < row.at_ns]
            if inside and all(row.own_s is None for row in inside):
                raise NotMeasured("engine_not_watched")
            return (self._checked(own_load_curve(self.log.usage, power_w, "the load of the CPU"), "cpu_load"),)
        curves = []
        zones = self.log.header.zones
        found = {place: zone.name for place, zone in enumerate(zones) if zone.domain == domain}
        for place in distinct_zones(self.log.rapl, found):
            zone = zones[place]
            what = f"the energy counter of {zone.name}"
            curve = rapl_curve(self.log.rapl, place, zone.max_uj, what, zone.limit_w)
            curves.append(self._checked(curve, f"rapl.{zone.name}"))
        return tuple(curves)

    def reference_curves(self) -> tuple[Curve, ...]:
        """The curves of meters that saw the work of the window, by which the clock of another one is found."""
        ways: tuple[Callable[[], tuple[Curve, ...]], ...] = (
            lambda: tuple(self.gpu_curve(number) for number in range(len(self.sources.gpus))),
            lambda: self.cpu_curves(PACKAGE) if self.sources.cpu_method == EnergySource.RAPL else (),
            lambda: (self._checked(load_curve(self.log.loads, 1.0, "the load of the CPU"), "cpu_load"),),
        )
        for way in ways:
            with contextlib.suppress(NotMeasured):
                curves = way()
                if curves and all(curve.between_j(self.window) > 0 for curve in curves):
                    return curves
        return ()

    def window_j(self, curve: Curve, share: float | None, name: str = names.WINDOW) -> float:
        closed = self._closed(curve, share, name)
        return curve.between_j(self._marked(name)) if closed is None else curve.closed_j(closed)

    def closing_doubt_j(self, curve: Curve) -> float:
        closed = self._closed(curve, None, names.WINDOW)
        return 0.0 if closed is None else curve.closing_doubt_j(closed)

    def _closed(self, curve: Curve, share: float | None, name: str) -> ClosedWindow | None:
        before, after = map(self.span, _GUARDS[name])
        if self.is_steady_mode or before is None or after is None:
            return None
        idle_w, rest = self.baselines.loaded_power_w, self.span(names.IDLE_LOADED)
        if rest is not None:
            idle_w = measured(lambda: curve.mean_power_w(rest)).value
        elif idle_w is not None:
            idle_w = None if share is None else share * idle_w
        return ClosedWindow(self._marked(name), before, after, idle_w)

    def _marked(self, name: str) -> Span:
        span = self.span(name)
        if span is None:
            raise NotMeasured("no_window_mark")
        return span

    def _checked(self, curve: Curve, *meters: str) -> Curve:
        errors = [error.message for error in self.log.errors if error.meter in meters]
        if len(curve.at_ns) >= 2:
            return replace(curve, error=errors[-1]) if errors else curve
        if errors:
            raise NotMeasured("meter_unreadable", what=curve.what, error=errors[-1])
        raise NotMeasured("never_read_twice", what=curve.what)


# A counter that does not change for this long, and for this many of its usual updates, has stopped. The slowest known
# counter updates once a second.
_LEAST_STILL_S, _STILL_UPDATES = 3.0, 4


def without_still_counters(log: SampleLog, window: Span | None = None) -> SampleLog:
    """The log, with an error for each counter that stood still in the window, or at the log's end without one."""
    gpus = list(log.header.gpus)
    for place, gpu in enumerate(gpus):
        still_s = 0.0 if gpu.counter_error else _still_s(log, place, window)
        if still_s:
            gpus[place] = replace(gpu, counter_error=f"the energy counter did not change for {still_s:.1f} s")
    return log if tuple(gpus) == log.header.gpus else replace(log, header=replace(log.header, gpus=tuple(gpus)))


def _still_s(log: SampleLog, place: int, window: Span | None) -> float:
    rows = [row for row in log.counters if row.gpu == place]
    if not rows:  # the sampler has just begun
        return 0.0
    alive_ns = max((row.at_ns for row in log.loads[-1:]), default=0)
    # A GPU may be lost by another reading first; then its counter is not read.
    failing = [gpu_meter(place, what) for what in ("counter", "handle")]
    failures_ns = [row.at_ns for row in log.errors if row.meter in failing]
    spacings_s = [(after.at_ns - before.at_ns) / NS_PER_S for before, after in pairwise(rows)]
    least_s = max(_LEAST_STILL_S, _STILL_UPDATES * median(spacings_s)) if spacings_s else _LEAST_STILL_S
    longest_s = 0.0
    for row, until_ns in zip(rows, [*(later.before_ns for later in rows[1:]), alive_ns], strict=True):
        is_read = not any(row.at_ns <= at_ns <= until_ns for at_ns in failures_ns)
        is_there = (
            until_ns >= alive_ns if window is None else row.at_ns < window.closed_ns and until_ns > window.opened_ns
        )
        if is_read and is_there:
            longest_s = max(longest_s, (until_ns - row.at_ns) / NS_PER_S)
    return longest_s if longest_s > least_s else 0.0


def span_of(marks: Sequence[Mark], name: str) -> Span | None:
    found = [mark for mark in marks if mark.name == name]
    return Span(min(mark.opened_ns for mark in found), max(mark.closed_ns for mark in found)) if found else None
