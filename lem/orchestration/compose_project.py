"""The compose project of a campaign: what has to be there before a container can start, and what lem adds to it."""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from lem import durable
from lem.durable import make_folder, reason_of
from lem.errors import UserError
from lem.orchestration.compose import REPLACES_LISTS, Compose, Service
from lem.orchestration.compose_files import PACKAGED_NAME, ComposeFiles, ServiceOverride, render_override
from lem.orchestration.docker import ContainerError, Docker
from lem.orchestration.mounts import Mount, without_nested
from lem.orchestration.packing import PYZ_NAME, provide_pyz
from lem.orchestration.services import Services
from lem.variables import DATASETS_VARIABLE, HUB_FOLDER_VARIABLE, MODEL_CACHE_VARIABLE

__all__ = ["ComposeProject"]

_logger = logging.getLogger(__name__)

PYZ_FOLDER = PurePosixPath("/opt/lem")
OVERRIDE_NAME = "docker-compose.lem.yml"


@dataclass(frozen=True)
class ComposeProject:
    """A compose project that is not looked at yet.

    Attributes:
        state_folder: where the override is written, and lem's own compose file when it is used.
        working_dir: where relative paths start, on this machine and inside.
        directory: project directory, when it is not the folder of the first file.
        results_dir: written to by every service.
        mounts: seen by every service, beside its own of `mounts_of`.
        gpus_of: UUIDs of the GPUs of a service; () for none; a service that is missing keeps those of the file.
    """

    name: str
    files: ComposeFiles
    state_folder: Path
    working_dir: Path
    results_dir: Path
    directory: Path | None = None
    env_file: Path | None = None
    mounts: tuple[Mount, ...] = ()
    mounts_of: Mapping[str, tuple[Mount, ...]] = field(default_factory=dict)
    gpus_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    def prepare(self, names: Iterable[str]) -> Services:
        """The services of the project, with everything there that these ones need; nothing is started.

        Raises:
            ContainerError: kind `docker`, `daemon`, `rights`, `compose`, `compose_file`, `service` or `image`.
            UserError: a file or folder cannot be written.
        """
        wanted = tuple(dict.fromkeys(names))
        Docker(self.environ).info()
        pyz = provide_pyz(self.environ)
        docker = Docker(self._variables(pyz))
        _make_folder(self.state_folder)
        _make_folder(self.results_dir)
        base = self._base(docker)
        version = base.version()
        self._check_services(base.services(), wanted)
        override = self._write_override(wanted, pyz, version)
        compose = replace(base, files=(*base.files, override))
        described = compose.services()
        images = {name: self._image_id(docker, described[name]) for name in wanted}
        return Services(compose, PYZ_FOLDER / pyz.name, images)

    def described(self) -> Mapping[str, Service]:
        """The services of the compose files, whatever else is missing.

        Raises:
            ContainerError: kind `docker` or `compose_file`.
            UserError: lem's own file cannot be written down.
        """
        return self._base(Docker(self._variables(None))).services()

    def existing(self) -> Services:
        """The services as an earlier start left them, for looking at them and taking them down."""
        override = self.state_folder / OVERRIDE_NAME
        docker = Docker(self._variables(None))
        files = self.files.paths or (self.state_folder / PACKAGED_NAME,)
        # Without any file Compose finds the containers by the name of the project alone.
        there = tuple(path for path in (*files, override) if path.is_file())
        return Services(Compose(docker, self.name, there, self.directory, self.env_file), PYZ_FOLDER / PYZ_NAME, {})

    def _base(self, docker: Docker) -> Compose:
        try:
            paths = self.files.provide(self.state_folder)
        except OSError as error:
            raise UserError(f"cannot write into {self.state_folder}: {reason_of(error)}") from error
        # Relative paths in lem's own file, and a file called .env, belong to where the person is.
        directory = self.working_dir if self.files.is_packaged else self.directory
        return Compose(docker, self.name, paths, directory, self.env_file)

    def _variables(self, pyz: Path | None) -> dict[str, str]:
        """The environment of `docker`: this one, and the variables of docker/docker-compose.yml."""
        found = {**self.environ, "DOCKER_CLI_HINTS": "false", "LEM_RESULTS_DIR": str(self.results_dir)}
        found |= {"LEM_UID": str(os.getuid()), "LEM_GID": str(os.getgid())}
        if pyz is not None:
            found["LEM_PYZ_DIR"] = str(pyz.parent)
        gpus = sorted({uuid for uuids in self.gpus_of.values() for uuid in uuids})
        if gpus:
            found["LEM_GPU_IDS"] = ",".join(gpus)
        cache = found.get(MODEL_CACHE_VARIABLE) or found.get(HUB_FOLDER_VARIABLE)
        if cache:
            found[MODEL_CACHE_VARIABLE] = str(Path(cache).expanduser().absolute())
        return found

    def _check_services(self, there: Mapping[str, Service], wanted: Iterable[str]) -> None:
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ContainerError(
                f"{self.files.describe()} has no service {', '.join(missing)}; it has {', '.join(there) or 'none'}",
                "a backend runs in the service of its name; lem compose prints a file that has them all",
                kind="service",
            )

    def _write_override(self, names: Iterable[str], pyz: Path, version: tuple[int, ...]) -> Path:
        path = self.state_folder / OVERRIDE_NAME
        text = render_override({name: self._override(name, pyz, version) for name in names})
        _make_model_cache(self._variables(pyz))
        try:
            durable.write_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason_of(error)}") from error
        return path

    def _override(self, name: str, pyz: Path, version: tuple[int, ...]) -> ServiceOverride:
        gpus = self.gpus_of.get(name)
        if gpus is not None and version < REPLACES_LISTS:
            # LEM_GPU_IDS, which lem's own file heeds, is all that can be done.
            _logger.debug("docker compose %s cannot replace the GPUs of a file", ".".join(map(str, version)))
            gpus = None
        user = _user_name()
        environment = {"USER": user, "LOGNAME": user}
        datasets = self._datasets_dir()
        if datasets is not None:
            environment[DATASETS_VARIABLE] = str(datasets)
        return ServiceOverride(
            user=f"{os.getuid()}:{os.getgid()}",
            working_dir=str(self.working_dir),
            environment=environment,
            mounts=self._mounts(name, pyz),
            gpus=gpus,
        )

    def _mounts(self, name: str, pyz: Path) -> tuple[Mount, ...]:
        datasets = self._datasets_dir()
        found = [
            Mount(pyz.parent, str(PYZ_FOLDER)),
            Mount.in_place(self.results_dir, is_read_only=False),
            *self.mounts,
            *self.mounts_of.get(name, ()),
        ]
        if datasets is not None:
            found.append(Mount.in_place(datasets))
        return without_nested(found)

    def _datasets_dir(self) -> Path | None:
        named = self.environ.get(DATASETS_VARIABLE)
        folder = Path(named).expanduser().absolute() if named else None
        return folder if folder is not None and folder.is_dir() else None

    def _image_id(self, docker: Docker, service: Service) -> str:
        """The id of a service's image.

        Raises:
            ContainerError: kind `image`, it is not there.
        """
        if service.image is None:
            raise ContainerError(
                f"service {service.name} names no image", "give it a name beside `build:`, and build it", kind="image"
            )
        found = docker.image_id(service.image)
        if found is None:
            raise ContainerError(
                f"image {service.image} of service {service.name} is not there; nothing is pulled during a campaign",
                f"docker pull {service.image}, or build or load it; lem doctor shows what is missing",
                kind="image",
            )
        return found


def _make_folder(folder: Path) -> None:
    """Make a folder, as the caller's own: the engine would make it root's.

    Raises:
        UserError: it cannot be made.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {reason_of(error)}", "choose another folder") from error


def _make_model_cache(variables: Mapping[str, str]) -> None:
    """Make the folder of models that lem's own compose file mounts; one that cannot be made is told when it is due."""
    folder = Path(variables.get(MODEL_CACHE_VARIABLE) or "~/.cache/huggingface").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _logger.debug("%s: %s", folder, error.strerror)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name: OSError since Python 3.13
        return "lem"
