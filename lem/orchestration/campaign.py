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
from lem.orchestration import resume, topup
from lem.orchestration.dispatch import Executor, LocalExecutor
from lem.orchestration.host_meters import HostMeters
from lem.orchestration.locks import Holder, LockTarget, default_gpu_lock_folder, hold_locks, lock_targets
from lem.orchestration.loop import CampaignOutcome, ExperimentLoop, Stopped
from lem.orchestration.manifest import SKIPPED, CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.names import make_run_id
from lem.orchestration.order import GapKind
from lem.orchestration.plan import CampaignExperiment, Plan, build_plan, prolong_plan, write_configs
from lem.orchestration.resume import Opening, RunOptions, Wish, choose_opening, go_on_with
from lem.orchestration.schedule import StopRequest
from lem.orchestration.session import RunIdentity, Session, check_supported, find_environment, gpus_of
from lem.orchestration.status import ACTIVITY_NAME, ActivityWriter, Observer
from lem.record import Record
from lem.results.precision import write_stopping_rule
from lem.results.store import Repository

__all__ = ["CampaignExperiment", "CampaignOutcome", "CampaignRunner", "RunOptions"]


_logger = logging.getLogger(__name__)


@dataclass
class CampaignRunner:
    """Plans a campaign and runs it, once or again and again.

    Attributes:
        campaign: what to run.
        plan: the experiments; made of the campaign when not given.
        executor: where they run; this Python when not given.
        observe: is told what happens.
        meters: of this host; looked for when not given.
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
        """The same of the grid alone; [] without a grid.

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
        """Whether containers are looked at before the experiment at this place of the order (from 0)."""
        check = self.campaign.health_check
        every = check.interval_experiments
        return check.enabled and every > 0 and experiment_index > 0 and experiment_index % every == 0

    def is_check_due(self, experiment_index: int, gap: GapKind | None) -> bool:
        """Whether containers are looked at before an experiment: when a cycle or block begins, and every so many."""
        begins = gap != "configuration"
        return self.campaign.health_check.enabled and (begins or self.should_health_check(experiment_index))

    def should_cold_start(self) -> bool:
        """Whether every experiment gets a worker of its own."""
        return self.campaign.cold_start.force_cold_start or self.campaign.cold_start.restart_container

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the campaign's lock within the block, so that nobody else runs it between two runs either.

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
        """Find out now, and ask now, how the next run is to begin; to be called within `reserved`.

        Raises:
            UserError: as `choose_opening`.
        """
        opening, _ = self._choose_opening(self._manager())
        self.options = replace(self.options, wish=Wish.RESUME if opening is Opening.RESUME else Wish.FRESH)

    def check(self) -> None:
        """See that the campaign can run here: results can be written, and every backend has its engine.

        Raises:
            UserError: it cannot.
            Interrupted: a stop was asked for.
        """
        plan = self._planned()
        check_supported(self.campaign, self._executor_name())
        self._repository().check_writable()
        with self._session(self.create_manifest(())) as session:
            find_environment(session, plan.experiments)

    def run(self, *, deadline_s: float | None = None) -> CampaignOutcome:
        """How the run ended; results and manifest are on disk.

        Args:
            deadline_s: no experiment begins after it, on the clock of `monotonic`.

        Raises:
            UserError: it cannot begin: folders, manifest, environment, no backend.
            LockedError: another campaign runs, under this name or on these GPUs.
            Interrupted: a stop was asked for before it had begun, or a second time.
        """
        plan = self._planned()
        check_supported(self.campaign, self._executor_name())
        if self.options.until is not None:
            topup.check_rule(self.campaign, self.options.until)
            plan = self._prolonged(plan, self.options.until.least_cycles)
        repository = self._repository()
        repository.check_writable()
        with contextlib.ExitStack() as stack:
            if not self._is_reserved:
                stack.enter_context(self.reserved())
            stack.enter_context(hold_locks(self._locks(gpus_of(plan))[1:], self._holder()))
            return self._run_locked(plan, repository, deadline_s)

    def _run_locked(self, plan: Plan, repository: Repository, deadline_s: float | None) -> CampaignOutcome:
        manager = self._manager()
        manager.remove_leftovers()
        opening, manifest, plan, told = self._open_manifest(manager, repository, plan)
        with contextlib.ExitStack() as stack, self._session(manifest) as session:
            remaining = self.apply_resume_filter(manifest, plan.experiments)
            self._check_environment(session, manifest, remaining)
            with manager.saving(UserError, "make room or make the folder writable"):
                write_configs(plan.configurations)
                aside = manager.set_aside() if opening is Opening.FRESH else None
                manager.save(manifest)
            if aside is not None:
                told = (*told, f"The manifest of before is now {aside}")
            activity = self._activity(manifest)
            stack.enter_context(activity.ending_on_error())
            loop = self._loop(manager, manifest, session, activity)
            loop.tell(
                "campaign_started",
                campaign=manifest.campaign_name,
                run_id=manifest.run_id,
                opening=opening.value,
                remaining=len(remaining),
                manifest=str(manager.manifest_path),
                results=str(repository.folder),
            )
            for text in told:
                loop.tell("note", text=text)
            if not remaining:
                session.clear()
            outcome = loop.run_to_end(remaining, deadline_s)
            if self.options.until is not None:
                outcome = self._top_up(loop, plan, outcome, deadline_s, has_run=bool(remaining))
        message = outcome.error.message if outcome.error else outcome.remark
        activity.end(outcome.stopped.value if outcome.stopped else None, message)
        remark = {"remark": outcome.remark} if outcome.remark else {}
        loop.tell("campaign_finished", stopped=outcome.stopped.value if outcome.stopped else None, **remark)
        return outcome

    def _top_up(
        self, loop: ExperimentLoop, plan: Plan, outcome: CampaignOutcome, deadline_s: float | None, *, has_run: bool
    ) -> CampaignOutcome:
        """How the run ended, after cycles were added to it for as long as the rule says.

        Args:
            outcome: of the cycles planned.
            has_run: experiments ran in this session, so that a gap is due before the next.
        """
        rule, manifest, run_id = self.options.until, loop.manifest, str(loop.manifest.run_id)
        if rule is None:
            raise ValueError("no rule to add cycles by")
        try:
            write_stopping_rule(self._repository().folder / run_id, rule)
            while outcome.stopped is None:
                cycles = plan.execution.cycles
                decision = topup.decide(self._records_of(manifest), rule, cycles)
                if decision.is_due:
                    loop.tell("note", text=decision.text)
                outcome = replace(outcome, remark=decision.text)
                stopped = loop.why_stop(deadline_s) if decision.is_due else None
                if stopped is not None or not decision.is_due:
                    return replace(outcome, stopped=stopped, signum=self.stop.signum)
                plan = self._prolonged(plan, cycles + 1)
                added = self._add_experiments(manifest, plan, decision.text)
                if not has_run:
                    self._check_environment(loop.session, manifest, added)
                loop.save()
                loop.campaign = topup.with_cycles(self.campaign, cycles + 1)
                outcome = loop.run_to_end(added, deadline_s, "cycle" if has_run else None)
                has_run = True
        except InfrastructureError as error:
            return replace(outcome, stopped=Stopped.INFRASTRUCTURE, error=error)
        return outcome

    def _add_experiments(self, manifest: CampaignManifest, plan: Plan, reason: str) -> list[CampaignExperiment]:
        """The experiments that the plan has beyond the manifest, which has them now too."""
        resume.apply_plan(manifest, self._new_entries(plan.experiments), plan.config_hash)
        topup.note_cycles(manifest, plan.execution.cycles, utc_text(self.now()), reason)
        last = [item for item in plan.experiments if item.cycle_index == plan.execution.cycles - 1]
        return self.apply_resume_filter(manifest, last)

    def _manifest_of(self, plan: Plan) -> CampaignManifest:
        """A new manifest of a plan, with a new run_id."""
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
        scan = self._repository().scan(str(manifest.run_id))
        return [item.record for item in scan.results if item.record.identity.experiment_id in planned]

    def _prolonged(self, plan: Plan, cycles: int) -> Plan:
        """The plan with at least so many cycles."""
        if plan.execution.cycles >= cycles:
            return plan
        return prolong_plan(plan, topup.with_cycles(self.campaign, cycles))

    def _activity(self, manifest: CampaignManifest) -> ActivityWriter:
        return ActivityWriter(
            self._state_folder() / ACTIVITY_NAME,
            str(manifest.run_id),
            self._holder(),
            self.observe,
            now=self.now,
            monotonic=self.monotonic,
            go_on=self.options.go_on,
        )

    def _loop(
        self, manager: ManifestManager, manifest: CampaignManifest, session: Session, observe: Observer
    ) -> ExperimentLoop:
        def save() -> None:
            remedy = "make room, then go on with --resume; what is measured is kept"
            with manager.saving(InfrastructureError, remedy):
                manager.save(manifest)

        return ExperimentLoop(
            campaign=self.campaign,
            manifest=manifest,
            save=save,
            session=session,
            observe=observe,
            stop=self.stop,
            now=self.now,
            monotonic=self.monotonic,
            is_cold=self.should_cold_start(),
            is_fail_fast=self.options.is_fail_fast,
            is_check_due=self.is_check_due,
        )

    def _open_manifest(
        self, manager: ManifestManager, repository: Repository, plan: Plan
    ) -> tuple[Opening, CampaignManifest, Plan, tuple[str, ...]]:
        """How it begins, the manifest, not yet saved, the plan it has, and what to tell a person about it."""
        opening, manifest = self._choose_opening(manager)
        if opening is Opening.FRESH or manifest is None:
            is_missed = self.options.wish is Wish.RESUME
            told: tuple[str, ...] = (f"Nothing to resume: no manifest at {manager.manifest_path}",) if is_missed else ()
            return Opening.FRESH, self._manifest_of(plan), plan, told
        plan = self._prolonged(plan, topup.added_cycles(manifest))
        told = go_on_with(
            manifest,
            self._new_entries(plan.experiments),
            repository,
            config_hash=plan.config_hash,
            shuffle_seed=plan.shuffle_seed,
        )
        return opening, manifest, plan, told

    def _choose_opening(self, manager: ManifestManager) -> tuple[Opening, CampaignManifest | None]:
        options = self.options
        return choose_opening(
            manager,
            self.campaign.campaign_id,
            options.wish,
            is_yes=options.is_yes,
            ask=options.ask,
            run_id=options.run_id,
        )

    def _session(self, manifest: CampaignManifest) -> Session:
        return Session(
            self.executor or LocalExecutor(),
            self._repository(),
            RunIdentity.of(manifest, self.host),
            self.campaign.execution,
            stop=self.stop,
            now=self.now,
            meters=self._host_meters(),
        )

    def _host_meters(self) -> HostMeters:
        """The meters of this host; what they have learned of its devices holds for every run."""
        if self.meters is None:
            self.meters = HostMeters.found()
        return self.meters

    def _check_environment(
        self, session: Session, manifest: CampaignManifest, remaining: Sequence[CampaignExperiment]
    ) -> None:
        """Start the workers and see that they have their engines, the same ones as before."""
        current = find_environment(session, remaining)
        lines = resume.adopt_environment(
            manifest, current, is_change_allowed=self.options.is_environment_change_allowed, now=self.now()
        )
        for line in lines:
            _logger.warning("the environment changed: %s", line)

    def _executor_name(self) -> str:
        return LocalExecutor.name if self.executor is None else self.executor.name

    def _planned(self) -> Plan:
        if self.plan is None:
            self.plan = build_plan(self.campaign, complete_campaign(self.campaign).listed)
        return self.plan

    def _repository(self) -> Repository:
        return Repository(Path(self.campaign.io.results_dir), self.campaign.slug)

    def _state_folder(self) -> Path:
        return Path(self.campaign.io.state_dir) / self.campaign.slug

    def _manager(self) -> ManifestManager:
        return ManifestManager(self._state_folder() / self.campaign.io.manifest_filename, now=self.now)

    def _locks(self, gpus: Sequence[str]) -> tuple[LockTarget, ...]:
        """The campaign's own, then the GPUs'."""
        folder = default_gpu_lock_folder(os.environ)
        return lock_targets(self._state_folder(), self.campaign.campaign_name, gpus, folder)

    def _holder(self) -> Holder:
        return Holder(os.getpid(), self.host, self.campaign.campaign_name, utc_text(self.now()))

    def _new_entries(self, order: Sequence[CampaignExperiment]) -> list[CampaignManifestEntry]:
        entries = [item.new_entry() for item in order]
        for entry in entries:
            entry.host = self.host
            entry.container = entry.backend if self._executor_name() == "docker" else None
        return entries
