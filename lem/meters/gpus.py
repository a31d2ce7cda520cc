"""The NVIDIA GPUs of this host, as NVML names them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.variables import GPU_VARIABLE

__all__ = [
    "GpuFacts",
    "find_driver",
    "find_gpus",
    "is_name_of",
    "named_gpus",
    "open_nvml",
    "text_of",
    "visible_gpus",
]


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
