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
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
import traceback
from pathlib import Path
from typing import NoReturn

from lem.base import process
from lem.base.variables import MARK_VARIABLE

# A process that does not end this long after KILL hangs in a driver and cannot be ended at all.
KILL_WAIT_S = 10.0
_RESCAN_S = 0.1
_ABANDONED_CODE = 128 + signal.SIGKILL


def start_guarded(control_fd: int, *others: int) -> None:
    """Return in the engine process; the process that called becomes its guardian and does not return."""
    # To be called before there are threads, and before anything is imported that a guardian does not need. `control_fd`
    # is the read end of the pipe whose only write end the supervisor holds.
    guardian_pid = os.getpid()
    engine_pid = os.fork()
    if engine_pid == 0:
        process.die_with_parent(guardian_pid)
        return
    code = _ABANDONED_CODE
    try:
        for descriptor in others:
            os.close(descriptor)
        code = _guard(control_fd, engine_pid)
    except Exception:  # noqa: BLE001 - the top of a program
        traceback.print_exc()
    finally:
        end_as(code)


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
        code, _ = _reap(engine_pid)
        if code is None and any(descriptor == control_fd for descriptor, _ in poller.poll()):
            code = _ABANDONED_CODE
        _drain(wakeup)
    _end_everything(wakeup)
    return code


def _reap(engine_pid: int | None = None) -> tuple[int | None, bool]:
    code = None
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == engine_pid:
                code = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return code, False
    return code, True


def _end_everything(wakeup: int) -> None:
    deadline = time.monotonic() + KILL_WAIT_S
    while _reap()[1] and time.monotonic() < deadline:
        for pid in process.descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        select.select([wakeup], [], [], _RESCAN_S)
        _drain(wakeup)


def _drain(wakeup: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(wakeup, 4096):
            pass


def end_as(code: int) -> NoReturn:
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's core is the one of interest
        with contextlib.suppress(OSError, ValueError):  # KILL and STOP cannot be set, and need not be
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


# What is left of a worker

LEFTOVERS_PATIENCE_S = 5.0
_POLL_S = 0.02


def new_mark() -> str:
    return os.urandom(8).hex()


def end_marked(mark: str, patience_s: float = LEFTOVERS_PATIENCE_S) -> tuple[int, ...]:
    deadline = time.monotonic() + patience_s
    # A process may be starting another while the list is read, so it is read until it is empty.
    while (found := find_marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return found


def find_marked(mark: str) -> tuple[int, ...]:
    needle = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or it is another user's
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return tuple(found)
