"""One attempt as the host sees it: the events of its worker, and how it ended."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lem.base import process
from lem.base.errors import EngineError, Interrupted
from lem.base.units import format_duration
from lem.worker.channel import (
    LOAD_PHASE,
    LOADING_PHASES,
    READ_B,
    ChannelError,
    LineBuffer,
    Outbox,
    RunRequest,
    decode_report,
)


@dataclass(frozen=True)
class Timeouts:
    """How long to wait for a worker, in seconds.

    Attributes:
        load_s: for the load of the engine.
        rest_s: on top of that for what comes before the load, in which power at rest is measured.
        experiment_s: for everything after that.
        silence_s: for the next phase or progress.
        heartbeat_s: for anything at all; a supervisor that lives says something every 5 s.
    """

    load_s: float = 1800.0
    rest_s: float = 0.0
    experiment_s: float = 3600.0
    silence_s: float = 600.0
    heartbeat_s: float = 120.0


@dataclass(frozen=True)
class WorkerEvent:
    """Something that the worker told while an experiment runs.

    Attributes:
        kind: `phase`, `progress` or `heartbeat`.
        phase: the phase the experiment is in; None before the first.
        done, total, text: how far the phase is; total None when it has no known end.
        power_w: what the GPUs of the experiment draw; None where nobody looks.
    """

    kind: str
    exp_id: str
    phase: str | None
    done: int = 0
    total: int | None = None
    text: str = ""
    power_w: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended. The measurement itself is in `result.json`.

    Attributes:
        error: why there is no result; None when there is one.
        phase: the phase it failed in.
        log_tail: the last lines that the engine printed; empty for a result.
        is_engine_lost: after an error, the engine has to be loaded again.
        valid, engine_load_id, engine_reused, summary: of a result.
    """

    exp_id: str
    error: EngineError | None = None
    phase: str | None = None
    log_tail: str = ""
    is_engine_lost: bool = False
    valid: bool = False
    engine_load_id: str | None = None
    engine_reused: bool | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`result` or `error`."""
        return "result" if self.error is None else "error"


class Watch:
    """The deadlines of one experiment; pure, the time is an argument."""

    def __init__(self, timeouts: Timeouts, now: float) -> None:
        self._timeouts = timeouts
        self.phase: str | None = None
        self._is_loading = True
        self._phase_until = now + timeouts.load_s + timeouts.rest_s
        self._sign_until = now + timeouts.silence_s
        self._byte_until = now + timeouts.heartbeat_s

    def heard(self, message: Mapping[str, Any], now: float) -> None:
        """Take note of a message."""
        self._byte_until = now + self._timeouts.heartbeat_s
        if message["type"] in ("phase", "progress"):
            self._sign_until = now + self._timeouts.silence_s
        if message["type"] == "phase":
            before, self.phase = self.phase, message["phase"]
            if self.phase == LOAD_PHASE != before:
                self._phase_until = now + self._timeouts.load_s
            elif self._is_loading and self.phase not in LOADING_PHASES:
                self._is_loading = False
                self._phase_until = now + self._timeouts.experiment_s

    @property
    def next_deadline(self) -> float:
        """When the next of the deadlines passes."""
        return min(self._phase_until, self._sign_until, self._byte_until)

    def expired(self, now: float) -> EngineError | None:
        """The deadline that has passed, as the error that it means."""
        where = f"in phase {self.phase or 'start'}"
        if now >= self._phase_until:
            limit, key = (
                (self._timeouts.load_s, "load_timeout_seconds")
                if self._is_loading
                else (self._timeouts.experiment_s, "experiment_timeout_seconds")
            )
            limit += self._timeouts.rest_s if self._is_loading and self.phase != LOAD_PHASE else 0.0
            what = "the engine was not loaded" if self._is_loading else "the experiment was not done"
            return EngineError(
                f"{what} after {format_duration(limit)} ({where})",
                f"raise execution.{key} if it needs longer",
                kind="timeout",
            )
        if now >= self._sign_until:
            return EngineError(
                f"the engine gave no sign of progress for {format_duration(self._timeouts.silence_s)} ({where})",
                "raise execution.silence_timeout_seconds if it needs longer; the log ends with where it was",
                kind="silent",
            )
        if now >= self._byte_until:
            silence = format_duration(self._timeouts.heartbeat_s)
            return EngineError(f"the worker sent no heartbeat for {silence} ({where})", kind="channel")
        return None


def outcome_of(request: RunRequest, message: Mapping[str, Any]) -> Outcome:
    """The outcome in a worker's `result` or `error`.

    Raises:
        ChannelError: it is the answer to something else.
    """
    if message["exp_id"] != request.exp_id:
        raise ChannelError(f"an answer to {message['exp_id']}: {message.get('message', message['type'])}")
    if message["type"] == "result":
        return Outcome(
            request.exp_id,
            valid=message["valid"],
            engine_load_id=message["engine_load_id"],
            engine_reused=message["engine_reused"],
            summary=message["summary"],
        )
    error = EngineError(message["message"], message["hint"], kind=message["kind"], is_permanent=message["permanent"])
    return replace(
        lost(request, error),
        phase=message["phase"],
        log_tail=str(message.get("log_tail", "")),
        is_engine_lost=message["engine_lost"],
    )


def lost(request: RunRequest, error: EngineError) -> Outcome:
    """The outcome of an attempt whose worker was lost."""
    return Outcome(request.exp_id, error=error, is_engine_lost=True)


def event_of(request: RunRequest, message: Mapping[str, Any], phase: str | None) -> WorkerEvent | None:
    """The event in a worker's message; None when it is about nothing that happens to this experiment."""
    kind = message["type"]
    if kind == "heartbeat" or (kind == "phase" and message["exp_id"] == request.exp_id):
        return WorkerEvent(kind, request.exp_id, phase)
    if kind == "progress" and message["exp_id"] == request.exp_id:
        return WorkerEvent(kind, request.exp_id, phase, message["done"], message["total"], message["text"])
    return None


