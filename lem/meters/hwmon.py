"""GPUs of AMD and Intel by the kernel's hwmon interface and what their drivers show beside it.

Sources: Documentation/hwmon/sysfs-interface.rst of the kernel, kgd_pp_interface.h and aldebaran_ppt.c of amdgpu
(`gpu_metrics`), i915_hwmon.c, xe_hwmon.c.
"""

from __future__ import annotations

import contextlib
import errno
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lem.base.dataclass import dataclass
from lem.base.measurement import EnergyScope
from lem.base.process import read_small
from lem.base.variables import GPU_VARIABLE, OTHER_GPU_VARIABLES
from lem.meters.machine import GpuFacts, GpuSettings, visible_gpus
from lem.meters.nvml import GpuState, MeterFailure, find_gpus
from lem.meters.samples import HWMON, GpuHeader

SYS: Final = Path("/sys")
_VENDORS: Final = MappingProxyType({"amdgpu": "AMD", "i915": "Intel", "xe": "Intel"})
_ADDRESS: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_CHANNEL: Final = re.compile(r"(?:power|energy)(\d+)_")

# Both dies of these are one card, whose power and energy its first die reports (aldebaran_ppt.c): MI250X, MI250.
_DUAL_DIES: Final = frozenset({"0x7408", "0x740c"})
_APU_DEVICES: Final = frozenset({"0x74a0"})  # MI300A, whose gpu_metrics has the layouts of a GPU
# `energy_accumulator` of gpu_metrics, in bytes from its beginning: a u64 in units of 2^-16 J (15.259 uJ).
_ACCUMULATOR_AT: Final = MappingProxyType({(1, 2): 24, (1, 3): 24, (1, 4): 24, (1, 5): 88})
_ACCUMULATOR_J: Final = 2.0**-16
# It has 32 bits in the firmware of Radeon GPUs (`EnergyAccumulator` in smu13_driver_if_v13_0_0.h and others), and 64 in
# that of Instinct. A counter beyond the first round has more than 32.
_ACCUMULATOR_RANGE_J: Final = 2.0**32 * _ACCUMULATOR_J
# amdgpu fills the table with ones before it writes what the GPU has, and writes UINT_MAX where the firmware of a Radeon
# counts no longer.
_UNSET: Final = frozenset({0, 2**32 - 1, 2**64 - 1})
_APU_FORMATS: Final = (2, 3)
# The register below Intel's `energyN_input` has 32 bits in units of 2^-14 J. The driver counts on beyond, if it is read
# at least once in a round; 2^32 uJ are where a 32-bit `long` ends.
_INTEL_RANGES_J: Final = (2**32 / 1e6, float(2**32 >> 14))

# How far power may lag behind: a driver that does not say over what it averages is taken for the slowest of NVML's.
AVERAGE_LAG_S, INSTANT_LAG_S = 1.1, 0.2
_LOST: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR})
_ASLEEP: Final = frozenset({errno.EPERM, errno.EBUSY})  # what amdgpu answers then in newer kernels
_LASTING: Final = frozenset({errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.EISDIR, errno.ENODATA})
_RIGHTS: Final = "this user may not read it; run lem as root, or let everybody read it: sudo chmod a+r {path}"
_SECOND_DIE: Final = "this is the second chiplet of a card, which reports nothing: the first one reports both"


def _fail(path: Path, error: OSError | ValueError) -> MeterFailure:
    if isinstance(error, ValueError):
        return MeterFailure(f"{path}: not understood: {error}")
    if error.errno == errno.EACCES:
        return MeterFailure(_RIGHTS.format(path=path), is_lasting=True)
    text = f"{path}: {error.strerror or error}"
    control = (path.parent / "device" if path.parent.name.startswith("hwmon") else path.parent) / "power/control"
    if error.errno in _ASLEEP and read_text(control.with_name("runtime_status")) == "suspended":
        text += f" (it is asleep; keep it awake: echo on | sudo tee {control})"
    return MeterFailure(text, is_lasting=error.errno in _LASTING, is_lost=error.errno in _LOST)


