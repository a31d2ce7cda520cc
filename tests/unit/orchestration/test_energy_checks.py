"""What `lem doctor` says of the meters."""

from __future__ import annotations

import dataclasses

import pytest

from lem.meters.samples import GpuHeader
from lem.meters.sources import Capabilities, CpuCapability, GpuCapability
from lem.orchestration.doctor import check_cpu_energy, check_gpu_energy

COUNTED = GpuCapability(GpuHeader(0, "GPU-a", "Test", "580.1", power_source="instant"), 0.1)
INTEGRATED = GpuCapability(GpuHeader(1, "GPU-b", "Test", "580.1", power_source="average", counter_error="too old"))
DARK = GpuCapability(GpuHeader(2, "GPU-c", "Test", "580.1", counter_error="MIG is on", power_error="MIG is on"))


@pytest.mark.parametrize(
    ("gpus", "status", "message", "remedy"),
    [
        ((COUNTED,), "ok", "every 100 ms", ""),
        ((COUNTED, INTEGRATED), "warning", "GPU 1: too old", "integrated from power and labelled so"),
        ((COUNTED, INTEGRATED, DARK), "warning", "GPU 2: MIG is on", "null in the records"),
        ((), "skipped", "NVML sees no GPU", ""),
    ],
)
def test_what_the_gpus_can_tell(gpus: tuple[GpuCapability, ...], status: str, message: str, remedy: str) -> None:
    finding = check_gpu_energy(Capabilities(CpuCapability(), gpus, None if gpus else "NVML sees no GPU"))
    assert finding.status == status
    assert message in finding.message
    assert remedy in finding.remedy
    assert bool(finding.remedy) is bool(remedy)


def test_of_many_gpus_those_that_cannot_be_measured_are_shown() -> None:
    many = tuple(
        dataclasses.replace(COUNTED, meter=dataclasses.replace(COUNTED.meter, index=index)) for index in range(8)
    )
    finding = check_gpu_energy(Capabilities(CpuCapability(), (*many, DARK)))
    assert finding.message.startswith("GPU 2: MIG is on")
    assert finding.message.endswith(" and 5 more")


@pytest.mark.parametrize(
    ("cpu", "status", "message", "remedy"),
    [
        (CpuCapability(("package-0", "package-0/dram")), "ok", "package-0/dram", ""),
        (CpuCapability(("package-0",), missing=("psys: gone",)), "warning", "not psys: gone", ""),
        (CpuCapability(rapl_error="may not be read", rapl_remedy="chmod"), "warning", "may not be read", "chmod"),
        (
            CpuCapability(rapl_error="none", rapl_remedy="x", tdp_w=205.0),
            "warning",
            "tdp_estimate would use 205 W",
            "x",
        ),
    ],
)
def test_what_the_cpus_can_tell(cpu: CpuCapability, status: str, message: str, remedy: str) -> None:
    finding = check_cpu_energy(cpu)
    assert (finding.status, finding.remedy) == (status, remedy)
    assert message in finding.message
