"""What a campaign tells while it runs; the command line decides how a person or a program sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "Observer"]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: `campaign_started`, `note` (text for a person), `gap`, `experiment_started`, `phase`, `progress`,
            `experiment_retried`, `experiment_completed`, `experiment_failed`, `experiment_interrupted`, `tick`
            (nothing new), `campaign_finished`.
        done, total: experiments ended and planned.
        eta_s: seconds to the end, from the experiments measured so far; None before there is one.
        data: what belongs to the kind, as JSON values.
    """

    kind: str
    done: int
    total: int
    eta_s: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]
