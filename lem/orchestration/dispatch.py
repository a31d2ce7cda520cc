"""Workers as the host sees them: experiments in, events and one outcome out, within finite times."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shlex
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from lem.base import __version__, process
from lem.base.dataclass import KW_ONLY, dataclass, field
from lem.base.durable import reason_of
from lem.base.errors import DISK_FULL, EngineError, InfrastructureError, Interrupted, UserError
from lem.base.launch import own_command
from lem.base.units import format_duration
from lem.orchestration.schedule import StopRequest, Timeouts, Watch
from lem.orchestration.status import Event, Observer
from lem.worker import channel
from lem.worker.channel import ChannelError, Failure, LineBuffer, Message, Outbox, Result, RunRequest

_logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = UNLOAD_TIMEOUT_S = 60.0
# For a hub that is slow, and to import transformers from a slow disk.
CHECK_TIMEOUT_S = 120.0
DEATH_TIMEOUT_S = 5.0
# The supervisor gives its engine 5 s after TERM and 12 s after hanging up; see `guardian.PATIENCE_S`.
STOP_TIMEOUT_S = 25.0
# The guardian kills everything as soon as the supervisor is gone; after this it is taken to be stopped or stuck.
KILL_TIMEOUT_S = 3.0
_POLL_S = 0.02
_STDERR_TAIL_B = 2000

_HOST_HINT = "see `lem doctor` and the kernel log (dmesg): a disk, a limit (`ulimit -a`) or a folder changed meanwhile"


class WorkerUnavailable(InfrastructureError):
    """A worker cannot be started, or is another version of lem."""


class WorkerSilent(WorkerUnavailable):
    """A worker was started, but it ended or hung before its hello: another one may do better."""


@dataclass(frozen=True)
class Outcome:
    error: EngineError | None = None  # None: there is a result
    phase: str | None = None  # in which it failed
    log_tail: str = ""  # the last lines that the engine printed, for an error


def host_error(error: OSError | MemoryError) -> EngineError:
    """Why the host could not go on with an attempt; another attempt shows whether the cause has gone."""
    if isinstance(error, MemoryError):
        return EngineError("lem ran out of memory", "stop other programs, or add memory", kind="host")
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in DISK_FULL:
        return EngineError(f"{where}{reason_of(error)}", "free some space, then continue with --resume", kind="full")
    return EngineError(f"the host failed during the attempt: {where}{reason_of(error)}", _HOST_HINT, kind="host")


def outcome_of(request: RunRequest, message: Result | Failure) -> Outcome:
    if message.exp_id is None and isinstance(message, Failure):  # the worker could not read the request
        raise ChannelError(message.message)
    if message.exp_id != request.exp_id:
        raise ChannelError(f"expected an answer about {request.exp_id}, got one about {message.exp_id}")
    if isinstance(message, Result):
        return Outcome()
    error = EngineError(message.message, message.hint, kind=message.kind, is_permanent=message.permanent)
    return Outcome(error, message.phase, message.log_tail)


def event_of(request: RunRequest, message: Message) -> Event | None:
    if isinstance(message, channel.Heartbeat):
        return Event("tick")
    if isinstance(message, channel.Phase) and message.exp_id == request.exp_id:
        return Event(message.type, data={"exp_id": request.exp_id, "phase": message.phase})
    if isinstance(message, channel.Progress) and message.exp_id == request.exp_id:
        how_far = {"phase_done": message.done, "phase_total": message.total, "text": message.text, "power_w": None}
        return Event(message.type, data={"exp_id": request.exp_id, **how_far})
    return None


class WorkerConnection:
    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the worker; a UserError when the program does not exist or cannot be started."""
        # A file, not a pipe: it is not read between experiments, and a worker must never have to wait for a reader.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        # Ctrl-C on the terminal is for the host, which then stops the worker.
        self._child = process.spawn(command, env=env, streams=(process.PIPE, process.PIPE, self._stderr.fileno()))
        self._stdin, self._stdout = process.pipes(self._child)
        self._outbox = Outbox(self._stdin.fileno())
        self._lines = LineBuffer()
        self._messages: deque[Message] = deque()

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._outbox.put(message)

    def receive(self, deadline: float, stop: StopRequest | None = None) -> Message | None:
        """The next message of the worker; None at the deadline (`time.monotonic`).

        Interrupted when a stop was requested, ChannelError for an invalid message, EOFError when the worker is gone.
        """
        stdout = self._stdout.fileno()
        readers = [stdout] if stop is None else [stdout, stop.fileno()]
        while not self._messages:
            if stop is not None and stop.signum is not None:
                raise Interrupted(stop.signum)
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            writers = [self._outbox.descriptor] if self._outbox.is_pending else []
            readable, writable, _ = select.select(readers, writers, [], remaining_s)
            if writable:
                try:
                    self._outbox.flush()
                except BrokenPipeError:
                    self._outbox.drop()
            if stdout in readable:
                data = os.read(stdout, channel.READ_B)
                if not data:
                    raise EOFError("the worker closed the channel")
                self._messages += [channel.read_report(line) for line in self._lines.feed(data)]
        return self._messages.popleft()

    @property
    def has_ended(self) -> bool:
        return self._child.poll() is not None

    def hang_up(self) -> None:
        self._outbox.drop()
        self._stdin.close()

    def wait_until_gone(self, deadline: float) -> int | None:
        """The worker's exit code as `subprocess` gives it; None when it still runs at the deadline."""
        try:
            return self._child.wait(max(0.0, deadline - time.monotonic()))
        except process.TimeoutExpired:
            return None

    def stderr_tail(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), _STDERR_TAIL_B, max(0, size - _STDERR_TAIL_B))
        return data.decode("utf-8", "replace").strip()

    def end(self) -> bool:
        """Kill the worker if it still runs, and close everything; whether it had ended by itself."""
        has_ended = self.has_ended
        if not has_ended:
            process.kill_group(self._child.pid)
            self._child.wait()
        self._stdout.close()
        self._stdin.close()
        self._stderr.close()
        return has_ended