_STDERR_TAIL_B = 2000


class Stop(Protocol):
    """A request to stop, as `lem.orchestration.schedule.StopRequest` is one."""

    @property
    def signum(self) -> int | None:
        """The signal that asked for it; None when nobody did."""

    def fileno(self) -> int:
        """A descriptor that is readable once a stop was asked for."""


class WorkerConnection:
    """A worker that runs; nothing here waits without a deadline."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the worker.

        Raises:
            UserError: the program is not there or cannot be started.
        """
        self._command = tuple(command)
        # A file, not a pipe: nobody reads it between experiments, and a worker must never have to wait for a reader.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        # A session of its own: Ctrl-C on the terminal is for the host, which then tells the worker.
        self._child = process.spawn(command, env=env, stderr=self._stderr.fileno(), new_session=True)
        self._stdin, self._stdout = process.pipes(self._child)
        self._outbox = Outbox(self._stdin.fileno())
        self._lines = LineBuffer()
        self._messages: deque[dict[str, Any]] = deque()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; a worker that is gone is found out by `receive`."""
        with contextlib.suppress(BrokenPipeError):
            self._outbox.put(message)

    def receive(self, deadline: float, stop: Stop | None = None) -> dict[str, Any] | None:
        """The next message of the worker; None at the deadline (`time.monotonic`).

        Raises:
            Interrupted: a stop was asked for.
            ChannelError: what came is no message.
            EOFError: the worker is gone.
        """
        while not self._messages:
            if stop is not None and stop.signum is not None:
                raise Interrupted(stop.signum)
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            self._wait(remaining_s, stop)
        return self._messages.popleft()

    def _wait(self, timeout_s: float, stop: Stop | None) -> None:
        readers = [self._stdout.fileno()] if stop is None else [self._stdout.fileno(), stop.fileno()]
        writers = [self._outbox.descriptor] if self._outbox.is_pending else []
        readable, writable, _ = select.select(readers, writers, [], timeout_s)
        if writable:
            try:
                self._outbox.flush()
            except BrokenPipeError:
                self._outbox.drop()
        if self._stdout.fileno() in readable:
            data = os.read(self._stdout.fileno(), READ_B)
            if not data:
                raise EOFError("the worker closed the channel")
            self._messages += [decode_report(line) for line in self._lines.feed(data)]

    def has_ended(self) -> bool:
        """Whether the worker is gone already."""
        return self._child.poll() is not None

    def hang_up(self) -> None:
        """Close the worker's stdin, which makes it end its engine and itself."""
        self._outbox.drop()
        self._stdin.close()

    def wait_until_gone(self, deadline: float) -> int | None:
        """The worker's exit code as `subprocess` gives it; None when it is still there at the deadline."""
        try:
            return self._child.wait(max(0.0, deadline - time.monotonic()))
        except process.TimeoutExpired:
            return None

    def stderr_tail(self) -> str:
        """The end of what the worker, or the program that opens it, said on stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), _STDERR_TAIL_B, max(0, size - _STDERR_TAIL_B))
        return data.decode("utf-8", "replace").strip()

    def end(self) -> bool:
        """Kill the worker if it is still there, and give everything back; whether it had ended by itself."""
        has_ended = self.has_ended()
        if not has_ended:
            process.kill_group(self._child.pid)
            self._child.wait()
        self._stdout.close()
        self._stdin.close()
        self._stderr.close()
        return has_ended
