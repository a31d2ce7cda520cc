"""Running a campaign for `lem campaign`: schedule, progress, notification and exit code."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from lem.base import log
from lem.base.clock import utc_now
from lem.base.durable import reason_of
from lem.base.errors import ExitCode, Interrupted, LemError, UserError
from lem.cli.fleet import FleetPart
from lem.cli.progress import (
    LogProgress,
    StatusProgress,
    choose_progress,
    closing_lines,
    exit_code_of_outcome,
    message_of_error,
    message_of_outcome,
    resume_command,
    show_results,
)
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.campaign import CampaignRunner
from lem.orchestration.executor import ExecutorChoice
from lem.orchestration.plan import Plan
from lem.orchestration.resume import CHOOSE_HINT, RunOptions, make_rule
from lem.orchestration.schedule import CampaignOutcome, Scheduler, Stopped, StopRequest
from lem.orchestration.status import Event
from lem.orchestration.systemd import Notification, ServiceManager, notify
from lem.results.store import StoppingRule, Target

_logger = logging.getLogger("lem.campaign")

_WEBHOOK_PATIENCE_S = 3.0

_WHY_STOPPED = {Stopped.DEADLINE: "time budget reached"}


class CampaignCommand:
    """One invocation; a daemon runs its campaign repeatedly."""

    def __init__(
        self,
        args: argparse.Namespace,
        campaign: CampaignConfig,
        plan: Plan,
        choice: ExecutorChoice,
        out: TextIO,
        err: TextIO,
        part: FleetPart | None = None,
    ) -> None:
        daemon = campaign.daemon
        self._part = part or FleetPart()
        self._args = args
        self._campaign = campaign
        self._plan = plan
        self._choice = choice
        self._out = out
        self._err = err
        self._is_quiet_requested = bool(getattr(args, "quiet", False))
        self._is_quiet = self._is_quiet_requested or (daemon is not None and daemon.enabled and daemon.quiet)
        self._console = log.Console(err)
        if getattr(args, "no_color", False):
            self._console.is_colour = False
        self._stop = StopRequest()
        self._progress = choose_progress(self._console, out, is_json=args.json, is_quiet=self._is_quiet)
        self._log_progress: LogProgress | None = None
        self._service = ServiceManager.of()
        self._status = StatusProgress(self._service)
        self._notification: Notification | None = None
        self._has_waited = False

    def execute(self) -> int:
        """Run the campaign and return the exit code.

        Raises:
            LemError: the campaign, or its next run, cannot start.
        """
        log.configure(self._console, verbosity=-1 if self._is_quiet else getattr(self._args, "verbose", 0))
        runner = self._runner()
        try:
            with self._stop.installed(self._acknowledge), runner.reserved(), self._log_file():
                outcome = self._run(runner)
        finally:
            self._console.close()
            if self._notification is not None:
                self._notification.settle(_WEBHOOK_PATIENCE_S)
            self._stop.close()
        if self._stop.signum is not None:
            return 128 + self._stop.signum
        return int(ExitCode.OK) if outcome is None else exit_code_of_outcome(outcome)

    def _runner(self) -> CampaignRunner:
        args = self._args
        return CampaignRunner(
            self._campaign,
            plan=self._plan,
            executor=self._choice.make(),
            observe=self._dispatch,
            stop=self._stop,
            options=RunOptions(
                resume=False if args.fresh else args.resume,
                is_yes=args.yes,
                ask=self._ask if _is_interactive() else None,
                is_environment_change_allowed=args.allow_environment_change,
                is_fail_fast=args.fail_fast,
                until=self._rule(),
                resume_command=resume_command(sys.orig_argv),
                run_id=self._part.run_id,
            ),
            host=self._part.host or socket.gethostname(),
        )

    def _rule(self) -> StoppingRule | None:
        until: Target | None = self._args.until
        return None if until is None else make_rule(until, self._args.max_cycles)

    def _run(self, runner: CampaignRunner) -> CampaignOutcome | None:
        scheduler = Scheduler(self._campaign, self._stop, self._announce, utc_now, time.monotonic)
        # Ask questions and report errors now, not at the scheduled time.
        runner.settle_opening()
        if scheduler.starts_later:
            runner.check()
            self._service.ready()
            self._has_waited = True
        outcome = scheduler.run(lambda deadline_s: self._run_once(runner, deadline_s))
        if outcome is None:
            self._console.line("stopped before the campaign started")
        return outcome

    def _run_once(self, runner: CampaignRunner, deadline_s: float | None) -> CampaignOutcome:
        if self._args.budget is not None:  # cannot be combined with a daemon's own
            deadline_s = time.monotonic() + self._args.budget
        try:
            outcome = runner.run(deadline_s=deadline_s)
        except LemError as error:
            if self._is_quiet:  # otherwise only the terminal shows it
                _logger.info("error: %s", error.message)
            if self._has_waited and not isinstance(error, Interrupted):
                self._notify(message_of_error(self._campaign, error))
            raise
        finally:
            self._console.close()
        self._conclude(outcome)
        # A daemon's next run is always a new one, so there is nothing to ask.
        runner.options = replace(runner.options, resume=False, run_id=None)
        self._has_waited = True
        return outcome

    def _conclude(self, outcome: CampaignOutcome) -> None:
        """Report how a run ended, on the terminal and to the webhook."""
        self._notify(message_of_outcome(self._campaign, outcome))
        if not self._is_quiet and not self._args.json:
            self._console.line()
        show_results(self._campaign, outcome, self._out, is_json=self._args.json)
        lines = [*closing_lines(self._campaign, outcome, self._console)]
        if outcome.stopped is not None or outcome.manifest.failed_count:
            why = (
                _WHY_STOPPED.get(outcome.stopped, "stopped")
                if outcome.stopped is not None
                else "some experiments failed"
            )
            lines.append(f"{why}; resume with: {resume_command(sys.orig_argv)}")
        for line in lines:
            self._console.line(line)
            if self._is_quiet:
                _logger.info("%s", line)

    def _notify(self, message: dict[str, Any] | None) -> None:
        url = self._campaign.notification.webhook_url
        if url is not None and message is not None:
            self._notification = notify(url, message)

    def _dispatch(self, event: Event) -> None:
        self._progress(event)
        self._status(event)
        if self._log_progress is not None:
            self._log_progress(event)

    def _announce(self, text: str) -> None:
        """Announce when a run starts, or why none does; on the terminal even if the daemon is set to quiet."""
        self._dispatch(Event("note", 0, len(self._plan.experiments), data={"text": text}))
        if self._is_quiet and not self._is_quiet_requested and not self._args.json:
            self._console.line(text)

    def _acknowledge(self) -> None:
        """Confirm a signal at once: the running experiment may take seconds to stop."""
        self._service.stopping()
        if self._is_quiet_requested:
            return
        clear = "\r\x1b[2K" if self._console.is_live else ""
        with contextlib.suppress(OSError):  # the reader is gone, or the stream has no descriptor
            os.write(self._err.fileno(), f"{clear}stopping; a second signal kills the running experiment\n".encode())

    def _ask(self, question: str) -> bool:
        """The user's answer at the terminal."""
        answers = {"": True, "y": True, "yes": True, "n": False, "no": False}
        while True:
            self._err.write(f"{question} [Y/n] ")
            self._err.flush()
            # A signal does not interrupt a read, so wait for both.
            select.select([sys.stdin, self._stop], [], [])
            if self._stop.signum is not None:
                self._console.line()
                raise Interrupted(self._stop.signum)
            line = sys.stdin.readline()
            if not line:
                self._console.line()
                raise UserError("no answer", CHOOSE_HINT)
            answer = answers.get(line.strip().lower())
            if answer is not None:
                return answer

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[None]:
        """In quiet mode, log everything to `<state_dir>/<campaign>/lem.log`."""
        if not self._is_quiet:
            yield
            return
        path = Path(self._campaign.io.state_dir) / self._campaign.slug / "lem.log"
        try:
            handler = log.log_to_file(path)
        except OSError as error:
            raise UserError(f"{path}: {reason_of(error)}", "set another io.state_dir") from error
        if not self._is_quiet_requested and not self._args.json:
            self._console.line(f"quiet: logging to {path}")
        self._log_progress = LogProgress(_logger)
        _logger.info("%s", self._plan.summary)
        try:
            yield
        finally:
            logging.getLogger("lem").removeHandler(handler)
            handler.close()


def _is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
