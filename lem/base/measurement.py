"""Facts of the measurement: energy sources, clock events, limits (explained in docs/measurement.md), marks."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class EnergySource(str, enum.Enum):
    """Where an energy comes from: `energy.energy_source` of a record.

    Records of another version may name other sources, so the predicates below take any text.
    """

    COUNTER = "nvml_counter"
    INSTANT_POWER = "power_instant_integral"
    AVERAGE_POWER = "power_average_integral"
    RAPL = "rapl"
    TDP_ESTIMATE = "tdp_estimate"
    EXTERNAL = "external_csv"

    def __str__(self) -> str:  # the same text in every Python, also in an f-string
        return self.value


class EnergyScope(str, enum.Enum):
    """What a meter covers: `energy.energy_scope` of a record."""

    GPU = "gpu"
    MODULE = "module"  # GPU and CPU together (Grace Hopper)
    CPU_PACKAGE = "cpu_package"
    MACHINE = "machine"

    def __str__(self) -> str:
        return self.value


def is_estimate(source: str | None) -> bool:
    """Whether the energy is an estimate, which is labelled wherever it is shown, and not measured."""
    return source == EnergySource.TDP_ESTIMATE


def is_integrated_power(source: str | None) -> bool:
    return source in (EnergySource.INSTANT_POWER, EnergySource.AVERAGE_POWER)


def is_gpu_source(source: str | None) -> bool:
    return source == EnergySource.COUNTER or is_integrated_power(source)


def is_cpu_source(source: str | None) -> bool:
    return source in (EnergySource.RAPL, EnergySource.TDP_ESTIMATE)


# The fields of `lem.record.Energy` that add up to the energy that counts, by the meter it comes from.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    EnergySource.COUNTER: ("gpu_energy_j",),
    EnergySource.INSTANT_POWER: ("gpu_energy_j",),
    EnergySource.AVERAGE_POWER: ("gpu_energy_j",),
    EnergySource.RAPL: ("cpu_package_energy_j", "dram_energy_j"),
    EnergySource.TDP_ESTIMATE: ("cpu_package_energy_j",),
    EnergySource.EXTERNAL: ("external_energy_j",),
}


def parts_of_source(source: str) -> tuple[str, ...]:
    """The fields of `Energy` that add up to the energy that counts; not every machine can read `dram_energy_j`."""
    return _PARTS.get(source, ())


# Bits of nvmlClocksEventReasons (NVML reference). The power cap is normal under load; a window with one of the others
# is invalid.
POWER_CAP_BIT: Final = 0x4
CLOCKS_SET_BIT: Final = 0x2  # nvmlClocksEventReasonApplicationsClocksSetting: application or locked clocks
SLOWDOWN_BITS: Final = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
SLOWDOWN_MASK: Final = 0x8 | 0x20 | 0x40 | 0x80
THERMAL_BITS: Final = 0x20 | 0x40

# Limits, as ratios unless the name has a unit.
CROSSCHECK_TOLERANCE: Final = 0.05  # integrated power against the counter
CROSSCHECK_FAILED: Final = 0.25  # the same: one of the two is wrong
REST_TOLERANCE: Final = 0.05  # power at rest before against after the window, and from cycle to cycle
NET_SHIFT_TOLERANCE: Final = 0.05  # what power at rest moved, times the window, of the net energy
NET_SHIFT_MOST: Final = 0.25  # the same: the net energy says nothing
STEADY_TOLERANCE: Final = 0.02  # one half of a window against the other, in power or throughput
MAX_FAILED_RATIO: Final = 0.01  # more failed requests make a window invalid
SHORT_WINDOW_S: Final = 10.0  # a naive difference over a counter period of 0.1 s is then off by less than 1 %
INTERFERENCE_FROM: Final = (
    0.05  # from this share on, time that the engine waited, or others computed, is worth a warning
)
WINDOW_UPDATES: Final = 100  # with fewer readings of the meter in a window, its edges matter

# Causes of uncertainty in a budget that are not the same in every cycle, or cancel out between results of one card.
EDGES: Final = "edges"
SENSOR: Final = "sensor"

# The marks of a sample log.
IDLE_BARE: Final = "idle_bare"
LOAD: Final = "load"
IDLE_LOADED: Final = "idle_loaded"
WARMUP: Final = "warmup"
GUARD_BEFORE: Final = "guard_before"
WINDOW: Final = "window"
GUARD_AFTER: Final = "guard_after"
# A second window with prefill alone, for energy by phases.
PREFILL_GUARD_BEFORE: Final = "prefill_guard_before"
PREFILL: Final = "prefill"
PREFILL_GUARD_AFTER: Final = "prefill_guard_after"
IDLE_POST: Final = "idle_post"
