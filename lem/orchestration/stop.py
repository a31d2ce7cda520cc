"""Asking a running campaign to stop: the first signal politely, the second at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from lem.errors import Interrupted

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A flag that signals set and that waits can be woken by.

    The first SIGINT or SIGTERM sets it: the campaign stops the running experiment, writes everything and says how to
    go on. A second one raises `Interrupted` where the program stands, and what is running is killed on the way out.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def fileno(self) -> int:
        """A descriptor that becomes readable when a stop is asked for, and stays so."""
        return self._reader

    def wait(self, seconds: float) -> bool:
        """Sleep, but not past a request to stop; whether there is one."""
        if seconds > 0 and not self.is_set():
            select.select([self._reader], [], [], seconds)
        return self.is_set()

    def request(self, signum: int) -> None:
        """Ask for a stop as the signal would.

        Raises:
            Interrupted: it was asked for before.
        """
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        os.write(self._writer, b"!")

    @contextlib.contextmanager
    def installed(self, acknowledge: Callable[[], None] | None = None) -> Iterator[StopRequest]:
        """Answer SIGINT and SIGTERM within the block; to be entered on the main thread.

        Args:
            acknowledge: called at the first signal, wherever the program stands; it must not touch buffered streams.
        """

        def handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler gets both
            self.request(signum)
            if acknowledge is not None:
                acknowledge()

        before = {item: signal.signal(item, handle) for item in _SIGNALS}
        try:
            yield self
        finally:
            for item, handler in before.items():
                signal.signal(item, handler)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._reader)
        os.close(self._writer)
