"""What is left to run: go on with a manifest or start afresh, and the cycles that `--until` adds."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.base.clock import utc_text
from lem.base.dataclass import dataclass, replace
from lem.base.durable import read_sealed, sha256_of
from lem.base.errors import UserError
from lem.base.units import percent, plural, some_of
from lem.config.campaign_config import GROUPED, CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.meters.recompute import recount
from lem.orchestration.grid import config_hash, make_run_id, prompts_fingerprint
from lem.orchestration.journal import find_fact
from lem.orchestration.manifest import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    SKIPPED,
    TOP_UP_NOTE,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)
from lem.orchestration.plan import Plan
from lem.record import CONFIG_FILE
from lem.results.aggregation import measure_precision
from lem.results.configurations import Reading, read_listing, read_numbered
from lem.results.run import Run, make_run
from lem.results.stopping import LEAST_CYCLES, MOST_CYCLES, StoppingRule, Target, read_stopping_rule
from lem.results.store import Repository, folder_names
from lem.worker.prompts import resolve_on_host

_logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
OTHER_NODE = "measured on another node; its cycle started over"
NODE = "node"  # in the environment: the name of the machine
REMOVED = "removed from the campaign file"
BEGUN_BEFORE = "An older lem began this campaign: its order stays {}, and its cycles share their arrivals and prompts"
CHOOSE_HINT = "use --resume to continue it, or --fresh to set it aside and start over"

# A result that is not valid is measured once more, and then counts.
MAX_INVALID_RESULTS = 2

# How many intervals a message names.
_SHOWN = 3


@dataclass(frozen=True)
class RunOptions:
    resume: bool | None = None  # False starts afresh; None decides by the manifest, and asks
    is_yes: bool = False  # resume without asking
    ask: Callable[[str], bool] | None = None  # puts a yes-or-no question to a person; None without a terminal
    is_environment_change_allowed: bool = False  # resume although engine, driver or GPU differ
    is_fail_fast: bool = False  # stop after the first experiment that fails
    run_id: str | None = None  # of a run that was planned for several hosts; None for a run of its own
    until: StoppingRule | None = None  # add cycles by this rule; None runs as many as the campaign has
    resume_command: str = ""  # the command that resumes the campaign; empty when unknown


def check_own_folders(manifest_path: Path, repository: Repository, campaign_name: str) -> None:
    owners = {
        manifest_path.parent: find_fact(manifest_path, "campaign_name"),
        repository.folder: repository.find_campaign_name(),
    }
    for folder, owner in owners.items():
        if owner not in (None, campaign_name):
            hint = "give one of them another campaign_name, or this one another io.state_dir and io.results_dir"
            raise UserError(f"campaign {campaign_name!r}: {folder} belongs to campaign {owner!r}", hint)


def choose_manifest(manager: ManifestManager, campaign_id: str, options: RunOptions) -> CampaignManifest | None:
    manifest = None if options.resume is False else manager.load_strict(campaign_id)
    if manifest is None:
        return None
    if options.run_id is not None and manifest.run_id != options.run_id:
        if options.resume:
            runs = f"belongs to run {manifest.run_id}, but the plan to run {options.run_id}"
            raise UserError(f"{manager.manifest_path} {runs}", CHOOSE_HINT)
        return None
    if options.resume or options.run_id is not None:
        return manifest
    if manifest.is_complete:
        return None
    if options.is_yes:
        return manifest
    # An experiment that was running when its process died is still to be run, too.
    remaining = sum(entry.status not in (COMPLETED, SKIPPED) for entry in manifest.experiments)
    counts = f"{manifest.completed_count} completed, {manifest.failed_count} failed"
    found = f"campaign {manifest.campaign_name} is not finished: {remaining} remaining ({counts})"
    if options.ask is None:
        raise UserError(found, CHOOSE_HINT)
    return manifest if options.ask(f"{found}\nContinue it? (n sets it aside and starts over)") else None


def new_run_id(repository: Repository, manifest_path: Path, now: datetime) -> str:
    known = set(folder_names(repository.folder))
    with contextlib.suppress(OSError):  # there is no state folder yet, or `save` tells what is wrong with it
        for path in manifest_path.parent.iterdir():
            if path.name.startswith(manifest_path.stem) and path.suffix == manifest_path.suffix and path.is_file():
                known.add(find_fact(path, "run_id") or "")
    return make_run_id(now, random.SystemRandom(), known)


def update_manifest(
    manifest: CampaignManifest, plan: Plan, planned: Sequence[CampaignManifestEntry], repository: Repository
) -> list[str]:
    notes = []
    known_hash, change = manifest.config_hash, apply_plan(manifest, planned, plan.config_hash)
    manifest.shuffle_seed = plan.shuffle_seed
    if known_hash != plan.config_hash:
        notes.append(change)

    def results_of(entry: CampaignManifestEntry) -> list[Attempt]:
        found = repository.find_attempts(str(manifest.run_id), entry.exp_id)
        return [
            Attempt(
                item.record.identity.attempt,
                str(item.path),
                item.record.validity.valid,
                host=item.record.identity.host,
                result_sha256=item.sha256,
            )
            for item in found
        ]

    found = reconcile(manifest, results_of)
    for exp_id in found["lost"]:
        _logger.warning("%s: %s; it runs again", exp_id, manifest.get_entry(exp_id).error)
    if found["adopted"]:
        notes.append(f"Results on disk that the manifest did not list: {len(found['adopted'])}, adopted")
    notes.append(resume_text(manifest))
    for entry in manifest.get_by_status(FAILED):
        entry.status = PENDING  # its turn comes again; until then it counts as neither
    return notes


def stored_hashes(manifest: CampaignManifest, plan: Plan, repository: Repository) -> dict[str, str]:
    """The hashes that the manifest has for configurations of the plan, where those of today are others."""
    # They are those of the first build, which counted more options. Where these have changed, what was measured is
    # hashed again, from the `config.json` beside each result; a configuration whose files cannot be read is measured
    # again.
    planned, run_folder = {item.config_hash for item in plan.given}, repository.run_folder(str(manifest.run_id))
    others = [entry for entry in manifest.experiments if entry.config_hash not in planned]
    first = {config_hash(it.config, it.prompts, is_first=True): it.config_hash for it in plan.given if others}
    found = {first[entry.config_hash]: entry.config_hash for entry in others if entry.config_hash in first}
    for entry in others:
        if entry.config_hash in found.values():
            continue
        for path in run_folder.glob(f"{entry.exp_id}/attempt-*/{CONFIG_FILE}"):
            with contextlib.suppress(OSError, ValueError):
                config = ExperimentConfig.from_dict(read_sealed(path).get("resolved", {}))
                digest = config_hash(
                    config, prompts_fingerprint(config, resolve_on_host(config, place := path.parent), place)
                )
                if digest in planned:
                    found.setdefault(digest, entry.config_hash)
    return found


def resume_text(manifest: CampaignManifest) -> str:
    remaining = len(manifest.get_remaining())
    return f"Resuming: {remaining} remaining ({manifest.completed_count} completed, {manifest.failed_count} failed)"


def reconcile(
    manifest: CampaignManifest, find_results: Callable[[CampaignManifestEntry], Sequence[Attempt]]
) -> dict[str, list[str]]:
    """Correct the manifest by the whole results on disk; returns the names of the experiments changed."""
    # They are `interrupted` (were running when their process died, and run again), `adopted` (have a whole result that
    # the manifest had missed) or `lost` (were completed, but their result is gone, or not as it was measured; they run
    # again).
    changes: dict[str, list[str]] = {"interrupted": [], "adopted": [], "lost": []}
    for entry in manifest.experiments:
        change = None if entry.status == SKIPPED else _reconcile_entry(entry, find_results(entry))
        if change is not None:
            changes[change].append(entry.exp_id)
    return changes


def _reconcile_entry(entry: CampaignManifestEntry, results: Sequence[Attempt]) -> str | None:
    was_completed, was_running = entry.status == COMPLETED, entry.status == RUNNING
    digests = {attempt.number: attempt.result_sha256 for attempt in entry.attempts}
    left = {attempt.number for attempt in entry.attempts if attempt.error == OTHER_NODE}
    # One that was changed since it was measured is no result, neither now nor at the next resume.
    results = [
        item for item in results if item.number not in left and digests.get(item.number) in (None, item.result_sha256)
    ]
    if was_completed and any(result.result_path == entry.result_path for result in results):
        _add_digests(entry, results)
        return None
    known = {attempt.number for attempt in entry.attempts if attempt.result_path is not None}
    missed = [result for result in results if was_completed or result.number not in known]
    if was_completed:
        _forget_result(entry)
    if was_running:
        interrupt_entry(entry)
    before = {attempt.number: attempt for attempt in entry.attempts}
    for result in missed:
        old = before.get(result.number, Attempt(result.number, host=entry.host))
        ended_at, host = result.completed_at or old.completed_at, result.host or old.host
        adopted = replace(result, completed_at=ended_at, host=host)
        entry.put_attempt(replace(adopted, started_at=old.started_at, log_path=old.log_path))
    if missed and _settle(entry):
        return "adopted"
    if was_completed:
        return "lost"
    return "interrupted" if was_running else None


def _add_digests(entry: CampaignManifestEntry, results: Iterable[Attempt]) -> None:
    found = {result.number: result.result_sha256 for result in results}
    for attempt in entry.attempts:
        if attempt.result_path is not None and attempt.result_sha256 is None:
            entry.put_attempt(replace(attempt, result_sha256=found.get(attempt.number)))


def forget_lost_results(manifest: CampaignManifest) -> tuple[str, ...]:
    lost = []
    for entry in manifest.get_by_status(COMPLETED):
        path = str(entry.result_path)
        known = next((item.result_sha256 for item in entry.attempts if item.result_path == path), None)
        try:
            found = sha256_of(Path(path))
        except OSError:
            found = ""
        if known != found and (known is not None or not found):
            lost.append(path)
            _forget_result(entry)
    return tuple(lost)


def interrupt_entry(entry: CampaignManifestEntry) -> None:
    entry.status = PENDING
    entry.error = INTERRUPTED
    for attempt in entry.attempts:
        if attempt.result_path is None and attempt.error is None:
            entry.put_attempt(replace(attempt, error=INTERRUPTED))


def _forget_result(entry: CampaignManifestEntry) -> None:
    message = f"result missing, or not as it was measured: {entry.result_path}"
    for attempt in entry.attempts:
        if attempt.result_path is not None and attempt.result_path == entry.result_path:
            entry.put_attempt(replace(attempt, result_path=None, valid=None, error=message))
    entry.status, entry.error, entry.result_path, entry.completed_at = PENDING, message, None, None


def _settle(entry: CampaignManifestEntry) -> bool:
    results = [attempt for attempt in entry.attempts if attempt.result_path is not None]
    chosen = next((attempt for attempt in reversed(results) if attempt.valid), results[-1])
    if not chosen.valid and len(results) < MAX_INVALID_RESULTS:
        return False
    entry.status, entry.error = COMPLETED, None
    entry.result_path, entry.completed_at = chosen.result_path, chosen.completed_at
    return True


def apply_plan(manifest: CampaignManifest, planned: Iterable[CampaignManifestEntry], config_hash: str) -> str:
    """Give the manifest the plan's experiments, in order, and say how it changed; to be followed by `reconcile`."""
    before = {entry.exp_id: entry for entry in manifest.experiments}
    entries = []
    kept = 0
    for entry in planned:
        known = before.pop(entry.exp_id, None)
        entries.append(known or entry)
        if known is None:
            continue
        kept += known.status != SKIPPED
        # Names, place and container do not change the numbers.
        for name in ("config_name", "config_path", "container", "order_index"):
            setattr(known, name, getattr(entry, name))
        if known.status == SKIPPED:
            known.status, known.error = COMPLETED if known.result_path else PENDING, None
    removed = [entry for entry in before.values() if entry.status != SKIPPED]
    for entry in removed:
        entry.status, entry.error = SKIPPED, REMOVED
    manifest.total_experiments = len(entries)
    manifest.experiments = [*entries, *before.values()]
    manifest.config_hash = config_hash
    counts = f"{kept} experiments unchanged, {len(entries) - kept} new, {len(removed)} removed (marked skipped)"
    return f"Campaign changed since the manifest was written: {counts}"


