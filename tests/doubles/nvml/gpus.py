"""A GPU of the double: what it draws, its meters, and the lines that tell the double's library so."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from tests.doubles.nvml.power import Level, PowerSignal, Ripple
from tests.doubles.nvml.sensors import Counter, Sensor

__all__ = ["AVERAGE", "NS_PER_S", "Events", "GpuProcess", "GpuTrace", "Load", "Thermal"]

NS_PER_S = 1_000_000_000

# nvmlDeviceGetPowerUsage on GA10x, Ada and Hopper.
AVERAGE = Sensor(window_s=1.0)


@dataclass(frozen=True)
class Load:
    """Power that follows an engine which writes lines `<monotonic ns> <how busy, 0 to 1>` to the end of a file."""

    path: str  # that file, as the metered process sees it; where it is missing the engine idles
    idle_w: float  # where power ends up at 0 and at 1, reached with `rise_tau_s` and `fall_tau_s`
    busy_w: float
    rise_tau_s: float = 0.0
    fall_tau_s: float = 0.0
    # (amplitude in W at 1, frequency in Hz, phase) while it is busy.
    ripples: tuple[tuple[float, float, float], ...] = ()
    events: int = 0  # clock-event bits while it is busy

    def lines(self) -> list[str]:
        """It as lines of a script."""
        first = f"load {self.path} {self.idle_w!r} {self.busy_w!r} {self.rise_tau_s!r} {self.fall_tau_s!r}"
        ripples = [" ".join(["load_ripple", *(repr(value) for value in ripple)]) for ripple in self.ripples]
        return [first, *ripples, *([f"load_events {self.events:#x}"] if self.events else [])]

    def levels(self, text: str, origin_ns: int) -> tuple[tuple[Level, ...], tuple[Ripple, ...]]:
        """What the log of the engine says about power."""
        levels, ripples = [Level(0.0, self.idle_w)], []
        for start_s, end_s, before, busy in _changes_of(text, origin_ns):
            if len(levels) == 1:
                levels = [Level(start_s, self.idle_w)]
            tau_s = self.rise_tau_s if busy > before else self.fall_tau_s
            levels.append(Level(start_s, self.idle_w + busy * (self.busy_w - self.idle_w), tau_s))
            ripples += [
                Ripple(start_s, end_s, busy * watts, hz, phase) for watts, hz, phase in self.ripples if busy > 0
            ]
        return tuple(levels), tuple(ripples)


def _changes_of(text: str, origin_ns: int) -> list[tuple[float, float, float, float]]:
    """(from, to, how busy before, how busy then) wherever the log of an engine tells another state than before."""
    changes, before = [], 0.0
    for ns, state in (line.split() for line in text.splitlines()):
        if float(state) != before:
            changes.append(((int(ns) - origin_ns) / NS_PER_S, before, float(state)))
            before = float(state)
    ends_s = [*(start_s for start_s, _, _ in changes[1:]), math.inf]
    return [(start_s, end_s, old, new) for (start_s, old, new), end_s in zip(changes, ends_s, strict=False)]


@dataclass(frozen=True)
class Thermal:
    """A temperature of first order: ambient, and so many degrees for every watt, reached with a time constant."""

    ambient_c: float = 28.0
    c_per_w: float = 0.08
    tau_s: float = 20.0

    def read_c(self, signal: PowerSignal, at_s: float) -> int:
        return math.floor(self.ambient_c + self.c_per_w * signal.smoothed_w(at_s, self.tau_s) + 0.5)


@dataclass(frozen=True)
class Events:
    """Bits of nvmlClocksEventReasons from one time to another."""

    from_s: float
    to_s: float
    mask: int


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on the GPU from one time to another."""

    pid: int
    memory_b: int = 0
    from_s: float = -math.inf
    to_s: float = math.inf


