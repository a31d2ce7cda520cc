"""Which meters there are, and which one a window's energy comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lem.base.clock import Clock
from lem.base.errors import MeterRefused
from lem.base.measurement import EnergyScope, EnergySource, is_cpu_source, is_estimate
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.meters.curve import NotMeasured, Span, update_period_s
from lem.meters.nvml import NvmlMeter, gpu_uuids
from lem.meters.rapl import DRAM, PACKAGE, POWERCAP, find_rapl, find_tdp
from lem.meters.sampler import Complaints, GpuWatch
from lem.meters.samples import CounterChange, GpuHeader, SampleHeader

# The method that integrates each kind of `GpuHeader.power_source`.
POWER_METHODS: Final = MappingProxyType({"instant": EnergySource.INSTANT_POWER, "average": EnergySource.AVERAGE_POWER})

# How far `GpuSample.power_w` may lag behind: field 186 is brought up to date every 100 ms from at most the 100 ms
# before; `nvmlDeviceGetPowerUsage` is a mean over 1 s on GA10x, Ada and Hopper (Yang et al., SC24; NVML reference).
SENSOR_LAG_S: Final = MappingProxyType({"instant": 0.2, "average": 1.1})

_NOT_WANTED = Reason.of("energy_off")
_LEAVE_AT_AUTO = "leave measurement.energy at auto; energy is then null in the record, with this reason"


@dataclass(frozen=True)
class Sources:
    """Which meter each kind of energy comes from."""

    gpus: tuple[int, ...]  # places in `SampleHeader.gpus`, by which rows name GPUs, in the order of the experiment
    gpu_method: EnergySource | None  # None without a meter
    cpu_method: EnergySource | None
    is_external: bool  # the user names a file of another meter
    primary: EnergySource | None  # the `energy_source` of the energy that counts
    scope: EnergyScope | None  # what the primary covers
    sample_period_s: float  # between samples of power in the window
    idle_period_s: float  # and at rest
    reasons: Mapping[str, Reason] = field(
        default_factory=dict
    )  # no meter: by `gpu`, `cpu`, `dram`, `external`, `primary`
    missing_uuids: tuple[str, ...] = ()  # GPUs of the experiment that the sampler does not see
    is_watched: bool = True  # GPUs are sampled in the window; else only their counters are read
    cpu_tdp_w: float | None = None  # the design power of all packages, by the user, else by the kernel

    @property
    def least_guard_s(self) -> float:
        """How long a guard must be for integrated power: until the sensor shows the guard alone, plus two samples."""
        for power_source, method in POWER_METHODS.items():
            if self.gpu_method == method:
                return SENSOR_LAG_S[power_source] + 2 * self.sample_period_s
        return 0.0


def choose_sources(
    config: ExperimentConfig,
    header: SampleHeader,
    gpu_uuids: Sequence[str],
    is_cpu: bool,
    *,
    foreign: Mapping[str, Sequence[int]] | None = None,
) -> Sources:
    """The meters of an experiment on these GPUs.

    Args:
        foreign: {uuid: pids} of compute processes of others before it begins.

    Raises:
        MeterRefused: it demands energy that cannot be measured here; an accepted option must take effect.
    """
    wanted = config.measurement.energy
    known = {gpu.uuid: place for place, gpu in enumerate(header.gpus)}
    gpus = tuple(known[uuid] for uuid in gpu_uuids if uuid in known)
    missing = tuple(uuid for uuid in gpu_uuids if uuid not in known)
    chosen = [header.gpus[place] for place in gpus]
    why_no_gpu = _why_no_gpu(wanted, header, gpu_uuids, is_cpu, missing, foreign or {})
    gpu_method = None
    if why_no_gpu is None:
        gpu_method, why_no_gpu = choose_gpu_method(chosen, is_watched=config.timeseries.enabled)
    if wanted == "nvml" and gpu_method != EnergySource.COUNTER:
        why_no_counter = f"the energy counter cannot be read: {_counter_errors(chosen)}"
        raise MeterRefused(f"measurement.energy: nvml: {why_no_gpu or why_no_counter}", _LEAVE_AT_AUTO)
    cpu_method, why_no_cpu = _cpu_method(wanted, header, config.measurement.cpu_tdp_w)
    is_external = config.measurement.external_csv is not None
    is_of_module = any(gpu.energy_scope == EnergyScope.MODULE for gpu in chosen)
    gpu_scope = EnergyScope.MODULE if is_of_module else EnergyScope.GPU
    primary, scope = _primary(wanted, gpu_method, cpu_method, is_external, is_cpu, gpu_scope)
    reasons = {
        "gpu": why_no_gpu,
        "cpu": why_no_cpu,
        "dram": why_no_cpu or _why_no_dram(cpu_method, header),
        "external": None if is_external else Reason.of("option_not_given", option="measurement.external_csv"),
        "primary": None if primary else why_no_cpu if is_cpu else why_no_gpu,
    }
    sources = Sources(
        gpus=gpus,
        gpu_method=gpu_method,
        cpu_method=cpu_method,
        is_external=is_external,
        primary=primary,
        scope=scope,
        sample_period_s=config.timeseries.sample_interval_ms / 1000,
        idle_period_s=config.baseline.sample_interval_ms / 1000,
        reasons={name: reason for name, reason in reasons.items() if reason is not None},
        missing_uuids=missing,
        is_watched=config.timeseries.enabled,
        cpu_tdp_w=header.cpu_tdp_w if config.measurement.cpu_tdp_w is None else config.measurement.cpu_tdp_w,
    )
    _refuse_demands(config, sources)
    return sources


def _why_no_gpu(
    wanted: str,
    header: SampleHeader,
    gpu_uuids: Sequence[str],
    is_cpu: bool,
    missing: Sequence[str],
    foreign: Mapping[str, Sequence[int]],
) -> Reason | None:
    """Why the energy of the GPUs is not measured; None if it is."""
    if wanted == "none":
        return _NOT_WANTED
    if is_cpu or not gpu_uuids:
        return Reason.of("on_cpu")
    if is_cpu_source(wanted):
        return Reason.of("other_meter_set", energy=wanted)
    cut = [gpu.uuid for gpu in header.gpus if gpu.mig_mode]
    if missing and cut:  # CUDA calls an instance by a name of its own
        return Reason.of("mig_instance", missing=", ".join(missing), cut=", ".join(cut))
    if missing:
        error = header.gpu_error or Reason.of("gpu_unseen")
        return Reason.of("meter_unreadable", what=", ".join(missing), error=error)
    for gpu in header.gpus:
        if gpu.uuid in gpu_uuids and gpu.mig_mode:
            return Reason.of("mig_board", uuid=gpu.uuid)
    for uuid in gpu_uuids:
        if foreign.get(uuid):
            pids = ", ".join(str(pid) for pid in foreign[uuid])
            return Reason.of("gpu_shared", uuid=uuid, pids=pids)
    return None


def choose_gpu_method(gpus: Sequence[GpuHeader], *, is_watched: bool) -> tuple[EnergySource | None, Reason | None]:
    """The best method that every GPU has, since only energies read in one way are summed; or why there is none."""
    if all(gpu.counter_error is None for gpu in gpus):
        return EnergySource.COUNTER, None
    if not is_watched:
        return None, Reason.of("power_not_sampled", errors=_counter_errors(gpus))
    if all(gpu.power_error is None and gpu.power_source == "instant" for gpu in gpus):
        return EnergySource.INSTANT_POWER, None
    if all(gpu.power_error is None and gpu.power_source is not None for gpu in gpus):
        return EnergySource.AVERAGE_POWER, None
    return None, Reason.of("gpu_unreadable", counter_errors=_counter_errors(gpus), power_errors=_power_errors(gpus))


def _counter_errors(gpus: Sequence[GpuHeader]) -> str:
    return "; ".join(f"{gpu.uuid}: {gpu.counter_error}" for gpu in gpus if gpu.counter_error is not None)


def _power_errors(gpus: Sequence[GpuHeader]) -> str:
    silent = [gpu for gpu in gpus if gpu.power_error or not gpu.power_source]
    return "; ".join(f"{gpu.uuid}: {gpu.power_error or 'not reported'}" for gpu in silent)


def _cpu_method(
    wanted: str, header: SampleHeader, user_tdp_w: float | None
) -> tuple[EnergySource | None, Reason | None]:
    if wanted == "none":
        return None, _NOT_WANTED
    if wanted == EnergySource.TDP_ESTIMATE:
        if user_tdp_w is None and header.cpu_tdp_w is None:
            raise MeterRefused(
                "measurement.energy: tdp_estimate: the design power of this CPU is unknown",
                "set measurement.cpu_tdp_w to the sum over all packages in watts",
            )
        return EnergySource.TDP_ESTIMATE, None
    if any(zone.domain == PACKAGE for zone in header.zones):
        return EnergySource.RAPL, None
    error = header.rapl_error
    why = Reason.of("sampler_reports", error=error) if error else Reason.of("no_package")
    if wanted == EnergySource.RAPL:
        raise MeterRefused(f"measurement.energy: rapl: {why}", _LEAVE_AT_AUTO)
    return None, why


def _why_no_dram(cpu_method: EnergySource | None, header: SampleHeader) -> Reason | None:
    if is_estimate(cpu_method):
        return Reason.of("dram_not_estimated")
    has_dram = any(zone.domain == DRAM for zone in header.zones)
    return None if has_dram else Reason.of("no_dram")


def _primary(
    wanted: str,
    gpu_method: EnergySource | None,
    cpu_method: EnergySource | None,
    is_external: bool,
    is_cpu: bool,
    gpu_scope: EnergyScope,
) -> tuple[EnergySource | None, EnergyScope | None]:
    """The meter that counts, and what it covers.

    The CPU's energy counts only for an experiment on the CPU, or if the user asks for it by name.
    """
    if gpu_method is not None:
        return gpu_method, gpu_scope
    if cpu_method is not None and (is_cpu or is_cpu_source(wanted)):
        return cpu_method, EnergyScope.CPU_PACKAGE
    if is_external:
        return EnergySource.EXTERNAL, EnergyScope.MACHINE
    return None, None


def _refuse_demands(config: ExperimentConfig, sources: Sources) -> None:
    """Refuse energy by phases, and a baseline, that no meter can measure."""
    has_meter = sources.primary not in (None, EnergySource.EXTERNAL)
    why = sources.reasons.get("primary") or "there is only measurement.external_csv"
    if config.measurement.phases and not has_meter:
        raise MeterRefused(
            f"measurement.phases: true: no meter here can measure the energy of a phase: {why}",
            "remove measurement.phases",
        )
    if config.baseline.required and not has_meter:
        raise MeterRefused(
            f"baseline.required: true: no meter here can measure power at rest: {why}", "remove baseline.required"
        )


@dataclass(frozen=True)
class Baselines:
    """Power at rest that was measured before, for a log without such a mark."""

    bare_power_w: float | None = None  # of all GPUs, or packages, together, by the primary source
    loaded_power_w: float | None = None
    age_s: float | None = None  # how long before this experiment the loaded one was measured


# Shorter than a tenth of the shortest update period seen (20 ms).
_POLL_S = 0.002


@dataclass(frozen=True)
class GpuCapability:
    """What can be measured of a GPU."""

    meter: GpuHeader  # an error in it holds its remedy
    counter_update_period_s: float | None = None  # of its energy counter; None when it was not probed, or in vain
    probe_error: str | None = None  # why probing failed

    @property
    def source(self) -> EnergySource | None:
        """What its energy comes from, as `record.Energy.energy_source` has it; None for nothing."""
        return choose_gpu_method([self.meter], is_watched=True)[0]

    def describe(self) -> tuple[str, ...]:
        """One line of text for each fact."""
        meter = self.meter
        lines = [self._counter_text()]
        if meter.power_error is not None:
            lines.append(meter.power_error)
        else:
            is_instant = meter.power_source == "instant"
            lines.append("power: " + ("instantaneous" if is_instant else "an average, over 1 s on some GPUs"))
        if meter.power_limit_w is not None:
            lines[-1] += f", limit {meter.power_limit_w:g} W"
        if meter.energy_scope == EnergyScope.MODULE:
            lines.append("energy and power are those of the whole module, CPU included")
        if meter.persistence_mode is False:
            lines.append("persistence mode is off: idle power is higher while GPUs are sampled; nvidia-smi -pm 1")
        return tuple(lines)

    def _counter_text(self) -> str:
        meter = self.meter
        if meter.counter_error is not None:
            stead = " (power is integrated instead, and the record says so)" if meter.power_error is None else ""
            return f"{meter.counter_error}{stead}"
        if self.counter_update_period_s is not None:
            return f"energy counter, updated every {self.counter_update_period_s * 1e3:.0f} ms"
        return "energy counter" + ("" if self.probe_error is None else f"; {self.probe_error}")


@dataclass(frozen=True)
class CpuCapability:
    """What can be measured of the CPUs."""

    zones: tuple[str, ...] = ()  # of RAPL, that can be read
    rapl_error: str | None = None  # why there is none
    rapl_remedy: str = ""
    missing: tuple[str, ...] = ()  # zones other than packages that cannot be read, each with its reason
    tdp_w: float | None = None  # the design power of all packages, for `measurement.energy: tdp_estimate`
    tdp_source: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """What energy can be measured on this machine."""

    cpu: CpuCapability
    gpus: tuple[GpuCapability, ...] = ()
    gpu_error: str | None = None  # why there is no GPU to measure

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        gpus = [
            {
                **dataclasses.asdict(gpu.meter),
                "energy_source": gpu.source,
                "counter_update_period_s": gpu.counter_update_period_s,
                "probe_error": gpu.probe_error,
            }
            for gpu in self.gpus
        ]
        return {"gpus": gpus, "gpu_error": self.gpu_error, "cpu": dataclasses.asdict(self.cpu)}


def find_capabilities(
    nvml: Any,
    clock: Clock,
    *,
    probe_s: float = 0.0,
    enough: int = 6,
    rapl_root: Path = POWERCAP,
) -> Capabilities:
    """What can be measured here.

    Args:
        nvml: pynvml, initialised; or, as a text, why there is none.
        probe_s: how long to poll the energy counters to see how often they change; 0 for not at all.
        enough: changes of every counter after which polling ends sooner.
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
    lost = [_lost(index) for index, uuid in enumerate(uuids) if uuid is None]
    periods = _probe_periods(meters, clock, probe_s, enough) if probe_s > 0 else [None] * len(meters)
    found = [_capability(meter, period) for meter, period in zip(meters, periods, strict=True)]
    gpus = sorted([*found, *lost], key=lambda gpu: -1 if gpu.meter.index is None else gpu.meter.index)
    return Capabilities(cpu, tuple(gpus), None if gpus else "NVML sees no GPU")


