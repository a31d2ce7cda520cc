"""Workers as the host sees them: experiments in, events and one outcome out, within finite times."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lem import __version__
from lem.base import process
from lem.base.errors import EngineError, InfrastructureError, Interrupted, UserError
from lem.base.units import format_duration
from lem.orchestration.attempt import (
    Outcome,
    Stop,
    Timeouts,
    Watch,
    WorkerConnection,
    WorkerEvent,
    event_of,
    lost,
    outcome_of,
)
from lem.worker.channel import PROTOCOL_VERSION, ChannelError, RunRequest
from lem.worker.launch import own_command

_logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 60.0
UNLOAD_TIMEOUT_S = 60.0
DEATH_TIMEOUT_S = 5.0

# The supervisor gives its engine 5 s after TERM and 12 s after hanging up; see `engine_child.PATIENCE_S`.
STOP_TIMEOUT_S = 25.0
# The guardian kills everything as soon as the supervisor is gone; after this it is taken to be stopped or stuck.
KILL_TIMEOUT_S = 3.0
_POLL_S = 0.02


class WorkerUnavailable(InfrastructureError):
    """A worker cannot be started, or is another version of lem."""


class Worker:
    """One worker process and the channel to it; opened when it is needed, and again after it was lost.

    Everything but the command is the same wherever the worker runs. A worker in a container is opened by an argv that
    runs it there; since its process numbers mean nothing here, `shares_pids` is False, and `backstop` is called when
    it may have outlived the loss of the channel.

    Attributes:
        environment: what the worker stands on, by name; empty until it was opened.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        shares_pids: bool = True,
        backstop: Callable[[], None] | None = None,
    ) -> None:
        self._command = tuple(command)
        self._env = env
        self._shares_pids = shares_pids
        self._backstop = backstop
        self._connection: WorkerConnection | None = None
        self._engine: process.ProcessId | None = None
        self.environment: Mapping[str, Any] = {}

    @property
    def is_open(self) -> bool:
        """Whether a worker was started and is not known to be lost."""
        return self._connection is not None

    def open(self, stop: Stop | None = None, timeout_s: float = OPEN_TIMEOUT_S) -> None:
        """Start the worker, unless it is there.

        Raises:
            WorkerUnavailable: it did not start, or is another version of lem.
            UserError: the command is not there.
            Interrupted: a stop was asked for.
        """
        if self._connection is None:
            self._open(stop, timeout_s)

    def run(
        self,
        request: RunRequest,
        on_event: Callable[[WorkerEvent], None],
        timeouts: Timeouts,
        stop: Stop | None = None,
    ) -> Outcome:
        """How the attempt ended; a worker that hangs, dies or talks nonsense is ended, and that is an outcome too.

        Raises:
            Interrupted: a stop was asked for; the worker was ended.
            WorkerUnavailable, UserError: as `open`.
        """
        if self._connection is not None and self._connection.has_ended():
            _logger.warning("the worker ended between two experiments; another one is started")
            self.kill()
        connection = self._connection or self._open(stop, OPEN_TIMEOUT_S)
        try:
            outcome = self._converse(connection, request, on_event, Watch(timeouts, time.monotonic()), stop)
        except ChannelError as error:
            self.kill()
            outcome = lost(request, EngineError(f"the worker talks nonsense: {error}", kind="channel"))
        except EOFError:
            outcome = lost(request, EngineError(self._death(connection), kind="died"))
        except Interrupted:
            self.stop()
            raise
        except BaseException:
            self.kill()
            raise
        return outcome

    def unload(self, stop: Stop | None = None, timeout_s: float = UNLOAD_TIMEOUT_S) -> None:
        """Give up the engine and everything it holds on its device; returns when its process is gone.

        A worker that does not manage is ended, which has the same effect.

        Raises:
            Interrupted: a stop was asked for; the worker was ended.
        """
        connection = self._connection
        if connection is None:
            return
        deadline = time.monotonic() + timeout_s
        try:
            connection.send({"type": "unload"})
            while (message := self._next(connection, deadline, stop)) is not None:
                if message["type"] == "unloaded":
                    return
        except (ChannelError, EOFError) as error:
            _logger.warning("the worker was lost while it unloaded its engine: %s", error)
        except BaseException:
            self.stop()
            raise
        self.stop()

    def stop(self) -> None:
        """End the worker and its engine: end of file, TERM, and KILL for what is left; none is a worker less."""
        self._stop()

    def kill(self) -> None:
        """End the worker and its engine at once."""
        connection, self._connection = self._connection, None
        engine, self._engine = self._engine, None
        if connection is None:
            return
        has_ended = connection.end()
        if engine is not None and self._shares_pids:
            _outlast(engine)
        if not has_ended and self._backstop is not None:
            self._backstop()

    def _open(self, stop: Stop | None, timeout_s: float) -> WorkerConnection:
        connection = self._connection = WorkerConnection(self._command, self._env)
        try:
            hello = connection.receive(time.monotonic() + timeout_s, stop)
            if hello is None:
                raise _did_not_start(self._command, f"it said nothing for {format_duration(timeout_s)}")
            _check_hello(hello)
            self.environment = hello["environment"]
        except (ChannelError, EOFError) as error:
            connection.wait_until_gone(time.monotonic() + 1)  # what it says on stderr may come last
            unavailable = _did_not_start(self._command, connection.stderr_tail() or str(error))
            self.kill()
            raise unavailable from error
        except BaseException:
            self.kill()
            raise
        return connection

    def _next(self, connection: WorkerConnection, deadline: float, stop: Stop | None) -> dict[str, Any] | None:
        """The next message, with what it says of the engine process noted."""
        message = connection.receive(deadline, stop)
        if message is not None and message["type"] == "engine":
            pgid, ticks = message["pgid"], message["started_ticks"]
            self._engine = None if pgid is None or ticks is None else process.ProcessId(pgid, ticks)
        return message

    def _converse(
        self,
        connection: WorkerConnection,
        request: RunRequest,
        on_event: Callable[[WorkerEvent], None],
        watch: Watch,
        stop: Stop | None,
    ) -> Outcome:
        connection.send(request.to_message())
        while True:
            message = self._next(connection, watch.next_deadline, stop)
            now = time.monotonic()
            if message is not None:
                watch.heard(message, now)
            if message is not None and message["type"] in ("result", "error"):
                return outcome_of(request, message)
            late = watch.expired(now)
            if late is not None:
                return replace(lost(request, late), phase=watch.phase, log_tail=self._stop())
            event = None if message is None else event_of(request, message, watch.phase)
            if event is not None:
                on_event(event)

    def _stop(self) -> str:
        """End the worker; the last lines of the log of what it was running."""
        connection, log_tail = self._connection, ""
        if connection is None:
            return ""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            connection.hang_up()
            while (message := self._next(connection, deadline, None)) is not None:
                log_tail = str(message.get("log_tail", log_tail))
        except (ChannelError, EOFError):
            connection.wait_until_gone(deadline)
        finally:
            self.kill()
        return log_tail

    def _death(self, connection: WorkerConnection) -> str:
        """How a worker ended that was not told to; nothing is left of it afterwards."""
        code = connection.wait_until_gone(time.monotonic() + DEATH_TIMEOUT_S)
        how = "closed the channel" if code is None else process.describe_exit(code)
        said = connection.stderr_tail()
        self.kill()
        return f"the worker {how}" + (f", saying: {said}" if said else "")


