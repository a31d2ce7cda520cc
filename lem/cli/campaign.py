"""`lem campaign`: run a campaign file, or several experiment files as one campaign."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem import log
from lem.errors import ExitCode, InfrastructureError, UserError

if TYPE_CHECKING:
    from lem.config.campaign_config import CampaignConfig
    from lem.config.loading import Loaded
    from lem.orchestration.campaign import CampaignOutcome
    from lem.orchestration.plan import Plan
    from lem.orchestration.stop import StopRequest

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_parser", "run"]

# Options that stand for one key of the file: their value wins over the file's.
_KEYS = {
    "model": "model.name",
    "dataset": "dataset.name",
    "sample_size": "num_samples",
    "cycles": "execution.cycles",
    "structure": "execution.structure",
    "seed": "execution.seed",
    "warmup_prompts": "execution.warmup_prompts",
    "warmup_timeout": "execution.warmup_timeout_seconds",
    "config_gap": "execution.config_gap_seconds",
    "cycle_gap": "execution.cycle_gap_seconds",
    "results_dir": "io.results_dir",
    "compose_file": "io.compose_file",
    "env_file": "io.env_file",
    "force_cold_start": "cold_start.force_cold_start",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add `campaign` to the command line."""
    parser = subparsers.add_parser(
        "campaign",
        help="run a campaign file, or several experiment files as one",
        description="Run a campaign file, or several experiment files with --campaign-name.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a campaign file; or experiment files")
    parser.add_argument("--campaign-name", metavar="NAME", help="make a campaign of this name of experiment files")
    _add_overrides(parser.add_argument_group("what to run (wins over the file)"))
    _add_place(parser.add_argument_group("where to run and to write"))
    _add_course(parser.add_argument_group("how to begin and to end"))
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout for each event")
    parser.set_defaults(run=run)


