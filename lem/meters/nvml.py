"""NVML: its errors, and the GPUs of this host."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base.codec import decode
from lem.base.variables import GPU_VARIABLE

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
    """A reading that failed."""

    def __init__(
        self, message: str, *, is_lasting: bool = False, is_absent: bool = False, is_lost: bool = False
    ) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting  # it will fail the same way again
        self.is_absent = is_absent  # the driver has no such function; there may be an older one
        self.is_lost = is_lost  # the GPU itself is gone, and everything else about it fails too


def failure_of(nvml: Any, code: int) -> MeterFailure:
    """The failure that an error code of NVML means."""
    text, meaning = str(nvml.NVMLError(code)), _MEANINGS.get(code)
    return MeterFailure(
        text if meaning is None else f"{text} ({meaning})",
        is_lasting=code in _LASTING,
        is_absent=code in _ABSENT,
        is_lost=code in _LOST,
    )


@dataclass(frozen=True)
class GpuFacts:
    """What does not change about a GPU of this host."""

    index: int  # NVML's order (PCI bus), which may differ from CUDA's
    uuid: str  # `GPU-…`, the one name that NVML, CUDA and containers agree on
    name: str
    memory_b: int  # total device memory
    compute_capability: tuple[int, int]  # (major, minor)


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

    NVML ignores that variable. As in CUDA, an entry that names no GPU hides itself and all after it. CUDA's own order
    is that of NVML under CUDA_DEVICE_ORDER=PCI_BUS_ID, which lem sets for its engines.
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
    """The GPUs that an experiment's `gpus` names, in the order of `visible`; None names the first, if there is one.

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


@dataclass(frozen=True)
class GpuProcess:
    """A process with a context on a GPU."""

    pid: int  # as the host numbers it, also when read inside a container
    memory_b: int | None  # None where not reported by the driver


@dataclass(frozen=True)
class GpuState:
    """Memory and compute processes of a GPU now."""

    index: int  # NVML's
    uuid: str
    name: str
    memory_total_b: int
    memory_used_b: int  # by all processes and by the driver itself
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True)
class GpuReading:
    """The GPUs that could be read, and what kept others from it."""

    gpus: tuple[GpuState, ...]
    driver: str | None = None  # its version; None without a driver
    error: str | None = None  # NVML's words, such as `Unknown Error`; None when everything could be read

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> GpuReading:
        """The reading whose fields a document holds among others.

        Raises:
            ValueError: it does not.
        """
        return decode(cls, {name: document.get(name) for name in ("gpus", "driver", "error")}, "reading")


def read_gpus() -> GpuReading:
    """The state of every visible GPU now."""
    with open_nvml() as nvml:
        if isinstance(nvml, str):
            return GpuReading((), error=nvml)
        gpus: list[GpuState] = []
        driver, error = None, None
        try:
            driver = text_of(nvml.nvmlSystemGetDriverVersion())
            gpus.extend(_state(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError as failure:
            error = str(failure)
    return GpuReading(tuple(gpus), driver, error)


def _state(nvml: Any, index: int) -> GpuState:
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


@contextlib.contextmanager
def open_nvml() -> Iterator[Any]:
    """pynvml, initialised; or, as a text, why there is none."""
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
    """A text that older versions of pynvml give as bytes."""
    return value.decode() if isinstance(value, bytes) else value