def _check_hello(hello: Mapping[str, Any]) -> None:
    """Refuse a worker that is not this lem.

    Raises:
        ChannelError: no hello.
        WorkerUnavailable: another version.
    """
    if hello["type"] != "hello":
        raise ChannelError(f"{hello['type']} came before hello")
    found, due = (hello["protocol"], hello["lem_version"]), (PROTOCOL_VERSION, __version__)
    if found != due:
        raise WorkerUnavailable(
            f"the worker is lem {found[1]} (channel {found[0]}), this is lem {due[1]} (channel {due[0]})",
            "run the same lem on both sides: one lem.pyz",
        )


def _did_not_start(command: Sequence[str], reason: str) -> WorkerUnavailable:
    return WorkerUnavailable(
        f"the worker did not start: {reason}", f"try by hand what it says: {process.copyable(command)}"
    )


def _outlast(engine: process.ProcessId) -> None:
    """Return when an engine process is gone, whose guardian ends it by itself; kill its group if it does not."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while engine.is_running():
        if time.monotonic() >= deadline:
            process.kill_group(engine.pid)
            return
        time.sleep(_POLL_S)


class Executor(Protocol):
    """Where experiments run.

    Attributes:
        name: `local` or `docker`, as the record says.
    """

    name: str

    def worker_for(self, backend: str) -> Worker:
        """The worker that runs this backend's experiments; the same one as long as this executor is used."""

    def stop(self) -> None:
        """End every worker with its engine."""

    def kill(self) -> None:
        """End every worker with its engine at once."""

    def look_after(self, tell: Callable[[str], None]) -> None:
        """See that what the workers run in is healthy, and mend it, between two experiments.

        Raises:
            InfrastructureError, UserError: it is not, and cannot be mended.
            Interrupted: a stop was asked for.
        """

    def close(self) -> None:
        """Take down what the workers ran in, once they were stopped or killed."""

    def clear(self) -> None:
        """Take down what a run that was killed left, where this one has nothing to run."""


class LocalExecutor:
    """One worker on this machine, under this Python or another, for every backend."""

    name = "local"

    def __init__(self, python: str | None = None) -> None:
        """Look the Python up.

        Args:
            python: a program or a path, as `--python` gives it; None is this Python.

        Raises:
            UserError: there is no such program.
        """
        found = shutil.which(python) if python is not None else sys.executable
        if not found:
            raise UserError(f"--python {python}: no such program", "give the path of a Python that has the engine")
        self.python = found
        self._worker = Worker((*own_command(found), "worker"))

    def worker_for(self, backend: str) -> Worker:  # noqa: ARG002 - one worker for all
        """The worker."""
        return self._worker

    def stop(self) -> None:
        """End the worker with its engine."""
        self._worker.stop()

    def kill(self) -> None:
        """End the worker with its engine at once."""
        self._worker.kill()

    def look_after(self, tell: Callable[[str], None]) -> None:
        """Nothing: a worker that is lost is replaced when it is needed."""

    def close(self) -> None:
        """Nothing: the worker ran in nothing of its own."""

    def clear(self) -> None:
        """Nothing: a worker ends with its host, however that ends."""
