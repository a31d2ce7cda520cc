"""What the meters of a GPU of the double publish about its power; sensors.c says the same, to the last millijoule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tests.doubles.nvml.power import PowerSignal

_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True)
class Ticks:
    """Times about a period apart, each off by up to half of the jitter, which is at most the period."""

    period_s: float
    jitter_s: float = 0.0
    phase_s: float = 0.0
    seed: int = 0

    def time_s(self, number: int) -> float:
        return self.phase_s + number * self.period_s + self.jitter_s * (_uniform(self.seed, number) - 0.5)

    def last(self, at_s: float) -> int:
        """The number of the last one until then."""
        number = math.floor((at_s - self.phase_s + self.jitter_s / 2) / self.period_s)
        while self.time_s(number) > at_s:
            number -= 1
        return number

    def between(self, from_s: float, to_s: float) -> Iterator[float]:
        """The times after the one and until the other."""
        return (self.time_s(number) for number in range(self.last(from_s) + 1, self.last(to_s) + 1))


@dataclass(frozen=True)
class Counter:
    period_s: float = 0.1  # when it is brought up to date; see `Ticks`
    jitter_s: float = 0.0
    phase_s: float = 0.0
    lag_s: float = 0.0  # how far behind it is then
    resolution_mj: int = 1  # it is a multiple of that, rounded down
    offset_mj: int = 1_000_000_000  # its value at time 0, from all the time before
    gain: float = 1.0  # 1.03 counts 3 % too much
    seed: int = 0
    resets_s: tuple[float, ...] = ()  # when the driver was reloaded and it began at 0

    @property
    def ticks(self) -> Ticks:
        return Ticks(self.period_s, self.jitter_s, self.phase_s, self.seed)

    def read_mj(self, signal: PowerSignal, at_s: float) -> int:
        tick_s = self.ticks.time_s(self.ticks.last(at_s)) - self.lag_s
        past = [reset_s for reset_s in self.resets_s if reset_s <= at_s]
        if past:
            begun_s, begun_mj = max(past), 0
        else:
            begun_s, begun_mj = 0.0, self.offset_mj
        if past and tick_s < begun_s:
            return 0
        energy_mj = begun_mj + 1000.0 * self.gain * signal.energy_j(begun_s, tick_s)
        return max(math.floor(energy_mj / self.resolution_mj) * self.resolution_mj, 0)

    def line(self) -> str:
        """It as a line of a script, its resets aside."""
        return (
            f"counter period {self.period_s!r} jitter {self.jitter_s!r} phase {self.phase_s!r} lag {self.lag_s!r}"
            f" resolution {self.resolution_mj} offset {self.offset_mj} gain {self.gain!r} seed {self.seed}"
        )


@dataclass(frozen=True)
class Sensor:
    """A power sensor: at every tick the mean over a window that ended `lag_s` before, held until the next."""

    # 0.025 of a period of 0.1 on A100 and H100 (Yang et al., SC24), 1 for `nvmlDeviceGetPowerUsage`.
    window_s: float = 0.025
    period_s: float = 0.1  # see `Ticks`
    jitter_s: float = 0.0
    phase_s: float = 0.0
    lag_s: float = 0.0
    quantum_w: float = 0.001  # it is a multiple of that, rounded; NVML itself tells milliwatts
    noise_w: float = 0.0  # off by up to that, otherwise at every tick
    gain: float = 1.0
    seed: int = 0

    @property
    def ticks(self) -> Ticks:
        return Ticks(self.period_s, self.jitter_s, self.phase_s, self.seed)

    def read_mw(self, signal: PowerSignal, at_s: float) -> int:
        number = self.ticks.last(at_s)
        end_s = self.ticks.time_s(number) - self.lag_s
        mean_w = signal.energy_j(end_s - self.window_s, end_s) / self.window_s
        noise_w = self.noise_w * (2.0 * _uniform(self.seed + 1, number) - 1.0)
        power_w = math.floor((self.gain * mean_w + noise_w) / self.quantum_w + 0.5) * self.quantum_w
        return max(math.floor(power_w * 1000.0 + 0.5), 0)

    def line(self, word: str) -> str:
        """It as a line of a script; the word is `instant` or `average`."""
        return (
            f"{word} window {self.window_s!r} period {self.period_s!r} jitter {self.jitter_s!r} phase {self.phase_s!r}"
            f" lag {self.lag_s!r} quantum {self.quantum_w!r} noise {self.noise_w!r} gain {self.gain!r} seed {self.seed}"
        )


def _uniform(seed: int, number: int) -> float:
    """A number from 0 to 1 that follows from the two: the mixing function of splitmix64 (Steele et al., 2014)."""
    mixed = (seed * 0xD1B54A32D192ED03 + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _WORD
    return ((mixed ^ mixed >> 31) >> 11) * 2.0**-53
