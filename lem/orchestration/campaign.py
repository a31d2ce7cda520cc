"""A campaign from plan to results: what runs next, where it is written down, and what ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from lem.base.clock import utc_now, utc_text
from lem.base.errors import InfrastructureError, UserError
from lem.config.campaign_config import CampaignConfig
from lem.config.load import complete_campaign
from lem.orchestration import resume
from lem.orchestration.host_meters import HostMeters
from lem.orchestration.locks import Holder, LockTarget, default_gpu_lock_folder, hold_locks, lock_targets
from lem.orchestration.loop import ExperimentLoop
from lem.orchestration.manifest import SKIPPED, TOP_UP_NOTE, CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.names import make_run_id
from lem.orchestration.plan import CampaignExperiment, GapKind, Plan, build_plan, prolong_plan, write_configs
from lem.orchestration.resume import RunOptions
from lem.orchestration.schedule import CampaignOutcome, Stopped, StopRequest
from lem.orchestration.session import Executor, LocalExecutor, Session, check_supported, gpus_of
from lem.orchestration.status import ActivityWriter, Observer
from lem.record import Record
from lem.results.store import Repository, write_stopping_rule

__all__ = ["CampaignExperiment", "CampaignOutcome", "CampaignRunner", "RunOptions"]

_logger = logging.getLogger(__name__)


@dataclass
class CampaignRunner:
    """Plans a campaign and runs it, once or again and again.

    Attributes:
        campaign: what to run.
        plan: the experiments; made from the campaign when not given.
        executor: where they run; this Python when not given.
        observe: receives every event.
        stop: ends the run early.
        options: for the next run.
        now: the time of day, aware.
        monotonic: seconds that never go back.
        host: the name of this host in records.
        meters: of this host; found when not given.
    """

    campaign: CampaignConfig
    plan: Plan | None = None
    executor: Executor | None = None
    observe: Observer = lambda _event: None
    stop: StopRequest = field(default_factory=StopRequest)
    options: RunOptions = field(default_factory=RunOptions)
    now: Callable[[], datetime] = utc_now
    monotonic: Callable[[], float] = time.monotonic
    host: str = field(default_factory=socket.gethostname)
    meters: HostMeters | None = None
    _is_reserved: bool = field(default=False, init=False)

    def generate_execution_order(self) -> list[CampaignExperiment]:
        """Every experiment of every cycle, in the order to run."""
        return list(self._planned().experiments)

    def generate_execution_order_from_grid(self) -> list[CampaignExperiment]:
        """The same for the grid alone; [] without a grid.

        Raises:
            ConfigurationError: prompts that cannot be used.
        """
        if self.campaign.grid is None:
            return []
        return list(build_plan(replace(self.campaign, configs=(), experiments=())).experiments)

    def create_manifest(self, execution_order: Sequence[CampaignExperiment]) -> CampaignManifest:
        """A new manifest with a new run_id, not yet saved."""
        return self._manifest_of(replace(self._planned(), experiments=tuple(execution_order)))

    def apply_resume_filter(
        self, manifest: CampaignManifest, execution_order: Sequence[CampaignExperiment]
    ) -> list[CampaignExperiment]:
        """The experiments that are still to run, in order, each with its manifest entry."""
        remaining = {entry.exp_id: entry for entry in manifest.get_remaining()}
        return [
            replace(item, manifest_entry=remaining[item.exp_id]) for item in execution_order if item.exp_id in remaining
        ]

    def should_health_check(self, experiment_index: int) -> bool:
        """Whether `interval_experiments` asks for a check before the experiment at this place of the order (from 0)."""
        check = self.campaign.health_check
        every = check.interval_experiments
        return check.enabled and every > 0 and experiment_index > 0 and experiment_index % every == 0

    def is_check_due(self, experiment_index: int, gap: GapKind | None) -> bool:
        """Whether containers are checked before an experiment: when a cycle or block begins, and at the interval."""
        begins = gap != "configuration"
        return self.campaign.health_check.enabled and (begins or self.should_health_check(experiment_index))

    def should_cold_start(self) -> bool:
        """Whether every experiment gets a worker of its own."""
        return self.campaign.cold_start.force_cold_start or self.campaign.cold_start.restart_container

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the campaign's lock within the block, so that no other process runs it between two runs either.

        Raises:
            UserError: the state folder cannot be written.
            LockedError: another process runs the campaign.
        """
        with hold_locks(self._locks(())[:1], self._holder()):
            self._is_reserved = True
            try:
                yield
            finally:
                self._is_reserved = False

    def settle_opening(self) -> None:
        """Decide now, and ask now, how the next run is to begin; to be called within `reserved`.

        Raises:
            UserError: as `choose_manifest`.
        """
        manifest = resume.choose_manifest(self._manager(), self.campaign.campaign_id, self.options)
        self.options = replace(self.options, resume=manifest is not None)

    def check(self) -> None:
        """Check that the campaign can run here: results can be written, and every backend has its engine.

        Raises:
            UserError: it cannot.
            Interrupted: a stop was requested.
        """
        plan = self._planned()
        check_supported(self.campaign, self._place().name)
        self._repository.check_writable()
        with self._session(self.create_manifest(())) as session:
            session.find_environment(plan.experiments)

    def run(self, *, deadline_s: float | None = None) -> CampaignOutcome:
        """How the run ended; results and manifest are on disk.

        Args:
            deadline_s: no experiment begins after it, on the clock of `monotonic`.

        Raises:
            UserError: it cannot begin: folders, manifest, environment, no backend.
            LockedError: another campaign runs, under this name or on these GPUs.
            Interrupted: a stop was requested before it began, or a second time.
        """
        plan, until = self._planned(), self.options.until
        check_supported(self.campaign, self._place().name)
        if until is not None:
            resume.check_rule(self.campaign, until)
            plan = self._prolonged(plan, until.least_cycles)
        self._repository.check_writable()
        with contextlib.ExitStack() as stack:
            if not self._is_reserved:
                stack.enter_context(self.reserved())
            stack.enter_context(hold_locks(self._locks(gpus_of(plan))[1:], self._holder()))
            return self._run_locked(plan, deadline_s)

    def _run_locked(self, plan: Plan, deadline_s: float | None) -> CampaignOutcome:
        manager = self._manager()
        manager.remove_leftovers()
        known = resume.choose_manifest(manager, self.campaign.campaign_id, self.options)
        manifest, plan, notes = self._begin(manager, known, plan)
        with contextlib.ExitStack() as stack, self._session(manifest) as session:
            remaining = self.apply_resume_filter(manifest, plan.experiments)
            self._check_environment(session, manifest, remaining)
            with manager.saving(UserError, "free some space or make the folder writable"):
                write_configs(plan.configurations)
                aside = manager.set_aside() if known is None else None
                manager.save(manifest)
            if aside is not None:
                notes = (*notes, f"The earlier manifest is now {aside}")
            go_on, run_id = self.options.resume_command, str(manifest.run_id)
            activity = ActivityWriter(
                self._state_folder, run_id, self._holder(), self.observe, self.now, self.monotonic, go_on
            )
            stack.enter_context(activity.ending_on_error())
            loop = self._loop(manager, session, activity)
            loop.report(
                "campaign_started",
                campaign=manifest.campaign_name,
                run_id=manifest.run_id,
                opening="fresh" if known is None else "resume",
                remaining=len(remaining),
                manifest=str(manager.manifest_path),
                results=str(self._repository.folder),
            )
            for text in notes:
                loop.report("note", text=text)
            if not remaining:
                self._place().clear()
            outcome = loop.run_to_end(remaining, deadline_s)
            if self.options.until is not None:
                outcome = self._top_up(loop, plan, outcome, deadline_s, has_run=bool(remaining))
        stopped = outcome.stopped.value if outcome.stopped else None
        activity.end(stopped, outcome.error.message if outcome.error else outcome.remark)
        loop.report("campaign_finished", stopped=stopped, **({"remark": outcome.remark} if outcome.remark else {}))
        return outcome

    def _begin(
        self, manager: ManifestManager, known: CampaignManifest | None, plan: Plan
    ) -> tuple[CampaignManifest, Plan, tuple[str, ...]]:
        """The manifest, not yet saved, the plan it has, and notes about it for a person."""
        if known is None:
            missed = f"Nothing to resume: no manifest at {manager.manifest_path}"
            return self._manifest_of(plan), plan, (missed,) if self.options.resume else ()
        plan = self._prolonged(plan, resume.added_cycles(known))
        notes = resume.update_manifest(
            known,
            self._new_entries(plan.experiments),
            self._repository,
            config_hash=plan.config_hash,
            shuffle_seed=plan.shuffle_seed,
        )
        return known, plan, notes

    def _top_up(
        self, loop: ExperimentLoop, plan: Plan, outcome: CampaignOutcome, deadline_s: float | None, *, has_run: bool
    ) -> CampaignOutcome:
        """How the run ended, after cycles were added to it for as long as the rule asks for them.

        Args:
            outcome: of the cycles planned.
            has_run: experiments ran in this session, so that a gap comes before the next.
        """
        rule, manifest = self.options.until, loop.session.manifest
        if rule is None:
            raise ValueError("no rule to add cycles by")
        try:
            write_stopping_rule(self._repository.folder / str(manifest.run_id), rule)
            while outcome.stopped is None:
                cycles = plan.execution.cycles
                is_needed, reason = resume.needs_cycle(self._records_of(manifest), rule, cycles)
                outcome = replace(outcome, remark=reason)
                if not is_needed:
                    return replace(outcome, signum=self.stop.signum)
                loop.report("note", text=reason)
                stopped = loop.why_stop(deadline_s)
                if stopped is not None:
                    return replace(outcome, stopped=stopped, signum=self.stop.signum)
                plan = self._prolonged(plan, cycles + 1)
                added = self._add_experiments(manifest, plan, reason)
                if not has_run:
                    self._check_environment(loop.session, manifest, added)
                loop.save()
                loop.session.campaign = resume.with_cycles(self.campaign, cycles + 1)
                outcome = loop.run_to_end(added, deadline_s, "cycle" if has_run else None)
                has_run = True
        except InfrastructureError as error:
            return replace(outcome, stopped=Stopped.INFRASTRUCTURE, error=error)
        return outcome

    def _add_experiments(self, manifest: CampaignManifest, plan: Plan, reason: str) -> list[CampaignExperiment]:
        """Add the experiments of the plan's last cycle to the manifest, with a note that a resume reads."""
        resume.apply_plan(manifest, self._new_entries(plan.experiments), plan.config_hash)
        cycles = plan.execution.cycles
        manifest.notes.append({"at": utc_text(self.now()), "kind": TOP_UP_NOTE, "cycles": cycles, "reason": reason})
        return self.apply_resume_filter(manifest, [item for item in plan.experiments if item.cycle_index == cycles - 1])

    def _manifest_of(self, plan: Plan) -> CampaignManifest:
        manifest = self._manager().create_manifest(
            self.campaign.campaign_id,
            self.campaign.campaign_name,
            plan.config_hash,
            self._new_entries(plan.experiments),
        )
        manifest.run_id = self.options.run_id or make_run_id(self.now(), random.SystemRandom())
        manifest.shuffle_seed = plan.shuffle_seed
        return manifest

    def _records_of(self, manifest: CampaignManifest) -> list[Record]:
        """The whole results of the run that are in its plan."""
        planned = {entry.exp_id for entry in manifest.experiments if entry.status != SKIPPED}
        scan = self._repository.scan(str(manifest.run_id))
        return [item.record for item in scan.results if item.record.identity.experiment_id in planned]

    def _prolonged(self, plan: Plan, cycles: int) -> Plan:
        """The plan with at least that many cycles."""
        if plan.execution.cycles >= cycles:
            return plan
        return prolong_plan(plan, resume.with_cycles(self.campaign, cycles))

    def _loop(self, manager: ManifestManager, session: Session, observe: Observer) -> ExperimentLoop:
        def save() -> None:
            with manager.saving(InfrastructureError, "free some space, then continue with --resume; results are kept"):
                manager.save(session.manifest)

        return ExperimentLoop(
            session,
            save,
            observe,
            is_cold=self.should_cold_start(),
            is_fail_fast=self.options.is_fail_fast,
            is_check_due=self.is_check_due,
        )

    def _place(self) -> Executor:
        """The executor, this Python by default."""
        if self.executor is None:
            self.executor = LocalExecutor()
        return self.executor

    def _session(self, manifest: CampaignManifest) -> Session:
        if self.meters is None:  # kept, since what they learn of the devices holds for every run
            self.meters = HostMeters.found()
        return Session(
            self.campaign,
            manifest,
            self._place(),
            self._repository,
            self.meters,
            self.host,
            self.stop,
            self.now,
            self.monotonic,
        )

    def _check_environment(
        self, session: Session, manifest: CampaignManifest, remaining: Sequence[CampaignExperiment]
    ) -> None:
        """Start the workers and check that they have their engines, the same ones as before."""
        current = session.find_environment(remaining)
        lines = resume.adopt_environment(
            manifest, current, is_change_allowed=self.options.is_environment_change_allowed, now=self.now()
        )
        for line in lines:
            _logger.warning("the environment changed: %s", line)

    def _planned(self) -> Plan:
        if self.plan is None:
            self.plan = build_plan(self.campaign, complete_campaign(self.campaign).listed)
        return self.plan

    @property
    def _repository(self) -> Repository:
        return Repository(Path(self.campaign.io.results_dir), self.campaign.slug)

    @property
    def _state_folder(self) -> Path:
        return Path(self.campaign.io.state_dir) / self.campaign.slug

    def _manager(self) -> ManifestManager:
        return ManifestManager(self._state_folder / self.campaign.io.manifest_filename, now=self.now)

    def _locks(self, gpus: Sequence[str]) -> tuple[LockTarget, ...]:
        """The campaign's own, then the GPUs'."""
        folder = default_gpu_lock_folder(os.environ)
        return lock_targets(self._state_folder, self.campaign.campaign_name, gpus, folder)

    def _holder(self) -> Holder:
        return Holder(os.getpid(), self.host, self.campaign.campaign_name, utc_text(self.now()))

    def _new_entries(self, order: Sequence[CampaignExperiment]) -> list[CampaignManifestEntry]:
        entries = [item.new_entry() for item in order]
        for entry in entries:
            entry.host = self.host
            entry.container = entry.backend if self._place().name == "docker" else None
        return entries
