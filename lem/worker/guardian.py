"""The guardian of an engine process: it leaves nothing alive, whatever the engine holds and however it ends.

An engine can hold the interpreter's lock or hang in a driver call, and then sees nothing; its own children (vLLM has
several, compilers too) outlive it when it alone is killed. So the engine process forks as soon as it starts: the child
runs the engine, and the parent, a few megabytes that never load an engine, only waits. It is the leader of the
engine's session and adopts orphans, so that every process that came from the engine stays below it.

It ends everything below it, and then itself, when

- the engine process ends: the rest is ended too, and the guardian ends the way the engine did;
- the control pipe hangs up: the supervisor is gone, however it went, or wants a hanging engine killed.

Should the guardian itself be killed, the kernel kills the engine process (PR_SET_PDEATHSIG), and the supervisor kills
the group.

`EngineChild` is the supervisor's hold on both: it starts them, and ends them in steps.
"""

from __future__ import annotations

import contextlib
import enum
import os
import resource
import secrets
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from lem.base import process
from lem.base.variables import MARK_VARIABLE
from lem.worker.channel import Outbox
from lem.worker.launch import own_command

# A process that does not end this long after KILL hangs in a driver and cannot be ended at all.
KILL_WAIT_S = 10.0
_RESCAN_S = 0.1
_ABANDONED_CODE = 128 + signal.SIGKILL


def start_guarded(control_fd: int, message_fd: int) -> None:
    """Return in the engine process; the process that called becomes its guardian and does not return.

    To be called before there are threads, and before anything is imported that a guardian does not need.
    `control_fd` is the read end of the pipe whose only write end the supervisor holds.
    """
    guardian_pid = os.getpid()
    engine_pid = os.fork()
    if engine_pid == 0:
        process.die_with_parent(guardian_pid)
        return
    code = _ABANDONED_CODE
    try:
        os.close(message_fd)
        code = _guard(control_fd, engine_pid)
    except Exception:  # noqa: BLE001 - the top of a program
        traceback.print_exc()
    finally:
        _end_as(code)


def _guard(control_fd: int, engine_pid: int) -> int:
    """The engine's exit code as `subprocess` gives it, once nothing is left."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # sent to the group; the guardian goes last
    wakeup, wakeup_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    process.adopt_orphans()
    poller = select.poll()
    poller.register(control_fd, 0)  # a hang-up is reported without being asked for
    poller.register(wakeup, select.POLLIN)
    code: int | None = None
    while code is None:
        code = _reap(engine_pid)
        if code is None and any(descriptor == control_fd for descriptor, _ in poller.poll()):
            code = _ABANDONED_CODE
        _drain(wakeup)
    _end_everything(wakeup)
    return code


def _reap(engine_pid: int) -> int | None:
    """Take the exit status of every child that ended; the engine's exit code if it was among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == engine_pid:
                code = os.waitstatus_to_exitcode(status)
    return code


def _end_everything(wakeup: int) -> None:
    """Kill what is below this process until nothing is, at most for `KILL_WAIT_S`."""
    deadline = time.monotonic() + KILL_WAIT_S
    while _has_children() and time.monotonic() < deadline:
        for pid in process.descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        select.select([wakeup], [], [], _RESCAN_S)
        _drain(wakeup)


def _has_children() -> bool:
    """Whether a child is left once those that ended are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        return False
    return True


def _drain(wakeup: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(wakeup, 4096):
            pass


def _end_as(code: int) -> NoReturn:
    """End with an exit code, or for a negative one by that signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's core is the one of interest
        with contextlib.suppress(OSError, ValueError):  # KILL and STOP cannot be set, and need not be
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


class EndStep(enum.IntEnum):
    """How to end an engine process; when it is still there after the step's patience, the next step follows."""

    QUIT = 1  # ask it to unload and leave
    TERM = 2  # signal its whole group
    HANG_UP = 3  # close the control pipe: the guardian kills all that came from it
    KILL = 4  # kill the group; the guardian is stopped or gone


