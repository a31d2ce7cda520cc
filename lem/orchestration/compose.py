"""Compose files, what lem adds to them, and the project that they describe."""

from __future__ import annotations

import contextlib
import getpass
import importlib.resources
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lem.base import durable
from lem.base.dataclass import dataclass, field, replace
from lem.base.durable import make_folder, reason_of
from lem.base.errors import UserError
from lem.base.variables import DATASETS_VARIABLE, HUB_FOLDER_VARIABLE, MODEL_CACHE_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines.common import demo_python
from lem.orchestration.docker import (
    MARK_LABEL,
    OVERRIDE_NAME,
    PROFILES_VARIABLE,
    PUBLISH_HINT,
    PYZ_FOLDER,
    Compose,
    ContainerError,
    Docker,
    Service,
)
from lem.orchestration.packing import provide_pyz
from lem.orchestration.plan import service_and_image
from lem.worker.guardian import new_mark

_logger = logging.getLogger(__name__)

# Every image lets every user write here; the user's own home folder does not exist inside.
CONTAINER_HOME = "/tmp"  # noqa: S108 - inside a container
PACKAGED_NAME, IMAGES_NAME = "docker-compose.yml", "docker-compose.images.yml"
PACKAGED = Path("packaged:docker-compose.yml")  # in a list of files: the one in lem's package

# The names of Compose, in its order (compose-go, cli/options.go).
_BASES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
_OVERRIDES = (
    "compose.override.yml",
    "compose.override.yaml",
    "docker-compose.override.yml",
    "docker-compose.override.yaml",
)

# Compose's own variables, which it takes from the environment, or else from a file of variables.
_FILES_VARIABLE = "COMPOSE_FILE"
_SEPARATOR_VARIABLE = "COMPOSE_PATH_SEPARATOR"
PROJECT_VARIABLE = "COMPOSE_PROJECT_NAME"
_IN_ENV_FILES = (_FILES_VARIABLE, _SEPARATOR_VARIABLE, PROFILES_VARIABLE, PROJECT_VARIABLE)

# The first version in which an override can replace a list instead of extending it (the !override tag).
_REPLACES_LISTS = (2, 24, 4)
# The end of a key whose value has this tag, since JSON has no tags.
_REPLACED, _REMOVED = "!override", "!reset"

# Options that name a folder to write to.
_WRITTEN = frozenset({"engine_cache_dir", "download_dir"})
# Of the memory of the engine's machine, for a container; the kernel then ends the engine and not the host's programs.
_MEMORY_SHARE = 0.95
# Files of a folder that are checked for links. No model has more; a folder with more is a home folder.
_MAX_FILES = 10_000


def packaged_compose_file() -> str:
    source = importlib.resources.files("lem.orchestration").joinpath(PACKAGED_NAME)
    return source.read_text(encoding="utf-8")


