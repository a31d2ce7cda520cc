"""A worker in a container: what stands around it is seen to before it starts, before a run and after one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lem.experiment.channel import RunRequest
from lem.orchestration.attempt import Outcome, Timeouts, WorkerEvent
from lem.orchestration.worker_connection import Stop, WorkerConnection
from lem.orchestration.workers import Worker, WorkerUnavailable
from lem.reasons import Reason
from lem.record_codec import RecordError, read_record, write_record

__all__ = ["ContainerWorker", "Keeper", "mark_invalid"]

_logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """Whoever looks after the containers that workers run in."""

    def make_ready(self, service: str) -> Mapping[str, Any]:
        """Have the container of a service run and answer; what to add to the environment of its worker."""

    def recover(self, service: str) -> None:
        """Have a container work again in which no worker could be started."""

    def make_way(self, service: str, stop: Stop | None) -> None:
        """Have every other worker give up its engine, and the device free."""

    def adapt(self, service: str, request: RunRequest) -> RunRequest:
        """The request as it is meant inside the container."""

    def settle(self, service: str, request: RunRequest, outcome: Outcome) -> Outcome:
        """The outcome with what the container has to say to it."""


class ContainerWorker(Worker):
    """One worker in the container of one service."""

    def __init__(
        self,
        keeper: Keeper,
        service: str,
        command: Sequence[str],
        env: Mapping[str, str],
        backstop: Callable[[], None],
    ) -> None:
        super().__init__(command, env=env, shares_pids=False, backstop=backstop)
        self._keeper = keeper
        self._service = service

    def run(
        self,
        request: RunRequest,
        on_event: Callable[[WorkerEvent], None],
        timeouts: Timeouts,
        stop: Stop | None = None,
    ) -> Outcome:
        """As `Worker.run`, on a device that no other worker holds."""
        self._keeper.make_way(self._service, stop)
        adapted = self._keeper.adapt(self._service, request)
        return self._keeper.settle(self._service, adapted, super().run(adapted, on_event, timeouts, stop))

    def _open(self, stop: Stop | None, timeout_s: float) -> WorkerConnection:
        facts = self._keeper.make_ready(self._service)
        try:
            connection = super()._open(stop, timeout_s)
        except WorkerUnavailable:
            # The container runs and yet nothing can be started in it; it gets one chance to be made well.
            self._keeper.recover(self._service)
            connection = super()._open(stop, timeout_s)
        self.environment = {**self.environment, **facts}
        return connection


def mark_invalid(path: Path, reason: Reason) -> None:
    """Say in a result that it may not be used; one that cannot be read is found out by whoever reads it."""
    try:
        record = read_record(path)
        validity = dataclasses.replace(
            record.validity, valid=False, invalid_reasons=(*record.validity.invalid_reasons, reason)
        )
        write_record(path, dataclasses.replace(record, validity=validity))
    except (RecordError, OSError) as error:
        _logger.warning("%s cannot be marked as not valid (%s): %s", path, reason, error)
