"""Which meter a window's energy comes from, and the log of one attempt as these sources show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from lem.base import measurement as names
from lem.base.errors import MeterRefused
from lem.base.measurement import EnergyScope, EnergySource, is_cpu_source, is_estimate
from lem.config.experiment import ExperimentConfig
from lem.meters.curve import ClosedWindow, Curve, NotMeasured, Span, counter_curve, load_curve, power_curve, rapl_curve
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.samples import GpuHeader, Mark, SampleHeader, SampleLog, gpu_meter

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
