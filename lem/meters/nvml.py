"""NVML: its errors, the GPUs of this host, and the meters of one GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lem.base.codec import decode
from lem.base.dataclass import dataclass
from lem.base.measurement import EnergyScope
from lem.meters.machine import GpuFacts, is_name_of, kept_lag_s
from lem.meters.samples import GpuHeader

# nvml.h, nvmlReturn_t
_UNINITIALIZED, _INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 1, 2, 3, 4, 6
_FUNCTION_NOT_FOUND, _GPU_IS_LOST, _RESET_REQUIRED, _VERSION_MISMATCH = 13, 15, 16, 25
_DRIVER_NOT_LOADED, _GPU_NOT_FOUND, _DEPRECATED = 9, 28, 26

_ABSENT = frozenset({_FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _DEPRECATED})
_LASTING = _ABSENT | {_NOT_SUPPORTED, _NO_PERMISSION}
_LOST = frozenset({_UNINITIALIZED, _DRIVER_NOT_LOADED, _GPU_IS_LOST, _RESET_REQUIRED, _GPU_NOT_FOUND})

_MEANINGS = {
    _INVALID_ARGUMENT: "NVML knows no such GPU; see lem gpus",
    _NOT_SUPPORTED: "this GPU or its driver does not support it",
    _NO_PERMISSION: "the driver refuses it to this user; run lem as root, or on the host instead of in a container",
    _NOT_FOUND: "NVML sees no such GPU; see lem gpus",
    _FUNCTION_NOT_FOUND: "this driver is too old for it; update the driver",
    _GPU_IS_LOST: "it fell off the bus; dmesg says why (Xid), reset it or reboot",
    _RESET_REQUIRED: "reset it (nvidia-smi --gpu-reset) or reboot",
}


class MeterFailure(Exception):
    def __init__(
        self, message: str, *, is_lasting: bool = False, is_absent: bool = False, is_lost: bool = False
    ) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting  # it will fail the same way again
        self.is_absent = is_absent  # the driver has no such function; there may be an older one
        self.is_lost = is_lost  # the device itself is gone, and everything else about it fails too


def _failure(nvml: Any, code: int) -> MeterFailure:
    text, meaning = str(nvml.NVMLError(code)), _MEANINGS.get(code)
    kinds = {"is_lasting": code in _LASTING, "is_absent": code in _ABSENT, "is_lost": code in _LOST}
    return MeterFailure(text if meaning is None else f"{text} ({meaning})", **kinds)


def find_gpus() -> tuple[GpuFacts, ...]:
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return ()
        found = []
        for index, uuid in enumerate(gpu_uuids(nvml)):
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                name = _text(nvml.nvmlDeviceGetName(handle))
                memory, capability = _memory_of(nvml, handle), _capability_of(nvml, handle)
                if uuid is not None:
                    total_b = None if memory is None else int(memory.total)
                    found.append(GpuFacts(index, uuid, name, total_b, capability))
        return tuple(found)


@dataclass(frozen=True)
class GpuProcess:
    pid: int  # as the host numbers it, also when read inside a container
    memory_b: int | None  # None where not reported by the driver


@dataclass(frozen=True)
class GpuState:
    index: int  # NVML's
    uuid: str
    name: str
    memory_total_b: int | None  # None where it shares that of the machine (unified memory)
    memory_used_b: int | None  # by all processes and by the driver itself
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True)
class GpuReading:
    gpus: tuple[GpuState, ...]
    driver: str | None = None  # its version, `580.65.06`; None without a driver
    error: str | None = None  # NVML's words, such as `Unknown Error`; None when everything could be read

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> GpuReading:
        return decode(cls, {name: document.get(name) for name in ("gpus", "driver", "error")}, "reading")


def read_gpus() -> GpuReading:
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return GpuReading((), error=nvml)
        gpus: list[GpuState] = []
        driver, error = None, None
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            count = int(nvml.nvmlDeviceGetCount())
        except nvml.NVMLError as failure:
            count, error = 0, str(failure)
        for index in range(count):
            try:
                gpus.append(_state(nvml, index))
            except nvml.NVMLError as failure:  # noqa: PERF203 (a GPU that fails hides no other)
                error = error or str(failure)
    return GpuReading(tuple(gpus), driver, error)


def power_limits_w() -> dict[str, float]:
    """The power limit that is set for each GPU, by UUID; what boosts on its own (Dynamic Boost) does not move it."""
    found: dict[str, float] = {}
    with open_nvml() as nvml:
        for uuid in () if isinstance(nvml, str) else filter(None, gpu_uuids(nvml)):
            with contextlib.suppress(nvml.NVMLError, AttributeError):  # an older pynvml has fewer functions
                limit_mw = nvml.nvmlDeviceGetPowerManagementLimit(nvml.nvmlDeviceGetHandleByUUID(uuid))
                found |= {uuid: limit_mw / 1e3} if limit_mw else {}
    return found


def _state(nvml: Any, index: int) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _memory_of(nvml, handle)
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return GpuState(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total_b=None if memory is None else int(memory.total),
        memory_used_b=None if memory is None else int(memory.used),
        processes=tuple(
            GpuProcess(int(item.pid), None if item.usedGpuMemory is None else int(item.usedGpuMemory))
            for item in processes
        ),
    )


def _memory_of(nvml: Any, handle: Any) -> Any:
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value not in _LASTING:
            raise
        return None


def _capability_of(nvml: Any, handle: Any) -> tuple[int, int] | None:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError as error:
        if error.value in _LOST:
            raise
        return None
    return major, minor


def gpu_uuids(nvml: Any) -> tuple[str | None, ...]:
    found: list[str | None] = []
    with contextlib.suppress(nvml.NVMLError):
        for index in range(int(nvml.nvmlDeviceGetCount())):
            found.append(None)
            with contextlib.suppress(nvml.NVMLError):
                found[index] = _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))
    return tuple(found)


@contextlib.contextmanager
def open_nvml() -> Iterator[Any]:
    nvml: Any = None
    for name in ("lem._vendor.pynvml", "pynvml"):
        with contextlib.suppress(ImportError):
            nvml = importlib.import_module(name)
            break
    if nvml is None:
        yield "pynvml is not installed"
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield str(error)
        return
    try:
        yield nvml
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# nvml.h; by number, since a pynvml beside an engine may be older than the names.
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, mW
_POWER_AVERAGE = 185  # NVML_FI_DEV_POWER_AVERAGE, mW: a mean over 1 s, on Ampere and later without GA100
_ENERGY = 191  # NVML_FI_DEV_ENERGY, mJ
# NVML_FI_DEV_CLOCKS_EVENT_REASON_{SW_THERM_SLOWDOWN, HW_THERM_SLOWDOWN, HW_POWER_BRAKE_SLOWDOWN}: ns in total.
_SLOWDOWNS = (269, 270, 271)
_THERMAL_POLICY = 1  # NVML_PERF_POLICY_THERMAL
_FIRST_WITH_AVERAGE = (8, 6)  # before it nvmlDeviceGetPowerUsage is no mean over 1 s (NVML reference)
_SCOPES = {EnergyScope.GPU: 0, EnergyScope.MODULE: 1}  # NVML_POWER_SCOPE_GPU, NVML_POWER_SCOPE_MODULE
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # in the order of nvmlValueType_t
_TEMPERATURE_GPU = 0
_CLOCK_SM = 1
_VIRTUAL_GPU = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU

_MIG_TEXT = "MIG is on, and NVML's {} is that of the whole board; turn MIG off to measure (nvidia-smi -mig 0)"


class NvmlMeter:
    def __init__(self, nvml: Any, name: str) -> None:
        """Find the GPU by its UUID, which may be shortened as for CUDA, and try its meters by initialised pynvml."""
        self._nvml = nvml
        self._name = name
        self._handle: Any = None
        self._fallen_back: set[str] = set()
        self._readers: dict[str, Callable[[], Any]] = {
            "temperature": lambda: float(
                self._newer("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", _TEMPERATURE_GPU)
            ),
            "sm_clock": lambda: float(self._ask("nvmlDeviceGetClockInfo", _CLOCK_SM) * 1e6),
            "utilisation": lambda: float(self._ask("nvmlDeviceGetUtilizationRates").gpu / 100),
            "memory": lambda: int(self._ask("nvmlDeviceGetMemoryInfo").used),
            "events": lambda: int(
                self._newer("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
            ),
            "processes": lambda: tuple(sorted(int(it.pid) for it in self._ask("nvmlDeviceGetComputeRunningProcesses"))),
            "limit": self._power_limit_w,
            "set_limit": lambda: self._ask("nvmlDeviceGetPowerManagementLimit") / 1e3,
        }
        self.header = self._look()

    @property
    def is_known(self) -> bool:
        return self._handle is not None

    def has(self, what: str) -> bool:
        return what in self._readers

    def read(self, what: str) -> Any:
        """What a meter reads now.

        They are `counter` (mJ), `power` (W), `temperature` (°C), `sm_clock` (Hz), `utilisation` (a share of 1),
        `memory` (bytes), `events` (the bits of nvmlClocksEventReasons), `processes`: those with a compute context, as
        the host numbers them, in order; `limit`, `average` and `slowed`: see `GpuSecond`; `set_limit`: see `LimitSeen`.
        """
        if what not in self._readers:
            why = self.header.counter_error if what == "counter" else self.header.power_error
            raise MeterFailure(why or f"there is no {what}", is_lasting=True)
        return self._readers[what]()

    def renew(self) -> None:
        self._handle = self._find()

    def _look(self) -> GpuHeader:
        driver = _text(self._call_or_none("nvmlSystemGetDriverVersion") or "unknown")
        try:
            self._handle = self._find()
            uuid = _text(self._ask("nvmlDeviceGetUUID"))
        except MeterFailure as failure:
            text = str(failure)
            return GpuHeader(None, self._name, "unknown", driver, counter_error=text, power_error=text)
        mig_mode = self._is_mig()
        scope, power_source = EnergyScope.GPU, None
        errors: dict[str, str | None] = {"counter_error": _MIG_TEXT.format("energy counter")}
        errors["power_error"] = _MIG_TEXT.format("power")
        if not mig_mode:
            scope, power_source, errors = self._try_meters()
        vbios = self._call_or_none("nvmlDeviceGetVbiosVersion", self._handle)
        persistence = self._call_or_none("nvmlDeviceGetPersistenceMode", self._handle)
        return GpuHeader(
            index=self._call_or_none("nvmlDeviceGetIndex", self._handle),
            uuid=uuid,
            name=_text(self._call_or_none("nvmlDeviceGetName", self._handle) or "unknown"),
            driver=driver,
            vbios=None if vbios is None else _text(vbios),
            power_limit_w=self._power_limit_w(),
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=mig_mode,
            energy_scope=scope,
            power_source=power_source,
            average_source=self._keep_first("average", self._averages(scope))[0] or "none",
            counter_lag_s=kept_lag_s(uuid, driver),
            counts_slowdowns=self._keep_first("slowed", self._slowdowns())[0] is not None,
            counter_error=errors["counter_error"],
            power_error=errors["power_error"],
        )

    def _try_meters(self) -> tuple[EnergyScope, str | None, dict[str, str | None]]:
        """The scope, where power comes from, and why there is no counter or no power, by field of the header."""
        # The GPU's own scope is taken wherever it answers at all, so that counter and power are of the same thing.
        scope = EnergyScope.GPU
        source, failures = self._try(scope)
        if None not in failures.values():
            source, of_module = self._try(EnergyScope.MODULE)
            if None in of_module.values():
                scope, failures = EnergyScope.MODULE, of_module
        errors = {
            "counter_error": self._explain(failures["counter"], "the energy counter", _ENERGY),
            "power_error": self._explain(failures["power"], "power", _POWER_INSTANT),
        }
        return scope, source, errors

    def _try(self, scope: EnergyScope) -> tuple[str | None, dict[str, MeterFailure | None]]:
        counters: dict[str, Callable[[], Any]] = {"field": lambda: int(self._field(_ENERGY, scope))}
        powers = {"instant": lambda: self._field(_POWER_INSTANT, scope) / 1e3}
        if scope is EnergyScope.GPU:
            counters = {"function": lambda: int(self._ask("nvmlDeviceGetTotalEnergyConsumption"))}
            powers["average"] = lambda: float(self._ask("nvmlDeviceGetPowerUsage") / 1e3)
        _, counter_failure = self._keep_first("counter", counters)
        source, power_failure = self._keep_first("power", powers)
        return source, {"counter": counter_failure, "power": power_failure}

    def _averages(self, scope: EnergyScope) -> dict[str, Callable[[], Any]]:
        """The ways to read a mean over 1 s, which sees all that a sensor of 25 in 100 ms misses."""
        ways: dict[str, Callable[[], Any]] = {"field": lambda: self._field(_POWER_AVERAGE, scope) / 1e3}
        capability = self._call_or_none("nvmlDeviceGetCudaComputeCapability", self._handle)
        if scope is EnergyScope.GPU and (capability is None or tuple(capability) >= _FIRST_WITH_AVERAGE):
            ways["usage"] = lambda: float(self._ask("nvmlDeviceGetPowerUsage") / 1e3)
        return ways

    def _slowdowns(self) -> dict[str, Callable[[], Any]]:
        return {
            "fields": lambda: sum(self._fields(_SLOWDOWNS, EnergyScope.GPU)) / 1e9,
            "violations": lambda: self._ask("nvmlDeviceGetViolationStatus", _THERMAL_POLICY).violationTime / 1e9,
        }

    def _keep_first(self, what: str, ways: Mapping[str, Callable[[], Any]]) -> tuple[str | None, MeterFailure | None]:
        first: MeterFailure | None = None
        for name, way in ways.items():
            try:
                way()
            except MeterFailure as failure:  # noqa: PERF203 (two ways at most)
                first = first or failure
            else:
                self._readers[what] = way
                return name, None
        return None, first

    def _explain(self, failure: MeterFailure | None, what: str, field: int) -> str | None:
        if failure is None:
            return None
        if self._call_or_none("nvmlDeviceGetVirtualizationMode", self._handle) == _VIRTUAL_GPU:
            return f"this is a virtual GPU, whose hypervisor hides {what}; measure on the physical machine"
        with contextlib.suppress(MeterFailure):
            self._field(field, EnergyScope.MODULE)
            return f"the driver reports {what} only for the module of GPU and CPU, not for the GPU"
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
            if limit_mw := self._call_or_none(function, self._handle):  # 0 is a limit that is not known
                return float(limit_mw) / 1e3
        return None

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
        (number,) = self._fields((field,), scope)
        return number

    def _fields(self, fields: Sequence[int], scope: EnergyScope) -> list[float]:
        values = self._ask("nvmlDeviceGetFieldValues", [(field, _SCOPES[scope]) for field in fields])
        for value in values:
            if value.nvmlReturn != 0:
                raise _failure(self._nvml, value.nvmlReturn)
        return [getattr(value.value, _VALUE_MEMBERS[value.valueType]) for value in values]

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._call(function, self._handle, *arguments)

    def _call_or_none(self, function: str, *arguments: Any) -> Any:
        with contextlib.suppress(MeterFailure):
            return self._call(function, *arguments)
        return None

    def _call(self, function: str, *arguments: Any) -> Any:
        called = getattr(self._nvml, function, None)
        if called is None:
            text = f"this pynvml has no {function}: update nvidia-ml-py"
            raise MeterFailure(text, is_lasting=True, is_absent=True)
        try:
            return called(*arguments)
        except self._nvml.NVMLError as error:
            raise _failure(self._nvml, error.value) from error
