"""The docker command: what it prints, and what its failures mean."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lem.base import process
from lem.base.codec import decode, decode_hint
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import UserError
from lem.base.process import Finished
from lem.orchestration.packing import PYZ_NAME

CALL_TIMEOUT_S = 30.0
OLDEST_COMPOSE = (2, 17)
PYZ_FOLDER = PurePosixPath("/opt/lem")  # in every container
OVERRIDE_NAME = "docker-compose.lem.yml"  # the last file of each project that lem starts
PROFILES_VARIABLE = "COMPOSE_PROFILES"
MARK_LABEL = "lem.mark"  # of the containers of servers
_QUOTED_WIDTH = 400  # characters of the client's output in a message
_INSTALL_COMPOSE = "install Docker Compose 2.17 or newer: apt-get install docker-compose-plugin, or docker-compose-v2"

INSTALL_TOOLKIT = (
    "install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure --runtime=docker and restart"
)
CPU_OVERRIDE = "add docker/docker-compose.cpu.yml as the last compose file"
PUBLISH_HINT = 'publish one, such as ports: ["127.0.0.1:8080:8080"]'
ONE_SERVICE_EACH = (
    "each backend runs in the service of its name, a server in that of server.service; for lem's own file:"
    " `lem compose > lem-compose.yml`, then"
    " --compose-file lem-compose.yml"
)

# Kind, pattern in stderr, message, remedy; the first match counts. Texts of Docker 20.10 to 29 and Compose 2.17 to 5.
_FAILURES = (
    (
        "compose",
        r"is not a docker command|unknown command: docker compose|unknown shorthand flag: 'p' in -p",
        "the docker command has no Compose plugin",
        _INSTALL_COMPOSE,
    ),
    (
        "rights",
        r"permission denied while trying to connect to the (Docker daemon socket|docker API)",
        "this user has no access to the Docker engine",
        "usermod -aG docker USER and log in again (that is as good as root), or use rootless Docker",
    ),
    (
        "context",
        r"context \".*\": context not found|unable to resolve docker endpoint",
        "the Docker context cannot be used",
        "`docker context ls` lists them; unset DOCKER_CONTEXT, or `docker context use default`",
    ),
    (
        "daemon",
        (
            r"(Cannot|failed to) connect to the (Docker daemon|docker API)|Is the docker daemon running"
            r"|error during connect|connection reset by peer|unexpected EOF"
        ),
        "the Docker engine does not answer",
        "start it: systemctl start docker; with DOCKER_HOST or a context set, check that it names the right one",
    ),
    (
        "gpu",
        (
            r"could not select device driver|unknown or invalid runtime name|nvidia-container-(cli|runtime)"
            r"|CDI device|CDI spec|GPU vendor from CDI|libnvidia-ml"
        ),
        "the Docker engine cannot give a container the GPU",
        f"{INSTALL_TOOLKIT} Docker; without a GPU, {CPU_OVERRIDE}",
    ),
    (
        "image",
        r"No such image|pull access denied|manifest (unknown|for .* not found)|not found locally|image .* not found",
        "an image is missing",
        "pull, build or load it first; a campaign pulls no images",
    ),
    (
        "mount",
        r"bind source path does not exist|invalid mount config",
        "a folder to mount does not exist",
        "create it, or change the variable of the compose file that names it",
    ),
    (
        "limits",
        r"can't set distinct values on",
        "an overlay sets a limit in another form than the file that it extends",
        "set it in the same form, such as deploy: {resources: {limits: {memory: 3g}}}",
    ),
    ("disk", r"no space left on device", "the disk of the Docker engine is full", "docker system prune"),
    ("service", r"no such service", "the compose file has no such service", ONE_SERVICE_EACH),
)


class ContainerError(UserError, RuntimeError):
    def __init__(self, message: str, hint: str = "", *, kind: str = "container") -> None:
        super().__init__(message, hint)
        # A kind of `_FAILURES`, or `docker` (no such command), `compose_file`, `timeout`, `container` (anything else).
        self.kind = kind


def explain(finished: Finished, doing: str, otherwise: str = "container") -> ContainerError:
    quoted = _essence(finished.stderr) or _essence(finished.stdout)
    if finished.has_timed_out:
        message = f"{doing}: `{shlex.join(finished.argv)}` timed out" + (f": {quoted}" if quoted else "")
        return ContainerError(message, "run it by hand; the machine or its disk may be overloaded", kind="timeout")
    for kind, pattern, message, hint in _FAILURES:
        if re.search(pattern, finished.stderr):
            return ContainerError(f"{doing}: {message}: {quoted}", hint, kind=kind)
    quoted = quoted or process.describe_exit(finished.code)
    return ContainerError(f"{doing}: {quoted}", f"run it by hand: {shlex.join(finished.argv)}", kind=otherwise)


def _essence(text: str) -> str:
    """The error lines of an output, or its last line: Compose first lists every step that it took."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i)error|.*\berror response from daemon", line)]
    chosen = " ".join(errors or lines[-1:])
    return chosen if len(chosen) <= _QUOTED_WIDTH else f"{chosen[: _QUOTED_WIDTH - 1]}…"


