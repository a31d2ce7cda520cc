"""Stops the program, or makes something fail, at one chosen change of a file or of an experiment's status.

The program raises an audit event (`sys.audit`) just before each durable step, and Python itself before whatever opens a
file to write, makes, renames or removes one; this is the hook that listens to both, so that no way of writing goes
uncounted. It is driven by the environment, so it reaches every process of a run: LEMTEST_FAULT is a JSON object with

    journal   a file to which each event is added as a line, in the order of all processes together (required)
    root      the folder in which Python's own events count; without one they do not
    process   `host`, `supervisor`, `engine` or `sampler`: whose events count
    event     one of EVENTS
    nth       which of them in that kind of process, from 1, counted over the whole run
    action    `kill`, `term`; `enospc`, `eacces`, `eio`: the call fails; `readonly`: no folder below root can be
              written from here on; `clock`: the wall clock goes back by an hour (see wall_clock.py); `vanish`: the
              folder `results` below root is removed

Without `event` the run is only written down; the journal then is the list of the points to try.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "LEMTEST_FAULT"
WALL_CLOCK_VARIABLE = "LEMTEST_WALL_CLOCK"
WALL_CLOCK_OFFSET = struct.Struct("=q")
DURABLE_EVENTS = ("lem.write", "lem.fsync", "lem.rename", "lem.fsync_dir", "lem.transition")
PYTHON_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
START = "start"  # a process of lem begins: a worker that ends here has not said hello
EVENTS = (START, *DURABLE_EVENTS, *PYTHON_EVENTS)
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
ERRORS = {"enospc": errno.ENOSPC, "eacces": errno.EACCES, "eio": errno.EIO}
ACTIONS = (*SIGNALS, *ERRORS, "readonly", "clock", "vanish")

# Where only its owner, and not root with all its rights, is kept from writing.
_READ_ONLY = 0o555
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_HOUR_S = 3600


@dataclass(frozen=True)
class Fault:
    """What to do at which event; without an event nothing, only the journal is kept."""

    journal: str
    process: str = ""
    event: str = ""
    nth: int = 0
    action: str = ""
    root: str = ""

    def __post_init__(self) -> None:
        """Refuse what would silently never happen."""
        if self.event and (self.event not in EVENTS or self.action not in ACTIONS or self.nth < 1 or not self.process):
            raise ValueError(f"{self}: process, event, nth from 1 and action are due")

    @classmethod
    def from_json(cls, text: str) -> Fault:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Entry:
    """One line of the journal: an event, and the action taken there, if any."""

    process: str
    event: str
    pid: int
    detail: str
    action: str = ""


_installed: list[_Injector] = []


def install(environ: Mapping[str, str] = os.environ) -> None:
    """Listen for the fault that the environment names; nothing without one."""
    text = environ.get(VARIABLE)
    if text:
        injector = _Injector(Fault.from_json(text))
        _installed.append(injector)
        if len(_installed) == 1:  # a hook stays for good, and a process that was forked has that of the one before it
            sys.addaudithook(_tell_last)
        injector(START, (" ".join(without_interpreter(sys.orig_argv)[:3]),))


def _tell_last(event: str, arguments: tuple[object, ...]) -> None:
    _installed[-1](event, arguments)


def without_interpreter(words: Sequence[str]) -> list[str]:
    """`[program, argument, …]` of `python -u program argument …` or `python -m lem argument …`."""
    rest = list(words[1:])
    while rest and rest[0] != "-m" and rest[0].startswith("-"):
        rest = rest[1:]
    return rest[1:] if rest[:1] == ["-m"] else rest


def step_wall_clock(seconds: int, environ: Mapping[str, str] = os.environ) -> None:
    """Set the clock of this process, and of all that share it, so much ahead of the right time (see wall_clock.py)."""
    with open(environ[WALL_CLOCK_VARIABLE], "r+b", buffering=0) as file:
        file.write(WALL_CLOCK_OFFSET.pack(seconds))


def process_of(argv: Sequence[str]) -> str:
    """Which process of a run has this command line (without the interpreter)."""
    if "worker" not in argv[1:2]:
        return "host"
    if "--sampler" in argv[2:]:
        return "sampler"
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
        # What the hook itself does raises events too.
        self._own = threading.local()

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or getattr(self._own, "is_inside", False):
            return
        if event in PYTHON_EVENTS and not self._is_change_below_root(event, arguments):
            return
        self._own.is_inside = True
        try:
            # One after the other; without the lock while the process is stopped.
            with self._lock:
                action = self._write_down(event, _detail(event, arguments))
            self._act(action, arguments)
        finally:
            self._own.is_inside = False

    def _is_change_below_root(self, event: str, arguments: tuple[object, ...]) -> bool:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return False
        path = arguments[0]
        if not self._fault.root or not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self._fault.root)  # noqa: PTH100 - also of bytes

    def _act(self, action: str, arguments: tuple[object, ...]) -> None:
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
        elif action == "readonly":
            for folder, _, _ in list(os.walk(self._fault.root)):
                os.chmod(folder, _READ_ONLY)  # noqa: PTH101 - as os.walk gives them
        elif action == "clock":
            step_wall_clock(-_HOUR_S)
        elif action == "vanish":
            shutil.rmtree(os.path.join(self._fault.root, "results"), ignore_errors=True)  # noqa: PTH118 - root is text
        elif action:
            code = ERRORS[action]
            raise OSError(code, f"{os.strerror(code)} (fault injected)", str(arguments[0]) if arguments else None)

    def _write_down(self, event: str, detail: str) -> str:
        """Add the event to the journal and say what to do at it. One process at a time has the file."""
        process = process_of(without_interpreter(sys.orig_argv))  # sys.argv is not set yet at the start
        descriptor = os.open(self._fault.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with open(descriptor, "r+", encoding="utf-8") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            # Sought as text: a sampler writes thousands of lines, and must not be slowed down by reading them.
            before = journal.read().count(_start_of_line(process, event))
            is_the_one = (process, event, before + 1) == (self._fault.process, self._fault.event, self._fault.nth)
            action = self._fault.action if is_the_one else ""
            entry = Entry(process, event, os.getpid(), detail, action)
            journal.write(json.dumps(dataclasses.asdict(entry)) + "\n")
        return action


def _start_of_line(process: str, event: str) -> str:
    return json.dumps({"process": process, "event": event})[:-1] + ", "


def _name(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)


def _detail(event: str, arguments: tuple[object, ...]) -> str:
    """The path; of a transition, experiment and statuses."""
    return " ".join(map(str, arguments)) if event == "lem.transition" else _name(arguments[0])
