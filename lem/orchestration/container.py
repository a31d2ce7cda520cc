"""Long-running containers, one service per backend, and experiments sent into them by `docker compose exec`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lem.base import process
from lem.base.codec import decode_hint
from lem.base.dataclass import dataclass
from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.base.units import some_of
from lem.base.variables import MARK_VARIABLE, cache_folder
from lem.config.campaign_config import slug_of
from lem.meters.nvml import GpuReading, GpuState
from lem.orchestration.compose import ComposeProject, FileNames, Mount, compose_variables, find_compose_files
from lem.orchestration.dispatch import Worker
from lem.orchestration.docker import Compose, ContainerError, ContainerState, describe, explain
from lem.orchestration.packing import provide_pyz
from lem.orchestration.plan import service_and_image
from lem.worker.guardian import new_mark

__all__ = ["ContainerError", "ContainerHealthStatus", "ContainerManager"]

_logger = logging.getLogger(__name__)
W = TypeVar("W", bound=Worker)

# Containers start in a second or two; a GPU that has to wake up, or an engine under load, takes longer.
UP_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 15.0
STOP_GRACE_S = "5"
EXPERIMENT_TIMEOUT_S = 2 * 3600.0
_POLL_S = 0.2
_LOG_LINES = "5"
_GB = 1e9
_MAX_SHOWN = 4

# NVML's errors in a container whose GPU was taken away while it ran.
_LOST = frozenset({"Unknown Error", "Not Found", "Insufficient Permissions"})


@dataclass(frozen=True)
class ContainerHealthStatus:
    """The health of a service; memory is that of all its GPUs in 10⁹ bytes, None without a GPU or an answer."""

    service: str
    healthy: bool
    reason: str  # also if it is healthy
    gpu_memory_used_gb: float | None = None
    gpu_memory_total_gb: float | None = None


def gpu_loss(reading: GpuReading) -> Reason | None:
    """How a container with a reserved GPU has lost it; an unknown error counts, since nothing can be measured then."""
    if reading.error is not None:
        return Reason.of("gpu_unplugged" if reading.error in _LOST else "gpu_lost", error=reading.error)
    return None if reading.gpus else Reason.of("gpu_gone")


def judge(service: str, reading: GpuReading, own_pids: Collection[int], threshold_pct: float) -> ContainerHealthStatus:
    """The health of a container with a GPU; memory of lem's own processes, as the host numbers them, does not count."""
    if (lost := gpu_loss(reading)) is not None:
        return ContainerHealthStatus(service, healthy=False, reason=lost.text)
    used_gb = sum(gpu.memory_used_b or 0 for gpu in reading.gpus) / _GB
    total_gb = sum(gpu.memory_total_b or 0 for gpu in reading.gpus) / _GB
    if not total_gb:
        return ContainerHealthStatus(service, healthy=True, reason="it answers; its GPUs share the machine's memory")
    worst = max(reading.gpus, key=lambda gpu: _foreign_pct(gpu, own_pids))
    worst_pct = _foreign_pct(worst, own_pids)
    healthy = worst_pct < threshold_pct
    others = [str(item.pid) for item in worst.processes if item.pid not in own_pids]
    whose = "in use by others" if len(others) < len(worst.processes) else "in use"
    reason = f"{worst_pct:.0f} % of the memory of GPU {worst.index} is {whose}"
    if not healthy:
        reason += f", the threshold is {threshold_pct:g} %"
        reason += f"; processes {some_of(others, _MAX_SHOWN)}" if others else ""
    return ContainerHealthStatus(service, healthy, reason, used_gb, total_gb)


def _foreign_pct(gpu: GpuState, own_pids: Collection[int]) -> float:
    """Memory in use that is not lem's own.

    NVIDIA's driver counts contexts in `memory_used_b` and in the processes' shares alike. Some drivers report no
    shares; all memory is then lem's if all processes are.
    """
    if not gpu.memory_total_b or gpu.memory_used_b is None:
        return 0.0
    own = [item for item in gpu.processes if item.pid in own_pids]
    if own and len(own) == len(gpu.processes) and any(item.memory_b is None for item in own):
        return 0.0
    own_b = sum(item.memory_b or 0 for item in own)
    return 100.0 * max(0, gpu.memory_used_b - own_b) / gpu.memory_total_b