@dataclass(eq=False, repr=False)  # the environment may hold secrets
class Worker:
    command: Sequence[str]
    _: KW_ONLY
    env: Mapping[str, str] | None = None
    shares_pids: bool = True  # False in a container, where process numbers are other ones
    backstop: Callable[[], None] | None = None  # called when the worker may have outlived the loss of the channel
    environment: Mapping[str, Any] = field(default_factory=dict, init=False)  # versions and GPUs, once it was opened
    _connection: WorkerConnection | None = field(default=None, init=False)
    # The process above all those of the engine, by its number where the worker runs.
    engine: process.ProcessId | None = field(default=None, init=False)

    def server_pids(self) -> tuple[int, ...]:
        """The processes of its server, if that is not below its engine process."""
        return ()

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self, stop: StopRequest | None = None, timeout_s: float = OPEN_TIMEOUT_S) -> None:
        if not self.is_open:
            self._open(stop, timeout_s)

    def run(
        self, request: RunRequest, on_event: Observer, timeouts: Timeouts, stop: StopRequest | None = None
    ) -> Outcome:
        """How the attempt ended; a worker that does not start, hangs, dies or sends invalid messages: an outcome too.

        Interrupted when a stop was requested, and the worker was ended.
        """
        if self._connection is not None and self._connection.has_ended:
            _logger.warning("the worker ended between two experiments; starting another one")
            self.kill()
        try:
            connection = self._connection or self._open(stop, OPEN_TIMEOUT_S)
        except WorkerSilent as error:  # the second one in a row
            return Outcome(EngineError(error.message, error.hint, kind="died", is_permanent=True))
        try:
            watch = Watch(timeouts, time.monotonic())
            connection.send(request.to_message())
            while True:
                message = self._next(connection, watch.next_deadline, stop)
                now = time.monotonic()
                if message is not None:
                    watch.heard(message, now)
                    if isinstance(message, (Result, Failure)):
                        return outcome_of(request, message)
                late = watch.expired(now)
                if late is not None:
                    return Outcome(late, watch.phase, self.stop())
                event = None if message is None else event_of(request, message)
                if event is not None:
                    on_event(event)
        except ChannelError as error:
            self.kill()
            return Outcome(EngineError(f"the worker sent an invalid message: {error}", kind="channel"))
        except EOFError:
            code = connection.wait_until_gone(time.monotonic() + DEATH_TIMEOUT_S)
            how = "closed the channel" if code is None else process.describe_exit(code)
            printed = connection.stderr_tail()
            self.kill()
            return Outcome(EngineError(f"the worker {how}" + (f": {printed}" if printed else ""), kind="died"))
        except Interrupted:
            self.stop()
            raise
        except BaseException:
            self.kill()
            raise

    def unload(self, stop: StopRequest | None = None, timeout_s: float = UNLOAD_TIMEOUT_S) -> None:
        self._ask({"type": "unload"}, (channel.Unloaded,), stop, timeout_s)

    def check(
        self, check: channel.Check, stop: StopRequest | None = None, timeout_s: float = CHECK_TIMEOUT_S
    ) -> list[Message]:
        """The answers to a check, of which the last is a Result or a Failure, unless the time ran out.

        WorkerUnavailable or UserError when the worker cannot be started.
        """
        self.open(stop)
        return self._ask(check.to_message(), (Result, Failure), stop, timeout_s)

    def _ask(
        self, question: Mapping[str, Any], last: tuple[type[Message], ...], stop: StopRequest | None, timeout_s: float
    ) -> list[Message]:
        """The answers up to one of the last kinds; a worker that does not give one is ended."""
        connection, deadline, answers = self._connection, time.monotonic() + timeout_s, list[Message]()
        if connection is None:
            return answers
        try:
            connection.send(question)
            while (answer := self._next(connection, deadline, stop)) is not None:
                answers.append(answer)
                if isinstance(answer, last):
                    return answers
        except (ChannelError, EOFError) as error:
            _logger.warning("the worker was lost after it was sent %r: %s", question["type"], error)
        except BaseException:
            self.stop()
            raise
        self.stop()
        return answers

    def stop(self) -> str:
        connection, log_tail = self._connection, ""
        if connection is None:
            return log_tail
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            connection.hang_up()
            while (message := self._next(connection, deadline, None)) is not None:
                if isinstance(message, Failure):
                    log_tail = message.log_tail
        except (ChannelError, EOFError):
            connection.wait_until_gone(deadline)
        finally:
            self.kill()
        return log_tail

    def kill(self) -> None:
        connection, self._connection = self._connection, None
        engine, self.engine = self.engine, None
        if connection is None:
            return
        has_ended = connection.end()
        if engine is not None and self.shares_pids:
            _outlast(engine)
        if not has_ended and self.backstop is not None:
            self.backstop()

    def _open(self, stop: StopRequest | None, timeout_s: float) -> WorkerConnection:
        """Start the worker, and once more if the first one ends before it says hello."""
        try:
            return self._start(stop, timeout_s)
        except WorkerSilent as error:
            _logger.warning("%s; starting another one", error.message)
            self._recover()
            return self._start(stop, timeout_s)

    def _recover(self) -> None:
        """Repair what a worker that did not start runs in; here nothing."""

    def _start(self, stop: StopRequest | None, timeout_s: float) -> WorkerConnection:
        try:
            connection = self._connection = WorkerConnection(self.command, self.env)
        except OSError as error:  # a full or missing temporary folder, too many open files
            message = f"no worker can be started: {error.filename or 'pipes'}: {reason_of(error)}"
            raise WorkerUnavailable(message, "check the temporary folder (TMPDIR) and `ulimit -n`") from error
        by_hand = f"run it by hand to see why: {shlex.join(self.command)}"
        try:
            hello = connection.receive(time.monotonic() + timeout_s, stop)
            if hello is None:
                silence = f"no message within {format_duration(timeout_s)}"
                raise WorkerSilent(f"the worker did not start: {silence}", by_hand)
            if not isinstance(hello, channel.Hello):
                raise ChannelError(f"expected hello, got {hello.type}")
        except (ChannelError, EOFError) as error:
            code = connection.wait_until_gone(time.monotonic() + 1)  # its message on stderr may come last
            ended = error if code is None or isinstance(error, ChannelError) else f"it {process.describe_exit(code)}"
            reason = connection.stderr_tail() or ended
            self.kill()
            raise WorkerSilent(f"the worker did not start: {reason}", by_hand) from error
        except BaseException:
            self.kill()
            raise
        if (hello.protocol, hello.lem_version) != (channel.PROTOCOL_VERSION, __version__):
            self.kill()
            own = f"{__version__} (channel {channel.PROTOCOL_VERSION})"
            message = f"the worker is lem {hello.lem_version} (channel {hello.protocol}), this is lem {own}"
            raise WorkerUnavailable(message, "use the same lem.pyz on both sides")
        self.environment = hello.environment
        return connection

    def _next(self, connection: WorkerConnection, deadline: float, stop: StopRequest | None) -> Message | None:
        """The next message; which process the engine is, is noted."""
        message = connection.receive(deadline, stop)
        if isinstance(message, channel.EngineProcess):
            pgid, ticks = message.pgid, message.started_ticks
            self.engine = None if pgid is None or ticks is None else process.ProcessId(pgid, ticks)
        return message


