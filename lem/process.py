"""Other programs: the only module that imports `subprocess`."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lem.errors import UserError

__all__ = ["Child", "Finished", "copyable", "kill_group", "run", "spawn"]

_logger = logging.getLogger(__name__)

Child = subprocess.Popen  # with binary pipes, as `spawn` makes it
PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL


@dataclass(frozen=True)
class Finished:
    """A program that ended.

    Attributes:
        argv: the command.
        code: its exit code, negative for a signal; 124 when it ran past its timeout and was killed.
        stdout, stderr: what it wrote, decoded as UTF-8 with replacement.
    """

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str


def copyable(argv: Sequence[str]) -> str:
    """The command as it can be pasted into a shell."""
    return shlex.join(argv)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes = b"",
) -> Finished:
    """The finished program; a failing exit code is a value here, not an error.

    Raises:
        UserError: the program is not there or cannot be started.
    """
    _logger.info("$ %s", copyable(argv))
    child = spawn(argv, env=env, cwd=cwd, new_session=True)
    try:
        stdout, stderr = child.communicate(stdin, timeout=timeout_s)
        code = child.returncode
    except subprocess.TimeoutExpired:
        kill_group(child.pid, grace_s=0)
        stdout, stderr = child.communicate()
        code = 124
    except BaseException:
        kill_group(child.pid, grace_s=0)
        child.wait()
        raise
    return Finished(tuple(argv), code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int = PIPE,
    stdout: int = PIPE,
    stderr: int = PIPE,
    new_session: bool = False,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """A started program with unbuffered binary pipes.

    Args:
        env: the whole environment of the program; None hands on this one's.
        new_session: give it a session and a process group of its own, so that a terminal's Ctrl-C does not reach it
            and it can be ended with everything it started.

    Raises:
        UserError: the program is not there or cannot be started.
    """
    _logger.debug("$ %s", copyable(argv))
    try:
        return subprocess.Popen(
            list(argv),
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=new_session,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as error:
        raise UserError(f"{argv[0]}: no such program", "install it, or put its folder on PATH") from error
    except OSError as error:
        raise UserError(f"{argv[0]}: cannot be started: {error.strerror}") from error


def is_group_alive(pgid: int) -> bool:
    """Whether any process of the group is left (a zombie that nobody reaped counts)."""
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def kill_group(pgid: int, *, grace_s: float) -> None:
    """End a whole process group: TERM, `grace_s` seconds, KILL.

    A zombie keeps its group; the caller reaps its own child and the group is gone.
    """
    if grace_s > 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pgid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while is_group_alive(pgid) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pgid, os.WNOHANG)
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)
