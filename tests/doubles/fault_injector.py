"""Stops the program, or makes a call fail, at one chosen write, fsync, rename or transition.

The program raises an audit event (`sys.audit`) just before each of them; this is the hook that listens. It is driven
by the environment, so it reaches every process of a run: LEMTEST_FAULT is a JSON object with

    journal   a file to which each event is added as a line, in the order of all processes together (required)
    process   `host`, `supervisor` or `engine`: whose events count
    event     `lem.write`, `lem.fsync`, `lem.rename`, `lem.fsync_dir` or `lem.transition`
    nth       which of them in that kind of process, from 1, counted over the whole run
    action    `kill`, `term`, `enospc`, `eacces` or `eio`

Without `event` the run is only written down; the journal then is the list of the points to try.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ACTIONS", "EVENTS", "VARIABLE", "Entry", "Fault", "install", "process_of", "read_journal"]

VARIABLE = "LEMTEST_FAULT"
EVENTS = ("lem.write", "lem.fsync", "lem.rename", "lem.fsync_dir", "lem.transition")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
ERRORS = {"enospc": errno.ENOSPC, "eacces": errno.EACCES, "eio": errno.EIO}
ACTIONS = (*SIGNALS, *ERRORS)


@dataclass(frozen=True)
class Fault:
    """What to do at which event; without an event nothing, only the journal is kept."""

    journal: str
    process: str = ""
    event: str = ""
    nth: int = 0
    action: str = ""

    def __post_init__(self) -> None:
        """Refuse what would silently never happen."""
        if self.event and (self.event not in EVENTS or self.action not in ACTIONS or self.nth < 1 or not self.process):
            raise ValueError(f"{self}: process, event, nth from 1 and action are due")

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """The fault in a value of the variable."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """The value of the variable."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Entry:
    """One line of the journal: an event, and the action taken there, if any."""

    process: str
    pid: int
    event: str
    detail: str
    action: str = ""


def install(environ: Mapping[str, str] = os.environ) -> None:
    """Listen for the fault that the environment names; nothing without one."""
    text = environ.get(VARIABLE)
    if text:
        sys.addaudithook(_Injector(Fault.from_json(text)))


def process_of(argv: Sequence[str]) -> str:
    """Which process of a run has this command line (without the interpreter)."""
    if "worker" not in argv[1:2]:
        return "host"
    return "engine" if "--engine" in argv[2:] else "supervisor"


def read_journal(path: Path) -> tuple[Entry, ...]:
    """The events of a run in their order; none when there is no journal."""
    return tuple(_entries(path.read_text(encoding="utf-8"))) if path.exists() else ()


def _entries(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        yield Entry(**json.loads(line))


class _Injector:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._lock = threading.Lock()

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS:  # every open, import and socket of the program comes by here
            return
        with self._lock:
            action = self._write_down(event, " ".join(map(str, arguments)))
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
        elif action:
            code = ERRORS[action]
            raise OSError(code, f"{os.strerror(code)} (fault injected)", str(arguments[0]) if arguments else None)

    def _write_down(self, event: str, detail: str) -> str:
        """Add the event to the journal and say what to do at it. One process at a time has the file."""
        process = process_of(sys.argv)
        descriptor = os.open(self._fault.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with open(descriptor, "r+", encoding="utf-8") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            before = sum(1 for entry in _entries(journal.read()) if (entry.process, entry.event) == (process, event))
            is_the_one = (process, event, before + 1) == (self._fault.process, self._fault.event, self._fault.nth)
            action = self._fault.action if is_the_one else ""
            entry = Entry(process, os.getpid(), event, detail, action)
            journal.write(json.dumps(dataclasses.asdict(entry)) + "\n")
        return action
