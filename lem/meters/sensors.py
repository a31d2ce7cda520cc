"""Power of modules, CPUs and machines, by sensors of the kernel's hwmon interface: ACPI power meters, Grace, Jetson.

Sources: Documentation/hwmon/acpi_power_meter.rst, ina3221.rst and ina238.rst of the kernel, NVIDIA's Grace Performance
Tuning Guide (power telemetry), NVIDIA's Jetson Linux Developer Guide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from lem.base.dataclass import replace
from lem.base.measurement import EnergyScope
from lem.meters.hwmon import (
    AVERAGE_LAG_S,
    INSTANT_LAG_S,
    SYS,
    hwmon_folders,
    known_number,
    read_number,
    read_power_w,
    read_text,
    stated_interval_s,
)
from lem.meters.nvml import MeterFailure
from lem.meters.samples import HWMON, GpuHeader

_LONGEST_INTERVAL_S: Final = 10.0

# How names of ACPI power meters of Grace begin: the module (with its GPU), the whole chip, and its two rails.
_OF_MODULE, _OF_CHIP, _OF_CORES, _OF_IO = (f"{it} Power Socket" for it in ("Module", "Grace", "CPU", "SysIO"))
_JETSON_INPUT: Final = frozenset({"VDD_IN", "POM_5V_IN"})  # all that the module takes; other rails are parts of it


class SensorMeter:
    """The power of a module, of a CPU or of the machine."""

    def __init__(self, header: GpuHeader, read: Callable[[], float]) -> None:
        self.header, self._read, self.is_known = header, read, True

    def has(self, what: str) -> bool:
        return what == "power" and self.header.power_error is None

    def read(self, what: str) -> Any:
        if not self.has(what):
            raise MeterFailure(self.header.power_error or f"there is no {what}", is_lasting=True)
        return self._read()

    def renew(self) -> None:
        self._read()


def find_sensors(sys: Path = SYS) -> tuple[SensorMeter, ...]:
    """The sensors of everything but GPUs, each with what it covers; parts of what another one covers are left out."""
    found = [*_acpi_meters(sys), *_jetson_inputs(sys)]
    whole = [meter for meter in found if meter.header.energy_scope == EnergyScope.MACHINE]
    if len(whole) > 1:
        names = ", ".join(meter.header.uuid for meter in whole)
        why = f"there are {len(whole)} meters of the machine ({names}), and none says what it measures"
        for meter in whole:
            meter.header = replace(meter.header, power_error=why)
    return tuple(found)


def _acpi_meters(sys: Path) -> Iterator[SensorMeter]:
    # Its files are those of the ACPI device below `device`.
    bases = [base for driver, it in hwmon_folders(sys) if driver == "power_meter" for base in (it, it / "device")]
    files = [path for base in bases for path in sorted(base.glob("power[0-9]*_average"))]
    labels = {path: _label(path, "oem_info") for path in files if known_number(_beside(path, "is_battery")) != 1}
    has_chip = any(label.startswith(_OF_CHIP) for label in labels.values())
    for path, label in labels.items():
        if not (label.startswith(_OF_IO) or (label.startswith(_OF_CORES) and has_chip)):
            scope = EnergyScope.MACHINE
            if label.startswith((_OF_CHIP, _OF_CORES)):
                scope = EnergyScope.CPU_PACKAGE
            elif label.startswith(_OF_MODULE):
                scope = EnergyScope.MODULE
            interval_s = stated_interval_s(path.parent, path.name)
            lag_s = (interval_s or 0.0) + AVERAGE_LAG_S
            yield _sensor("power_meter", path, label, functools.partial(read_power_w, path), scope, interval_s, lag_s)


def _jetson_inputs(sys: Path) -> Iterator[SensorMeter]:
    is_jetson = "nvidia,tegra" in read_text(sys / "firmware/devicetree/base/compatible")
    for driver, folder in hwmon_folders(sys):
        interval_ms = known_number(folder / "update_interval")
        interval_s = None if interval_ms is None else interval_ms / 1000
        more = (EnergyScope.MODULE, interval_s, max(INSTANT_LAG_S, 2 * (interval_s or 0.0)))
        if driver == "ina3221":
            for path in sorted(folder.glob("in[0-9]*_label")):
                if (label := read_text(path)) in _JETSON_INPUT:
                    volts = path.with_name(path.name.replace("_label", "_input"))
                    amps = volts.with_name(volts.name.replace("in", "curr", 1))

                    def read(volts: Path = volts, amps: Path = amps) -> float:
                        return read_number(volts) * read_number(amps) / 1e6

                    yield _sensor(driver, volts, label, read, *more)
        elif driver == "ina238" and is_jetson:
            path = folder / "power1_input"
            yield _sensor(driver, path, _label(path, "label"), functools.partial(read_power_w, path), *more)


def _sensor(
    driver: str,
    path: Path,
    label: str,
    read: Callable[[], float],
    scope: EnergyScope,
    interval_s: float | None,
    lag_s: float,
) -> SensorMeter:
    device = next(it for it in (path.parent.resolve().name, path.parent.parent.name) if it != "device")
    name, error = f"{driver} {label or device}", None
    try:
        if read() <= 0:
            error = "it reports 0 W"
    except MeterFailure as failure:
        error = str(failure)
    if interval_s is not None and interval_s > _LONGEST_INTERVAL_S:
        error = (
            f"it averages over {interval_s:g} s, more than {_LONGEST_INTERVAL_S:g} s; "
            f"write fewer milliseconds to {path}_interval"
        )
    header = GpuHeader(
        index=None,
        uuid=name,
        name=name,
        driver=driver,
        energy_scope=scope,
        power_source="average" if path.name.endswith("_average") else "instant",
        average_source="none",
        counter_error="a sensor of power has no energy counter",
        power_error=error,
        meter=HWMON,
        power_sensor=f"{name} {path.name}",
        power_interval_s=interval_s,
        power_lag_s=lag_s,
    )
    return SensorMeter(header, read)


def _beside(path: Path, what: str) -> Path:
    """A file of the same channel: `power1_oem_info` beside `power1_average`."""
    return path.with_name(f"{path.name.partition('_')[0]}_{what}")


def _label(path: Path, what: str) -> str:
    return read_text(_beside(path, what)) or read_text(_beside(path, "label"))