class Executor(Protocol):
    name: str  # `local` or `docker`, as in the record

    def worker_for(self, place: str) -> Worker:
        """The worker of a place (`Experiment.place`): the same one until `close`."""

    def prepare(self, places: Collection[str]) -> None:
        """Find or make what the workers of these places need, with nothing started; UserError if it is missing."""

    def stop(self) -> None:
        """End every worker with its engine."""

    def kill(self) -> None:
        """End every worker with its engine at once."""

    def look_after(self, report: Callable[[str], None]) -> None:
        """Check, between two experiments, that what the workers run in is healthy; repair it or raise a LemError."""

    def close(self) -> None:
        """Take down what the workers ran in, once they were stopped or killed."""

    def clear(self) -> None:
        """Take down what a killed run left, where this run has nothing to do."""


class LocalExecutor:
    """One worker on this machine, under this Python or another, for every backend; it runs in nothing of its own."""

    name = "local"

    def __init__(self, python: str | None = None) -> None:
        """Find the Python: a program or a path, as `--python` gives it; None is this one."""
        found = shutil.which(python) if python is not None else sys.executable
        if not found:
            raise UserError(f"--python {python}: no such program", "give the path of a Python that has the engine")
        self.python = found
        self._worker = Worker((*own_command(found), "worker"))

    def worker_for(self, place: str) -> Worker:  # noqa: ARG002 - one worker for all
        return self._worker

    def prepare(self, places: Collection[str]) -> None:
        """Nothing: what its Python has is known once the worker runs."""

    def stop(self) -> None:
        self._worker.stop()

    def kill(self) -> None:
        self._worker.kill()

    def look_after(self, report: Callable[[str], None]) -> None:
        """Nothing: a worker that is lost is replaced when it is needed."""

    def close(self) -> None:
        """Nothing: a worker ends with its host, however that ends."""

    clear = close


def _outlast(engine: process.ProcessId) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while engine.is_running():
        if time.monotonic() >= deadline:
            process.kill_group(engine.pid)
            return
        time.sleep(_POLL_S)
