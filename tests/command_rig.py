"""A command of lem in this process, for tests that need no other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from lem.base import log
from lem.cli.main import main

__all__ = ["Output", "on_terminal", "run_lem"]


class Output(NamedTuple):
    """How a command ended, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


def on_terminal(text: str) -> str:
    """A coloured text as a terminal receives it."""
    stream = io.StringIO()
    log.Output.over(stream).write(text)
    return stream.getvalue()


def run_lem(*words: str | Path) -> Output:
    """What came of a command line, without the name of the program."""
    out, err = io.StringIO(), io.StringIO()
    code = main([str(word) for word in words], out, err)
    return Output(code, out.getvalue(), err.getvalue())
