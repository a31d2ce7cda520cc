"""A campaign from plan to results: what runs next, where it is written down, and what ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from lem.config.campaign_config import CampaignConfig
from lem.config.yamlfile import complete_campaign
from lem.errors import InfrastructureError, Interrupted, LemError, UserError
from lem.experiment.probe import missing_distributions
from lem.meters.gpus import find_gpus
from lem.orchestration import resume
from lem.orchestration.events import Event, Observer
from lem.orchestration.generated import write_configs
from lem.orchestration.identity import make_run_id
from lem.orchestration.locks import Holder, default_gpu_lock_folder, hold_locks, lock_targets
from lem.orchestration.loop import ExperimentLoop, Stopped
from lem.orchestration.manifest import (
    FAILED,
    PENDING,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
    utc_now,
    utc_text,
)
from lem.orchestration.opening import Opening, Wish, choose_opening
from lem.orchestration.plan import CampaignExperiment, Plan, build_plan
from lem.orchestration.session import RunIdentity, Session
from lem.orchestration.stop import StopRequest
from lem.orchestration.workers import Executor, LocalExecutor
from lem.results.repository import Repository

__all__ = ["CampaignExperiment", "CampaignOutcome", "CampaignRunner", "RunOptions"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about this run alone.

    Attributes:
        wish: resume, start afresh, or neither said.
        is_yes: do not ask.
        ask: puts a yes-or-no question to a person; None when nobody is there.
        is_environment_change_allowed: resume although engine, driver or GPU are others.
        is_fail_fast: stop after the first experiment that fails.
    """

    wish: Wish = Wish.UNSAID
    is_yes: bool = False
    ask: Callable[[str], bool] | None = None
    is_environment_change_allowed: bool = False
    is_fail_fast: bool = False


@dataclass(frozen=True)
class CampaignOutcome:
    """How a run of a campaign ended.

    Attributes:
        manifest: as it was last written.
        stopped: why it ended before its end; None when it did not.
        error: what stood in the way, when something did.
        signum: the signal that ended it.
    """

    manifest: CampaignManifest
    stopped: Stopped | None = None
    error: LemError | None = None
    signum: int | None = None


def _ignore(event: Event) -> None:
    """Tell nobody."""