def _add_overrides(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", "-m", metavar="NAME", help="model of experiments that name none")
    group.add_argument("--dataset", "-d", metavar="NAME", help="dataset of experiments that have no prompts")
    group.add_argument("--sample-size", "-n", type=int, metavar="N", help="prompts an experiment")
    group.add_argument("--cycles", "-c", type=int, metavar="N", help="how often every experiment is run")
    group.add_argument("--structure", choices=("interleaved", "shuffled", "grouped"), help="order of experiments")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the shuffled order")
    group.add_argument("--warmup-prompts", type=int, metavar="N", help="prompts of warm-up, at least")
    group.add_argument("--warmup-timeout", type=float, metavar="S", help="seconds of warm-up, at most")
    group.add_argument("--config-gap", type=float, metavar="S", help="seconds between experiments, at most")
    group.add_argument("--cycle-gap", type=float, metavar="S", help="seconds between cycles, at most")
    group.add_argument(
        "--force-cold-start",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start a new worker for every experiment",
    )
    group.add_argument("--preset", metavar="NAME", help="values that experiments start from (lem presets)")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key; may be repeated")


def _add_place(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--results-dir", "-o", metavar="DIR", help="folder of the results")
    group.add_argument("--executor", choices=("auto", "docker", "local"), default="auto", help="where experiments run")
    group.add_argument("--python", metavar="PROGRAM", help="Python that has the engines, for the local executor")
    group.add_argument("--compose-file", metavar="FILE", help="compose file of the backends")
    group.add_argument("--env-file", metavar="FILE", help="environment file for compose")


def _add_course(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=None, help="go on with an unfinished campaign"
    )
    group.add_argument("--fresh", action="store_true", help="set an earlier manifest aside and start anew")
    group.add_argument(
        "--allow-environment-change", action="store_true", help="resume although engine, driver or GPU changed"
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan and end; nothing is written")
    group.add_argument("--validate-only", action="store_true", help="validate and end; nothing is written")
    group.add_argument("--yes", "-y", action="store_true", help="do not ask; an unfinished campaign is resumed")
    group.add_argument("--fail-fast", action="store_true", help="end after the first experiment that fails")


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code of interface.md."""
    from lem.meters.gpus import find_gpus
    from lem.orchestration.plan import build_plan

    loaded = _load(args)
    campaign = loaded.config
    plan = build_plan(campaign, loaded.drafts, preset=loaded.preset, forced=loaded.forced, gpus=find_gpus() or None)
    _announce(plan, args, err)
    if not plan.experiments:
        raise UserError("no valid experiment is left", "lem campaign --dry-run lists each reason; nothing was run")
    if args.validate_only:
        return int(ExitCode.OK)
    _check_executor(args)
    if args.dry_run:
        out.write(_describe_plan(plan, campaign, args))
        return int(ExitCode.OK)
    return _Command(args, campaign, plan, out, err).execute()


def _load(args: argparse.Namespace) -> Loaded[CampaignConfig]:
    from lem.config.yamlfile import load_campaign, load_campaign_of_files

    # What stands behind --set is the most specific, so it comes last and wins.
    sets: list[str | tuple[str, Any]] = [
        (key, getattr(args, name)) for name, key in _KEYS.items() if getattr(args, name) is not None
    ]
    sets += args.set
    if args.campaign_name is not None:
        return load_campaign_of_files(args.campaign_name, args.files, sets, args.preset)
    if len(args.files) > 1:
        raise UserError("several files make a campaign only with a name", "add --campaign-name NAME")
    return load_campaign(args.files[0], sets, args.preset)


def _announce(plan: Plan, args: argparse.Namespace, err: TextIO) -> None:
    if getattr(args, "quiet", False):
        return
    from lem.cli.plan_view import render_findings

    err.write(render_findings(plan, is_colour=log.is_colour_wanted(err)))
    err.flush()


def _describe_plan(plan: Plan, campaign: CampaignConfig, args: argparse.Namespace) -> str:
    from lem.cli.plan_view import render_plan
    from lem.orchestration.workers import LocalExecutor

    measured, loads = _earlier_times(plan, campaign)
    python = LocalExecutor(args.python).python
    why = "asked for" if args.executor == "local" or args.python else "chosen: this version of lem has no other"
    place = f"local, {python} ({why})"
    return render_plan(plan, campaign, place, measured_by_config=measured, load_by_engine=loads)


def _earlier_times(plan: Plan, campaign: CampaignConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that experiments of this plan and loads of its engines took before; the latest counts."""
    from lem.results.repository import Repository

    engines = {item.config_hash: item.engine_key for item in plan.configurations}
    measured: dict[str, float] = {}
    loads: dict[str, float] = {}
    for result in Repository(Path(campaign.io.results_dir), campaign.slug).scan().results:
        digest, window = result.record.identity.config_hash, result.record.window
        if digest in engines:
            measured[digest] = (window.warmup_s or 0.0) + window.window_s
            if window.load_s is not None:
                loads[engines[digest]] = window.load_s
    return measured, loads


def _check_executor(args: argparse.Namespace) -> None:
    if args.executor == "docker":
        raise UserError("--executor docker is not part of this version of lem", "use --executor local, or leave it out")


class _Command:
    """One `lem campaign` that measures."""

    def __init__(
        self,
        args: argparse.Namespace,
        campaign: CampaignConfig,
        plan: Plan,
        out: TextIO,
        err: TextIO,
    ) -> None:
        self._args = args
        self._campaign = campaign
        self._plan = plan
        self._out = out
        self._err = err
        daemon = campaign.daemon
        self._is_daemon = daemon is not None and daemon.enabled
        self._is_quiet = getattr(args, "quiet", False) or (daemon is not None and self._is_daemon and daemon.quiet)
        self._console = log.Console(err)

    def execute(self) -> int:
        """The exit code."""
        from lem.orchestration.daemon import Scheduler
        from lem.orchestration.manifest import utc_now
        from lem.orchestration.stop import StopRequest

        log.configure(self._console, verbosity=-1 if self._is_quiet else getattr(self._args, "verbose", 0))
        stop = StopRequest()
        with stop.installed(), self._log_file():
            scheduler = Scheduler(self._campaign, stop, self._say, utc_now, time.monotonic)
            outcome = scheduler.run(lambda before, deadline_s: self._run_once(stop, before, deadline_s))
        if stop.signum is not None:
            return 128 + stop.signum
        if outcome is None or self._is_daemon:
            return int(ExitCode.OK)
        return _exit_code(outcome)

    def _say(self, text: str) -> None:
        logging.getLogger("lem.campaign").info("%s", text)
        if not self._args.json:
            self._console.line(text)

    def _run_once(self, stop: StopRequest, runs_before: int, deadline_s: float | None) -> CampaignOutcome:
        from lem.cli.progress import choose_progress
        from lem.orchestration.campaign import CampaignRunner, RunOptions
        from lem.orchestration.workers import LocalExecutor

        progress = choose_progress(self._console, self._out, is_json=self._args.json, is_quiet=self._is_quiet)
        runner = CampaignRunner(
            self._campaign,
            plan=self._plan,
            executor=LocalExecutor(self._args.python),
            observe=progress,
            stop=stop,
            options=RunOptions(
                wish=self._wish(runs_before),
                is_yes=self._args.yes,
                ask=self._ask if _is_somebody_there() else None,
                is_environment_change_allowed=self._args.allow_environment_change,
                is_fail_fast=self._args.fail_fast,
            ),
        )
        try:
            outcome = runner.run(deadline_s=deadline_s)
        finally:
            self._console.close()
        self._conclude(outcome)
        return outcome

    def _wish(self, runs_before: int) -> Any:
        from lem.orchestration.opening import Wish

        if self._args.fresh or self._args.resume is False or runs_before:
            return Wish.FRESH
        return Wish.RESUME if self._args.resume else Wish.UNSAID

    def _ask(self, question: str) -> bool:
        self._err.write(f"{question} [Y/n] ")
        self._err.flush()
        return sys.stdin.readline().strip().lower() in ("", "y", "yes")

    def _conclude(self, outcome: CampaignOutcome) -> None:
        """Say how the run ended, to people and to the webhook."""
        notification = self._notify(outcome)
        self._show_results(outcome)
        for line in self._closing_lines(outcome):
            self._console.line(line)
        if notification is not None and not self._is_daemon:
            notification.settle(_WEBHOOK_PATIENCE_S)

    def _show_results(self, outcome: CampaignOutcome) -> None:
        from lem.results.summary import summarise, summary_document
        from lem.results.table import render_summary

        summary = summarise(
            _records(self._campaign, outcome),
            failed=_failed_by_name(outcome),
            campaign_name=self._campaign.campaign_name,
            run_id=str(outcome.manifest.run_id),
        )
        if self._args.json:
            document = {"event": "summary", **summary_document(summary)}
            self._out.write(json.dumps(document, ensure_ascii=False) + "\n")
        elif summary.configurations:
            self._console.line()
            width = os.get_terminal_size(self._out.fileno()).columns if self._out.isatty() else 80
            self._out.write(render_summary(summary, is_colour=log.is_colour_wanted(self._out), width=width))
        self._out.flush()

    def _closing_lines(self, outcome: CampaignOutcome) -> Iterator[str]:
        manifest, paint = outcome.manifest, self._console.paint
        left = len(manifest.get_remaining())
        counts = f"{manifest.completed_count} completed, {manifest.failed_count} failed, {left} left"
        folder = Path(self._campaign.io.results_dir) / self._campaign.slug / str(manifest.run_id)
        yield f"{counts}; results in {folder}"
        if outcome.error is not None:
            yield f"{paint('error:', 'red')} {outcome.error.message}"
            if outcome.error.hint:
                yield f"{paint('hint:', 'cyan')} {outcome.error.hint}"
        if outcome.stopped is not None or manifest.failed_count:
            why = "stopped" if outcome.stopped is not None else "some failed"
            yield f"{why}; go on with: {self._resume_command()}"

    def _resume_command(self) -> str:
        """The same command again, with --resume and without what contradicts it."""
        from lem.process import copyable

        dropped = ("--fresh", "--no-resume", "--resume", "--yes", "-y")
        words = [word for word in sys.argv[1:] if word not in dropped]
        start = [sys.executable, sys.argv[0]] if sys.argv[0].endswith((".pyz", ".py")) else ["lem"]
        if sys.argv[0].endswith("__main__.py"):
            start = [sys.executable, "-m", "lem"]
        return copyable([*start, *words, "--resume"])

    def _notify(self, outcome: CampaignOutcome) -> Any:
        from lem.orchestration.loop import Stopped
        from lem.orchestration.notification import notify

        chosen = self._campaign.notification
        if chosen.webhook_url is None or outcome.stopped is Stopped.SIGNAL:
            return None
        manifest = outcome.manifest
        is_failure = outcome.error is not None or manifest.failed_count > 0
        if ("failure" if is_failure else "complete") not in chosen.on:
            return None
        payload = {
            "event": "failure" if is_failure else "complete",
            "campaign": manifest.campaign_name,
            "campaign_id": manifest.campaign_id,
            "run_id": manifest.run_id,
            "completed": manifest.completed_count,
            "failed": manifest.failed_count,
            "remaining": len(manifest.get_remaining()),
            "error": None if outcome.error is None else outcome.error.message,
        }
        return notify(chosen.webhook_url, payload)

    @contextlib.contextmanager
    def _log_file(self) -> Iterator[None]:
        """In quiet mode everything goes to `<state_dir>/<campaign>/lem.log`."""
        if not self._is_quiet:
            yield
            return
        path = Path(self._campaign.io.state_dir) / self._campaign.slug / "lem.log"
        try:
            handler = log.log_to_file(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", "choose another io.state_dir") from error
        try:
            yield
        finally:
            logging.getLogger("lem").removeHandler(handler)
            handler.close()


_WEBHOOK_PATIENCE_S = 3.0


def _is_somebody_there() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _exit_code(outcome: CampaignOutcome) -> int:
    if isinstance(outcome.error, InfrastructureError):
        return int(outcome.error.exit_code)
    return int(ExitCode.EXPERIMENT_FAILED if outcome.manifest.failed_count else ExitCode.OK)


def _records(campaign: CampaignConfig, outcome: CampaignOutcome) -> list[Any]:
    """The whole results of the experiments that are in the plan."""
    from lem.results.repository import Repository

    planned = {entry.exp_id for entry in outcome.manifest.experiments if entry.status != "skipped"}
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan(str(outcome.manifest.run_id))
    return [item.record for item in scan.results if item.record.identity.experiment_id in planned]


def _failed_by_name(outcome: CampaignOutcome) -> dict[str, int]:
    failed: dict[str, int] = {}
    for entry in outcome.manifest.get_by_status("failed"):
        failed[entry.config_name] = failed.get(entry.config_name, 0) + 1
    return failed
