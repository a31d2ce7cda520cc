"""Experiments in containers: each backend in its own long-running one, one engine loaded at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.clock import utc_now, utc_text
from lem.config.campaign_config import CampaignHealthCheckConfig
from lem.errors import EngineError, InfrastructureError, Interrupted, LockedError
from lem.experiment.channel import RunRequest
from lem.experiment.leftovers import new_mark
from lem.orchestration.attempt import Outcome
from lem.orchestration.compose_project import ComposeProject
from lem.orchestration.container import ContainerManager
from lem.orchestration.container_death import explain_death
from lem.orchestration.container_worker import ContainerWorker, mark_invalid
from lem.orchestration.docker import ContainerError
from lem.orchestration.health import gpu_loss, holders
from lem.orchestration.locks import Holder, LockTarget, default_gpu_lock_folder, hold_locks
from lem.orchestration.worker_connection import Stop
from lem.orchestration.workers import Worker
from lem.reasons import Reason
from lem.record import RESULT_FILE

__all__ = ["ContainerLost", "DockerExecutor"]

_logger = logging.getLogger(__name__)

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

    def make_way(self, service: str, stop: Stop | None) -> None:
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
            return dataclasses.replace(outcome, error=error, is_engine_lost=True)
        mark_invalid(Path(request.result_dir) / RESULT_FILE, lost)
        return dataclasses.replace(outcome, valid=False, is_engine_lost=True)

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

    def _becomes_free(self, service: str, others: Iterable[str], stop: Stop | None) -> bool:
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
