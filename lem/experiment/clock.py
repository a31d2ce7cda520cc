"""Time as an argument, so that what depends on it can be tested to the nanosecond."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Protocol

from lem.units import NS_PER_S

__all__ = ["Clock", "SystemClock", "seconds_between"]


class Clock(Protocol):
    """The clock of one machine."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds, the clock every duration is taken from."""

    def utc_now(self) -> datetime:
        """The time of day with its zone, for labels only."""

    def sleep(self, duration_s: float) -> None:
        """Wait."""


class SystemClock:
    """The real clock."""

    def monotonic_ns(self) -> int:
        """`time.monotonic_ns`: CLOCK_MONOTONIC on Linux, the clock engines stamp their tokens with."""
        return time.monotonic_ns()

    def utc_now(self) -> datetime:
        """The time of day in UTC."""
        return datetime.now(timezone.utc)

    def sleep(self, duration_s: float) -> None:
        """Wait; a negative duration is none."""
        time.sleep(max(0.0, duration_s))


def seconds_between(start_ns: int, end_ns: int) -> float:
    """The seconds from one CLOCK_MONOTONIC stamp to a later one."""
    return (end_ns - start_ns) / NS_PER_S
