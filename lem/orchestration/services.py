"""The services of one compose project: `docker compose`, and lem inside the containers."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lem.base import process
from lem.base.codec import shown
from lem.base.process import Finished
from lem.base.variables import MARK_VARIABLE
from lem.meters.nvml import GpuReading
from lem.orchestration.bundle import PYZ_NAME
from lem.orchestration.docker import CALL_TIMEOUT_S, ContainerError, Docker, explain
from lem.worker.guardian import new_mark

T = TypeVar("T")
_logger = logging.getLogger(__name__)

# Containers start in a second or two; a GPU that has to wake up, or an engine under load, takes longer.
UP_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 15.0
STOP_GRACE_S = 5
EXPERIMENT_TIMEOUT_S = 2 * 3600.0
_POLL_S = 0.2
_LOG_LINES = 5
PYZ_FOLDER = PurePosixPath("/opt/lem")


@dataclass(frozen=True)
class ContainerState:
    """A container of the project, as `ps` describes it."""

    service: str
    state: str  # running, exited, paused, restarting, created, dead
    container_id: str = ""
    exit_code: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == "running"


def describe(state: ContainerState | None) -> str:
    """`its container exited with code 137`."""
    if state is None:
        return "it has no container"
    has_ended = state.state in ("exited", "dead")
    return f"its container exited with code {state.exit_code}" if has_ended else f"its container is {state.state}"


@dataclass(frozen=True)
class Service:
    """A service as the compose files describe it."""

    name: str
    image: str | None  # None: it is built, without a name
    has_gpu: bool  # a GPU is reserved for it


@dataclass(frozen=True)
class Services:
    """The services of one project; every method raises ContainerError if the engine or a container fails."""

    docker: Docker = field(repr=False)
    project: str
    files: tuple[Path, ...]  # later ones override earlier ones
    folder: Path | None = None  # project directory, if it is not the folder of the first file
    env_file: Path | None = None
    pyz: PurePosixPath = PYZ_FOLDER / PYZ_NAME  # in every container
    images: dict[str, str] = field(default_factory=dict)  # image ids by service, as far as they were looked up

    def arguments(self, *words: str) -> tuple[str, ...]:
        """The words after `docker`."""
        options = [word for file in self.files for word in ("--file", str(file))]
        if self.folder is not None:
            options += ["--project-directory", str(self.folder)]
        if self.env_file is not None:
            options += ["--env-file", str(self.env_file)]
        return ("compose", "--project-name", self.project, *options, *words)

    def call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> Finished:
        """A finished call of `docker compose`, also a failed one."""
        return self.docker.call(*self.arguments(*words), timeout_s=timeout_s)

    def must(self, *words: str, doing: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """The output of a call of `docker compose` that has to succeed."""
        finished = self.call(*words, timeout_s=timeout_s)
        if finished.code != 0:
            raise explain(finished, doing)
        return finished.stdout

    @functools.cached_property
    def described(self) -> Mapping[str, Service]:
        """The services of the compose files; ContainerError of kind `compose_file` if those are not valid."""
        finished = self.call("config", "--format", "json")
        if finished.code != 0:
            doing = f"reading {', '.join(map(str, self.files))}"
            error = explain(finished, doing, otherwise="compose_file")
            if error.kind != "compose_file":
                raise error
            raise ContainerError(
                error.message, "correct the file; `lem compose` prints one that works", kind="compose_file"
            )
        try:
            return _decode_services(finished.stdout)
        except ValueError as error:
            raise ContainerError(
                f"`docker compose config` printed no project: {finished.stdout[:120]!r}",
                "expected the output of Docker Compose 2.17 to 5",
                kind="compose",
            ) from error

    def has_gpu(self, service: str) -> bool:
        """Whether a GPU is reserved for a service."""
        if service not in self.described:
            raise ContainerError(f"no such service: {service}", kind="service")
        return self.described[service].has_gpu

    def state(self, service: str) -> ContainerState | None:
        """The container of a service, running or not; None if there is none."""
        printed = self.must(
            "ps", "--all", "--format", "json", doing=f"listing the containers of project {self.project}"
        )
        return {item.service: item for item in decode_states(printed)}.get(service)

    def pids(self, service: str) -> frozenset[int]:
        """The processes in a service's container as the host numbers them."""
        state = self.state(service)
        return frozenset() if state is None else self.docker.pids(state.container_id)

    def start(self, names: Sequence[str], *, recreate: bool = False) -> None:
        """Start services; without `recreate`, containers that match the files are kept."""
        words = ("up", "--detach", "--no-build", *(("--force-recreate",) if recreate else ()))
        self.must(*words, *names, doing=f"starting {', '.join(names)}", timeout_s=UP_TIMEOUT_S)

    def restart(self, service: str) -> None:
        """Restart a container as it was made."""
        words = ("restart", "--timeout", str(STOP_GRACE_S), service)
        self.must(*words, doing=f"restarting {service}", timeout_s=UP_TIMEOUT_S)

    def recreate(self, service: str) -> None:
        """Replace a container, whatever state it is in."""
        words = ("up", "--detach", "--no-build", "--no-deps", "--force-recreate", "--timeout", str(STOP_GRACE_S))
        self.must(*words, service, doing=f"replacing the container of {service}", timeout_s=UP_TIMEOUT_S)

    def await_answer(self, service: str) -> None:
        """Return when lem answers in a service, within a minute."""
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
        logs = self.call("logs", "--no-log-prefix", "--no-color", "--tail", str(_LOG_LINES), service)
        printed = " / ".join(line.strip() for line in logs.stdout.splitlines() if line.strip())
        message = f"{service} does not answer: {describe(state)}; {error.message}"
        return ContainerError(message + (f"; it printed: {printed}" if printed else ""), error.hint, kind=error.kind)

    # lem inside

    def exec_words(self, service: str, *arguments: str, mark: str | None = None) -> tuple[str, ...]:
        """The words after `docker` that run lem in a service, all of its processes with a mark in their environment."""
        options = () if mark is None else ("--env", f"{MARK_VARIABLE}={mark}")
        # -T: no terminal, so that stdin is the pipe that it is given.
        return self.arguments("exec", "-T", *options, service, "python3", "-u", str(self.pyz), *arguments)

    def read_gpus(self, service: str) -> GpuReading:
        """What NVML reports inside a running service."""
        doing = f"asking {service}"
        finished = self.docker.call(*self.exec_words(service, "gpus", "--json"), timeout_s=PROBE_TIMEOUT_S)
        if finished.code != 0:
            raise explain(finished, doing)
        try:
            # An image may print lines of its own first.
            document = json.loads(finished.stdout.splitlines()[-1]) if finished.stdout else None
            return GpuReading.from_dict(_checked(dict, document))
        except ValueError as error:
            raise ContainerError(f"{doing}: unexpected answer {finished.stdout[:120]!r}") from error

    def clear(self, service: str, mark: str) -> None:
        """End every process with a worker's mark, if need be by replacing the container."""
        try:
            words = self.exec_words(service, "worker", "--end-marked", mark)
            if self.docker.call(*words, timeout_s=KILL_TIMEOUT_S).code == 0:
                return
            _logger.warning("%s: its processes cannot be ended from inside; replacing the container", service)
            self.call("kill", service, timeout_s=KILL_TIMEOUT_S)
            self.recreate(service)
        except ContainerError as error:
            _logger.warning("%s: processes of its worker may still run: %s", service, error.message)

    def run_tethered(self, service: str, arguments: Iterable[str], variables: Mapping[str, str]) -> tuple[str, int]:
        """The output and exit code of lem in a service; it ends with this process, however that ends.

        The variables, which may be secret, reach its environment through stdin.
        """
        mark = new_mark()
        command = ("docker", *self.exec_words(service, "worker", "--tether", *arguments, mark=mark))
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            descriptor = output.fileno()
            child = process.spawn(command, env=self.docker.env, stdout=descriptor, stderr=descriptor, new_session=True)
            stack.callback(process.kill_group, child.pid)
            if child.stdin is not None:
                stack.enter_context(child.stdin)  # held open: the command inside ends when it closes
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(dict(variables)).encode() + b"\n")
            try:
                code = child.wait(EXPERIMENT_TIMEOUT_S)
            except process.TimeoutExpired:
                process.kill_group(child.pid)
                self.clear(service, mark)
                return f"the experiment did not end within {EXPERIMENT_TIMEOUT_S:.0f} s", 1
            output.seek(0)
            return output.read().decode("utf-8", "replace"), code


