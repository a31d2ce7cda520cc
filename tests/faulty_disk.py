"""Lets one kind of file operation of lem fail, or looks at the disk just before it, inside this process.

An audit hook cannot be taken away, so one is installed for good and does nothing unless armed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

Watcher = Callable[[str, str], None]

_watchers: list[Watcher] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watchers and event.startswith("lem."):
        for watcher in tuple(_watchers):
            watcher(event, str(arguments[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` with kind and path of each operation just before it happens; what it raises fails it."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def failing(event: str, code: int = errno.ENOSPC) -> Iterator[None]:
    """Let every operation of that kind fail."""

    def fail(happening: str, _path: str) -> None:
        if happening == event:
            raise OSError(code, os.strerror(code))

    with watching(fail):
        yield
