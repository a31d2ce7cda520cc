"""What the engine's own processes print: passed on as it comes, and its end kept to explain a failure.

vLLM runs the engine in processes of its own, and when one of them fails the caller is told "see root cause above": the
cause is in what they printed, and nowhere else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator

from lem.units import KIB

__all__ = ["ChildOutput"]

_TAIL_B = 256 * KIB
_READ_B = 64 * KIB
_PATIENCE_S = 5.0
_POLL_S = 0.005


class ChildOutput:
    """The output of the processes that are started while `inherited` is open, for as long as they live."""

    def __init__(self) -> None:
        self._tail = bytearray()
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        """The end of what was printed so far."""
        with self._lock:
            return self._tail.decode("utf-8", "replace")

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Meanwhile descriptors 1 and 2 lead here, so that new processes inherit them.

        What is written to them goes on to what descriptor 2 was. On leaving they are what they were, and all that was
        printed until then has been passed on.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        thread = threading.Thread(target=self._pass_on, args=(reader, os.dup(2)), name="engine output", daemon=True)
        thread.start()
        try:
            with _redirected(writer, saved):
                yield
        finally:
            self._drain(writer)
            for descriptor in (writer, *saved):
                os.close(descriptor)

    def _pass_on(self, reader: int, target: int) -> None:
        """Copy until the last process that can write is gone."""
        with contextlib.suppress(OSError):
            while True:
                select.select((reader,), (), ())
                # Whoever has the lock and finds the pipe empty knows that all of it is in the tail.
                with self._lock:
                    data = os.read(reader, _READ_B)
                    self._tail += data
                    del self._tail[:-_TAIL_B]
                    view = memoryview(data)
                    while view:
                        view = view[os.write(target, view) :]
                if not data:
                    break
        os.close(reader)
        os.close(target)

    def _drain(self, writer: int) -> None:
        """Wait until everything written so far was passed on."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with self._lock:
                if _pending(writer) == 0:
                    return
            time.sleep(_POLL_S)


def _pending(pipe: int) -> int:
    """Bytes in a pipe that nobody read yet."""
    answer = fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(answer, sys.byteorder)


@contextlib.contextmanager
def _redirected(writer: int, saved: list[int]) -> Iterator[None]:
    _flush()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
