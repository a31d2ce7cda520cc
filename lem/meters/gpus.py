"""The GPUs of a host, and by which names engines and users mean them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lem.base.variables import GPU_VARIABLE


@dataclass(frozen=True)
class GpuFacts:
    """What does not change about a GPU of this host."""

    index: int  # NVML's order (PCI bus), which may differ from CUDA's
    uuid: str  # `GPU-…`, the one name that NVML, CUDA and containers agree on
    name: str
    memory_b: int | None  # total device memory; None where it shares that of the machine (unified memory)
    compute_capability: tuple[int, int] | None  # (major, minor)


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
    for name in map(str.strip, named.split(",")):
        found = [gpu for gpu in present if name == str(gpu.index) or is_name_of(name, gpu.uuid)]
        if len(found) != 1:
            break
        visible.append(found[0])
    return tuple(visible)


def named_gpus(names: Sequence[str] | None, visible: Sequence[GpuFacts]) -> tuple[GpuFacts, ...]:
    """The GPUs that `gpus` names, in the order of `visible`, by default the first; the engine refuses unknown names."""
    wanted = ("0",) if names is None else names
    return tuple(
        gpu
        for number, gpu in enumerate(visible)
        if any(name == str(number) or is_name_of(name, gpu.uuid) for name in wanted)
    )
