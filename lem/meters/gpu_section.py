"""The per-GPU section of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

from lem.base.codec import decode
from lem.base.measurement import POWER_CAP_BIT, THERMAL_BITS, WINDOW, EnergySource
from lem.base.units import NS_PER_S
from lem.meters.checks import check_plausible, check_sampled
from lem.meters.curve import HOLE_PERIODS, NotMeasured, Span
from lem.meters.nvml import open_nvml, text_of
from lem.meters.samples import GpuHeader, GpuSample
from lem.meters.sources import AttemptLog
from lem.record import Carbon, Efficiency, Energy, Gpu, Idle

_Value = TypeVar("_Value")
_Section = TypeVar("_Section", Carbon, Efficiency, Energy, Gpu, Idle)


class Figures:
    """The fields of one section while it is filled.

    Attributes:
        values: what was found; None where there is a reason.
        reasons: why a field is None.
    """

    def __init__(self, **values: Any) -> None:
        """Begin with fields that are known."""
        self.values: dict[str, Any] = dict(values)
        self.reasons: dict[str, str] = {}

    def work_out(self, name: str, figure: Callable[[], _Value]) -> _Value | None:
        """The figure, kept under its name; None, with its reason kept, where it cannot be had."""
        try:
            self.values[name] = value = figure()
        except NotMeasured as error:
            self.leave_out(name, str(error))
            return None
        return value

    def leave_out(self, name: str, reason: str) -> None:
        """Keep a field as None."""
        self.values[name] = None
        self.reasons[name] = reason

    def put(self, name: str, value: Any, reason: str) -> None:
        """Keep a value, or the reason where it is None."""
        if value is None:
            self.leave_out(name, reason)
        else:
            self.values[name] = value

    def need(self, name: str) -> Any:
        """A value found before.

        Raises:
            NotMeasured: there is none, for the reason that was kept.
        """
        if self.values.get(name) is None:
            raise NotMeasured(self.reasons.get(name, f"{name} was not worked out"))
        return self.values[name]

    def section(self, kind: type[_Section]) -> _Section:
        """The section of the record; a field that nobody touched is a bug and fails there."""
        names = [item.name for item in dataclasses.fields(kind) if item.name != "null_reasons"]
        values: dict[str, Any] = {name: self.values[name] for name in names}
        values["null_reasons"] = self.reasons
        return kind(**values)


@dataclass(frozen=True)
class _Look:
    """A sample and how much of the window it stands for: half-way to both its neighbours."""

    sample: GpuSample
    seconds: float


def describe_gpu(attempt: AttemptLog, number: int) -> Gpu:
    """One GPU of the experiment, counted in its order."""
    place = attempt.sources.gpus[number]
    header = attempt.log.header.gpus[place]
    figures = Figures(uuid=header.uuid, name=header.name)
    _fill_constants(figures, header)
    window = attempt.span(WINDOW)
    looks = _looks(attempt, place, window) if window else []
    nothing = header.power_error if header.power_error and not looks else "nothing was sampled in the window"
    if not attempt.sources.is_watched:
        nothing = "GPUs were not looked at in the window (timeseries.enabled: false)"
    _fill_energy(figures, attempt, number, looks, nothing)
    _fill_looks(figures, looks, nothing)
    return figures.section(Gpu)


def describe_unseen_gpu(uuid: str, name: str, reason: str) -> Gpu:
    """A GPU that could not be sampled."""
    figures = Figures(uuid=uuid, name=name)
    for item in fields(Gpu):
        if item.name not in ("uuid", "name", "null_reasons"):
            figures.leave_out(item.name, reason)
    return figures.section(Gpu)


def samples_in(samples: Iterable[GpuSample], place: int, span: Span) -> list[GpuSample]:
    """The looks at a GPU within the span, its edges included."""
    return [row for row in samples if row.gpu == place and span.opened_ns <= row.at_ns <= span.closed_ns]


def _looks(attempt: AttemptLog, place: int, span: Span) -> list[_Look]:
    """Each look with the time it stands for, which is never more than a hole."""
    rows = samples_in(attempt.log.samples, place, span)
    longest_ns = HOLE_PERIODS * attempt.sources.sample_period_s * NS_PER_S
    between = ((before.at_ns + after.at_ns) / 2 for before, after in pairwise(rows))
    edges = [span.opened_ns, *between, span.closed_ns]
    return [
        _Look(row, (min(end_ns, row.at_ns + longest_ns) - max(start_ns, row.at_ns - longest_ns)) / NS_PER_S)
        for row, start_ns, end_ns in zip(rows, edges, edges[1:], strict=False)
    ]


def _fill_constants(figures: Figures, header: GpuHeader) -> None:
    for field, value in (
        ("power_limit_w", header.power_limit_w),
        ("persistence_mode", header.persistence_mode),
        ("mig_mode", header.mig_mode),
    ):
        figures.put(field, value, "the driver does not tell")


def _fill_energy(figures: Figures, attempt: AttemptLog, number: int, looks: Sequence[_Look], nothing: str) -> None:
    def energy_j() -> float:
        curve = attempt.gpu_curve(number)
        if attempt.sources.gpu_method != EnergySource.COUNTER:
            check_sampled(curve, attempt.window)
        found_j = attempt.window_j(curve, 1 / len(attempt.sources.gpus))
        header = attempt.log.header.gpus[attempt.sources.gpus[number]]
        check_plausible(found_j, attempt.window, header)
        return found_j

    found_j = figures.work_out("energy_j", energy_j)
    if found_j is not None:
        figures.values["power_mean_w"] = found_j / attempt.window.seconds
    else:
        figures.work_out("power_mean_w", lambda: _mean(looks, lambda sample: sample.power_w, nothing))
    powers = [look.sample.power_w for look in looks if look.sample.power_w is not None]
    figures.put("power_max_w", max(powers, default=None), nothing if not looks else "power cannot be read")


def _fill_looks(figures: Figures, looks: Sequence[_Look], nothing: str) -> None:
    silent = "the driver does not tell" if looks else nothing
    temps = [look.sample.temp_c for look in looks if look.sample.temp_c is not None]
    figures.put("temp_start_c", temps[0] if temps else None, silent)
    figures.put("temp_end_c", temps[-1] if temps else None, silent)
    figures.put("temp_max_c", max(temps, default=None), silent)
    figures.work_out("sm_clock_mean_hz", lambda: _mean(looks, lambda sample: sample.sm_clock_hz, silent))
    figures.work_out("util_mean_ratio", lambda: _mean(looks, lambda sample: sample.util_ratio, silent))
    memory = [look.sample.memory_b for look in looks if look.sample.memory_b is not None]
    figures.put("mem_peak_b", max(memory, default=None), silent)
    _fill_events(figures, looks, silent)


def _fill_events(figures: Figures, looks: Sequence[_Look], silent: str) -> None:
    known = [(look.sample.event_mask, look.seconds) for look in looks if look.sample.event_mask is not None]
    mask = 0
    for seen, _ in known:
        mask |= seen
    figures.put("event_reasons_mask", mask if known else None, silent)
    for field, bits in (("throttle_power_s", POWER_CAP_BIT), ("throttle_thermal_s", THERMAL_BITS)):
        seconds = sum((length for seen, length in known if seen & bits), start=0.0)
        figures.put(field, seconds if known else None, silent)


def _mean(looks: Sequence[_Look], value_of: Callable[[GpuSample], float | None], nothing: str) -> float:
    """The mean over time.

    Raises:
        NotMeasured: no look has the value.
    """
    known = [(value, look.seconds) for look in looks if (value := value_of(look.sample)) is not None]
    total_s = sum(seconds for _, seconds in known)
    if total_s <= 0:
        raise NotMeasured(nothing)
    return sum(value * seconds for value, seconds in known) / total_s


@dataclass(frozen=True)
class GpuProcess:
    """A process with a context on a GPU.

    Attributes:
        pid: as the host numbers it, also when read inside a container.
        memory_b: None where the driver does not tell.
    """

    pid: int
    memory_b: int | None


@dataclass(frozen=True)
class GpuState:
    """A GPU now.

    Attributes:
        index: NVML's.
        memory_used_b: by all processes and by the driver itself.
        processes: those that compute.
    """

    index: int
    uuid: str
    name: str
    memory_total_b: int
    memory_used_b: int
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True)
class GpuReading:
    """The GPUs that could be read, and what kept others from it.

    Attributes:
        driver: version of the driver; None without one.
        error: what NVML said, `Unknown Error`; None when everything could be read.
    """

    gpus: tuple[GpuState, ...]
    driver: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> GpuReading:
        """The reading that `to_dict` gave; what else there is in the document is left alone.

        Raises:
            ValueError: something else.
        """
        return decode(cls, {name: document.get(name) for name in ("gpus", "driver", "error")}, "reading")


def read_gpus() -> GpuReading:
    """What NVML tells now of every GPU that can be seen from here."""
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return GpuReading((), error=nvml)
        gpus: list[GpuState] = []
        driver, error = None, None
        try:
            driver = text_of(nvml.nvmlSystemGetDriverVersion())
            gpus.extend(_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError as failure:
            error = str(failure)
    return GpuReading(tuple(gpus), driver, error)


def _read(nvml: Any, index: int) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return GpuState(
        index=index,
        uuid=text_of(nvml.nvmlDeviceGetUUID(handle)),
        name=text_of(nvml.nvmlDeviceGetName(handle)),
        memory_total_b=int(memory.total),
        memory_used_b=int(memory.used),
        processes=tuple(
            GpuProcess(int(item.pid), None if item.usedGpuMemory is None else int(item.usedGpuMemory))
            for item in processes
        ),
    )
