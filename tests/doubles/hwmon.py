"""A folder like /sys with hwmon devices whose readings follow a known power; time is always an argument."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

# The mean power in W over so many seconds before.
Power = Callable[[float], float]
# What a file has, always or by µJ since the start and that power.
Content = str | bytes | Callable[[int, Power], "str | bytes"]

_METRICS = {(1, 2): (24, 120), (1, 3): (24, 136), (1, 4): (24, 280), (1, 5): (88, 352)}  # where the energy is, size


def overwrite(path: Path | str, data: bytes) -> None:
    """Faster than `write_bytes`: a file that is cut to nothing first may wait for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))
    os.close(descriptor)


@dataclass(frozen=True)
class Device:
    """One hwmon device; names of files that begin with `device/` are below the device itself."""

    driver: str
    address: str = ""  # on the PCI bus
    files: Mapping[str, Content] = field(default_factory=dict)

    def having(self, **files: Content) -> Device:
        return replace(self, files={**self.files, **files})


def metrics(version: tuple[int, int], units: int) -> bytes:
    """A `gpu_metrics` table with this `energy_accumulator`; of an unknown version, as if it had the layout of v1.3."""
    at, size = _METRICS.get(version, _METRICS[1, 3])
    table = bytearray(b"\xff" * size)
    struct.pack_into("<HBB", table, 0, size, *version)
    struct.pack_into("<Q", table, at, units)
    return bytes(table)


def amd(
    address: str = "0000:03:00.0",
    *,
    version: tuple[int, int] = (1, 3),
    device: str = "0x744c",
    gain: float = 1.0,
    begins: int = 9_000_000_000,
    bits: int = 64,
    power: str = "power1_average",
    mean_s: float = 0.05,
) -> Device:
    """A GPU with a counter of so many bits in units of 2^-16 J from `begins` on, and one file of power."""
    files: dict[str, Content] = {
        "power1_cap": "500000000\n",
        "temp1_input": "55000\n",
        "freq1_input": "1700000000\n",
        "device/device": f"{device}\n",
        "device/vendor": "0x1002\n",
        "device/mem_info_vram_total": "68702699520\n",
        "device/mem_info_vram_used": "1073741824\n",
        "device/gpu_metrics": lambda uj, _: metrics(version, (begins + round(gain * uj * 1e-6 * 65536)) % 2**bits),
    }
    if power:
        files[power] = lambda _, mean_w: f"{round(mean_w(mean_s) * 1e6)}\n"
    return Device("amdgpu", address, files)


def second_die(address: str) -> Device:
    """As aldebaran_ppt.c has it: no energy, and 0 W (or, since Linux 6.5, EOPNOTSUPP)."""
    files: dict[str, Content] = {"power1_average": "0\n", "device/gpu_metrics": metrics((1, 3), 0)}
    return amd(address, device="0x740c").having(**files)


def intel(
    address: str = "0000:4d:00.0",
    *,
    driver: str = "i915",
    begins_uj: int = 8_000_000_000,
    range_uj: int | None = None,
    files: Mapping[str, float] | None = None,
) -> Device:
    """A GPU with counters `{name: share of its power}`, which wrap at `range_uj`."""

    def counter(share: float) -> Content:
        def read(uj: int, _: Power) -> str:
            value = begins_uj + round(share * uj)
            return f"{value if range_uj is None else value % range_uj}\n"

        return read

    counters = {name: counter(share) for name, share in (files or {"energy1_input": 1.0}).items()}
    ids: dict[str, Content] = {"device/device": "0x56a0\n", "device/vendor": "0x8086\n", "power1_max": "500000000\n"}
    return Device(driver, address, {**ids, **counters})


def jetson(label: str = "VDD_IN", channel: int = 1, volts: float = 5.0) -> Device:
    """An INA3221 with a part of the module's power on channel 3."""
    return Device(
        "ina3221",
        files={
            f"in{channel}_label": f"{label}\n",
            f"in{channel}_input": f"{round(volts * 1000)}\n",
            f"curr{channel}_input": lambda _, mean_w: f"{round(mean_w(0.01) / volts * 1000)}\n",
            "in3_label": "VDD_SOC\n",
            "in3_input": "5000\n",
            "curr3_input": "300\n",
        },
    )


def thor() -> Device:
    return Device("ina238", files={"power1_input": lambda _, mean_w: f"{round(mean_w(0.01) * 1e6)}\n"})


def acpi(name: str = "", *, interval_ms: int = 1000, share: float = 1.0, more: Mapping[str, Content] = {}) -> Device:
    """An ACPI power meter, whose files are below `device`."""
    files: dict[str, Content] = {
        "device/power1_average": lambda _, mean_w: f"{round(share * mean_w(interval_ms / 1000) * 1e6)}\n",
        "device/power1_average_interval": f"{interval_ms}\n",
        "device/power1_oem_info": f"{name}\n",
    }
    return Device("power_meter", files={**files, **more})


@dataclass
class HwmonTree:
    sys: Path
    devices: tuple[Device, ...]
    is_jetson: bool = False

    def make(self, uj: int, powers: Power) -> None:
        """Write every device, in order hwmon0, hwmon1 …, after so many µJ and with these means of power."""
        if self.is_jetson:
            folder = self.sys / "firmware/devicetree/base"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "compatible").write_bytes(b"nvidia,p3971-0000\0nvidia,tegra264\0")
        for number, device in enumerate(self.devices):
            hwmon = Path(self.folder_of(number))
            below = hwmon.parents[1]
            hwmon.mkdir(parents=True)
            (hwmon / "device").symlink_to(below)
            (self.sys / "class/hwmon").mkdir(parents=True, exist_ok=True)
            (self.sys / "class/hwmon" / hwmon.name).symlink_to(hwmon)
            # That of an ACPI power meter is in the device alone.
            named = below if device.driver == "power_meter" else hwmon
            (named / "name").write_text(f"{device.driver}\n", encoding="ascii")
            for name, content in device.files.items():
                if not callable(content):
                    (hwmon / name).parent.mkdir(parents=True, exist_ok=True)
                    (hwmon / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            self.update(number, uj, powers)

    def update(self, number: int, uj: int, powers: Power) -> None:
        """Write what changes of one device, whether or not a link leads to it."""
        folder = self.folder_of(number)
        for name, content in self.devices[number].files.items():
            if callable(content):
                found = content(uj, powers)
                overwrite(f"{folder}/{name}", found if isinstance(found, bytes) else found.encode())

    def folder_of(self, number: int) -> str:
        device = self.devices[number]
        return f"{self.sys}/devices/{device.address or f'platform/{device.driver}.{number}'}/hwmon/hwmon{number}"
