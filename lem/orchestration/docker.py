"""The docker command, and what its failures mean."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lem.base import process
from lem.base.errors import UserError
from lem.base.process import Finished

CALL_TIMEOUT_S = 30.0
OLDEST_COMPOSE = (2, 17)
_QUOTED_WIDTH = 400  # characters of the client's output in a message

_INSTALL_COMPOSE = "install Docker Compose 2.17 or newer: apt-get install docker-compose-plugin, or docker-compose-v2"

INSTALL_TOOLKIT = (
    "install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure --runtime=docker and restart"
)
CPU_OVERRIDE = "add docker/docker-compose.cpu.yml as the last compose file"
ONE_SERVICE_EACH = "each backend runs in the service of its name; `lem compose` prints a file with all of them"

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
    ("disk", r"no space left on device", "the disk of the Docker engine is full", "docker system prune"),
    ("service", r"no such service", "the compose file has no such service", ONE_SERVICE_EACH),
)


class ContainerError(UserError, RuntimeError):
    """Containers are not available, or a call of docker failed."""

    def __init__(self, message: str, hint: str = "", *, kind: str = "container") -> None:
        super().__init__(message, hint)
        # A kind of `_FAILURES`, or `docker` (no such command), `compose_file`, `timeout`, `container` (anything else).
        self.kind = kind


def explain(finished: Finished, doing: str, otherwise: str = "container") -> ContainerError:
    """The error that a failed call means; `otherwise` is its kind if the output is not a known one."""
    quoted = _essence(finished.stderr) or _essence(finished.stdout)
    if finished.has_timed_out:
        return ContainerError(
            f"{doing}: `{process.copyable(finished.argv)}` timed out" + (f": {quoted}" if quoted else ""),
            "run it by hand; the machine or its disk may be overloaded",
            kind="timeout",
        )
    for kind, pattern, message, hint in _FAILURES:
        if re.search(pattern, finished.stderr):
            return ContainerError(f"{doing}: {message}: {quoted}", hint, kind=kind)
    quoted = quoted or process.describe_exit(finished.code)
    return ContainerError(f"{doing}: {quoted}", f"run it by hand: {process.copyable(finished.argv)}", kind=otherwise)


def _essence(text: str) -> str:
    """The error lines of an output, or its last line: Compose first lists every step that it took."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i)error|.*\berror response from daemon", line)]
    chosen = " ".join(errors or lines[-1:])
    return chosen if len(chosen) <= _QUOTED_WIDTH else f"{chosen[: _QUOTED_WIDTH - 1]}…"


@dataclass(frozen=True)
class Docker:
    """The docker command, run with `env` as its whole environment."""

    env: Mapping[str, str] = field(repr=False)
    _oom_kills: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> Finished:
        """A finished call, also a failed one; ContainerError of kind `docker` if there is no docker command."""
        try:
            return process.run(("docker", *words), timeout_s=timeout_s, env=self.env)
        except UserError as error:
            raise ContainerError(
                f"the docker command cannot be run: {error.message}",
                "install Docker Engine (https://docs.docker.com/engine/install/), or run with --executor local",
                kind="docker",
            ) from error

    def info(self) -> Mapping[str, Any]:
        """`docker info`; ContainerError if the engine does not answer."""
        finished = self.call("info", "--format", "{{json .}}")
        try:
            found = json.loads(finished.stdout)
        except ValueError:
            found = None
        # A client that reaches no engine still describes itself, and some of its versions then exit with 0.
        if finished.code != 0 or not isinstance(found, dict) or not found.get("ServerVersion"):
            raise explain(finished, "looking for the Docker engine", otherwise="daemon")
        return found

    def compose_version(self) -> tuple[int, ...]:
        """The version of the Compose plugin; ContainerError of kind `compose` if it is missing or too old."""
        finished = self.call("compose", "version", "--short")
        found = parse_version(finished.stdout) if finished.code == 0 else None
        if found is None:
            # Without the plugin `docker` parses the arguments as its own, and each version complains differently.
            error = explain(finished, "looking for docker compose")
            raise ContainerError(error.message, _INSTALL_COMPOSE, kind="compose")
        if found < OLDEST_COMPOSE:
            raise ContainerError(
                f"docker compose {'.'.join(map(str, found))} is too old: expected at least 2.17",
                _INSTALL_COMPOSE,
                kind="compose",
            )
        return found

    def image_id(self, image: str) -> str | None:
        """The id of an image; None if the engine does not have it."""
        finished = self.call("image", "inspect", "--format", "{{.Id}}", image)
        if finished.code == 0:
            return finished.stdout.strip() or None
        error = explain(finished, f"looking for image {image}")
        if error.kind == "image":
            return None
        raise error

    def was_out_of_memory(self, container: str, since_s: float, until_s: float) -> bool:
        """Whether the kernel killed a process of a container for lack of memory between two Unix times.

        Returns once the second time has passed; False if neither source answers. The state of a container is not one:
        depending on Docker's version it covers the first process only, or every process ever. Where the engine sends
        no event (containerd ignores cgroups of an unusual layout), the increase of the kernel's own counter decides.
        """
        span = ("--since", f"{since_s:.3f}", "--until", f"{until_s:.3f}")
        which = ("--filter", f"container={container}", "--filter", "event=oom", "--format", "{{.Status}}")
        finished = self.call("events", *span, *which)
        before, now = self._oom_kills.get(container, 0), self._count_oom_kills(container)
        self._oom_kills[container] = now
        return (finished.code == 0 and bool(finished.stdout.strip())) or now > before

    def _count_oom_kills(self, container: str) -> int:
        """The kernel's counter inside a container; 0 if it cannot be read.

        Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst (memory.oom_control).
        """
        files = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
        words = self.call("exec", container, "cat", *files).stdout.split()
        counts = [value for name, value in pairwise(words) if name == "oom_kill"]
        return int(counts[0]) if counts and counts[0].isdecimal() else 0

    def pids(self, container: str) -> frozenset[int]:
        """The processes of a container as the host numbers them; empty if it does not run."""
        finished = self.call("top", container, "-o", "pid")
        return frozenset(int(line) for line in finished.stdout.split() if line.isdecimal())


def parse_version(text: str) -> tuple[int, ...] | None:
    """The numbers in any form in which Compose prints its version: (2, 17, 2) of `v2.17.2-desktop.1`."""
    match = re.search(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None
