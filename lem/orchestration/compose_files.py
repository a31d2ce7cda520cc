"""Which compose files a campaign uses, and the override that lem lays over them."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lem import durable
from lem.orchestration.docker import ContainerError
from lem.orchestration.mounts import CONTAINER_HOME, Mount

__all__ = [
    "PACKAGED_NAME",
    "ComposeFiles",
    "ServiceOverride",
    "find_compose_files",
    "packaged_compose_file",
    "render_override",
]

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
