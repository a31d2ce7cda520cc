"""A session: the workers, meters and attempts of one run, and what is checked before it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from lem.base.clock import utc_text
from lem.base.durable import reason_of
from lem.base.errors import EngineError, InfrastructureError, Interrupted, UserError
from lem.base.reasons import Reason
from lem.base.variables import TOKEN_VARIABLE
from lem.config.campaign_config import CampaignConfig
from lem.config.load import Loaded
from lem.meters.nvml import find_gpus, named_gpus, visible_gpus
from lem.orchestration.dispatch import Outcome, Timeouts, Worker, WorkerUnavailable
from lem.orchestration.grid import GridValidationIssue
from lem.orchestration.host_meters import GapOutcome, HostMeters
from lem.orchestration.manifest import Attempt, CampaignManifest
from lem.orchestration.names import config_hash, prompts_fingerprint
from lem.orchestration.plan import CampaignExperiment, Plan, build_plan
from lem.orchestration.schedule import StopRequest
from lem.orchestration.status import Event, Observer
from lem.record import Record, RecordError, read_record
from lem.results.store import AttemptFolder, Repository
from lem.worker.channel import RunRequest
from lem.worker.launch import own_command
from lem.worker.prompts import resolve_on_host
from lem.worker.supervisor import missing_distributions

_logger = logging.getLogger(__name__)

_FOLDER_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5), LoadCredential=

# What the meters need before a load besides power at rest: starting a sampler, reading the GPUs twice, two guards.
METERS_S = 15.0


def find_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that are set, by name; the environment wins over a credential of systemd."""
    folder, value = environ.get(_FOLDER_VARIABLE), environ.get(TOKEN_VARIABLE, "")
    if folder and not value:
        path = Path(folder, TOKEN_VARIABLE)
        try:
            value = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"credential {path}: {reason}") from error
    return {TOKEN_VARIABLE: value} if value else {}


class Executor(Protocol):
    """Where experiments run."""

    name: str  # `local` or `docker`, as in the record

    def worker_for(self, backend: str) -> Worker:
        """The worker that runs this backend's experiments; the same one as long as this executor is used."""

    def stop(self) -> object:
        """End every worker with its engine."""

    def kill(self) -> None:
        """End every worker with its engine at once."""

    def look_after(self, report: Callable[[str], None]) -> None:
        """Check, between two experiments, that what the workers run in is healthy; repair it or raise a LemError."""

    def close(self) -> None:
        """Take down what the workers ran in, once they were stopped or killed."""

    def clear(self) -> None:
        """Take down what a killed run left, where this run has nothing to do."""


class LocalExecutor:
    """One worker on this machine, under this Python or another, for every backend."""

    name = "local"

    def __init__(self, python: str | None = None) -> None:
        """Find the Python: a program or a path, as `--python` gives it; None is this one."""
        found = shutil.which(python) if python is not None else sys.executable
        if not found:
            raise UserError(f"--python {python}: no such program", "give the path of a Python that has the engine")
        self.python = found
        self._worker = Worker((*own_command(found), "worker"))

    def worker_for(self, backend: str) -> Worker:  # noqa: ARG002 - one worker for all
        return self._worker

    def stop(self) -> None:
        self._worker.stop()

    def kill(self) -> None:
        self._worker.kill()

    def look_after(self, report: Callable[[str], None]) -> None:
        """Nothing: a worker that is lost is replaced when it is needed."""

    def close(self) -> None:
        """Nothing: the worker ran in nothing of its own."""

    def clear(self) -> None:
        """Nothing: a worker ends with its host, however that ends."""


@dataclass(frozen=True)
class Measurement:
    """What one attempt came to."""

    attempt: Attempt  # for the manifest
    record: Record | None = None  # the whole result
    error: EngineError | None = None  # why there is none
    log_tail: str = ""  # the last lines that the engine printed, for an error


