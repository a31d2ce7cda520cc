"""A session: the workers, meters and attempts of one run, and what is checked before it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.base.clock import utc_text
from lem.base.durable import reason_of
from lem.base.errors import EngineError, InfrastructureError, Interrupted, UserError
from lem.base.reasons import Reason
from lem.base.variables import TOKEN_VARIABLE
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig
from lem.meters.nvml import find_gpus, named_gpus, visible_gpus
from lem.orchestration.attempt import Outcome, Timeouts, WorkerEvent
from lem.orchestration.dispatch import Executor, WorkerUnavailable
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.host_meters import GapOutcome, HostMeters, RecoveryProbe
from lem.orchestration.manifest import Attempt, CampaignManifest
from lem.orchestration.names import config_hash, prompts_fingerprint
from lem.orchestration.plan import CampaignExperiment, Plan
from lem.orchestration.schedule import StopRequest
from lem.record import Record, RecordError, read_record
from lem.results.store import AttemptFolder, Repository
from lem.worker.channel import RunRequest
from lem.worker.prompts import resolve_on_host
from lem.worker.supervisor import missing_distributions

SECRET_VARIABLES = (TOKEN_VARIABLE,)

_FOLDER_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5), LoadCredential=


def find_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that are there, by name; what the environment says wins over a credential.

    Raises:
        UserError: a credential is there and cannot be read.
    """
    found = {}
    folder = environ.get(_FOLDER_VARIABLE)
    for name in SECRET_VARIABLES:
        value = environ.get(name) or (_read(Path(folder) / name) if folder else "")
        if value:
            found[name] = value
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no text"
        raise UserError(f"credential {path}: {reason}") from error


_logger = logging.getLogger(__name__)

# What the meters need before a load beside power at rest: a sampler that starts, two looks at the GPUs, two guards.
METERS_S = 15.0


@dataclass(frozen=True)
class RunIdentity:
    """What all experiments of a run share."""

    campaign_id: str
    campaign_name: str
    run_id: str
    host: str
    shuffle_seed: int | None

    @classmethod
    def of(cls, manifest: CampaignManifest, host: str) -> RunIdentity:
        """The identity of the run in a manifest."""
        return cls(manifest.campaign_id, manifest.campaign_name, str(manifest.run_id), host, manifest.shuffle_seed)


@dataclass(frozen=True)
class Measurement:
    """What one attempt came to.

    Attributes:
        attempt: for the manifest.
        record: the whole result; None when there is none.
        error: why there is none.
        log_tail: the last lines the engine printed, for an error.
    """

    attempt: Attempt
    record: Record | None = None
    error: EngineError | None = None
    log_tail: str = ""


