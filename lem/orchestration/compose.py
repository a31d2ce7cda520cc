"""Compose files, and what Compose says of a project."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from lem.base import durable
from lem.base.codec import shown
from lem.base.process import Finished
from lem.orchestration.docker import CALL_TIMEOUT_S, CONTAINER_HOME, ContainerError, Docker, Mount, explain

OLDEST_COMPOSE = (2, 17)

# From here on a value of an override can replace a list instead of adding to it (the !override tag).
REPLACES_LISTS = (2, 24, 4)


@dataclass(frozen=True)
class ContainerState:
    """A container of the project, as `ps` tells.

    Attributes:
        state: `running`, `exited`, `paused`, `restarting`, `created`, `dead`.
        health: of the engine's own probe: `healthy`, `unhealthy`, `starting`, or empty.
    """

    service: str
    state: str
    container_id: str = ""
    exit_code: int = 0
    health: str = ""

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.state == "running"

    def describe(self) -> str:
        """`exited with code 137`."""
        return f"exited with code {self.exit_code}" if self.state in ("exited", "dead") else self.state


@dataclass(frozen=True)
class Service:
    """What the compose files say of a service.

    Attributes:
        image: its name; None when it is only built.
        has_gpu: a GPU is reserved for it.
    """

    name: str
    image: str | None
    has_gpu: bool


@dataclass(frozen=True)
class Compose:
    """The calls of `docker compose` for one project.

    Attributes:
        files: later ones are laid over earlier ones.
        folder: project directory, when it is not the folder of the first file.
        env_file: variables for the files.
    """

    docker: Docker = field(repr=False)
    project: str
    files: tuple[Path, ...]
    folder: Path | None = None
    env_file: Path | None = None

    def arguments(self, *words: str) -> tuple[str, ...]:
        """The words after `docker`."""
        options = [word for file in self.files for word in ("--file", str(file))]
        if self.folder is not None:
            options += ["--project-directory", str(self.folder)]
        if self.env_file is not None:
            options += ["--env-file", str(self.env_file)]
        return ("compose", "--project-name", self.project, *options, *words)

    def call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> Finished:
        """A finished call; a failing one is a value.

        Raises:
            ContainerError: kind `docker`.
        """
        return self.docker.call(self.arguments(*words), timeout_s=timeout_s)

    def must(self, *words: str, doing: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """What a call printed.

        Raises:
            ContainerError: it failed.
        """
        return self.docker.must(self.arguments(*words), doing, timeout_s=timeout_s)

    def version(self) -> tuple[int, ...]:
        """The version of the plugin.

        Raises:
            ContainerError: kind `docker` or `compose`: there is none, or it is too old.
        """
        finished = self.docker.call(("compose", "version", "--short"))
        found = parse_version(finished.stdout) if finished.code == 0 else None
        if found is None:
            # Without the plugin `docker` sees a flag of its own, and each version of it says so in another way.
            error = explain(finished, "looking for docker compose", otherwise="compose")
            hint = error.hint if error.kind == "compose" and "install" in error.hint else _INSTALL_COMPOSE
            raise ContainerError(error.message, hint, kind="compose")
        if found < OLDEST_COMPOSE:
            raise ContainerError(
                f"docker compose {'.'.join(map(str, found))} is too old: 2.17 is due", _INSTALL_COMPOSE, kind="compose"
            )
        return found

    def services(self) -> Mapping[str, Service]:
        """The services of the files, by name.

        Raises:
            ContainerError: kind `compose_file`, the files are not valid, or a variable that they need is not set.
        """
        finished = self.call("config", "--format", "json")
        if finished.code != 0:
            error = explain(finished, f"reading {self._names()}", otherwise="compose_file")
            if error.kind not in ("compose_file", "container"):
                raise error
            raise ContainerError(error.message, "mend the file; lem compose prints one that works", kind="compose_file")
        try:
            return _decode_services(finished.stdout)
        except ValueError as error:
            raise ContainerError(
                f"`docker compose config` answered something else than a project: {finished.stdout[:120]!r}",
                "is docker compose 2.17 or newer?",
                kind="compose",
            ) from error

    def states(self) -> Mapping[str, ContainerState]:
        """The containers of the project by their service; those that ended included.

        Raises:
            ContainerError: the engine cannot be asked.
        """
        printed = self.must("ps", "--all", "--format", "json", doing=f"looking at project {self.project}")
        return {item.service: item for item in decode_states(printed)}

    def _names(self) -> str:
        return ", ".join(map(str, self.files))


_INSTALL_COMPOSE = "install Docker Compose 2.17 or newer: apt-get install docker-compose-plugin, or docker-compose-v2"


def parse_version(text: str) -> tuple[int, ...] | None:
    """The numbers of a version in any of the ways that Compose prints it; None when there is none.

    >>> parse_version("Docker Compose version v2.17.2-desktop.1")
    (2, 17, 2)
    """
    match = re.search(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None


def decode_states(text: str) -> tuple[ContainerState, ...]:
    """The containers that `ps --format json` printed: one array before Compose 2.21, an object a line since.

    Raises:
        ContainerError: kind `compose`, the text is neither.
    """
    try:
        return tuple(map(_decode_state, _objects(text)))
    except ValueError as error:
        raise ContainerError(
            f"`docker compose ps` printed something that is not known: {text[:120]!r}",
            "versions 2.17 to 5 are known",
            kind="compose",
        ) from error


def _decode_state(item: Any) -> ContainerState:
    if not isinstance(item, dict) or not {"Service", "State"} <= item.keys():
        raise ValueError("a container without service or state")
    exit_code = item.get("ExitCode") or 0
    if not isinstance(exit_code, (int, str)):
        raise ValueError("an exit code that is no number")
    return ContainerState(
        service=str(item["Service"]),
        state=str(item["State"]).lower(),
        container_id=str(item.get("ID", "")),
        exit_code=int(exit_code),
        health=str(item.get("Health") or "").lower(),
    )


def _objects(text: str) -> Iterator[Any]:
    for line in text.splitlines() if not text.lstrip().startswith("[") else [text]:
        if line.strip():
            found = json.loads(line)
            yield from found if isinstance(found, list) else [] if found is None else [found]


def _decode_services(text: str) -> dict[str, Service]:
    """The services that `config --format json` printed, by name.

    Raises:
        ValueError: the text is something else.
    """
    services = _object(json.loads(text), "the project").get("services")
    found = {}
    for name, described in _object(services, "services").items():
        service = _object(described, name)
        image = service.get("image")
        if not isinstance(image, (str, NoneType)):
            raise ValueError(f"{name}: an image that is no text")
        found[name] = Service(name, image, _has_gpu(service))
    return found


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, got {shown(value)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what}: expected a list, got {shown(value)}")
    return value


def _has_gpu(service: Mapping[str, Any]) -> bool:
    """Whether a resolved service asks for a GPU, in any of the ways there are.

    Raises:
        ValueError: it is described in no way that Compose has.
    """
    found = service
    for key in ("deploy", "resources", "reservations"):
        found = _object(found.get(key) or {}, key)
    wanted = [_object(item, "a reserved device") for item in _list(found.get("devices") or [], "reserved devices")]
    if service.get("runtime") == "nvidia" or service.get("gpus"):
        return True
    if any("gpu" in _list(item.get("capabilities") or [], "capabilities") for item in wanted):
        return True
    if any(item.get("driver") in ("nvidia", "cdi") for item in wanted):
        return True
    devices = _list(service.get("devices") or [], "devices")
    names = (str(item.get("source", "")) if isinstance(item, Mapping) else str(item) for item in devices)
    return any(name.startswith(("nvidia.com/gpu", "/dev/nvidia")) for name in names)


PACKAGED_NAME = "docker-compose.yml"
_TRIED = ("docker-compose.yml", "docker/docker-compose.yml")

# Compose's own variables, which it heeds only where no --file is given.
_FILES_VARIABLE = "COMPOSE_FILE"
_SEPARATOR_VARIABLE = "COMPOSE_PATH_SEPARATOR"


@dataclass(frozen=True)
class ComposeFiles:
    """The files that describe the services.

    Attributes:
        paths: absolute, later ones laid over earlier ones; () is the file that lem brings along.
    """

    paths: tuple[Path, ...] = ()

    @property
    def is_packaged(self) -> bool:
        """Whether it is lem's own."""
        return not self.paths

    def describe(self) -> str:
        """The paths, or that it is lem's own."""
        return ", ".join(map(str, self.paths)) or "the compose file that lem brings along"

    def provide(self, folder: Path) -> tuple[Path, ...]:
        """The paths; lem's own file is written into `folder` first.

        Raises:
            OSError: it cannot be written.
        """
        if self.paths:
            return self.paths
        path = folder / PACKAGED_NAME
        durable.write_text(path, packaged_compose_file())
        return (path,)


