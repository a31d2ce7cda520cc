"""Compose files, what lem adds to them, and the project that they describe."""

from __future__ import annotations

import contextlib
import getpass
import importlib.resources
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lem.base import durable
from lem.base.durable import make_folder, reason_of
from lem.base.errors import UserError
from lem.base.variables import DATASETS_VARIABLE, HUB_FOLDER_VARIABLE, MODEL_CACHE_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.orchestration.docker import ONE_SERVICE_EACH, PYZ_FOLDER, Compose, ContainerError, Docker, Service
from lem.orchestration.packing import provide_pyz

# Every image lets every user write here; the user's own home folder does not exist inside.
CONTAINER_HOME = "/tmp"  # noqa: S108 - inside a container
PACKAGED_NAME = "docker-compose.yml"
OVERRIDE_NAME = "docker-compose.lem.yml"
_TRIED = ("docker-compose.yml", "docker/docker-compose.yml")

# Compose's own variables, which it ignores if there is a --file.
_FILES_VARIABLE = "COMPOSE_FILE"
_SEPARATOR_VARIABLE = "COMPOSE_PATH_SEPARATOR"

# The first version in which an override can replace a list instead of extending it (the !override tag).
_REPLACES_LISTS = (2, 24, 4)
# A key for `devices: !override`, since JSON has no tags.
_REPLACED = "devices!override"

# Options that name a folder to write to.
_WRITTEN = frozenset({"engine_cache_dir", "download_dir"})
# Of the memory of the engine's machine, for a container; the kernel then ends the engine and not the host's programs.
_MEMORY_SHARE = 0.95
# Files of a folder that are checked for links. No model has more; a folder with more is a home folder.
_MAX_FILES = 10_000


def packaged_compose_file() -> str:
    source = importlib.resources.files("lem.orchestration").joinpath(PACKAGED_NAME)
    return source.read_text(encoding="utf-8")


def find_compose_files(
    named: str | os.PathLike[str] | None, folder: Path, environ: Mapping[str, str] = os.environ
) -> tuple[Path, ...]:
    """The files named, else those of COMPOSE_FILE, else docker-compose.yml here or in docker/, or () (packaged).

    Several are separated as in COMPOSE_FILE. ContainerError of kind `compose_file` if one that is named is missing.
    """
    text = os.fspath(named) if named is not None else environ.get(_FILES_VARIABLE, "")
    if not text:
        return tuple((folder / name).absolute() for name in _TRIED if (folder / name).is_file())[:1]
    separator = environ.get(_SEPARATOR_VARIABLE) or os.pathsep
    paths = [folder / text] if (folder / text).is_file() else [folder / part for part in text.split(separator)]
    for path in paths:
        if not path.is_file():
            message = f"{path}: no such compose file" + ("" if named is not None else f" ({_FILES_VARIABLE} names it)")
            hint = "`lem compose > docker-compose.yml` writes one that works"
            raise ContainerError(message, hint, kind="compose_file")
    return tuple(path.absolute() for path in paths)


def describe_files(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths)) or "the compose file in lem's package"


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine in a container."""

    source: Path  # absolute
    target: str
    is_read_only: bool = True

    @classmethod
    def in_place(cls, path: Path, *, is_read_only: bool = True) -> Mount:
        return cls(path.absolute(), str(path.absolute()), is_read_only)

    def to_compose(self) -> dict[str, Any]:
        """The long form, in which a missing source is an error; with the short one Docker creates it for root."""
        mount = {"type": "bind", "source": str(self.source), "target": self.target, "read_only": self.is_read_only}
        return {**mount, "bind": {"create_host_path": False}}

    def covers(self, other: Mount) -> bool:
        """Whether all of another mount is visible through this one, at the same place."""
        if other.target == self.target:
            return other.source == self.source and not self.is_read_only
        if not Path(other.target).is_relative_to(self.target) or other.is_read_only != self.is_read_only:
            return False
        return self.source / Path(other.target).relative_to(self.target) == other.source


def without_nested(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The mounts without those that another one covers."""
    kept = list(dict.fromkeys(mounts))
    return tuple(item for item in kept if not any(other.covers(item) for other in kept if other != item))


