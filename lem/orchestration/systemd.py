"""The daemon, and its messages to systemd and to a webhook."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lem.config.campaign_config import CampaignConfig, CampaignDaemonConfig
from lem.orchestration.loop import CampaignOutcome, Stopped
from lem.orchestration.schedule import (
    ANY_DAY,
    DAEMON_WINS,
    Run,
    Stop,
    StopRequest,
    daemon_deadline_s,
    next_daemon_step,
    next_start,
    waiting_text,
)

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


_logger = logging.getLogger(__name__)

_VARIABLE = "NOTIFY_SOCKET"


class ServiceManager:
    """Whoever started this process and wants to hear of it; does nothing where nobody does."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._told: set[str] = set()
        self._status = ""

    @classmethod
    def of(cls, environ: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """The manager that the environment names; the name is taken out, so that no child speaks for this process."""
        address = environ.pop(_VARIABLE, None)
        # A name in the abstract space begins with `@` there and with a zero byte in the kernel.
        return cls("\0" + address[1:] if address and address.startswith("@") else address)

    def ready(self) -> None:
        """Say, once, that preflight is over: what was started works."""
        self._once("READY=1")

    def stopping(self) -> None:
        """Say, once, that a stop was asked for; may be called by a signal's handler."""
        self._once("STOPPING=1")

    def status(self, text: str) -> None:
        """Say how far it is: the line that `systemctl status` shows."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._send(message)

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as channel:
            try:
                channel.sendto(message.encode("utf-8", "backslashreplace"), self._address)
            except OSError as error:  # a campaign is worth more than being told of
                _logger.debug("the service manager was not told %s: %s", message, error)


_TIMEOUT_S = 10.0


class Notification:
    """A message on its way."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def settle(self, seconds: float) -> None:
        """Give a message that is still on its way a last moment before the program ends."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            _logger.warning("the webhook has not answered yet; the campaign does not wait for it")


def notify(url: str, payload: Mapping[str, Any]) -> Notification:
    """A JSON POST under way on a thread of its own; a failure is a warning, and the URL, a secret, is never logged."""
    thread = threading.Thread(target=_post, args=(url, dict(payload)), name="webhook", daemon=True)
    thread.start()
    return Notification(thread)


def _post(url: str, payload: dict[str, Any]) -> None:
    data = json.dumps(payload, ensure_ascii=False).encode("utf-8")
    try:
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked with the configuration
            url,
            data=data,
            headers={"Content-Type": "application/json", "User-Agent": "lem"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            answer.read(1)
    except urllib.error.HTTPError as error:
        _logger.warning("the webhook answered %s", error.code)
    except (OSError, ValueError) as error:
        # The text of these errors can hold the URL, so only the kind is told.
        _logger.warning("the webhook could not be reached (%s)", type(error).__name__)