def adopt_environment(
    manifest: CampaignManifest, current: Mapping[str, Any], *, is_change_allowed: bool, now: datetime
) -> tuple[str, ...]:
    """How the environment differs from the manifest's, which takes it over; UserError unless that is allowed.

    A node of another kind never is. On another node of the same kind, the cycle that is not finished starts over.
    """
    known, has_results = manifest.environment, any(entry.result_path for entry in manifest.experiments)
    node = current.get(NODE, known.get(NODE))
    before = known.get(NODE, node)
    kinds = (known, current) if node == before else (_kind_of(known), _kind_of(current))
    changed = [name for name, value in kinds[1].items() if name in kinds[0] and kinds[0][name] != value]
    lines = tuple(f"{name}: {_show(known[name])} before, {_show(current[name])} now" for name in changed)
    if changed and has_results:
        if node != before:
            what = f"node {node} is of another kind than {before}, where this campaign was measured"
            hint = "resume it on a node of the same kind, or start over with --fresh"
            raise UserError(f"{what}: {'; '.join(lines)}", hint)
        if not is_change_allowed:
            what = "the environment has changed since this campaign began"
            hint = "restore it, start over with --fresh, or record the change with --allow-environment-change"
            raise UserError(f"{what}: {'; '.join(lines)}", hint)
        manifest.notes.append({"at": utc_text(now), "kind": "environment_change", "changes": list(lines)})
    if node != before and has_results:
        again = start_cycles_over(manifest)
        note = {"at": utc_text(now), "kind": "node_change", "before": before, "now": node, "again": again}
        manifest.notes.append(note)
        text = f"node: {before} before, {node} now, where each cycle that was not finished starts over"
        lines = (*lines, f"{text} ({plural(len(again), 'result')} measured again)" if again else text)
    manifest.environment = {**known, **current}
    return lines


