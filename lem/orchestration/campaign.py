"""A campaign from plan to results: what runs next, where it is written down, and what ends it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lem.base.clock import describe_future, utc_text
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import InfrastructureError, Interrupted, LockedError, UserError
from lem.config.load import complete_campaign
from lem.meters.control import note_path
from lem.meters.hwmon import metered_gpus
from lem.meters.machine import named_gpus
from lem.orchestration import gpu_control, preflight, resume
from lem.orchestration.dispatch import WorkerUnavailable
from lem.orchestration.locks import Holder, campaign_lock, gpu_locks, hold_locks
from lem.orchestration.manifest import TOP_UP_NOTE, CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.plan import Experiment, Plan, build_plan, write_configs
from lem.orchestration.schedule import CampaignOutcome, Stopped
from lem.orchestration.session import Context, Session
from lem.orchestration.status import ActivityWriter
from lem.orchestration.systemd import find_secrets
from lem.results.configurations import write_listing
from lem.results.stopping import StoppingRule, next_stage, read_stopping_rule, write_stopping_rule
from lem.worker.recording import read_host

__all__ = ["CampaignExperiment", "CampaignRunner"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CampaignExperiment(Experiment):
    """An experiment of the plan and, once there is one, its entry in the manifest."""

    manifest_entry: CampaignManifestEntry | None = None

    @classmethod
    def of(cls, item: Experiment, entry: CampaignManifestEntry | None = None) -> CampaignExperiment:
        """An experiment with its entry."""
        return cls(**{name: getattr(item, name) for name in Experiment.__slots__}, manifest_entry=entry)


@dataclass
class CampaignRunner(Context):
    """Plans a campaign and runs it, once or again and again.

    Attributes:
        plan: the experiments; made from the campaign when not given.
    """

    plan: Plan | None = None
    _is_reserved: bool = field(default=False, init=False)

    def generate_execution_order(self) -> list[CampaignExperiment]:
        """Every experiment of every cycle, in the order to run."""
        return [CampaignExperiment.of(item) for item in self._planned().experiments]

    def generate_execution_order_from_grid(self) -> list[CampaignExperiment]:
        """The same for the grid alone; [] without a grid.

        Raises:
            ConfigurationError: prompts that cannot be used.
        """
        if self.campaign.grid is None:
            return []
        plan = build_plan(replace(self.campaign, configs=(), experiments=()))
        return [CampaignExperiment.of(item) for item in plan.experiments]

    def create_manifest(self, execution_order: Sequence[Experiment]) -> CampaignManifest:
        """A new manifest with a new run_id, not yet saved."""
        return self._new_manifest(replace(self._planned(), experiments=tuple(execution_order)))

    def apply_resume_filter(
        self, manifest: CampaignManifest, execution_order: Sequence[Experiment]
    ) -> list[CampaignExperiment]:
        """The experiments that are still to run, in order, each with its manifest entry."""
        remaining = {entry.exp_id: entry for entry in manifest.get_remaining()}
        return [CampaignExperiment.of(one, remaining[one.exp_id]) for one in execution_order if one.exp_id in remaining]

    def should_cold_start(self) -> bool:
        """Whether every experiment gets a worker of its own."""
        return self._planned().is_cold

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the campaign's lock within the block, so that no other process runs it between two runs either.

        Raises:
            UserError: the state folder cannot be written.
            LockedError: another process runs the campaign.
        """
        with hold_locks([campaign_lock(self._state_folder, self.campaign.campaign_name)], self._holder()):
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
        manifest = self._choose_manifest(self._manager())
        self.options = replace(self.options, resume=manifest is not None)

    def check(self) -> None:
        """Check that the campaign can run here: results can be written, and every backend has its engine.

        Raises:
            UserError: it cannot.
            Interrupted: a stop was requested.
        """
        plan = self._planned()
        preflight.check_supported(plan, self.executor.name)
        self.repository.check_writable()
        find_secrets(os.environ)  # raises for one that cannot be used
        with contextlib.ExitStack() as stack:
            if any(item.config.gpu.changed() for item in plan.configurations):
                with contextlib.suppress(LockedError):  # another campaign may use the GPUs until then
                    stack.enter_context(self._locked_gpus(plan))
            stack.enter_context(self._workers())
            self._find_environment(plan.experiments)

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
        preflight.check_supported(plan, self.executor.name, until)
        if until is not None:
            resume.check_rule(self.campaign, until)
            plan = plan.with_cycles(until.least_cycles)
        self.repository.check_writable()
        with contextlib.ExitStack() as stack:
            if not self._is_reserved:
                stack.enter_context(self.reserved())
            self._restore_settings(stack.enter_context(self._locked_gpus(plan)))
            return self._run_locked(plan, deadline_s)

    @contextlib.contextmanager
    def _locked_gpus(self, plan: Plan) -> Iterator[Sequence[str]]:
        # A GPU that is not found here is the worker's to refuse.
        visible = metered_gpus(os.environ)
        gpus = [gpu.uuid for item in plan.configurations for gpu in named_gpus(item.config.gpus, visible)]
        with hold_locks(gpu_locks(gpus, os.environ), self._holder()) as self.control.locks:
            try:
                yield gpus
            finally:
                self.control.locks = ()

    def _restore_settings(self, gpus: Collection[str]) -> None:
        """Restore what runs that were killed left set; a UserError if that fails for a GPU of this run."""
        for left in gpu_control.restore_left(self.meters.environ, gpus):
            if left.error is None:
                _logger.warning("restored what an earlier run left set: %s", left.what)
            elif not isinstance(left.error, LockedError):
                if any(note_path(left.path.parent, uuid) == left.path for uuid in gpus):
                    raise UserError(left.error.message, left.error.hint)
                _logger.warning("%s", left.error)
        for text in gpu_control.left_by_others(self.meters.environ):
            _logger.warning("%s", text)

    def _run_locked(self, plan: Plan, deadline_s: float | None) -> CampaignOutcome:
        manager, rule = self._manager(), self.options.until
        manager.remove_leftovers()
        known = self._choose_manifest(manager)
        if known is None:
            missed = f"Nothing to resume: no manifest at {manager.manifest_path}"
            manifest, notes = self._new_manifest(plan), [missed] if self.options.resume else []
        else:
            plan = plan if known.structure else plan.as_by_older_build()
            plan = plan.with_hashes(resume.stored_hashes(known, plan, self.repository))
            manifest, plan = known, plan.with_cycles(resume.added_cycles(known))
            kept = read_stopping_rule(self.repository.run_folder(str(known.run_id)))
            rule = next_stage(kept, rule, resume.tested_cycles(known), plan.execution.cycles)
            notes = resume.update_manifest(known, plan, self._new_entries(plan.experiments), self.repository)
            notes += [] if known.structure else [resume.BEGUN_BEFORE.format(plan.execution.structure)]
        # One that cannot be used is an error before anything is written.
        secrets = find_secrets(os.environ, plan.secret_names)
        with contextlib.ExitStack() as stack, self._workers():
            remaining = _still_to_run(manifest, plan.experiments)
            self._check_environment(manifest, remaining)
            if len(manifest.get_remaining()) > len(remaining):  # cycles that start over may need other backends, too
                remaining = _still_to_run(manifest, plan.experiments)
                self._check_environment(manifest, remaining)
            with manager.saving(UserError, "free some space or make the folder writable"):
                write_configs(plan.configurations)
                if known is not None and rule is not None:
                    write_stopping_rule(self.repository.run_folder(str(known.run_id)), rule)
                aside = manager.set_aside() if known is None else None
                manager.save(manifest)
                run_folder = self.repository.run_folder(str(manifest.run_id))
                write_listing(run_folder, plan.listing, left_out=resume.attempts_left_out(manifest))
            if aside is not None:
                notes = [*notes, f"The earlier manifest is now {aside}"]
            who = (self._state_folder, str(manifest.run_id), self._holder())
            activity = ActivityWriter(*who, self.observe, self.now, self.monotonic, self.options.resume_command)
            stack.enter_context(activity.ending_on_error())
            session = Session(self, plan, manager, manifest, activity, secrets)
            session.report(
                "campaign_started",
                campaign=manifest.campaign_name,
                run_id=manifest.run_id,
                opening="fresh" if known is None else "resume",
                remaining=len(remaining),
                manifest=str(manager.manifest_path),
                results=str(self.repository.folder),
            )
            left = replace(plan, experiments=tuple(remaining))
            advice = preflight.gap_advice(left, self.meters.gpu_error)
            for text in filter(None, (*notes, describe_future(str(manifest.run_id), self.now()), advice)):
                session.report("note", text=text)
            if not remaining:
                self.executor.clear()
            outcome = session.run(remaining, deadline_s)
            if self.options.until is not None and rule is not None:
                outcome = self._top_up(session, rule, outcome, deadline_s, has_run=bool(remaining))
            outcome = session.conclude(outcome)
        stopped = outcome.stopped.value if outcome.stopped else None
        activity.end(stopped, outcome.error.message if outcome.error else outcome.remark)
        session.report("campaign_finished", stopped=stopped, **({"remark": outcome.remark} if outcome.remark else {}))
        return outcome

    def _choose_manifest(self, manager: ManifestManager) -> CampaignManifest | None:
        resume.check_own_folders(manager.manifest_path, self.repository, self.campaign.campaign_name)
        return resume.choose_manifest(manager, self.campaign.campaign_id, self.options)

    def _top_up(
        self, session: Session, rule: StoppingRule, outcome: CampaignOutcome, deadline_s: float | None, *, has_run: bool
    ) -> CampaignOutcome:
        """How the run ended, after cycles were added to it for as long as the rule asks for them."""
        manifest, run_id = session.manifest, str(session.manifest.run_id)
        try:
            write_stopping_rule(self.repository.run_folder(run_id), rule)
            while outcome.stopped is None:
                cycles = session.plan.execution.cycles
                if cycles > max(rule.looks, default=0):
                    rule = replace(rule, looks=(*rule.looks, cycles))
                    write_stopping_rule(self.repository.run_folder(run_id), rule)
                is_needed, reason = resume.needs_cycle(resume.run_of(manifest, self.repository), rule, cycles)
                outcome = replace(outcome, remark=reason)
                if not is_needed:
                    return replace(outcome, signum=self.stop.signum)
                session.report("note", text=reason)
                stopped = session.why_stop(deadline_s)
                if stopped is not None:
                    return replace(outcome, stopped=stopped, signum=self.stop.signum)
                plan = session.plan = session.plan.with_cycles(cycles + 1)
                resume.apply_plan(manifest, self._new_entries(plan.experiments), plan.config_hash)
                note = {"at": utc_text(self.now()), "kind": TOP_UP_NOTE, "cycles": cycles + 1, "reason": reason}
                manifest.notes.append(note)
                last_cycle = [item for item in plan.experiments if item.cycle_index == cycles]
                added = _still_to_run(manifest, last_cycle)
                if not has_run:
                    self._check_environment(manifest, added)
                session.save()
                outcome = session.run(added, deadline_s, "cycle" if has_run else None)
                has_run = True
        except InfrastructureError as error:
            return replace(outcome, stopped=Stopped.INFRASTRUCTURE, error=error)
        return outcome

    @contextlib.contextmanager
    def _workers(self) -> Iterator[None]:
        try:
            try:
                yield
            except BaseException:
                self.executor.kill()
                raise
            try:
                self.executor.stop()
            except Interrupted:
                self.executor.kill()
        finally:
            self.executor.close()

    def _check_environment(self, manifest: CampaignManifest, remaining: Sequence[Experiment]) -> None:
        current, is_change_allowed = self._find_environment(remaining), self.options.is_environment_change_allowed
        for line in resume.adopt_environment(manifest, current, is_change_allowed=is_change_allowed, now=self.now()):
            _logger.warning("the environment changed: %s", line)

    def _find_environment(self, experiments: Sequence[Experiment]) -> dict[str, Any]:
        """Versions, driver and GPUs of the workers, by name; UserError with all that keeps experiments from running."""
        environment: dict[str, Any] = {resume.NODE: self.node, "cpu": read_host()["cpu"]} if experiments else {}
        found = preflight.Findings(experiments)
        places = {item.place: item.backend for item in experiments}
        found.look_here()
        found.look_at_gpus(may_set=bool(self.control.locks))
        try:
            self.executor.prepare(places)
        except UserError as error:
            if not found.problems:
                raise
            found.add(error.message, error.hint)
        if self.executor.name == "docker":  # no container is started in vain
            preflight.refuse(found.problems)
        try:
            for place, backend in places.items():
                worker = self.executor.worker_for(place)
                worker.open(self.stop)
                label = place.rstrip(":")
                environment.update({f"{label}.{name}": value for name, value in worker.environment.items()})
                if found.look_for_engine(self.executor.name, backend, worker.environment, place):
                    found.ask(place, worker, find_secrets(os.environ), self.stop)
        except WorkerUnavailable as error:  # nothing has run yet: the host is unfit, no experiment has failed
            raise UserError(error.message, error.hint) from error
        preflight.refuse(found.problems)
        return environment

    def _planned(self) -> Plan:
        if self.plan is None:
            self.plan = build_plan(self.campaign, complete_campaign(self.campaign).listed)
        return self.plan

    @property
    def _state_folder(self) -> Path:
        return Path(self.campaign.io.state_dir) / self.campaign.slug / self.part

    def _manager(self) -> ManifestManager:
        return ManifestManager(self._state_folder / self.campaign.io.manifest_filename, now=self.now)

    def _holder(self) -> Holder:
        return Holder(os.getpid(), self.node, self.campaign.campaign_name, utc_text(self.now()))

    def _new_manifest(self, plan: Plan) -> CampaignManifest:
        campaign, new = self.campaign, self._new_entries(plan.experiments)
        manifest = self._manager().create_manifest(campaign.campaign_id, campaign.campaign_name, plan.config_hash, new)
        path = self._manager().manifest_path
        manifest.run_id = self.options.run_id or resume.new_run_id(self.repository, path, self.now())
        manifest.shuffle_seed, manifest.structure = plan.shuffle_seed, plan.execution.structure
        return manifest

    def _new_entries(self, order: Sequence[Experiment]) -> list[CampaignManifestEntry]:
        return [
            CampaignManifestEntry(
                exp_id=item.exp_id,
                config_name=item.config_name,
                config_path=item.config_path,
                config_hash=item.config_hash,
                backend=item.backend,
                container=item.container if self.executor.name == "docker" else None,
                cycle_index=item.cycle_index,
                order_index=item.order_index,
                host=self.host,
            )
            for item in order
        ]


def _still_to_run(manifest: CampaignManifest, order: Sequence[Experiment]) -> list[Experiment]:
    names = {entry.exp_id for entry in manifest.get_remaining()}
    return [item for item in order if item.exp_id in names]
