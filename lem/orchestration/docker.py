"""Docker as a command, and what is mounted into containers."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lem.base import process
from lem.base.errors import UserError
from lem.base.process import Finished
from lem.config.experiment import ExperimentConfig

CALL_TIMEOUT_S = 30.0

# How much of what the client said goes into a message.
_SAID_WIDTH = 400


class ContainerError(UserError, RuntimeError):
    """Containers cannot be had, or did not do what they were told.

    Attributes:
        kind: a short stable word: `docker`, `compose`, `compose_file`, `daemon`, `rights`, `image`, `gpu`, `mount`,
            `disk`, `service`, `timeout`, `container`.
    """

    def __init__(self, message: str, hint: str = "", *, kind: str = "container") -> None:
        super().__init__(message, hint)
        self.kind = kind


@dataclass(frozen=True)
class _Complaint:
    """What the client or the engine says when one thing is missing."""

    kind: str
    pattern: str
    message: str
    hint: str


# In order: the first that matches counts. The texts are those of Docker 20.10 to 29 and Compose 2.17 to 5.
_COMPLAINTS = (
    _Complaint(
        "compose",
        r"is not a docker command|unknown command: docker compose|unknown shorthand flag: 'p' in -p",
        "the docker command has no Compose plugin",
        "install it: apt-get install docker-compose-plugin (docker.com's packages) or docker-compose-v2 (Ubuntu's)",
    ),
    _Complaint(
        "rights",
        r"permission denied while trying to connect to the (Docker daemon socket|docker API)",
        "this user may not talk to the Docker engine",
        "usermod -aG docker USER and log in again (that is as good as root), or use rootless Docker",
    ),
    _Complaint(
        "daemon",
        r"Cannot connect to the Docker daemon|failed to connect to the docker API|Is the docker daemon running"
        r"|error during connect|connection reset by peer|unexpected EOF",
        "the Docker engine does not answer",
        "start it: systemctl start docker; with DOCKER_HOST or a context set, see that it names the right one",
    ),
    _Complaint(
        "gpu",
        r"could not select device driver|unknown or invalid runtime name|nvidia-container-cli|nvidia-container-runtime"
        r"|CDI device|CDI spec|GPU vendor from CDI|libnvidia-ml",
        "the Docker engine cannot give a container the GPU",
        "install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure --runtime=docker and restart Docker;"
        " without a GPU, lay docker/docker-compose.cpu.yml over the compose file",
    ),
    _Complaint(
        "image",
        r"No such image|pull access denied|manifest (unknown|for .* not found)|not found locally|image .* not found",
        "an image is missing",
        "docker pull, build or load it beforehand; nothing is pulled while a campaign runs",
    ),
    _Complaint(
        "mount",
        r"bind source path does not exist|invalid mount config",
        "a folder to mount is not there",
        "make it, or set the variable of the compose file that names it",
    ),
    _Complaint("disk", r"no space left on device", "the disk of the Docker engine is full", "docker system prune"),
    _Complaint(
        "service",
        r"no such service",
        "the compose file has no such service",
        "a backend runs in the service of its name; lem compose prints a file that has them all",
    ),
)


def explain(finished: Finished, doing: str, otherwise: str = "container") -> ContainerError:
    """The error that a failed call means.

    Args:
        doing: what was being done, `starting pytorch`.
        otherwise: the kind of an error that nothing else is known about.
    """
    said = _gist(finished.stderr) or _gist(finished.stdout)
    if finished.has_timed_out:
        return ContainerError(
            f"{doing}: `{process.copyable(finished.argv)}` did not end in time" + (f": {said}" if said else ""),
            "try it by hand; is the machine or its disk overloaded?",
            kind="timeout",
        )
    for complaint in _COMPLAINTS:
        if re.search(complaint.pattern, finished.stderr):
            return ContainerError(f"{doing}: {complaint.message}: {said}", complaint.hint, kind=complaint.kind)
    said = said or process.describe_exit(finished.code)
    return ContainerError(f"{doing}: {said}", f"try by hand: {process.copyable(finished.argv)}", kind=otherwise)


def _gist(text: str) -> str:
    """The lines that tell what went wrong: those after Compose's list of what it did so far."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i)error|.*\berror response from daemon", line)]
    chosen = " ".join(errors or lines[-1:])
    return chosen if len(chosen) <= _SAID_WIDTH else f"{chosen[: _SAID_WIDTH - 1]}…"