class Session:
    """The workers of a run, ended with the block it is entered for, and the attempts made in them."""

    def __init__(
        self,
        executor: Executor,
        repository: Repository,
        identity: RunIdentity,
        execution: CampaignExecutionConfig,
        *,
        stop: StopRequest,
        now: Callable[[], datetime],
        meters: HostMeters,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._executor = executor
        self._meters = meters
        self._repository = repository
        self._identity = identity
        self._timeouts = Timeouts(
            load_s=execution.load_timeout_seconds,
            experiment_s=execution.experiment_timeout_seconds,
            silence_s=execution.silence_timeout_seconds,
        )
        self._stop = stop
        self._now = now
        self._secrets = find_secrets(environ)

    def open(self, backend: str) -> Mapping[str, Any]:
        """What the worker of a backend stands on; the worker is started when there is none.

        Raises:
            WorkerUnavailable: it cannot be started.
            Interrupted: a stop was asked for.
        """
        worker = self._executor.worker_for(backend)
        worker.open(self._stop)
        return worker.environment

    def prepare(self, experiment: CampaignExperiment) -> AttemptFolder:
        """A new attempt folder with the configuration.

        Raises:
            InfrastructureError: it cannot be written.
        """
        folder = self._repository.prepare_attempt(self._identity.run_id, experiment.exp_id)
        folder.write_config(experiment.requested, experiment.resolved)
        return folder

    def measure(
        self,
        experiment: CampaignExperiment,
        folder: AttemptFolder,
        *,
        keep_engine: bool,
        gap: GapOutcome | None,
        on_event: Callable[[WorkerEvent], None],
    ) -> Measurement:
        """What became of the attempt; a failed one is a value, not an error.

        Raises:
            Interrupted: a stop was asked for, and the worker was ended.
            InfrastructureError: no worker can be had, or the results folder is full.
        """
        started_at = utc_text(self._now())
        request = self._request(experiment, folder, keep_engine=keep_engine, gap=gap)
        outcome = self._run(experiment, folder, request, on_event)
        record, error = self._result_of(outcome, folder, experiment)
        self._meters.note(record, request)
        attempt = Attempt(
            number=folder.number,
            result_path=str(folder.result_path) if record is not None else None,
            valid=None if record is None else record.validity.valid,
            error=None if error is None else error.message,
            log_path=str(folder.log_path) if folder.log_path.exists() else None,
            started_at=started_at,
            completed_at=utc_text(self._now()),
            host=self._identity.host,
        )
        return Measurement(attempt, record, error, outcome.log_tail)

    @property
    def executor_name(self) -> str:
        """Where the workers run: `local` or `docker`."""
        return self._executor.name

    def watching_recovery(self) -> contextlib.AbstractContextManager[RecoveryProbe | None]:
        """Whether the devices are back at rest, within the block, as a gap asks; None where nothing can tell."""
        return self._meters.watching()

    def look_after(self, tell: Callable[[str], None]) -> None:
        """See that what the workers run in is healthy, and mend it; never while one measures.

        Raises:
            InfrastructureError: it is not, and cannot be mended.
            Interrupted: a stop was asked for.
        """
        try:
            self._executor.look_after(tell)
        except UserError as error:  # what was there when the campaign began is gone
            raise InfrastructureError(error.message, error.hint) from error

    def end_workers(self) -> None:
        """End every worker with whatever it has loaded; the next attempt starts another."""
        self._executor.stop()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the workers, politely, or at once when an error leaves the block or a signal insists; and their place."""
        try:
            self._end(is_at_once=kind is not None)
        finally:
            self._executor.close()

    def clear(self) -> None:
        """Take down what a run that was killed left, where this one has nothing to run."""
        self._executor.clear()

    def _end(self, *, is_at_once: bool) -> None:
        if is_at_once:
            self._executor.kill()
            return
        try:
            self._executor.stop()
        except Interrupted:
            self._executor.kill()

    def _run(
        self,
        experiment: CampaignExperiment,
        folder: AttemptFolder,
        request: RunRequest,
        on_event: Callable[[WorkerEvent], None],
    ) -> Outcome:
        try:
            self._write_prompts(experiment, folder)
        except UserError as error:
            unusable = EngineError(error.message, error.hint, kind="prompts", is_permanent=True)
            return Outcome(experiment.exp_id, error=unusable)
        try:
            worker = self._executor.worker_for(experiment.backend)
            with self._meters.attending(experiment.config, request) as attendance:

                def pass_on(event: WorkerEvent) -> None:
                    on_event(attendance.follow(event))

                return worker.run(attendance.request, pass_on, self._timeouts_of(experiment), self._stop)
        except UserError as error:  # the program that ran before is gone
            raise InfrastructureError(error.message, error.hint) from error

    def _timeouts_of(self, experiment: CampaignExperiment) -> Timeouts:
        """The limits, with the time that power at rest takes before the load."""
        baseline = experiment.config.baseline
        return replace(self._timeouts, rest_s=METERS_S + (baseline.duration_sec if baseline.enabled else 0.0))

    def _write_prompts(self, experiment: CampaignExperiment, folder: AttemptFolder) -> None:
        """Write the prompts down where the host resolves them.

        Raises:
            UserError: they cannot be had, or are not those that the experiment was planned with.
        """
        resolved = resolve_on_host(experiment.config)
        if resolved is None:
            return
        fingerprint = prompts_fingerprint(experiment.config, lambda _config: resolved)
        if config_hash(experiment.config, fingerprint) != experiment.config_hash:
            raise UserError(
                f"the prompts have changed since the campaign was planned: {resolved.source.get('path')}",
                "leave them as they are while a campaign runs; --resume plans it again with the new ones",
            )
        folder.write_prompts(
            {"prompt": item.prompt, "input_tokens": item.input_tokens, "output_tokens": item.output_tokens}
            for item in resolved.prompts
        )

    def _request(
        self, experiment: CampaignExperiment, folder: AttemptFolder, *, keep_engine: bool, gap: GapOutcome | None
    ) -> RunRequest:
        config, identity = experiment.config, self._identity
        return RunRequest(
            config=config.to_dict(),
            identity={
                "experiment_id": experiment.exp_id,
                "config_name": experiment.config_name,
                "config_hash": experiment.config_hash,
                "campaign_id": identity.campaign_id,
                "campaign_name": identity.campaign_name,
                "run_id": identity.run_id,
                "host": identity.host,
                "backend": experiment.backend,
                "model": experiment.resolved["model"]["name"],
                "cycle_index": experiment.cycle_index,
                "order_index": experiment.order_index,
                "attempt": folder.number,
                "shuffle_seed": identity.shuffle_seed,
            },
            result_dir=str(folder.path.absolute()),
            engine_key=experiment.engine_key,
            keep_engine=keep_engine,
            gap_s=None if gap is None else gap.gap_s,
            gap_end_code=None if gap is None else gap.reason.code,
            executor=self._executor.name,
            secrets=self._secrets,
        )

    def _result_of(
        self, outcome: Outcome, folder: AttemptFolder, experiment: CampaignExperiment
    ) -> tuple[Record | None, EngineError | None]:
        """The record on disk, which counts, whatever the worker said."""
        if outcome.error is not None and outcome.error.kind == "full":
            raise InfrastructureError(outcome.error.message, outcome.error.hint)
        try:
            record = read_record(Path(folder.result_path))
        except FileNotFoundError:
            return None, outcome.error or EngineError("the worker reported a result and wrote none", kind="channel")
        except (RecordError, OSError) as error:
            return None, EngineError(f"{folder.result_path}: {error}", kind="channel")
        if record.identity.experiment_id != experiment.exp_id or record.identity.attempt != folder.number:
            return None, EngineError(f"{folder.result_path}: the result of another experiment", kind="channel")
        if outcome.error is not None:
            _logger.warning("%s was measured, and then: %s", experiment.exp_id, outcome.error.message)
        return record, None


def check_supported(campaign: CampaignConfig, executor_name: str) -> None:
    """Refuse what only containers can do, where there are none.

    Raises:
        UserError: the campaign asks for it.
    """
    if campaign.cold_start.restart_container and executor_name != "docker":
        raise UserError(
            "cold_start.restart_container needs the docker executor, and these experiments run in this Python",
            "use cold_start.force_cold_start, which starts a new worker for each experiment",
        )


def find_environment(session: Session, experiments: Sequence[CampaignExperiment]) -> dict[str, Any]:
    """What the workers of these experiments stand on, by name; they are started for it.

    Raises:
        UserError: a worker cannot be started, or lacks its engine.
        Interrupted: a stop was asked for.
    """
    found: dict[str, Any] = {}
    for backend in dict.fromkeys(item.backend for item in experiments):
        try:
            environment = session.open(backend)
        except WorkerUnavailable as error:  # nothing has run yet: this host is not fit, and no experiment has failed
            raise UserError(error.message, error.hint) from error
        missing = missing_distributions(backend, environment)
        if missing:
            raise _lacking(session, backend, missing, environment)
        found.update({f"{backend}.{name}": value for name, value in environment.items()})
    return found


def _lacking(session: Session, backend: str, missing: Sequence[str], environment: Mapping[str, Any]) -> UserError:
    """The error of a worker that lacks its engine."""
    lacks = f"Python ({environment.get('python')}) has no {' and no '.join(missing)}"
    if session.executor_name == "docker":
        return UserError(
            f"backend {backend} cannot run in service {backend}: its {lacks}",
            "name an image that has it in the compose file; lem compose prints one with images that do",
        )
    return UserError(
        f"backend {backend} cannot run here: this {lacks}",
        f"pip install {' '.join(missing)}, name a Python that has them with --python, or use a container (lem doctor)",
    )


def gpus_of(plan: Plan) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a plan uses; a name that is not found here is the worker's to refuse."""
    visible = visible_gpus(find_gpus(), os.environ)
    chosen = {gpu.uuid for item in plan.configurations for gpu in named_gpus(item.config.gpus, visible)}
    return tuple(sorted(chosen))


def with_unused_options(plan: Plan) -> Plan:
    """The plan with a warning for each option that does nothing in a campaign."""
    issues = [issue for item in plan.configurations for issue in _unused_options(item)]
    return dataclasses.replace(plan, warnings=(*plan.warnings, *issues))


def _unused_options(item: CampaignExperiment) -> list[GridValidationIssue]:
    options = {
        "num_cycles": (item.config.num_cycles != 1, "execution.cycles"),
        "io.results_dir": (item.config.io.results_dir is not None, "the campaign's io.results_dir"),
    }
    unused = [
        Reason.of("campaign_decides", option=name, instead=instead)
        for name, (is_set, instead) in options.items()
        if is_set
    ]
    return [GridValidationIssue.of(item.config_name, reason, severity="warning") for reason in unused]