def _probe_periods(meters: Sequence[NvmlMeter], clock: Clock, probe_s: float, enough: int) -> list[float | str | None]:
    """The update period of each energy counter in seconds, or why it was not seen; None where there is no counter."""
    watches = [GpuWatch(meter, place, clock, Complaints()) for place, meter in enumerate(meters)]
    changes: list[CounterChange] = []
    opened_ns = clock.monotonic_ns()
    closes_ns = opened_ns + round(probe_s * NS_PER_S)
    wanted = [place for place, meter in enumerate(meters) if meter.has_counter]
    while (now_ns := clock.monotonic_ns()) < closes_ns:
        changes += [row for watch in watches for row in watch.poll() if isinstance(row, CounterChange)]
        seen = [row.gpu for row in changes]
        if all(seen.count(place) > enough for place in wanted):
            break
        clock.sleep(_POLL_S)
    span = Span(opened_ns, max(now_ns, opened_ns + 1))
    return [_period(changes, place, span) if meter.has_counter else None for place, meter in enumerate(meters)]


def _period(changes: Sequence[CounterChange], place: int, span: Span) -> float | str:
    try:
        return update_period_s(changes, place, span)
    except NotMeasured:
        return f"it changed fewer than three times in {span.seconds:.1f} s"


def _capability(meter: NvmlMeter, period: float | str | None) -> GpuCapability:
    if isinstance(period, str):
        return GpuCapability(meter.header, probe_error=period)
    return GpuCapability(meter.header, period)


def _lost(index: int) -> GpuCapability:
    text = "the GPU does not answer; dmesg says why (Xid), reset it or reboot"
    return GpuCapability(GpuHeader(index, "unknown", "unknown", "unknown", counter_error=text, power_error=text))
