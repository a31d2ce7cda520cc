"""Two sides run in turn, so that what a machine does meanwhile meets both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lem.results.bootstrap import log_t_interval

T = TypeVar("T")

TARGET = 0.97


def in_turn(ours: Callable[[], T], theirs: Callable[[], T], pairs: int) -> Iterator[tuple[T, T]]:
    """What both sides give, pair by pair, run in the order ABBA; the first run of each is slower, and left out."""
    ours(), theirs()
    for index in range(pairs):
        order = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        found = {side: side() for side in order}
        yield found[ours], found[theirs]


def told(whose: str, ratios: Sequence[float]) -> str:
    """The line about lem's throughput over that of another: the geometric mean with its interval on logs."""
    interval = log_t_interval(ratios)
    return (
        f"throughput, lem over {whose}: {interval.geometric_mean:.4f} "
        f"({interval.ci_lower:.4f} to {interval.ci_upper:.4f}, 95 % t interval, {len(ratios)} pairs; "
        f"target above {TARGET})"
    )
