"""One attempt at an experiment: a folder, a worker, and what came of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.config.campaign_config import CampaignExecutionConfig
from lem.errors import EngineError, InfrastructureError
from lem.experiment.channel import RunRequest
from lem.experiment.prompts import resolve_on_host
from lem.orchestration.attempt import Outcome, Timeouts, WorkerEvent
from lem.orchestration.gaps import GapOutcome
from lem.orchestration.manifest import Attempt, utc_text
from lem.orchestration.plan import CampaignExperiment
from lem.orchestration.stop import StopRequest
from lem.orchestration.workers import Executor
from lem.record import Record, RecordError, read_record
from lem.results.attempt import AttemptFolder
from lem.results.repository import Repository

__all__ = ["SECRET_VARIABLES", "Measurement", "RunIdentity", "Session"]

_logger = logging.getLogger(__name__)

# What an engine may need and nobody may read: it travels in the `run` message alone.
SECRET_VARIABLES = ("HF_TOKEN",)


@dataclass(frozen=True)
class RunIdentity:
    """What all experiments of a run share."""

    campaign_id: str
    campaign_name: str
    run_id: str
    host: str
    shuffle_seed: int | None


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
    """The worker of a run, and the attempts made in it."""

    def __init__(
        self,
        executor: Executor,
        repository: Repository,
        identity: RunIdentity,
        execution: CampaignExecutionConfig,
        *,
        stop: StopRequest,
        now: Callable[[], datetime],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._executor = executor
        self._repository = repository
        self._identity = identity
        self._timeouts = Timeouts(
            load_s=execution.load_timeout_seconds,
            experiment_s=execution.experiment_timeout_seconds,
            silence_s=execution.silence_timeout_seconds,
        )
        self._stop = stop
        self._now = now
        self._secrets = {name: environ[name] for name in SECRET_VARIABLES if environ.get(name)}

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
        """A new attempt folder with the configuration and, where the host resolves them, the prompts.

        Raises:
            InfrastructureError: it cannot be written.
            EngineError: kind `prompts`, the prompts cannot be had.
        """
        folder = self._repository.prepare_attempt(self._identity.run_id, experiment.exp_id)
        folder.write_config(experiment.requested, experiment.config.to_dict())
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
        self._write_prompts(experiment, folder)
        worker = self._executor.worker_for(experiment.backend)
        request = self._request(experiment, folder, keep_engine=keep_engine, gap=gap)
        outcome = worker.run(request, on_event, self._timeouts, self._stop)
        record, error = self._result_of(outcome, folder, experiment)
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

    def end_workers(self) -> None:
        """End every worker with whatever it has loaded; the next attempt starts another."""
        self._executor.stop()

    def kill_workers(self) -> None:
        """End every worker without waiting for it to do so by itself."""
        self._executor.kill()

    def _write_prompts(self, experiment: CampaignExperiment, folder: AttemptFolder) -> None:
        resolved = resolve_on_host(experiment.config)
        if resolved is not None:
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
                "model": config.model.name,
                "cycle_index": experiment.cycle_index,
                "order_index": experiment.order_index,
                "attempt": folder.number,
                "shuffle_seed": identity.shuffle_seed,
            },
            result_dir=str(folder.path.absolute()),
            engine_key=experiment.engine_key,
            keep_engine=keep_engine,
            gap_s=None if gap is None else gap.gap_s,
            gap_end_reason=None if gap is None else gap.reason,
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
