"""Running a campaign for `lem campaign`: schedule, progress, conclusion, notification and exit code."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.base import log
from lem.base.clock import utc_now
from lem.base.dataclass import replace
from lem.base.doc import screen_of
from lem.base.durable import reason_of
from lem.base.errors import ExitCode, Interrupted, LemError, UserError, exit_code_of
from lem.base.units import hash_label
from lem.cli import progress
from lem.cli.options import folder_options, without_secret
from lem.cli.prometheus import PrometheusFile
from lem.cli.selection import recount
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.campaign import CampaignRunner
from lem.orchestration.manifest import COMPLETED, SKIPPED
from lem.orchestration.resume import CHOOSE_HINT, RunOptions, forget_lost_results, run_of
from lem.orchestration.schedule import CampaignOutcome, Scheduler, Stopped, StopRequest
from lem.orchestration.status import Event, Observer
from lem.orchestration.systemd import Notification, ServiceManager
from lem.results.aggregation import run_document
from lem.results.configurations import Reading
from lem.results.run import Run, read_run
from lem.results.store import Repository
from lem.results.table import render_run

if TYPE_CHECKING:
    from lem.cli.campaign import Job

_WEBHOOK_PATIENCE_S = 3.0


class CampaignCommand:
    def __init__(self, args: argparse.Namespace, job: Job, out: TextIO, err: TextIO) -> None:
        daemon = job.campaign.daemon
        self._args = args
        self._job = job
        self._campaign = job.campaign
        self._out = out
        self._err = err
        self._is_quiet = args.quiet or (daemon is not None and daemon.enabled and daemon.quiet)
        self._console = log.Console(err)
        self._stop = StopRequest()
        self._service = ServiceManager.of()
        self._observers: list[Observer] = [
            progress.choose_progress(self._console, out, is_json=args.json, is_quiet=self._is_quiet),
            progress.StatusProgress(self._service),
        ]
        self._prometheus: PrometheusFile | None = None
        self._notification: Notification | None = None
        self._has_waited = False

    def execute(self) -> int:
        log.configure(self._console, verbosity=-1 if self._is_quiet else self._args.verbose)
        args, part = self._args, self._job.part
        is_interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
        options = RunOptions(
            resume=False if args.fresh else args.resume,
            is_yes=args.yes,
            ask=self._ask if is_interactive else None,
            is_environment_change_allowed=args.allow_environment_change,
            is_fail_fast=args.fail_fast,
            until=self._job.rule,
            resume_command=resume_command(sys.orig_argv),
            run_id=part.run_id,
        )
        runner = CampaignRunner(
            self._campaign,
            plan=self._job.plan,
            executor=self._job.choice.make(),
            observe=self._dispatch,
            stop=self._stop,
            options=options,
            host=part.host or socket.gethostname(),
            part=part.folder,
        )
        try:
            with self._stop.installed(self._acknowledge), runner.reserved(), self._log_file(), self._exported():
                outcome = self._run(runner)
        finally:
            self._console.close()
            if self._notification is not None:
                self._notification.settle(_WEBHOOK_PATIENCE_S)
            self._stop.close()
        if self._stop.signum is not None:
            return 128 + self._stop.signum
        if outcome is not None and outcome.error is None and outcome.manifest.completed_count:
            places = folder_options(Path(self._campaign.io.results_dir), Path(self._campaign.io.state_dir))
            args.next = ["check", self._campaign.slug, *places]
        return ExitCode.OK if outcome is None else exit_code_of_outcome(outcome)

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

    def _read_run(self, run_id: str) -> Run:
        place = Path(self._campaign.io.results_dir), self._campaign.slug, run_id
        return read_run(*place, reading=Reading(recount=recount))

    def _run_once(self, runner: CampaignRunner, deadline_s: float | None) -> CampaignOutcome:
        outcome = self._run_to_end(runner, deadline_s)
        if self._prometheus is not None:
            signum = self._stop.signum
            self._prometheus.end(int(exit_code_of_outcome(outcome)) if signum is None else 128 + signum)
        return outcome

    def _run_to_end(self, runner: CampaignRunner, deadline_s: float | None) -> CampaignOutcome:
        if self._args.budget is not None:  # cannot be combined with a daemon's own
            deadline_s = time.monotonic() + self._args.budget
        try:
            outcome = runner.run(deadline_s=deadline_s)
        except LemError as error:
            if self._is_quiet:  # otherwise only the terminal shows it
                progress.campaign_logger.info("error: %s", error.message)
            if self._has_waited and not isinstance(error, Interrupted):
                self._notify(error)
            raise
        finally:
            self._console.close()
        outcome = self._conclude(outcome, runner.repository)
        # A daemon's next run is always a new one, so there is nothing to ask.
        runner.options = replace(runner.options, resume=False, run_id=None)
        self._has_waited = True
        return outcome

    def _conclude(self, outcome: CampaignOutcome, repository: Repository) -> CampaignOutcome:
        outcome = check_still_there(outcome)
        self._notify(outcome)
        if not self._is_quiet and not self._args.json:
            self._console.line()
        show_results(repository, outcome, self._out, is_json=self._args.json)
        for line in closing_lines(repository, outcome, self._console):
            self._console.line(line)
            if self._is_quiet:
                progress.campaign_logger.info("%s", line)
        return outcome

    def _notify(self, ended: CampaignOutcome | LemError) -> None:
        url, message = self._campaign.notification.webhook_url, webhook_message(self._campaign, ended)
        if url is not None and message is not None:
            self._notification = Notification(url, message)

    def _dispatch(self, event: Event) -> None:
        for observe in self._observers:
            observe(event)

    def _announce(self, text: str) -> None:
        self._dispatch(Event("note", 0, len(self._job.plan.experiments), data={"text": text}))
        if self._is_quiet and not self._args.quiet and not self._args.json:
            self._console.line(text)

    def _acknowledge(self) -> None:
        self._service.stopping()
        if self._args.quiet:
            return
        clear = "\r\x1b[2K" if self._console.is_live else ""
        with contextlib.suppress(OSError):  # the reader is gone, or the stream has no descriptor
            os.write(self._err.fileno(), f"{clear}stopping; a second signal kills the running experiment\n".encode())

    def _ask(self, question: str) -> bool:
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
    def _exported(self) -> Iterator[None]:
        """Keep the file of --prometheus, which belongs to the one process that holds the campaign."""
        if self._args.prometheus is None:
            yield
            return
        self._prometheus = PrometheusFile(self._args.prometheus, self._campaign.campaign_name, self._read_run)
        self._observers.append(self._prometheus)
        try:
            yield
        except BaseException as error:
            self._prometheus.end(exit_code_of(error))
            raise

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[None]:
        if not self._is_quiet:
            yield
            return
        path = Path(self._campaign.io.state_dir) / self._campaign.slug / self._job.part.folder / "lem.log"
        try:
            handler = log.log_to_file(path)
        except OSError as error:
            raise UserError(f"{path}: {reason_of(error)}", "set another io.state_dir") from error
        if not self._args.quiet and not self._args.json:
            self._console.line(f"quiet: logging to {path}")
        self._observers.append(progress.LineProgress(None))
        progress.campaign_logger.info("%s", self._job.plan.summary)
        try:
            yield
        finally:
            logging.getLogger("lem").removeHandler(handler)
            handler.close()


def check_still_there(outcome: CampaignOutcome) -> CampaignOutcome:
    completed = outcome.manifest.get_by_status(COMPLETED)
    if outcome.error is not None or all(Path(str(entry.result_path)).exists() for entry in completed):
        return outcome
    return outcome.without(forget_lost_results(outcome.manifest))


def exit_code_of_outcome(outcome: CampaignOutcome) -> ExitCode:
    if outcome.stopped is Stopped.DURATION:
        return ExitCode.OK
    if outcome.error is not None:
        return outcome.error.exit_code
    if outcome.stopped is Stopped.DEADLINE:
        return ExitCode.BUDGET
    return ExitCode.EXPERIMENT_FAILED if outcome.manifest.failed_count else ExitCode.OK


def show_results(repository: Repository, outcome: CampaignOutcome, out: TextIO, *, is_json: bool) -> None:
    summary = run_of(outcome.manifest, repository)
    if is_json:
        progress.write_json_event(out, "summary", utc_now(), **run_document(summary))
    elif summary.configurations:
        progress.write_output(out, render_run(summary, **screen_of(out)))


def closing_lines(repository: Repository, outcome: CampaignOutcome, console: log.Console) -> Iterator[str]:
    manifest = outcome.manifest
    completed, failed = manifest.completed_count, manifest.failed_count
    left = sum(entry.status != SKIPPED for entry in manifest.experiments) - completed - failed
    folder = repository.run_folder(str(manifest.run_id))
    if outcome.remark:
        yield outcome.remark
    yield f"{completed} completed, {failed} failed, {left} left; results in {folder}"
    if outcome.error is not None:
        yield f"{console.paint('error:', 'red')} {outcome.error.message}"
        if outcome.error.hint:
            yield f"{console.paint('hint:', 'cyan')} {outcome.error.hint}"
    if outcome.stopped is not None or failed:
        why = "some experiments failed" if outcome.stopped is None else "stopped"
        why = "time budget reached" if outcome.stopped is Stopped.DEADLINE else why
        yield f"{why}; resume with: {resume_command(sys.orig_argv)}"


def resume_command(words: Sequence[str]) -> str:
    """The command line (`sys.orig_argv`) for a shell, with --resume instead of options that conflict with it."""
    # A script on PATH is named without the Python of its first line.
    script = Path(words[1]) if len(words) > 1 else Path()
    if script.name == "lem" and shutil.which("lem") == str(script):
        words = ["lem", *words[2:]]
    kept = [without_secret(word) for word in words if word not in ("--fresh", "--resume", "--no-resume")]
    kept.insert(kept.index("--") if "--" in kept else len(kept), "--resume")
    return shlex.join(kept)


def webhook_message(campaign: CampaignConfig, ended: CampaignOutcome | LemError) -> dict[str, Any] | None:
    manifest, error = (None, ended) if isinstance(ended, LemError) else (ended.manifest, ended.error)
    if isinstance(ended, CampaignOutcome) and ended.stopped is Stopped.SIGNAL:
        return None
    event = "complete" if manifest is not None and error is None and not manifest.failed_count else "failure"
    if event not in campaign.notification.on:
        return None
    return {
        "event": event,
        "campaign": campaign.campaign_name,
        "campaign_id": hash_label(campaign.campaign_id),
        "run_id": None if manifest is None else manifest.run_id,
        "completed": 0 if manifest is None else manifest.completed_count,
        "failed": 0 if manifest is None else manifest.failed_count,
        "remaining": None if manifest is None else len(manifest.get_remaining()),
        "error": None if error is None else error.message,
    }
