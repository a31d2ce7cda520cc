"""NVML: finding GPUs, reading their counters and sensors, and its errors."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lem.base.measurement import EnergyScope
from lem.base.variables import GPU_VARIABLE
from lem.meters.samples import GpuHeader

# nvml.h, nvmlReturn_t
_UNINITIALIZED, _INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 1, 2, 3, 4, 6
_FUNCTION_NOT_FOUND, _GPU_IS_LOST, _RESET_REQUIRED, _VERSION_MISMATCH = 13, 15, 16, 25
_DRIVER_NOT_LOADED, _GPU_NOT_FOUND, _DEPRECATED = 9, 28, 26

_LASTING = frozenset({_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _DEPRECATED})
_ABSENT = frozenset({_FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _DEPRECATED})
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
    """A reading that failed.

    Attributes:
        is_lasting: it will fail the same way again, so it need not be tried again.
        is_absent: the driver has no such function; there may be an older one.
        is_lost: the GPU itself is gone, and everything else about it fails too.
    """

    def __init__(
        self, message: str, *, is_lasting: bool = False, is_absent: bool = False, is_lost: bool = False
    ) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting
        self.is_absent = is_absent
        self.is_lost = is_lost


def failure_of(nvml: Any, code: int) -> MeterFailure:
    """The failure that an error code of NVML stands for."""
    said, meaning = str(nvml.NVMLError(code)), _MEANINGS.get(code)
    return MeterFailure(
        said if meaning is None else f"{said} ({meaning})",
        is_lasting=code in _LASTING,
        is_absent=code in _ABSENT,
        is_lost=code in _LOST,
    )


@dataclass(frozen=True)
class GpuFacts:
    """What does not change about a GPU.

    Attributes:
        index: NVML's order (PCI bus), which may differ from CUDA's.
        uuid: `GPU-…`, the one name that NVML, CUDA and containers agree on.
        memory_b: total device memory in bytes.
        compute_capability: (major, minor).
    """

    index: int
    uuid: str
    name: str
    memory_b: int
    compute_capability: tuple[int, int]


def find_gpus() -> tuple[GpuFacts, ...]:
    """The GPUs of this host in NVML's order; () without a driver. A GPU that is lost is left out."""
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return ()
        found = []
        with contextlib.suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetCount()):
                with contextlib.suppress(nvml.NVMLError):
                    found.append(_facts(nvml, index))
        return tuple(found)