def decode_states(text: str) -> tuple[ContainerState, ...]:
    """The output of `ps --format json`: one array before Compose 2.21, one object per line since."""
    try:
        return tuple(map(_decode_state, _objects(text)))
    except ValueError as error:
        raise ContainerError(
            f"`docker compose ps` printed no containers: {text[:120]!r}",
            "expected the output of Docker Compose 2.17 to 5",
            kind="compose",
        ) from error


def _decode_state(item: Any) -> ContainerState:
    found = _checked(dict, item)
    exit_code = found.get("ExitCode") or 0
    if not {"Service", "State"} <= found.keys() or not isinstance(exit_code, (int, str)):
        raise ValueError("a container without service or state, or with an invalid exit code")
    return ContainerState(
        str(found["Service"]), str(found["State"]).lower(), str(found.get("ID", "")), exit_code=int(exit_code)
    )


def _objects(text: str) -> Iterator[Any]:
    for line in text.splitlines() if not text.lstrip().startswith("[") else [text]:
        if line.strip():
            found = json.loads(line)
            yield from found if isinstance(found, list) else [] if found is None else [found]


def _decode_services(text: str) -> dict[str, Service]:
    """The output of `config --format json`; ValueError if it is something else."""
    found = {}
    for name, described in _checked(dict, _checked(dict, json.loads(text)).get("services")).items():
        service = _checked(dict, described)
        image = None if service.get("image") is None else _checked(str, service["image"])
        found[name] = Service(name, image, _has_gpu(service))
    return found


def _checked(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {shown(value)}")
    return value


def _has_gpu(service: Mapping[str, Any]) -> bool:
    """Whether a resolved service asks for a GPU, in any of Compose's ways."""
    found = service
    for key in ("deploy", "resources", "reservations"):
        found = _checked(dict, found.get(key) or {})
    for item in _checked(list, found.get("devices") or []):
        device = _checked(dict, item)
        if "gpu" in _checked(list, device.get("capabilities") or []) or device.get("driver") in (
            "nvidia",
            "cdi",
        ):
            return True
    devices = _checked(list, service.get("devices") or [])
    names = (str(item.get("source", "")) if isinstance(item, Mapping) else str(item) for item in devices)
    is_passed_on = any(name.startswith(("nvidia.com/gpu", "/dev/nvidia")) for name in names)
    return is_passed_on or service.get("runtime") == "nvidia" or bool(service.get("gpus"))
