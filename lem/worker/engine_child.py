"""The engine process as its supervisor sees it: starting it, and ending all that it started."""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem.base import process
from lem.base.variables import MARK_VARIABLE
from lem.worker.channel import READ_B, Outbox
from lem.worker.launch import own_command


class EndStep(enum.IntEnum):
    """What is done to end an engine process; the next step follows when it is still there after a while."""

    QUIT = 1  # ask it to unload and leave
    TERM = 2  # signal its whole group
    HANG_UP = 3  # close the control pipe: the guardian kills all that came from it
    KILL = 4  # kill the group; the guardian is stopped or gone


PATIENCE_S: Mapping[EndStep, float] = MappingProxyType(
    # vLLM takes about 5 s to leave by itself; the guardian gives KILL 10 s.
    {EndStep.QUIT: 15.0, EndStep.TERM: 5.0, EndStep.HANG_UP: 12.0, EndStep.KILL: 5.0}
)


def engine_command(control_fd: int, message_fd: int) -> tuple[str, ...]:
    """The command of an engine process that is given these descriptors."""
    fds = ("--control-fd", str(control_fd), "--message-fd", str(message_fd))
    return (*own_command(sys.executable), "worker", "--engine", *fds)


class EngineChild:
    """A running engine process with its guardian, which leads its process group.

    Attributes:
        identity: the guardian; its pid is the id of the group.
        message_fd, output_fd: what it reports, and what it and its children print; read ends, never waited for.
        control: messages to it.
        engine_key: key of the engine that it was told to load; None as long as it was told nothing.
        is_stuck: it is there in spite of KILL.
    """

    def __init__(self, patience_s: Mapping[EndStep, float] = PATIENCE_S) -> None:
        """Start one.

        Raises:
            UserError: it cannot be started.
            OSError: there are too many open files.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control_end, control_fd = _pipe(theirs, ours)
            self.message_fd, message_end = _pipe(ours, theirs)
            self.output_fd, output_end = _pipe(ours, theirs)
            self._child = process.spawn(
                engine_command(control_end, message_end),
                stdin=process.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                new_session=True,
                pass_fds=(control_end, message_end),
            )
            ours.pop_all()
        for descriptor in (self.message_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        # Its entry in /proc stays until it is reaped, so it is there.
        self.identity = process.identify(self._child.pid) or process.ProcessId(self._child.pid, 0)
        self.control = Outbox(control_fd)
        self.engine_key: str | None = None
        self.is_stuck = False
        self._patience_s = patience_s
        self._step: EndStep | None = None
        self._next_step_at: float | None = None
        self._has_hung_up = False

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end."""
        return self._step is not None

    @property
    def next_step_at(self) -> float | None:
        """When `tick` has something to do; None when it has not."""
        return self._next_step_at

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a message; one that is gone already is found out when it is reaped."""
        if not self._has_hung_up:
            with contextlib.suppress(BrokenPipeError):
                self.control.put(message)

    def end(self, step: EndStep, now: float) -> None:
        """Start to end it with this step, or go on to it when an earlier one is being waited for."""
        if self._step is None or self._step < step:
            self._do(step, now)

    def end_sooner(self, now: float) -> None:
        """Go on to the next step at once."""
        self.end(EndStep.TERM if self._step is None else EndStep(min(self._step + 1, EndStep.KILL)), now)

    def tick(self, now: float) -> None:
        """Take the next step when its time has come."""
        if self._step is None or self._next_step_at is None or now < self._next_step_at:
            return
        if self._step is EndStep.KILL:
            self.is_stuck, self._next_step_at = True, None
        else:
            self._do(EndStep(self._step + 1), now)

    def reap(self) -> int | None:
        """Its exit code as `subprocess` gives it, once it has ended and nothing of its group is left; else None."""
        found = os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        # Not reaped yet, it keeps the number of its group from being used again.
        process.kill_group(self._child.pid)
        return self._child.wait()

    def close(self) -> None:
        """Give the descriptors back, once it was reaped."""
        self._hang_up()
        os.close(self.message_fd)
        os.close(self.output_fd)

    def _do(self, step: EndStep, now: float) -> None:
        if step is EndStep.QUIT:
            self.send({"type": "quit"})
        elif step is EndStep.TERM:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGTERM)
        elif step is EndStep.HANG_UP:
            self._hang_up()
        else:
            process.kill_group(self._child.pid)
        self._step, self._next_step_at = step, now + self._patience_s[step]

    def _hang_up(self) -> None:
        if not self._has_hung_up:
            self._has_hung_up = True
            self.control.drop()  # the number of the descriptor is somebody else's from here on
            os.close(self.control.descriptor)


def read_available(descriptor: int) -> bytes | None:
    """What can be read now; b"" at the end of file, None when there is nothing yet."""
    try:
        return os.read(descriptor, READ_B)
    except BlockingIOError:
        return None


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Sequence[int]:
    """A pipe whose ends are closed when the stack of their side is."""
    ends = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


LEFTOVERS_PATIENCE_S = 5.0
_POLL_S = 0.02


def new_mark() -> str:
    """A mark that no other worker bears."""
    return secrets.token_hex(8)


def end_marked(mark: str, patience_s: float = LEFTOVERS_PATIENCE_S) -> tuple[int, ...]:
    """The processes with this mark that are still there a while after KILL; () when nothing is left.

    A process may be starting another while the list is read, so it is read until it is empty.
    """
    deadline = time.monotonic() + patience_s
    while (found := find_marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return found


def find_marked(mark: str, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """The processes with this mark, this one and zombies (which have no environment) left out."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    return tuple(
        int(folder.name)
        for folder in proc.iterdir()
        if folder.name.isdigit() and int(folder.name) != os.getpid() and needle in _environ(folder).split(b"\0")
    )


def _environ(folder: Path) -> bytes:
    try:
        return (folder / "environ").read_bytes()
    except OSError:  # it ended, or it is another user's
        return b""
