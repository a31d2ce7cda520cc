"""Other programs: the only module that imports `subprocess`; and facts about processes from Linux."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from lem.base.dataclass import dataclass
from lem.base.errors import UserError

_logger = logging.getLogger(__name__)

Child = subprocess.Popen  # with binary pipes, as `spawn` makes it
PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL
TimeoutExpired = subprocess.TimeoutExpired

TIMEOUT_CODE = 124  # as timeout(1) reports it

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # in which the kernel counts CPU time (USER_HZ)
_ENDED = "ZX"  # the states of a zombie and of a process that is being removed
_SMALL_B = 4096
_LISTEN = "0A"  # TCP_LISTEN, as /proc/net/tcp shows it

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Finished:
    argv: tuple[str, ...]
    code: int  # negative for a signal; 124 when it was killed at its timeout
    stdout: str  # decoded as UTF-8 with replacement
    stderr: str
    has_timed_out: bool = False


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes = b"",
) -> Finished:
    """Run a program to its end, or kill its group at the timeout or an exception; raises as `spawn`."""
    starting = _Starting(lambda: spawn(argv, env=env, cwd=cwd))
    has_timed_out = False
    try:
        child = starting.begin()
        try:
            stdout, stderr = child.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            has_timed_out = True
            stdout, stderr = _kill_and_collect(child)
    except BaseException:
        starting.undo()
        raise
    code = TIMEOUT_CODE if has_timed_out else child.returncode
    out, err = (output.decode("utf-8", "replace") for output in (stdout, stderr))
    return Finished(tuple(argv), code, out, err, has_timed_out)


class _Starting:
    """A child that is being started in its own thread."""

    # `subprocess.Popen` loses a child when a signal handler raises inside it. Handlers run only in the main thread, so
    # here none can. Wherever else one raises, `undo` leaves no child.

    def __init__(self, start: Callable[[], Child[bytes]]) -> None:
        self._start = start
        self._child: Child[bytes] | None = None
        self._error: Exception | None = None
        self._is_undone = False
        self._is_at_it = threading.Lock()

    def begin(self) -> Child[bytes]:
        thread = threading.Thread(target=self._run, name="start of a program")
        thread.start()
        thread.join()
        if self._child is None:
            raise self._error or UserError("the program was not started")
        return self._child

    def _run(self) -> None:
        with self._is_at_it:
            if self._is_undone:
                return
            try:
                self._child = self._start()
            except (UserError, ValueError, subprocess.SubprocessError) as error:  # raised by `begin`
                self._error = error

    def undo(self) -> None:
        with self._is_at_it:
            self._is_undone = True
        if self._child is not None:
            _kill_and_collect(self._child)


def _kill_and_collect(child: Child[bytes]) -> tuple[bytes, bytes]:
    kill_group(child.pid)
    try:
        return child.communicate(timeout=1)
    except subprocess.TimeoutExpired as late:
        # A process that left the group holds the pipes; do not wait for it.
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        child.wait()
        return late.stdout or b"", late.stderr or b""


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    streams: tuple[int, int, int] = (PIPE, PIPE, PIPE),
    pass_fds: Sequence[int] = (),
) -> Child[bytes]:
    """Start a program in a session of its own, with `env` alone; UserError if it is missing or cannot be started."""
    _logger.info("$ %s", shlex.join(argv))
    try:
        return subprocess.Popen(
            list(argv),
            bufsize=0,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as error:
        if cwd is not None and not cwd.is_dir():
            raise UserError(f"{cwd}: no such folder to run {argv[0]} in") from error
        raise UserError(f"{argv[0]}: no such program", "install it, or put its folder on PATH") from error
    except OSError as error:
        hint = "check its permissions, free memory and the limits of this user (ulimit -a)"
        raise UserError(f"{argv[0]}: cannot be started: {error.strerror}", hint) from error


def pipes(child: Child[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if child.stdin is None or child.stdout is None:
        raise ValueError("the child was started without pipes")
    return child.stdin, child.stdout


def kill_group(pgid: int) -> None:
    """Send KILL to a process group, if it still exists."""
    # The caller must know the group is the right one: it has not reaped the group's leader yet, or has compared its
    # `ProcessId`. Reaping is left to the caller, so that no exit status is lost.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def describe_exit(code: int) -> str:
    """`was killed by SIGKILL` or `ended with exit code 3`, from an exit code of `subprocess`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


