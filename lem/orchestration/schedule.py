"""When a campaign starts, and the request to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, time, timedelta, timezone, tzinfo
from types import FrameType

from lem.base import units
from lem.base.errors import Interrupted
from lem.config.campaign_config import CampaignDaemonConfig

ANY_DAY = range(7)

DAEMON_WINS = "Both daemon and schedule are set: daemon decides when to start, schedule is not used"


def next_start(now: datetime, at: str, weekdays: Collection[int] = ANY_DAY, *, zone: tzinfo | None = None) -> datetime:
    """The first moment (UTC), from `now` on, that is `at` o'clock local time on one of the days.

    A time that the clock leaves out when summer time begins is as many hours after midnight as on another day: 02:30
    is then 03:30. A time that comes twice when it ends is the first of the two.

    Args:
        now: an aware time.
        at: `HH:MM`.
        weekdays: as `datetime.weekday()` counts, 0 for Monday.
        zone: the host's own zone when None.

    Raises:
        ValueError: `at` is not a time of day, or no day is named.
    """
    clock = time.fromisoformat(at)
    today = now.astimezone(zone).date()
    # A week and a day: today's time may be over, and today be the only day allowed.
    for ahead in range(8):
        date = today + timedelta(days=ahead)
        # PEP 495: a local time that does not exist is read with the offset before the change, and of two the first
        # is taken. timestamp() keeps to that for a naive time, the host's own, too; astimezone() does not
        # (seen on CPython 3.11: 02:30 became 01:30).
        start = datetime.fromtimestamp(datetime.combine(date, clock, tzinfo=zone).timestamp(), timezone.utc)
        if date.weekday() in weekdays and start >= now:
            return start
    raise ValueError("a schedule needs a day")


def waiting_text(start: datetime, now: datetime, *, is_daemon: bool, zone: tzinfo | None = None) -> str:
    """What to say while waiting: `Daemon: waiting until HH:MM to start campaign`, with the day when it is not today."""
    local, today = start.astimezone(zone), now.astimezone(zone).date()
    day = "" if local.date() == today else f" ({local:%a %Y-%m-%d})"
    return f"{'Daemon' if is_daemon else 'Schedule'}: waiting until {local:%H:%M} to start campaign{day}"


@dataclass(frozen=True)
class Run:
    """Run the campaign now."""


@dataclass(frozen=True)
class Wait:
    """Wait until then (monotonic seconds), and ask again."""

    until_s: float
    text: str


@dataclass(frozen=True)
class Stop:
    """End with exit code 0."""

    text: str


def next_daemon_step(
    daemon: CampaignDaemonConfig,
    *,
    now_s: float,
    runs_done: int = 0,
    first_start_s: float | None = None,
    last_end_s: float | None = None,
) -> Run | Wait | Stop:
    """What a daemon does now, after the wait for `at`.

    Neither interval nor duration: it runs once. A duration alone: one run after the other. An interval that would
    end after the duration is cut short by it: nothing starts after it, and the daemon ends when it said it would.

    Args:
        now_s, first_start_s, last_end_s: seconds on one clock that never goes back; the latter two None before the
            first run has started or ended.
        runs_done: whole runs of the campaign so far; the cycles of the text.
    """
    if first_start_s is None or last_end_s is None:
        return Run()
    deadline_s = daemon_deadline_s(daemon, first_start_s)
    if deadline_s is not None and now_s >= deadline_s:
        return Stop(f"Daemon: total duration {daemon.total_duration} reached, stopping after {runs_done} cycles")
    if daemon.interval_seconds is None:
        return Stop("Daemon: campaign done") if deadline_s is None else Run()
    due_s = last_end_s + daemon.interval_seconds
    if now_s >= due_s:
        return Run()
    text = f"Daemon: next run of the campaign in {units.format_duration(due_s - now_s)}"
    if deadline_s is not None and deadline_s <= due_s:
        text = f"Daemon: no further run, total duration ends in {units.format_duration(deadline_s - now_s)}"
        return Wait(deadline_s, text)
    return Wait(due_s, text)


def daemon_deadline_s(daemon: CampaignDaemonConfig, first_start_s: float) -> float | None:
    """When the daemon ends, on the clock of `first_start_s`; the experiment then running finishes. None: never."""
    seconds = daemon.total_duration_seconds
    return None if seconds is None else first_start_s + seconds


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A flag that signals set and that waits can be woken by.

    The first SIGINT or SIGTERM sets it: the campaign stops the running experiment, writes everything and says how to
    go on. A second one raises `Interrupted` where the program stands, and what is running is killed on the way out.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def fileno(self) -> int:
        """A descriptor that becomes readable when a stop is asked for, and stays so."""
        return self._reader

    def wait(self, seconds: float) -> bool:
        """Sleep, but not past a request to stop; whether there is one."""
        if seconds > 0 and not self.is_set():
            select.select([self._reader], [], [], seconds)
        return self.is_set()

    def request(self, signum: int) -> None:
        """Ask for a stop as the signal would.

        Raises:
            Interrupted: it was asked for before.
        """
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        os.write(self._writer, b"!")

    @contextlib.contextmanager
    def installed(self, acknowledge: Callable[[], None] | None = None) -> Iterator[StopRequest]:
        """Answer SIGINT and SIGTERM within the block; to be entered on the main thread.

        Args:
            acknowledge: called at the first signal, wherever the program stands; it must not touch buffered streams.
        """

        def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler gets both
            self.request(signum)
            if acknowledge is not None:
                acknowledge()

        before = {item: signal.signal(item, handle) for item in _SIGNALS}
        try:
            yield self
        finally:
            for item, handler in before.items():
                signal.signal(item, handler)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._reader)
        os.close(self._writer)
