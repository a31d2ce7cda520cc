"""What gives the energy of an experiment: chosen once, from its configuration and from what the sampler can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from lem.config.experiment_config import ExperimentConfig
from lem.measurement import EnergyScope, EnergySource, is_cpu_source, is_estimate
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.refusal import MeterRefused
from lem.meters.samples import GpuHeader, SampleHeader

__all__ = ["POWER_METHODS", "SENSOR_LAG_S", "Sources", "choose_gpu_method", "choose_sources"]

# The method that integrates each kind of `GpuHeader.power_source`.
POWER_METHODS: Final = MappingProxyType({"instant": EnergySource.INSTANT_POWER, "average": EnergySource.AVERAGE_POWER})

# How far `GpuSample.power_w` may lag behind: field 186 is brought up to date every 100 ms from at most the 100 ms
# before; `nvmlDeviceGetPowerUsage` is a mean over 1 s on GA10x, Ada and Hopper (Yang et al., SC24; NVML reference).
SENSOR_LAG_S: Final = MappingProxyType({"instant": 0.2, "average": 1.1})

_NOT_WANTED = "energy is not measured (measurement.energy: none)"
_ON_CPU = "the experiment runs on the CPU"
_LEAVE_AT_AUTO = "leave measurement.energy at auto; energy is then null in the record, with this reason"


@dataclass(frozen=True)
class Sources:
    """Which meter each kind of energy comes from.

    Attributes:
        gpus: the places in `SampleHeader.gpus` of the GPUs the experiment runs on, in its order; rows of the log
            name a GPU by that place.
        gpu_method, cpu_method: None where there is no meter.
        is_external: a file of the user's own meter was named.
        primary: the `energy_source` of the energy that counts; None when there is none.
        scope: what the primary sees.
        sample_period_s, idle_period_s: how often power is looked at in the window, and at rest.
        reasons: why there is no meter, by `gpu`, `cpu`, `dram`, `external`, `primary`.
        is_watched: GPUs are looked at in the window, and not only their counters read.
        missing_uuids: GPUs of the experiment that the sampler does not see.
        cpu_tdp_w: the design power of all packages, as the user says, else as the kernel does.
    """

    gpus: tuple[int, ...]
    gpu_method: EnergySource | None
    cpu_method: EnergySource | None
    is_external: bool
    primary: EnergySource | None
    scope: EnergyScope | None
    sample_period_s: float
    idle_period_s: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    missing_uuids: tuple[str, ...] = ()
    is_watched: bool = True
    cpu_tdp_w: float | None = None

    @property
    def least_guard_s(self) -> float:
        """How long a guard must be for integrated power: until the sensor tells of it alone, and two samples more."""
        for power_source, method in POWER_METHODS.items():
            if self.gpu_method == method:
                return SENSOR_LAG_S[power_source] + 2 * self.sample_period_s
        return 0.0

    @property
    def is_estimate(self) -> bool:
        """Whether the primary is no measurement."""
        return is_estimate(self.primary)


def choose_sources(
    config: ExperimentConfig,
    header: SampleHeader,
    gpu_uuids: Sequence[str],
    is_cpu: bool,
    *,
    foreign: Mapping[str, Sequence[int]] | None = None,
) -> Sources:
    """The meters of an experiment.

    Args:
        gpu_uuids: the GPUs it runs on.
        foreign: {uuid: pids} of compute processes of others that are there before it begins.

    Raises:
        MeterRefused: it demands energy that cannot be measured here; an accepted option must take effect.
    """
    wanted = config.measurement.energy
    gpus, missing = _places(header, gpu_uuids)
    chosen = [header.gpus[place] for place in gpus]
    why_no_gpu = _why_no_gpu(wanted, header, gpu_uuids, is_cpu, missing, foreign or {})
    gpu_method = None
    if why_no_gpu is None:
        gpu_method, why_no_gpu = choose_gpu_method(chosen, is_watched=config.timeseries.enabled)
    if wanted == "nvml" and gpu_method != EnergySource.COUNTER:
        raise MeterRefused(f"measurement.energy: nvml: {why_no_gpu or _why_no_counter(chosen)}", _LEAVE_AT_AUTO)
    cpu_method, why_no_cpu = _cpu_method(wanted, header, config.measurement.cpu_tdp_w)
    is_external = config.measurement.external_csv is not None
    is_of_module = any(gpu.energy_scope == EnergyScope.MODULE for gpu in chosen)
    gpu_scope = EnergyScope.MODULE if is_of_module else EnergyScope.GPU
    primary, scope = _primary(wanted, gpu_method, cpu_method, is_external, is_cpu, gpu_scope)
    reasons = {
        "gpu": why_no_gpu,
        "cpu": why_no_cpu,
        "dram": why_no_cpu or _why_no_dram(cpu_method, header),
        "external": None if is_external else "measurement.external_csv is not given",
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


def _places(header: SampleHeader, gpu_uuids: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    known = {gpu.uuid: place for place, gpu in enumerate(header.gpus)}
    return (
        tuple(known[uuid] for uuid in gpu_uuids if uuid in known),
        tuple(uuid for uuid in gpu_uuids if uuid not in known),
    )


def _why_no_gpu(
    wanted: str,
    header: SampleHeader,
    gpu_uuids: Sequence[str],
    is_cpu: bool,
    missing: Sequence[str],
    foreign: Mapping[str, Sequence[int]],
) -> str | None:
    """Why the energy of the GPUs is not even asked for; None when it is."""
    if wanted == "none":
        return _NOT_WANTED
    if is_cpu or not gpu_uuids:
        return _ON_CPU
    if is_cpu_source(wanted):
        return f"another meter was asked for (measurement.energy: {wanted})"
    cut = [gpu.uuid for gpu in header.gpus if gpu.mig_mode]
    if missing and cut:  # CUDA calls an instance by a name of its own
        return f"{', '.join(missing)} is no whole GPU: {', '.join(cut)} is cut into MIG instances, which have no meters"
    if missing:
        return f"{', '.join(missing)} cannot be read: {header.gpu_error or 'the sampler does not see it'}"
    for gpu in header.gpus:
        if gpu.uuid in gpu_uuids and gpu.mig_mode:
            return f"{gpu.uuid} is cut into MIG instances, and its meters are those of the whole board"
    for uuid in gpu_uuids:
        if foreign.get(uuid):
            pids = ", ".join(str(pid) for pid in foreign[uuid])
            return f"{uuid} is also used by another program (process {pids}), whose energy cannot be told apart"
    return None


def choose_gpu_method(gpus: Sequence[GpuHeader], *, is_watched: bool) -> tuple[EnergySource | None, str | None]:
    """The best method that every GPU has: several are summed only when all were read, and in the same way."""
    if all(gpu.counter_error is None for gpu in gpus):
        return EnergySource.COUNTER, None
    if not is_watched:
        return None, f"{_why_no_counter(gpus)}; power is not looked at (timeseries.enabled: false)"
    if all(gpu.power_error is None and gpu.power_source == "instant" for gpu in gpus):
        return EnergySource.INSTANT_POWER, None
    if all(gpu.power_error is None and gpu.power_source is not None for gpu in gpus):
        return EnergySource.AVERAGE_POWER, None
    return None, f"{_why_no_counter(gpus)}; {_why_no_power(gpus)}"


def _why_no_counter(gpus: Sequence[GpuHeader]) -> str:
    told = [f"{gpu.uuid}: {gpu.counter_error}" for gpu in gpus if gpu.counter_error is not None]
    return f"the energy counter cannot be read: {'; '.join(told)}"


def _why_no_power(gpus: Sequence[GpuHeader]) -> str:
    told = [f"{gpu.uuid}: {gpu.power_error or 'not told'}" for gpu in gpus if gpu.power_error or not gpu.power_source]
    return f"nor can power: {'; '.join(told)}"


def _cpu_method(wanted: str, header: SampleHeader, user_tdp_w: float | None) -> tuple[EnergySource | None, str | None]:
    if wanted == "none":
        return None, _NOT_WANTED
    if wanted == EnergySource.TDP_ESTIMATE:
        if user_tdp_w is None and header.cpu_tdp_w is None:
            raise MeterRefused(
                "measurement.energy: tdp_estimate: the design power of this CPU is not known",
                "give measurement.cpu_tdp_w, the sum over all packages in watts",
            )
        return EnergySource.TDP_ESTIMATE, None
    if any(zone.domain == PACKAGE for zone in header.zones):
        return EnergySource.RAPL, None
    why = header.rapl_error or "the kernel shows no package in /sys/class/powercap"
    if wanted == EnergySource.RAPL:
        raise MeterRefused(f"measurement.energy: rapl: {why}", _LEAVE_AT_AUTO)
    return None, why


def _why_no_dram(cpu_method: EnergySource | None, header: SampleHeader) -> str | None:
    if is_estimate(cpu_method):
        return "the design power of a CPU says nothing of its memory"
    has_dram = any(zone.domain == DRAM for zone in header.zones)
    return None if has_dram else "the kernel shows no energy counter of the memory"


def _primary(
    wanted: str,
    gpu_method: EnergySource | None,
    cpu_method: EnergySource | None,
    is_external: bool,
    is_cpu: bool,
    gpu_scope: EnergyScope,
) -> tuple[EnergySource | None, EnergyScope | None]:
    """The meter that counts, and what it sees.

    The CPU's energy stands for the whole of an experiment only on a CPU, or where it was asked for by name.
    """
    if gpu_method is not None:
        return gpu_method, gpu_scope
    if cpu_method is not None and (is_cpu or is_cpu_source(wanted)):
        return cpu_method, EnergyScope.CPU_PACKAGE
    if is_external:
        return EnergySource.EXTERNAL, EnergyScope.MACHINE
    return None, None


def _refuse_demands(config: ExperimentConfig, sources: Sources) -> None:
    """Refuse what was asked for and cannot be.

    Raises:
        MeterRefused: energy by phases, or a baseline, without a meter that could tell them.
    """
    has_meter = sources.primary not in (None, EnergySource.EXTERNAL)
    why = sources.reasons.get("primary", "there is only measurement.external_csv")
    if config.measurement.phases and not has_meter:
        raise MeterRefused(
            f"measurement.phases: true: nothing here can tell the energy of a phase: {why}",
            "leave measurement.phases out",
        )
    if config.baseline.required and not has_meter:
        raise MeterRefused(
            f"baseline.required: true: nothing here can tell power at rest: {why}", "leave baseline.required out"
        )
