"""How a run of a campaign ended, as people, programs, shells and a webhook are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lem import log
from lem.cli.progress import give_up_stream
from lem.cli.streams import terminal_width
from lem.config.campaign_config import CampaignConfig
from lem.config.schema import walk
from lem.errors import ExitCode, LemError
from lem.orchestration.loop import CampaignOutcome, Stopped
from lem.orchestration.manifest import FAILED, SKIPPED
from lem.process import copyable
from lem.record import Record
from lem.results.precision import read_stopping_rule
from lem.results.repository import Repository
from lem.results.summary import CampaignSummary, summarise, summary_document
from lem.results.table import render_summary

__all__ = [
    "closing_lines",
    "exit_code_of_outcome",
    "message_of_error",
    "message_of_outcome",
    "resume_command",
    "show_results",
]


def exit_code_of_outcome(outcome: CampaignOutcome) -> int:
    """The exit code of a run that no signal ended."""
    if outcome.error is not None:
        return int(outcome.error.exit_code)
    if outcome.stopped is Stopped.DEADLINE:
        return int(ExitCode.BUDGET)
    return int(ExitCode.EXPERIMENT_FAILED if outcome.manifest.failed_count else ExitCode.OK)


def show_results(campaign: CampaignConfig, outcome: CampaignOutcome, out: TextIO, *, is_json: bool) -> None:
    """Write the table, or the summary as one JSON object on a line; nothing where there is nothing to show."""
    summary = _summarise(campaign, outcome)
    if is_json:
        text = json.dumps({"event": "summary", **summary_document(summary)}, ensure_ascii=False) + "\n"
    elif summary.configurations:
        text = render_summary(summary, is_colour=log.is_colour_wanted(out), width=terminal_width(out))
    else:
        return
    try:
        out.write(text)
        out.flush()
    except OSError as error:
        give_up_stream(out, error)


def closing_lines(campaign: CampaignConfig, outcome: CampaignOutcome, console: log.Console) -> Iterator[str]:
    """The last words for a person: counts, where results are, what stood in the way, and how to go on."""
    manifest = outcome.manifest
    counted = [entry.status for entry in manifest.experiments if entry.status != SKIPPED]
    left = len(counted) - manifest.completed_count - manifest.failed_count
    folder = Path(campaign.io.results_dir) / campaign.slug / str(manifest.run_id)
    if outcome.remark:
        yield outcome.remark
    yield f"{manifest.completed_count} completed, {manifest.failed_count} failed, {left} left; results in {folder}"
    if outcome.error is not None:
        yield f"{console.paint('error:', 'red')} {outcome.error.message}"
        if outcome.error.hint:
            yield f"{console.paint('hint:', 'cyan')} {outcome.error.hint}"


def resume_command(words: Sequence[str]) -> str:
    """The same command again, to be pasted into a shell, with --resume and without what contradicts it.

    Args:
        words: the whole command line, the interpreter first (`sys.orig_argv`).
    """
    # A script on PATH is called by its name, without the Python that its first line names.
    script = Path(words[1]) if len(words) > 1 else Path()
    if script.name == "lem" and shutil.which("lem") == str(script):
        words = ["lem", *words[2:]]
    kept = [_without_secret(word) for word in words if word not in ("--fresh", "--resume", "--no-resume")]
    kept.insert(kept.index("--") if "--" in kept else len(kept), "--resume")
    return copyable(kept)


def _without_secret(word: str) -> str:
    """The word, with `(hidden)` for a secret that it sets; the person who typed it can put it back."""
    start = "--set=" if word.startswith("--set=") else ""
    key, sign, _ = word[len(start) :].partition("=")
    secrets = [name for name, item, _ in walk(CampaignConfig) if item.option.is_secret]
    is_secret = any(name == key or name.startswith(f"{key}.") for name in secrets)
    return f"{start}{key}=(hidden)" if sign and is_secret else word


def message_of_outcome(campaign: CampaignConfig, outcome: CampaignOutcome) -> dict[str, Any] | None:
    """What a webhook is told about a run; None when it is not to hear of it."""
    manifest = outcome.manifest
    if outcome.stopped is Stopped.SIGNAL:
        return None
    is_failure = outcome.error is not None or manifest.failed_count > 0
    return _message(
        campaign,
        "failure" if is_failure else "complete",
        run_id=manifest.run_id,
        completed=manifest.completed_count,
        failed=manifest.failed_count,
        remaining=len(manifest.get_remaining()),
        error=None if outcome.error is None else outcome.error.message,
    )


def message_of_error(campaign: CampaignConfig, error: LemError) -> dict[str, Any] | None:
    """What a webhook is told about a run that could not begin; None when it is not to hear of it."""
    return _message(campaign, "failure", run_id=None, completed=0, failed=0, remaining=None, error=error.message)


def _message(campaign: CampaignConfig, event: str, **data: Any) -> dict[str, Any] | None:
    if event not in campaign.notification.on:
        return None
    return {"event": event, "campaign": campaign.campaign_name, "campaign_id": campaign.campaign_id, **data}


def _summarise(campaign: CampaignConfig, outcome: CampaignOutcome) -> CampaignSummary:
    return summarise(
        _records(campaign, outcome),
        failed=_failed_by_name(outcome),
        campaign_name=campaign.campaign_name,
        run_id=str(outcome.manifest.run_id),
        stopping=read_stopping_rule(Path(campaign.io.results_dir) / campaign.slug / str(outcome.manifest.run_id)),
    )


def _records(campaign: CampaignConfig, outcome: CampaignOutcome) -> list[Record]:
    """The whole results of the experiments that are in the plan."""
    planned = {entry.exp_id for entry in outcome.manifest.experiments if entry.status != SKIPPED}
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan(str(outcome.manifest.run_id))
    return [item.record for item in scan.results if item.record.identity.experiment_id in planned]


def _failed_by_name(outcome: CampaignOutcome) -> dict[str, int]:
    failed: dict[str, int] = {}
    for entry in outcome.manifest.get_by_status(FAILED):
        failed[entry.config_name] = failed.get(entry.config_name, 0) + 1
    return failed