@dataclass(frozen=True)
class Docker:
    env: Mapping[str, str] = field(repr=False)
    _oom_kills: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> Finished:
        try:
            return process.run(("docker", *words), timeout_s=timeout_s, env=self.env)
        except UserError as error:
            hint = "install Docker Engine (https://docs.docker.com/engine/install/), or run with --executor local"
            message = f"the docker command cannot be run: {error.message}"
            raise ContainerError(message, hint, kind="docker") from error

    def info(self) -> Mapping[str, Any]:
        self._check_is_here()
        finished = self.call("info", "--format", "{{json .}}")
        try:
            found = json.loads(finished.stdout)
        except ValueError:
            found = None
        # A client that reaches no engine still describes itself, and some of its versions then exit with 0.
        if finished.code != 0 or not isinstance(found, dict) or not found.get("ServerVersion"):
            raise explain(finished, "looking for the Docker engine", otherwise="daemon")
        return found

    def _check_is_here(self) -> None:
        finished = self.call("context", "inspect", "--format", "{{.Name}} {{.Endpoints.docker.Host}}")
        name, _, endpoint = finished.stdout.strip().partition(" ")
        host = urlsplit(endpoint).hostname
        if finished.code == 0 and host is not None and not process.is_here(host):
            source = "DOCKER_HOST" if self.env.get("DOCKER_HOST") else f"Docker context {name}"
            message = f"the Docker engine is on another machine: {endpoint} ({source})"
            hint = "run lem there, or here: unset DOCKER_HOST and DOCKER_CONTEXT, and `docker context use default`"
            raise ContainerError(message, hint, kind="remote")

    def compose_version(self) -> tuple[int, ...]:
        finished = self.call("compose", "version", "--short")
        found = parse_version(finished.stdout) if finished.code == 0 else None
        if found is not None and found >= OLDEST_COMPOSE:
            return found
        if found is not None:
            message = f"docker compose {'.'.join(map(str, found))} is too old: expected at least 2.17"
        else:
            # Without the plugin `docker` parses the arguments as its own, and each version complains differently.
            message = explain(finished, "looking for docker compose").message
        raise ContainerError(message, _INSTALL_COMPOSE, kind="compose")

    def image_id(self, image: str) -> str | None:
        finished = self.call("image", "inspect", "--format", "{{.Id}}", image)
        if finished.code == 0:
            return finished.stdout.strip() or None
        error = explain(finished, f"looking for image {image}")
        if error.kind == "image":
            return None
        raise error

    def was_out_of_memory(self, container: str, since_s: float, until_s: float) -> bool:
        """Whether the kernel killed a process of a container for lack of memory between two Unix times."""
        # Returns once the second time has passed; False if neither source answers. The state of a container is not one:
        # depending on Docker's version it covers the first process only, or every process ever. Where the engine sends
        # no event (containerd ignores cgroups of an unusual layout), the increase of the kernel's own counter decides.
        span = ("--since", f"{since_s:.3f}", "--until", f"{until_s:.3f}")
        which = ("--filter", f"container={container}", "--filter", "event=oom", "--format", "{{.Status}}")
        finished = self.call("events", *span, *which)
        before, now = self._oom_kills.get(container, 0), self._count_oom_kills(container)
        self._oom_kills[container] = now
        return (finished.code == 0 and bool(finished.stdout.strip())) or now > before

    def _count_oom_kills(self, container: str) -> int:
        """The kernel's counter inside a container; 0 if it cannot be read."""
        # Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst (memory.oom_control).
        files = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
        words = self.call("exec", container, "cat", *files).stdout.split()
        counts = [value for name, value in pairwise(words) if name == "oom_kill"]
        return int(counts[0]) if counts and counts[0].isdecimal() else 0

    def remove_marked(self, mark: str, service: str | None = None) -> bool:
        """Kill and remove the containers with a mark, or that of one service; whether there were any."""
        which = [f"label={MARK_LABEL}={mark}"]
        which += [] if service is None else [f"label=com.docker.compose.service={service}"]
        filters = [word for text in which for word in ("--filter", text)]
        found = self.call("ps", "--all", "--quiet", *filters).stdout.split()
        if found:
            self.call("rm", "--force", "--volumes", *found)
        return bool(found)

    def pids(self, container: str) -> frozenset[int]:
        finished = self.call("top", container, "-o", "pid")
        return frozenset(int(line) for line in finished.stdout.split() if line.isdecimal())


