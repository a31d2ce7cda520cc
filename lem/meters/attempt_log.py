"""One attempt as its log and marks show it: when what happened, and the curves of the meters it is measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lem import marks as names
from lem.measurement import EnergySource, is_cpu_source, is_estimate
from lem.meters.curve import ClosedWindow, Curve, NotMeasured, Span
from lem.meters.integrate import counter_curve, load_curve, power_curve, rapl_curve
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.samples import Mark, SampleLog, gpu_meter
from lem.meters.sources import SENSOR_LAG_S, Sources

__all__ = ["AttemptLog", "Baselines", "span_of"]


@dataclass(frozen=True)
class Baselines:
    """Power at rest that was measured before, for where the log has no mark of its own; None when it never was.

    Attributes:
        bare_power_w, loaded_power_w: of all GPUs, or packages, together, by the primary source.
        age_s: how long before this experiment the loaded one was measured.
    """

    bare_power_w: float | None = None
    loaded_power_w: float | None = None
    age_s: float | None = None


@dataclass(frozen=True)
class AttemptLog:
    """A log, its marks, and what it is to be read with.

    Attributes:
        is_steady_mode: the window was opened and closed under load.
    """

    log: SampleLog
    marks: tuple[Mark, ...]
    sources: Sources
    baselines: Baselines
    is_steady_mode: bool
    _known: dict[tuple[str, int, bool], Curve] = field(default_factory=dict, repr=False, compare=False)

    @property
    def window(self) -> Span:
        """The window.

        Raises:
            NotMeasured: it was not marked.
        """
        window = self.span(names.WINDOW)
        if window is None:
            raise NotMeasured("the sample log has no mark of the window")
        return window

    def span(self, name: str) -> Span | None:
        """From the first to the last moment under that mark; None without one."""
        return span_of(self.marks, name)

    def primary_curves(self, *, at_rest: bool = False) -> tuple[Curve, ...]:
        """The curves whose sum is the energy that counts.

        Raises:
            NotMeasured: there is no such meter, or it said nothing.
        """
        if self.sources.primary is not None and self.sources.primary == self.sources.gpu_method:
            return tuple(self.gpu_curve(number, at_rest=at_rest) for number in range(len(self.sources.gpus)))
        if is_cpu_source(self.sources.primary):
            return self.cpu_curves(PACKAGE) + (self.cpu_curves(DRAM) if self._has_dram else ())
        raise NotMeasured(self.sources.reasons.get("primary", "a meter of the user's own tells only the window"))

    def gpu_curve(self, number: int, *, at_rest: bool = False) -> Curve:
        """The energy of one GPU of the experiment, counted in its order.

        Raises:
            NotMeasured: it has no meter, or that said nothing.
        """
        if self.sources.gpu_method is None:
            raise NotMeasured(self.sources.reasons["gpu"])
        if self.sources.gpu_method != EnergySource.COUNTER:
            return self.gpu_power_curve(number, at_rest=at_rest)
        key = (EnergySource.COUNTER, number, False)
        if key not in self._known:
            place = self.sources.gpus[number]
            what = f"the energy counter of {self.log.header.gpus[place].uuid}"
            self._known[key] = self._checked(counter_curve(self.log.counters, place, what), gpu_meter(place, "counter"))
        return self._known[key]

    def gpu_power_curve(self, number: int, *, at_rest: bool = False) -> Curve:
        """The integral of one GPU's power.

        Raises:
            NotMeasured: its power was not read.
        """
        place = self.sources.gpus[number]
        gpu = self.log.header.gpus[place]
        if gpu.power_error is not None:
            raise NotMeasured(f"power of {gpu.uuid} cannot be read: {gpu.power_error}")
        key = ("power", number, at_rest)
        if key not in self._known:
            period_s = max(self.sources.sample_period_s, self.sources.idle_period_s if at_rest else 0.0)
            lag_s = SENSOR_LAG_S.get(gpu.power_source or "", 0.0)
            curve = power_curve(self.log.samples, place, period_s, f"power of {gpu.uuid}", lag_s)
            self._known[key] = self._checked(curve, gpu_meter(place, "power"))
        return self._known[key]

    def cpu_curves(self, domain: str) -> tuple[Curve, ...]:
        """The energy of every zone of a domain, `package` or `dram`.

        Raises:
            NotMeasured: there is no meter for it, or one of them said nothing.
        """
        if domain == DRAM and not self._has_dram:
            raise NotMeasured(self.sources.reasons.get("dram", "no energy counter of the memory was read"))
        if self.sources.cpu_method is None:
            raise NotMeasured(self.sources.reasons["cpu"])
        if is_estimate(self.sources.cpu_method):
            power_w = self.sources.cpu_tdp_w
            if power_w is None:
                raise NotMeasured("the design power of this CPU is not known")
            return (self._checked(load_curve(self.log.loads, power_w, "the load of the CPU"), "cpu.load"),)
        curves = []
        for place, zone in enumerate(self.log.header.zones):
            if zone.domain == domain:
                curve = rapl_curve(self.log.rapl, place, zone.max_uj, f"the energy counter of {zone.name}")
                curves.append(self._checked(curve, f"rapl.{zone.name}"))
        return tuple(curves)

    def window_j(self, curve: Curve, share: float | None) -> float:
        """The energy of the window by one curve; `share` is its part of a power at rest that was measured before.

        Raises:
            NotMeasured: as `Curve`.
        """
        return self.energy_j(curve, self.window, (names.GUARD_BEFORE, names.GUARD_AFTER), share)

    def energy_j(self, curve: Curve, window: Span, guards: tuple[str, str], share: float | None) -> float:
        """The energy of a window between two guards, or under load.

        Raises:
            NotMeasured: as `Curve`.
        """
        closed = self._closed(curve, window, guards, share)
        return curve.between_j(window) if closed is None else curve.closed_j(closed)

    def closing_doubt_j(self, curve: Curve) -> float:
        """By how much the energy of the window may be off for how it ended; 0 for one that ended under load."""
        closed = self._closed(curve, self.window, (names.GUARD_BEFORE, names.GUARD_AFTER), None)
        return 0.0 if closed is None else curve.closing_doubt_j(closed)

    def _closed(self, curve: Curve, window: Span, guards: tuple[str, str], share: float | None) -> ClosedWindow | None:
        before, after = (self.span(name) for name in guards)
        if self.is_steady_mode or before is None or after is None:
            return None
        return ClosedWindow(window, before, after, self._rest_power_w(curve, share))

    def _rest_power_w(self, curve: Curve, share: float | None) -> float | None:
        rest = self.span(names.IDLE_LOADED)
        if rest is not None:
            try:
                return curve.mean_power_w(rest)
            except NotMeasured:
                return None
        known_w = self.baselines.loaded_power_w
        return None if known_w is None or share is None else share * known_w

    @property
    def _has_dram(self) -> bool:
        return self.sources.cpu_method == EnergySource.RAPL and any(
            zone.domain == DRAM for zone in self.log.header.zones
        )

    def _checked(self, curve: Curve, meter: str) -> Curve:
        """The curve, unless the meter hardly said anything; then what it said instead is the reason."""
        said = [error.message for error in self.log.errors if error.meter == meter]
        if len(curve.at_ns) >= 2:
            return replace(curve, said=said[-1]) if said else curve
        raise NotMeasured(f"{curve.what} cannot be read: {said[-1]}" if said else f"{curve.what} was never read twice")


def span_of(marks: Sequence[Mark], name: str) -> Span | None:
    """From the first to the last moment under that mark; None without one."""
    found = [mark for mark in marks if mark.name == name]
    return Span(min(mark.opened_ns for mark in found), max(mark.closed_ns for mark in found)) if found else None