def local_mounts(configs: Iterable[ExperimentConfig]) -> tuple[Mount, ...]:
    """A mount for each local path that experiments name as a model or in an option of their backend.

    For the file of an external meter it is the folder: a mounted file would not change when the file is replaced.
    A snapshot of a model hub is a folder of links to files beside it, so the folders that links lead to are mounted.
    """
    configs, found = tuple(configs), list[Mount]()
    documents = [(config.backend, config.to_dict()) for config in configs]
    texts = {text for backend, item in documents for text in _texts([item.get("model"), item.get(backend)])}
    for name, is_written in sorted(texts):
        path = Path(name).expanduser()
        if is_written:
            path.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.absolute() != Path("/"):
            found += [Mount(path.absolute(), _target_of(name), is_read_only=not is_written), *_linked(path)]
    for meter_file in filter(None, (config.measurement.external_csv for config in configs)):
        folder = Path(meter_file).expanduser().absolute().parent
        found.append(Mount(folder, str(PurePosixPath(_target_of(meter_file)).parent)))
    return without_nested(found)


def _target_of(name: str) -> str:
    return f"{CONTAINER_HOME}/{name[2:]}" if name.startswith("~/") else str(Path(name).expanduser().absolute())


def _texts(value: Any, is_written: bool = False) -> Iterator[tuple[str, bool]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, key in _WRITTEN)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, is_written)
    elif isinstance(value, str) and value.strip():
        yield value, is_written


def _linked(folder: Path) -> Iterator[Mount]:
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for path in sorted(itertools.islice(folder.rglob("*"), _MAX_FILES)):
        if path.is_symlink() and path.exists():
            target = path.resolve()
            if not target.is_relative_to(inside):
                yield Mount.in_place(target if target.is_dir() else target.parent)


@dataclass(frozen=True)
class ComposeProject:
    """A compose project; nothing is read or started before a method is called."""

    name: str
    files: tuple[Path, ...]  # absolute, later ones override earlier ones; () is the packaged one
    state_folder: Path  # for the override, and the packaged compose file if that is used
    working_dir: Path  # where relative paths start, on this machine and inside
    results_dir: Path  # writable for every service
    directory: Path | None = None  # project directory, if it is not the folder of the first file
    env_file: Path | None = None
    mounts: tuple[Mount, ...] = ()  # of every service
    mounts_of: Mapping[str, tuple[Mount, ...]] = field(default_factory=dict)  # of one service
    # UUIDs of the GPUs of a service; () for none; a service that is missing keeps those of the file.
    gpus_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    def prepare(self, names: Sequence[str]) -> Compose:
        """Find or make everything that the named services need; nothing is started.

        ContainerError: engine, plugin, compose file, service or image missing. UserError: a folder cannot be written.
        """
        memory_b = Docker(self.environ).info().get("MemTotal")
        pyz = provide_pyz(self.environ)
        for folder in (self.state_folder, self.results_dir):
            _make_folder(folder)  # as the user's own: the engine would make it root's
        base = self.as_written(pyz, round(_MEMORY_SHARE * memory_b) if isinstance(memory_b, int) else 0)
        version, services = base.compose_version(), base.services
        if missing := [name for name in names if name not in services]:
            known = ", ".join(services) or "none"
            message = f"{describe_files(self.files)} has no service {', '.join(missing)}; it has {known}"
            raise ContainerError(message, ONE_SERVICE_EACH, kind="service")
        # The folder of models that the packaged file mounts; if it cannot be made, Compose reports that where needed.
        with contextlib.suppress(OSError):
            cache = Path(base.env.get(MODEL_CACHE_VARIABLE) or "~/.cache/huggingface")
            cache.expanduser().mkdir(parents=True, exist_ok=True)
        overrides = {name: self._service_override(name, pyz, version) for name in names}
        override = self._write(OVERRIDE_NAME, _override_text(overrides))
        prepared = replace(base, files=(*base.files, override), pyz=PYZ_FOLDER / pyz.name)
        services = prepared.services  # Compose refuses an invalid combination here, before anything is started
        prepared.images.update(_image_ids(prepared, [services[name] for name in names]))
        return prepared

    def as_written(self, pyz: Path | None, memory_b: int = 0) -> Compose:
        variables = self._variables(pyz)
        if memory_b:
            variables["LEM_HOST_MEMORY"] = str(memory_b)
        if self.files:
            return self._compose(self.files, self.directory, variables)
        # In the packaged file, relative paths and a file called .env belong to the user's folder.
        return self._compose((self._write(PACKAGED_NAME, packaged_compose_file()),), self.working_dir, variables)

    def described(self) -> Mapping[str, Service]:
        """The services of the files; nothing stays on disk; ContainerError for invalid files or no docker command."""
        with durable.scratch_folder(Path(tempfile.gettempdir())) as scratch:
            return replace(self, state_folder=scratch).as_written(None).services

    def existing(self) -> Compose:
        """The project as an earlier start left it, to check it and take it down."""
        files = self.files or (self.state_folder / PACKAGED_NAME,)
        # Without any file Compose finds the containers by the name of the project.
        found = tuple(path for path in (*files, self.state_folder / OVERRIDE_NAME) if path.is_file())
        return self._compose(found, self.directory, self._variables(None))

    def _compose(self, files: tuple[Path, ...], folder: Path | None, variables: Mapping[str, str]) -> Compose:
        return Compose(variables, self.name, files, folder, self.env_file)

    def _write(self, name: str, text: str) -> Path:
        path = self.state_folder / name
        try:
            durable.write_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason_of(error)}") from error
        return path

    def _variables(self, pyz: Path | None) -> dict[str, str]:
        """The environment of `docker`: this one, and the variables of docker/docker-compose.yml."""
        own = {"LEM_RESULTS_DIR": self.results_dir, "LEM_UID": os.getuid(), "LEM_GID": os.getgid()}
        own |= {} if pyz is None else {"LEM_PYZ_DIR": pyz.parent}
        found = {**self.environ, "DOCKER_CLI_HINTS": "false", **{name: str(value) for name, value in own.items()}}
        if gpus := sorted({uuid for uuids in self.gpus_of.values() for uuid in uuids}):
            found["LEM_GPU_IDS"] = ",".join(gpus)
        if cache := found.get(MODEL_CACHE_VARIABLE) or found.get(HUB_FOLDER_VARIABLE):
            found[MODEL_CACHE_VARIABLE] = str(Path(cache).expanduser().absolute())
        return found

    def _service_override(self, name: str, pyz: Path, version: tuple[int, ...]) -> dict[str, Any]:
        user = _user_name()
        environment = {"HOME": CONTAINER_HOME, "USER": user, "LOGNAME": user}
        mounts = [Mount(pyz.parent, str(PYZ_FOLDER)), Mount.in_place(self.results_dir, is_read_only=False)]
        mounts += [*self.mounts, *self.mounts_of.get(name, ())]
        datasets = self.environ.get(DATASETS_VARIABLE)
        if datasets and (folder := Path(datasets).expanduser().absolute()).is_dir():
            environment[DATASETS_VARIABLE] = str(folder)
            mounts.append(Mount.in_place(folder))
        found: dict[str, Any] = {
            "user": f"{os.getuid()}:{os.getgid()}",
            "working_dir": str(self.working_dir),
            "pull_policy": "never",
            "environment": environment,
            "volumes": [mount.to_compose() for mount in without_nested(mounts)],
        }
        gpus = self.gpus_of.get(name)
        # In older versions only LEM_GPU_IDS, which the packaged file uses, selects GPUs.
        if gpus is not None and version >= _REPLACES_LISTS:
            device = {"driver": "nvidia", "device_ids": list(gpus), "capabilities": ["gpu"]}
            found["deploy"] = {"resources": {"reservations": {_REPLACED: [device] if gpus else []}}}
        return found


