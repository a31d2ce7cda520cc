"""Settings of machine and GPUs, from scripted trees of /proc and /sys and from an NVML that answers as it likes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem.meters.machine import GpuSettings, MachineFacts, read_gpu_settings, read_machine
from tests.scripted_attempt import gpu_attempt
from tests.unit.meters.nvml_stand_in import FakeNvml, NVMLError

CPU = "sys/devices/system/cpu"


def tree(folder: Path, **files: str) -> MachineFacts:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    return read_machine(folder / "proc", folder / "sys")


def test_a_server_discloses_what_changes_its_speed(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        **{
            "proc/loadavg": "1.25 0.50 0.25 3/456 789",
            f"{CPU}/cpu0/cpufreq/scaling_governor": "performance",
            f"{CPU}/cpu1/cpufreq/scaling_governor": "powersave",
            f"{CPU}/intel_pstate/no_turbo": "0",
            f"{CPU}/smt/active": "1",
            "sys/devices/system/node/node0/cpulist": "0",
            "sys/devices/system/node/node1/cpulist": "1",
            "sys/class/hwmon/hwmon0/temp1_label": "Package id 0",
            "sys/class/hwmon/hwmon0/temp1_input": "61000",
            "sys/class/hwmon/hwmon2/temp3_label": "Inlet Temp",
            "sys/class/hwmon/hwmon2/temp3_input": "23500",
        },
    )
    assert found == MachineFacts("performance, powersave", True, True, 2, 1.25, 23.5)


@pytest.mark.parametrize(
    ("files", "turbo"),
    [
        ({f"{CPU}/intel_pstate/no_turbo": "1"}, False),
        ({f"{CPU}/cpufreq/boost": "1"}, True),  # AMD and acpi-cpufreq
        ({f"{CPU}/cpufreq/boost": "0"}, False),
        ({}, None),
    ],
)
def test_turbo_is_found_where_each_driver_shows_it(tmp_path: Path, files: dict[str, str], turbo: bool | None) -> None:
    assert tree(tmp_path, **files).turbo is turbo


@pytest.mark.parametrize("milli_c", ["127000", "-128000", "n/a"])
def test_a_sensor_that_is_not_connected_is_no_ambient_temperature(tmp_path: Path, milli_c: str) -> None:
    sensor = "sys/class/hwmon/hwmon0/temp1"
    found = tree(tmp_path, **{f"{sensor}_label": "Ambient", f"{sensor}_input": milli_c})
    assert found.ambient_temp_c is None


def test_a_machine_that_shows_nothing_is_unknown_not_zero(tmp_path: Path) -> None:
    assert tree(tmp_path) == MachineFacts()


FULL = {
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetApplicationsClock": 1500,
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 8,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"00000000:3B:00.0"),
}


def settings(folder: Path, answers: dict[str, Any]) -> GpuSettings:
    return read_gpu_settings(FakeNvml(uuids=("GPU-a",), answers=answers), "GPU-a", folder)


def test_a_gpu_discloses_its_settings(tmp_path: Path) -> None:
    node = tmp_path / "bus/pci/devices/0000:3b:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n", encoding="ascii")
    found = settings(tmp_path, {**FULL, "nvmlDeviceGetNvLinkState": 1})
    assert found == GpuSettings(700.0, 1.98e9, 1.5e9, True, 5, 8, 16, 18, 1)
    node.write_text("-1\n", encoding="ascii")  # the firmware does not say
    assert settings(tmp_path, FULL).numa_node is None


def test_a_gpu_without_links_has_none_and_one_that_does_not_say_is_unknown(tmp_path: Path) -> None:
    assert settings(tmp_path, {**FULL, "nvmlDeviceGetNvLinkState": 0}).nvlinks == 0
    assert settings(tmp_path, FULL).nvlinks is None


def test_what_nvml_cannot_say_is_unknown(tmp_path: Path) -> None:
    assert settings(tmp_path, dict.fromkeys(FULL, NVMLError(3))) == GpuSettings()
    assert read_gpu_settings(FakeNvml(uuids=()), "GPU-a", tmp_path) == GpuSettings()


def test_settings_reach_the_record_or_are_absent_with_a_reason() -> None:
    known = gpu_attempt().with_gpu_header(settings=GpuSettings(ecc_mode=False, pcie_width=8))
    known = known.with_header(machine=MachineFacts(smt=True, load_1min=0.0))
    found = known.measured()
    assert (found.gpus[0].ecc_mode, found.gpus[0].pcie_width, found.gpus[0].clocks_set) == (False, 8, False)
    assert found.gpus[0].why_none("nvlinks").code == "not_reported"
    assert (found.machine.smt, found.machine.load_1min) == (True, 0.0)
    assert found.machine.why_none("turbo").code == "not_shown"
    assert found.machine.why_none("ambient_temp_c").code == "no_ambient_sensor"