@dataclass
class CampaignRunner:
    """Plans a campaign and runs it.

    Attributes:
        campaign: what to run.
        plan: the experiments; made of the campaign when not given.
        executor: where they run; this Python when not given.
        observe: is told what happens.
    """

    campaign: CampaignConfig
    plan: Plan | None = None
    executor: Executor | None = None
    observe: Observer = _ignore
    stop: StopRequest = field(default_factory=StopRequest)
    options: RunOptions = RunOptions()
    now: Callable[[], datetime] = utc_now
    monotonic: Callable[[], float] = time.monotonic
    host: str = field(default_factory=socket.gethostname)

    def generate_execution_order(self) -> list[CampaignExperiment]:
        """Every experiment of every cycle, in the order to run."""
        return list(self._planned().experiments)

    def generate_execution_order_from_grid(self) -> list[CampaignExperiment]:
        """The same of the grid alone; [] without a grid.

        Raises:
            ConfigurationError: none of the grid's experiments is valid.
        """
        if self.campaign.grid is None:
            return []
        return list(build_plan(replace(self.campaign, configs=(), experiments=())).experiments)

    def create_manifest(self, execution_order: Sequence[CampaignExperiment]) -> CampaignManifest:
        """A new manifest with a new run_id, not yet saved."""
        manifest = self._manager().create_manifest(
            self.campaign.campaign_id,
            self.campaign.campaign_name,
            self._planned().config_hash,
            self._new_entries(execution_order),
        )
        manifest.run_id = make_run_id(self.now(), random.SystemRandom())
        manifest.shuffle_seed = self._planned().shuffle_seed
        return manifest

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

    def should_cold_start(self) -> bool:
        """Whether every experiment gets a worker of its own."""
        return self.campaign.cold_start.force_cold_start or self.campaign.cold_start.restart_container

    def run(self, *, deadline_s: float | None = None) -> CampaignOutcome:
        """How the run ended; results and manifest are on disk.

        Args:
            deadline_s: no experiment begins after it, on the clock of `monotonic`.

        Raises:
            UserError: it cannot begin: folders, manifest, environment, no backend.
            LockedError: another campaign runs, under this name or on these GPUs.
        """
        plan = self._planned()
        self._check_supported()
        state_folder = self._state_folder()
        repository = Repository(Path(self.campaign.io.results_dir), self.campaign.slug)
        repository.check_writable()
        gpus = _gpus_of(plan)
        targets = lock_targets(state_folder, self.campaign.campaign_name, gpus, default_gpu_lock_folder(os.environ))
        holder = Holder(os.getpid(), self.host, self.campaign.campaign_name, utc_text(self.now()))
        with hold_locks(targets, holder):
            return self._run_locked(plan, repository, deadline_s)

    def _run_locked(self, plan: Plan, repository: Repository, deadline_s: float | None) -> CampaignOutcome:
        manager = self._manager()
        manager.remove_leftovers()
        order = list(plan.experiments)
        manifest = self._open_manifest(manager, repository, order)
        executor = self.executor or LocalExecutor()
        session = self._session(manifest, repository, executor)
        with _ending(session):
            if manifest.get_remaining():
                self._check_environment(session, manifest, plan)
            with _disk_errors(manager):
                write_configs(plan.configurations)
                manager.save(manifest)
            remaining = self.apply_resume_filter(manifest, order)
            loop = ExperimentLoop(
                campaign=self.campaign,
                manifest=manifest,
                save=lambda: _save(manager, manifest),
                session=session,
                observe=self.observe,
                stop=self.stop,
                now=self.now,
                monotonic=self.monotonic,
                is_cold=self.should_cold_start(),
                is_fail_fast=self.options.is_fail_fast,
            )
            return self._outcome(loop, remaining, deadline_s)

    def _outcome(
        self, loop: ExperimentLoop, remaining: Sequence[CampaignExperiment], deadline_s: float | None
    ) -> CampaignOutcome:
        manifest = loop.manifest
        loop.tell("campaign_started", run_id=manifest.run_id, remaining=len(remaining))
        stopped, error, signum = None, None, None
        try:
            stopped = loop.run(remaining, deadline_s)
            signum = self.stop.signum
        except Interrupted as interrupted:
            stopped, signum = Stopped.SIGNAL, interrupted.signum
        except InfrastructureError as infrastructure:
            stopped, error = Stopped.INFRASTRUCTURE, infrastructure
        loop.tell("campaign_finished", stopped=stopped.value if stopped else None)
        return CampaignOutcome(manifest, stopped, error, signum if stopped is Stopped.SIGNAL else None)

    def _open_manifest(
        self, manager: ManifestManager, repository: Repository, order: Sequence[CampaignExperiment]
    ) -> CampaignManifest:
        options = self.options
        opening, manifest = choose_opening(
            manager, self.campaign.campaign_id, options.wish, is_yes=options.is_yes, ask=options.ask
        )
        if opening is Opening.FRESH or manifest is None:
            with _disk_errors(manager):
                aside = manager.set_aside()
            if aside is not None:
                _logger.info("the manifest of before is now %s", aside)
            return self.create_manifest(order)
        config_hash = self._planned().config_hash
        is_changed = manager.check_config_changed(manifest, config_hash)
        change = resume.apply_plan(manifest, self._new_entries(order), config_hash)
        if is_changed:
            self._note(manifest, change.describe())
        found = resume.reconcile(manifest, lambda entry: _results_of(repository, manifest, entry))
        for exp_id in found.lost:
            _logger.warning("%s: %s; it runs again", exp_id, manifest.get_entry(exp_id).error)
        for exp_id in found.adopted:
            _logger.info("%s: its result was whole and is adopted", exp_id)
        self._note(manifest, resume.resume_text(manifest))
        for entry in manifest.get_by_status(FAILED):
            entry.status = PENDING  # its turn comes again; until then it counts as neither
        return manifest

    def _note(self, manifest: CampaignManifest, text: str) -> None:
        self.observe(Event("note", manifest.completed_count, manifest.total_experiments, data={"text": text}))

    def _session(self, manifest: CampaignManifest, repository: Repository, executor: Executor) -> Session:
        identity = RunIdentity(
            campaign_id=manifest.campaign_id,
            campaign_name=manifest.campaign_name,
            run_id=str(manifest.run_id),
            host=self.host,
            shuffle_seed=manifest.shuffle_seed,
        )
        execution = self.campaign.execution
        return Session(executor, repository, identity, execution, stop=self.stop, now=self.now)

    def _check_environment(self, session: Session, manifest: CampaignManifest, plan: Plan) -> None:
        """Start the workers and see that they have their engines, the same ones as before."""
        current: dict[str, object] = {}
        for backend in dict.fromkeys(item.backend for item in plan.experiments):
            environment = session.open(backend)
            missing = missing_distributions(backend, environment)
            if missing:
                raise UserError(
                    f"backend {backend} cannot run here: {', '.join(missing)} is not installed "
                    f"in this Python ({environment.get('python')})",
                    f"pip install {' '.join(missing)}, or name a Python that has them with --python",
                )
            current.update({f"{backend}.{name}": value for name, value in environment.items()})
        lines = resume.adopt_environment(
            manifest, current, is_change_allowed=self.options.is_environment_change_allowed, now=self.now()
        )
        for line in lines:
            _logger.warning("the environment changed: %s", line)

    def _check_supported(self) -> None:
        """Refuse what only containers can do."""
        if self.campaign.cold_start.restart_container:
            raise UserError(
                "cold_start.restart_container needs the docker executor, and these experiments run in this Python",
                "use cold_start.force_cold_start, which starts a new worker for each experiment",
            )

    def _planned(self) -> Plan:
        if self.plan is None:
            self.plan = build_plan(self.campaign, complete_campaign(self.campaign).drafts)
        return self.plan

    def _state_folder(self) -> Path:
        return Path(self.campaign.io.state_dir) / self.campaign.slug

    def _manager(self) -> ManifestManager:
        return ManifestManager(self._state_folder() / self.campaign.io.manifest_filename, now=self.now)

    def _new_entries(self, order: Sequence[CampaignExperiment]) -> list[CampaignManifestEntry]:
        entries = [item.new_entry() for item in order]
        for entry in entries:
            entry.host = self.host
        return entries


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


def _gpus_of(plan: Plan) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a plan uses; a name that is not found here is the worker's to refuse."""
    present = find_gpus()
    by_name: Mapping[str, str] = {str(gpu.index): gpu.uuid for gpu in present} | {gpu.uuid: gpu.uuid for gpu in present}
    chosen: set[str] = set()
    for experiment in plan.experiments:
        named = ("0",) if experiment.config.gpus is None else experiment.config.gpus
        chosen.update(by_name[name] for name in named if name in by_name)
    return tuple(sorted(chosen))


def _save(manager: ManifestManager, manifest: CampaignManifest) -> None:
    with _disk_errors(manager):
        manager.save(manifest)


@contextlib.contextmanager
def _disk_errors(manager: ManifestManager) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InfrastructureError(
            f"cannot write {error.filename or manager.manifest_path}: {reason}",
            "make room or make the folder writable, then go on with --resume; what is measured is kept",
        ) from error


@contextlib.contextmanager
def _ending(session: Session) -> Iterator[None]:
    """End the workers with the block: politely, or at once when an error or a second signal leaves it."""
    try:
        yield
    except BaseException:
        session.kill_workers()
        raise
    session.end_workers()
