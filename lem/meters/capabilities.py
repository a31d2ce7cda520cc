"""What energy can be measured on this machine, for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lem.base.clock import Clock
from lem.base.measurement import EnergyScope, EnergySource
from lem.base.units import NS_PER_S
from lem.meters.attempt import choose_gpu_method, measured
from lem.meters.curve import Span, update_period_s
from lem.meters.nvml import NvmlMeter, gpu_uuids
from lem.meters.rapl import POWERCAP, find_rapl, find_tdp
from lem.meters.sampler import Complaints, GpuWatch
from lem.meters.samples import CounterChange, GpuHeader

# Shorter than a tenth of the shortest update period seen (20 ms).
_POLL_S = 0.002


@dataclass(frozen=True)
class GpuCapability:
    meter: GpuHeader  # an error in it holds its remedy
    counter_update_period_s: float | None = None  # of its energy counter; None when it was not probed, or in vain
    probe_error: str | None = None  # why probing failed

    @property
    def source(self) -> EnergySource | None:
        """What its energy comes from, as `record.Energy.energy_source` has it; None for nothing."""
        return choose_gpu_method([self.meter], is_watched=True)[0]

    def describe(self) -> tuple[str, ...]:
        meter = self.meter
        if meter.counter_error is not None:
            stead = " (power is integrated instead, and the record says so)" if meter.power_error is None else ""
            counter = f"{meter.counter_error}{stead}"
        elif self.counter_update_period_s is not None:
            # An idle GPU shows no step of power by which the lag could be seen.
            counter = f"energy counter, updated every {self.counter_update_period_s * 1e3:.0f} ms; results have its lag"
        else:
            counter = "energy counter" + ("" if self.probe_error is None else f"; {self.probe_error}")
        kind = "instantaneous" if meter.power_source == "instant" else "an average, over 1 s on some GPUs"
        lines = [counter, meter.power_error or f"power: {kind}"]
        if meter.power_limit_w is not None:
            lines[-1] += f", limit {meter.power_limit_w:g} W"
        if meter.energy_scope == EnergyScope.MODULE:
            lines.append("energy and power are those of the whole module, CPU included")
        if meter.persistence_mode is False:
            lines.append("persistence mode is off: idle power is higher while GPUs are sampled; nvidia-smi -pm 1")
        return tuple(lines)


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

    def to_dict(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        gpus = [
            {**found.pop("meter"), "energy_source": gpu.source, **found}
            for gpu, found in zip(self.gpus, document["gpus"], strict=True)
        ]
        return {"gpus": gpus, "gpu_error": self.gpu_error, "cpu": document["cpu"]}


def find_capabilities(
    nvml: Any, clock: Clock, *, probe_s: float = 0.0, enough: int = 6, rapl_root: Path = POWERCAP
) -> Capabilities:
    """What can be measured here.

    `nvml` is as from `open_nvml`. Energy counters are polled for `probe_s` to see how often they change (0 for not at
    all), or until each has changed `enough` times.
    """
    rapl = find_rapl(rapl_root)
    design_w, design_source = find_tdp(None, rapl_root)
    cpu = CpuCapability(
        zones=tuple(counter.zone.name for counter in rapl.counters),
        rapl_error=rapl.error,
        rapl_remedy=rapl.remedy,
        missing=tuple(f"{name}: {why}" for name, why in rapl.missing),
        tdp_w=design_w,
        tdp_source=design_source,
    )
    if isinstance(nvml, str):
        return Capabilities(cpu, gpu_error=f"NVML is not available: {nvml}")
    uuids = gpu_uuids(nvml)
    meters = [NvmlMeter(nvml, uuid) for uuid in uuids if uuid is not None]
    found = [GpuCapability(meter.header) for meter in meters]
    if probe_s > 0:
        found = _probed(meters, clock, probe_s, enough)
    text = "the GPU does not answer; dmesg says why (Xid), reset it or reboot"
    lost = GpuHeader(None, "unknown", "unknown", "unknown", counter_error=text, power_error=text)
    found += [GpuCapability(replace(lost, index=index)) for index, uuid in enumerate(uuids) if uuid is None]
    gpus = sorted(found, key=lambda gpu: -1 if gpu.meter.index is None else gpu.meter.index)
    return Capabilities(cpu, tuple(gpus), None if gpus else "NVML sees no GPU")


def _probed(meters: Sequence[NvmlMeter], clock: Clock, probe_s: float, enough: int) -> list[GpuCapability]:
    watches = [GpuWatch(meter, place, clock, Complaints()) for place, meter in enumerate(meters)]
    changes: list[CounterChange] = []
    opened_ns = clock.monotonic_ns()
    closes_ns = opened_ns + round(probe_s * NS_PER_S)
    wanted = [place for place, meter in enumerate(meters) if meter.has("counter")]
    while (now_ns := clock.monotonic_ns()) < closes_ns:
        changes += [row for watch in watches for row in watch.poll() if isinstance(row, CounterChange)]
        seen = [row.gpu for row in changes]
        if all(seen.count(place) > enough for place in wanted):
            break
        clock.sleep(_POLL_S)
    span = Span(opened_ns, max(now_ns, opened_ns + 1))
    found = [GpuCapability(meter.header) for meter in meters]
    for place in wanted:
        period = measured(partial(update_period_s, changes, place, span))
        error = f"it changed fewer than three times in {span.seconds:.1f} s" if period.null_reason else None
        found[place] = GpuCapability(meters[place].header, period.value, error)
    return found
