"""What energy can be measured on this machine, for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from lem.base.clock import Clock
from lem.base.codec import encode
from lem.base.dataclass import asdict, dataclass, replace
from lem.base.measurement import EnergyScope, EnergySource, Measured, Section, known
from lem.base.units import NS_PER_S
from lem.meters.attempt import measured, need
from lem.meters.curve import Span, counter_curve, update_period_s
from lem.meters.hwmon import HwmonMeter, hwmon_gpus
from lem.meters.nvml import NvmlMeter, gpu_uuids
from lem.meters.rapl import find_rapl, find_tdp
from lem.meters.sampler import Complaints, GpuWatch
from lem.meters.samples import NVML, CounterChange, GpuHeader, Meter
from lem.meters.sensors import find_sensors
from lem.meters.sources import choose_gpu_method
from lem.meters.uncertainty import lag_s
from lem.meters.usage import HERE, Roots

# Shorter than a tenth of the shortest update period seen (20 ms).
_POLL_S = 0.002
PULSE_S = 1.5  # of work, with rests as long: some updates of a slow counter, once power has settled

# When a GPU worked; its result raises NotMeasured where it could not.
Pulses = Future[Sequence[Span]]


@dataclass(frozen=True)
class GpuCapability(Section):
    meter: GpuHeader  # an error in it holds its remedy
    counter_update_period_s: float | None = None  # of its energy counter
    counter_lag_s: float | None = None  # how late that shows energy

    @property
    def source(self) -> EnergySource | None:
        return choose_gpu_method([self.meter], is_watched=True)[0]

    @property
    def _counter(self) -> str:
        sensor = self.meter.counter_sensor
        return "energy counter" if sensor is None else f"energy counter {sensor}"

    def describe(self) -> tuple[str, ...]:
        meter = self.meter
        if meter.counter_error is not None:
            stead = " (power is integrated instead, and the record says so)" if meter.power_error is None else ""
            counter = f"{meter.counter_error}{stead}"
        elif self.counter_update_period_s is None:
            why = self.why_none("counter_update_period_s")
            counter = self._counter + ("" if why.code == "not_probed" else f"; {why}")
        else:
            late = f"its lag is not known: {self.why_none('counter_lag_s')}"
            if self.counter_lag_s is not None:
                late = f"shows energy {self.counter_lag_s * 1e3:.0f} ms late"
            counter = f"{self._counter}, updated every {self.counter_update_period_s * 1e3:.0f} ms; {late}"
        kind = "instantaneous" if meter.power_source == "instant" else "an average, over 1 s on some GPUs"
        if meter.power_sensor is not None:
            kind = describe_power(meter)
        limit = "" if meter.power_limit_w is None else f", limit {meter.power_limit_w:g} W"
        lines = [counter, f"{meter.power_error or f'power: {kind}'}{limit}"]
        if meter.covered_by is not None:
            return (f"{meter.power_error} ({meter.covered_by})",)
        if meter.energy_scope == EnergyScope.MODULE:
            lines.append("energy and power are those of the whole module, CPU included")
        if meter.energy_scope == EnergyScope.CARD:
            lines.append("energy and power are those of the whole card, both chiplets")
        if meter.persistence_mode is False:
            lines.append("persistence mode is off: idle power is higher while GPUs are sampled; nvidia-smi -pm 1")
        return tuple(lines)


def describe_power(meter: GpuHeader) -> str:
    """The sensor of hwmon, and over what it averages."""
    interval = "" if meter.power_interval_s is None else f", over {meter.power_interval_s:g} s"
    kind = "an average" if meter.power_source == "average" else "instantaneous"
    return f"{meter.power_sensor} ({kind}{interval})"


@dataclass(frozen=True)
class CpuCapability:
    zones: tuple[str, ...] = ()  # of RAPL, that can be read
    rapl_error: str | None = None  # why there is none
    rapl_remedy: str = ""
    missing: tuple[str, ...] = ()  # zones other than packages that cannot be read, each with its reason
    tdp_w: float | None = None  # the design power of all packages, for `measurement.energy: tdp_estimate`
    tdp_source: str | None = None


@dataclass(frozen=True)
class Capabilities:
    cpu: CpuCapability
    gpus: tuple[GpuCapability, ...] = ()
    gpu_error: str | None = None  # why there is no GPU to measure
    sensors: tuple[GpuHeader, ...] = ()  # of the module, the CPUs or the machine

    def to_dict(self) -> dict[str, Any]:
        gpus = [{**asdict(gpu.meter), "energy_source": gpu.source, **encode(gpu, "")} for gpu in self.gpus]
        for gpu in gpus:
            del gpu["meter"]
        sensors = [
            {"name": it.uuid, "scope": it.energy_scope, "sensor": it.power_sensor, "interval_s": it.power_interval_s}
            | {"error": it.power_error}
            for it in self.sensors
        ]
        cpu = asdict(self.cpu)
        return {"gpus": gpus, "gpu_error": self.gpu_error, "cpu": cpu, "sensors": sensors}


def find_capabilities(
    nvml: Any,
    clock: Clock,
    *,
    probe_s: float = 0.0,
    enough: int = 6,
    start: Callable[[str], Pulses] | None = None,
    roots: Roots = HERE,
) -> Capabilities:
    """What can be measured here; counters are polled for `probe_s`, or until each has changed `enough` times."""
    rapl = find_rapl(roots.powercap)
    design_w, design_source = find_tdp(None, roots.powercap)
    cpu = CpuCapability(
        zones=tuple(counter.zone.name for counter in rapl.counters),
        rapl_error=rapl.error,
        rapl_remedy=rapl.remedy,
        missing=tuple(f"{name}: {why}" for name, why in rapl.missing),
        tdp_w=design_w,
        tdp_source=design_source,
    )
    uuids = () if isinstance(nvml, str) else gpu_uuids(nvml)
    meters: list[Meter] = [NvmlMeter(nvml, uuid) for uuid in uuids if uuid is not None]
    for gpu in hwmon_gpus(len(uuids), roots.sys):
        meters.append(HwmonMeter(roots.sys, gpu.uuid))
        meters[-1].header = replace(meters[-1].header, index=gpu.index)
    not_probed: Measured[float] = known(None, "not_probed")
    found = [_with(meter.header, not_probed, known(meter.header.counter_lag_s, "not_probed")) for meter in meters]
    if probe_s > 0:
        found = _probed(meters, clock, probe_s, enough, start)
    text = "the GPU does not answer; dmesg says why (Xid), reset it or reboot"
    lost = GpuHeader(None, "unknown", "unknown", "unknown", counter_error=text, power_error=text)
    found += [_with(replace(lost, index=index), not_probed, not_probed) for index, uuid in enumerate(uuids) if not uuid]
    gpus = sorted(found, key=lambda gpu: -1 if gpu.meter.index is None else gpu.meter.index)
    gpu_error = f"NVML is not available: {nvml}" if isinstance(nvml, str) else "NVML sees no GPU"
    sensors = tuple(meter.header for meter in find_sensors(roots.sys))
    return Capabilities(cpu, tuple(gpus), None if gpus else gpu_error, sensors)


def _with(header: GpuHeader, period_s: Measured[float], lag_s: Measured[float]) -> GpuCapability:
    return GpuCapability.of(meter=header, counter_update_period_s=period_s, counter_lag_s=lag_s)


def _probed(
    meters: Sequence[Meter], clock: Clock, probe_s: float, enough: int, start: Callable[[str], Pulses] | None
) -> list[GpuCapability]:
    watches = [GpuWatch(meter, place, clock, Complaints()) for place, meter in enumerate(meters)]
    changes: list[CounterChange] = []
    opened_ns = clock.monotonic_ns()
    closes_ns = opened_ns + round(probe_s * NS_PER_S)
    wanted = [place for place, meter in enumerate(meters) if meter.has("counter")]
    pulsed = [place for place in wanted if start is not None and meters[place].header.meter == NVML]
    pulses = {place: measured(partial(start, meters[place].header.uuid)) for place in pulsed if start is not None}

    def goes_on() -> bool:
        seen = [row.gpu for row in changes]
        is_short = clock.monotonic_ns() < closes_ns and any(seen.count(place) <= enough for place in wanted)
        return is_short or any(it.value is not None and not it.value.done() for it in pulses.values())

    while goes_on():
        changes += [row for watch in watches for row in watch.poll() if isinstance(row, CounterChange)]
        clock.sleep(_POLL_S)
    span = Span(opened_ns, max(clock.monotonic_ns(), opened_ns + 1))
    absent: Measured[float] = known(None, "counter_absent")
    found = [_with(meter.header, absent, absent) for meter in meters]
    for place in wanted:
        header, period = meters[place].header, measured(partial(update_period_s, changes, place, span))
        lag = period if place in pulses else known(header.counter_lag_s, "not_probed")
        if place in pulses and period.value is not None:
            lag = measured(partial(_lag_s, changes, place, pulses[place]))
        found[place] = _with(header, period, lag)
    return found


def _lag_s(changes: Sequence[CounterChange], place: int, pulses: Measured[Pulses]) -> float:
    works, curve = need(pulses).result(), counter_curve(changes, place, "the energy counter")
    rests = (Span(work.opened_ns - round(PULSE_S * NS_PER_S), work.opened_ns) for work in works)
    found = [measured(partial(lag_s, curve, rest, work, PULSE_S)) for rest, work in zip(rests, works, strict=True)]
    seen_s = [item.value for item in found if item.value is not None]
    return statistics.median(seen_s) if seen_s else need(found[-1])