def _kind_of(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What nodes of the same kind have in common: no name, and no card's own number."""
    found = {name: value for name, value in environment.items() if name != NODE and not name.endswith(".gpus")}
    limits = {name: value for name, value in found.items() if name.endswith(".power_limits")}
    return found | {name: sorted(item.partition(" ")[2] for item in value) for name, value in limits.items()}


def attempts_left_out(manifest: CampaignManifest) -> list[str]:
    """The folders of the attempts that another node measured of cycles that started over."""
    pairs = ((entry.exp_id, attempt) for entry in manifest.experiments for attempt in entry.attempts)
    return [f"{exp_id}/attempt-{attempt.number}" for exp_id, attempt in pairs if attempt.error == OTHER_NODE]


def start_cycles_over(manifest: CampaignManifest) -> list[str]:
    """Make the completed experiments of cycles that are not finished pending again; their names."""
    unfinished = {entry.cycle_index for entry in manifest.get_remaining()}
    again = [entry for entry in manifest.get_by_status(COMPLETED) if entry.cycle_index in unfinished]
    for entry in again:
        for attempt in entry.attempts:
            if attempt.result_path is not None:
                entry.put_attempt(replace(attempt, result_path=None, valid=None, error=OTHER_NODE))
        entry.status, entry.error, entry.result_path, entry.completed_at = PENDING, OTHER_NODE, None, None
    return [entry.exp_id for entry in again]


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def make_rule(target: Target, max_cycles: int | None) -> StoppingRule:
    most = MOST_CYCLES if max_cycles is None else max_cycles
    if not LEAST_CYCLES <= most <= MOST_CYCLES:
        hint = f"--until needs intervals, which need at least {LEAST_CYCLES} cycles"
        raise UserError(f"--max-cycles: expected {LEAST_CYCLES} to {MOST_CYCLES}, got {most}", hint)
    return StoppingRule(target, LEAST_CYCLES, most)


def check_rule(campaign: CampaignConfig, rule: StoppingRule) -> None:
    execution, daemon = campaign.execution, campaign.daemon
    if daemon is not None and daemon.enabled:
        raise UserError("--until cannot be combined with a daemon", "a daemon repeats the campaign as it is")
    if execution.structure == GROUPED:
        message = "--until adds whole cycles, but structure grouped runs AAA BBB"
        raise UserError(message, "use --structure balanced or shuffled")
    if execution.reuse == "campaign":
        message = "--until needs intervals, but execution.reuse campaign gives none"
        raise UserError(message, "use --set execution.reuse=cycle, which loads the engines again in each cycle")
    if execution.cycles > rule.most_cycles:
        message = f"{execution.cycles} cycles are planned, more than --max-cycles {rule.most_cycles}"
        raise UserError(message, "lower --cycles or raise --max-cycles")


def run_of(manifest: CampaignManifest, repository: Repository) -> Run:
    run_id = str(manifest.run_id)
    planned = {entry.exp_id for entry in manifest.experiments if entry.status != SKIPPED}
    records = (item.record for item in repository.scan(run_id, reading=Reading(recount=recount)).results)
    return make_run(
        [record for record in records if record.identity.experiment_id in planned],
        failed=Counter(entry.config_name for entry in manifest.get_by_status(FAILED)),
        campaign_name=manifest.campaign_name,
        run_id=run_id,
        stopping=read_stopping_rule(repository.run_folder(run_id)),
        listing=read_listing(repository.run_folder(run_id)),
        numbered=read_numbered(repository.run_folder(run_id)),
    )


def needs_cycle(run: Run, rule: StoppingRule, cycles: int) -> tuple[bool, str]:
    if run.records:  # no cycle adds to what an earlier node measured
        node = max((it.identity for it in run.records), key=lambda it: (it.cycle_index, it.attempt)).machine
        run = replace(run, records=tuple(it for it in run.records if it.identity.machine == node))
    found, goal = measure_precision(run, rule), rule.target.goal if rule.target else ""
    details = f"({found.metric}, t intervals at {percent(rule.alpha)})"
    without = [f"{name} ({reason})" for name, reason in found.without.items()]
    left_out = f"; ignored, without an interval: {some_of(without, _SHOWN)}" if without else ""
    if not found.wide:
        text = f"{goal} after {cycles} cycles {details}" if found.narrow else "no cycle is added"
        text += "" if found.narrow or found.without else ": there are no results"
        return False, f"Top-up: {text}{left_out}"
    not_yet = f"not yet: {goal} {details}: {some_of(found.widest, _SHOWN)}{left_out}"
    if cycles >= rule.most_cycles:
        return False, f"Top-up: {cycles} cycles is the maximum; {not_yet}"
    return True, f"Top-up: adding cycle {cycles + 1}; {not_yet}"


def tested_cycles(manifest: CampaignManifest) -> int:
    measured = {entry.cycle_index for entry in manifest.experiments if entry.result_path}
    return max((it.cycle_index + 1 for it in manifest.experiments if it.status != SKIPPED), default=0) * (
        len(measured) > 1
    )


def added_cycles(manifest: CampaignManifest) -> int:
    notes = (note for note in manifest.notes if note.get("kind") == TOP_UP_NOTE)
    return max((note["cycles"] for note in notes if isinstance(note.get("cycles"), int)), default=0)
