"""Running experiments in containers: the workers inside, and why one died."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lem.base.clock import utc_now, utc_text
from lem.base.errors import EngineError, InfrastructureError, Interrupted, LockedError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignHealthCheckConfig
from lem.orchestration.container import ContainerManager, gpu_loss, holders
from lem.orchestration.dispatch import Outcome, Timeouts, Worker, WorkerConnection, WorkerUnavailable
from lem.orchestration.docker import ContainerError
from lem.orchestration.locks import Holder, LockTarget, default_gpu_lock_folder, hold_locks
from lem.orchestration.schedule import StopRequest
from lem.orchestration.services import ComposeProject, Services
from lem.orchestration.status import Observer
from lem.record import RESULT_FILE, RecordError, read_record, write_record
from lem.worker.channel import LOADING_PHASES, RunRequest
from lem.worker.guardian import new_mark

# How much later than the death of a process the Docker engine may tell why.
_NEWS_DELAY_S = 1.0


def explain_death(services: Services, service: str, outcome: Outcome, begun_s: float | None) -> Outcome:
    """The outcome of an attempt whose engine died, with what became of its container.

    Args:
        begun_s: when the attempt began, in seconds since 1970; None when nobody knows.

    Raises:
        ContainerError: the Docker engine cannot be asked.
    """
    error, until_s = outcome.error, time.time() + _NEWS_DELAY_S
    if error is None:
        return outcome
    if begun_s is not None and services.was_out_of_memory(service, begun_s, until_s):
        explained = EngineError(
            f"{error.message}; the container ran out of memory",
            "raise its limit (LEM_MEMORY_LIMIT, mem_limit in the compose file), or ask the engine for less",
            kind="out_of_memory",
            is_permanent=outcome.phase in LOADING_PHASES,
        )
        return dataclasses.replace(outcome, error=explained)
    state = services.state(service)
    if state is not None and state.is_running:
        return outcome
    how = "it was removed" if state is None else state.describe()
    explained = EngineError(
        f"{error.message}; its container does not run any more: {how}",
        "somebody ended the container, not lem: docker events --since 1h tells when",
        kind=error.kind,
    )
    return dataclasses.replace(outcome, error=explained)


_logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """Whoever looks after the containers that workers run in."""

    def make_ready(self, service: str) -> Mapping[str, Any]:
        """Have the container of a service run and answer; what to add to the environment of its worker."""

    def recover(self, service: str) -> None:
        """Have a container work again in which no worker could be started."""

    def make_way(self, service: str, stop: StopRequest | None) -> None:
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
        self, request: RunRequest, on_event: Observer, timeouts: Timeouts, stop: StopRequest | None = None
    ) -> Outcome:
        """As `Worker.run`, on a device that no other worker holds."""
        self._keeper.make_way(self._service, stop)
        adapted = self._keeper.adapt(self._service, request)
        return self._keeper.settle(self._service, adapted, super().run(adapted, on_event, timeouts, stop))

    def _open(self, stop: StopRequest | None, timeout_s: float) -> WorkerConnection:
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


TEARDOWN_S = 10.0
_POLL_S = 0.2


class ContainerLost(InfrastructureError):
    """A container that does not come back; the rest of the campaign stays pending."""


@dataclass
class DockerExecutor:
    """Workers in the containers of one compose project.

    Attributes:
        backends: those that will be needed; each runs in the service of its name.
        gpu_uuids: by the number that lem, and so a configuration, calls a GPU.
        is_recreating: a container is replaced before it is used again after `stop`.
        free_timeout_s: how long the GPU may take to be free once the engine that held it is gone.
    """

    project: ComposeProject
    backends: tuple[str, ...]
    campaign_name: str
    health: CampaignHealthCheckConfig = field(default_factory=CampaignHealthCheckConfig)
    gpu_uuids: Mapping[str, str] = field(default_factory=dict)
    is_recreating: bool = False
    free_timeout_s: float = 30.0
    name: str = field(default="docker", init=False)
    _manager: ContainerManager | None = field(default=None, init=False)
    _workers: dict[str, ContainerWorker] = field(default_factory=dict, init=False)
    _stale: set[str] = field(default_factory=set, init=False)
    _suspect: set[str] = field(default_factory=set, init=False)
    _begun_s: dict[str, float] = field(default_factory=dict, init=False)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    @property
    def manager(self) -> ContainerManager:
        """The containers, which are all started the first time.

        Raises:
            ContainerError: something that they need is missing, or they do not start.
            LockedError: another campaign uses this compose project.
        """
        if self._manager is None:
            self._manager = self._start()
        return self._manager

    def worker_for(self, backend: str) -> Worker:
        """The worker in the container of a backend.

        Raises:
            ContainerError, LockedError: as `manager`.
        """
        if backend not in self._workers:
            manager, mark = self.manager, new_mark()
            services = manager.prepare((backend,))
            worker = ContainerWorker(
                self,
                backend,
                services.worker_command(backend, mark),
                services.compose.docker.env,
                backstop=lambda: services.clear(backend, mark),
            )
            manager.adopt(backend, worker)
            self._workers[backend] = worker
        return self._workers[backend]

    def stop(self) -> None:
        """End every worker with its engine; the containers stay."""
        for worker in self._workers.values():
            worker.stop()
        if self.is_recreating:
            self._stale.update(self._workers)

    def kill(self) -> None:
        """End every worker with its engine at once; the containers stay."""
        for worker in self._workers.values():
            worker.kill()

    def close(self) -> None:
        """Remove the containers, when the workers have ended."""
        manager, self._manager = self._manager, None
        self._workers.clear()
        self._stale.clear()
        self._suspect.clear()
        try:
            if manager is not None:
                manager.teardown(TEARDOWN_S)
        finally:
            self._held.close()

    def clear(self) -> None:
        """Remove the containers of the project, unless another campaign has them."""
        with contextlib.suppress(LockedError), hold_locks([self._lock()], self._holder()):
            ContainerManager(project=self.project).teardown(TEARDOWN_S)

    def look_after(self, tell: Callable[[str], None]) -> None:
        """See that every container is healthy, and make well one that is not; never while one measures.

        Raises:
            ContainerLost: one does not become healthy.
            Interrupted: as `Worker.stop`.
        """
        threshold_pct = self.health.gpu_memory_threshold_pct
        for service, worker in self._workers.items():
            status = self.manager.check_health(service, threshold_pct)
            if status.healthy:
                continue
            if not self.health.restart_on_failure:
                tell(f"{service} is unhealthy, and restart_on_failure is off: {status.reason}")
                continue
            tell(f"{service} is unhealthy and is restarted: {status.reason}")
            worker.stop()
            self.recover(service)
            tell(f"{service} is healthy again")

    # What a worker asks of its keeper

    def make_ready(self, service: str) -> Mapping[str, Any]:
        """The image of a service, whose container runs and is the one it should be.

        Raises:
            ContainerLost, ContainerError: it cannot be had.
        """
        services = self.manager.services
        if service in self._stale:
            services.recreate(service)
            services.await_answer(service)
            self._stale.discard(service)
        state = services.state(service)
        if state is None or not state.is_running or service in self._suspect:
            self.recover(service)
        return {"image": services.images.get(service)}

    def recover(self, service: str) -> None:
        """Restart the container of a service until it is healthy.

        Raises:
            ContainerLost: it does not become so, or may not be restarted (again).
        """
        health, manager = self.health, self.manager
        limit = health.max_restarts if health.restart_on_failure else 0
        status = manager.check_and_recover(service, health.gpu_memory_threshold_pct, limit)
        if status.healthy:
            self._suspect.discard(service)
            return
        used = manager.restarts.get(service, 0)
        tried = f"does not come back after {used} restart{'s' if used > 1 else ''}"
        raise ContainerLost(
            f"the container of {service} {tried if used else 'may not be restarted'}: {status.reason}",
            "lem doctor shows what is missing; then go on with --resume",
        )

    def make_way(self, service: str, stop: StopRequest | None) -> None:
        """Have the others give up their engines, and see that nothing of theirs is on the GPU of a service.

        Raises:
            ContainerLost: the GPU does not become free.
            Interrupted: a stop was asked for.
        """
        others = [name for name, worker in self._workers.items() if name != service and worker.is_open]
        for name in others:
            self._workers[name].unload(stop)
        if not others or not self.manager.services.has_gpu(service):
            return
        if self._becomes_free(service, others, stop):
            return
        for name in others:
            self._workers[name].stop()
            self.manager.services.recreate(name)
        if not self._becomes_free(service, others, stop):
            raise ContainerLost(
                f"the GPU of {service} is still held by the containers of {', '.join(others)}, which were replaced",
                "a process that hangs in the driver goes with a reset of the GPU, or of the machine",
            )

    def adapt(self, service: str, request: RunRequest) -> RunRequest:
        """The request with the image, and with GPUs named by UUID: their numbers are others inside."""
        services = self.manager.services
        self._begun_s[service] = time.time()
        config = dict(request.config)
        if self.gpu_uuids and services.has_gpu(service):
            named = ("0",) if config.get("gpus") is None else config["gpus"]
            config["gpus"] = [self.gpu_uuids.get(str(name), str(name)) for name in named]
        return dataclasses.replace(
            request,
            config=config,
            image=services.images.get(service),
            # A container without a GPU has nothing to sample that this host has not.
            is_sampler_due=request.is_sampler_due and services.has_gpu(service),
            samples_path=None if request.is_sampler_due and not services.has_gpu(service) else request.samples_path,
        )

    def settle(self, service: str, request: RunRequest, outcome: Outcome) -> Outcome:
        """The outcome, its result marked as not valid when the container lost its GPU meanwhile.

        Raises:
            ContainerError: the engine cannot be asked.
        """
        if outcome.error is not None and outcome.error.kind == "died":
            outcome = explain_death(self.manager.services, service, outcome, self._begun_s.get(service))
        if not self.manager.services.has_gpu(service):
            return outcome
        lost = self._gpu_loss(service)
        if lost is None:
            return outcome
        self._suspect.add(service)
        self._workers[service].stop()
        if outcome.error is not None:
            error = EngineError(f"{outcome.error.message}; {lost}", outcome.error.hint, kind=outcome.error.kind)
            return dataclasses.replace(outcome, error=error)
        mark_invalid(Path(request.result_dir) / RESULT_FILE, lost)
        return outcome

    def _start(self) -> ContainerManager:
        manager = ContainerManager(project=self.project)
        with contextlib.ExitStack() as held:
            held.enter_context(hold_locks([self._lock()], self._holder()))
            manager.prepare(self.backends)  # what is missing is told before there is anything to take down
            try:
                # A container that an earlier run left behind may hold anything.
                manager.start_services(self.backends, recreate=True)
            except BaseException:
                with contextlib.suppress(Interrupted):
                    manager.teardown(TEARDOWN_S)
                raise
            self._held.enter_context(held.pop_all())
        return manager

    def _lock(self) -> LockTarget:
        folder = default_gpu_lock_folder(self.project.environ)
        return LockTarget(folder / f"compose-{self.project.name}.lock", f"compose project {self.project.name}")

    def _holder(self) -> Holder:
        return Holder(os.getpid(), socket.gethostname(), self.campaign_name, utc_text(utc_now()))

    def _becomes_free(self, service: str, others: Iterable[str], stop: StopRequest | None) -> bool:
        """Whether, within a while, no process of the other containers is on the GPUs that a service sees."""
        services = self.manager.services
        deadline = time.monotonic() + self.free_timeout_s
        while True:
            if stop is not None and stop.signum is not None:
                raise Interrupted(stop.signum)
            pids = frozenset().union(*(services.pids(name) for name in others))
            try:
                reading = services.read_gpus(service)
            except ContainerError as error:
                # It is not there to be asked; that comes to light, and is mended, when its worker is opened.
                _logger.warning("%s: %s", service, error.message)
                return True
            if not holders([reading], pids):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)

    def _gpu_loss(self, service: str) -> Reason | None:
        try:
            return gpu_loss(self.manager.services.read_gpus(service))
        except ContainerError as error:
            _logger.warning("%s: %s", service, error.message)
            return None  # a container that does not answer is found and mended before it is used again
