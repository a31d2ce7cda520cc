"""When a campaign starts and when it stops: the time of day, the daemon, the request to stop, and how a run ended."""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta, timezone
from types import FrameType

from lem.base.errors import InfrastructureError, Interrupted, LemError
from lem.base.units import format_duration, plural, some_of
from lem.config.campaign_config import CampaignConfig, CampaignDaemonConfig
from lem.orchestration.manifest import CampaignManifest

ANY_DAY = range(7)
DAEMON_WINS = "Both daemon and schedule are set; schedule is ignored"

# The time of day may be set, or the machine sleep: check it again this often.
_CHECK_EVERY_S = 30.0

_SHOWN = 3  # results that a message names

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """A flag that signals set and that waits can be woken by.

    The first SIGINT, SIGTERM or SIGHUP sets it: the campaign stops the running experiment, writes everything and prints
    how to go on. A second one raises `Interrupted` wherever the program is, and what is running is killed on the way
    out.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def is_set(self) -> bool:
        return self.signum is not None

    def fileno(self) -> int:
        """A descriptor that becomes readable when a stop is requested, and stays so."""
        return self._reader

    def wait(self, seconds: float) -> bool:
        """Sleep, but not past a request to stop; whether there is one."""
        if seconds > 0 and not self.is_set():
            select.select([self._reader], [], [], seconds)
        return self.is_set()

    def request(self, signum: int) -> None:
        """Request a stop as the signal would; a second request is raised as Interrupted."""
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        os.write(self._writer, b"!")

    @contextlib.contextmanager
    def installed(self, acknowledge: Callable[[], None] | None = None) -> Iterator[StopRequest]:
        """Handle the signals within the block, SIGHUP unless nohup(1) had it ignored; call it on the main thread.

        The first one calls `acknowledge` wherever the program is, so that must not touch buffered streams.
        """

        def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler gets both
            self.request(signum)
            if acknowledge is not None:
                acknowledge()

        is_kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [item for item in _SIGNALS if item is not signal.SIGHUP or not is_kept]
        before = {item: signal.signal(item, handle) for item in handled}
        try:
            yield self
        finally:
            for item, handler in before.items():
                signal.signal(item, handler)

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class Stopped(enum.Enum):
    """Why a run ended early, or a daemon at its time."""

    SIGNAL = "signal"
    DEADLINE = "deadline"
    FAIL_FAST = "fail_fast"
    INFRASTRUCTURE = "infrastructure"
    DURATION = "duration"  # a daemon ran for its total duration, which is success


@dataclass(frozen=True)
class CampaignOutcome:
    manifest: CampaignManifest  # as it was last written
    stopped: Stopped | None = None  # None: every experiment had its turn
    error: LemError | None = None  # that stopped it
    signum: int | None = None  # of the signal that asked it to stop
    remark: str = ""  # what became of a top-up; empty without one

    def without(self, lost: Sequence[str]) -> CampaignOutcome:
        """The same run, whose manifest no longer has these results: they are missing, or were changed."""
        what = f"{plural(len(lost), 'result')} missing, or not as measured: {some_of(lost, _SHOWN)}"
        hint = "find out what removes or changes results; --resume measures these experiments again"
        stopped = Stopped.SIGNAL if self.stopped is Stopped.SIGNAL else Stopped.INFRASTRUCTURE
        return replace(self, stopped=stopped, error=InfrastructureError(what, hint))


# Runs the campaign once, given the deadline of the daemon on the monotonic clock.
RunOnce = Callable[["float | None"], CampaignOutcome]


def next_start(now: datetime, at: str, weekdays: Collection[int] = ANY_DAY) -> datetime:
    """The first moment (UTC), from `now` on, that is `at` o'clock in the host's time zone on one of the days.

    A time that the clock skips when summer time begins is as many hours after midnight as on another day: 02:30
    is then 03:30. Of a time that comes twice when it ends, the first counts.
    Weekdays count from 0 for Monday. A ValueError when `at` is not `HH:MM`.
    """
    clock = time.fromisoformat(at)
    today = now.astimezone().date()
    # A week and a day: today's time may be over, and today be the only day allowed.
    for ahead in range(8):
        date = today + timedelta(days=ahead)
        # PEP 495: a local time that does not exist is read with the offset before the change, and of two the first
        # is taken. timestamp() keeps to that; astimezone() does not (seen on CPython 3.11: 02:30 became 01:30).
        start = datetime.fromtimestamp(datetime.combine(date, clock).timestamp(), timezone.utc)
        if date.weekday() in weekdays and start >= now:
            return start
    raise ValueError("no weekday to start on")


def waiting_text(start: datetime, now: datetime, *, is_daemon: bool) -> str:
    """`Daemon: waiting until HH:MM to start campaign`, with the day when it is not today."""
    local, today = start.astimezone(), now.astimezone().date()
    day = "" if local.date() == today else f" ({local:%a %Y-%m-%d})"
    return f"{'Daemon' if is_daemon else 'Schedule'}: waiting until {local:%H:%M} to start campaign{day}"


@dataclass
class Scheduler:
    """Waits, and runs a campaign when it is time."""

    campaign: CampaignConfig
    stop: StopRequest
    show: Callable[[str], None]  # shows a line to a person
    now: Callable[[], datetime]  # the time of day, aware
    monotonic: Callable[[], float]  # in seconds

    @property
    def starts_later(self) -> bool:
        """Whether the first run waits for a time of day."""
        return self._first_at is not None

    def run(self, run_once: RunOnce) -> CampaignOutcome | None:
        """How the last run went; None when a signal came before the first. What `run_once` raises ends it."""
        daemon, schedule = self._daemon, self.campaign.schedule
        if daemon is not None and schedule is not None:
            self.show(DAEMON_WINS)
        if self._first_at is not None:
            weekdays = ANY_DAY if daemon is not None or schedule is None else schedule.weekdays
            self._wait_until(next_start(self.now(), self._first_at, weekdays))
        if self.stop.is_set():
            return None
        return run_once(None) if daemon is None else self._repeat(daemon, run_once)

    @property
    def _daemon(self) -> CampaignDaemonConfig | None:
        daemon = self.campaign.daemon
        return daemon if daemon is not None and daemon.enabled else None

    @property
    def _first_at(self) -> str | None:
        section = self._daemon or self.campaign.schedule
        return None if section is None else section.at

    def _wait_until(self, start: datetime) -> None:
        if start > self.now():
            self.show(waiting_text(start, self.now(), is_daemon=self._daemon is not None))
        while not self.stop.is_set() and (left_s := (start - self.now()).total_seconds()) > 0:
            self.stop.wait(min(left_s, _CHECK_EVERY_S))

    def _repeat(self, daemon: CampaignDaemonConfig, run_once: RunOnce) -> CampaignOutcome:
        """Run until the total duration is reached, a signal comes, or a run is stopped by anything else.

        Neither interval nor duration: it runs once. A duration alone: one run after the other. Nothing starts after
        the duration, and the daemon ends when it is over, not at the end of the interval.
        """
        duration_s, runs_done = daemon.total_duration_seconds, 0
        deadline_s = None if duration_s is None else self.monotonic() + duration_s
        while True:
            outcome = run_once(deadline_s)
            runs_done += outcome.stopped is None
            if outcome.stopped not in (None, Stopped.DEADLINE):
                return outcome  # what stopped this run would stop the next one: a person has to look
            self._wait_for_next(self.monotonic() + (daemon.interval_seconds or 0.0), deadline_s)
            if self.stop.is_set():
                return outcome
            if deadline_s is not None and self.monotonic() >= deadline_s:
                self.show(f"Daemon: total duration {daemon.total_duration} reached, stopping after {runs_done} cycles")
                return replace(outcome, stopped=Stopped.DURATION)
            if deadline_s is None and daemon.interval_seconds is None:
                self.show("Daemon: campaign done")
                return outcome

    def _wait_for_next(self, next_s: float, deadline_s: float | None) -> None:
        until_s = next_s if deadline_s is None else min(next_s, deadline_s)
        while not self.stop.is_set() and (left_s := until_s - self.monotonic()) > 0:
            text = "no further run; total duration ends" if until_s == deadline_s else "next run of the campaign"
            self.show(f"Daemon: {text} in {format_duration(left_s)}")
            self.stop.wait(left_s)
