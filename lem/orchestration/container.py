"""Long-running containers, one service a backend, and experiments sent into them by `docker compose exec`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import slug_of
from lem.meters.nvml import GpuReading, GpuState
from lem.orchestration.compose import find_compose_files
from lem.orchestration.dispatch import Worker
from lem.orchestration.docker import ContainerError, Mount, explain
from lem.orchestration.doctor import some_shown
from lem.orchestration.packing import cache_folder
from lem.orchestration.services import UP_TIMEOUT_S, ComposeProject, Services
from lem.worker.guardian import new_mark

__all__ = ["ContainerError", "ContainerHealthStatus", "ContainerManager", "bare_project"]


_GB = 1e9

# What NVML says in a container from which the GPU was taken away while it ran.
_LOST = frozenset({"Unknown Error", "Not Found", "Insufficient Permissions"})


@dataclass(frozen=True)
class ContainerHealthStatus:
    """How a container is.

    Attributes:
        reason: why, in words, also when it is healthy.
        gpu_memory_used_gb, gpu_memory_total_gb: over its GPUs, in 10⁹ bytes; None without a GPU or an answer.
    """

    service: str
    healthy: bool
    reason: str
    gpu_memory_used_gb: float | None = None
    gpu_memory_total_gb: float | None = None


def gpu_loss(reading: GpuReading) -> Reason | None:
    """How a container that was given a GPU has lost it; None when it sees it.

    A reading that failed in a way that is not known is a loss too: what cannot be read cannot be measured.
    """
    if reading.error is not None:
        return Reason.of("gpu_unplugged" if reading.error in _LOST else "gpu_lost", error=reading.error)
    return None if reading.gpus else Reason.of("gpu_gone")


def judge(
    service: str, reading: GpuReading, own_pids: Collection[int], gpu_memory_threshold_pct: float
) -> ContainerHealthStatus:
    """The health of a container with a GPU that has answered.

    Args:
        own_pids: processes of lem's own worker as the host numbers them; what they hold does not count.
        gpu_memory_threshold_pct: memory in use on any one GPU from which on it is unhealthy.
    """
    lost = gpu_loss(reading)
    if lost is not None:
        return ContainerHealthStatus(service, healthy=False, reason=lost.text)
    used_gb = sum(gpu.memory_used_b for gpu in reading.gpus) / _GB
    total_gb = sum(gpu.memory_total_b for gpu in reading.gpus) / _GB
    worst = max(reading.gpus, key=lambda gpu: _foreign_pct(gpu, own_pids))
    worst_pct = _foreign_pct(worst, own_pids)
    healthy = worst_pct < gpu_memory_threshold_pct
    whose = "by others" if _holds_any(worst, own_pids) else "in use"
    reason = f"{worst_pct:.0f} % of the memory of GPU {worst.index} is held {whose}"
    if not healthy:
        reason += f", the threshold is {gpu_memory_threshold_pct:g} %{_by_whom(worst, own_pids)}"
    return ContainerHealthStatus(service, healthy, reason, used_gb, total_gb)


def holders(readings: Sequence[GpuReading], pids: Collection[int]) -> tuple[int, ...]:
    """Which of these processes still have a context on a GPU."""
    found = {item.pid for reading in readings for gpu in reading.gpus for item in gpu.processes}
    return tuple(sorted(found & set(pids)))


def _foreign_pct(gpu: GpuState, own_pids: Collection[int]) -> float:
    """Memory in use that is not lem's own; all of it lem's where the driver does not tell shares and nobody else runs.

    NVIDIA's driver counts contexts in `memory_used_b` and in the processes' shares alike.
    """
    if gpu.memory_total_b <= 0:
        return 0.0
    own = [item for item in gpu.processes if item.pid in own_pids]
    if own and len(own) == len(gpu.processes) and any(item.memory_b is None for item in own):
        return 0.0
    own_b = sum(item.memory_b or 0 for item in own)
    return 100.0 * max(0, gpu.memory_used_b - own_b) / gpu.memory_total_b


def _holds_any(gpu: GpuState, pids: Collection[int]) -> bool:
    return any(item.pid in pids for item in gpu.processes)


def _by_whom(gpu: GpuState, own_pids: Collection[int]) -> str:
    others = [str(item.pid) for item in gpu.processes if item.pid not in own_pids]
    return f"; processes {some_shown(others)}" if others else ""


_logger = logging.getLogger(__name__)


class ContainerManager:
    """The containers of one compose project.

    Nothing is looked at or started before a method needs it. Paths that an experiment names work inside as they do
    here, as far as they lie below `project_dir`, or are mounted by the project given.
    """

    def __init__(
        self,
        compose_file: str | os.PathLike[str] | None = "docker-compose.yml",
        project_dir: str | os.PathLike[str] | None = None,
        *,
        project: ComposeProject | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Set it up.

        Args:
            compose_file: the file, or several with colons between them; None looks for one.
            project_dir: where relative paths start; None is the working directory.
            project: all of it, when it is more than a file.
        """
        self._compose_file = compose_file
        self._project_dir = project_dir
        self._project = project
        self._environ = environ
        self._services: Services | None = None
        self._prepared: tuple[str, ...] = ()
        self._restarts: Counter[str] = Counter()
        self._workers: dict[str, list[Worker]] = {}

    @property
    def project(self) -> ComposeProject:
        """The compose project.

        Raises:
            ContainerError: kind `compose_file`, the file is not there.
        """
        if self._project is None:
            self._project = bare_project(self._compose_file, self._project_dir, self._environ)
        return self._project

    @property
    def services(self) -> Services:
        """The services as they were prepared, or as an earlier manager left them.

        Raises:
            ContainerError: kind `compose_file`.
        """
        if self._services is None:
            self._services = self.project.existing()
        return self._services

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each service was restarted to recover it."""
        return dict(self._restarts)

    def prepare(self, backends: Iterable[str]) -> Services:
        """The services, with everything there that these backends need; they are not started.

        Raises:
            ContainerError: something is missing: engine, plugin, file, service, image.
            UserError: a file or folder cannot be written.
        """
        wanted = tuple(dict.fromkeys((*self._prepared, *backends)))
        if self._services is None or wanted != self._prepared:
            self._services = self.project.prepare(wanted)
            self._prepared = wanted
        return self._services

    def start_services(self, backends: Iterable[str], wait: bool = True, *, recreate: bool = False) -> None:
        """Start the services of these backends, and no others.

        Args:
            wait: until each one answers, at most a minute.
            recreate: replace containers that are there, whatever they hold.

        Raises:
            ContainerError: a `RuntimeError`; something is missing, or a container does not answer.
            UserError: a file or folder cannot be written.
        """
        names = tuple(dict.fromkeys(backends))
        services = self.prepare(names)
        services.start(names, recreate=recreate)
        if wait:
            for name in names:
                services.await_answer(name)

    def is_service_running(self, service: str) -> bool:
        """Whether the container of a service runs; False also when nobody can say."""
        try:
            state = self.services.state(service)
        except UserError as error:
            _logger.warning("%s: %s", service, error.message)
            return False
        return state is not None and state.is_running

    def execute_experiment(
        self,
        service: str,
        config_path: str | os.PathLike[str],
        extra_args: Sequence[str] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> tuple[str, int]:
        """What `lem experiment CONFIG --yes` printed in a running service, and its exit code.

        When it could not run at all: why, and 1. It is ended with this process, however that ends.

        Args:
            env_vars: for its environment; they are on no command line.
        """
        if not self.is_service_running(service):
            return f"service {service} is not running", 1
        arguments = ("experiment", os.fspath(config_path), "--yes", *(extra_args or ()))
        try:
            return self.services.run_tethered(service, arguments, env_vars or {})
        except UserError as error:
            return error.message, 1

    def check_health(self, service: str, gpu_memory_threshold_pct: float = 90.0) -> ContainerHealthStatus:
        """How a service is: it runs, it answers, and its GPUs are there with room for an engine.

        Memory that lem's own worker holds does not count. Without a GPU it is healthy when it answers.
        """
        try:
            state = self.services.state(service)
            if state is None or not state.is_running:
                reason = "it has no container" if state is None else f"its container is {state.describe()}"
                return ContainerHealthStatus(service, healthy=False, reason=reason)
            reading = self.services.read_gpus(service)
            if not self.services.has_gpu(service):
                return ContainerHealthStatus(service, healthy=True, reason="it answers, and has no GPU")
            is_in_use = any(worker.is_open for worker in self._workers.get(service, ()))
            own = self.services.pids(service) if is_in_use else frozenset()
        except UserError as error:
            return ContainerHealthStatus(service, healthy=False, reason=error.message)
        return judge(service, reading, own, gpu_memory_threshold_pct)

    def restart_service(self, service: str, gpu_memory_threshold_pct: float = 90.0) -> bool:
        """Whether a service is healthy again after a restart, or else in a new container."""
        return self._restarted(service, gpu_memory_threshold_pct).healthy

    def _restarted(self, service: str, gpu_memory_threshold_pct: float) -> ContainerHealthStatus:
        """The health after a restart and, if that did not help, in a new container.

        A restart keeps what the container was made of, its GPUs included; a new container does not.
        """
        for step in (Services.restart, Services.recreate):
            try:
                step(self.services, service)
                self.services.await_answer(service)
            except UserError as error:
                _logger.warning("%s: %s", service, error.message)
                continue
            status = self.check_health(service, gpu_memory_threshold_pct)
            if status.healthy:
                return status
            _logger.warning("%s is still unhealthy: %s", service, status.reason)
        return self.check_health(service, gpu_memory_threshold_pct)

    def check_and_recover(
        self, service: str, gpu_memory_threshold_pct: float = 90.0, max_restarts: int = 3
    ) -> ContainerHealthStatus:
        """The health of a service after as many restarts as it needs and may have.

        Args:
            max_restarts: for each service, over the life of this manager, which is one campaign.
        """
        status = self.check_health(service, gpu_memory_threshold_pct)
        while not status.healthy and self._restarts[service] < max_restarts:
            self._restarts[service] += 1
            count = f"{self._restarts[service]} of {max_restarts}"
            _logger.warning("%s is unhealthy: %s; restart %s", service, status.reason, count)
            status = self._restarted(service, gpu_memory_threshold_pct)
        return status

    def teardown(self, timeout: float = 30) -> None:
        """Stop and remove the containers and the network of the project; what is not there is fine.

        Args:
            timeout: seconds that a container has to stop by itself.
        """
        words = ("down", "--remove-orphans", "--timeout", str(max(0, round(timeout))))
        try:
            finished = self.services.compose.call(*words, timeout_s=timeout + UP_TIMEOUT_S)
        except UserError as error:
            _logger.warning("containers may be left: %s", error.message)
            return
        if finished.code != 0:
            left = explain(finished, f"taking down project {self.project.name}")
            _logger.warning("containers may be left: %s", left.message)

    def __enter__(self) -> ContainerManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.teardown()

    def open_worker(self, service: str) -> Worker:
        """A worker that runs in a service, which has to run; not started yet."""
        services, mark = self.services, new_mark()
        worker = Worker(
            services.worker_command(service, mark),
            env=services.compose.docker.env,
            shares_pids=False,
            backstop=lambda: services.clear(service, mark),
        )
        self.adopt(service, worker)
        return worker

    def adopt(self, service: str, worker: Worker) -> None:
        """Take note of a worker in a service: what it holds while it is open is lem's own."""
        self._workers.setdefault(service, []).append(worker)


def bare_project(
    compose_file: str | os.PathLike[str] | None,
    project_dir: str | os.PathLike[str] | None,
    environ: Mapping[str, str] = os.environ,
) -> ComposeProject:
    """The project of a compose file alone: its folder can be read inside, and `results` in it written.

    Raises:
        ContainerError: kind `compose_file`, there is no such file.
    """
    folder = Path(project_dir or ".").absolute()
    # Two folders of the same name are two projects.
    name = f"lem-{slug_of(folder.name)}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    return ComposeProject(
        name=name,
        files=find_compose_files(compose_file, folder, environ),
        state_folder=cache_folder(environ) / "compose" / name,
        working_dir=folder,
        results_dir=folder / "results",
        directory=None if project_dir is None else folder,
        mounts=(Mount.in_place(folder),),
        environ=environ,
    )
