"""What steps find out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CUT_OFF", "DONE", "FAILED", "LEFT_OUT", "Finding", "LeftOut", "Section"]

DONE, FAILED, LEFT_OUT, CUT_OFF = "done", "failed", "left out", "cut off"


class LeftOut(Exception):
    """A step that has nothing to do here; the text says why, to a person."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        value: None where it could not be had, for the reason in `note`.
        note: what the value rests on.
        target: what it should be, in words; empty for a figure that is only told.
        details: what it was worked out from, for the file.
    """

    name: str
    value: float | None
    unit: str = ""
    note: str = ""
    target: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """What one step came to.

    Attributes:
        status: one of the four words of this module.
        message: why it is not done.
    """

    step: str
    title: str
    status: str
    findings: tuple[Finding, ...] = ()
    message: str = ""
    took_s: float = 0.0
