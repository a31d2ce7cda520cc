"""The pause between two experiments, in which the device goes back to how the one before it began."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lem.reasons import Reason

__all__ = [
    "CAP_REACHED",
    "INTERRUPTED",
    "NO_GAP",
    "NO_SENSORS",
    "RECOVERED",
    "GapOutcome",
    "RecoveryProbe",
    "keep_gap",
]

# Why a gap ended, as the record's `gap_end_reason` says it.
RECOVERED = Reason.of("gap_recovered")
CAP_REACHED = Reason.of("gap_cap_reached")
NO_SENSORS = Reason.of("gap_no_sensors")
NO_GAP = Reason.of("gap_none")
INTERRUPTED = Reason.of("gap_interrupted")

POLL_S = 1.0

RecoveryProbe = Callable[[], "bool | None"]
"""Whether temperature and power are back at the reference of this state; None while the sensors give no answer."""


class GapOutcome(NamedTuple):
    """How long a gap took in seconds, and why it ended."""

    gap_s: float
    reason: Reason


def keep_gap(
    cap_s: float,
    *,
    is_recovered: RecoveryProbe | None,
    monotonic: Callable[[], float],
    wait: Callable[[float], bool],
    poll_s: float = POLL_S,
) -> GapOutcome:
    """How the gap went: it ends once the device is back, at the latest after `cap_s` seconds.

    Without a probe, or with one that never answers, it is the whole gap.

    Args:
        is_recovered: asked first at once and then every `poll_s` seconds; None on a host without sensors.
        monotonic: seconds that never go back.
        wait: sleeps that many seconds, less when the campaign is asked to stop; whether it was.
    """
    started_s = monotonic()
    if cap_s <= 0:
        return GapOutcome(0.0, NO_GAP)
    has_answered = False
    while True:
        answer = is_recovered() if is_recovered is not None else None
        has_answered = has_answered or answer is not None
        elapsed_s = monotonic() - started_s
        if answer:
            return GapOutcome(elapsed_s, RECOVERED)
        left_s = cap_s - elapsed_s
        if left_s <= 0:
            return GapOutcome(elapsed_s, CAP_REACHED if has_answered else NO_SENSORS)
        if wait(left_s if is_recovered is None else min(poll_s, left_s)):
            return GapOutcome(monotonic() - started_s, INTERRUPTED)
