"""Which processes of a test are there, and waiting for them without guessing a time.

A test's processes are known by a variable in their environment, which everything they start inherits, whatever session
or group it moves to.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.doubles.warm_start import MARK_VARIABLE

T = TypeVar("T")

VARIABLE = MARK_VARIABLE
PATIENCE_S = 40.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Marker:
    """The mark of one test's processes."""

    value: str = field(default_factory=lambda: secrets.token_hex(12))

    def environ(self, **more: str) -> dict[str, str]:
        """This process's environment with the mark and more variables."""
        return {**os.environ, VARIABLE: self.value, **more}

    def pids(self) -> tuple[int, ...]:
        """The processes that bear the mark now, zombies left out (they have no environment)."""
        needle = f"{VARIABLE}={self.value}".encode()
        return tuple(
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit() and needle in _read(folder / "environ").split(b"\0")
        )

    def survivors(self, patience_s: float = PATIENCE_S) -> tuple[str, ...]:
        """The command lines of those that are still there after everybody had time to go."""
        deadline = time.monotonic() + patience_s
        while pids := self.pids():
            if not wait_until_ended(pids[0], deadline - time.monotonic()):
                return tuple(f"{pid}: {_command(pid)}" for pid in pids)
        return ()

    def kill(self) -> None:
        """Kill those that are there, for a test that has failed."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pid_of(self, *words: str, without: str = "") -> int:
        """The one process whose command line has all of the words, and whose parent's has not, once it is there."""

        def find() -> int | None:
            commands = {pid: set(_command(pid).split()) for pid in self.pids()}
            found = [pid for pid, command in commands.items() if set(words) <= command and without not in command]
            found = [pid for pid in found if parent_of(pid) not in found]
            return found[0] if len(found) == 1 else None

        return wait_for(find)


def wait_until_ended(pid: int, patience_s: float = PATIENCE_S) -> bool:
    """Whether a process, anybody's child, ended in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], max(0.0, patience_s))[0])
    finally:
        os.close(descriptor)


def wait_for(look: Callable[[], T | None], patience_s: float = PATIENCE_S) -> T:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + patience_s
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing found within {patience_s} s by {look}")
        select.select([], [], [], _POLL_S)
    return found


def children_of(pid: int) -> tuple[int, ...]:
    """The children of a process, zombies left out."""
    return tuple(
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and parent_of(int(folder.name)) == pid and _read(folder / "environ")
    )


def parent_of(pid: int) -> int | None:
    """The parent of a process; None when it is gone."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    return int(stat.rpartition(b")")[2].split()[1]) if stat else None


def _command(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode("utf-8", "replace").strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Without root's right to write anywhere."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)
