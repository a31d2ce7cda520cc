"""When a campaign starts and stops: the time of day, the daemon, signals."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone, tzinfo

import pytest

from lem.base.errors import InfrastructureError, Interrupted, UserError
from lem.config.campaign_config import CampaignDaemonConfig, CampaignScheduleConfig
from lem.orchestration.manifest import CampaignManifest
from lem.orchestration.schedule import (
    DAEMON_WINS,
    CampaignOutcome,
    Scheduler,
    Stopped,
    StopRequest,
    next_start,
    waiting_text,
)
from tests.campaign_doubles import FakeClock, FakeStop, make_campaign


class CentralEurope(tzinfo):
    """UTC+1, and +2 from 2026-03-29 02:00 (02:00 → 03:00) to 2026-10-25 03:00 (03:00 → 02:00), as PEP 495 wants it."""

    _BEGIN = datetime.fromisoformat("2026-03-29T02:00")
    _END = datetime.fromisoformat("2026-10-25T03:00")

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1) + self.dst(moment)

    def dst(self, moment: datetime | None) -> timedelta:
        assert moment is not None
        naive = moment.replace(tzinfo=None, fold=0)
        hour = timedelta(hours=1)
        if self._BEGIN <= naive < self._BEGIN + hour:  # does not exist
            return hour * moment.fold
        if self._END - hour <= naive < self._END:  # comes twice
            return hour * (1 - moment.fold)
        return hour if self._BEGIN <= naive < self._END else timedelta(0)

    def tzname(self, moment: datetime | None) -> str:
        return "CEST" if self.dst(moment) else "CET"

    def fromutc(self, moment: datetime) -> datetime:
        naive = moment.replace(tzinfo=None)
        hour = timedelta(hours=1)
        begin, end = self._BEGIN - hour, self._END - 2 * hour
        is_summer = begin <= naive < end
        is_second = end <= naive < end + hour
        return (moment + hour * (2 if is_summer else 1)).replace(fold=int(is_second))


ZONE = CentralEurope()


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZONE)


@pytest.mark.parametrize(
    ("now", "at", "start"),
    [
        ("2026-07-14T10:00", "22:00", "2026-07-14T20:00"),
        ("2026-07-14T22:00", "22:00", "2026-07-14T20:00"),
        ("2026-07-14T22:00:01", "22:00", "2026-07-15T20:00"),
        ("2026-07-14T23:59", "00:00", "2026-07-14T22:00"),
        ("2026-12-31T23:30", "08:05", "2027-01-01T07:05"),
    ],
)
def test_the_next_time_of_day_is_today_or_tomorrow(now: str, at: str, start: str) -> None:
    expected = datetime.fromisoformat(start).replace(tzinfo=timezone.utc)
    assert next_start(local(now), at, zone=ZONE) == expected


@pytest.mark.parametrize(
    ("days", "date"),
    [
        (("tue",), "2026-07-14"),
        (("mon",), "2026-07-20"),
        (("weekends",), "2026-07-18"),
        (("weekdays",), "2026-07-14"),
        (("sun", "thu"), "2026-07-16"),
        (None, "2026-07-14"),
    ],
)
def test_the_next_day_allowed(days: tuple[str, ...] | None, date: str) -> None:
    schedule = CampaignScheduleConfig(at="22:00", days=days)
    tuesday = local("2026-07-14T10:00")
    assert schedule.at is not None
    assert next_start(tuesday, schedule.at, schedule.weekdays, zone=ZONE) == local(f"{date}T22:00")


def test_today_next_week_when_today_is_the_only_day_and_its_time_is_over() -> None:
    assert next_start(local("2026-07-14T22:01"), "22:00", {1}, zone=ZONE) == local("2026-07-21T22:00")


def test_the_day_is_that_of_the_zone_not_of_utc() -> None:
    # In UTC it is still Monday.
    now = datetime(2026, 7, 13, 22, 30, tzinfo=timezone.utc)
    assert next_start(now, "01:00", {1}, zone=ZONE) == local("2026-07-14T01:00")


def test_a_time_that_comes_twice_in_autumn_is_met_once() -> None:
    first = next_start(local("2026-10-25T00:00"), "02:30", zone=ZONE)
    assert first == datetime(2026, 10, 25, 0, 30, tzinfo=timezone.utc)
    again = next_start(first + timedelta(seconds=1), "02:30", zone=ZONE)
    assert again == local("2026-10-26T02:30")


def test_the_day_of_a_change_has_the_new_offset_by_evening() -> None:
    assert next_start(local("2026-03-29T00:00"), "22:00", zone=ZONE) == datetime(2026, 3, 29, 20, tzinfo=timezone.utc)
    assert next_start(local("2026-10-25T00:00"), "22:00", zone=ZONE) == datetime(2026, 10, 25, 21, tzinfo=timezone.utc)


@pytest.fixture
def host_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's own zone, for the time of a test, is Central Europe by the rule that needs no database of zones."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("host_zone")
@pytest.mark.parametrize(
    ("now", "at", "start"),
    [
        ("2026-07-14T10:00+02:00", "22:00", "2026-07-14T22:00+02:00"),
        ("2026-03-29T00:00+01:00", "02:30", "2026-03-29T03:30+02:00"),
        ("2026-10-25T00:00+02:00", "02:30", "2026-10-25T02:30+02:00"),
        ("2026-10-25T02:30:01+02:00", "02:30", "2026-10-26T02:30+01:00"),
    ],
)
def test_the_hosts_own_zone_is_the_one_without_a_name(now: str, at: str, start: str) -> None:
    assert next_start(datetime.fromisoformat(now), at) == datetime.fromisoformat(start)


@pytest.mark.parametrize("at", ["25:00", "noon", ""])
def test_no_time_of_day(at: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        next_start(local("2026-07-14T10:00"), at, zone=ZONE)


def test_no_day() -> None:
    with pytest.raises(ValueError, match="day"):
        next_start(local("2026-07-14T10:00"), "22:00", (), zone=ZONE)


def test_waiting_text_has_the_time_and_the_day_when_it_is_another() -> None:
    now = local("2026-07-14T10:00")
    text = "Daemon: waiting until 22:00 to start campaign"
    assert waiting_text(local("2026-07-14T22:00"), now, is_daemon=True, zone=ZONE) == text
    later = waiting_text(local("2026-07-18T22:00"), now, is_daemon=False, zone=ZONE)
    assert later == "Schedule: waiting until 22:00 to start campaign (Sat 2026-07-18)"


HOUR = 3600.0


def _outcome(stopped=None, error=None):
    return CampaignOutcome(CampaignManifest("id", "demo", "", "", "hash", 0), stopped, error)


class _Host:
    """A scheduler, what it said, and when it ran the campaign, in hours since its start."""

    def __init__(self, folder, *, daemon=None, schedule=None, run_s=HOUR, signal_at_s=float("inf"), outcomes=()):
        # Local time decides, so the clock starts at noon of the zone the tests run in.
        self.clock = FakeClock(datetime(2026, 7, 14, 12).astimezone(timezone.utc))
        self.stop = FakeStop(self.clock, signal_at_s)
        self.told: list[str] = []
        self.starts_h = []
        self.deadlines_h = []
        self._run_s = run_s
        self._outcomes = list(outcomes)
        campaign = make_campaign(folder, daemon=daemon, schedule=schedule)
        self.scheduler = Scheduler(campaign, self.stop, self.told.append, self.clock.now, self.clock.monotonic)

    def run(self) -> CampaignOutcome | None:
        return self.scheduler.run(self._run_once)

    def _run_once(self, deadline_s):
        self.starts_h.append(self.clock.elapsed_s / HOUR)
        self.deadlines_h.append(None if deadline_s is None else (deadline_s - 1000) / HOUR)
        self.stop.pass_time(self._run_s)
        if self.stop.is_set():
            return _outcome(Stopped.SIGNAL)
        return self._outcomes.pop(0) if self._outcomes else _outcome()


def test_without_schedule_or_daemon_it_runs_once_and_now(tmp_path):
    host = _Host(tmp_path)
    assert host.run() == _outcome()
    assert (host.starts_h, host.told) == ([0.0], [])
    assert not host.scheduler.starts_later


def test_a_schedule_delays_the_one_run_to_its_time(tmp_path):
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="14:30"))
    assert host.scheduler.starts_later
    host.run()
    assert host.starts_h == [2.5]
    assert host.told == ["Schedule: waiting until 14:30 to start campaign"]


def test_a_schedule_waits_for_one_of_its_days(tmp_path):
    # 14 July 2026 is a Tuesday.
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="11:00", days=("wed",)))
    host.run()
    assert host.starts_h == [23.0]


def test_a_wait_looks_at_the_clock_of_the_wall_again_and_again(tmp_path):
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="12:02"))
    host.run()
    assert host.stop.waits == [30.0, 30.0, 30.0, 30.0]


def test_a_signal_while_waiting_ends_it_before_it_began(tmp_path):
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="14:30"), signal_at_s=100)
    assert host.run() is None
    assert host.starts_h == []
    assert host.clock.elapsed_s == 100


def test_a_daemon_waits_for_its_time_once_and_repeats_from_end_to_start(tmp_path):
    daemon = CampaignDaemonConfig(enabled=True, at="13:00", interval="6h", total_duration="20h")
    host = _Host(tmp_path, daemon=daemon)
    outcome = host.run()
    assert host.starts_h == [1.0, 8.0, 15.0]
    assert host.deadlines_h == [21.0, 21.0, 21.0]
    assert host.clock.elapsed_s == 21 * HOUR
    assert outcome == _outcome(Stopped.DURATION)
    assert host.told == [
        "Daemon: waiting until 13:00 to start campaign",
        "Daemon: next run of the campaign in 6h 00m",
        "Daemon: next run of the campaign in 6h 00m",
        "Daemon: no further run; total duration ends in 5h 00m",
        "Daemon: total duration 20h reached, stopping after 3 cycles",
    ]


def test_a_run_that_the_deadline_cut_short_is_no_whole_cycle(tmp_path):
    daemon = CampaignDaemonConfig(enabled=True, interval="1h", total_duration="3h")
    host = _Host(tmp_path, daemon=daemon, outcomes=[_outcome(), _outcome(Stopped.DEADLINE)])
    outcome = host.run()
    assert host.starts_h == [0.0, 2.0]
    assert host.told[-1] == "Daemon: total duration 3h reached, stopping after 1 cycles"
    assert outcome == _outcome(Stopped.DURATION)


def test_a_duration_alone_runs_one_after_the_other(tmp_path):
    host = _Host(tmp_path, daemon=CampaignDaemonConfig(enabled=True, total_duration="2h30m"))
    host.run()
    assert host.starts_h == [0.0, 1.0, 2.0]


def test_a_daemon_without_interval_and_duration_runs_once_and_its_outcome_counts(tmp_path):
    host = _Host(tmp_path, daemon=CampaignDaemonConfig(enabled=True))
    assert host.run() == _outcome()
    assert host.starts_h == [0.0]
    assert host.deadlines_h == [None]
    assert host.told == ["Daemon: campaign done"]


def test_a_daemon_that_is_not_enabled_is_none(tmp_path):
    daemon = CampaignDaemonConfig(enabled=False, at="13:00", interval="6h")
    host = _Host(tmp_path, daemon=daemon, schedule=CampaignScheduleConfig(at="14:00"))
    host.run()
    assert host.starts_h == [2.0]
    assert DAEMON_WINS not in host.told


def test_with_both_the_daemon_wins_and_says_so(tmp_path):
    daemon = CampaignDaemonConfig(enabled=True, at="13:00")
    host = _Host(tmp_path, daemon=daemon, schedule=CampaignScheduleConfig(at="18:00"))
    host.run()
    assert host.starts_h == [1.0]
    assert host.told[0] == DAEMON_WINS


def test_a_daemon_without_a_time_of_its_own_does_not_take_the_schedules(tmp_path):
    host = _Host(tmp_path, daemon=CampaignDaemonConfig(enabled=True), schedule=CampaignScheduleConfig(at="18:00"))
    assert not host.scheduler.starts_later
    host.run()
    assert host.starts_h == [0.0]


@pytest.mark.parametrize("at_h", [0.5, 3.0])
def test_a_signal_ends_a_daemon_in_a_run_and_between_two(tmp_path, at_h):
    daemon = CampaignDaemonConfig(enabled=True, interval="6h")
    host = _Host(tmp_path, daemon=daemon, signal_at_s=at_h * HOUR)
    outcome = host.run()
    assert host.starts_h == [0.0]
    assert host.clock.elapsed_s == at_h * HOUR
    assert outcome == _outcome(Stopped.SIGNAL if at_h < 1 else None)


@pytest.mark.parametrize(
    "outcome",
    [_outcome(Stopped.INFRASTRUCTURE, InfrastructureError("the disk is full")), _outcome(Stopped.FAIL_FAST)],
)
def test_what_stopped_a_run_stops_the_daemon_since_a_person_has_to_look(tmp_path, outcome):
    daemon = CampaignDaemonConfig(enabled=True, interval="6h", total_duration="2d")
    host = _Host(tmp_path, daemon=daemon, outcomes=[_outcome(), outcome])
    assert host.run() == outcome
    assert host.starts_h == [0.0, 7.0]


def test_a_run_that_cannot_begin_ends_the_daemon_with_its_error(tmp_path):
    host = _Host(tmp_path, daemon=CampaignDaemonConfig(enabled=True, interval="6h"))

    def refuse(deadline_s):
        raise UserError("results folder: not writable")

    with pytest.raises(UserError, match="not writable"):
        host.scheduler.run(refuse)


@pytest.fixture
def stop():
    request = StopRequest()
    yield request
    request.close()


def test_no_stop_before_a_signal(stop):
    assert not stop.is_set()
    assert stop.signum is None
    assert select.select([stop.fileno()], [], [], 0)[0] == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag_and_wakes_waits_for_good(stop, signum):
    with stop.installed():
        os.kill(os.getpid(), signum)
        assert stop.is_set()
        assert stop.signum == signum
        assert select.select([stop.fileno()], [], [], 0)[0] == [stop.fileno()]
        assert stop.wait(1000) is True
        assert stop.wait(1000) is True


def test_second_signal_raises_with_its_exit_code(stop):
    with stop.installed():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)  # a place for the handler to run
    assert caught.value.code == 143


def test_first_signal_alone_is_acknowledged(stop):
    heard = []
    with stop.installed(lambda: heard.append(stop.signum)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)
    assert heard == [signal.SIGTERM]


def test_wait_ends_at_once_when_the_stop_comes_from_another_thread(stop):
    thread = threading.Thread(target=stop.request, args=(signal.SIGTERM,))
    thread.start()
    assert stop.wait(1000) is True
    thread.join()


def test_wait_without_a_stop_runs_its_time(stop):
    assert stop.wait(0.001) is False
    assert stop.wait(0) is False


def test_handlers_are_put_back(stop):
    before = signal.getsignal(signal.SIGINT)
    with stop.installed():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