# Signals for what a program itself did: for an instruction that the CPU does not have, and others.
_ILLEGAL = frozenset({signal.SIGILL, signal.SIGSYS, signal.SIGTRAP})
_FAULTS = _ILLEGAL | {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT}


def would_repeat(code: int, *, is_loading: bool) -> bool:
    return -code in (_FAULTS if is_loading else _ILLEGAL)


def hint_on_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "usually the kernel was out of memory (see dmesg): use less of it"
    if code == -signal.SIGILL:
        return "this CPU does not have an instruction that was used: try fp_precision: float32 or another build"
    return "see the last lines of its log"


@dataclass(frozen=True)
class ProcessId:
    pid: int
    started_ticks: int  # start time in clock ticks since boot, field 22 of /proc/PID/stat (proc_pid_stat(5))

    def is_running(self) -> bool:
        found = read_stat(self.pid)
        return found is not None and found.started_ticks == self.started_ticks and found.state not in _ENDED


def identify(pid: int) -> ProcessId | None:
    found = read_stat(pid)
    return None if found is None else ProcessId(pid, found.started_ticks)


@dataclass(frozen=True)
class ProcessStat:
    name: str
    state: str  # a letter
    parent: int
    cpu_s: float  # user and system time of all its threads, ended ones included
    started_ticks: int
    ended_s: float = 0.0  # the same of its children that have ended, and of theirs


def read_stat(pid: int, proc: Path = PROC) -> ProcessStat | None:
    try:
        text = read_small(f"{proc}/{pid}/stat").decode(errors="replace")
    except OSError:
        return None
    try:
        # The name in parentheses may hold blanks and parentheses itself.
        start, end = text.index("(") + 1, text.rindex(")")
        fields = text[end + 2 :].split()
        cpu_s = (int(fields[11]) + int(fields[12])) * TICK_S
        ended_s = (int(fields[13]) + int(fields[14])) * TICK_S
        return ProcessStat(text[start:end], fields[0], int(fields[1]), cpu_s, int(fields[19]), ended_s)
    except (ValueError, IndexError):
        return None


def list_processes(proc: Path = PROC) -> dict[int, ProcessStat]:
    return {pid: found for pid in numbered(proc) if (found := read_stat(pid, proc)) is not None}


def numbered(folder: Path) -> list[int]:
    return [int(name) for name in os.listdir(folder) if name.isdigit()]  # noqa: PTH208 - a path for each would cost


def read_small(path: Path | str) -> bytes:
    """A small file of the kernel; takes a third of the time of `Path.read_bytes`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _SMALL_B)
    finally:
        os.close(descriptor)


def find_listeners(port: int, proc: Path = PROC) -> tuple[ProcessId, ...]:
    """The processes that listen on a TCP port, as far as this user may see whose sockets they are."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # a kernel without IPv6
            rows = (line.split() for line in (proc / "net" / name).read_text().splitlines()[1:])
            inodes |= {row[9] for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port}
    wanted, found = {f"socket:[{inode}]" for inode in inodes}, []
    for pid in numbered(proc) if wanted else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            folder = f"{proc}/{pid}/fd"
            if any(os.readlink(f"{folder}/{name}") in wanted for name in os.listdir(folder)):  # noqa: PTH115, PTH208
                stat = read_stat(pid, proc)
                found += [ProcessId(pid, stat.started_ticks)] if stat is not None else []
    return tuple(found)


def is_here(host: str) -> bool:
    """Whether an address is one of this machine: only such a one can be bound."""
    import socket  # which most programs that import this module do not need

    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, number, _name, address in found:
        with socket.socket(family, kind, number) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def descendants(pid: int) -> tuple[int, ...]:
    return below(pid, {other: stat for other, stat in list_processes().items() if stat.state not in _ENDED})


def below(pid: int, processes: Mapping[int, ProcessStat]) -> tuple[int, ...]:
    children: dict[int, list[int]] = {}
    for other, stat in processes.items():
        children.setdefault(stat.parent, []).append(other)
    reached: list[int] = []
    todo = [pid]
    while todo:
        found = children.get(todo.pop(), [])
        reached += found
        todo += found
    return tuple(reached)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send KILL to this process when its parent dies (PR_SET_PDEATHSIG, prctl(2))."""
    # The kernel acts whatever this process does, also while it holds the interpreter's lock or waits in a driver. It
    # watches the thread that started this process, which must be the parent's main thread. If the parent died before
    # the call, this process exits.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies (PR_SET_CHILD_SUBREAPER, prctl(2))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    import ctypes  # only workers need it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
