"""The power that a GPU of the double really draws, as sums whose integrals are exact; power.c does the same sums."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Point:
    """Power runs straight from one point to the next; two at one time are a step. Outside them it stays as it is."""

    at_s: float
    power_w: float


@dataclass(frozen=True)
class Level:
    """From `at_s` on power nears `target_w` with time constant `tau_s`; 0 is a step. The first holds before it, too."""

    at_s: float
    target_w: float
    tau_s: float = 0.0


@dataclass(frozen=True)
class Ripple:
    """A sine on top, from one time to another; its phase counts from time 0."""

    from_s: float
    to_s: float
    amplitude_w: float
    frequency_hz: float
    phase_rad: float = 0.0

    def power_w(self, at_s: float) -> float:
        is_on = self.from_s <= at_s < self.to_s
        return self.amplitude_w * math.sin(self._omega * at_s + self.phase_rad) if is_on else 0.0

    def energy_j(self, at_s: float) -> float:
        """The integral from time 0."""
        return self._integral(at_s) - self._at_zero_j

    @cached_property
    def _at_zero_j(self) -> float:
        return self._integral(0.0)

    @cached_property
    def _omega(self) -> float:
        return 2.0 * math.pi * self.frequency_hz

    def _integral(self, at_s: float) -> float:
        within_s = min(max(at_s, self.from_s), self.to_s)
        return -self.amplitude_w / self._omega * math.cos(self._omega * within_s + self.phase_rad)


@dataclass(frozen=True)
class PowerSignal:
    """The sum of a line through points, an approach to levels, and ripples. Times are seconds, before 0 too."""

    points: tuple[Point, ...] = ()
    levels: tuple[Level, ...] = ()
    ripples: tuple[Ripple, ...] = ()

    def power_w(self, at_s: float) -> float:
        return self._base(at_s)[0] + sum(ripple.power_w(at_s) for ripple in self.ripples)

    def energy_j(self, from_s: float, to_s: float) -> float:
        return self.energy_since_zero_j(to_s) - self.energy_since_zero_j(from_s)

    def energy_since_zero_j(self, at_s: float) -> float:
        """The energy from time 0 to that time; negative before."""
        ripple_j = sum(ripple.energy_j(at_s) for ripple in self.ripples)
        return self._base(at_s)[1] - self._at_zero_j + ripple_j

    def smoothed_w(self, at_s: float, tau_s: float) -> float:
        """The power as something slow of first order sees it, which does not see the ripples."""
        return _smooth_points(self.points, at_s, tau_s) + _smooth_levels(self.levels, at_s, tau_s)

    @cached_property
    def _at_zero_j(self) -> float:
        return self._base(0.0)[1]

    def _base(self, at_s: float) -> tuple[float, float]:
        """Power, and energy since some fixed time."""
        line_w, line_j = self._on_line(at_s)
        level_w, level_j = self._at_level(at_s)
        return line_w + level_w, line_j + level_j

    @cached_property
    def _line_starts(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Times of the points, and the energy since the first."""
        sums = [0.0]
        for before, after in zip(self.points, self.points[1:], strict=False):
            sums.append(sums[-1] + (before.power_w + after.power_w) / 2 * (after.at_s - before.at_s))
        return tuple(point.at_s for point in self.points), tuple(sums)

    def _on_line(self, at_s: float) -> tuple[float, float]:
        if not self.points:
            return 0.0, 0.0
        times, sums = self._line_starts
        place = bisect_right(times, at_s) - 1
        if place < 0 or place == len(times) - 1:
            place = max(place, 0)
            power_w = self.points[place].power_w
            return power_w, sums[place] + power_w * (at_s - times[place])
        start, end = self.points[place], self.points[place + 1]
        since_s = at_s - start.at_s
        slope = (end.power_w - start.power_w) / (end.at_s - start.at_s)
        return start.power_w + slope * since_s, sums[place] + since_s * (start.power_w + slope * since_s / 2)

    @cached_property
    def _level_starts(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Times of the levels, and power and energy at them."""
        powers, sums = [self.levels[0].target_w], [0.0]
        for before, after in zip(self.levels, self.levels[1:], strict=False):
            power_w, energy_j = _approach(before, powers[-1], after.at_s - before.at_s)
            powers.append(power_w)
            sums.append(sums[-1] + energy_j)
        return tuple(level.at_s for level in self.levels), tuple(powers), tuple(sums)

    def _at_level(self, at_s: float) -> tuple[float, float]:
        if not self.levels:
            return 0.0, 0.0
        times, powers, sums = self._level_starts
        place = bisect_right(times, at_s) - 1
        if place < 0:
            return powers[0], powers[0] * (at_s - times[0])
        power_w, energy_j = _approach(self.levels[place], powers[place], at_s - times[place])
        return power_w, sums[place] + energy_j


def _approach(level: Level, power_w: float, since_s: float) -> tuple[float, float]:
    """Power, and energy since the level began at that power."""
    decay = math.exp(-since_s / level.tau_s) if level.tau_s > 0 else 0.0
    excess_w = power_w - level.target_w
    return level.target_w + excess_w * decay, level.target_w * since_s + excess_w * level.tau_s * (1.0 - decay)


def _smooth_points(points: tuple[Point, ...], at_s: float, tau_s: float) -> float:
    if not points:
        return 0.0
    smoothed_w = points[0].power_w
    for place, start in enumerate(points):
        end = points[place + 1] if place + 1 < len(points) else Point(math.inf, start.power_w)
        since_s = min(at_s, end.at_s) - start.at_s
        if since_s <= 0:
            continue
        slope = (end.power_w - start.power_w) / (end.at_s - start.at_s)
        lagging_w = start.power_w - slope * tau_s
        smoothed_w = lagging_w + slope * since_s + (smoothed_w - lagging_w) * math.exp(-since_s / tau_s)
    return smoothed_w


def _smooth_levels(levels: tuple[Level, ...], at_s: float, tau_s: float) -> float:
    if not levels:
        return 0.0
    power_w = smoothed_w = levels[0].target_w
    for place, level in enumerate(levels):
        end_s = levels[place + 1].at_s if place + 1 < len(levels) else math.inf
        since_s = min(at_s, end_s) - level.at_s
        if since_s < 0:
            break
        # Equal time constants would need a formula of their own; a millionth apart, this one serves.
        own_tau_s = level.tau_s if abs(level.tau_s - tau_s) > 1e-6 * tau_s else tau_s * (1 + 1e-6)
        share_w = (power_w - level.target_w) * own_tau_s / (own_tau_s - tau_s)
        fading_w = share_w * math.exp(-since_s / own_tau_s) if own_tau_s > 0 else 0.0
        rest_w = smoothed_w - level.target_w - share_w
        smoothed_w = level.target_w + fading_w + rest_w * math.exp(-since_s / tau_s)
        power_w = _approach(level, power_w, since_s)[0]
    return smoothed_w