def read_number(path: Path) -> int:
    try:
        return int(read_small(path))
    except (OSError, ValueError) as error:
        raise _fail(path, error) from error


def read_text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return read_small(path).decode("utf-8", "replace").strip()
    return ""


def known_number(path: Path) -> int | None:
    with contextlib.suppress(MeterFailure):
        return read_number(path)
    return None


def read_power_w(path: Path) -> float:
    return read_number(path) / 1e6


def _watts(path: Path) -> float | None:
    """A limit in uW; 0 is one that is not set."""
    return value / 1e6 if (value := known_number(path)) else None


def hwmon_folders(sys: Path) -> list[tuple[str, Path]]:
    """(name of the driver, folder) of every hwmon device, in the order of their numbers."""
    found = (sys / "class/hwmon").glob("hwmon[0-9]*")
    numbered = sorted(found, key=lambda path: (len(path.name), path.name))
    return [(read_text(path / "name") or read_text(path / "device/name"), path) for path in numbered]


@dataclass(frozen=True)
class _Place:
    """A GPU in sysfs."""

    address: str  # PCI
    driver: str
    hwmon: Path
    device: Path


def _places(sys: Path) -> dict[str, _Place]:
    """GPUs by PCI address, in its order; what only a part of a GPU has (`i915_gt0`) has other names."""
    found: dict[str, _Place] = {}
    for driver, hwmon in hwmon_folders(sys):
        device = (hwmon / "device").resolve()
        if driver in _VENDORS and _ADDRESS.fullmatch(device.name) and _is_metered(hwmon):
            found.setdefault(device.name, _Place(device.name, driver, hwmon, device))
    return {address: found[address] for address in sorted(found)}


def _is_metered(hwmon: Path) -> bool:
    return any(_CHANNEL.match(path.name) for path in hwmon.glob("*[0-9]_*"))


def is_address(name: str) -> bool:
    return _ADDRESS.fullmatch(name.lower()) is not None