def _facts(nvml: Any, index: int) -> GpuFacts:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return GpuFacts(
        index=index,
        uuid=text_of(nvml.nvmlDeviceGetUUID(handle)),
        name=text_of(nvml.nvmlDeviceGetName(handle)),
        memory_b=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def is_name_of(name: str, uuid: str) -> bool:
    """Whether `name` is that UUID, or it shortened as CUDA takes it."""
    return name.upper().startswith("GPU-") and uuid.lower().startswith(name.lower())


def visible_gpus(present: Sequence[GpuFacts], environ: Mapping[str, str]) -> tuple[GpuFacts, ...]:
    """The GPUs as an engine counts them from 0: those of CUDA_VISIBLE_DEVICES in its order, all of them without it.

    NVML knows nothing of that variable. As in CUDA, an entry that names no GPU hides itself and all behind it. CUDA's
    own order is that of NVML under CUDA_DEVICE_ORDER=PCI_BUS_ID, which lem sets for its engines.
    """
    named = environ.get(GPU_VARIABLE)
    if named is None:
        return tuple(present)
    visible: list[GpuFacts] = []
    for name in (part.strip() for part in named.split(",")):
        is_index = name.isdecimal()
        found = [gpu for gpu in present if (str(gpu.index) == name if is_index else is_name_of(name, gpu.uuid))]
        if len(found) != 1:
            break
        visible.append(found[0])
    return tuple(visible)


def named_gpus(names: Sequence[str] | None, visible: Sequence[GpuFacts]) -> tuple[GpuFacts, ...]:
    """The GPUs that an experiment's `gpus` names, in the order of `visible`; None is the first one, where there is one.

    A name that is not found is the engine's to refuse.
    """
    wanted = ("0",) if names is None else names
    return tuple(
        gpu
        for number, gpu in enumerate(visible)
        if any(name == str(number) or is_name_of(name, gpu.uuid) for name in wanted)
    )


def find_driver() -> str | None:
    """The version of the NVIDIA driver, `580.65.06`; None without one."""
    with open_nvml() as nvml:
        if not isinstance(nvml, str):
            with contextlib.suppress(nvml.NVMLError):
                return text_of(nvml.nvmlSystemGetDriverVersion())
    return None


@contextlib.contextmanager
def open_nvml() -> Iterator[Any]:
    """pynvml, initialised; or, as a text, why there is none: no library, no driver."""
    nvml = _import_pynvml()
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


def _import_pynvml() -> Any:
    for name in ("lem._vendor.pynvml", "pynvml"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def text_of(value: str | bytes) -> str:
    """A text of NVML, which older versions of pynvml give as bytes."""
    return value.decode() if isinstance(value, bytes) else value


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

# What `NvmlMeter.read` reads, and the name in `MeterError.meter`.
QUANTITIES = ("power", "temperature", "sm_clock", "utilisation", "memory", "events")


@dataclass(frozen=True)
class _Found:
    """What answers in a scope, and why not what does not."""

    counter: Callable[[], int] | None
    counter_failure: MeterFailure | None
    power: Callable[[], float] | None
    power_failure: MeterFailure | None
    power_source: str | None


class NvmlMeter:
    """The meters of one GPU.

    Attributes:
        header: what does not change, and why the counter or power cannot be read.
    """

    def __init__(self, nvml: Any, name: str) -> None:
        """Find the GPU and try its meters; what fails is in the header.

        Args:
            nvml: pynvml, initialised.
            name: the GPU's UUID, or it shortened as CUDA takes it.
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
        """Whether NVML knows the GPU, or knew it once."""
        return self._handle is not None

    @property
    def has_counter(self) -> bool:
        """Whether the energy counter can be read."""
        return self._read_counter is not None

    def read_counter_mj(self) -> int:
        """The energy counter in mJ.

        Raises:
            MeterFailure: it cannot be read.
        """
        if self._read_counter is None:
            raise MeterFailure(self.header.counter_error or "there is no counter", is_lasting=True)
        return self._read_counter()

    def read(self, quantity: str) -> float | int:
        """One of `QUANTITIES` in W, °C, Hz, a share of 1, bytes, or the bits of nvmlClocksEventReasons.

        Raises:
            MeterFailure: it cannot be read.
        """
        return self._readers[quantity]()

    def read_pids(self) -> tuple[int, ...]:
        """The processes with a compute context, as the host numbers them, in order.

        Raises:
            MeterFailure: they cannot be read.
        """
        return tuple(sorted(int(item.pid) for item in self._ask("nvmlDeviceGetComputeRunningProcesses")))

    def renew(self) -> None:
        """Look the GPU up again, after it was lost.

        Raises:
            MeterFailure: it is not there.
        """
        self._handle = self._find()

    def _look(self) -> GpuHeader:
        driver = self._call_or_none("nvmlSystemGetDriverVersion")
        driver_text = "unknown" if driver is None else text_of(driver)
        try:
            self._handle = self._find()
            uuid = text_of(self._ask("nvmlDeviceGetUUID"))
        except MeterFailure as failure:
            text = str(failure)
            return GpuHeader(None, self._name, "unknown", driver_text, counter_error=text, power_error=text)
        mig_mode = self._is_mig()
        counter_error, power_error, power_source = self._try_meters(is_mig=mig_mode is True)
        name = self._call_or_none("nvmlDeviceGetName", self._handle)
        vbios = self._call_or_none("nvmlDeviceGetVbiosVersion", self._handle)
        persistence = self._call_or_none("nvmlDeviceGetPersistenceMode", self._handle)
        return GpuHeader(
            index=self._call_or_none("nvmlDeviceGetIndex", self._handle),
            uuid=uuid,
            name="unknown" if name is None else text_of(name),
            driver=driver_text,
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
        """The handle of the GPU.

        Raises:
            MeterFailure: NVML does not give it.
        """
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
        """The value of a field of nvmlDeviceGetFieldValues."""
        (value,) = self._ask("nvmlDeviceGetFieldValues", [(field, _SCOPES[scope])])
        if value.nvmlReturn != 0:
            raise failure_of(self._nvml, value.nvmlReturn)
        number: float = getattr(value.value, _VALUE_MEMBERS[value.valueType])
        return number

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What NVML says of this GPU."""
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


def gpu_uuids(nvml: Any) -> tuple[str | None, ...]:
    """The UUIDs of all GPUs in NVML's order, None for one that does not answer."""
    try:
        count = int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError:
        return ()
    return tuple(_uuid_at(nvml, index) for index in range(count))


def _uuid_at(nvml: Any, index: int) -> str | None:
    try:
        return text_of(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))
    except nvml.NVMLError:
        return None


def _first_that_answers(ways: Sequence[Callable[[], _T]]) -> tuple[Callable[[], _T] | None, MeterFailure | None]:
    """The first way that gives a value; without one, why the first did not."""
    failures = []
    for way in ways:
        failure = _failure_in(way)
        if failure is None:
            return way, None
        failures.append(failure)
    return None, failures[0]


def _failure_in(way: Callable[[], object]) -> MeterFailure | None:
    try:
        way()
    except MeterFailure as failure:
        return failure
    return None