class ContainerManager:
    """The containers of one compose project.

    Nothing is read or started before a method needs it. Paths in an experiment are valid inside if they are below
    `project_dir`, or mounted by the given project.
    """

    def __init__(
        self,
        compose_file: FileNames = "docker-compose.yml",
        project_dir: str | os.PathLike[str] | None = None,
        *,
        project: ComposeProject | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Set it up.

        Args:
            compose_file: the file, or several, in a sequence or separated by colons; None searches as Compose does.
            project_dir: where relative paths start; None is the working directory.
            project: replaces all of these, if more than a file has to be described.
        """
        self._given = (compose_file, project_dir, environ)
        if project is not None:
            self.project = project
        self._compose: Compose | None = None
        self._slots: dict[str, str] = {}  # by service; what its container has, or will have when it is made
        self.restarts: Counter[str] = Counter()  # of each service, to recover it
        self._workers: dict[str, list[Worker]] = {}

    @functools.cached_property
    def project(self) -> ComposeProject:
        """The compose project, with its folder readable inside and `results` in it writable.

        Raises:
            ContainerError: its file does not exist.
        """
        compose_file, project_dir, environ = self._given
        folder = Path(project_dir or ".").absolute()
        environ = compose_variables(compose_file, None, folder, environ)
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

    @property
    def compose(self) -> Compose:
        """`docker compose` for the project as it was prepared, or as an earlier manager left it."""
        if self._compose is None:
            self._compose = self.project.existing()
        return self._compose

    def prepare(self, backends: Collection[str]) -> None:
        """Find or make everything that these backends need, or services in other images; nothing is started."""
        known = {} if self._compose is None else self._compose.images
        if not known.keys() >= set(backends):
            self._compose = self.project.prepare(tuple(dict.fromkeys((*self._slots.values(), *known, *backends))))
        for slot in backends:
            self._slots.setdefault(service_and_image(slot)[0], slot)

    def choose_image(self, slot: str) -> None:
        """Have the next container of a service made from the image of a slot, which was prepared."""
        self._slots[service_and_image(slot)[0]] = slot
        self.project.write_images(self._slots.values())

    def start_services(self, backends: Iterable[str], wait: bool = True, *, recreate: bool = False) -> None:
        """Start the services of these backends, and no others.

        Args:
            wait: until each one answers, at most a minute.
            recreate: replace existing containers, whatever state they are in.

        Raises:
            ContainerError: a `RuntimeError`; something is missing, or a container does not answer.
            UserError: a file or folder cannot be written.
        """
        slots = tuple(dict.fromkeys(backends))
        if not slots:  # `docker compose up` without names would start all services
            return
        self.prepare(slots)
        names = tuple(dict.fromkeys(service for service, _ in map(service_and_image, slots)))
        words = ("up", "--detach", "--no-build", *(("--force-recreate",) if recreate else ()))
        self.compose.must(*words, *names, doing=f"starting {', '.join(names)}", timeout_s=UP_TIMEOUT_S)
        if wait:
            for name in names:
                self.await_answer(name)

    def await_answer(self, service: str) -> None:
        """Return when lem answers in a service, within a minute; ContainerError if it does not."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                self.read_gpus(service)
            except ContainerError as error:
                state = self.state(service)
                is_starting = state is not None and state.state in ("running", "restarting", "created")
                if not is_starting or time.monotonic() >= deadline:
                    raise self._no_answer(service, state, error) from error
            else:
                return
            time.sleep(_POLL_S)

    def _no_answer(self, service: str, state: ContainerState | None, error: ContainerError) -> ContainerError:
        words = self.compose.arguments("logs", "--no-log-prefix", "--no-color", "--tail", _LOG_LINES, service)
        printed = " / ".join(line.strip() for line in self.compose.call(*words).stdout.splitlines() if line.strip())
        message = f"{service} does not answer: {describe(state)}; {error.message}"
        return ContainerError(message + (f"; it printed: {printed}" if printed else ""), error.hint, kind=error.kind)

    def state(self, service: str) -> ContainerState | None:
        """The container of a service, running or not; None if there is none."""
        return self.compose.states().get(service)

    def pids(self, service: str) -> frozenset[int]:
        """The processes in a service's container as the host numbers them."""
        state = self.state(service)
        return frozenset() if state is None else self.compose.pids(state.container_id)

    def has_gpu(self, service: str) -> bool:
        """Whether a GPU is reserved for a service."""
        if service not in self.compose.services:
            raise ContainerError(f"no such service: {service}", kind="service")
        return self.compose.services[service].has_gpu

    def is_service_running(self, service: str) -> bool:
        """Whether the container of a service runs; False also if Docker does not answer."""
        try:
            state = self.state(service)
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
        """The output and exit code of `lem experiment CONFIG --yes` in a running service.

        If it could not run at all: the reason, and 1. It ends with this process, however that ends.

        Args:
            env_vars: for its environment; they appear on no command line.
        """
        if not self.is_service_running(service):
            return f"service {service} is not running", 1
        arguments = ("experiment", os.fspath(config_path), "--yes", *(extra_args or ()))
        try:
            return self._run_tethered(service, arguments, env_vars or {})
        except UserError as error:
            return error.message, 1

    def _run_tethered(self, service: str, arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[str, int]:
        """The output and exit code of lem in a service. The variables, which may be secret, go through stdin."""
        mark = new_mark()
        command = ("docker", *self._exec_words(service, "worker", "--tether", *arguments, mark=mark))
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            descriptor = output.fileno()
            child = process.spawn(command, env=self.compose.env, streams=(process.PIPE, descriptor, descriptor))
            stack.callback(process.kill_group, child.pid)
            if child.stdin is not None:
                stack.enter_context(child.stdin)  # held open: the command inside ends when it closes
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(dict(variables)).encode() + b"\n")
            try:
                code = child.wait(EXPERIMENT_TIMEOUT_S)
            except process.TimeoutExpired:
                process.kill_group(child.pid)
                self._clear(service, mark)
                return f"the experiment did not end within {EXPERIMENT_TIMEOUT_S:.0f} s", 1
            output.seek(0)
            return output.read().decode("utf-8", "replace"), code

    def _exec_words(self, service: str, *arguments: str, mark: str | None = None) -> tuple[str, ...]:
        """The words after `docker` that run lem in a service, all of its processes with a mark in their environment.

        UserError if the lem.pyz that is mounted there was changed and cannot be written again.
        """
        provide_pyz(self.project.environ)
        options = () if mark is None else ("--env", f"{MARK_VARIABLE}={mark}")
        # -T: no terminal, so that stdin is the pipe that it is given.
        lem = ("python3", "-u", str(self.compose.pyz))
        return self.compose.arguments("exec", "-T", *options, service, *lem, *arguments)

    def _clear(self, service: str, mark: str) -> None:
        """End every process with a worker's mark, if need be by replacing the container."""
        try:
            words = self._exec_words(service, "worker", "--end-marked", mark)
            if self.compose.call(*words, timeout_s=KILL_TIMEOUT_S).code == 0:
                return
            _logger.warning("%s: its processes cannot be ended from inside; replacing the container", service)
            self.compose.call(*self.compose.arguments("kill", service), timeout_s=KILL_TIMEOUT_S)
            self.recreate(service)
        except UserError as error:
            _logger.warning("%s: processes of its worker may still run: %s", service, error.message)

    def read_gpus(self, service: str) -> GpuReading:
        """What NVML reports inside a running service; ContainerError if the service does not answer."""
        doing = f"asking {service}"
        finished = self.compose.call(*self._exec_words(service, "gpus", "--json"), timeout_s=PROBE_TIMEOUT_S)
        if finished.code != 0:
            raise explain(finished, doing)
        try:
            # An image may print lines of its own first.
            document = json.loads(finished.stdout.splitlines()[-1]) if finished.stdout else None
            return GpuReading.from_dict(decode_hint(Mapping[str, Any], document, "answer"))
        except ValueError as error:
            raise ContainerError(f"{doing}: unexpected answer {finished.stdout[:120]!r}") from error

    def check_health(self, service: str, gpu_memory_threshold_pct: float = 90.0) -> ContainerHealthStatus:
        """The health of a service: it runs, it answers, and its GPUs are there with room for an engine.

        Memory of lem's own worker does not count. Without a reserved GPU a service is healthy if it answers.
        """
        try:
            state = self.state(service)
            if state is None or not state.is_running:
                return ContainerHealthStatus(service, healthy=False, reason=describe(state))
            reading = self.read_gpus(service)
            if not self.has_gpu(service):
                return ContainerHealthStatus(service, healthy=True, reason="it answers; no GPU is reserved for it")
            is_in_use = any(worker.is_open for worker in self._workers.get(service, ()))
            own = self.pids(service) if is_in_use else frozenset()
        except UserError as error:
            return ContainerHealthStatus(service, healthy=False, reason=error.message)
        return judge(service, reading, own, gpu_memory_threshold_pct)

    def restart_service(self, service: str, gpu_memory_threshold_pct: float = 90.0) -> bool:
        """Whether a service is healthy after a restart, or else in a new container."""
        return self._restarted(service, gpu_memory_threshold_pct).healthy

    def _restarted(self, service: str, gpu_memory_threshold_pct: float) -> ContainerHealthStatus:
        """A restart keeps the container, its GPUs included; if that does not help, the container is replaced."""
        for step in (self._restart, self.recreate):
            try:
                step(service)
                self.await_answer(service)
            except UserError as error:
                _logger.warning("%s: %s", service, error.message)
                continue
            status = self.check_health(service, gpu_memory_threshold_pct)
            if status.healthy:
                return status
            _logger.warning("%s is still unhealthy: %s", service, status.reason)
        return self.check_health(service, gpu_memory_threshold_pct)

    def _restart(self, service: str) -> None:
        words = ("restart", "--timeout", STOP_GRACE_S, service)
        self.compose.must(*words, doing=f"restarting {service}", timeout_s=UP_TIMEOUT_S)

    def recreate(self, service: str) -> None:
        """Replace a container, whatever state it is in."""
        words = ("up", "--detach", "--no-build", "--no-deps", "--force-recreate", "--timeout", STOP_GRACE_S, service)
        self.compose.must(*words, doing=f"replacing the container of {service}", timeout_s=UP_TIMEOUT_S)

    def check_and_recover(
        self, service: str, gpu_memory_threshold_pct: float = 90.0, max_restarts: int = 3
    ) -> ContainerHealthStatus:
        """The health of a service, restarted while it is unhealthy and restarts are left.

        Args:
            max_restarts: per service, over the life of this manager, which is one campaign.
        """
        status = self.check_health(service, gpu_memory_threshold_pct)
        while not status.healthy and self.restarts[service] < max_restarts:
            self.restarts[service] += 1
            count = f"{self.restarts[service]} of {max_restarts}"
            _logger.warning("%s is unhealthy: %s; restart %s", service, status.reason, count)
            status = self._restarted(service, gpu_memory_threshold_pct)
        return status

    def teardown(self, timeout: float = 30) -> None:
        """Stop and remove the containers and the network of the project, if there are any, but none that is not lem's.

        Args:
            timeout: seconds for a container to stop by itself.
        """
        words = ("down", "--remove-orphans", "--timeout", str(max(0, round(timeout))))
        try:
            doing = f"taking down project {self.project.name}"
            found = self.compose.containers()
            if all(found.values()):
                self.compose.must(*words, doing=doing, timeout_s=timeout + UP_TIMEOUT_S)
            elif own := [name for name, is_own in found.items() if is_own]:
                self.compose.call("rm", "--force", "--volumes", *own, timeout_s=timeout + UP_TIMEOUT_S)
        except UserError as error:
            _logger.warning("containers may still exist: %s", error.message)

    def __enter__(self) -> ContainerManager:
        return self

    def __exit__(self, *_error: object) -> None:
        self.teardown()

    def worker_in(self, service: str, make: Callable[..., W]) -> W:
        """A worker in a running service, not started yet; its memory counts as lem's own while it is open.

        Args:
            make: called as `Worker` is.
        """
        mark = new_mark()
        worker = make(
            ("docker", *self._exec_words(service, "worker", mark=mark)),
            env=self.compose.env,
            shares_pids=False,
            backstop=lambda: self._clear(service, mark),
        )
        self._workers.setdefault(service, []).append(worker)
        return worker
