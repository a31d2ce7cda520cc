"""Time as an argument, so that tests can control it to the nanosecond; and the texts of UTC times."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone

from lem.base.units import NS_PER_S

_FRACTION = re.compile(r"\.(\d+)")


class Clock:
    """The clock of this machine; a test passes one of its own."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds, for durations; engines stamp their tokens with it."""
        return time.monotonic_ns()

    def utc_now(self) -> datetime:
        """The time of day, for labels only."""
        return utc_now()

    def sleep(self, duration_s: float) -> None:
        """Wait; not at all for a negative duration."""
        time.sleep(max(0.0, duration_s))


def seconds_between(start_ns: int, end_ns: int) -> float:
    """The seconds between two stamps in nanoseconds."""
    return (end_ns - start_ns) / NS_PER_S


def utc_now() -> datetime:
    """Now, in UTC."""
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