@dataclass(frozen=True)
class GpuTrace:
    uuid: str = ""
    name: str = "NVIDIA Double"
    signal: PowerSignal = field(default_factory=PowerSignal)  # what it draws; a `load` comes on top
    load: Load | None = None
    # Its meters: the energy counter, field 186, `nvmlDeviceGetPowerUsage`; None when NVML answers "Not Supported".
    counter: Counter | None = field(default_factory=Counter)
    instant: Sensor | None = field(default_factory=Sensor)
    average: Sensor | None = AVERAGE
    thermal: Thermal | None = None  # None for a constant `temp_c`
    temp_c: int = 40
    events: tuple[Events, ...] = ()
    # (since, value); without the latter it is 100 × how busy the load is.
    sm_clocks_mhz: tuple[tuple[float, int], ...] = ((0.0, 1980),)
    utilisation_percent: tuple[tuple[float, int], ...] = ()
    power_limit_w: float = 700.0
    persistence: bool = True
    mig: bool | None = False  # None when NVML answers "Not Supported"
    # `gpu`, or `module` where only energy and power of the module (fields 185, 186, 191 at scope 1) are told.
    scope: str = "gpu"
    vbios: str = "96.00.00.00.01"
    memory_total_b: int = 80_000_000_000
    memory_used_b: int = 2_000_000_000
    processes: tuple[GpuProcess, ...] = ()
    more: tuple[str, ...] = ()  # further lines of its script, such as `fail nvmlDeviceGetPowerUsage 4`

    def lines(self, index: int) -> list[str]:
        """It as lines of a script, beginning with `gpu`."""
        lines = [f"gpu {index}", f"name {self.name}", *([f"uuid {self.uuid}"] if self.uuid else [])]
        lines += [f"point {point.at_s!r} {point.power_w!r}" for point in self.signal.points]
        lines += [f"level {level.at_s!r} {level.target_w!r} {level.tau_s!r}" for level in self.signal.levels]
        lines += [" ".join(["ripple", *map(repr, dataclasses.astuple(ripple))]) for ripple in self.signal.ripples]
        lines += self.load.lines() if self.load else []
        lines += [self.counter.line() if self.counter else "counter none"]
        lines += [f"reset {reset_s!r}" for reset_s in self.counter.resets_s] if self.counter else []
        lines += [self.instant.line("instant") if self.instant else "instant none"]
        lines += [self.average.line("average") if self.average else "average none"]
        if self.thermal:
            lines.append(f"thermal {self.thermal.ambient_c!r} {self.thermal.c_per_w!r} {self.thermal.tau_s!r}")
        lines.append(f"temperature {self.temp_c}")
        lines += [f"events {item.from_s!r} {item.to_s!r} {item.mask:#x}" for item in self.events]
        lines += [f"sm_clock {since_s!r} {mhz}" for since_s, mhz in self.sm_clocks_mhz]
        lines += [f"utilisation {since_s!r} {percent}" for since_s, percent in self.utilisation_percent]
        lines += [f"power_limit {self.power_limit_w!r}"]
        lines += [f"persistence {int(self.persistence)}", f"mig {'none' if self.mig is None else int(self.mig)}"]
        lines += [f"scope {self.scope}", f"vbios {self.vbios}"]
        lines += [f"memory_total {self.memory_total_b}", f"memory_used {self.memory_used_b}"]
        lines += [f"process {held.pid} {held.memory_b} {held.from_s!r} {held.to_s!r}" for held in self.processes]
        return [*lines, *self.more]

    def after_load(self, text: str, origin_ns: int) -> GpuTrace:
        """The GPU that followed an engine which wrote that; itself without a load."""
        if self.load is None:
            return self
        if self.signal.levels:
            raise ValueError("a GPU has levels or a load, not both")
        levels, ripples = self.load.levels(text, origin_ns)
        starts = [level.at_s for level in levels]
        busy = [(level.target_w - self.load.idle_w) / (self.load.busy_w - self.load.idle_w) for level in levels]
        percents = tuple((at_s, math.floor(100 * share + 0.5)) for at_s, share in zip(starts, busy, strict=True))
        events = tuple(
            Events(from_s, to_s, self.load.events)
            for from_s, to_s, share in zip(starts, [*starts[1:], math.inf], busy, strict=True)
            if share > 0
        )
        return dataclasses.replace(
            self,
            signal=dataclasses.replace(self.signal, levels=levels, ripples=(*self.signal.ripples, *ripples)),
            load=None,
            utilisation_percent=self.utilisation_percent or percents,
            events=(*self.events, *events),
        )
