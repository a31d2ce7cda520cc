"""The standard streams: there, able to take every text, and what commands write to them alike."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Any, TextIO

from lem.log import WIDTH

__all__ = ["prepare_streams", "terminal_width", "write_json"]

_ESCAPES = "lem.escapes"


def prepare_streams() -> None:
    """Make this process's own streams take whatever is written; those that a test puts in their place stay alone.

    One that was closed (`>&-`) leads nowhere, where the next file to be opened would otherwise get its descriptor.
    What a stream's encoding does not have is written as JSON escapes it: plain for a person, right for a program.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors: each takes the lowest free one
        if getattr(sys, f"__{name}__") is None:
            _open_nothing(name)
    codecs.register_error(_ESCAPES, _escape)
    for stream, own in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)):
        if stream is own and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def write_json(out: TextIO, document: Any) -> None:
    """One JSON document on a stream."""
    from lem.durable import json_text  # which `lem --help` does not need

    out.write(json_text(document))


def terminal_width(out: TextIO) -> int:
    """The columns of a terminal, 80 for anything else."""
    import shutil  # half of what `lem --help` would import

    return max(WIDTH, shutil.get_terminal_size().columns) if out.isatty() else WIDTH


def _open_nothing(name: str) -> None:
    descriptor = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(descriptor, True)
    stream = open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115 - to the end
    setattr(sys, f"__{name}__", stream)
    if getattr(sys, name) is None:
        setattr(sys, name, stream)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
