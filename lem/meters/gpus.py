"""The NVIDIA GPUs of this host, as NVML names them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["GpuFacts", "find_driver", "find_gpus"]


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
    """The GPUs of this host in NVML's order; () without a driver."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return tuple(
            GpuFacts(
                index=index,
                uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                name=_text(nvml.nvmlDeviceGetName(handle)),
                memory_b=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for index, handle in enumerate(handles)
        )


def find_driver() -> str | None:
    """The version of the NVIDIA driver, `580.65.06`; None without one."""
    with _nvml() as nvml:
        return None if nvml is None else _text(nvml.nvmlSystemGetDriverVersion())


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """pynvml, initialised; None where the library or the driver is missing."""
    nvml = _import_pynvml()
    if nvml is None:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _import_pynvml() -> Any:
    for name in ("lem._vendor.pynvml", "pynvml"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
