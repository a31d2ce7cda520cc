"""Going on with a campaign: what of its manifest still holds.

Everything here changes the manifest in memory; looking for results and saving are the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lem.clock import utc_text
from lem.errors import UserError
from lem.orchestration.manifest import (
    COMPLETED,
    PENDING,
    RUNNING,
    SKIPPED,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
)

__all__ = [
    "INTERRUPTED",
    "FoundResult",
    "PlanChange",
    "Reconciliation",
    "ResultFinder",
    "adopt_environment",
    "apply_plan",
    "interrupt_entry",
    "reconcile",
    "resume_text",
]

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