class HwmonMeter:
    """One GPU, by its PCI address, with the readings of `NvmlMeter.read` that its driver has."""

    def __init__(self, sys: Path, address: str) -> None:
        self._sys, self._address = sys, address.lower()
        self._hwmon = self._device = Path()
        self.is_known = False
        self._readers: dict[str, Callable[[], Any]] = {}
        self._ranges_j: tuple[float, ...] = ()
        self.header = self._look()

    def has(self, what: str) -> bool:
        return what in self._readers

    def read(self, what: str) -> Any:
        if what not in self._readers:
            why = self.header.counter_error if what == "counter" else self.header.power_error
            raise MeterFailure(why or f"there is no {what}", is_lasting=True)
        return self._readers[what]()

    def renew(self) -> None:
        """Find it again, since a driver that is loaded again numbers its hwmon devices anew."""
        self._find()
        for way in self._readers.values():
            way()
            return

    def _find(self) -> _Place:
        place = _places(self._sys).get(self._address)
        if place is None:
            raise MeterFailure(f"{self._address}: no hwmon device of a GPU; see lem gpus", is_lost=True)
        self._hwmon, self._device, self.is_known = place.hwmon, place.device, True
        return place

    def _look(self) -> GpuHeader:
        try:
            place = self._find()
        except MeterFailure as failure:
            text = str(failure)
            return GpuHeader(
                None, self._address, "unknown", "unknown", counter_error=text, power_error=text, meter=HWMON
            )
        counter_sensor, counter_error = self._try_counter(place)
        power_sensor, power_error = self._try_power()
        scope = EnergyScope.GPU
        if place.driver == "amdgpu":
            if _is_apu(place) or read_text(place.device / "device") in _APU_DEVICES:
                scope = EnergyScope.MODULE
            elif read_text(place.device / "device") in _DUAL_DIES:
                scope = EnergyScope.CARD
        covered_by = self._first_die(place) if counter_error and power_error else None
        self._add_others()
        is_average = power_sensor is not None and power_sensor.endswith("_average")
        return GpuHeader(
            index=None,
            uuid=place.address,
            name=_name_of(place),
            driver=read_text(self._sys / "module" / place.driver / "version") or place.driver,
            vbios=read_text(place.device / "vbios_version") or None,
            power_limit_w=self._limit_w(),
            energy_scope=scope,
            power_source=None if power_sensor is None else "average" if is_average else "instant",
            average_source="none",
            settings=_settings_of(place),
            counter_error=counter_error,
            power_error=power_error,
            meter=HWMON,
            counter_sensor=counter_sensor and f"{place.driver} {counter_sensor}",
            power_sensor=power_sensor and f"{place.driver} {power_sensor}",
            power_interval_s=stated_interval_s(place.hwmon, power_sensor),
            power_lag_s=AVERAGE_LAG_S if is_average else INSTANT_LAG_S,
            covered_by=covered_by,
            counter_ranges_j=self._ranges_j,
        )

    def _first_die(self, place: _Place) -> str | None:
        """The first die of the card whose second one this is: they follow each other on the PCI bus."""
        device = read_text(place.device / "device")
        dies = [it.address for it in _places(self._sys).values() if read_text(it.device / "device") == device]
        number = dies.index(place.address)
        return dies[number - 1] if device in _DUAL_DIES and number % 2 else None

    def _try_counter(self, place: _Place) -> tuple[str | None, str | None]:
        """The sensor of the energy counter, or why there is none."""
        name: str | None
        if place.driver == "amdgpu":
            name, read = "gpu_metrics energy_accumulator", self._accumulator_mj
        else:
            name = _energy_file(place.hwmon)
            if name is None:
                return None, f"{place.driver} shows no energyN_input for this GPU"
            file = name

            def read() -> int:
                return read_number(self._hwmon / file) // 1000

        try:
            begins_j = read() / 1000
        except MeterFailure as failure:
            return None, str(failure)
        self._readers["counter"] = read
        self._ranges_j = _INTEL_RANGES_J
        if place.driver == "amdgpu":
            self._ranges_j = (_ACCUMULATOR_RANGE_J,) if begins_j < _ACCUMULATOR_RANGE_J else ()
        return name, None

    def _accumulator_mj(self) -> int:
        path = self._device / "gpu_metrics"
        try:
            table = read_small(path)
            size, format_revision, content_revision = struct.unpack_from("<HBB", table)
            version = (format_revision, content_revision)
            if format_revision in _APU_FORMATS:
                text = f"gpu_metrics v{format_revision}.{content_revision}, that of an APU, has no energy"
                raise MeterFailure(text, is_lasting=True)
            if (at := _ACCUMULATOR_AT.get(version)) is None:
                known = ", ".join(f"v{major}.{minor}" for major, minor in _ACCUMULATOR_AT)
                text = f"gpu_metrics v{format_revision}.{content_revision} is not a layout that lem knows ({known})"
                raise MeterFailure(text, is_lasting=True)
            if size < at + 8:
                raise ValueError(f"v{format_revision}.{content_revision} with {size} bytes")
            (value,) = struct.unpack_from("<Q", table, at)
        except (OSError, ValueError, struct.error) as error:
            raise _fail(path, error if isinstance(error, OSError) else ValueError(str(error))) from error
        if value in _UNSET:
            is_dual = read_text(self._device / "device") in _DUAL_DIES
            raise MeterFailure(_SECOND_DIE if is_dual else "the GPU reports no energy in gpu_metrics", is_lasting=True)
        return int(value * (1000 * _ACCUMULATOR_J))

    def _try_power(self) -> tuple[str | None, str | None]:
        """The file of power, or why there is none."""
        found = "no power (power1_average or power1_input)"
        for name in ("power1_average", "power1_input"):
            if not (self._hwmon / name).exists():
                continue

            def read(name: str = name) -> float:
                return read_number(self._hwmon / name) / 1e6

            try:
                power_w = read()
            except MeterFailure as failure:
                found = str(failure)
                continue
            if power_w > 0:
                self._readers["power"] = read
                return name, None
            found = f"{name} reports 0 W, and a GPU always draws some"
            if read_text(self._device / "device") in _DUAL_DIES:
                found = _SECOND_DIE
        return None, found

    def _add_others(self) -> None:
        """What it shows besides."""
        readers: dict[str, tuple[Path, Callable[[], Any]]] = {
            "temperature": (self._hwmon / "temp1_input", lambda: read_number(self._hwmon / "temp1_input") / 1000),
            "sm_clock": (self._hwmon / "freq1_input", lambda: float(read_number(self._hwmon / "freq1_input"))),
            "utilisation": (
                self._device / "gpu_busy_percent",
                lambda: read_number(self._device / "gpu_busy_percent") / 100,
            ),
            "memory": (self._device / "mem_info_vram_used", lambda: read_number(self._device / "mem_info_vram_used")),
        }
        self._readers |= {what: read for what, (path, read) in readers.items() if path.exists()}
        if self._limit_w() is not None:
            self._readers |= {"limit": self._limit_w, "set_limit": self._limit_w}

    def _limit_w(self) -> float | None:
        limits = (_watts(self._hwmon / name) for name in ("power1_cap", "power1_max", "power1_rated_max"))
        return next((limit_w for limit_w in limits if limit_w is not None), None)


