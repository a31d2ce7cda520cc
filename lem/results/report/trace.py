"""Power and temperature over time, thinned to what a plot can show; made from a sample log by whoever may read one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["POWER", "TEMPERATURE", "Band", "Phase", "Series", "Spell", "Trace", "slowed_s", "thin"]

POWER = "power"
TEMPERATURE = "temperature"


@dataclass(frozen=True)
class Band:
    """Something that lasted: load, warm-up, window …, in seconds from the beginning of the first."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Spell:
    """A time in which the GPU was slowed down; `is_fault` when by heat or a power brake, not by its power limit."""

    begin_s: float
    end_s: float
    is_fault: bool
    reason: str


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: whose.
        quantity: `POWER` in watts or `TEMPERATURE` in °C.
        points: (seconds, value) in the order of time; None where readings are missing.
    """

    label: str
    quantity: str
    points: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Phase:
    """A row of the table below the plot; what was not read in it is None."""

    name: str
    begin_s: float
    length_s: float
    power_mean_w: float | None
    power_max_w: float | None
    temp_min_c: float | None
    temp_max_c: float | None
    throttled_s: float | None


@dataclass(frozen=True)
class Trace:
    """One experiment over time."""

    bands: tuple[Band, ...]
    series: tuple[Series, ...]
    spells: tuple[Spell, ...]
    phases: tuple[Phase, ...]
    interval_s: float

    @property
    def slowed_s(self) -> tuple[tuple[float, float], ...]:
        """When a GPU was slowed down for any reason but its power limit: (begin, end), in the order of time."""
        return slowed_s(self.spells)


def slowed_s(spells: Iterable[Spell]) -> tuple[tuple[float, float], ...]:
    """When there was a fault, (begin, end): reasons that hold at the same time are not added up."""
    found: list[tuple[float, float]] = []
    for spell in sorted(spells, key=lambda item: item.begin_s):
        if not spell.is_fault:
            continue
        if found and spell.begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], spell.end_s))
        else:
            found.append((spell.begin_s, spell.end_s))
    return tuple(found)


def thin(
    points: Sequence[tuple[float, float]], n_buckets: int, hole_s: float
) -> tuple[tuple[float, float] | None, ...]:
    """At most twice `n_buckets` points and the holes: of each bucket of time the least and the greatest value.

    Peaks stay where they were, which a mean would flatten; a pause longer than `hole_s` becomes a None.
    """
    if not points:
        return ()
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / n_buckets or 1.0
    found: list[tuple[float, float] | None] = []
    bucket: list[tuple[float, float]] = []
    number = 0
    before: float | None = None
    for point in points:
        is_hole = before is not None and point[0] - before > hole_s
        current = int((point[0] - begin) / width)
        if bucket and (is_hole or current != number):
            found += _extremes(bucket)
            bucket = []
        if is_hole:
            found.append(None)
        bucket.append(point)
        number, before = current, point[0]
    return (*found, *_extremes(bucket))


def _extremes(bucket: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    low = min(bucket, key=lambda point: point[1])
    high = max(bucket, key=lambda point: point[1])
    return [low] if low[1] == high[1] else sorted((low, high))
