"""When a campaign runs: now, at a time of day, or again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from lem.config.campaign_config import CampaignConfig, CampaignDaemonConfig
from lem.orchestration.loop import CampaignOutcome, Stopped
from lem.orchestration.schedule import (
    ANY_DAY,
    DAEMON_WINS,
    Run,
    Stop,
    daemon_deadline_s,
    next_daemon_step,
    next_start,
    waiting_text,
)
from lem.orchestration.stop import StopRequest

__all__ = ["Course", "Scheduler"]

# The clock of the wall may be set, or the machine sleep: look at it again this often.
_LOOK_EVERY_S = 30.0

RunOnce = Callable[["float | None"], CampaignOutcome]
"""Runs the campaign once, given the deadline of the daemon on the monotonic clock."""


@dataclass(frozen=True)
class Course:
    """How a campaign, or a row of its runs, went.

    Attributes:
        outcome: of the last run; None when a signal came before the first.
        is_time_up: a daemon reached its total duration.
    """

    outcome: CampaignOutcome | None = None
    is_time_up: bool = False


@dataclass
class Scheduler:
    """Waits, and runs a campaign when it is time.

    Attributes:
        tell: says a line to a person.
        now: the time of day, aware.
        monotonic: seconds that never go back.
    """

    campaign: CampaignConfig
    stop: StopRequest
    tell: Callable[[str], None]
    now: Callable[[], datetime]
    monotonic: Callable[[], float]

    @property
    def starts_later(self) -> bool:
        """Whether the first run waits for a time of day."""
        return self._first_at is not None

    def run(self, run_once: RunOnce) -> Course:
        """How it went.

        Raises:
            LemError: as `run_once`.
        """
        daemon, schedule = self.campaign.daemon, self.campaign.schedule
        is_daemon = daemon is not None and daemon.enabled
        if is_daemon and schedule is not None:
            self.tell(DAEMON_WINS)
        if self._first_at is not None:
            weekdays = ANY_DAY if is_daemon or schedule is None else schedule.weekdays
            start = next_start(self.now(), self._first_at, weekdays)
            self._wait_until(start, is_daemon=is_daemon)
        if self.stop.is_set():
            return Course()
        return self._repeat(daemon, run_once) if daemon is not None and is_daemon else Course(run_once(None))

    @property
    def _first_at(self) -> str | None:
        daemon, schedule = self.campaign.daemon, self.campaign.schedule
        if daemon is not None and daemon.enabled:
            return daemon.at
        return None if schedule is None else schedule.at

    def _repeat(self, daemon: CampaignDaemonConfig, run_once: RunOnce) -> Course:
        """Run until the total duration is reached, a signal comes, or a run is stopped by anything else."""
        outcome: CampaignOutcome | None = None
        runs_done, first_start_s, last_end_s = 0, None, None
        while not self.stop.is_set():
            now_s = self.monotonic()
            step = next_daemon_step(
                daemon, now_s=now_s, runs_done=runs_done, first_start_s=first_start_s, last_end_s=last_end_s
            )
            if isinstance(step, Run):
                first_start_s = now_s if first_start_s is None else first_start_s
                outcome = run_once(daemon_deadline_s(daemon, first_start_s))
                runs_done += outcome.stopped is None
                last_end_s = self.monotonic()
                if outcome.stopped not in (None, Stopped.DEADLINE):
                    break  # what stopped this run would stop the next one: a person has to look
                continue
            self.tell(step.text)
            if isinstance(step, Stop):
                return Course(outcome, is_time_up=daemon.total_duration is not None)
            self.stop.wait(step.until_s - now_s)
        return Course(outcome)

    def _wait_until(self, start: datetime, *, is_daemon: bool) -> None:
        """Wait for a time of day, or for a request to stop."""
        if start > self.now():
            self.tell(waiting_text(start, self.now(), is_daemon=is_daemon))
        while not self.stop.is_set() and (left_s := (start - self.now()).total_seconds()) > 0:
            self.stop.wait(min(left_s, _LOOK_EVERY_S))