def _is_apu(place: _Place) -> bool:
    """Whether CPU and GPU are one chip, whose power is that of both."""
    with contextlib.suppress(OSError):
        table = read_small(place.device / "gpu_metrics")
        return place.driver == "amdgpu" and len(table) > 2 and table[2] in _APU_FORMATS
    return False


def _energy_file(hwmon: Path) -> str | None:
    """That of the whole card, else of its package (xe has both), which i915 alone has, without a label."""
    files = sorted(path.name for path in hwmon.glob("energy[0-9]*_input"))
    labels = {read_text(hwmon / name.replace("_input", "_label")): name for name in reversed(files)}
    return next((labels[label] for label in ("card", "pkg") if label in labels), next(iter(files), None))


def stated_interval_s(folder: Path, sensor: str | None) -> float | None:
    interval_ms = known_number(folder / f"{sensor}_interval") if sensor else None
    return None if interval_ms is None else interval_ms / 1000


def _name_of(place: _Place) -> str:
    ids = ":".join(read_text(place.device / name).removeprefix("0x") for name in ("vendor", "device"))
    return read_text(place.device / "product_name") or f"{_VENDORS[place.driver]} GPU {ids}".rstrip(" :")


def _settings_of(place: _Place) -> GpuSettings:
    node = known_number(place.device / "numa_node")
    return GpuSettings(
        power_limit_default_w=_watts(place.hwmon / "power1_cap_default"),
        pcie_width=known_number(place.device / "current_link_width"),
        pcie_width_max=known_number(place.device / "max_link_width"),
        numa_node=node if node is not None and node >= 0 else None,
    )


def hwmon_gpus(first: int = 0, sys: Path = SYS) -> tuple[GpuState, ...]:
    """The GPUs that hwmon shows, numbered from `first` on, those in the package of a CPU last."""
    return tuple(
        GpuState(
            index=first + number,
            uuid=place.address,
            name=_name_of(place),
            memory_total_b=known_number(place.device / "mem_info_vram_total"),
            memory_used_b=known_number(place.device / "mem_info_vram_used"),
            processes=(),
        )
        for number, place in enumerate(sorted(_places(sys).values(), key=_is_apu))
    )


def metered_gpus(
    environ: Mapping[str, str], sys: Path = SYS, nvidia: Sequence[GpuFacts] | None = None
) -> tuple[GpuFacts, ...]:
    """The GPUs that have a meter and that a program sees: those of NVML, then those of hwmon."""
    nvidia, places = find_gpus() if nvidia is None else nvidia, _places(sys)
    found = [
        # Where there are others, they are what programs compute on.
        GpuFacts(it.index, it.uuid, it.name, it.memory_total_b, None, not nvidia and not _is_apu(places[it.uuid]))
        for it in hwmon_gpus(len(nvidia), sys)
    ]
    named = next((environ[name] for name in OTHER_GPU_VARIABLES if name in environ), environ.get(GPU_VARIABLE))
    hidden = {} if named is None or nvidia else {GPU_VARIABLE: named}
    return (*visible_gpus(nvidia, environ), *visible_gpus(found, hidden))