@dataclass
class Session:
    """The workers of a run, ended with the block it is entered for, and the attempts made in them."""

    campaign: CampaignConfig
    manifest: CampaignManifest
    executor: Executor
    repository: Repository
    meters: HostMeters
    host: str
    stop: StopRequest
    now: Callable[[], datetime]
    monotonic: Callable[[], float]  # in seconds
    _secrets: Mapping[str, str] = field(default_factory=lambda: find_secrets(os.environ), repr=False)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the workers, politely, or at once when an error leaves the block or a second signal comes."""
        try:
            if kind is not None:
                self.executor.kill()
                return
            try:
                self.executor.stop()
            except Interrupted:
                self.executor.kill()
        finally:
            self.executor.close()

    def measure(
        self,
        experiment: CampaignExperiment,
        folder: AttemptFolder,
        *,
        keep_engine: bool,
        gap: GapOutcome | None,
        on_event: Observer,
    ) -> Measurement:
        """What became of the attempt; a failed one is a value, not an error.

        Raises:
            Interrupted: a stop was requested, and the worker was ended.
            InfrastructureError: a worker cannot be started, or the results folder is full.
        """
        started_at = utc_text(self.now())
        request = self._request(experiment, folder, keep_engine=keep_engine, gap=gap)
        outcome = self._run(experiment, folder, request, on_event)
        record, error = _result_of(outcome, folder, experiment)
        self.meters.note(record, request)
        attempt = Attempt(
            number=folder.number,
            result_path=str(folder.result_path) if record is not None else None,
            valid=None if record is None else record.validity.valid,
            error=None if error is None else error.message,
            log_path=str(folder.log_path) if folder.log_path.exists() else None,
            started_at=started_at,
            completed_at=utc_text(self.now()),
            host=self.host,
        )
        return Measurement(attempt, record, error, outcome.log_tail)

    def look_after(self, report: Callable[[str], None]) -> None:
        """As `Executor.look_after`; what cannot be repaired is an InfrastructureError, which stops the campaign."""
        try:
            self.executor.look_after(report)
        except UserError as error:  # what was there when the campaign began is gone
            raise InfrastructureError(error.message, error.hint) from error

    def find_environment(self, experiments: Sequence[CampaignExperiment]) -> dict[str, Any]:
        """Versions, driver and GPUs of these experiments' workers, by name; the workers are started for it.

        Raises:
            UserError: a worker cannot be started, or its engine is missing.
            Interrupted: a stop was requested.
        """
        found: dict[str, Any] = {}
        for backend in dict.fromkeys(item.backend for item in experiments):
            try:
                worker = self.executor.worker_for(backend)
                worker.open(self.stop)
            except WorkerUnavailable as error:  # nothing has run yet: the host is unfit, no experiment has failed
                raise UserError(error.message, error.hint) from error
            missing = missing_distributions(backend, worker.environment)
            if missing:
                raise self._without_engine(backend, missing, worker.environment)
            found.update({f"{backend}.{name}": value for name, value in worker.environment.items()})
        return found

    def _without_engine(self, backend: str, missing: Sequence[str], environment: Mapping[str, Any]) -> UserError:
        python = f"Python ({environment.get('python')})"
        names = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
        if self.executor.name == "docker":
            return UserError(
                f"backend {backend} cannot run in service {backend}: {names} not installed in its {python}",
                "name an image that has it in the compose file; lem compose prints one with such images",
            )
        install = f"pip install {' '.join(missing)}"
        return UserError(
            f"backend {backend} cannot run here: {names} not installed in this {python}",
            f"{install}, name another Python with --python, or use a container (lem doctor)",
        )

    def _run(
        self, experiment: CampaignExperiment, folder: AttemptFolder, request: RunRequest, on_event: Observer
    ) -> Outcome:
        try:
            _write_prompts(experiment, folder)
        except UserError as error:
            return Outcome(EngineError(error.message, error.hint, kind="prompts", is_permanent=True))
        execution, baseline = self.campaign.execution, experiment.config.baseline
        timeouts = Timeouts(
            load_s=execution.load_timeout_seconds,
            rest_s=METERS_S + (baseline.duration_sec if baseline.enabled else 0.0),
            experiment_s=execution.experiment_timeout_seconds,
            silence_s=execution.silence_timeout_seconds,
        )
        try:
            worker = self.executor.worker_for(experiment.backend)
            with self.meters.attending(experiment.config, request) as attendance:

                def pass_on(event: Event) -> None:
                    on_event(attendance.follow(event))

                return worker.run(attendance.request, pass_on, timeouts, self.stop)
        except UserError as error:  # the program that ran before is gone
            raise InfrastructureError(error.message, error.hint) from error

    def _request(
        self, experiment: CampaignExperiment, folder: AttemptFolder, *, keep_engine: bool, gap: GapOutcome | None
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
                "host": self.host,
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
            gap_s=None if gap is None else gap.gap_s,
            gap_end_code=None if gap is None else gap.reason.code,
            executor=self.executor.name,
            secrets=self._secrets,
        )


def _write_prompts(experiment: CampaignExperiment, folder: AttemptFolder) -> None:
    """Write the prompts where the host resolves them; a UserError when they are not those of the plan."""
    resolved = resolve_on_host(experiment.config)
    if resolved is None:
        return
    fingerprint = prompts_fingerprint(experiment.config, resolved)
    if config_hash(experiment.config, fingerprint) != experiment.config_hash:
        raise UserError(
            f"the prompts have changed since the campaign was planned: {resolved.source.get('path')}",
            "do not change prompts while a campaign runs; --resume plans it again with the new ones",
        )
    folder.write_prompts(
        {"prompt": item.prompt, "input_tokens": item.input_tokens, "output_tokens": item.output_tokens}
        for item in resolved.prompts
    )


def _result_of(
    outcome: Outcome, folder: AttemptFolder, experiment: CampaignExperiment
) -> tuple[Record | None, EngineError | None]:
    """The record on disk, which counts, whatever the worker reported."""
    path, reported = folder.result_path, outcome.error
    if reported is not None and reported.kind == "full":
        raise InfrastructureError(reported.message, reported.hint)
    try:
        record = read_record(path)
    except FileNotFoundError:
        return None, reported or EngineError("the worker reported a result but did not write one", kind="channel")
    except (RecordError, OSError) as error:
        return None, EngineError(f"{path}: {error}", kind="channel")
    if record.identity.experiment_id != experiment.exp_id or record.identity.attempt != folder.number:
        return None, EngineError(f"{path}: the result belongs to another experiment", kind="channel")
    if reported is not None:
        _logger.warning("%s was measured, but then: %s", experiment.exp_id, reported.message)
    return record, None


def check_supported(campaign: CampaignConfig, executor_name: str) -> None:
    """Refuse, with a UserError, what only containers can do where there are none."""
    if campaign.cold_start.restart_container and executor_name != "docker":
        raise UserError(
            "cold_start.restart_container requires containers, but these experiments run in this Python",
            "use cold_start.force_cold_start, which starts a new worker for each experiment",
        )


def gpus_of(plan: Plan) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a plan uses; a name that is not found here is the worker's to refuse."""
    visible = visible_gpus(find_gpus(), os.environ)
    return tuple(sorted({gpu.uuid for item in plan.configurations for gpu in named_gpus(item.config.gpus, visible)}))


def plan_campaign(loaded: Loaded[CampaignConfig]) -> Plan:
    """The plan of a loaded campaign on this host, with a warning for each option that does nothing in a campaign.

    Raises:
        ConfigurationError: prompts that cannot be used.
    """
    plan = build_plan(
        loaded.config,
        loaded.listed,
        preset=loaded.preset,
        source=loaded.source,
        gpus=find_gpus() or None,
    )
    unused = []
    for item in plan.configurations:
        options = {
            "num_cycles": (item.config.num_cycles != 1, "execution.cycles"),
            "io.results_dir": (item.config.io.results_dir is not None, "the campaign's io.results_dir"),
        }
        for name, (is_set, instead) in options.items():
            if is_set:
                reason = Reason.of("campaign_decides", option=name, instead=instead)
                unused.append(GridValidationIssue.of(item.config_name, reason, severity="warning"))
    return replace(plan, warnings=(*plan.warnings, *unused))
