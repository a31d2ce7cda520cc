"""The services of a compose project that is set up: started, asked, restarted, and lem run in them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lem import process
from lem.experiment.leftovers import new_mark
from lem.meters.gpu_state import GpuReading
from lem.orchestration.compose import Compose, ContainerState, Service
from lem.orchestration.docker import ContainerError, explain
from lem.variables import MARK_VARIABLE

__all__ = ["UP_TIMEOUT_S", "Services"]

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
