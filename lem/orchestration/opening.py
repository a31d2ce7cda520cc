"""How a campaign begins: afresh, or where an earlier run of it stopped."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lem.errors import UserError
from lem.orchestration import resume
from lem.orchestration.manifest import (
    COMPLETED,
    FAILED,
    PENDING,
    SKIPPED,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)
from lem.results.precision import StoppingRule
from lem.results.repository import Repository

__all__ = ["SAY_WHICH", "Opening", "RunOptions", "Wish", "choose_opening", "go_on_with"]

_logger = logging.getLogger(__name__)

SAY_WHICH = "say --resume to go on with it, or --fresh to set it aside and start anew"


class Wish(enum.Enum):
    """What the command line asked for."""

    RESUME = "--resume"
    FRESH = "--fresh"
    UNSAID = ""


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about this run alone.

    Attributes:
        wish: resume, start afresh, or neither said.
        is_yes: do not ask.
        ask: puts a yes-or-no question to a person; None when nobody is there.
        is_environment_change_allowed: resume although engine, driver or GPU are others.
        is_fail_fast: stop after the first experiment that fails.
        run_id: of a run that was planned for several hosts; None for a run of its own.
        until: add cycles by this rule; None runs as many as the campaign has.
        go_on: the command that goes on with the campaign, for whoever finds it stopped; empty when unknown.
    """

    wish: Wish = Wish.UNSAID
    is_yes: bool = False
    ask: Callable[[str], bool] | None = None
    is_environment_change_allowed: bool = False
    is_fail_fast: bool = False
    run_id: str | None = None
    until: StoppingRule | None = None
    go_on: str = ""


class Opening(enum.Enum):
    """What is done."""

    FRESH = "fresh"
    RESUME = "resume"


def choose_opening(
    manager: ManifestManager,
    campaign_id: str,
    wish: Wish,
    *,
    is_yes: bool,
    ask: Callable[[str], bool] | None,
    run_id: str | None = None,
) -> tuple[Opening, CampaignManifest | None]:
    """How to begin, and the manifest to go on with.

    A campaign that is complete begins afresh; one that is not is never thrown away without being asked about.

    Args:
        is_yes: resume without asking.
        ask: puts a yes-or-no question to a person; None when nobody is there.
        run_id: of the run that was planned, which is gone on with wherever it stands; another one is set aside.

    Raises:
        UserError: the manifest cannot be used, or nobody is there to say what to do with an unfinished one.
    """
    if wish is Wish.FRESH:
        return Opening.FRESH, None
    manifest = manager.load_strict(campaign_id)
    if manifest is None:
        return Opening.FRESH, None
    if run_id is not None and manifest.run_id != run_id:
        if wish is Wish.RESUME:
            raise UserError(f"{manager.manifest_path} is of run {manifest.run_id}, the plan of run {run_id}", SAY_WHICH)
        return Opening.FRESH, None
    if wish is Wish.RESUME or run_id is not None:
        return Opening.RESUME, manifest
    if manifest.is_complete:
        return Opening.FRESH, None
    if is_yes:
        return Opening.RESUME, manifest
    # An experiment that was running when its process died is still to be run, too.
    remaining = sum(entry.status not in (COMPLETED, SKIPPED) for entry in manifest.experiments)
    counts = f"{manifest.completed_count} completed, {manifest.failed_count} failed"
    found = f"campaign {manifest.campaign_name} is not finished: {remaining} remaining ({counts})"
    if ask is None:
        raise UserError(found, SAY_WHICH)
    question = f"{found}\nGo on with it? (n sets it aside and starts anew)"
    return (Opening.RESUME, manifest) if ask(question) else (Opening.FRESH, None)


def go_on_with(
    manifest: CampaignManifest,
    planned: Sequence[CampaignManifestEntry],
    repository: Repository,
    *,
    config_hash: str,
    shuffle_seed: int | None,
) -> tuple[str, ...]:
    """What to tell about a manifest that was set right: it holds the plan of now, and what lies on disk.

    Args:
        planned: an entry for each planned experiment, as for a new manifest.
        config_hash, shuffle_seed: of the plan.
    """
    told = []
    is_changed = manifest.config_hash != config_hash
    change = resume.apply_plan(manifest, planned, config_hash)
    manifest.shuffle_seed = shuffle_seed
    if is_changed:
        told.append(change.describe())
    found = resume.reconcile(manifest, lambda entry: _results_of(repository, manifest, entry))
    for exp_id in found.lost:
        _logger.warning("%s: %s; it runs again", exp_id, manifest.get_entry(exp_id).error)
    if found.adopted:
        told.append(f"Whole results that the manifest had missed: {len(found.adopted)}, adopted")
    told.append(resume.resume_text(manifest))
    for entry in manifest.get_by_status(FAILED):
        entry.status = PENDING  # its turn comes again; until then it counts as neither
    return tuple(told)


def _results_of(
    repository: Repository, manifest: CampaignManifest, entry: CampaignManifestEntry
) -> list[resume.FoundResult]:
    return [
        resume.FoundResult(
            attempt=stored.record.identity.attempt,
            path=str(stored.path),
            valid=stored.record.validity.valid,
            host=stored.record.identity.host,
        )
        for stored in repository.find_attempts(str(manifest.run_id), entry.exp_id)
    ]
