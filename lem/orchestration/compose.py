"""`docker compose` for one project: versions 2.17 to 5, whose outputs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from lem.jsontypes import shown
from lem.orchestration.docker import CALL_TIMEOUT_S, ContainerError, Docker, explain
from lem.process import Finished

__all__ = ["REPLACES_LISTS", "Compose", "ContainerState", "Service", "decode_states", "parse_version"]

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