FileNames = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def find_compose_files(named: FileNames, folder: Path, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """The files named, else those of COMPOSE_FILE, else those that Compose would find, else the packaged one.

    One name may be several, separated as in COMPOSE_FILE. ContainerError of kind `compose_file` if one is missing.
    """
    listed = (named,) if isinstance(named, (str, os.PathLike)) else named or ()
    names = [os.fspath(item) for item in listed] or list(filter(None, [environ.get(_FILES_VARIABLE)]))
    if not names:
        return _usual_files(folder)
    separator = environ.get(_SEPARATOR_VARIABLE) or os.pathsep
    parts = [part for text in names for part in ([text] if (folder / text).is_file() else text.split(separator))]
    for path in (folder / part for part in parts):
        if not path.is_file():
            message = f"{path}: no such compose file" + ("" if listed else f" ({_FILES_VARIABLE} names it)")
            hint = "`lem compose > docker-compose.yml` writes one that works"
            raise ContainerError(message, hint, kind="compose_file")
    return tuple((folder / part).absolute() for part in parts)


def _usual_files(folder: Path) -> tuple[Path, ...]:
    """A compose file and its override, as Compose finds them, in `folder`, its folder docker, or a parent.

    An override in `folder` without a file beside it overrides the one in docker, or else the packaged one.
    """
    folder = folder.absolute()
    lone = _first_of(folder, _OVERRIDES)
    for place in (folder, folder / "docker", *folder.parents):
        if base := _first_of(place, _BASES):
            return base + (_first_of(place, _OVERRIDES) or (lone if place.parent == folder else ()))
    return (PACKAGED, *lone)


def _first_of(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())[:1]


def compose_variables(
    named: FileNames, env_file: Path | None, folder: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """An environment with the variables of Compose that it takes from files: --env-file, else .env.

    ContainerError if a value contains another variable, or is not a valid name of a project.
    """
    first = find_compose_files(named, folder, environ)[:1] if named else ()
    is_off = environ.get("COMPOSE_DISABLE_ENV_FILE", "").lower() in ("1", "true")
    usual = [] if is_off else [first[0].parent / ".env" if first else folder / ".env"]
    listed = [folder / name for name in environ.get("COMPOSE_ENV_FILES", "").split(",") if name]
    found: dict[str, str] = {}
    for path in [env_file] if env_file else listed or usual:
        with contextlib.suppress(OSError):  # Compose reports a named file that is missing
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, value = line.strip().removeprefix("export ").partition("=")
                if name.strip() in _IN_ENV_FILES:
                    found[name.strip()] = value.partition(" #")[0].strip().strip("\"'")
    if using := [name for name, value in found.items() if "$" in value and name not in environ]:
        message = f"a file of variables sets {using[0]} to {found[using[0]]}, which lem does not expand"
        raise ContainerError(message, f"write its value in full, or export {using[0]}", kind="compose_file")
    found = {**found, **environ}
    if not re.fullmatch(r"([a-z0-9][a-z0-9_-]*)?", name := found.get(PROJECT_VARIABLE, "")):
        hint = "use lowercase letters, digits, hyphens and underscores, and a letter or digit first"
        raise ContainerError(f"{PROJECT_VARIABLE}: {name!r} is not a valid name", hint, kind="project")
    return found


def describe_files(paths: Sequence[Path]) -> str:
    return ", ".join("the compose file in lem's package" if path == PACKAGED else str(path) for path in paths)


@dataclass(frozen=True)
class Mount:
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
        if other.target == self.target:
            return other.source == self.source and not self.is_read_only
        if not Path(other.target).is_relative_to(self.target) or other.is_read_only != self.is_read_only:
            return False
        return self.source / Path(other.target).relative_to(self.target) == other.source


def without_nested(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    kept = list(dict.fromkeys(mounts))
    return tuple(item for item in kept if not any(other.covers(item) for other in kept if other != item))


def local_mounts(configs: Iterable[ExperimentConfig]) -> tuple[Mount, ...]:
    """A mount for each local path that experiments name as a model, as a data set, or in an option of their backend.

    For the file of an external meter it is the folder: a mounted file would not change when the file is replaced.
    A snapshot of a model hub is a folder of links to files beside it, so the folders that links lead to are mounted.
    """
    configs, found = tuple(configs), list[Mount]()
    documents = [(config.backend, config.to_dict()) for config in configs]
    # Of a server, words of its command and paths of its API are not meant for this machine's folders.
    named = [item["server"]["options"] if name == "server" else item.get(name) for name, item in documents]
    texts = {
        text for (_, item), more in zip(documents, named, strict=True) for text in _texts([item.get("model"), more])
    }
    data = (config.dataset.name if config.dataset else getattr(config.prompts, "dataset", None) for config in configs)
    for name, is_written in sorted(texts | {(name, False) for name in data if name}):
        path = durable.in_home(name)
        if is_written:
            path.mkdir(parents=True, exist_ok=True)
        if os.path.exists(path) and path.absolute() != Path("/"):  # noqa: PTH110 - False also for a text too long
            found += [Mount(path.absolute(), _target_of(name), is_read_only=not is_written), *_linked(path)]
    for meter_file in filter(None, (config.measurement.external_csv for config in configs)):
        folder = durable.in_home(meter_file).absolute().parent
        found.append(Mount(folder, str(PurePosixPath(_target_of(meter_file)).parent)))
    return without_nested(found)


def _target_of(name: str) -> str:
    return f"{CONTAINER_HOME}/{name[2:]}" if name.startswith("~/") else str(durable.in_home(name).absolute())


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
    name: str
    files: tuple[Path, ...]  # absolute, or PACKAGED; later ones override earlier ones
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
    servers: frozenset[str] = frozenset()  # the services that are servers themselves: no worker runs in them
    mark: str = field(default_factory=new_mark)  # on the containers of servers

    def prepare(self, slots: Sequence[str]) -> Compose:
        """Find or make everything that the services of slots need (`plan.slot_of`); nothing is started.

        ContainerError: engine, plugin, compose file, service or image missing. UserError: a folder cannot be written.
        """
        names = tuple(dict.fromkeys(service for service, _ in map(service_and_image, slots)))
        engine = Docker(self.environ).info()
        pyz = provide_pyz(self.environ)
        for folder in (self.state_folder, self.results_dir):
            _make_folder(folder)  # as the user's own: the engine would make it root's
        base = self.as_written(pyz, engine)
        version, base = base.compose_version(), base.with_services(names)
        if others := [item for item, is_own in base.containers().items() if not is_own]:
            message = f"project {self.name} has containers that lem did not start: {', '.join(others)}"
            hint = f"set {PROJECT_VARIABLE} to another name: a campaign removes the containers of its project"
            raise ContainerError(message, hint, kind="project")
        if engine.get("MemoryLimit") is False:
            _logger.warning("the Docker engine cannot limit memory, so limits in compose files have no effect")
        # The folder of models that the packaged file mounts; if it cannot be made, Compose reports that where needed.
        with contextlib.suppress(OSError):
            cache = Path(base.env.get(MODEL_CACHE_VARIABLE) or "~/.cache/huggingface")
            cache.expanduser().mkdir(parents=True, exist_ok=True)
        overrides = {
            name: self._server_override(name) if name in self.servers else self._service_override(name, pyz, engine)
            for name in names
        }
        for name in names:
            overrides[name] |= self._gpu_override(name, version)
            if name in self.servers:
                if base.services[name].url is None:
                    message = f"service {name} publishes no port under a fixed number"
                    raise ContainerError(message, PUBLISH_HINT, kind="compose_file")
            elif not base.services[name].is_idle:  # it would run a server, which holds the GPU beside lem's own engine
                _logger.warning("%s: lem runs its own engine in the container, and not the service's command", name)
                overrides[name] |= {"entrypoint": ["sleep"], "command": ["infinity"]}
        text = override_text({"services": overrides, "volumes": _existing_volumes(base, version)})
        files = [*base.files, self._write(OVERRIDE_NAME, text)]
        if any(service_and_image(slot)[1] for slot in slots):
            files.append(self.write_images(slots))
        prepared = replace(base, files=tuple(files), pyz=PYZ_FOLDER / pyz.name)
        _ = prepared.services  # Compose refuses an invalid combination here, before anything is started
        own = {slot: base.services[service_and_image(slot)[0]] for slot in slots}  # `prepared` has that of one slot
        prepared.images.update(_image_ids(prepared, own))
        return prepared

    def write_images(self, slots: Iterable[str]) -> Path:
        """The file of other images than the compose file's, by the first slot of each service; servers name theirs."""
        images: dict[str, str | None] = {}
        for service, image in map(service_and_image, slots):
            images.setdefault(service, image)
        services = {name: {"image": image} for name, image in images.items() if image and name not in self.servers}
        return self._write(IMAGES_NAME, override_text({"services": services}))

    def as_written(self, pyz: Path | None, engine: Mapping[str, Any]) -> Compose:
        variables = self._variables(pyz, engine)
        if PACKAGED in self.files:
            self._write(PACKAGED_NAME, packaged_compose_file())
        return self._compose(self._paths(), variables)

    def described(self, names: Sequence[str]) -> Mapping[str, Service]:
        """The services of the files; nothing stays on disk; ContainerError as for `prepare`, or no docker command."""
        with durable.scratch_folder(Path(tempfile.gettempdir())) as scratch:
            return replace(self, state_folder=scratch).as_written(None, {}).with_services(names).services

    def existing(self) -> Compose:
        # Without any file Compose finds the containers by the name of the project.
        found = tuple(path for path in (*self._paths(), self.state_folder / OVERRIDE_NAME) if path.is_file())
        return self._compose(found, self._variables(None, {}))

    def _paths(self) -> tuple[Path, ...]:
        return tuple(self.state_folder / PACKAGED_NAME if path == PACKAGED else path for path in self.files)

    def _compose(self, files: tuple[Path, ...], variables: Mapping[str, str]) -> Compose:
        # For the packaged file, relative paths and a file called .env belong to the user's folder.
        folder = self.working_dir if PACKAGED in self.files else self.directory
        return Compose(variables, self.name, files, folder, self.env_file, label=describe_files(self.files))

    def _write(self, name: str, text: str) -> Path:
        path = self.state_folder / name
        try:
            durable.write_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason_of(error)}") from error
        return path

    def _variables(self, pyz: Path | None, engine: Mapping[str, Any]) -> dict[str, str]:
        """The environment of `docker`: this one, and the variables of docker/docker-compose.yml."""
        uid, gid = _user_inside(engine)
        own = {"LEM_RESULTS_DIR": self.results_dir, "LEM_UID": uid, "LEM_GID": gid}
        if isinstance(memory_b := engine.get("MemTotal"), int):
            own["LEM_HOST_MEMORY"] = round(_MEMORY_SHARE * memory_b)
        own |= {} if pyz is None else {"LEM_PYZ_DIR": pyz.parent}
        found = {**self.environ, "DOCKER_CLI_HINTS": "false", **{name: str(value) for name, value in own.items()}}
        if gpus := sorted({uuid for uuids in self.gpus_of.values() for uuid in uuids}):
            found["LEM_GPU_IDS"] = ",".join(gpus)
        if cache := found.get(MODEL_CACHE_VARIABLE) or found.get(HUB_FOLDER_VARIABLE):
            found[MODEL_CACHE_VARIABLE] = str(Path(cache).expanduser().absolute())
        return found

    def _server_override(self, name: str) -> dict[str, Any]:
        """A server keeps its user, its command and its folders; one that died is not to come back unseen."""
        mounts = [mount.to_compose() for mount in without_nested((*self.mounts, *self.mounts_of.get(name, ())))]
        return {"pull_policy": "never", "restart": "no", "labels": {MARK_LABEL: self.mark}, "volumes": mounts}

    def _gpu_override(self, name: str, version: tuple[int, ...]) -> dict[str, Any]:
        gpus = self.gpus_of.get(name)
        # In older versions only LEM_GPU_IDS, which the packaged file uses, selects GPUs.
        if gpus is None or version < _REPLACES_LISTS:
            return {}
        device = {"driver": "nvidia", "device_ids": list(gpus), "capabilities": ["gpu"]}
        # Compose 2.26 refuses an empty list as soon as another file follows this one.
        devices = {f"devices{_REPLACED}": [device]} if gpus else {f"devices{_REMOVED}": None}
        return {"deploy": {"resources": {"reservations": devices}}}

    def _service_override(self, name: str, pyz: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
        user = _user_name()
        environment = {"HOME": CONTAINER_HOME, "USER": user, "LOGNAME": user}
        mounts = [Mount(pyz.parent, str(PYZ_FOLDER)), Mount.in_place(self.results_dir, is_read_only=False)]
        mounts += [*self.mounts, *self.mounts_of.get(name, ())]
        datasets = self.environ.get(DATASETS_VARIABLE)
        if datasets and (folder := Path(datasets).expanduser().absolute()).is_dir():
            environment[DATASETS_VARIABLE] = str(folder)
            mounts.append(Mount.in_place(folder))
        found: dict[str, Any] = {
            "user": ":".join(map(str, _user_inside(engine))),
            "working_dir": str(self.working_dir),
            "pull_policy": "never",
            "environment": environment,
            "volumes": [mount.to_compose() for mount in without_nested(mounts)],
        }
        if _has_security_option(engine, "userns"):  # else no user inside could write to the results folder
            found["userns_mode"] = "host"
        return found


def _has_security_option(engine: Mapping[str, Any], name: str) -> bool:
    return any(f"name={name}" in str(item).split(",") for item in engine.get("SecurityOptions") or ())


def _user_inside(engine: Mapping[str, Any]) -> tuple[int, int]:
    return (0, 0) if _has_security_option(engine, "rootless") else (os.getuid(), os.getgid())


def _existing_volumes(compose: Compose, version: tuple[int, ...]) -> dict[str, Any]:
    """Named volumes that the user's own project already has: those of lem's project would be new and empty."""
    if not compose.volumes:
        return {}
    try:
        own = replace(compose, project="").volumes
    except ContainerError:  # Compose cannot name a project after the folder, so the user has none
        return {}
    tag = _REPLACED if version >= _REPLACES_LISTS else ""
    return {
        f"{key}{tag}": {"name": own[key], "external": True}
        for key, name in compose.volumes.items()
        if own[key] != name and compose.call("volume", "inspect", own[key]).code == 0
    }


def override_text(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # JSON is YAML, except that a dollar sign would begin a variable.
    text = re.sub(rf'({_REPLACED}|{_REMOVED})": ', r'": \1 ', text.replace("$", "$$"))
    return f"# Written by lem at every start of a campaign; it overrides the compose file.\n{text}\n"


def with_image(service: Service, image: str | None) -> Service:
    return service if image is None else replace(service, image=image, is_built=False)


def _image_ids(docker: Docker, services: Mapping[str, Service]) -> dict[str, str]:
    """The ids of images by slot."""
    wanted = {slot: with_image(service, service_and_image(slot)[1]) for slot, service in services.items()}
    for service in wanted.values():
        if service.image is None:
            message = f"service {service.name} has no `image`"
            raise ContainerError(message, "add one next to `build:`, and build it", kind="image")
    found = {slot: docker.image_id(str(item.image)) for slot, item in wanted.items()}
    missing = [item for slot, item in wanted.items() if found[slot] is None]
    if not missing:
        return {slot: str(image_id) for slot, image_id in found.items()}
    message = f"image {missing[0].image} of service {missing[0].name} is missing, and a campaign pulls no images"
    message += "".join(f"; so is image {item.image} of service {item.name}" for item in missing[1:])
    hint = f"run {', '.join(item.how_to_get for item in missing)}, or load it with `docker load`"
    pythons = [python for item in missing if (python := demo_python(item.name)) is not None]
    if len(pythons) == len(missing) and all(service_and_image(slot)[1] is None for slot in services):
        hint += f"; or run on this machine instead: --executor local --python {pythons[0]}"
    raise ContainerError(message, hint, kind="image")


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
