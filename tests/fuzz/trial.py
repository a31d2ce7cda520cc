"""What one input does: accepted, refused in words that say where, or a find."""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hypothesis import strategies as st

from tests import command_rig
from tests.command_rig import Output

_LOG = re.compile(r"\(traceback in (.*)\)")


class Outcome(enum.Enum):
    ACCEPTED = "accepted"
    REFUSED = "refused"


class Find(AssertionError):
    """What an input brought to light beside an exception: a bug told by the program, or a refusal without a place."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind  # `traceback`, `place` (a refusal does not say where), `escape` (something written elsewhere)


class Trial(Protocol):
    """One way into the program."""

    def __call__(self, data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
        """How the input was taken; `folder` is the working directory, to be changed at will.

        A thorough trial goes every way that reads this input, not only the one whose turn it is.
        """


@dataclass(frozen=True)
class Surface:
    name: str  # of the folder of its cases
    make_inputs: Callable[[], st.SearchStrategy[bytes]]  # makes the strategy when it is needed
    trial: Trial
    share: int = 1  # of all inputs, relative to the other surfaces
    in_suite: int = 200  # how many inputs the test suite tries: fewer where one of them takes longer


def run_lem(*words: str, expected: Sequence[int] = (0, 2)) -> Output:
    """The command line in this process; a Find when it reports a bug, or an exit code that is not expected."""
    code, out, said = command_rig.run_lem(*words)
    if found := _LOG.search(said):
        log = Path(found[1])
        with contextlib.suppress(OSError):
            said += log.read_text(encoding="utf-8")
            log.unlink()
    if code == 70 or "Traceback (most recent call last)" in said:
        raise Find("traceback", f"lem {' '.join(words)}\n{said}")
    if code not in expected:
        raise Find("traceback", f"lem {' '.join(words)} ended with {code}\n{said}")
    return Output(code, out, said)


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """The file with other bytes in it, for the length of the block; a file that was not there is removed again."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)
