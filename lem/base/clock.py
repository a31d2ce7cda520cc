"""Time as an argument, so that tests can control it to the nanosecond; and the texts of UTC times."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from lem.base.dataclass import dataclass
from lem.base.units import NS_PER_MS, NS_PER_S, format_duration

_READINGS = 3
_FRACTION = re.compile(r"\.(\d+)")


class Clock:
    """The clock of this machine; a test passes one of its own."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds, for durations; engines stamp their tokens with it."""
        return time.monotonic_ns()

    def asleep_s(self) -> float:
        readings = []
        for _ in range(_READINGS):
            before_ns, boot_ns = time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            after_ns = time.monotonic_ns()
            readings.append((after_ns - before_ns, boot_ns - (before_ns + after_ns) // 2))
        return max(0, min(readings)[1] // NS_PER_MS) / 1000  # by the quickest, in which nothing else ran

    def utc_now(self) -> datetime:
        return utc_now()

    def sleep(self, duration_s: float) -> None:
        time.sleep(max(0.0, duration_s))


# Reading two clocks one after the other differs by less, also on a busy machine; slewing moves both clocks.
_LEAST_STEP_S = 1.0


@dataclass
class StepWatch:
    """Notices that the time of day was set, which moves it against the monotonic clock, as a suspend does."""

    now: Callable[[], datetime]
    monotonic: Callable[[], float]  # in seconds

    def __post_init__(self) -> None:
        self._ahead_s = self._measure()

    def describe_step(self) -> str:
        before_s, self._ahead_s = self._ahead_s, self._measure()
        step_s = self._ahead_s - before_s
        if abs(step_s) < _LEAST_STEP_S:
            return ""
        by = format_duration(abs(step_s))
        ahead = f"the clock moved ahead by {by}: it was set, or the machine was suspended"
        return f"{ahead if step_s > 0 else f'the clock was set back by {by}'}; durations are not affected"

    def _measure(self) -> float:
        return self.now().timestamp() - self.monotonic()


def seconds_between(start_ns: int, end_ns: int) -> float:
    return (end_ns - start_ns) / NS_PER_S


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


def utc_text(moment: datetime, timespec: str = "microseconds") -> str:
    """`2026-07-14T10:00:00.000000Z`: texts of one `timespec` sort in the order of time."""
    return moment.astimezone(timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def utc_stamp(moment: datetime) -> str:
    """`20260714T100000Z`, for names; stamps sort in the order of time."""
    return f"{moment.astimezone(timezone.utc):%Y%m%dT%H%M%SZ}"


def parse_time(text: str) -> datetime | None:
    """The moment of an ISO 8601 text, without a zone if the text has none; None for any other text."""
    # Before Python 3.11 fromisoformat() accepts no Z, and only fractions of three or six digits.
    text = _FRACTION.sub(lambda found: f".{found[1][:6]:0<6}", text.strip())
    try:
        return datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in ("Z", "z") else text)
    except ValueError:
        return None


_RUN_ID = r"([0-9]{4})([0-9]{2})([0-9]{2})T([0-9]{2})([0-9]{2})([0-9]{2})Z-[0-9a-f]{4}"
# Clocks of several hosts agree to a second or so.
_CLOCK_TOLERANCE = timedelta(minutes=5)


def run_time(run_id: str) -> datetime | None:
    """When the run with this ID began; None for another name."""
    match = re.fullmatch(_RUN_ID, run_id)
    if match is None:
        return None
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)
    except ValueError:
        return None


def describe_future(run_id: str, now: datetime) -> str:
    began = run_time(run_id)
    if began is None or began <= now + _CLOCK_TOLERANCE:
        return ""
    return f"run {run_id} is dated in the future: the clock was wrong when it began, or is wrong now"
