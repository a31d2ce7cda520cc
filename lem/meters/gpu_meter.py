"""The meters of one GPU, and watching them while it is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lem.base.clock import Clock
from lem.base.measurement import EnergyScope
from lem.meters.nvml import MeterFailure, failure_of, gpu_uuids, is_name_of, text_of
from lem.meters.samples import CounterChange, GpuHeader, GpuSample, MeterError, ProcessesSeen, Row, gpu_meter

_T = TypeVar("_T")

# nvml.h; by number, since a pynvml beside an engine may be older than the names.
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, mW
_ENERGY = 191  # NVML_FI_DEV_ENERGY, mJ
_SCOPES = {EnergyScope.GPU: 0, EnergyScope.MODULE: 1}  # NVML_POWER_SCOPE_GPU, NVML_POWER_SCOPE_MODULE
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # in the order of nvmlValueType_t
_TEMPERATURE_GPU = 0
_CLOCK_SM = 1
_VIRTUAL_GPU = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU

_MIG_TEXT = (
    "MIG is on, and NVML's {what} is that of the whole board, not of an instance; "
    "turn MIG off to measure (nvidia-smi -mig 0)"
)
_VIRTUAL_TEXT = "this is a virtual GPU, whose hypervisor hides {what}; measure on the physical machine"
_MODULE_TEXT = "the driver reports {what} only for the module of GPU and CPU, not for the GPU"


@dataclass(frozen=True)
class _Found:
    """What answers in a scope, and why the rest does not."""

    counter: Callable[[], int] | None
    counter_failure: MeterFailure | None
    power: Callable[[], float] | None
    power_failure: MeterFailure | None
    power_source: str | None


class NvmlMeter:
    """The meters of one GPU; what cannot be read raises `MeterFailure`.

    Its `header` has what does not change, and why the counter or power cannot be read.
    """

    def __init__(self, nvml: Any, name: str) -> None:
        """Find the GPU by its UUID, which may be shortened as for CUDA, and try its meters.

        Args:
            nvml: pynvml, initialised.
        """
        self._nvml = nvml
        self._name = name
        self._handle: Any = None
        self._scope = EnergyScope.GPU
        self._read_counter: Callable[[], int] | None = None
        self._read_power: Callable[[], float] | None = None
        self._fallen_back: set[str] = set()
        self._readers: Mapping[str, Callable[[], float | int]] = {
            "power": self._power_w,
            "temperature": self._temperature_c,
            "sm_clock": lambda: float(self._ask("nvmlDeviceGetClockInfo", _CLOCK_SM) * 1e6),
            "utilisation": lambda: float(self._ask("nvmlDeviceGetUtilizationRates").gpu / 100),
            "memory": lambda: int(self._ask("nvmlDeviceGetMemoryInfo").used),
            "events": self._event_mask,
        }
        self.header = self._look()

    @property
    def is_known(self) -> bool:
        """Whether NVML has found the GPU at least once."""
        return self._handle is not None

    @property
    def has_counter(self) -> bool:
        """Whether the energy counter can be read."""
        return self._read_counter is not None

    def read_counter_mj(self) -> int:
        """The energy counter in mJ."""
        if self._read_counter is None:
            raise MeterFailure(self.header.counter_error or "there is no counter", is_lasting=True)
        return self._read_counter()

    def read(self, quantity: str) -> float | int:
        """One of `QUANTITIES` in W, °C, Hz, a share of 1, bytes, or the bits of nvmlClocksEventReasons."""
        return self._readers[quantity]()

    def read_pids(self) -> tuple[int, ...]:
        """The processes with a compute context, as the host numbers them, in order."""
        return tuple(sorted(int(item.pid) for item in self._ask("nvmlDeviceGetComputeRunningProcesses")))

    def renew(self) -> None:
        """Look the GPU up again, after it was lost."""
        self._handle = self._find()

    def _look(self) -> GpuHeader:
        driver = text_of(self._call_or_none("nvmlSystemGetDriverVersion") or "unknown")
        try:
            self._handle = self._find()
            uuid = text_of(self._ask("nvmlDeviceGetUUID"))
        except MeterFailure as failure:
            text = str(failure)
            return GpuHeader(None, self._name, "unknown", driver, counter_error=text, power_error=text)
        mig_mode = self._is_mig()
        counter_error, power_error, power_source = self._try_meters(is_mig=mig_mode is True)
        vbios = self._call_or_none("nvmlDeviceGetVbiosVersion", self._handle)
        persistence = self._call_or_none("nvmlDeviceGetPersistenceMode", self._handle)
        return GpuHeader(
            index=self._call_or_none("nvmlDeviceGetIndex", self._handle),
            uuid=uuid,
            name=text_of(self._call_or_none("nvmlDeviceGetName", self._handle) or "unknown"),
            driver=driver,
            vbios=None if vbios is None else text_of(vbios),
            power_limit_w=self._power_limit_w(),
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=mig_mode,
            energy_scope=self._scope,
            power_source=power_source,
            counter_error=counter_error,
            power_error=power_error,
        )

    def _try_meters(self, *, is_mig: bool) -> tuple[str | None, str | None, str | None]:
        """Why there is no counter, why there is no power, and where power comes from.

        The GPU's own scope is taken wherever it answers at all, so that counter and power are of the same thing.
        """
        if is_mig:
            return _MIG_TEXT.format(what="energy counter"), _MIG_TEXT.format(what="power"), None
        found = self._try(EnergyScope.GPU)
        if found.counter is None and found.power is None:
            of_module = self._try(EnergyScope.MODULE)
            if of_module.counter is not None or of_module.power is not None:
                self._scope, found = EnergyScope.MODULE, of_module
        self._read_counter, self._read_power = found.counter, found.power
        return (
            self._explain(found.counter_failure, "the energy counter", _ENERGY),
            self._explain(found.power_failure, "power", _POWER_INSTANT),
            found.power_source,
        )

    def _try(self, scope: EnergyScope) -> _Found:
        def count() -> int:
            return int(self._ask("nvmlDeviceGetTotalEnergyConsumption"))

        def count_by_field() -> int:
            return int(self._field(_ENERGY, scope))

        def instant() -> float:
            return self._field(_POWER_INSTANT, scope) / 1e3

        def average() -> float:
            return float(self._ask("nvmlDeviceGetPowerUsage") / 1e3)

        is_gpu = scope is EnergyScope.GPU
        counter, counter_failure = _first_that_answers([count if is_gpu else count_by_field])
        power, power_failure = _first_that_answers([instant, average] if is_gpu else [instant])
        source = None if power is None else "instant" if power is instant else "average"
        return _Found(counter, counter_failure, power, power_failure, source)

    def _explain(self, failure: MeterFailure | None, what: str, field: int) -> str | None:
        if failure is None:
            return None
        if self._call_or_none("nvmlDeviceGetVirtualizationMode", self._handle) == _VIRTUAL_GPU:
            return _VIRTUAL_TEXT.format(what=what)
        with contextlib.suppress(MeterFailure):
            self._field(field, EnergyScope.MODULE)
            return _MODULE_TEXT.format(what=what)
        return f"{what}: {failure}"

    def _find(self) -> Any:
        try:
            return self._call("nvmlDeviceGetHandleByUUID", self._name)
        except MeterFailure:
            named = [uuid for uuid in gpu_uuids(self._nvml) if uuid is not None and is_name_of(self._name, uuid)]
            if len(named) != 1 or named[0] == self._name:
                raise
        return self._call("nvmlDeviceGetHandleByUUID", named[0])

    def _is_mig(self) -> bool | None:
        if self._name.upper().startswith("MIG-"):
            return True
        try:
            current, _ = self._ask("nvmlDeviceGetMigMode")
        except MeterFailure as failure:
            return False if failure.is_lasting else None  # a GPU that has no such mode is not in it
        return bool(current)

    def _power_limit_w(self) -> float | None:
        for function in ("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"):
            limit_mw = self._call_or_none(function, self._handle)
            if limit_mw is not None:
                return float(limit_mw) / 1e3
        return None

    def _power_w(self) -> float:
        if self._read_power is None:
            raise MeterFailure(self.header.power_error or "there is no power", is_lasting=True)
        return self._read_power()

    def _temperature_c(self) -> float:
        return float(self._newer("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", _TEMPERATURE_GPU))

    def _event_mask(self) -> int:
        return int(self._newer("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"))

    def _newer(self, function: str, older: str, *arguments: Any) -> Any:
        """What a function says, or the deprecated one where the driver has not got it."""
        if function not in self._fallen_back:
            try:
                return self._ask(function, *arguments)
            except MeterFailure as failure:
                if not failure.is_absent:
                    raise
                self._fallen_back.add(function)
        return self._ask(older, *arguments)

    def _field(self, field: int, scope: EnergyScope) -> float:
        (value,) = self._ask("nvmlDeviceGetFieldValues", [(field, _SCOPES[scope])])
        if value.nvmlReturn != 0:
            raise failure_of(self._nvml, value.nvmlReturn)
        number: float = getattr(value.value, _VALUE_MEMBERS[value.valueType])
        return number

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._call(function, self._handle, *arguments)

    def _call_or_none(self, function: str, *arguments: Any) -> Any:
        try:
            return self._call(function, *arguments)
        except MeterFailure:
            return None

    def _call(self, function: str, *arguments: Any) -> Any:
        called = getattr(self._nvml, function, None)
        if called is None:
            raise MeterFailure(f"this pynvml has no {function}: update nvidia-ml-py", is_lasting=True, is_absent=True)
        try:
            return called(*arguments)
        except self._nvml.NVMLError as error:
            raise failure_of(self._nvml, error.value) from error


def _first_that_answers(ways: Sequence[Callable[[], _T]]) -> tuple[Callable[[], _T] | None, MeterFailure | None]:
    """The first way that gives a value; without one, why the first did not."""
    way, *others = ways
    try:
        way()
    except MeterFailure as failure:
        found = _first_that_answers(others)[0] if others else None
        return found, failure if found is None else None
    return way, None


class Complaints:
    """Failures of meters, each reported once for as long as it stays the same."""

    def __init__(self) -> None:
        self._reported: dict[str, str] = {}

    def of(self, meter: str, at_ns: int, message: str) -> list[Row]:
        """The row for a failure, unless it was the last one reported for this meter."""
        if self._reported.get(meter) == message:
            return []
        self._reported[meter] = message
        return [MeterError(at_ns, meter, message)]

    def withdraw(self, meter: str) -> None:
        """The meter works; its next failure is reported again."""
        self._reported.pop(meter, None)


class GpuWatch:
    """One GPU that is sampled; `place` is its place in the log's header.

    A GPU that is lost is only asked, once a second, whether it is back. What fails for another reason is tried every
    time, with a fresh handle once a second; what the GPU does not have is tried once.
    """

    def __init__(self, meter: NvmlMeter, place: int, clock: Clock, complaints: Complaints) -> None:
        self._meter = meter
        self._place = place
        self._clock = clock
        self._complaints = complaints
        self._energy_mj: int | None = None
        self._polled_ns = 0
        self._pids: tuple[int, ...] | None = None
        self._hopeless = {"counter"} if not meter.has_counter else set()
        self._hopeless |= {"power"} if meter.header.power_error is not None else set()
        self._is_lost = not meter.is_known
        self._is_failing = self._is_lost

    def poll(self) -> list[Row]:
        """The change of the energy counter, if there was one since the last poll."""
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        energy_mj = self._read("counter", self._meter.read_counter_mj, rows)
        if energy_mj is None:
            return rows
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        before_ns = at_ns if self._energy_mj is None else self._polled_ns
        has_changed = energy_mj != self._energy_mj
        self._energy_mj, self._polled_ns = energy_mj, at_ns
        return [CounterChange(self._place, before_ns, at_ns, energy_mj)] if has_changed else []

    def sample(self) -> list[Row]:
        """One sample of everything else; its stamp is that of the reading of power."""
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        power_w = self._quantity("power", rows)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        sample = GpuSample(
            self._place,
            at_ns,
            power_w,
            temp_c=self._quantity("temperature", rows),
            sm_clock_hz=self._quantity("sm_clock", rows),
            util_ratio=self._quantity("utilisation", rows),
            memory_b=self._quantity("memory", rows),
            event_mask=self._quantity("events", rows),
        )
        return rows if sample == GpuSample(self._place, at_ns) else [*rows, sample]

    def look_at_processes(self) -> list[Row]:
        """The processes, when they changed."""
        rows: list[Row] = []
        at_ns = self._clock.monotonic_ns()
        pids = self._read("processes", self._meter.read_pids, rows)
        if pids is None or pids == self._pids:
            return rows
        self._pids = pids
        return [ProcessesSeen(self._place, at_ns, pids)]

    def revive(self) -> list[Row]:
        """Once a second: look up a GPU that does not answer again."""
        if not self._is_failing or not self._meter.is_known:
            return []
        at_ns, name = self._clock.monotonic_ns(), gpu_meter(self._place, "handle")
        try:
            self._meter.renew()
        except MeterFailure as failure:
            return self._complaints.of(name, at_ns, str(failure))
        self._complaints.withdraw(name)
        self._is_lost = self._is_failing = False
        return []

    def _quantity(self, name: str, rows: list[Row]) -> Any:
        return self._read(name, lambda: self._meter.read(name), rows)

    def _read(self, what: str, read: Callable[[], _T], rows: list[Row]) -> _T | None:
        """What the meter reads; None if it cannot, with the row about it, if any, added to `rows`."""
        if self._is_lost or what in self._hopeless:
            return None
        name = gpu_meter(self._place, what)
        try:
            value = read()
        except MeterFailure as failure:
            if failure.is_lasting:
                self._hopeless.add(what)
            else:
                self._is_failing = True
                self._is_lost = failure.is_lost
            rows += self._complaints.of(name, self._clock.monotonic_ns(), str(failure))
            return None
        self._complaints.withdraw(name)
        return value
