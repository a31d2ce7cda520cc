"""What a check of a host comes to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAILED", "OK", "SKIPPED", "WARNING", "Finding"]

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


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
