"""The machine and its GPUs: what they are called, and settings that change what is measured.

The sampler, which runs on the host if it can, reads the settings before an experiment: a container may see less. What
cannot be read is None.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.dataclass import dataclass
from lem.base.variables import GPU_VARIABLE, cache_folder

_SM = 1  # NVML_CLOCK_SM
_MOST_LINKS = 18  # NVML_NVLINK_MAX_LINKS
_AMBIENT = re.compile(r"ambient|inlet|intake", re.IGNORECASE)
_COLDEST_C, _HOTTEST_C = -40.0, 80.0  # of a room; a sensor that is not connected often shows 127 or -128


@dataclass(frozen=True)
class GpuFacts:
    index: int  # NVML's order (PCI bus), which may differ from CUDA's
    uuid: str  # `GPU-…`, the one name that NVML, CUDA and containers agree on
    name: str
    memory_b: int | None  # total device memory; None where it shares that of the machine (unified memory)
    compute_capability: tuple[int, int] | None  # (major, minor)
    is_default: bool = True  # else it is used only where it is named


@dataclass(frozen=True)
class MachineFacts:
    governor: str | None = None  # of the clock frequency; several if CPUs differ
    turbo: bool | None = None  # whether CPUs may exceed their base clock
    smt: bool | None = None  # whether two threads share a core
    numa_nodes: int | None = None
    load_1min: float | None = None  # mean number of threads that ran or were ready, before the engine was loaded
    ambient_temp_c: float | None = None


@dataclass(frozen=True)
class GpuSettings:
    power_limit_default_w: float | None = None
    sm_clock_max_hz: float | None = None
    sm_clock_app_hz: float | None = None  # the application clock that is set, or the default one
    ecc_mode: bool | None = None
    pcie_gen: int | None = None  # the best that GPU and slot have in common; at rest the link may be slower
    pcie_width: int | None = None  # lanes in use
    pcie_width_max: int | None = None  # lanes that GPU and slot have in common
    nvlinks: int | None = None  # links that are up
    numa_node: int | None = None  # of the CPUs next to it
    power_limit_set_w: float | None = None  # the one in force may be lower or, with Dynamic Boost, higher


def is_name_of(name: str, uuid: str) -> bool:
    """Whether it is the UUID, which may be shortened as for CUDA, or the PCI address of a GPU that has no UUID."""
    return uuid.lower() == name.lower() or (name.upper().startswith("GPU-") and uuid.lower().startswith(name.lower()))


def visible_gpus(present: Sequence[GpuFacts], environ: Mapping[str, str]) -> tuple[GpuFacts, ...]:
    """The GPUs as an engine counts them from 0: those of CUDA_VISIBLE_DEVICES in its order, all of them without it."""
    # NVML ignores that variable. As in CUDA, an entry that names no GPU hides itself and all after it. CUDA's own order
    # is that of NVML under CUDA_DEVICE_ORDER=PCI_BUS_ID, which lem sets for its engines.
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
    if names is None:
        return tuple(gpu for gpu in visible[:1] if gpu.is_default)
    return tuple(
        gpu
        for number, gpu in enumerate(visible)
        if any(name == str(number) or is_name_of(name, gpu.uuid) for name in names)
    )


def read_machine(proc: Path, sys: Path) -> MachineFacts:
    cpu, load = sys / "devices/system/cpu", _text(proc / "loadavg").split()
    no_turbo, boost = _text(cpu / "intel_pstate/no_turbo"), _text(cpu / "cpufreq/boost")
    turbo = {"0": True, "1": False}.get(no_turbo) if no_turbo else {"1": True, "0": False}.get(boost)
    governors = {_text(path) for path in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    return MachineFacts(
        governor=", ".join(sorted(governors)) or None,
        turbo=turbo,
        smt={"1": True, "0": False}.get(_text(cpu / "smt/active")),
        numa_nodes=len([*(sys / "devices/system/node").glob("node[0-9]*")]) or None,
        load_1min=_number(load[0]) if load else None,
        ambient_temp_c=next(_ambient_temps_c(sys), None),
    )


def _ambient_temps_c(sys: Path) -> Iterator[float]:
    labels = sorted((sys / "class/hwmon").glob("hwmon*/temp*_label"))
    sensors = [(path, path.with_name(path.name.replace("_label", "_input"))) for path in labels]
    zones = sorted((sys / "class/thermal").glob("thermal_zone*/type"))
    sensors += [(path, path.with_name("temp")) for path in zones]
    for label, value in sensors:
        milli_c = _number(_text(value)) if _AMBIENT.search(_text(label)) else None
        if milli_c is not None and _COLDEST_C <= milli_c / 1000 <= _HOTTEST_C:
            yield milli_c / 1000


def read_gpu_settings(nvml: Any, uuid: str, sys: Path) -> GpuSettings:
    def ask(function: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):  # an older pynvml has fewer functions
            return getattr(nvml, function)(*arguments)
        return None

    handle = ask("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return GpuSettings()
    ecc, limit_mw = ask("nvmlDeviceGetEccMode", handle), ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
    set_mw = ask("nvmlDeviceGetPowerManagementLimit", handle)
    links = [ask("nvmlDeviceGetNvLinkState", handle, link) for link in range(_MOST_LINKS)]
    return GpuSettings(
        power_limit_default_w=limit_mw / 1e3 if limit_mw else None,
        power_limit_set_w=set_mw / 1e3 if set_mw else None,
        sm_clock_max_hz=_hz(ask("nvmlDeviceGetMaxClockInfo", handle, _SM)),
        sm_clock_app_hz=_hz(ask("nvmlDeviceGetApplicationsClock", handle, _SM)),
        ecc_mode=None if ecc is None else bool(ecc[0]),
        pcie_gen=ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
        nvlinks=None if all(link is None for link in links) else sum(bool(link) for link in links),
        numa_node=_numa_node(lambda: ask("nvmlDeviceGetPciInfo", handle), sys),
    )


def _numa_node(find_pci: Callable[[], Any], sys: Path) -> int | None:
    bus_id = getattr(find_pci(), "busId", None)
    text = bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id or "")
    # NVML writes the domain in eight digits, the kernel in four.
    node = _text(sys / "bus/pci/devices" / text.lower()[-len("0000:00:00.0") :] / "numa_node")
    return int(node) if node.isdecimal() else None


MOST_LAG_S = 0.5  # of a counter; 50 to 100 ms were seen


def keep_lag(uuid: str, driver: str, lag_s: float, environ: Mapping[str, str] = os.environ) -> None:
    path = _kept_path(uuid, environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, {"uuid": uuid, "driver": driver, "counter_lag_s": lag_s})


def kept_lag_s(uuid: str, driver: str, environ: Mapping[str, str] = os.environ) -> float | None:
    try:
        kept = durable.read_json(_kept_path(uuid, environ))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or (kept.get("uuid"), kept.get("driver")) != (uuid, driver):
        return None
    lag_s = kept.get("counter_lag_s")
    return lag_s if isinstance(lag_s, float) and 0 <= lag_s < MOST_LAG_S else None


def _kept_path(uuid: str, environ: Mapping[str, str]) -> Path:
    return cache_folder(environ) / "counters" / f"{re.sub('[^A-Za-z0-9._-]', '_', uuid)}.json"


def _hz(mhz: int | None) -> float | None:
    return mhz * 1e6 if mhz else None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None
