"""A worker process that was started, and the channel over its stdin and stdout."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lem import process
from lem.errors import Interrupted
from lem.experiment.channel import READ_B, LineBuffer, Outbox, decode_report

__all__ = ["Stop", "WorkerConnection"]

_STDERR_TAIL_B = 2000


class Stop(Protocol):
    """A request to stop, as `lem.orchestration.stop.StopRequest` is one."""

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
