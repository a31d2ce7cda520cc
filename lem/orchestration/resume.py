"""Resume or start afresh: the choice, and what is left to run."""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lem.base.clock import utc_text
from lem.base.errors import UserError
from lem.orchestration.manifest import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    SKIPPED,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)
from lem.results.run import StoppingRule
from lem.results.store import Repository

INTERRUPTED = "interrupted"
REMOVED = "removed from the campaign file"

# A result that is not valid is measured once more, and then stands.
MAX_INVALID_RESULTS = 2


@dataclass(frozen=True)
class FoundResult:
    """A whole `result.json` on disk.

    Attributes:
        path: as the manifest's `result_path` has it.
        completed_at: UTC label of its end, when the caller knows it.
    """

    attempt: int
    path: str
    valid: bool
    completed_at: str | None = None
    host: str | None = None


ResultFinder = Callable[[CampaignManifestEntry], Sequence[FoundResult]]
"""All whole results of an experiment that lie on disk; parts of files are none."""


@dataclass(frozen=True)
class Reconciliation:
    """What `reconcile` changed: names of experiments.

    Attributes:
        interrupted: were running when their process died, and run again.
        adopted: have a whole result that the manifest had missed.
        lost: were completed, but their result is gone or broken; they run again.
    """

    interrupted: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def reconcile(manifest: CampaignManifest, find_results: ResultFinder) -> Reconciliation:
    """What the manifest says, set right by what lies on disk.

    A completed experiment counts only while its result is there and whole. A whole result that the manifest missed,
    because its process died between the two writes, is adopted. What was running is not any more.
    """
    changes: dict[str, list[str]] = {"interrupted": [], "adopted": [], "lost": []}
    for entry in manifest.experiments:
        change = None if entry.status == SKIPPED else _reconcile_entry(entry, find_results(entry))
        if change is not None:
            changes[change].append(entry.exp_id)
    return Reconciliation(**{name: tuple(exp_ids) for name, exp_ids in changes.items()})


def _reconcile_entry(entry: CampaignManifestEntry, results: Sequence[FoundResult]) -> str | None:
    if entry.status == COMPLETED and any(result.path == entry.result_path for result in results):
        return None
    was_completed, was_running = entry.status == COMPLETED, entry.status == RUNNING
    known = {attempt.number for attempt in entry.attempts if attempt.result_path is not None}
    missed = [result for result in results if was_completed or result.attempt not in known]
    if was_completed:
        _forget_result(entry)
    if was_running:
        interrupt_entry(entry)
    for result in sorted(missed, key=lambda item: item.attempt):
        _record_result(entry, result)
    if missed and _settle(entry):
        return "adopted"
    if was_completed:
        return "lost"
    return "interrupted" if was_running else None


def interrupt_entry(entry: CampaignManifestEntry) -> None:
    """Set an experiment that was stopped, or whose process died, to pending with the error "interrupted"."""
    entry.status = PENDING
    entry.error = INTERRUPTED
    entry.attempts = tuple(
        attempt
        if attempt.result_path is not None or attempt.error is not None
        else dataclasses.replace(attempt, error=INTERRUPTED)
        for attempt in entry.attempts
    )


def _forget_result(entry: CampaignManifestEntry) -> None:
    message = f"result missing or broken: {entry.result_path}"
    entry.attempts = tuple(
        dataclasses.replace(attempt, result_path=None, valid=None, error=message)
        if attempt.result_path is not None and attempt.result_path == entry.result_path
        else attempt
        for attempt in entry.attempts
    )
    entry.status, entry.error, entry.result_path, entry.completed_at = PENDING, message, None, None


def _record_result(entry: CampaignManifestEntry, result: FoundResult) -> None:
    known = next((attempt for attempt in entry.attempts if attempt.number == result.attempt), None)
    entry.put_attempt(
        dataclasses.replace(
            known or Attempt(result.attempt),
            result_path=result.path,
            valid=result.valid,
            error=None,
            completed_at=result.completed_at or (known.completed_at if known else None),
            host=result.host or (known.host if known else entry.host),
        )
    )


def _settle(entry: CampaignManifestEntry) -> bool:
    """Complete the experiment if its results suffice; whether they do."""
    results = [attempt for attempt in entry.attempts if attempt.result_path is not None]
    chosen = next((attempt for attempt in reversed(results) if attempt.valid), results[-1])
    if not chosen.valid and len(results) < MAX_INVALID_RESULTS:
        return False
    entry.status, entry.error = COMPLETED, None
    entry.result_path, entry.completed_at = chosen.result_path, chosen.completed_at
    return True


