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
_VIRTUAL_TEXT = "this is a virtual GPU, whose hypervisor keeps {what} back; measure on the physical machine"
_MODULE_TEXT = "the driver gives {what} for the module of GPU and CPU alone, not for the GPU"


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
    """What does not work, told once for as long as it stays the same."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def of(self, meter: str, at_ns: int, message: str) -> list[Row]:
        """The row that tells of a failure, unless that was the last thing told of this meter."""
        if self._said.get(meter) == message:
            return []
        self._said[meter] = message
        return [MeterError(at_ns, meter, message)]

    def withdraw(self, meter: str) -> None:
        """The meter works; its next failure is told again."""
        self._said.pop(meter, None)


class GpuWatch:
    """One GPU that is sampled.

    A GPU that is lost is asked nothing but, once a second, whether it is back. What fails for another reason is
    tried every time, with a fresh handle once a second; what the GPU does not have is tried once.
    """

    def __init__(self, meter: NvmlMeter, place: int, clock: Clock, complaints: Complaints) -> None:
        """Start to watch.

        Args:
            place: of the GPU in the log's header.
        """
        self._meter = meter
        self._place = place
        self._clock = clock
        self._complaints = complaints
        self._has_counter = meter.has_counter
        self._energy_mj: int | None = None
        self._polled_ns = 0
        self._pids: tuple[int, ...] | None = None
        self._hopeless: set[str] = set() if meter.header.power_error is None else {"power"}
        self._is_lost = not meter.is_known
        self._is_failing = self._is_lost

    def poll(self) -> list[Row]:
        """The change of the energy counter, if there was one since the last poll."""
        if self._is_lost or not self._has_counter:
            return []
        opened_ns = self._clock.monotonic_ns()
        try:
            energy_mj = self._meter.read_counter_mj()
        except MeterFailure as failure:
            self._has_counter = not failure.is_lasting
            return self._failed("counter", opened_ns, failure)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        self._complaints.withdraw(self._meter_name("counter"))
        before_ns = at_ns if self._energy_mj is None else self._polled_ns
        has_changed = energy_mj != self._energy_mj
        self._energy_mj, self._polled_ns = energy_mj, at_ns
        return [CounterChange(self._place, before_ns, at_ns, energy_mj)] if has_changed else []

    def sample(self) -> list[Row]:
        """One look at everything else; its stamp is that of the reading of power."""
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        power_w = self._read("power", rows)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        temp_c = self._read("temperature", rows)
        sm_clock_hz = self._read("sm_clock", rows)
        util_ratio = self._read("utilisation", rows)
        memory_b = self._read("memory", rows)
        event_mask = self._read("events", rows)
        values = (power_w, temp_c, sm_clock_hz, util_ratio, memory_b, event_mask)
        if any(value is not None for value in values):
            sample = GpuSample(
                gpu=self._place,
                at_ns=at_ns,
                power_w=power_w,
                temp_c=temp_c,
                sm_clock_hz=sm_clock_hz,
                util_ratio=util_ratio,
                memory_b=None if memory_b is None else int(memory_b),
                event_mask=None if event_mask is None else int(event_mask),
            )
            rows.append(sample)
        return rows

    def look_at_processes(self) -> list[Row]:
        """The processes, when they are others than at the last look."""
        if self._is_lost or "processes" in self._hopeless:
            return []
        at_ns = self._clock.monotonic_ns()
        try:
            pids = self._meter.read_pids()
        except MeterFailure as failure:
            return self._failed("processes", at_ns, failure)
        self._complaints.withdraw(self._meter_name("processes"))
        if pids == self._pids:
            return []
        self._pids = pids
        return [ProcessesSeen(self._place, at_ns, pids)]

    def revive(self) -> list[Row]:
        """Once a second: look a GPU that does not answer up again."""
        if not self._is_failing or not self._meter.is_known:
            return []
        at_ns = self._clock.monotonic_ns()
        try:
            self._meter.renew()
        except MeterFailure as failure:
            return self._complaints.of(self._meter_name("handle"), at_ns, str(failure))
        self._complaints.withdraw(self._meter_name("handle"))
        self._is_lost = self._is_failing = False
        return []

    def _read(self, quantity: str, rows: list[Row]) -> float | None:
        """A quantity; None with what is to be told in `rows` when it cannot be read."""
        if self._is_lost or quantity in self._hopeless:
            return None
        try:
            value = self._meter.read(quantity)
        except MeterFailure as failure:
            rows += self._failed(quantity, self._clock.monotonic_ns(), failure)
            return None
        self._complaints.withdraw(self._meter_name(quantity))
        return value

    def _failed(self, what: str, at_ns: int, failure: MeterFailure) -> list[Row]:
        if failure.is_lasting:
            self._hopeless.add(what)
        else:
            self._is_failing = True
            self._is_lost = self._is_lost or failure.is_lost
        return self._complaints.of(self._meter_name(what), at_ns, str(failure))

    def _meter_name(self, what: str) -> str:
        return gpu_meter(self._place, what)
