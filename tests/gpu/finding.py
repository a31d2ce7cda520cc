"""What steps find out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE, FAILED, LEFT_OUT, CUT_OFF = "done", "failed", "left out", "cut off"


class LeftOut(Exception):
    """A step that has nothing to do here; the text says why, to a person."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    value: float | None  # None where it could not be had, for the reason in `note`
    unit: str = ""
    note: str = ""  # what the value rests on
    target: str = ""  # what it should be, in words; empty for a figure that is only told
    details: Mapping[str, Any] = field(default_factory=dict)  # what it was worked out from, for the file


@dataclass(frozen=True)
class Section:
    """What one step came to."""

    step: str
    title: str
    status: str  # one of the four words of this module
    findings: tuple[Finding, ...] = ()
    message: str = ""  # why it is not done
    took_s: float = 0.0