@dataclass(frozen=True)
class ContainerState:
    service: str
    state: str  # running, exited, paused, restarting, created, dead
    container_id: str = ""
    exit_code: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == "running"


def describe(state: ContainerState | None) -> str:
    if state is None:
        return "it has no container"
    has_ended = state.state in ("exited", "dead")
    return f"its container exited with code {state.exit_code}" if has_ended else f"its container is {state.state}"


@dataclass(frozen=True)
class Service:
    name: str
    image: str | None  # None: it is built, without a name
    has_gpu: bool  # a GPU is reserved for it
    profiles: tuple[str, ...] = ()  # one of which has to be enabled
    is_idle: bool = True  # its container waits for commands, as far as its file shows
    is_built: bool = False  # the compose file says how to build its image
    command: tuple[str, ...] | None = None  # None: that of its image
    url: str | None = None  # where this machine reaches it; None if it publishes no port under a fixed number

    @property
    def how_to_get(self) -> str:
        if self.is_built:
            name = "" if self.image else f"name the image of {self.name} next to `build:`, then "
            return f"{name}`docker compose build {self.name}`"
        return how_to_get(str(self.image))


@dataclass(frozen=True)
class Compose(Docker):
    project: str  # "": as Compose names it
    files: tuple[Path, ...]  # later ones override earlier ones
    folder: Path | None = None  # project directory, if it is not the folder of the first file
    env_file: Path | None = None
    label: str = ""  # the files, in words
    pyz: PurePosixPath = PYZ_FOLDER / PYZ_NAME  # in every container
    images: dict[str, str] = field(default_factory=dict)  # ids by service, of those that were prepared

    def arguments(self, *words: str) -> tuple[str, ...]:
        options = [word for file in self.files for word in ("--file", str(file))]
        if self.folder is not None:
            options += ["--project-directory", str(self.folder)]
        if self.env_file is not None:
            options += ["--env-file", str(self.env_file)]
        name = ("--project-name", self.project) if self.project else ()
        return ("compose", *name, *options, *words)

    def must(self, *words: str, doing: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        finished = self.call(*self.arguments(*words), timeout_s=timeout_s)
        if finished.code != 0:
            raise explain(finished, doing)
        return finished.stdout

    @functools.cached_property
    def _content(self) -> tuple[Mapping[str, Service], Mapping[str, str]]:
        finished = self.call(*self.arguments("config", "--format", "json"))
        if finished.code != 0:
            error = explain(finished, f"reading {self.label}", otherwise="compose_file")
            if error.kind == "compose_file":
                error.hint = "correct the file; `lem compose` prints one that works"
            raise error
        try:
            project = decode_hint(Mapping[str, Any], json.loads(finished.stdout), "project")
            services = decode_hint(Mapping[str, Mapping[str, Any]], project.get("services"), "services")
            volumes = decode_hint(Mapping[str, Mapping[str, Any]] | None, project.get("volumes"), "volumes") or {}
            return {name: _service(name, item) for name, item in services.items()}, {
                key: str(item.get("name", key)) for key, item in volumes.items() if not item.get("external")
            }
        except ValueError as error:
            raise _unexpected("config", "project", finished.stdout) from error

    @property
    def services(self) -> Mapping[str, Service]:
        return self._content[0]

    @property
    def volumes(self) -> Mapping[str, str]:
        """The names of volumes, by their keys in the compose files, without those that are external."""
        return self._content[1]

    def with_services(self, names: Sequence[str]) -> Compose:
        """The same with the profiles of these services enabled; ContainerError if one is missing."""
        if all(name in self.services for name in names):
            return self
        everything = replace(self, env={**self.env, PROFILES_VARIABLE: "*"}).services
        if missing := [name for name in names if name not in everything]:
            message = f"{self.label} has no service {', '.join(missing)}; it has {', '.join(everything) or 'none'}"
            raise ContainerError(message, ONE_SERVICE_EACH, kind="service")
        profiles = [self.env.get(PROFILES_VARIABLE, "")]
        for name in names:
            if name not in self.services:
                profiles += everything[name].profiles
        return replace(self, env={**self.env, PROFILES_VARIABLE: ",".join(filter(None, profiles))})

    def containers(self) -> dict[str, bool]:
        label = "com.docker.compose.project"
        form = f'{{{{.Names}}}} {{{{.Label "{label}.config_files"}}}}'
        finished = self.call("ps", "--all", "--filter", f"label={label}={self.project}", "--format", form)
        if finished.code != 0:
            raise explain(finished, f"listing the containers of project {self.project}")
        lines = [line.split(" ", 1) for line in finished.stdout.splitlines() if line]
        return {name: OVERRIDE_NAME in "".join(files) for name, *files in lines}

    def states(self) -> dict[str, ContainerState]:
        doing = f"listing the containers of project {self.project}"
        printed = self.must("ps", "--all", "--format", "json", doing=doing)
        return {item.service: item for item in decode_states(printed)}


def decode_states(text: str) -> tuple[ContainerState, ...]:
    lines = [text] if text.lstrip().startswith("[") else filter(str.strip, text.splitlines())
    try:
        documents = [found for line in lines if (found := json.loads(line)) is not None]
        listed = [item for found in documents for item in (found if isinstance(found, list) else [found])]
        return tuple(map(_decode_state, listed))
    except ValueError as error:
        raise _unexpected("ps", "containers", text) from error


def _decode_state(item: Any) -> ContainerState:
    found = decode_hint(Mapping[str, Any], item, "container")
    exit_code = found.get("ExitCode") or 0
    fields = {
        "service": found.get("Service"),
        "state": str(found.get("State", "")).lower() or None,
        "container_id": str(found.get("ID") or ""),
        "exit_code": int(exit_code) if isinstance(exit_code, str) else exit_code,
    }
    return decode(ContainerState, fields, "container")


def _service(name: str, item: Mapping[str, Any]) -> Service:
    image = decode_hint(str | None, item.get("image"), "image")
    profiles = decode_hint(tuple[str, ...] | None, item.get("profiles"), "profiles")
    words = decode_hint(tuple[str, ...] | None, item.get("command"), "command")
    command = " ".join(words or ())
    is_idle = bool(item.get("entrypoint")) or "sleep" in command or "tail" in command
    url = _published(decode_hint(list[Mapping[str, Any]] | None, item.get("ports"), "ports") or ())
    return Service(name, image, _has_gpu(item), profiles or (), is_idle, "build" in item, words, url)


def _published(ports: Sequence[Mapping[str, Any]]) -> str | None:
    """The address of the first TCP port that is published under a fixed number."""
    for port in ports:
        host, number = str(port.get("host_ip") or "0.0.0.0"), str(port.get("published") or "")  # noqa: S104
        if number.isdecimal() and port.get("protocol", "tcp") == "tcp":
            host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
            return f"http://{f'[{host}]' if ':' in host else host}:{number}"
    return None


def how_to_get(image: str) -> str:
    if image.startswith("lem-pytorch:"):
        return f"`docker build -f docker/Dockerfile.pytorch -t {image} docker` in a clone of lem"
    return f"`docker pull {image}`"


def _has_gpu(service: Mapping[str, Any]) -> bool:
    found = service
    for key in ("deploy", "resources", "reservations"):
        found = decode_hint(Mapping[str, Any] | None, found.get(key), key) or {}
    for device in decode_hint(list[Mapping[str, Any]] | None, found.get("devices"), "devices") or ():
        capabilities = decode_hint(list[Any] | None, device.get("capabilities"), "capabilities") or ()
        if "gpu" in capabilities or device.get("driver") in ("nvidia", "cdi"):
            return True
    devices = decode_hint(list[Any] | None, service.get("devices"), "devices") or ()
    names = (str(item.get("source", "")) if isinstance(item, Mapping) else str(item) for item in devices)
    is_passed_on = any(name.startswith(("nvidia.com/gpu", "/dev/nvidia")) for name in names)
    return is_passed_on or service.get("runtime") == "nvidia" or bool(service.get("gpus"))


def _unexpected(word: str, expected: str, printed: str) -> ContainerError:
    message = f"`docker compose {word}` printed no {expected}: {printed[:120]!r}"
    return ContainerError(message, "expected the output of Docker Compose 2.17 to 5", kind="compose")


def parse_version(text: str) -> tuple[int, ...] | None:
    match = re.search(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None
