"""The compose project of a campaign, and its services."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from lem.base import durable, process
from lem.base.durable import make_folder, reason_of
from lem.base.errors import UserError
from lem.base.variables import DATASETS_VARIABLE, HUB_FOLDER_VARIABLE, MARK_VARIABLE, MODEL_CACHE_VARIABLE
from lem.meters.nvml import GpuReading
from lem.orchestration.compose import (
    PACKAGED_NAME,
    REPLACES_LISTS,
    Compose,
    ComposeFiles,
    ContainerState,
    Service,
    ServiceOverride,
    render_override,
)
from lem.orchestration.docker import ContainerError, Docker, Mount, explain, without_nested
from lem.orchestration.packing import PYZ_NAME, provide_pyz
from lem.worker.guardian import new_mark

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


@dataclass(frozen=True)
class Services:
    """The services of one project.

    Attributes:
        pyz: path of lem.pyz inside every container.
        images: the id of each service's image, as far as it was looked up.
    """

    compose: Compose
    pyz: PurePosixPath
    images: Mapping[str, str]

    @functools.cached_property
    def described(self) -> Mapping[str, Service]:
        """The services as the compose files describe them.

        Raises:
            ContainerError: kind `compose_file`.
        """
        return self.compose.services()

    def has_gpu(self, service: str) -> bool:
        """Whether a GPU is reserved for a service.

        Raises:
            ContainerError: the compose files cannot be read, or have no such service.
        """
        if service not in self.described:
            raise ContainerError(f"no such service: {service}", kind="service")
        return self.described[service].has_gpu

    def state(self, service: str) -> ContainerState | None:
        """The container of a service; None when there is none.

        Raises:
            ContainerError: the engine cannot be asked.
        """
        return self.compose.states().get(service)

    def pids(self, service: str) -> frozenset[int]:
        """The processes in a service's container as the host numbers them; empty when it does not run."""
        state = self.state(service)
        return frozenset() if state is None else self.compose.docker.pids(state.container_id)

    def was_out_of_memory(self, service: str, since_s: float, until_s: float) -> bool:
        """Whether the kernel killed something in a service's container for want of memory; as `Docker`'s."""
        state = self.state(service)
        return state is not None and self.compose.docker.was_out_of_memory(state.container_id, since_s, until_s)

    # Starting and ending

    def start(self, names: Iterable[str], *, recreate: bool = False) -> None:
        """Start services; containers that are what the files say are left as they are.

        Raises:
            ContainerError: they cannot be started.
        """
        wanted = tuple(names)
        options = ("--force-recreate",) if recreate else ()
        doing = f"starting {', '.join(wanted)}"
        self.compose.must("up", "--detach", "--no-build", *options, *wanted, doing=doing, timeout_s=UP_TIMEOUT_S)

    def restart(self, service: str) -> None:
        """Restart a container as it was made.

        Raises:
            ContainerError: it cannot be restarted.
        """
        words = ("restart", "--timeout", str(STOP_GRACE_S), service)
        self.compose.must(*words, doing=f"restarting {service}", timeout_s=UP_TIMEOUT_S)

    def recreate(self, service: str) -> None:
        """Put a new container in the place of one, whatever state that is in.

        Raises:
            ContainerError: it cannot be made.
        """
        words = ("up", "--detach", "--no-build", "--no-deps", "--force-recreate", "--timeout", str(STOP_GRACE_S))
        self.compose.must(*words, service, doing=f"replacing the container of {service}", timeout_s=UP_TIMEOUT_S)

    def await_answer(self, service: str) -> None:
        """Return when a service answers.

        Raises:
            ContainerError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                self.read_gpus(service)
            except ContainerError as error:
                state = self.state(service)
                is_starting = state is not None and state.state in ("running", "restarting", "created")
                if not is_starting or time.monotonic() >= deadline:
                    raise self._silence(service, state, error) from error
            else:
                return
            time.sleep(_POLL_S)

    def _silence(self, service: str, state: ContainerState | None, error: ContainerError) -> ContainerError:
        described = "it has no container" if state is None else f"its container is {state.describe()}"
        logs = self.compose.call("logs", "--no-log-prefix", "--no-color", "--tail", str(_LOG_LINES), service)
        said = " / ".join(line.strip() for line in logs.stdout.splitlines() if line.strip())
        message = f"{service} does not answer: {described}; {error.message}" + (f"; it printed: {said}" if said else "")
        return ContainerError(message, error.hint, kind=error.kind)

    # lem inside

    def exec_command(
        self, service: str, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """The command that runs lem in a service.

        Args:
            variables: for its environment, on the command line: nothing secret.
        """
        options = [word for name, value in (variables or {}).items() for word in ("--env", f"{name}={value}")]
        # -T: no terminal, so that its stdin is the pipe that it is given.
        words = ("exec", "-T", *options, service, "python3", "-u", str(self.pyz), *arguments)
        return ("docker", *self.compose.arguments(*words))

    def worker_command(self, service: str, mark: str) -> tuple[str, ...]:
        """The command of a worker in a service, all of whose processes bear a mark."""
        return self.exec_command(service, "worker", variables={MARK_VARIABLE: mark})

    def read_gpus(self, service: str) -> GpuReading:
        """What NVML says inside a running service.

        Raises:
            ContainerError: it does not answer.
        """
        doing = f"asking {service}"
        finished = self._call_lem(service, "gpus", "--json", timeout_s=PROBE_TIMEOUT_S)
        if finished.code != 0:
            raise explain(finished, doing)
        try:
            return _decode_reading(finished.stdout)
        except ValueError as error:
            raise ContainerError(f"{doing}: it answered {finished.stdout[:120]!r}") from error

    def clear(self, service: str, mark: str) -> None:
        """See that nothing is left of a worker: kill what bears its mark, or else put a new container in the place."""
        try:
            if self._call_lem(service, "worker", "--end-marked", mark, timeout_s=KILL_TIMEOUT_S).code == 0:
                return
            _logger.warning("%s: its processes cannot be ended from inside; the container is replaced", service)
            self.compose.call("kill", service, timeout_s=KILL_TIMEOUT_S)
            self.recreate(service)
        except ContainerError as error:
            _logger.warning("%s: processes of its worker may be left: %s", service, error.message)

    def run_tethered(self, service: str, arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[str, int]:
        """What lem printed in a service, and its exit code; it ends with this process, however that ends.

        Args:
            variables: for its environment; they go through its stdin.

        Raises:
            UserError: there is no docker command.
        """
        mark = new_mark()
        command = self.exec_command(service, "worker", "--tether", *arguments, variables={MARK_VARIABLE: mark})
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            child = process.spawn(
                command,
                env=self.compose.docker.env,
                stdout=output.fileno(),
                stderr=output.fileno(),
                new_session=True,
            )
            stack.callback(process.kill_group, child.pid)
            if child.stdin is not None:
                stack.enter_context(child.stdin)  # held open: its end is what ends the command inside
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(dict(variables)).encode() + b"\n")
            try:
                code = child.wait(EXPERIMENT_TIMEOUT_S)
            except process.TimeoutExpired:
                process.kill_group(child.pid)
                self.clear(service, mark)
                return f"it did not end within {EXPERIMENT_TIMEOUT_S:.0f} s", 1
            output.seek(0)
            return output.read().decode("utf-8", "replace"), code

    def _call_lem(self, service: str, *arguments: str, timeout_s: float) -> process.Finished:
        return self.compose.docker.call(self.exec_command(service, *arguments)[1:], timeout_s=timeout_s)


def _decode_reading(printed: str) -> GpuReading:
    """The reading in the last line of what `lem gpus --json` printed; what stands before it is an image's own.

    Raises:
        ValueError: it is none.
    """
    lines = printed.splitlines()
    document = json.loads(lines[-1]) if lines else None
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    return GpuReading.from_dict(document)


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
