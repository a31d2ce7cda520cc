"""What an engine and everything it starts print: into the log of the experiment that runs, with its last lines kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from lem.units import KIB

__all__ = ["EngineLog", "Redactor", "redact"]

REDACTED = b"[redacted]"

# A secret shorter than this is a word that may stand in a log for another reason.
SHORTEST_SECRET = 6

TAIL_LINES = 30
_TAIL_B = 8 * KIB


class Redactor:
    """Takes secrets out of a stream of bytes, also where one is cut in two by the chunks it comes in."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = tuple(secret.encode() for secret in secrets if len(secret) >= SHORTEST_SECRET)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on; the beginning of what may turn out to be a secret is held back."""
        data = self._held + data
        for secret in self._secrets:
            data = data.replace(secret, REDACTED)
        held = max((_overlap(data, secret) for secret in self._secrets), default=0)
        cut = len(data) - held
        self._held = data[cut:]
        return data[:cut]

    def flush(self) -> bytes:
        """What was held back and is no secret after all."""
        held, self._held = self._held, b""
        return held


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, REDACTED.decode())
    return text


def _overlap(data: bytes, secret: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of `secret`."""
    for length in range(min(len(secret) - 1, len(data)), 0, -1):
        if data.endswith(secret[:length]):
            return length
    return 0


class EngineLog:
    """The log of one experiment.

    A log that can no longer be written (the disk is full) costs its lines and nothing else.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str, secrets: Iterable[str] = ()) -> None:
        """Open the log.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._redactor = Redactor(secrets)
        self._tail = bytearray()
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        """Append what was printed."""
        self._append(self._redactor.feed(data))

    def close(self) -> None:
        """Write what is left and close the file; the last lines stay."""
        self._append(self._redactor.flush())
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-_TAIL_B]
        view = memoryview(data)
        with contextlib.suppress(OSError):
            while view and self._descriptor is not None:
                view = view[os.write(self._descriptor, view) :]

    @property
    def last_line(self) -> str:
        """The last line with something on it, also while a progress bar is redrawing it."""
        lines = self._lines()
        return lines[-1] if lines else ""

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._lines()[-TAIL_LINES:])

    def _lines(self) -> list[str]:
        text = self._tail.decode("utf-8", "replace")
        # A progress bar goes back to the start of its line with \r; only its last state is worth showing.
        lines = (line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n"))
        return [line for line in lines if line.strip()]
