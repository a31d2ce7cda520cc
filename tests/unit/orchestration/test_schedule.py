"""When a campaign starts and stops: the time of day, the daemon, signals."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from random import Random

import pytest

from lem.base.errors import InfrastructureError, Interrupted, UserError
from lem.config.campaign_config import CampaignDaemonConfig, CampaignScheduleConfig
from lem.orchestration.manifest import CampaignManifest
from lem.orchestration.plan import Plan, build_plan
from lem.orchestration.schedule import (
    DAEMON_WINS,
    CampaignOutcome,
    Countdown,
    Scheduler,
    Stopped,
    StopRequest,
    next_start,
)
from lem.orchestration.status import Event
from tests.campaign_doubles import FakeClock, FakeStop, make_campaign


@pytest.fixture
def host_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host is in Central Europe (UTC+1, +2 in summer), by the rule that needs no database of zones."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("host_zone")
@pytest.mark.parametrize(
    ("now", "at", "days", "start"),
    [
        # 14 July 2026 is a Tuesday.
        ("2026-07-14T10:00", "22:00", None, "2026-07-14T20:00"),
        ("2026-07-14T22:00", "22:00", None, "2026-07-14T20:00"),
        ("2026-07-14T22:00:01", "22:00", None, "2026-07-15T20:00"),
        ("2026-07-14T23:59", "00:00", None, "2026-07-14T22:00"),
        ("2026-12-31T23:30", "08:05", None, "2027-01-01T07:05"),
        ("2026-07-14T10:00", "22:00", ("tue",), "2026-07-14T20:00"),
        ("2026-07-14T10:00", "22:00", ("mon",), "2026-07-20T20:00"),
        ("2026-07-14T10:00", "22:00", ("weekends",), "2026-07-18T20:00"),
        ("2026-07-14T10:00", "22:00", ("weekdays",), "2026-07-14T20:00"),
        ("2026-07-14T10:00", "22:00", ("sun", "thu"), "2026-07-16T20:00"),
        # Today is the only day, and its time is over.
        ("2026-07-14T22:01", "22:00", ("tue",), "2026-07-21T20:00"),
        # In UTC it is still Monday.
        ("2026-07-14T00:30", "01:00", ("tue",), "2026-07-13T23:00"),
        # A time that does not exist when summer time begins, and one that comes twice when it ends.
        ("2026-03-29T00:00", "02:30", None, "2026-03-29T01:30"),
        ("2026-10-25T00:00", "02:30", None, "2026-10-25T00:30"),
        ("2026-10-25T02:30:01", "02:30", None, "2026-10-26T01:30"),
        # By evening the new offset holds.
        ("2026-03-29T00:00", "22:00", None, "2026-03-29T20:00"),
        ("2026-10-25T00:00", "22:00", None, "2026-10-25T21:00"),
    ],
)
def test_the_next_start(now: str, at: str, days: tuple[str, ...] | None, start: str) -> None:
    schedule = CampaignScheduleConfig(at=at, days=days)
    expected = datetime.fromisoformat(start).replace(tzinfo=timezone.utc)
    local = datetime.fromtimestamp(datetime.fromisoformat(now).timestamp(), timezone.utc)
    assert next_start(local, at, schedule.weekdays) == expected


@pytest.mark.parametrize(("at", "weekdays"), [("25:00", {1}), ("noon", {1}), ("", {1}), ("22:00", ())])
def test_no_time_of_day_or_no_day(at: str, weekdays: Collection[int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        next_start(datetime(2026, 7, 14, tzinfo=timezone.utc), at, weekdays)


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


def test_a_schedule_delays_the_one_run_to_its_time(tmp_path):
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="14:30"))
    assert host.scheduler.starts_later
    host.run()
    assert host.starts_h == [2.5]
    assert host.told == ["Schedule: waiting until 14:30 to start campaign"]


def test_a_wait_looks_at_the_clock_of_the_wall_again_and_again(tmp_path):
    host = _Host(tmp_path, schedule=CampaignScheduleConfig(at="12:02"))
    host.run()
    assert host.stop.waits == [30.0, 30.0, 30.0, 30.0]


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


@pytest.mark.parametrize(
    ("daemon", "outcomes", "starts_h", "told", "stopped"),
    [
        # A run that the deadline cut short is no whole cycle.
        (
            {"interval": "1h", "total_duration": "3h"},
            [None, Stopped.DEADLINE],
            [0.0, 2.0],
            "Daemon: total duration 3h reached, stopping after 1 cycles",
            Stopped.DURATION,
        ),
        # A duration alone: one run after the other. Neither of them: one run, whose outcome counts.
        ({"total_duration": "2h30m"}, [], [0.0, 1.0, 2.0], "reached, stopping after 3 cycles", Stopped.DURATION),
        ({}, [], [0.0], "Daemon: campaign done", None),
    ],
)
def test_a_daemon_repeats_as_interval_and_duration_say(tmp_path, daemon, outcomes, starts_h, told, stopped):
    config = CampaignDaemonConfig(enabled=True, **daemon)
    host = _Host(tmp_path, daemon=config, outcomes=[_outcome(item) for item in outcomes])
    assert host.run() == _outcome(stopped)
    assert host.starts_h == starts_h
    assert host.told[-1].endswith(told)


@pytest.mark.parametrize(
    ("daemon", "start_h", "is_said"),
    [
        ({"enabled": True, "at": "13:00"}, 1.0, True),
        ({"enabled": True}, 0.0, True),  # the daemon does not take the schedule's time
        ({"enabled": False, "at": "13:00", "interval": "6h"}, 2.0, False),
    ],
)
def test_with_both_the_daemon_wins_and_says_so_if_it_is_enabled(tmp_path, daemon, start_h, is_said):
    host = _Host(tmp_path, daemon=CampaignDaemonConfig(**daemon), schedule=CampaignScheduleConfig(at="14:00"))
    assert host.scheduler.starts_later is (start_h > 0)
    host.run()
    assert host.starts_h == [start_h]
    assert (DAEMON_WINS in host.told) is is_said


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_sets_the_flag_and_wakes_waits_for_good_the_second_raises(stop, signum):
    heard = []
    with stop.installed(lambda: heard.append(stop.signum)):
        os.kill(os.getpid(), signum)
        assert stop.is_set()
        assert select.select([stop.fileno()], [], [], 0)[0] == [stop.fileno()]
        assert stop.wait(1000) is True
        assert stop.wait(1000) is True
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)  # a place for the handler to run
    assert caught.value.code == 143
    assert heard == [signum]  # the first alone is acknowledged


def test_wait_ends_at_once_when_the_stop_comes_from_another_thread_and_else_runs_its_time(stop):
    assert stop.wait(0.001) is False
    assert stop.wait(0) is False
    thread = threading.Thread(target=stop.request, args=(signal.SIGTERM,))
    thread.start()
    assert stop.wait(1000) is True
    thread.join()


def test_handlers_are_put_back(stop):
    before = signal.getsignal(signal.SIGINT)
    with stop.installed():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_that_nohup_had_ignored_stays_ignored(stop):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.installed():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- the time left


def _played(plan: Plan, took_s: Mapping[int, float], gap_share: float) -> Iterator[tuple[float, Event]]:
    """The events of a run of a plan and when they came: gaps that last a share of their caps, loads, experiments."""
    now_s, caps_s = 0.0, [plan.gap_cap_s(kind) for kind in plan.gap_kinds()]
    for item, is_load, cap_s in zip(plan.experiments, plan.loads(), caps_s, strict=True):
        if cap_s:
            yield now_s, Event("gap", data={"cap_s": cap_s})
            now_s += gap_share * cap_s
        yield now_s, Event("experiment_started")
        for phase, phase_s in (("load", 20.0), ("window", took_s[item.config.max_output_tokens]))[not is_load :]:
            yield now_s, Event("phase", data={"phase": phase})
            now_s += phase_s
        yield now_s, Event("experiment_completed")


@pytest.mark.parametrize("gap_share", [1.0, 0.25])
def test_the_end_that_is_told_does_not_move_once_every_configuration_was_measured(
    tmp_path: Path, gap_share: float
) -> None:
    execution = {"cycles": 4, "structure": "interleaved", "config_gap_seconds": 60, "cycle_gap_seconds": 300}
    plan = build_plan(make_campaign(tmp_path, execution=execution))
    events = list(_played(plan, {4: 10.0, 8: 100.0}, gap_share))
    countdown = Countdown()
    countdown.begin(plan.experiments, [plan.gap_cap_s(kind) for kind in plan.gap_kinds()], plan.loads())
    left_s = [countdown.after(event, now_s) for now_s, event in events]
    completed = [place for place, (_, event) in enumerate(events) if event.kind == "experiment_completed"]
    ends = [now_s + (left or 0.0) for (now_s, _), left in zip(events, left_s, strict=True)][completed[1] :]
    assert ends == pytest.approx([events[-1][0]] * len(ends))
    assert left_s[:3] == [None] * 3
    assert left_s[-1] == 0.0


def test_an_experiment_that_takes_longer_than_the_others_does_not_take_time_from_those_after_it(tmp_path: Path) -> None:
    plan = build_plan(make_campaign(tmp_path, execution={"cycles": 2}))
    countdown = Countdown()
    countdown.begin(plan.experiments, [0.0] * 4, [False] * 4)
    for now_s, kind in ((0.0, "experiment_started"), (10.0, "experiment_completed"), (10.0, "experiment_started")):
        countdown.after(Event(kind), now_s)
    assert [countdown.after(Event("tick"), now_s) for now_s in (10.0, 15.0, 20.0, 500.0)] == [30.0, 25.0, 20.0, 20.0]


def test_a_failure_at_once_says_nothing_about_the_experiments_after_it(tmp_path: Path) -> None:
    plan = build_plan(make_campaign(tmp_path, execution={"cycles": 2}))
    countdown = Countdown()
    countdown.begin(plan.experiments, [0.0] * 4, [False] * 4)
    countdown.after(Event("experiment_started"), 0.0)
    assert countdown.after(Event("experiment_failed"), 2.0) is None
    countdown.after(Event("experiment_started"), 2.0)
    # 100 s more of the second; the first fails again after 2 s.
    assert countdown.after(Event("experiment_completed"), 102.0) == pytest.approx(102.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_time_left_is_never_below_zero(seed: int, tmp_path: Path) -> None:
    plan = build_plan(make_campaign(tmp_path, execution={"cycles": 9}))
    countdown, random, now_s = Countdown(), Random(seed), 0.0
    countdown.begin(plan.experiments, [0.0] * len(plan.experiments), [False] * len(plan.experiments))
    for _ in plan.experiments:
        for kind in ("experiment_started", "tick", "experiment_completed"):
            assert (countdown.after(Event(kind), now_s) or 0.0) >= 0.0
            now_s += random.random() * 100
