"""Servers that lem does not start as its own processes: services of a compose file, and those that run already."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lem.base import durable, process
from lem.base.dataclass import replace
from lem.base.errors import UserError
from lem.base.launch import own_command
from lem.base.variables import SERVICE_VARIABLE
from lem.config.backends import ServerConfig
from lem.config.experiment import ExperimentConfig, MeteredConfig
from lem.engines.named import address_of
from lem.orchestration import dispatch
from lem.orchestration.compose import override_text
from lem.orchestration.container import UP_TIMEOUT_S, ContainerManager
from lem.orchestration.docker import Compose, ContainerError, Docker, explain
from lem.orchestration.plan import service_and_image, slot_of
from lem.orchestration.schedule import StopRequest, Timeouts
from lem.orchestration.status import Observer
from lem.worker.channel import RunRequest
from lem.worker.guardian import end_as

_LOGS_S = 2.0  # for the last lines of a container that has ended
_RELAYS = ("docker-proxy", "rootlessport")  # what listens where a container publishes a port
_LOOK_S, _LOOKS, _KEEPER_S = 0.5, 4, 30.0


class HostWorker(dispatch.Worker):
    """A worker on this machine beside those in containers; a container may be its server."""

    def __init__(
        self, manager: ContainerManager, place: str, make_way: Callable[[str, StopRequest | None], None]
    ) -> None:
        self._manager, self._place, self._make_way = manager, place, make_way
        self._slot, env = slot_of(place), dict(os.environ)
        self._service = service_and_image(place)[0]
        if self._service:
            env[SERVICE_VARIABLE] = service_variable(manager.compose, self._slot, manager.project.mark)
        super().__init__((*own_command(sys.executable), "worker"), env=env)

    def run(
        self, request: RunRequest, on_event: Observer, timeouts: Timeouts, stop: StopRequest | None = None
    ) -> dispatch.Outcome:
        self._make_way(self._place, stop)
        outcome = super().run(replace(request, image=self._image), on_event, timeouts, stop)
        if self.engine is None:
            self._end_server()
        return outcome

    def _open(self, stop: StopRequest | None, timeout_s: float) -> dispatch.WorkerConnection:
        connection = super()._open(stop, timeout_s)
        self.environment = {**self.environment, **({"image": self._image} if self._service else {})}
        return connection

    def unload(self, stop: StopRequest | None = None, timeout_s: float = dispatch.UNLOAD_TIMEOUT_S) -> None:
        super().unload(stop, timeout_s)
        self._end_server()

    def kill(self) -> None:
        super().kill()
        self._end_server()

    def server_pids(self) -> tuple[int, ...]:
        with contextlib.suppress(ContainerError):
            return tuple(self._manager.pids(self._service)) if self._service else ()
        return ()

    @property
    def _image(self) -> str | None:
        return self._manager.compose.images.get(self._slot)

    def _end_server(self) -> None:
        """Remove the container that an engine process was killed too fast to remove."""
        with contextlib.suppress(ContainerError):
            if self._service:
                self._manager.compose.remove_marked(self._manager.project.mark, self._service)


# A service as the command of a server: an engine process starts and ends it as any other (`worker --service`)


def service_variable(compose: Compose, slot: str, mark: str, environ: Mapping[str, str] = os.environ) -> str:
    """The value of SERVICE_VARIABLE: the command to which `NAME,NAME…` of variables and then options are added."""
    service, image = service_and_image(slot)
    found = compose.services[service]
    words = found.command
    if words is None:
        shown = compose.call("image", "inspect", "--format", "{{json .Config.Cmd}}", compose.images[slot])
        words = tuple(json.loads(shown.stdout or "null") or ()) if shown.code == 0 else ()
    # The worker inherits all else, so that no secret of this user is in argv.
    env = {name: value for name, value in compose.env.items() if environ.get(name) != value}
    spec: dict[str, Any] = {"service": service, "image": image, "words": compose.arguments(), "command": words}
    spec |= {"mark": mark, "env": env}
    command = (*own_command(sys.executable), "worker", "--service", json.dumps(spec))
    return json.dumps({"command": command, "url": found.url})


def run_service(arguments: Sequence[str]) -> int:
    """The exit code of a service's new container, whose log this process prints; it is removed at the end."""
    spec, names, words = json.loads(arguments[0]), arguments[1].split(",") if arguments[1] else (), arguments[2:]
    docker, service = Docker({**os.environ, **spec["env"]}), spec["service"]
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, _leave)
    code = 0
    try:
        with durable.scratch_folder(Path(tempfile.gettempdir())) as folder:
            changes: dict[str, Any] = {"command": [*spec["command"], *words]} if words else {}
            changes |= {"environment": dict.fromkeys(names)} if names else {}  # null: the value that compose has
            changes |= {"image": spec["image"]} if spec["image"] else {}
            override = folder / "options.yml"
            override.write_text(override_text({"services": {service: changes}}), encoding="utf-8")
            more = ("--file", str(override)) if changes else ()
            begun_s = time.time()
            up = (*spec["words"], *more, "up", "--detach", "--no-build", "--force-recreate", service)
            finished = docker.call(*up, timeout_s=UP_TIMEOUT_S)
            if finished.code != 0:
                os.write(2, f"{explain(finished, f'starting {service}').message}\n".encode())
                return 1
        shown = docker.call(*spec["words"], "ps", "--all", "--quiet", service)
        code = _follow(docker, shown.stdout.strip(), service, begun_s)
    finally:
        docker.remove_marked(spec["mark"], service)
    if code > 128:
        end_as(128 - code)
    return code


