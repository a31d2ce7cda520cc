"""When campaigns run, on a clock that only waits and runs move."""

from datetime import datetime, timezone

import pytest

from lem.base.errors import InfrastructureError, UserError
from lem.config.campaign_config import CampaignDaemonConfig, CampaignScheduleConfig
from lem.orchestration.manifest import CampaignManifest
from lem.orchestration.schedule import DAEMON_WINS, CampaignOutcome, Scheduler, Stopped
from tests.campaign_doubles import FakeClock, FakeStop, make_campaign

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
        "Daemon: no further run, total duration ends in 5h 00m",
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
