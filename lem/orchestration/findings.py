"""What a check of a host comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FAILED", "OK", "SKIPPED", "WARNING", "Finding", "some_shown"]

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


_MAX_SHOWN = 4


def some_shown(texts: Sequence[str], separator: str = ", ") -> str:
    """The first few texts, and `…` where there are more."""
    return separator.join(texts[:_MAX_SHOWN]) + (" …" if len(texts) > _MAX_SHOWN else "")


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        status: `ok`, `warning`, `failed`, or `skipped` where it does not apply or something before it failed.
        remedy: what to do about it; empty when there is nothing to do.
    """

    status: str
    message: str
    remedy: str = ""
