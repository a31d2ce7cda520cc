"""The device an experiment runs on, chosen among the GPUs that PyTorch sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lem.errors import EngineError
from lem.reasons import Reason

__all__ = ["idle_gpu", "pick_gpu", "visible_gpus"]


def visible_gpus(torch: ModuleType) -> tuple[str, ...]:
    """UUIDs of the GPUs in CUDA's order, written as NVML writes them (`GPU-…`); () without a usable GPU.

    CUDA's order may differ from NVML's and heeds CUDA_VISIBLE_DEVICES, which NVML does not: a UUID says which is which.
    """
    if not torch.cuda.is_available():
        return ()
    count: int = torch.cuda.device_count()
    return tuple(f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count))


def idle_gpu(gpus: Sequence[str] | None, uuids: Sequence[str], devices: Path = Path("/dev")) -> tuple[Reason, ...]:
    """A warning where the CPU is used for want of a GPU that PyTorch can use, though the machine has one."""
    if gpus is None and not uuids and any(devices.glob("nvidia[0-9]*")):
        return (Reason.of("gpu_unusable"),)
    return ()


def pick_gpu(gpus: Sequence[str] | None, uuids: Sequence[str]) -> int | None:
    """CUDA index of the first GPU named; None for the CPU.

    Args:
        gpus: indices in CUDA's order or UUIDs, also shortened as CUDA takes them; () is the CPU, None is GPU 0 where
            there is one.
        uuids: of the GPUs there are, in CUDA's order.

    Raises:
        EngineError: kind `option`, a GPU is named that is not there.
    """
    if gpus is None:
        return 0 if uuids else None
    indices = [_index_of(name, uuids) for name in gpus]
    return indices[0] if indices else None


def _index_of(name: str, uuids: Sequence[str]) -> int:
    if name.isdecimal():
        matches = [int(name)] if int(name) < len(uuids) else []
    else:
        matches = [index for index, uuid in enumerate(uuids) if uuid.lower().startswith(name.lower())]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(f"{index} ({uuid})" for index, uuid in enumerate(uuids)) or "none"
    problem = "stands for several GPUs" if matches else "is not there"
    raise EngineError(
        f"gpus: {name} {problem}; PyTorch sees {there}",
        "name one that is there, or [] for the CPU" if uuids else "is the driver loaded, and is this a CUDA build?",
        kind="option",
        is_permanent=True,
    )
