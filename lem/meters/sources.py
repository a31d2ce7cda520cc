"""Which meter the energy of an experiment comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from lem.base.dataclass import dataclass, field
from lem.base.errors import MeterRefused
from lem.base.measurement import EnergyScope, EnergySource, is_counter, is_cpu_source, is_estimate
from lem.base.reasons import Reason
from lem.config.experiment import MeteredConfig, ProgramConfig
from lem.config.sections import GpuConfig
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.samples import HWMON, NVML, GpuHeader, SampleHeader

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
    settings: GpuConfig = field(default_factory=GpuConfig)  # what lem set on the GPUs

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
    if wanted == NVML and gpu_method != EnergySource.COUNTER:
        raise MeterRefused(f"measurement.energy: nvml: {why_no_gpu or _why_no_counter(chosen)}", LEAVE_AT_AUTO)
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
    _refuse_what_needs_a_meter(config, primary, reasons["primary"])
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
        settings=GpuConfig() if isinstance(config, ProgramConfig) else config.gpu,
    )


def _refuse_what_needs_a_meter(config: MeteredConfig, primary: EnergySource | None, why_none: Reason | None) -> None:
    if primary in (None, EnergySource.EXTERNAL):
        why = why_none or "there is only measurement.external_csv"
        for option, is_set, figure in (
            ("measurement.phases", config.measurement.phases, "the energy of a phase"),
            ("baseline.required", config.baseline.required, "power at rest"),
        ):
            if is_set:
                raise MeterRefused(f"{option}: true: no meter here can measure {figure}: {why}", f"remove {option}")


def _why_no_counter(gpus: Sequence[GpuHeader]) -> str:
    others = ", ".join(gpu.uuid for gpu in gpus if gpu.meter != NVML)
    return f"NVML does not see {others}" if others else f"the energy counter cannot be read: {_counter_errors(gpus)}"


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