def packaged_compose_file() -> str:
    """The text of the compose file that lem brings along, docker/docker-compose.yml."""
    source = importlib.resources.files("lem.orchestration").joinpath(PACKAGED_NAME)
    return source.read_text(encoding="utf-8")


def find_compose_files(
    named: str | os.PathLike[str] | None, folder: Path, environ: Mapping[str, str] = os.environ
) -> ComposeFiles:
    """The files named, else those of COMPOSE_FILE, docker-compose.yml, docker/docker-compose.yml, else lem's own.

    Several are written as in COMPOSE_FILE, with colons between them.

    Args:
        folder: what relative paths start at.

    Raises:
        ContainerError: kind `compose_file`, a file named is not there.
    """
    text = os.fspath(named) if named is not None else environ.get(_FILES_VARIABLE, "")
    if text:
        separator = environ.get(_SEPARATOR_VARIABLE) or os.pathsep
        paths = [folder / text] if (folder / text).is_file() else [folder / part for part in text.split(separator)]
        for path in paths:
            if not path.is_file():
                origin = "" if named is not None else f" ({_FILES_VARIABLE} names it)"
                raise ContainerError(
                    f"{path}: no such compose file{origin}",
                    "lem compose prints one that works: lem compose > docker-compose.yml",
                    kind="compose_file",
                )
        return ComposeFiles(tuple(path.absolute() for path in paths))
    found = next((folder / name for name in _TRIED if (folder / name).is_file()), None)
    return ComposeFiles() if found is None else ComposeFiles((found.absolute(),))


