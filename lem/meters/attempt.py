"""The log of one attempt, which meter its energy comes from, and its curves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from types import MappingProxyType
from typing import Final, TypeVar

from lem.base import measurement as names
from lem.base.errors import MeterRefused
from lem.base.measurement import EnergyScope, EnergySource, Measured, is_counter, is_cpu_source, is_estimate, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import MeteredConfig
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
from lem.meters.samples import HWMON, NVML, GpuHeader, Mark, SampleHeader, SampleLog, gpu_meter

# The methods of each kind of `GpuHeader.meter`, the best first: the counter, then the integrals of each `power_source`.
_METHODS: Final = MappingProxyType(
    {
        NVML: (EnergySource.COUNTER, EnergySource.INSTANT_POWER, EnergySource.AVERAGE_POWER),
        HWMON: (EnergySource.HWMON_COUNTER, EnergySource.HWMON_POWER, EnergySource.HWMON_POWER),
    }
)

# How far `GpuSample.power_w` may lag behind: field 186 is brought up to date every 100 ms from at most the 100 ms
# before; `nvmlDeviceGetPowerUsage` is a mean over 1 s on GA10x, Ada and Hopper (Yang et al., SC24; NVML reference).
SENSOR_LAG_S: Final = MappingProxyType({"instant": 0.2, "average": 1.1})

_GUARDS: Final = {
    names.WINDOW: (names.GUARD_BEFORE, names.GUARD_AFTER),
    names.PREFILL: (names.PREFILL_GUARD_BEFORE, names.PREFILL_GUARD_AFTER),
}

_NOT_WANTED = Reason.of("energy_off")
LEAVE_AT_AUTO = "leave measurement.energy at auto; energy is then null in the record, with this reason"


@dataclass(frozen=True)
class Sources:
    gpus: tuple[int, ...]  # places in `SampleHeader.gpus`, by which rows name GPUs, in the order of the experiment
    gpu_method: EnergySource | None  # None without a meter
    cpu_method: EnergySource | None
    is_external: bool  # the user names a file of another meter
    primary: EnergySource | None  # the `energy_source` of the energy that counts
    scope: EnergyScope | None  # what the primary covers
    sample_period_s: float  # between samples of power in the window
    idle_period_s: float  # and at rest
    # Why there is no meter, by `gpu`, `cpu`, `dram`, `external`, `primary`.
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    missing_uuids: tuple[str, ...] = ()  # GPUs of the experiment that the sampler does not see
    is_watched: bool = True  # GPUs are sampled in the window; else only their counters are read
    cpu_tdp_w: float | None = None  # the design power of all packages, by the user, else by the kernel
    sensors: tuple[int, ...] = ()  # places in `SampleHeader.devices` of the sensors that cover the experiment
    power_lag_s: float = 0.0  # of the slowest power that is integrated; 0 if none is
    # Above these, waiting for a CPU makes an attempt invalid, and other programs void the energy of the CPU.
    max_wait_ratio: float | None = None
    max_foreign_ratio: float | None = None

    @property
    def least_guard_s(self) -> float:
        """How long a guard must be for integrated power: until the sensor shows the guard alone, plus two samples."""
        return self.power_lag_s + 2 * self.sample_period_s if self.power_lag_s else 0.0


def choose_sources(
    config: MeteredConfig,
    header: SampleHeader,
    gpu_uuids: Sequence[str],
    *,
    foreign: Mapping[str, Sequence[int]] | None = None,
) -> Sources:
    """The meters of an experiment on these GPUs, or on the CPU; MeterRefused if required energy cannot be had."""
    wanted, user_tdp_w = config.measurement.energy, config.measurement.cpu_tdp_w
    places = {gpu.uuid: place for place, gpu in enumerate(header.gpus)}
    gpus = tuple(
        places[uuid] for uuid in gpu_uuids if uuid in places and header.gpus[places[uuid]].covered_by not in gpu_uuids
    )
    chosen = [header.gpus[place] for place in gpus]
    gpu_method, why_no_gpu = None, _why_no_gpu(wanted, header, gpu_uuids, foreign or {})
    if why_no_gpu is None:
        gpu_method, why_no_gpu = choose_gpu_method(chosen, is_watched=config.timeseries.enabled)
    if wanted == "nvml" and gpu_method != EnergySource.COUNTER:
        others = ", ".join(gpu.uuid for gpu in chosen if gpu.meter != NVML)
        why_no_counter = f"the energy counter cannot be read: {_counter_errors(chosen)}"
        if others:
            why_no_counter = f"NVML does not see {others}"
        raise MeterRefused(f"measurement.energy: nvml: {why_no_gpu or why_no_counter}", LEAVE_AT_AUTO)
    cpu_method, why_no_cpu = _cpu_method(wanted, header, user_tdp_w)
    sensors, why_no_sensor = _choose_sensors(wanted, header, is_on_gpu=bool(gpu_uuids))
    is_external = config.measurement.external_csv is not None
    # The CPU's energy counts only for an experiment on the CPU, or if the user asks for it by name.
    counted_cpu_method = cpu_method if not gpu_uuids or is_cpu_source(wanted) else None
    sensor_method = EnergySource.HWMON_SENSOR if sensors else None
    if wanted == HWMON:
        counted_cpu_method = None
        if gpu_method is None and sensor_method is None:
            raise MeterRefused(f"measurement.energy: hwmon: {why_no_gpu}; {why_no_sensor}", LEAVE_AT_AUTO)
    external_method = EnergySource.EXTERNAL if is_external and wanted != HWMON else None
    primary = gpu_method or counted_cpu_method or external_method or sensor_method
    if primary != EnergySource.HWMON_SENSOR:
        sensors = ()
    why_no_primary = why_no_sensor if header.sensors else why_no_gpu if gpu_uuids else why_no_cpu
    reasons = {
        "gpu": why_no_gpu,
        "cpu": why_no_cpu,
        "dram": why_no_cpu or _why_no_dram(header, cpu_method),
        "sensor": why_no_sensor,
        "external": None if is_external else Reason.of("option_not_given", option="measurement.external_csv"),
        "primary": None if primary else why_no_primary,
    }
    if primary in (None, EnergySource.EXTERNAL) or is_estimate(primary):
        estimate = "measurement.energy: tdp_estimate" if is_estimate(primary) else None
        why = reasons["primary"] or estimate or "there is only measurement.external_csv"
        for option, is_set, figure in (
            ("measurement.phases", config.measurement.phases and not estimate, "the energy of a phase"),
            ("baseline.required", config.baseline.required, "power at rest"),
        ):
            if is_set:
                raise MeterRefused(f"{option}: true: no meter here can measure {figure}: {why}", f"remove {option}")
    return Sources(
        gpus=gpus,
        gpu_method=gpu_method,
        cpu_method=cpu_method,
        is_external=is_external,
        primary=primary,
        scope=_scope_of(primary, [header.devices[place] for place in sensors or gpus]),
        sample_period_s=config.timeseries.sample_interval_ms / 1000,
        idle_period_s=config.baseline.sample_interval_ms / 1000,
        reasons={name: reason for name, reason in reasons.items() if reason is not None},
        missing_uuids=tuple(uuid for uuid in gpu_uuids if uuid not in places),
        is_watched=config.timeseries.enabled,
        cpu_tdp_w=header.cpu_tdp_w if user_tdp_w is None else user_tdp_w,
        sensors=sensors,
        power_lag_s=_power_lag_s(gpu_method, chosen, [header.devices[place] for place in sensors]),
        max_wait_ratio=_ratio(config.measurement.max_wait_pct),
        max_foreign_ratio=_ratio(config.measurement.max_foreign_pct),
    )


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _why_no_dram(header: SampleHeader, cpu_method: EnergySource | None) -> Reason | None:
    if is_estimate(cpu_method):
        return Reason.of("dram_not_estimated")
    if any(zone.domain == DRAM for zone in header.zones):
        return None
    return Reason.of("sampler_reports", error=header.dram_error) if header.dram_error else Reason.of("no_dram")


def _scope_of(primary: EnergySource | None, gpus: Sequence[GpuHeader]) -> EnergyScope | None:
    if primary is None:
        return None
    if primary == EnergySource.EXTERNAL:
        return EnergyScope.MACHINE
    if is_cpu_source(primary):
        return EnergyScope.CPU_PACKAGE
    scopes = {gpu.energy_scope for gpu in gpus}
    wider = (EnergyScope.MACHINE, EnergyScope.MODULE, EnergyScope.CARD, EnergyScope.CPU_PACKAGE)
    return next((scope for scope in wider if scope in scopes), EnergyScope.GPU)


def sensor_lag_s(device: GpuHeader) -> float:
    return SENSOR_LAG_S.get(device.power_source or "", 0.0) if device.power_lag_s is None else device.power_lag_s


def _power_lag_s(gpu_method: EnergySource | None, gpus: Sequence[GpuHeader], sensors: Sequence[GpuHeader]) -> float:
    integrated = sensors if gpu_method is None else () if is_counter(gpu_method) else gpus
    return max(map(sensor_lag_s, integrated), default=0.0)


def _choose_sensors(wanted: str, header: SampleHeader, *, is_on_gpu: bool) -> tuple[tuple[int, ...], Reason | None]:
    """The places of the sensors that cover an experiment, as little else as possible; or why there is none."""
    if wanted not in ("auto", HWMON):
        return (), Reason.of("other_meter_set", energy=wanted) if wanted != "none" else _NOT_WANTED
    scopes = (EnergyScope.MODULE, EnergyScope.MACHINE)
    for scope in scopes if is_on_gpu else (EnergyScope.CPU_PACKAGE, *scopes):
        devices = enumerate(header.sensors, start=len(header.gpus))
        found = {place: sensor for place, sensor in devices if sensor.energy_scope == scope}
        errors = [f"{sensor.uuid}: {sensor.power_error}" for sensor in found.values() if sensor.power_error]
        if errors:
            return (), Reason.of("sampler_reports", error="; ".join(errors))
        if found:
            return tuple(found), None
    return (), Reason.of("no_sensor")


def _why_no_gpu(
    wanted: str, header: SampleHeader, gpu_uuids: Sequence[str], foreign: Mapping[str, Sequence[int]]
) -> Reason | None:
    if wanted == "none":
        return _NOT_WANTED
    if not gpu_uuids:
        return Reason.of("on_cpu")
    is_other = wanted == HWMON and any(gpu.meter != HWMON for gpu in header.gpus if gpu.uuid in gpu_uuids)
    if is_cpu_source(wanted) or is_other:
        return Reason.of("other_meter_set", energy=wanted)
    missing = ", ".join(uuid for uuid in gpu_uuids if all(gpu.uuid != uuid for gpu in header.gpus))
    cut = [gpu.uuid for gpu in header.gpus if gpu.mig_mode]
    if missing and cut:  # CUDA calls an instance by a name of its own
        return Reason.of("mig_instance", missing=missing, cut=", ".join(cut))
    if missing:
        return Reason.of("meter_unreadable", what=missing, error=header.gpu_error or Reason.of("gpu_unseen"))
    for uuid in cut:
        if uuid in gpu_uuids:
            return Reason.of("mig_board", uuid=uuid)
    for uuid in gpu_uuids:
        if foreign.get(uuid):
            return Reason.of("gpu_shared", uuid=uuid, pids=", ".join(map(str, foreign[uuid])))
    return None


def choose_gpu_method(gpus: Sequence[GpuHeader], *, is_watched: bool) -> tuple[EnergySource | None, Reason | None]:
    """The best method that every GPU has, since only energies read in one way are summed; or why there is none."""
    if len({gpu.meter for gpu in gpus}) > 1:
        return None, Reason.of("meters_mixed")
    counter, instant, average = _METHODS[gpus[0].meter if gpus else NVML]
    if all(gpu.counter_error is None for gpu in gpus):
        return counter, None
    if not is_watched:
        return None, Reason.of("power_not_sampled", errors=_counter_errors(gpus))
    if all(gpu.power_error is None and gpu.power_source == "instant" for gpu in gpus):
        return instant, None
    if all(gpu.power_error is None and gpu.power_source is not None for gpu in gpus):
        return average, None
    silent = [gpu for gpu in gpus if gpu.power_error or not gpu.power_source]
    power_errors = "; ".join(f"{gpu.uuid}: {gpu.power_error or 'not reported'}" for gpu in silent)
    return None, Reason.of("gpu_unreadable", counter_errors=_counter_errors(gpus), power_errors=power_errors)


def _counter_errors(gpus: Sequence[GpuHeader]) -> str:
    return "; ".join(f"{gpu.uuid}: {gpu.counter_error}" for gpu in gpus if gpu.counter_error is not None)


def _cpu_method(wanted: str, header: SampleHeader, tdp_w: float | None) -> tuple[EnergySource | None, Reason | None]:
    if wanted == "none":
        return None, _NOT_WANTED
    if wanted == EnergySource.TDP_ESTIMATE:
        if tdp_w is None and header.cpu_tdp_w is None:
            text = "measurement.energy: tdp_estimate: the design power of this CPU is unknown"
            raise MeterRefused(text, "set measurement.cpu_tdp_w to the sum over all packages in watts")
        return EnergySource.TDP_ESTIMATE, None
    if any(zone.domain == PACKAGE for zone in header.zones):
        return EnergySource.RAPL, None
    error = header.rapl_error
    why = Reason.of("sampler_reports", error=error) if error else Reason.of("no_package")
    if wanted == EnergySource.RAPL:
        raise MeterRefused(f"measurement.energy: rapl: {why}", LEAVE_AT_AUTO)
    return None, why


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
            self._known[key] = self._checked(curve, gpu_meter(place, "counter"))
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
            self._known[key] = self._checked(curve, gpu_meter(place, "power"))
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

    def _checked(self, curve: Curve, meter: str) -> Curve:
        errors = [error.message for error in self.log.errors if error.meter == meter]
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