PATIENCE_S: Mapping[EndStep, float] = MappingProxyType(
    # vLLM takes about 5 s to leave by itself; the guardian gives KILL 10 s.
    {EndStep.QUIT: 15.0, EndStep.TERM: 5.0, EndStep.HANG_UP: 12.0, EndStep.KILL: 5.0}
)


class EngineChild:
    """A running engine process with its guardian, which leads its process group."""

    def __init__(self, patience_s: Mapping[EndStep, float] = PATIENCE_S) -> None:
        """Start one. Raises UserError: it cannot be started; OSError: there are too many open files."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control_end, control_fd = _pipe(theirs, ours)
            self.message_fd, message_end = _pipe(ours, theirs)
            self.output_fd, output_end = _pipe(ours, theirs)
            fds = ("--control-fd", str(control_end), "--message-fd", str(message_end))
            self._child = process.spawn(
                (*own_command(sys.executable), "worker", "--engine", *fds),
                stdin=process.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                new_session=True,
                pass_fds=(control_end, message_end),
            )
            ours.pop_all()
        for descriptor in (self.message_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        # The guardian; its pid is the id of the group. Its entry in /proc stays until it is reaped, so it is there.
        self.identity = process.identify(self._child.pid) or process.ProcessId(self._child.pid, 0)
        self.control = Outbox(control_fd)
        self.engine_key: str | None = None  # of the engine that it was given to load
        self.is_stuck = False  # it is there in spite of KILL
        self.step: EndStep | None = None  # the step that is under way; None while it is not ending
        self.next_step_at: float | None = None
        self._patience_s = patience_s
        self._has_hung_up = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a message; one that is gone already is found out when it is reaped."""
        if not self._has_hung_up:
            with contextlib.suppress(BrokenPipeError):
                self.control.put(message)

    def end(self, step: EndStep, now: float) -> None:
        """Start to end it with this step, or go on to it when an earlier one is under way."""
        if self.step is not None and self.step >= step:
            return
        if step is EndStep.QUIT:
            self.send({"type": "quit"})
        elif step is EndStep.TERM:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGTERM)
        elif step is EndStep.HANG_UP:
            self._hang_up()
        else:
            process.kill_group(self._child.pid)
        self.step, self.next_step_at = step, now + self._patience_s[step]

    def tick(self, now: float) -> None:
        """Take the next step when its time has come."""
        if self.step is None or self.next_step_at is None or now < self.next_step_at:
            return
        if self.step is EndStep.KILL:
            self.is_stuck, self.next_step_at = True, None
        else:
            self.end(EndStep(self.step + 1), now)

    def reap(self) -> int | None:
        """Its exit code as `subprocess` gives it, once it has ended and nothing of its group is left; else None."""
        if os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # Not reaped yet, it keeps the number of its group from being used again.
        process.kill_group(self._child.pid)
        return self._child.wait()

    def close(self) -> None:
        """Close the descriptors, once it was reaped."""
        self._hang_up()
        os.close(self.message_fd)
        os.close(self.output_fd)

    def _hang_up(self) -> None:
        if not self._has_hung_up:
            self._has_hung_up = True
            self.control.drop()  # the number of the descriptor may be used again from here on
            os.close(self.control.descriptor)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Sequence[int]:
    """A pipe whose ends are closed when the stack of their side is."""
    ends = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


LEFTOVERS_PATIENCE_S = 5.0
_POLL_S = 0.02


def new_mark() -> str:
    """A mark (`MARK_VARIABLE`) that no other worker has."""
    return secrets.token_hex(8)


def end_marked(mark: str, patience_s: float = LEFTOVERS_PATIENCE_S) -> tuple[int, ...]:
    """Kill the processes with this mark; those that are still there after the patience.

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
    """The processes with this mark, except this one and zombies (which have no environment)."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for folder in proc.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or it is another user's
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return tuple(found)