def _override_text(services: Mapping[str, Any]) -> str:
    text = json.dumps({"services": services}, indent=2, ensure_ascii=False)
    # JSON is YAML, except that a dollar sign would begin a variable.
    text = text.replace("$", "$$").replace(f'"{_REPLACED}": ', '"devices": !override ')
    return f"# Written by lem at every start of a campaign; it overrides the compose file.\n{text}\n"


def _image_ids(docker: Docker, services: Sequence[Service]) -> dict[str, str]:
    """The ids of the images by service; ContainerError that names every one that is missing."""
    for service in services:
        if service.image is None:
            message = f"service {service.name} has no `image`"
            raise ContainerError(message, "add one next to `build:`, and build it", kind="image")
    found = {item.name: docker.image_id(str(item.image)) for item in services}
    missing = [item for item in services if found[item.name] is None]
    if not missing:
        return {name: str(image_id) for name, image_id in found.items()}
    message = f"image {missing[0].image} of service {missing[0].name} is missing, and a campaign pulls no images"
    message += "".join(f"; so is image {item.image} of service {item.name}" for item in missing[1:])
    pulls = ", ".join(f"`docker pull {item.image}`" for item in missing)
    raise ContainerError(message, f"run {pulls}, or build or load it; `lem doctor` shows what is missing", kind="image")


def _make_folder(folder: Path) -> None:
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {reason_of(error)}", "choose another folder") from error


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name: OSError since Python 3.13
        return "lem"
