"""One step of the lab: run a program or say why it failed, and print how long each step took."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lem.base.errors import UserError
from lem.base.process import describe_exit, run

ANSWER_TIMEOUT_S = 60
LINES_SHOWN = 15


class Step:
    """What one step says at its end: what it did, or that nothing was to do."""

    def __init__(self) -> None:
        self.outcome = "done"

    def skip(self, why: str) -> None:
        self.outcome = f"nothing to do, {why}"


@contextlib.contextmanager
def step(name: str) -> Iterator[Step]:
    """A step that prints its name, its outcome and its duration in seconds; nothing for one that raises."""
    print(f"  {name} …", flush=True)
    started = time.monotonic()
    current = Step()
    yield current
    print(f"  {name}: {current.outcome} ({time.monotonic() - started:.1f} s)", flush=True)


def must(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """What a program wrote to stdout."""
    finished = run(argv, timeout_s=timeout_s, env=env, cwd=cwd)
    if finished.code == 0:
        return finished.stdout
    how = f"took more than {timeout_s:.0f} s" if finished.has_timed_out else describe_exit(finished.code)
    lines = (finished.stdout + finished.stderr).strip().splitlines()[-LINES_SHOWN:]
    raise UserError("\n    ".join([f"`{shlex.join(argv)}` {how}", *lines]))


def answer(argv: Sequence[str], timeout_s: float = ANSWER_TIMEOUT_S) -> str | None:
    """What a program wrote to stdout, stripped; None when it failed or is not there."""
    try:
        finished = run(argv, timeout_s=timeout_s)
    except UserError:
        return None
    return finished.stdout.strip() if finished.code == 0 else None
