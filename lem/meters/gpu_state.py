"""What the GPUs are doing: memory in use and by whom, or why that cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lem.jsontypes import build_from, typed_fields
from lem.meters.gpus import open_nvml, text_of

__all__ = ["GpuProcess", "GpuReading", "GpuState", "read_gpus"]


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
        values = typed_fields(cls, {name: document.get(name) for name in ("gpus", "driver", "error")}, "reading")
        return cls(**{**values, "gpus": tuple(map(_decode_gpu, values["gpus"]))})


def _decode_gpu(document: Any) -> GpuState:
    values = typed_fields(GpuState, document, "gpu")
    return GpuState(
        **{**values, "processes": tuple(build_from(GpuProcess, item, "process") for item in values["processes"])}
    )


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
