"""From numbers to places on a drawing, and the ticks between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Scale", "fitting_scale", "tick_text"]

# Values that differ by more than this factor are drawn on a logarithmic scale.
_LOG_FROM = 8.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A scale from `low` at `begin` to `high` at `end`.

    Attributes:
        low, high: of the values; low < high, and low > 0 where it is logarithmic.
        begin, end: places on the drawing, in either order.
        is_log: logarithmic.
    """

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; one that is outside stays at the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, count: int = 6) -> tuple[float, ...]:
        """About `count` round values on the scale."""
        if self.is_log:
            found = _log_ticks(self.low, self.high, count)
            if len(found) > 1:
                return found
        return _linear_ticks(self.low, self.high, count)


def fitting_scale(values: Iterable[float], begin: float, end: float, *, is_from_zero: bool = False) -> Scale:
    """A scale that holds all values with a little room beside them; logarithmic where they differ by much.

    Args:
        values: at least one, all finite.
        begin, end: places on the drawing.
        is_from_zero: the scale begins at 0, and is never logarithmic.
    """
    known = list(values)
    low, high = min(known), max(known)
    if not is_from_zero and low > 0 and high / low > _LOG_FROM:
        room = (high / low) ** 0.05
        return Scale(low / room, high * room, begin, end, is_log=True)
    span = high - (0.0 if is_from_zero else low)
    room = 0.06 * span or 0.05 * abs(high) or 1.0
    return Scale(min(low, 0.0) if is_from_zero else low - room, high + room, begin, end)


def tick_text(value: float) -> str:
    """The value of a tick: round by its making, so a few digits hold all of it."""
    text = f"{value:.6g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def _linear_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    rough = (high - low) / max(count, 1)
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in _STEPS if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: tuple[float, ...] = ()
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = tuple(
            value for decade in decades for factor in factors if low <= (value := factor * 10.0**decade) <= high
        )
        if len(found) <= count + 2:
            return found
    return found[:: math.ceil(len(found) / count)]