@dataclass(frozen=True)
class PlanChange:
    """How a plan differs from the manifest: numbers of experiments."""

    kept: int
    queued: int
    removed: int

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"Campaign changed since the manifest was written: {self.kept} experiments unchanged, "
            f"{self.queued} new, {self.removed} removed (marked skipped)"
        )


def apply_plan(manifest: CampaignManifest, planned: Iterable[CampaignManifestEntry], config_hash: str) -> PlanChange:
    """How the manifest was changed to hold the plan: in its order, what was done kept, what is not in it skipped.

    To be followed by `reconcile`, since an experiment that comes back to the plan brings its old result.

    Args:
        planned: an entry for each planned experiment, as for a new manifest.
        config_hash: of the campaign as it is now.
    """
    before = {entry.exp_id: entry for entry in manifest.experiments}
    entries = []
    kept = queued = 0
    for entry in planned:
        known = before.pop(entry.exp_id, None)
        if known is None:
            queued += 1
            entries.append(entry)
            continue
        kept += known.status != SKIPPED
        queued += known.status == SKIPPED
        _renew(known, entry)
        entries.append(known)
    newly_removed = [entry for entry in before.values() if entry.status != SKIPPED]
    for entry in newly_removed:
        entry.status, entry.error = SKIPPED, REMOVED
    manifest.total_experiments = len(entries)
    manifest.experiments = [*entries, *before.values()]
    manifest.config_hash = config_hash
    return PlanChange(kept, queued, len(newly_removed))


def _renew(known: CampaignManifestEntry, planned: CampaignManifestEntry) -> None:
    """Take names, place and container from the plan; they do not change the numbers."""
    for name in ("config_name", "config_path", "container", "order_index"):
        setattr(known, name, getattr(planned, name))
    if known.status == SKIPPED:
        known.status = COMPLETED if known.result_path else PENDING
        known.error = None


def adopt_environment(
    manifest: CampaignManifest, current: Mapping[str, Any], *, is_change_allowed: bool, now: datetime
) -> tuple[str, ...]:
    """How the environment differs from the one that the manifest's results were measured in; () when it does not.

    Values new to the manifest are added to it. A change that is allowed is taken over and noted.

    Args:
        current: JSON values by name (image, engine, driver, GPU UUIDs); a name that is missing is not compared.

    Raises:
        UserError: it differs and that is not allowed; the manifest is as before.
    """
    known = manifest.environment
    changed = [name for name, value in current.items() if name in known and known[name] != value]
    lines = tuple(f"{name}: {_show(known[name])} before, {_show(current[name])} now" for name in changed)
    has_results = any(entry.result_path for entry in manifest.experiments)
    if changed and has_results:
        if not is_change_allowed:
            raise UserError(
                "the environment is not the one this campaign was begun in: " + "; ".join(lines),
                "restore it, start anew with --fresh, or mix the two with --allow-environment-change (recorded)",
            )
        manifest.notes.append({"at": utc_text(now), "kind": "environment_change", "changes": list(lines)})
    manifest.environment = {**known, **current}
    return lines


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def resume_text(manifest: CampaignManifest) -> str:
    """`Resuming: N remaining (M completed, F failed)`; the failed ones are among the remaining."""
    remaining = len(manifest.get_remaining())
    return f"Resuming: {remaining} remaining ({manifest.completed_count} completed, {manifest.failed_count} failed)"


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
    change = apply_plan(manifest, planned, config_hash)
    manifest.shuffle_seed = shuffle_seed
    if is_changed:
        told.append(change.describe())
    found = reconcile(manifest, lambda entry: _results_of(repository, manifest, entry))
    for exp_id in found.lost:
        _logger.warning("%s: %s; it runs again", exp_id, manifest.get_entry(exp_id).error)
    if found.adopted:
        told.append(f"Whole results that the manifest had missed: {len(found.adopted)}, adopted")
    told.append(resume_text(manifest))
    for entry in manifest.get_by_status(FAILED):
        entry.status = PENDING  # its turn comes again; until then it counts as neither
    return tuple(told)


def _results_of(repository: Repository, manifest: CampaignManifest, entry: CampaignManifestEntry) -> list[FoundResult]:
    return [
        FoundResult(
            attempt=stored.record.identity.attempt,
            path=str(stored.path),
            valid=stored.record.validity.valid,
            host=stored.record.identity.host,
        )
        for stored in repository.find_attempts(str(manifest.run_id), entry.exp_id)
    ]
