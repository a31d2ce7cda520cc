"""When a campaign runs: now, at a time of day, or again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from lem.config.campaign_config import CampaignConfig, CampaignDaemonConfig
from lem.orchestration.campaign import CampaignOutcome
from lem.orchestration.schedule import (
    DAEMON_WINS,
    Run,
    Stop,
    daemon_deadline_s,
    next_daemon_step,
    next_start,
    waiting_text,
)
from lem.orchestration.stop import StopRequest

__all__ = ["Scheduler"]

# The clock of the wall may be set, or the machine sleep: look at it again this often.
_LOOK_EVERY_S = 30.0

RunOnce = Callable[[int, "float | None"], CampaignOutcome]
"""Runs the campaign once, given the number of runs before and the deadline of the daemon on the monotonic clock."""


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

    def run(self, run_once: RunOnce) -> CampaignOutcome | None:
        """How the last run ended; None when a signal came before the first.

        Raises:
            LemError: as `run_once`.
        """
        daemon, schedule = self.campaign.daemon, self.campaign.schedule
        if daemon is not None and daemon.enabled:
            if schedule is not None:
                self.tell(DAEMON_WINS)
            return self._run_daemon(daemon, run_once)
        if schedule is not None and schedule.at is not None:
            start = next_start(self.now(), schedule.at, schedule.weekdays)
            if self._wait_until(start, is_daemon=False):
                return None
        return run_once(0, None)

    def _run_daemon(self, daemon: CampaignDaemonConfig, run_once: RunOnce) -> CampaignOutcome | None:
        if daemon.at is not None and self._wait_until(next_start(self.now(), daemon.at), is_daemon=True):
            return None
        outcome: CampaignOutcome | None = None
        runs_done, first_start_s, last_end_s = 0, None, None
        while not self.stop.is_set():
            step = next_daemon_step(
                daemon,
                now_s=self.monotonic(),
                runs_done=runs_done,
                first_start_s=first_start_s,
                last_end_s=last_end_s,
            )
            if isinstance(step, Run):
                started_s = self.monotonic()
                first_start_s = started_s if first_start_s is None else first_start_s
                outcome = run_once(runs_done, daemon_deadline_s(daemon, first_start_s))
                runs_done += outcome.stopped is None
                last_end_s = self.monotonic()
            elif isinstance(step, Stop):
                self.tell(step.text)
                break
            else:
                self.tell(step.text)
                self.stop.wait(step.until_s - self.monotonic())
        return outcome

    def _wait_until(self, start: datetime, *, is_daemon: bool) -> bool:
        """Wait for a time of day; whether a stop was asked for meanwhile."""
        if start > self.now():
            self.tell(waiting_text(start, self.now(), is_daemon=is_daemon))
        while not self.stop.is_set():
            left_s = (start - self.now()).total_seconds()
            if left_s <= 0:
                return False
            self.stop.wait(min(left_s, _LOOK_EVERY_S))
        return True
