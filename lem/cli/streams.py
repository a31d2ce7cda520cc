"""The standard streams: there, and able to take every text."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys

__all__ = ["prepare_streams"]

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
