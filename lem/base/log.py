"""Output to stderr: messages, colour, and one live line on a terminal.

The rest of lem logs with the standard `logging`; this module renders it.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import time

# Every command starts here: what only some of them need is imported later.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Any, TextIO

# Those of `logging`.
CRITICAL, ERROR, WARNING, INFO, DEBUG = 50, 40, 30, 20, 10

# Columns for text that goes to no terminal, and their bounds on one: a terminal can claim 0 columns, and lines over 120
# are hard to read.
WIDTH = 80
NARROWEST, WIDEST = 72, 120

# What begins lem's own control sequences until they are written: a private character that no file can know, which tells
# them apart from those in its text.
_MARK = chr(0xF0000 + int.from_bytes(os.urandom(2), "big") % 0xFFFE)
_STYLES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "bold": "1", "dim": "2"}
_CLEAR_LINE = f"{_MARK}2K"
# Unicode's control and format characters (Cc, Cf), separators of lines and paragraphs, and lone surrogates.
_CONTROLS = (
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f"
    r"\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001-\U000e007f]"
)
# Levels of syslog(3), which the journal reads from `<N>` at the beginning of a line (sd-daemon(3)).
_PRIORITIES = ((CRITICAL, 2), (ERROR, 3), (WARNING, 4), (INFO, 6))


def is_colour_wanted(stream: TextIO) -> bool:
    """Whether to colour: on a terminal, and never under NO_COLOR (any value, no-color.org) or TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_journal(stream: TextIO) -> bool:
    """Whether the stream goes to systemd's journal: JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def paint(text: str, style: str, *, is_colour: bool) -> str:
    return f"{_MARK}{_STYLES[style]}m{text}{_MARK}0m" if is_colour and text else text


def terminal_columns() -> int:
    """As `shutil.get_terminal_size`, whose import takes a millisecond."""
    with contextlib.suppress(ValueError):
        if (columns := int(os.environ.get("COLUMNS", ""))) > 0:
            return columns
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no stream, a closed one, no terminal
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or WIDTH  # type: ignore[union-attr]
    return WIDTH


def bounded_width(width: int) -> int:
    return min(max(width, NARROWEST), WIDEST)


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def escaped(text: str) -> str:
    is_plain = text.replace("\n", "").isprintable()
    return text if is_plain else re.sub(_CONTROLS, lambda it: _escape(it[0]), text)


def _escape(text: str) -> str:
    import json

    return json.dumps(text)[1:-1]


class Output:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def over(cls, stream: TextIO) -> TextIO:
        return stream if isinstance(stream, cls) else cls(stream)  # type: ignore[return-value]

    def write(self, text: str) -> int:
        shown = escaped(text)
        return self._stream.write(shown.replace(_CLEAR_LINE, "\r\x1b[2K").replace(_MARK, "\x1b["))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Console:
    def __init__(self, stream: TextIO) -> None:
        self._stream = Output.over(stream)
        self._live = ""
        self.is_colour = self.is_live = is_colour_wanted(stream)
        self.is_journal = is_journal(stream)  # every line begins with its priority

    def paint(self, text: str, colour: str) -> str:
        return paint(text, colour, is_colour=self.is_colour)

    def line(self, text: str = "", level: int = INFO) -> None:
        clear = _CLEAR_LINE if self._live else ""
        if self.is_journal:
            priority = next((number for least, number in _PRIORITIES if level >= least), 7)
            text = "\n".join(f"<{priority}>{line}" for line in text.split("\n"))
        self._write(f"{clear}{text}\n{self._live}")

    def error(self, message: str, hint: str = "") -> None:
        self.close()
        self.line(f"{self.paint('error:', 'red')} {message}", ERROR)
        if hint:
            self.line(f"{self.paint('hint:', 'cyan')} {hint}", ERROR)

    def live(self, text: str) -> None:
        if self.is_live:
            self._live = shorten(text, terminal_columns() - 1)
            self._write(f"{_CLEAR_LINE}{self._live}")

    def close(self) -> None:
        if self._live:
            self.live("")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader, pipe or terminal (EIO), is gone, or the file is full; a campaign is worth more than messages.
            self.is_live = False


def configure(console: Console, *, verbosity: int = 0) -> None:
    import logging

    class ConsoleHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.levelno >= WARNING:
                colour = "red" if record.levelno >= ERROR else "yellow"
                message = f"{console.paint(f'{record.levelname.lower()}:', colour)} {message}"
            if not console.is_live and not console.is_journal:  # the journal has times of its own
                message = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {message}"
            console.line(message, record.levelno)

    handler = ConsoleHandler({-1: ERROR, 0: WARNING, 1: INFO}.get(verbosity, DEBUG))
    handler.name = "console"
    root = logging.getLogger("lem")
    for old in [item for item in root.handlers if item.name == handler.name]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(DEBUG)
    root.propagate = False


def log_to_file(path: Path) -> logging.Handler:
    import logging

    class Formatter(logging.Formatter):
        converter = staticmethod(time.gmtime)

        def format(self, record: logging.LogRecord) -> str:
            return escaped(super().format(record))

    class FileHandler(logging.FileHandler):
        """Ignores a full disk: the campaign is worth more than its log."""

        def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
            """Drop the message."""

        def close(self) -> None:
            with contextlib.suppress(OSError):  # closing writes again what a full disk did not take
                super().close()

    path.parent.mkdir(parents=True, exist_ok=True)
    # A path that is not UTF-8 is logged with its bytes escaped.
    handler = FileHandler(path, encoding="utf-8", errors="backslashreplace")
    form = "%(asctime)sZ %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S"))
    handler.setLevel(DEBUG)
    logging.getLogger("lem").addHandler(handler)
    return handler


_ESCAPES = "lem.escapes"


def prepare_streams() -> None:
    """Make this process's own streams take whatever is written; those that a test puts in their place stay alone."""
    # One that was closed (`>&-`) leads nowhere, where the next file to be opened would otherwise get its descriptor.
    # What a stream's encoding does not have is written as JSON escapes it: plain for a person, right for a program.
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors: each takes the lowest free one
        if getattr(sys, f"__{name}__") is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            stream = open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115 - to the end
            setattr(sys, f"__{name}__", stream)
            if getattr(sys, name) is None:
                setattr(sys, name, stream)
    codecs.register_error(_ESCAPES, _escaped_as_json)
    for current, own in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)):
        if current is own and isinstance(current, io.TextIOWrapper):
            current.reconfigure(errors=_ESCAPES)


def _escaped_as_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escape(error.object[error.start : error.end]), error.end
