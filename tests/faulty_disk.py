"""Lets one kind of file operation of lem fail, or looks at the disk just before it, inside this process.

An audit hook cannot be taken away, so one is installed for good and does nothing unless armed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

_watchers: list[Callable[[str], None]] = []


def _hook(event: str, _arguments: tuple[object, ...]) -> None:
    if _watchers and event.startswith("lem."):
        for watcher in tuple(_watchers):
            watcher(event)


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching(watcher: Callable[[str], None]) -> Iterator[None]:
    """Call `watcher` with the name of each operation just before it happens; what it raises fails the operation."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def failing(event: str, code: int = errno.ENOSPC) -> Iterator[None]:
    """Let every operation of that kind fail."""

    def fail(happening: str) -> None:
        if happening == event:
            raise OSError(code, os.strerror(code))

    with watching(fail):
        yield
