"""When a campaign starts and when it stops: the time of day, the daemon, the request to stop, and how a run ended."""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import select
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, time, timedelta, timezone
from types import FrameType

from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import EngineError, InfrastructureError, Interrupted, LemError
from lem.base.units import format_duration, plural, some_of
from lem.config.campaign_config import CampaignConfig, CampaignDaemonConfig
from lem.orchestration.manifest import CampaignManifest
from lem.orchestration.plan import Experiment
from lem.orchestration.status import Event
from lem.worker import channel
from lem.worker.channel import LOAD_PHASE, Message

ANY_DAY = range(7)
DAEMON_WINS = "Both daemon and schedule are set; schedule is ignored"

# The time of day may be set, or the machine sleep: check it again this often.
_CHECK_EVERY_S = 30.0

_SHOWN = 3  # results that a message names

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """A flag that signals set and that waits can be woken by."""

    # The first SIGINT, SIGTERM or SIGHUP sets it: the campaign stops the running experiment, writes everything and
    # prints how to go on. A second one raises `Interrupted` wherever the program is, and what is running is killed on
    # the way out.

    def __init__(self) -> None:
        self.signum: int | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def is_set(self) -> bool:
        return self.signum is not None

    def fileno(self) -> int:
        return self._reader

    def wait(self, seconds: float) -> bool:
        if seconds > 0 and not self.is_set():
            select.select([self._reader], [], [], seconds)
        return self.is_set()

    def request(self, signum: int) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        os.write(self._writer, b"!")

    @contextlib.contextmanager
    def installed(self, acknowledge: Callable[[], None] | None = None) -> Iterator[StopRequest]:
        """Handle the signals within the block, SIGHUP unless nohup(1) had it ignored; call it on the main thread."""
        # The first one calls `acknowledge` wherever the program is, so that must not touch buffered streams.

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
    SIGNAL = "signal"
    DEADLINE = "deadline"
    FAIL_FAST = "fail_fast"
    ALL_FAILED = "all_failed"
    INFRASTRUCTURE = "infrastructure"
    DURATION = "duration"  # a daemon ran for its total duration, which is success


class AllFailed(InfrastructureError):
    """Every configuration has failed in the same way, so that more cycles would fail, too."""


@dataclass(frozen=True)
class CampaignOutcome:
    manifest: CampaignManifest  # as it was last written
    stopped: Stopped | None = None  # None: every experiment had its turn
    error: LemError | None = None  # that stopped it
    signum: int | None = None  # of the signal that asked it to stop
    remark: str = ""  # what became of a top-up; empty without one

    def without(self, lost: Sequence[str]) -> CampaignOutcome:
        what = f"{plural(len(lost), 'result')} missing, or not as measured: {some_of(lost, _SHOWN)}"
        hint = "find out what removes or changes results; --resume measures these experiments again"
        stopped = Stopped.SIGNAL if self.stopped is Stopped.SIGNAL else Stopped.INFRASTRUCTURE
        return replace(self, stopped=stopped, error=InfrastructureError(what, hint))


# Runs the campaign once, given the deadline of the daemon on the monotonic clock.
RunOnce = Callable[["float | None"], CampaignOutcome]


def next_start(now: datetime, at: str, weekdays: Collection[int] = ANY_DAY) -> datetime:
    """The first moment (UTC), from `now` on, that is `at` o'clock in the host's time zone on one of the days."""
    # A time that the clock skips when summer time begins is as many hours after midnight as on another day: 02:30 is
    # then 03:30. Of a time that comes twice when it ends, the first counts. Weekdays count from 0 for Monday. A
    # ValueError when `at` is not `HH:MM`.
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
    local, today = start.astimezone(), now.astimezone().date()
    day = "" if local.date() == today else f" ({local:%a %Y-%m-%d})"
    return f"{'Daemon' if is_daemon else 'Schedule'}: waiting until {local:%H:%M} to start campaign{day}"


@dataclass
class Scheduler:
    campaign: CampaignConfig
    stop: StopRequest
    show: Callable[[str], None]  # shows a line to a person
    now: Callable[[], datetime]  # the time of day, aware
    monotonic: Callable[[], float]  # in seconds

    @property
    def starts_later(self) -> bool:
        return self._first_at is not None

    def run(self, run_once: RunOnce) -> CampaignOutcome | None:
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
        """Run until the total duration is reached, a signal comes, or a run is stopped by anything else."""
        # Neither interval nor duration: it runs once. A duration alone: one run after the other. Nothing starts after
        # the duration, and the daemon ends when it is over, not at the end of the interval.
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


@dataclass
class _Mean:
    n: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.n, self.total = self.n + 1, self.total + value

    def __float__(self) -> float:
        return self.total / self.n if self.n else 0.0