def _leave(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def _follow(docker: Docker, container: str, service: str, begun_s: float) -> int:
    """The exit code of a container, once it has ended; until then its log is copied to stdout and stderr."""
    logs = process.spawn(("docker", "logs", "--follow", container), env=docker.env, streams=(process.DEVNULL, 1, 2))
    waiting = process.spawn(
        ("docker", "wait", container), env=docker.env, streams=(process.DEVNULL, process.PIPE, process.DEVNULL)
    )
    try:
        printed, _ = waiting.communicate()
        try:
            logs.wait(_LOGS_S)
        except process.TimeoutExpired:
            process.kill_group(logs.pid)
        code = int(printed) if printed.strip().isdigit() else 128 + signal.SIGKILL  # it was removed
        text = f"the container of {service} {process.describe_exit(128 - code if code > 128 else code)}"
        if docker.was_out_of_memory(container, begun_s, time.time()):
            text += "; it ran out of memory"
        os.write(2, f"{text}\n".encode())
        return code
    finally:
        for child in (logs, waiting):
            if child.poll() is None:
                process.kill_group(child.pid)


@contextlib.contextmanager
def keeper(compose: Compose, mark: str) -> Iterator[None]:
    """A process that removes the containers with a mark after the block, also if this process is killed in it."""
    command = (*own_command(sys.executable), "worker", "--end-containers", mark)
    child = process.spawn(command, env=compose.env, streams=(process.PIPE, process.DEVNULL, process.DEVNULL))
    try:
        yield
    finally:
        child.communicate(b".")


def end_containers(mark: str) -> int:
    """Wait for the end of stdin, when the host ends; then remove its containers, even if the worker was killed."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    looks = 1 if os.read(0, 1) else _LOOKS  # a host that was killed may have left an engine that creates one right now
    docker, deadline, left = Docker(os.environ), time.monotonic() + _KEEPER_S, looks
    while left and time.monotonic() < deadline:
        left = looks if docker.remove_marked(mark) else left - 1
        time.sleep(_LOOK_S if left else 0)
    return 0


# A server that runs already (`server.url`)


def find_server(config: MeteredConfig, environ: Mapping[str, str]) -> tuple[tuple[int, ...], str | None]:
    """The processes of a server that runs already, or why no meter of this machine measures them."""
    section = config.section if isinstance(config, ExperimentConfig) else None
    if not isinstance(section, ServerConfig) or section.url is None:
        return (), None
    host, port = address_of(section.url)
    if not process.is_here(host):
        return (), f"the server runs on another machine ({host})"
    listeners = [item.pid for item in process.find_listeners(port)]
    names = {stat.name for pid in listeners if (stat := process.read_stat(pid)) is not None}
    if listeners and not names.isdisjoint(_RELAYS):
        return _in_container(port, environ)
    groups = {_group_of(pid) for pid in listeners} - {None, os.getpgid(0)}
    others = [pid for pid in process.list_processes() if _group_of(pid) in groups]
    tops = dict.fromkeys((*listeners, *others))
    found = tuple(dict.fromkeys(pid for top in tops for pid in (top, *process.descendants(top))))
    return found, None if found else f"no process that listens on port {port} is visible to this user"


def _in_container(port: int, environ: Mapping[str, str]) -> tuple[tuple[int, ...], str | None]:
    docker, pids = Docker(environ), frozenset[int]()
    try:
        for container in docker.call("ps", "--quiet", "--filter", f"publish={port}").stdout.split():
            pids |= docker.pids(container)
    except UserError:
        pids = frozenset()
    return tuple(pids), None if pids else f"the container that publishes port {port} was not found"


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None