@dataclass(frozen=True)
class ServiceOverride:
    """What lem adds to a service of the compose file.

    Attributes:
        gpus: UUIDs of the GPUs that are reserved in place of those of the file; () none at all, None as in the file.
    """

    user: str
    working_dir: str
    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[Mount] = ()
    gpus: tuple[str, ...] | None = None

    def to_compose(self) -> dict[str, object]:
        """The service in an override file, its list of GPUs tagged to replace the one below."""
        found: dict[str, object] = {
            "user": self.user,
            "working_dir": self.working_dir,
            "pull_policy": "never",
            "environment": {"HOME": CONTAINER_HOME, **self.environment},
            "volumes": [mount.to_compose() for mount in self.mounts],
        }
        if self.gpus is not None:
            device = {"driver": "nvidia", "device_ids": list(self.gpus), "capabilities": ["gpu"]}
            found["deploy"] = {"resources": {"reservations": {_REPLACED: [device] if self.gpus else []}}}
        return found


# A key that stands for `devices: !override`: JSON has no tags.
_REPLACED = "devices!override"


def render_override(services: Mapping[str, ServiceOverride]) -> str:
    """The override file. It holds no secret: those go through the channel of the worker."""
    document = {"services": {name: service.to_compose() for name, service in services.items()}}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # Every JSON text is YAML. A dollar sign would begin a variable.
    text = text.replace("$", "$$").replace(f'"{_REPLACED}": ', '"devices": !override ')
    return f"# Written by lem at every start of a campaign; it goes on top of the compose file.\n{text}\n"