@dataclass
class Countdown:
    """The time left of a run, by what took time in it so far; pure, the time is an argument."""

    # Gaps, loads and experiments are counted apart: the first experiment has no gap, and not every one loads, so a mean
    # over all of them would rise before it falls. An update between two experiments costs the same in a plan of
    # any length.

    _work: dict[str, _Mean] = field(default_factory=dict)  # of each configuration, without gaps and loads
    _measured: _Mean = field(default_factory=_Mean)  # of the experiments with a result
    _load: _Mean = field(default_factory=_Mean)
    _gap_share: _Mean = field(default_factory=_Mean)  # of the cap of each gap, how much of it was kept

    def __post_init__(self) -> None:
        self.begin((), (), ())

    def begin(self, experiments: Sequence[Experiment], caps_s: Sequence[float], loads: Sequence[bool]) -> None:
        self._order = [item.config_hash for item in experiments]
        # Sums from each place to the end.
        self._caps_s = [*itertools.accumulate(reversed(caps_s), initial=0.0)][::-1]
        self._loads = [*itertools.accumulate(reversed(loads), initial=0)][::-1]
        self._left = Counter(self._order)
        # The time expected of the experiments left of configurations that were measured, and how many others are left.
        self._known_s = sum(count * float(self._work[name]) for name, count in self._left.items() if name in self._work)
        self._n_unknown = sum(count for name, count in self._left.items() if name not in self._work)
        self._place, self._loading_s = 0, 0.0
        self._begun_s: float | None = None  # the current experiment, moved on by gaps within it
        self._load_begun_s: float | None = None
        self._gap: tuple[float, float] | None = None  # cap and begin of the current one

    def after(self, event: Event, now_s: float) -> float | None:
        if self._gap is not None and event.kind not in ("gap", "tick", "note"):
            kept_s = now_s - self._gap[1]
            self._gap_share.add(kept_s / self._gap[0])
            self._gap, self._begun_s = None, None if self._begun_s is None else self._begun_s + kept_s
        if event.kind == "gap":
            self._gap = (event.data["cap_s"], now_s)
        elif event.kind in ("experiment_started", "experiment_retried"):
            self._begun_s, self._load_begun_s, self._loading_s = now_s, None, 0.0
        elif event.kind == "phase":
            self._loading_s += 0.0 if self._load_begun_s is None else now_s - self._load_begun_s
            self._load_begun_s = now_s if event.data["phase"] == LOAD_PHASE else None
        elif event.kind in ("experiment_completed", "experiment_failed") and self._begun_s is not None:
            self._learn(now_s - self._begun_s, has_result=event.kind == "experiment_completed")
        return self._left_s(now_s)

    def _learn(self, elapsed_s: float, *, has_result: bool) -> None:
        name, work_s = self._order[self._place], elapsed_s - self._loading_s
        if self._loading_s:
            self._load.add(self._loading_s)
        if has_result:
            self._measured.add(work_s)
        left = self._left[name]
        if (mean := self._work.get(name)) is None:
            mean = self._work[name] = _Mean()
            self._n_unknown -= left
        else:
            self._known_s -= left * float(mean)
        mean.add(work_s)
        self._left[name] -= 1
        self._known_s += (left - 1) * float(mean)
        self._place, self._begun_s = self._place + 1, None

    def _left_s(self, now_s: float) -> float | None:
        if not self._measured.n or self._place == len(self._order):
            return 0.0 if self._measured.n else None
        share = float(self._gap_share) if self._gap_share.n else 1.0
        caps_s, later_caps_s = self._caps_s[self._place : self._place + 2]
        loads, later_loads = self._loads[self._place : self._place + 2]
        left_s = self._known_s + self._n_unknown * float(self._measured) + loads * float(self._load)
        left_s += share * (later_caps_s if self._gap or self._begun_s is not None else caps_s)
        if self._gap is not None:
            left_s += max(0.0, share * self._gap[0] - (now_s - self._gap[1]))
        elif self._begun_s is not None:
            work = self._work.get(self._order[self._place], self._measured)
            left_s -= min(now_s - self._begun_s, float(work) + (loads - later_loads) * float(self._load))
        return max(0.0, left_s)  # sums of rounded numbers may be just below


@dataclass(frozen=True)
class Timeouts:
    load_s: float = 1800.0  # for the load of the engine
    rest_s: float = 0.0  # on top of that for what comes before the load, in which power at rest is measured
    experiment_s: float = 3600.0  # for everything after the load
    silence_s: float = 600.0  # for the next phase or progress
    heartbeat_s: float = 120.0  # for any message; a live supervisor sends one every 5 s


class Watch:
    def __init__(self, timeouts: Timeouts, now: float) -> None:
        self._timeouts = timeouts
        self.phase: str | None = None
        self._is_loading = True
        self._phase_until = now + timeouts.load_s + timeouts.rest_s
        self._sign_until = now + timeouts.silence_s
        self._byte_until = now + timeouts.heartbeat_s

    def heard(self, message: Message, now: float) -> None:
        self._byte_until = now + self._timeouts.heartbeat_s
        if isinstance(message, (channel.Phase, channel.Progress)):
            self._sign_until = now + self._timeouts.silence_s
        if isinstance(message, channel.Phase):
            before, self.phase = self.phase, message.phase
            if self.phase == LOAD_PHASE != before:
                self._phase_until = now + self._timeouts.load_s
            elif self._is_loading and self.phase not in channel.LOADING_PHASES:
                self._is_loading = False
                self._phase_until = now + self._timeouts.experiment_s

    @property
    def next_deadline(self) -> float:
        return min(self._phase_until, self._sign_until, self._byte_until)

    def expired(self, now: float) -> EngineError | None:
        limits, where = self._timeouts, f"in phase {self.phase or 'start'}"
        if now >= self._phase_until:
            what, limit, key = "the experiment took", limits.experiment_s, "experiment_timeout_seconds"
            if self._is_loading:
                what, limit, key = "loading the engine took", limits.load_s, "load_timeout_seconds"
                limit += limits.rest_s if self.phase != LOAD_PHASE else 0.0
            message = f"{what} longer than {format_duration(limit)} ({where})"
            return EngineError(message, f"raise execution.{key} if it needs longer", kind="timeout")
        if now >= self._sign_until:
            message = f"the engine reported no progress for {format_duration(limits.silence_s)} ({where})"
            hint = "raise execution.silence_timeout_seconds if it needs longer; the end of the log shows where it was"
            return EngineError(message, hint, kind="silent")
        if now >= self._byte_until:
            silence = format_duration(limits.heartbeat_s)
            return EngineError(f"the worker sent no heartbeat for {silence} ({where})", kind="channel")
        return None
