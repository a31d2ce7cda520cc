"""Facts of the measurement: energy sources, clock events, limits (explained in docs/measurement.md), marks.

And what a measurement gives: a value, or the reason why there is none.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, Generic, TypeVar

from lem.base.dataclass import dataclass, field, fields, replace
from lem.base.reasons import Reason


class EnergySource(str, enum.Enum):
    """Where an energy comes from: `energy.energy_source` of a record."""

    # Records of another version may name other sources, so the predicates below take any text.

    COUNTER = "nvml_counter"
    INSTANT_POWER = "power_instant_integral"
    AVERAGE_POWER = "power_average_integral"
    RAPL = "rapl"
    TDP_ESTIMATE = "tdp_estimate"
    EXTERNAL = "external_csv"
    HWMON_COUNTER = "hwmon_counter"
    HWMON_POWER = "hwmon_power_integral"
    HWMON_SENSOR = "hwmon_sensor"  # of a module, of CPUs or of the machine, by its power

    def __str__(self) -> str:  # the same text in every Python, also in an f-string
        return self.value


class EnergyScope(str, enum.Enum):
    GPU = "gpu"
    CARD = "card"  # both chiplets of an MI250
    MODULE = "module"  # GPU and CPU together (Grace Hopper, Jetson, an APU)
    CPU_PACKAGE = "cpu_package"
    MACHINE = "machine"

    def __str__(self) -> str:
        return self.value


# What emissions and cost follow from, by the meter of the energy that counts.
ENERGY_COUNTED: Final[Mapping[str, str]] = {
    EnergyScope.GPU: "GPU energy only",
    EnergyScope.CARD: "energy of whole cards only",
    EnergyScope.MODULE: "energy of GPU and CPU modules only",
    EnergyScope.CPU_PACKAGE: "energy of CPU packages and DRAM only",
    EnergyScope.MACHINE: "energy by a meter of the whole machine",
}


def is_estimate(source: str | None) -> bool:
    return source == EnergySource.TDP_ESTIMATE


def is_counter(source: str | None) -> bool:
    """Whether it is the energy counter of a GPU."""
    return source in (EnergySource.COUNTER, EnergySource.HWMON_COUNTER)


def is_nvml_source(source: str | None) -> bool:
    return source in (EnergySource.COUNTER, EnergySource.INSTANT_POWER, EnergySource.AVERAGE_POWER)


def is_integrated_power(source: str | None) -> bool:
    integrals = (EnergySource.INSTANT_POWER, EnergySource.AVERAGE_POWER, EnergySource.HWMON_POWER)
    return source in (*integrals, EnergySource.HWMON_SENSOR)


def is_gpu_source(source: str | None) -> bool:
    return is_nvml_source(source) or source in (EnergySource.HWMON_COUNTER, EnergySource.HWMON_POWER)


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
    EnergySource.HWMON_COUNTER: ("gpu_energy_j",),
    EnergySource.HWMON_POWER: ("gpu_energy_j",),
    EnergySource.HWMON_SENSOR: ("sensor_energy_j",),
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
LIMIT_TOLERANCE_W: Final = 1.0  # of a power limit that was set: NVML has milliwatts, but boards may round
CROSSCHECK_TOLERANCE: Final = 0.05  # integrated power against the counter
CROSSCHECK_FAILED: Final = 0.25  # the same: one of the two is wrong
REST_TOLERANCE: Final = 0.05  # power at rest before against after the window, and from cycle to cycle
NET_SHIFT_TOLERANCE: Final = 0.05  # what power at rest moved, times the window, of the net energy
NET_SHIFT_MOST: Final = 0.25  # the same: the net energy says nothing
STEADY_TOLERANCE: Final = 0.02  # one half of a window against the other, in power or throughput
UNSTEADY_SIGMAS: Final = 3.2905  # the same under traffic: standard deviations of what chance gives, two-sided,
UNSTEADY_BY_CHANCE: Final = 0.001  # which this share of steady windows exceeds
MAX_FAILED_RATIO: Final = 0.01  # more failed requests make a window invalid
SHORT_WINDOW_S: Final = 10.0  # a naive difference over a counter period of 0.1 s is then off by less than 1 %
INTERFERENCE_FROM: Final = 0.05  # a larger share of time waited, or computed by other programs, is a warning
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

# Until version 2 of the schema, observations were counted.
_OBSERVATIONS_NEEDED: Final[Mapping[str, int]] = {"p90": 10, "p95": 20, "p99": 100}
# A percentile is None for fewer requests with different prompts: one or two of them would decide it, and a prompt that
# is repeated says little new.
PROMPTS_NEEDED: Final[Mapping[str, int]] = {"p90": 10, "p95": 100, "p99": 500}

_NO_REASON = Reason.of("no_reason")
_NOT_RECORDED = Reason.of("not_recorded")

_Value = TypeVar("_Value")
_Section = TypeVar("_Section", bound="Section")


@dataclass(frozen=True)
class Measured(Generic[_Value]):
    value: _Value | None
    null_reason: Reason | None = None
    source: str | None = None  # of an energy: the meter it comes from (`Energy.energy_source`)
    scope: str | None = None  # of an energy: what that meter covers

    @property
    def is_estimate(self) -> bool:
        return is_estimate(self.source)


def known(value: _Value | None, reason: Reason | str, /, **data: Any) -> Measured[_Value]:
    if value is not None:
        return Measured(value)
    return Measured(None, Reason.of(reason, **data) if isinstance(reason, str) else reason)


@dataclass(frozen=True)
class Section:
    null_reasons: Mapping[str, Reason] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls: type[_Section], **given: Any) -> _Section:
        found = {name: item if isinstance(item, Measured) else Measured(item) for name, item in given.items()}
        reasons = {name: item.null_reason for name, item in found.items() if item.null_reason is not None}
        return cls(**{name: item.value for name, item in found.items()}, null_reasons=reasons)

    @classmethod
    def absent(cls: type[_Section], reason: Reason) -> _Section:
        return cls(null_reasons={item.name: reason for item in fields(cls) if item.name != "null_reasons"})

    def having(self: _Section, **others: Measured[Any]) -> _Section:
        """The section with other values of these fields, or other reasons why they have none."""
        reasons = {name: why for name, why in self.null_reasons.items() if name not in others}
        reasons |= {name: item.null_reason for name, item in others.items() if item.null_reason is not None}
        return replace(self, **{name: item.value for name, item in others.items()}, null_reasons=reasons)

    def measured(self, name: str) -> Measured[Any]:
        return known(getattr(self, name), self.why_none(name))

    def why_none(self, name: str) -> Reason:
        return self.null_reasons.get(name, _NO_REASON)


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one latency in seconds; None for fewer prompts than `PROMPTS_NEEDED`."""

    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    n: int
    n_prompts: int | None = None  # different prompts behind the observations; None in records before version 3

    @property
    def null_reasons(self) -> Mapping[str, Reason]:
        needed, code, n = PROMPTS_NEEDED, "too_few_prompts", self.n_prompts
        if n is None:
            needed, code, n = _OBSERVATIONS_NEEDED, "too_few_observations", self.n
        absent = {it: Reason.of(code, needed=least, n=n) for it, least in needed.items() if getattr(self, it) is None}
        return absent | ({"n_prompts": _NOT_RECORDED} if self.n_prompts is None else {})
