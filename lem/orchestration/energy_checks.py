"""Whether energy can be measured on a host, as findings of `lem doctor`."""

from __future__ import annotations

from lem.measurement import EnergySource
from lem.meters.capabilities import Capabilities, CpuCapability
from lem.orchestration.findings import OK, SKIPPED, WARNING, Finding, some_shown

__all__ = ["PROBE_S", "look_at_cpu_energy", "look_at_gpu_energy"]

# Long enough for three changes of a counter that is updated every half second; most take a quarter of that.
PROBE_S = 2.5


def look_at_gpu_energy(found: Capabilities) -> Finding:
    """Whether every GPU has an energy counter, and how fine it is; none of it keeps a campaign from running."""
    if not found.gpus:
        return Finding(SKIPPED, found.gpu_error or "no GPU to look at")
    worst_first = sorted(found.gpus, key=lambda gpu: (gpu.source is not None, gpu.source == EnergySource.COUNTER))
    lines = [f"{gpu.meter.label}: {'; '.join(gpu.describe())}" for gpu in worst_first]
    shown = some_shown(lines, " · ")
    if all(gpu.source == EnergySource.COUNTER for gpu in found.gpus):
        return Finding(OK, shown)
    if all(gpu.source is not None for gpu in found.gpus):
        remedy = "energy is integrated from power and labelled so; measurement.energy: nvml refuses that"
    else:
        remedy = "GPU energy is null in the records until then; measurement.energy: nvml refuses to run"
    return Finding(WARNING, shown, remedy)


def look_at_cpu_energy(cpu: CpuCapability) -> Finding:
    """Whether the counters of the CPU packages can be read."""
    if cpu.rapl_error is None:
        text = f"RAPL can be read: {', '.join(cpu.zones)}"
        return Finding(WARNING, f"{text}; not {'; '.join(cpu.missing)}") if cpu.missing else Finding(OK, text)
    estimate = "" if cpu.tdp_w is None else f"; tdp_estimate would use {cpu.tdp_w:g} W ({cpu.tdp_source})"
    return Finding(WARNING, f"{cpu.rapl_error}{estimate}", cpu.rapl_remedy)
