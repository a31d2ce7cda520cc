"""Whether a container is fit to measure in, judged from what NVML says inside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lem.meters.gpu_state import GpuReading, GpuState
from lem.orchestration.findings import some_shown
from lem.reasons import Reason

__all__ = ["ContainerHealthStatus", "gpu_loss", "holders", "judge"]

_GB = 1e9

# What NVML says in a container from which the GPU was taken away while it ran.
_LOST = frozenset({"Unknown Error", "Not Found", "Insufficient Permissions"})


@dataclass(frozen=True)
class ContainerHealthStatus:
    """How a container is.

    Attributes:
        reason: why, in words, also when it is healthy.
        gpu_memory_used_gb, gpu_memory_total_gb: over its GPUs, in 10⁹ bytes; None without a GPU or an answer.
    """

    service: str
    healthy: bool
    reason: str
    gpu_memory_used_gb: float | None = None
    gpu_memory_total_gb: float | None = None


def gpu_loss(reading: GpuReading) -> Reason | None:
    """How a container that was given a GPU has lost it; None when it sees it.

    A reading that failed in a way that is not known is a loss too: what cannot be read cannot be measured.
    """
    if reading.error is not None:
        return Reason.of("gpu_unplugged" if reading.error in _LOST else "gpu_lost", error=reading.error)
    return None if reading.gpus else Reason.of("gpu_gone")


def judge(
    service: str, reading: GpuReading, own_pids: Collection[int], gpu_memory_threshold_pct: float
) -> ContainerHealthStatus:
    """The health of a container with a GPU that has answered.

    Args:
        own_pids: processes of lem's own worker as the host numbers them; what they hold does not count.
        gpu_memory_threshold_pct: memory in use on any one GPU from which on it is unhealthy.
    """
    lost = gpu_loss(reading)
    if lost is not None:
        return ContainerHealthStatus(service, healthy=False, reason=lost.text)
    used_gb = sum(gpu.memory_used_b for gpu in reading.gpus) / _GB
    total_gb = sum(gpu.memory_total_b for gpu in reading.gpus) / _GB
    worst = max(reading.gpus, key=lambda gpu: _foreign_pct(gpu, own_pids))
    worst_pct = _foreign_pct(worst, own_pids)
    healthy = worst_pct < gpu_memory_threshold_pct
    whose = "by others" if _holds_any(worst, own_pids) else "in use"
    reason = f"{worst_pct:.0f} % of the memory of GPU {worst.index} is held {whose}"
    if not healthy:
        reason += f", the threshold is {gpu_memory_threshold_pct:g} %{_by_whom(worst, own_pids)}"
    return ContainerHealthStatus(service, healthy, reason, used_gb, total_gb)


def holders(readings: Sequence[GpuReading], pids: Collection[int]) -> tuple[int, ...]:
    """Which of these processes still have a context on a GPU."""
    found = {item.pid for reading in readings for gpu in reading.gpus for item in gpu.processes}
    return tuple(sorted(found & set(pids)))


def _foreign_pct(gpu: GpuState, own_pids: Collection[int]) -> float:
    """Memory in use that is not lem's own; all of it lem's where the driver does not tell shares and nobody else runs.

    NVIDIA's driver counts contexts in `memory_used_b` and in the processes' shares alike.
    """
    if gpu.memory_total_b <= 0:
        return 0.0
    own = [item for item in gpu.processes if item.pid in own_pids]
    if own and len(own) == len(gpu.processes) and any(item.memory_b is None for item in own):
        return 0.0
    own_b = sum(item.memory_b or 0 for item in own)
    return 100.0 * max(0, gpu.memory_used_b - own_b) / gpu.memory_total_b


def _holds_any(gpu: GpuState, pids: Collection[int]) -> bool:
    return any(item.pid in pids for item in gpu.processes)


def _by_whom(gpu: GpuState, own_pids: Collection[int]) -> str:
    others = [str(item.pid) for item in gpu.processes if item.pid not in own_pids]
    return f"; processes {some_shown(others)}" if others else ""
