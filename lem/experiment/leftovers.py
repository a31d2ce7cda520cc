"""Processes of a worker that outlived it: found by a variable that everything a worker starts inherits."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from pathlib import Path

from lem.variables import MARK_VARIABLE

__all__ = ["end_marked", "find_marked", "new_mark"]

PATIENCE_S = 5.0
_POLL_S = 0.02


def new_mark() -> str:
    """A mark that no other worker bears."""
    return secrets.token_hex(8)


def end_marked(mark: str, patience_s: float = PATIENCE_S) -> tuple[int, ...]:
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
