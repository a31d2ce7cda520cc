"""A command of lem that ends when the one who started it is gone, also through `docker compose exec`.

Ending the client of `docker compose exec` reaches nothing inside the container. What does reach it is the end of file
of a pipe that the client held: so the command runs as a child, and this process watches its own stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence

from lem import process
from lem.errors import UserError
from lem.experiment.launch import own_command
from lem.units import KIB

__all__ = ["run_tethered"]

GRACE_S = 20.0
_READ_B = 64 * KIB
_POLL_S = 0.5


def run_tethered(arguments: Sequence[str]) -> int:
    """The exit code of `lem ARGUMENTS`, which is ended when stdin is.

    The first line of stdin is a JSON object of variables for its environment: what stands there is in no argv.

    Raises:
        UserError: the first line is something else, or the command cannot be started.
    """
    variables = _read_variables()
    command = (*own_command(sys.executable), *arguments)
    child = process.spawn(
        command, env={**os.environ, **variables}, stdin=process.DEVNULL, stdout=1, stderr=2, new_session=True
    )
    try:
        _wait(child)
    finally:
        _end(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _read_variables() -> Mapping[str, str]:
    line = b""
    while not line.endswith(b"\n"):
        # One byte at a time: nothing that comes after the line is taken.
        byte = os.read(0, 1)
        if not byte or len(line) > _READ_B:
            raise UserError("the first line of stdin is to be a JSON object of environment variables")
        line += byte
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"the first line of stdin is no JSON object of environment variables: {error}") from error
    if not isinstance(found, dict):
        raise UserError("the first line of stdin is no JSON object of environment variables")
    return {str(name): str(value) for name, value in found.items()}


def _wait(child: process.Child[bytes]) -> None:
    """Return when the command has ended, or stdin has."""
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, _READ_B):
            return


def _end(child: process.Child[bytes]) -> None:
    """End the command if it is still there: TERM, a while, KILL; what it started sees an end of file then."""
    if child.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except process.TimeoutExpired:
        process.kill_group(child.pid)
        child.wait()
