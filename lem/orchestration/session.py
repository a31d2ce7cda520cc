"""The session of one run: its experiments one after another, each with its gap, its attempts and its manifest entry."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.base.clock import StepWatch, utc_now, utc_text
from lem.base.dataclass import dataclass, field, replace
from lem.base.durable import write_text
from lem.base.errors import EngineError, InfrastructureError, Interrupted, UserError
from lem.base.measurement import WINDOW
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.dispatch import Executor, LocalExecutor, Outcome, host_error
from lem.orchestration.gpu_control import GpuControl
from lem.orchestration.grid import prompts_fingerprint
from lem.orchestration.host_meters import GapOutcome, HostMeters, Rest, keep_gap
from lem.orchestration.manifest import (
    CLOCK_STEP_NOTE,
    COMPLETED,
    FAILED,
    RUNNING,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)
from lem.orchestration.plan import ON_HOST, Experiment, GapKind, Plan
from lem.orchestration.resume import RunOptions, forget_lost_results, interrupt_entry
from lem.orchestration.schedule import AllFailed, CampaignOutcome, Countdown, Stopped, StopRequest, Timeouts
from lem.orchestration.status import Event, Observer
from lem.record import PROMPTS_FILE, TEMPLATE_FILE, Record, RecordError, read_with_digest
from lem.results.store import AttemptFolder, Repository, StoredResult, stopping_campaign
from lem.worker.channel import RunRequest
from lem.worker.prompts import read_template, resolve_on_host, write_prompts

_logger = logging.getLogger(__name__)

# What the meters need before a load besides power at rest: starting a sampler, reading the GPUs twice, two guards.
METERS_S = 15.0
# An experiment that fails, or whose result is not valid, is tried once more in its cycle.
MAX_TRIES = 2
_CONTINUE = "then continue with --resume"
# How often a wait is reported, as often as a worker sends heartbeats.
_TICK_S = 5.0


@dataclass
class Context:
    campaign: CampaignConfig
    executor: Executor = field(default_factory=LocalExecutor)
    observe: Observer = lambda _event: None  # receives every event
    stop: StopRequest = field(default_factory=StopRequest)
    options: RunOptions = field(default_factory=RunOptions)  # for the next run
    now: Callable[[], datetime] = utc_now
    monotonic: Callable[[], float] = time.monotonic  # in seconds
    host: str = field(default_factory=socket.gethostname)  # its name in records, which a stored plan may give
    node: str = field(default_factory=socket.gethostname)  # the machine itself
    part: str = ""  # of a campaign on several hosts, which may share a file system: the name of its folders

    @functools.cached_property  # what they learn of the devices holds for every run
    def meters(self) -> HostMeters:
        return HostMeters.found()

    @functools.cached_property
    def control(self) -> GpuControl:
        return GpuControl(self.meters.command, self.meters.environ, self.campaign.campaign_name)

    @property
    def repository(self) -> Repository:
        return Repository(Path(self.campaign.io.results_dir), self.campaign.slug, self.part)

    def should_health_check(self, experiment_index: int) -> bool:
        """Whether `interval_experiments` asks for a check before the experiment at this place of the order (from 0)."""
        check = self.campaign.health_check
        every = check.interval_experiments
        return check.enabled and every > 0 and experiment_index > 0 and experiment_index % every == 0


@dataclass(frozen=True)
class Measurement:
    attempt: Attempt  # for the manifest
    record: Record | None = None  # the whole result
    error: EngineError | None = None  # why there is none
    log_tail: str = ""  # the last lines that the engine printed, for an error

    @property
    def reason_to_try_again(self) -> str | None:
        if self.error is not None:
            return None if self.error.is_permanent else self.error.message
        if self.record is None or self.record.validity.valid:
            return None
        reasons, work = self.record.validity.invalid_reasons, self.record.work
        is_futile = not work.output_tok and any(it.code in ("no_output", "requests_failed") for it in reasons)
        return None if is_futile else "; ".join(reason.text for reason in reasons)

    @property
    def details(self) -> dict[str, Any]:
        kind, hint = (self.error.kind, self.error.hint) if self.error else (None, "")
        return {"error_kind": kind, "hint": hint, "log": self.attempt.log_path, "log_tail": self.log_tail}


@dataclass
class Session:
    context: Context
    plan: Plan  # of the cycles known so far
    manager: ManifestManager
    manifest: CampaignManifest
    observe: Observer
    secrets: Mapping[str, str] = field(repr=False)
    _done: int = 0  # experiments ended; what every event tells must not take longer in a longer plan
    _countdown: Countdown = field(default_factory=Countdown)
    _rest: Rest = field(default_factory=Rest)
    _phase: str | None = None  # of the current attempt
    _failures: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # kind and phase, by config_hash

    def __post_init__(self) -> None:
        self._count()
        self._steps = StepWatch(self.context.now, self.context.monotonic)
        self._has_new_note = False

    def run(
        self, experiments: Sequence[Experiment], deadline_s: float | None, first_gap: GapKind | None = None
    ) -> CampaignOutcome:
        """How it ended, also when a signal or an error stopped it; no experiment begins after the deadline.

        There is a gap before the first experiment where others ran before in the same session.
        """
        stopped, error = None, None
        self._count()
        try:
            stopped = self._run(experiments, deadline_s, first_gap)
        except Interrupted:
            stopped = Stopped.SIGNAL
        except InfrastructureError as infrastructure:
            is_all = isinstance(infrastructure, AllFailed)
            stopped, error = Stopped.ALL_FAILED if is_all else Stopped.INFRASTRUCTURE, infrastructure
        return CampaignOutcome(self.manifest, stopped, error, self.context.stop.signum)

    def why_stop(self, deadline_s: float | None) -> Stopped | None:
        if self.context.stop.is_set():
            return Stopped.SIGNAL
        return Stopped.DEADLINE if deadline_s is not None and self.context.monotonic() >= deadline_s else None

    def report(self, kind: str, **data: Any) -> None:
        self._pass_on(Event(kind, data=data))

    def save(self, entry: CampaignManifestEntry | None = None) -> None:
        with self._saving():
            if entry is None or self._has_new_note:
                self.manager.save(self.manifest)
                self._has_new_note = False
            else:
                self.manager.save_entry(self.manifest, entry)

    def _saving(self) -> contextlib.AbstractContextManager[None]:
        hint = "free some space, then continue with --resume; results are kept"
        return self.manager.saving(InfrastructureError, hint)

    def conclude(self, outcome: CampaignOutcome) -> CampaignOutcome:
        """How the run ended, once it is certain that its results are there and the manifest is written."""
        try:
            lost = forget_lost_results(self.manifest) if outcome.error is None else ()
            if lost:
                outcome = outcome.without(lost)
                self._count()
            if lost or self._has_new_note:
                self.save()
            with self._saving():
                self.manager.settle(self.manifest)
        except InfrastructureError as error:
            return outcome if outcome.error else replace(outcome, stopped=Stopped.INFRASTRUCTURE, error=error)
        return outcome

    def _count(self) -> None:
        self._done = sum(entry.status in (COMPLETED, FAILED) for entry in self.manifest.experiments)
        self._has_result = self.manifest.completed_count > 0

    def _pass_on(self, event: Event) -> None:
        if event.kind == "phase":
            self._phase = event.data["phase"]
            if self._phase == WINDOW:
                self._rest = Rest(0.0)
        if text := self._steps.describe_step():
            note = {"at": utc_text(self.context.now()), "kind": CLOCK_STEP_NOTE, "reason": text}
            self.manifest.notes.append(note)
            self._has_new_note = True
            self.report("note", text=text)
        total, eta_s = self.manifest.total_experiments, self._countdown.after(event, self.context.monotonic())
        self.observe(replace(event, done=self._done, total=total, eta_s=eta_s))

    def _run(self, order: Sequence[Experiment], deadline_s: float | None, first_gap: GapKind | None) -> Stopped | None:
        part = replace(self.plan, experiments=tuple(order))
        gaps, loads = [first_gap, *part.gap_kinds()[1:]], part.loads()
        self._countdown.begin(order, [self.plan.gap_cap_s(kind) for kind in gaps], loads)
        for index, experiment in enumerate(order):
            gap = self._keep_gap(gaps[index], deadline_s) if self.why_stop(deadline_s) is None else None
            stopped = self.why_stop(deadline_s)
            if stopped is not None:
                return stopped
            self._check_health(index, gaps[index])
            following = order[index + 1] if index + 1 < len(order) else None
            is_kept = following is not None and not loads[index + 1] and following.place == experiment.place
            is_kept = is_kept or experiment.config.has_running_engine
            has_result = self._run_experiment(experiment, keep_engine=is_kept, gap=gap)
            if self.plan.is_cold:
                self.context.executor.stop()
            if self.context.options.is_fail_fast and not has_result:
                return Stopped.FAIL_FAST
            if not has_result and (index + 1 < len(order) or self.context.options.until is not None):
                self._check_that_some_may_work(experiment)
        return None

    def _check_that_some_may_work(self, last: Experiment) -> None:
        planned = {item.config_hash for item in self.plan.configurations}
        if self._has_result or not planned <= self._failures.keys() or len(set(self._failures.values())) > 1:
            return
        phase, error = self._failures[last.config_hash][1], self.manifest.get_entry(last.exp_id).error
        message = f"every configuration failed in the same way (in phase {phase or 'start'}); the last one: {error}"
        raise AllFailed(message, f"repair the cause, {_CONTINUE}")

    def _keep_gap(self, kind: GapKind | None, deadline_s: float | None) -> GapOutcome | None:
        if kind is None or self._rest.is_enough(self.plan.gap_cap_s(kind)):
            return self._rest.gap
        cap_s, monotonic = self.plan.gap_cap_s(kind) - self._rest.rested_s, self.context.monotonic
        if deadline_s is not None:
            cap_s = min(cap_s, deadline_s - monotonic())
        if cap_s > 0:
            self.report("gap", gap=kind, cap_s=cap_s)
        with self.context.meters.watching() if cap_s > 0 else contextlib.nullcontext() as is_recovered:
            kept = keep_gap(cap_s, is_recovered=is_recovered, monotonic=monotonic, wait=self._wait)
        self._rest = self._rest.after(kept)
        return self._rest.gap

    def _wait(self, seconds: float) -> bool:
        until_s = self.context.monotonic() + seconds
        while (left_s := until_s - self.context.monotonic()) > 0:
            self.report("tick", left_s=left_s)
            if self.context.stop.wait(min(left_s, _TICK_S)):
                return True
        return self.context.stop.is_set()

    def _check_health(self, index: int, gap: GapKind | None) -> None:
        is_due = self.context.campaign.health_check.enabled and gap != "configuration"
        if not is_due and not self.context.should_health_check(index):
            return
        try:
            self.context.executor.look_after(lambda text: self.report("note", text=text))
        except UserError as error:  # what was there when the campaign began is gone
            raise InfrastructureError(error.message, error.hint) from error

    def _run_experiment(self, experiment: Experiment, *, keep_engine: bool, gap: GapOutcome | None) -> bool:
        who = {
            "exp_id": experiment.exp_id,
            "config_name": experiment.config_name,
            "backend": experiment.backend,
            "cycle": experiment.cycle_index + 1,
            "cycles": self.plan.execution.cycles,
        }
        entry = self.manifest.get_entry(experiment.exp_id)
        self.report("experiment_started", **who)
        started_s = self.context.monotonic()
        try:
            tries = [self._attempt(experiment, entry, keep_engine=keep_engine, gap=gap)]
            while (reason := tries[-1].reason_to_try_again) is not None and len(tries) < MAX_TRIES:
                self.save(entry)
                self.report("experiment_retried", **who, reason=reason, **tries[-1].details)
                gap = self._keep_gap("configuration", None)
                if self.context.stop.signum is not None:
                    raise Interrupted(self.context.stop.signum)
                tries.append(self._attempt(experiment, entry, keep_engine=keep_engine, gap=gap))
        except (Interrupted, InfrastructureError) as error:
            interrupt_entry(entry)
            if not isinstance(error, Interrupted):
                entry.error = error.message
            self.report("experiment_interrupted", **who, reason=entry.error)
            self.save()
            raise
        return self._settle(who, entry, tries, self.context.monotonic() - started_s)

    def _settle(
        self, who: Mapping[str, Any], entry: CampaignManifestEntry, tries: Sequence[Measurement], elapsed_s: float
    ) -> bool:
        last = tries[-1]
        results = [item for item in tries if item.record is not None]
        best = next((item for item in results if item.attempt.valid), results[-1] if results else last)
        entry.completed_at = last.attempt.completed_at
        if best.record is not None:
            entry.status, entry.error, entry.result_path = COMPLETED, None, best.attempt.result_path
            self._has_result = True
        else:
            entry.status, entry.error = FAILED, last.attempt.error
            self._failures[entry.config_hash] = (last.error.kind if last.error else "", self._phase)
        self.save(entry)
        self._done += 1
        if best.record is None:
            self.report("experiment_failed", **who, error=entry.error, **best.details, elapsed_s=elapsed_s)
            return False
        self.report(
            "experiment_completed",
            **who,
            valid=best.record.validity.valid,
            invalid_reasons=[reason.text for reason in best.record.validity.invalid_reasons],
            invalid_codes=[reason.code for reason in best.record.validity.invalid_reasons],
            output_tok_per_s=best.record.throughput.output_tok_per_s,
            elapsed_s=elapsed_s,
            result=best.attempt.result_path,
        )
        return True

    def _attempt(
        self, experiment: Experiment, entry: CampaignManifestEntry, *, keep_engine: bool, gap: GapOutcome | None
    ) -> Measurement:
        """What became of an attempt; InfrastructureError when a worker cannot be started, or the disk is full."""
        context = self.context
        folder = context.repository.prepare_attempt(str(self.manifest.run_id), experiment.exp_id)
        folder.write_config(experiment.requested, experiment.resolved)
        begun = Attempt(folder.number, started_at=utc_text(context.now()), host=context.host)
        entry.put_attempt(begun)
        entry.status, entry.error, entry.started_at = RUNNING, None, entry.started_at or begun.started_at
        entry.retry_count = len(entry.attempts) - 1
        self.save(entry)
        request, self._phase = self._request(experiment, folder, keep_engine=keep_engine, gap=gap), None
        try:
            outcome = self._dispatch(experiment, folder, request)
        except (OSError, MemoryError) as failure:  # of this process; what its worker meets is in the outcome
            outcome = Outcome(host_error(failure))
        result, error = _result_of(outcome, folder, experiment.exp_id)
        record = result.record if result is not None else None
        context.meters.note(record, request)
        log_path = str(folder.log_path) if os.path.exists(folder.log_path) else None  # noqa: PTH110 - never raises
        attempt = replace(begun, log_path=log_path, completed_at=utc_text(context.now()))
        if result is not None:
            attempt = replace(attempt, result_path=str(result.path), result_sha256=result.sha256)
            attempt = replace(attempt, valid=result.record.validity.valid)
            context.repository.record_result(str(self.manifest.run_id), result)
        elif error is not None:
            attempt = replace(attempt, error=error.message)
        entry.put_attempt(attempt)
        return Measurement(attempt, record, error, outcome.log_tail)

    def _dispatch(self, experiment: Experiment, folder: AttemptFolder, request: RunRequest) -> Outcome:
        try:
            _write_prompts(experiment, folder, self._draw_of(experiment))
        except UserError as error:
            return Outcome(EngineError(error.message, error.hint, kind="prompts", is_permanent=True))
        execution, baseline = self.plan.execution, experiment.config.baseline
        timeouts = Timeouts(
            load_s=execution.load_timeout_seconds,
            rest_s=METERS_S + (baseline.duration_sec if baseline.enabled else 0.0),
            experiment_s=execution.experiment_timeout_seconds,
            silence_s=execution.silence_timeout_seconds,
        )
        try:
            worker = self.context.executor.worker_for(experiment.place)
            with (
                self.context.control.holding(experiment.config),  # restored last, when nothing samples any more
                self.context.meters.attending(experiment.config, request) as attendance,
            ):

                def pass_on(event: Event) -> None:
                    self._pass_on(attendance.follow(event, worker))

                return worker.run(attendance.request, pass_on, timeouts, self.context.stop)
        except EngineError as error:  # the GPUs cannot be set
            return Outcome(error)
        except UserError as error:  # the program that ran before is gone
            raise InfrastructureError(error.message, error.hint or _CONTINUE) from error

    def _request(
        self, experiment: Experiment, folder: AttemptFolder, *, keep_engine: bool, gap: GapOutcome | None
    ) -> RunRequest:
        manifest = self.manifest
        return RunRequest(
            config=experiment.config.to_dict(),
            identity={
                "experiment_id": experiment.exp_id,
                "config_name": experiment.config_name,
                "config_hash": experiment.config_hash,
                "campaign_id": manifest.campaign_id,
                "campaign_name": manifest.campaign_name,
                "run_id": str(manifest.run_id),
                "host": self.context.host,
                "node": self.context.node,
                "backend": experiment.backend,
                "model": experiment.resolved["model"]["name"],
                "cycle_index": experiment.cycle_index,
                "order_index": experiment.order_index,
                "attempt": folder.number,
                "shuffle_seed": manifest.shuffle_seed,
            },
            result_dir=str(folder.path.absolute()),
            engine_key=experiment.engine_key,
            keep_engine=keep_engine,
            draw=self._draw_of(experiment),
            gap_s=None if gap is None else gap.gap_s,
            gap_end_code=None if gap is None else gap.code,
            executor="local" if experiment.place.startswith(ON_HOST) else self.context.executor.name,
            secrets=self.secrets,
        )

    def _draw_of(self, experiment: Experiment) -> int:
        """Every cycle has a draw of its own, except where an older build began with one for all cycles."""
        return experiment.cycle_index if self.manifest.structure else 0


def _write_prompts(experiment: Experiment, folder: AttemptFolder, draw: int) -> None:
    config = experiment.config
    resolved, template = resolve_on_host(config, draw=draw), read_template(config)
    if prompts_fingerprint(config, resolved) != experiment.prompts:
        hint = "do not change prompts while a campaign runs; --resume plans it again with the new ones"
        files = [resolved and resolved.source.get("path"), template and config.chat_template]
        listed = " or ".join(str(file) for file in files if file)
        raise UserError(f"the prompts have changed since the campaign was planned: {listed}", hint)
    if template is not None:
        with stopping_campaign(folder.path / TEMPLATE_FILE) as path:
            write_text(path, template)
    if resolved is not None:
        with stopping_campaign(folder.path / PROMPTS_FILE) as path:
            write_prompts(path.parent, resolved.prompts)


def _result_of(outcome: Outcome, folder: AttemptFolder, exp_id: str) -> tuple[StoredResult | None, EngineError | None]:
    path, reported = folder.result_path, outcome.error
    if reported is not None and reported.kind == "full":
        raise InfrastructureError(reported.message, reported.hint)
    try:
        record, digest = read_with_digest(path)
    except FileNotFoundError:
        return None, reported or EngineError("the worker reported a result but did not write one", kind="channel")
    except (RecordError, OSError) as error:
        return None, EngineError(f"{path}: {error}", kind="channel")
    if record.identity.experiment_id != exp_id or record.identity.attempt != folder.number:
        return None, EngineError(f"{path}: the result belongs to another experiment", kind="channel")
    if reported is not None:
        _logger.warning("%s was measured, but then: %s", exp_id, reported.message)
    return StoredResult(str(path), record, digest), None