@dataclass(frozen=True)
class Docker:
    """The docker command of this machine.

    Attributes:
        env: its whole environment.
    """

    env: Mapping[str, str] = field(repr=False)
    _oom_kills: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def call(self, arguments: Sequence[str], *, timeout_s: float = CALL_TIMEOUT_S) -> Finished:
        """A finished call; a failing one is a value.

        Raises:
            ContainerError: kind `docker`, there is no docker command.
        """
        try:
            return process.run(("docker", *arguments), timeout_s=timeout_s, env=self.env)
        except UserError as error:
            raise ContainerError(
                f"the docker command cannot be run: {error.message}",
                "install Docker Engine (https://docs.docker.com/engine/install/), or run with --executor local",
                kind="docker",
            ) from error

    def must(self, arguments: Sequence[str], doing: str, *, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """What a call printed.

        Raises:
            ContainerError: it failed.
        """
        finished = self.call(arguments, timeout_s=timeout_s)
        if finished.code != 0:
            raise explain(finished, doing)
        return finished.stdout

    def info(self) -> Mapping[str, Any]:
        """What the engine says of itself, `docker info`.

        Raises:
            ContainerError: kind `docker`, `daemon` or `rights`.
        """
        finished = self.call(("info", "--format", "{{json .}}"))
        found = decode_object(finished.stdout)
        # A client that reaches no engine still describes itself, and some of its versions then exit with 0.
        if finished.code != 0 or not found.get("ServerVersion"):
            raise explain(finished, "looking for the Docker engine", otherwise="daemon")
        return found

    def image_id(self, image: str) -> str | None:
        """The id of an image that the engine has; None when it has none of that name.

        Raises:
            ContainerError: the engine cannot be asked.
        """
        finished = self.call(("image", "inspect", "--format", "{{.Id}}", image))
        if finished.code == 0:
            return finished.stdout.strip() or None
        error = explain(finished, f"looking for image {image}")
        if error.kind == "image":
            return None
        raise error

    def was_out_of_memory(self, container: str, since_s: float, until_s: float) -> bool:
        """Whether the kernel killed a process of a container for want of memory; False when nobody knows.

        The state of a container tells that of its first process alone, or of any process ever, as Docker is old or new.
        Where the engine sends no event (containerd gives up on control groups of an unusual layout), the kernel's own
        count in the container tells, by what has come to it since it was last asked.

        Args:
            since_s, until_s: between these moments, in seconds since 1970; it returns when the second has passed.
        """
        span = ("--since", f"{since_s:.3f}", "--until", f"{until_s:.3f}")
        which = ("--filter", f"container={container}", "--filter", "event=oom", "--format", "{{.Status}}")
        finished = self.call(("events", *span, *which))
        before, now = self._oom_kills.get(container, 0), self._count_oom_kills(container)
        self._oom_kills[container] = now
        return (finished.code == 0 and bool(finished.stdout.strip())) or now > before

    def _count_oom_kills(self, container: str) -> int:
        """How many processes of a container the kernel has killed for want of memory; 0 when that cannot be read.

        Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst (memory.oom_control).
        """
        files = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
        words = self.call(("exec", container, "cat", *files)).stdout.split()
        counts = [value for name, value in pairwise(words) if name == "oom_kill"]
        return int(counts[0]) if counts and counts[0].isdecimal() else 0

    def pids(self, container: str) -> frozenset[int]:
        """The processes of a running container as the host numbers them; empty when they cannot be had."""
        finished = self.call(("top", container, "-o", "pid"))
        return frozenset(int(line) for line in finished.stdout.split() if line.isdecimal())


def decode_object(text: str) -> Mapping[str, Any]:
    """The JSON object in a text; {} when it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# Every image lets every user write here; the user's own home folder is not there.
CONTAINER_HOME = "/tmp"  # noqa: S108 - inside a container

# Options that name a folder to write to.
_WRITTEN = frozenset({"engine_cache_dir", "download_dir"})

# No model has more files; a folder that has is somebody's home.
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine in a container.

    Attributes:
        source: absolute.
        target: where it is seen.
    """

    source: Path
    target: str
    is_read_only: bool = True

    @classmethod
    def in_place(cls, path: Path, *, is_read_only: bool = True) -> Mount:
        """A mount at the same absolute path."""
        return cls(path.absolute(), str(path.absolute()), is_read_only)

    def to_compose(self) -> dict[str, Any]:
        """The long form, in which a source that is not there is an error and no empty folder of root's."""
        return {
            "type": "bind",
            "source": str(self.source),
            "target": self.target,
            "read_only": self.is_read_only,
            "bind": {"create_host_path": False},
        }


def local_mounts(configs: Iterable[ExperimentConfig]) -> tuple[Mount, ...]:
    """A mount for each local folder or file that experiments name as a model or in an option of their backend.

    Of the file of an external meter it is the folder, since a file that is replaced would go on being seen as it was.
    A snapshot of a model hub is a folder of links to files that lie beside it, so what links lead to comes along.
    """
    configs = tuple(configs)
    named = {item for config in configs for item in _named_paths(config)}
    found: dict[Mount, None] = {}
    for name, is_written in sorted(named):
        path = Path(name).expanduser()
        if is_written:
            path.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.absolute() == Path("/"):
            continue
        target = f"{CONTAINER_HOME}/{name[2:]}" if name.startswith("~/") else str(path.absolute())
        found[Mount(path.absolute(), target, is_read_only=not is_written)] = None
        found.update(dict.fromkeys(_linked(path)))
    for config in configs:
        if config.measurement.external_csv is not None:
            name = config.measurement.external_csv
            folder = Path(name).expanduser().absolute().parent
            target = f"{CONTAINER_HOME}/{name[2:]}".rpartition("/")[0] if name.startswith("~/") else str(folder)
            found[Mount(folder, target)] = None
    return without_nested(found)


def without_nested(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The mounts less those that another one shows already."""
    kept = list(dict.fromkeys(mounts))
    return tuple(item for item in kept if not any(_shows(other, item) for other in kept if other != item))


def _shows(outer: Mount, inner: Mount) -> bool:
    """Whether a mount shows all that another one does, at the same place."""
    if inner.target == outer.target:
        return inner.source == outer.source and not outer.is_read_only
    is_below = Path(inner.target).is_relative_to(outer.target)
    if not is_below or inner.is_read_only != outer.is_read_only:
        return False
    return outer.source / Path(inner.target).relative_to(outer.target) == inner.source


def _named_paths(config: ExperimentConfig) -> Iterator[tuple[str, bool]]:
    """Every text that may name a path, and whether it is written to."""
    document = config.to_dict()
    for section in (document.get("model"), document.get(config.backend)):
        yield from _texts(section, is_written=False)


def _texts(value: Any, *, is_written: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(value, str):
        if value.strip():
            yield value, is_written
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, is_written=key in _WRITTEN)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, is_written=is_written)


def _linked(folder: Path) -> Iterator[Mount]:
    """The folders that links in a folder lead to, outside of it."""
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for path in sorted(itertools.islice(folder.rglob("*"), _LOOKED_AT)):
        if path.is_symlink() and path.exists():
            target = path.resolve()
            if not target.is_relative_to(inside):
                yield Mount.in_place(target if target.is_dir() else target.parent)
