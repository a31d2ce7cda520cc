"""Energy against time, and its value at a window's edges."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from lem.base.dataclass import dataclass, replace
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.samples import HOLE_PERIODS, CounterChange, CpuLoad, CpuUse, GpuSample, GpuSecond

# Energy interpolated over more than this share of a span is no measurement of it any more.
_MOST_OF_SPAN = 0.05

# How the two views on a window's end are weighed: by how much power changes from one update to the next, and how long
# a device takes to near rest. Over 200 random traces (tests/bench/energy_error.py) halving or doubling either keeps the
# error within its limit.
_LOAD_CHANGES = 0.1
_RELAXES_S = 0.05


class NotMeasured(Exception):
    def __init__(self, reason: Reason | str, /, **data: Any) -> None:
        self.reason = Reason.of(reason, **data) if isinstance(reason, str) else reason
        super().__init__(self.reason.text)


@dataclass(frozen=True)
class Span:
    opened_ns: int
    closed_ns: int

    @property
    def seconds(self) -> float:
        return (self.closed_ns - self.opened_ns) / NS_PER_S


@dataclass(frozen=True)
class ClosedWindow:
    """A window with idle guards: work begins after the first and is over before the second."""

    window: Span
    before: Span
    after: Span
    idle_power_w: float | None = None  # at rest with the engine loaded, for guards too short to show it


@dataclass(frozen=True)
class Hole:
    span: Span
    reason: Reason


@dataclass(frozen=True)
class _View:
    knot_ns: float
    energy_j: float
    power_w: float
    variance: float = 0.0


@dataclass(frozen=True)
class Curve:
    what: str  # the meter, in reasons
    earliest_ns: tuple[int, ...]  # each knot lies between this and `latest_ns`
    at_ns: tuple[float, ...]  # the best guess
    latest_ns: tuple[int, ...]
    energy_j: tuple[float, ...]  # never falls
    holes: tuple[Hole, ...] = ()  # knots on both sides of a hole have no energy in common
    lag_s: float = 0.0  # for so long after a window, its readings may still belong to the window
    error: str = ""  # the meter's last error; empty when it could always be read
    period_s: float = 0.0  # how far apart knots may lie if the meter is read on a schedule; 0: as they usually do

    def between_j(self, span: Span) -> float:
        """The energy of the span, edges interpolated; NotMeasured: a hole, or an edge without readings around it."""
        # A naive difference of the values read at the edges of 1 s is off by up to 9 % with an update every 0.1 s,
        # since each value is up to one update old.
        first, last = self._place(span.opened_ns), self._place(span.closed_ns)
        self._check_whole(Span(int(self.at_ns[first - 1]), int(self.at_ns[last])))
        self._check_edges(span, span.opened_ns, span.closed_ns)
        return self._interpolate(last, span.closed_ns) - self._interpolate(first, span.opened_ns)

    def value_j(self, at_ns: int) -> float:
        return self._interpolate(self._place(at_ns), at_ns)

    def doubt_at(self, at_ns: int) -> tuple[float, float]:
        """How uncertain the times of the knots around a moment are, in s, and the power between them, in W."""
        place = self._place(at_ns)
        width_ns = max(self.latest_ns[knot] - self.earliest_ns[knot] for knot in (place - 1, place))
        return width_ns / NS_PER_S, self._power_w(place - 1, place)

    def closed_j(self, closed: ClosedWindow) -> float:
        """The energy of a window with idle guards; raises as `between_j`."""
        # It opens at rest: the last knot of the guard before it, plus power at rest from there on. How it closes is
        # seen from both sides, and both are weighed by their variance. From inside: the last knot of the window, plus
        # the power of the last update from there on; wrong where the work ends unevenly. From outside: the first knot
        # of the guard, less the guard's own power up to there; too much by what the device took to relax, since power
        # does not fall at once. The second therefore bounds the first.
        opening_ns, opening_j = self._opening(closed)
        closing_ns, closing_j = self._closing(closed)
        self._check_whole(Span(int(opening_ns), int(closing_ns)))
        return closing_j - opening_j

    def closing_doubt_j(self, closed: ClosedWindow) -> float:
        inside, outside = self._seen_from_inside(closed), self._seen_from_outside(closed)
        return abs(outside.energy_j - inside.energy_j) if inside and outside else 0.0

    def mean_power_w(self, span: Span) -> float:
        if span.closed_ns <= span.opened_ns:
            raise NotMeasured("span_empty", what=self.what)
        return self.between_j(span) / span.seconds

    def guard_power_w(self, guard: Span) -> float | None:
        inside = self._inside(guard)
        return self._power_w(inside[-2], inside[-1]) if len(inside) > 1 else None

    def whole_inside(self, span: Span) -> Span | None:
        inside = self._inside(span)
        return Span(int(self.at_ns[inside[0]]), int(self.at_ns[inside[-1]])) if len(inside) > 1 else None

    def count_in(self, span: Span) -> int:
        return len(self._inside(span))

    def spacing_s(self, at_ns: int) -> float:
        """How far apart the knots on both sides of a moment lie; `NotMeasured` beyond the first and last knot."""
        place = self._place(at_ns)
        return (self.at_ns[place] - self.at_ns[place - 1]) / NS_PER_S

    @cached_property
    def usual_spacing_s(self) -> float:
        return statistics.median(after - before for before, after in pairwise(self.at_ns)) / NS_PER_S

    def _opening(self, closed: ClosedWindow) -> tuple[float, float]:
        opened_ns = closed.window.opened_ns
        inside = self._inside(Span(closed.before.opened_ns, opened_ns))
        # What ran before the guard may still be relaxing in it, so its own power is at most taken for power at rest.
        known_w = [item for item in (self.guard_power_w(closed.before), closed.idle_power_w) if item is not None]
        if not inside or not known_w:
            place = self._place(opened_ns)
            self._check_edges(closed.window, opened_ns)
            return self.at_ns[place - 1], self._interpolate(place, opened_ns)
        knot = inside[-1]
        return self.at_ns[knot], self.energy_j[knot] + min(known_w) * (opened_ns - self.at_ns[knot]) / NS_PER_S

    def _closing(self, closed: ClosedWindow) -> tuple[float, float]:
        inside, outside = self._seen_from_inside(closed), self._seen_from_outside(closed)
        if inside is None or outside is None:
            if view := inside or outside:
                return view.knot_ns, view.energy_j
            place, closed_ns = self._place(closed.window.closed_ns), closed.window.closed_ns
            self._check_edges(closed.window, closed_ns)
            return self.at_ns[place], self._interpolate(place, closed_ns)
        outside_variance = (_RELAXES_S * (inside.power_w - outside.power_w)) ** 2
        total = inside.variance + outside_variance
        share = outside_variance / total if total > 0 else 0.0
        return outside.knot_ns, min(outside.energy_j, share * inside.energy_j + (1 - share) * outside.energy_j)

    def _seen_from_inside(self, closed: ClosedWindow) -> _View | None:
        """The energy at the closing by the last two knots of the window; None without them, or where they lag."""
        # Power is taken to go on for an update that was missed, and no longer.
        within = self._inside(closed.window)
        if self.lag_s or len(within) < 2:
            return None
        last = within[-1]
        power_w, left_s = self._power_w(last - 1, last), (closed.window.closed_ns - self.at_ns[last]) / NS_PER_S
        if left_s > 2 * (self.at_ns[last] - self.at_ns[last - 1]) / NS_PER_S:
            return None
        placed_s = (self.latest_ns[last] - self.earliest_ns[last]) / NS_PER_S / math.sqrt(12)  # sd of a uniform one
        variance = (power_w * placed_s) ** 2 + (_LOAD_CHANGES * power_w * left_s) ** 2
        return _View(self.at_ns[last], self.energy_j[last] + power_w * left_s, power_w, variance)

    def _seen_from_outside(self, closed: ClosedWindow) -> _View | None:
        """The energy at the closing by the first knot of the guard; None without it, or without a power at rest."""
        closed_ns = closed.window.closed_ns
        behind = self._inside(Span(closed_ns + round(self.lag_s * NS_PER_S), closed.after.closed_ns))
        own_w = self.guard_power_w(closed.after)
        power_w = closed.idle_power_w if own_w is None else own_w
        if not behind or power_w is None:
            return None
        since_s = (self.at_ns[behind[0]] - closed_ns) / NS_PER_S
        return _View(self.at_ns[behind[0]], self.energy_j[behind[0]] - power_w * since_s, power_w)

    def _power_w(self, first: int, last: int) -> float:
        return (self.energy_j[last] - self.energy_j[first]) / (self.at_ns[last] - self.at_ns[first]) * NS_PER_S

    def _inside(self, span: Span) -> range:
        return range(bisect_left(self.earliest_ns, span.opened_ns), bisect_right(self.latest_ns, span.closed_ns))

    def _place(self, at_ns: int) -> int:
        detail = f" ({self.error})" if self.error else ""
        if len(self.at_ns) < 2:
            raise NotMeasured("read_once", what=self.what, times=len(self.at_ns), detail=detail)
        if at_ns < self.at_ns[0]:
            raise NotMeasured("read_late", what=self.what, late_s=(self.at_ns[0] - at_ns) / NS_PER_S, detail=detail)
        if at_ns > self.at_ns[-1]:
            detail = detail or "; the sampler had ended, or hung"
            raise NotMeasured("read_early", what=self.what, early_s=(at_ns - self.at_ns[-1]) / NS_PER_S, detail=detail)
        return max(1, bisect_left(self.at_ns, at_ns))

    def _interpolate(self, place: int, at_ns: int) -> float:
        before_ns, after_ns = self.at_ns[place - 1], self.at_ns[place]
        share = (at_ns - before_ns) / (after_ns - before_ns)
        return self.energy_j[place - 1] + share * (self.energy_j[place] - self.energy_j[place - 1])

    def _check_edges(self, span: Span, *edges_ns: int) -> None:
        gap_s = max(self.spacing_s(at_ns) for at_ns in edges_ns)
        if gap_s > HOLE_PERIODS * max(self.period_s, self.usual_spacing_s) and gap_s > _MOST_OF_SPAN * span.seconds:
            raise NotMeasured("edge_not_read", what=self.what, gap_s=gap_s, span_s=span.seconds)

    def _check_whole(self, span: Span) -> None:
        for hole in self.holes:
            if min(hole.span.closed_ns, span.closed_ns) > max(hole.span.opened_ns, span.opened_ns):
                raise NotMeasured(hole.reason)


# Enough updates on either side of one for polls that share no rhythm with the counter to have seen it at every phase:
# 19 polls of 19 ms, whatever whole number of milliseconds lies between updates.
_NEIGHBOURS = 10

# More than any GPU draws whose limit is lower or unknown, and an update more or less within a step.
_MOST_GPU_W, _LIMIT_MARGIN, _UPDATE_S = 1000.0, 1.2, 0.1

_MEAN_S = 1.0  # of nvmlDeviceGetPowerUsage and field 185
_MEAN_LATE_S = 0.2


def counter_curve(
    changes: Iterable[CounterChange],
    gpu: int,
    what: str,
    ranges_j: Sequence[float] = (),
    limit_w: float | None = None,
) -> Curve:
    """The energy counter of one GPU of the log, without its wraps at one of `ranges_j`."""
    # `nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded (NVML reference), so a value
    # that falls means that the driver was reloaded. A change lies between two polls; where polling had stalled, it
    # still came at most one update period before it was seen. Updates are regular (an H200 kept 100.000 ms to within 1
    # ms over a minute), so the changes around one narrow down when it came.
    rows = [row for row in changes if row.gpu == gpu and row.before_ns < row.at_ns]
    spacings = [after.at_ns - before.at_ns for before, after in pairwise(rows)]
    longest_ns = round(statistics.median(spacings)) if spacings else 0
    seen = [(max(row.before_ns, row.at_ns - longest_ns) if longest_ns else row.before_ns, row.at_ns) for row in rows]
    bounds = _narrowed(seen)
    energy_j, holes = [0.0] * len(rows), []
    most_w, largest_j = (
        max(_MOST_GPU_W, _LIMIT_MARGIN * (limit_w or 0.0)),
        max((it.energy_mj for it in rows), default=0) / 1000,
    )
    # The smallest range that holds what was read; a counter beyond all of them counts its wraps itself, if it is read.
    range_j = next((it for it in sorted(ranges_j) if it >= largest_j), max(ranges_j, default=math.inf))
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        step_j = _step_j(before, after, ranges_j, most_w)
        unread_s = (after.at_ns - after.before_ns) / NS_PER_S
        if unread_s * most_w > range_j:
            holes.append(Hole(Span(before.at_ns, after.at_ns), Reason.of("zone_hole", what=what, gap_s=unread_s)))
        if step_j < 0:
            fall = Reason.of("counter_reset", what=what, before_mj=before.energy_mj, after_mj=after.energy_mj)
            holes.append(Hole(Span(before.at_ns, after.at_ns), fall))
        energy_j[place] = energy_j[place - 1] + max(step_j, 0.0)
    at_ns = tuple((low + high) / 2 for low, high in bounds)
    earliest, latest = tuple(low for low, _ in bounds), tuple(high for _, high in bounds)
    return Curve(what, earliest, at_ns, latest, tuple(energy_j), tuple(holes))


def _step_j(before: CounterChange, after: CounterChange, ranges_j: Sequence[float], most_w: float) -> float:
    """The energy between two values; below 0 if the counter fell, and that is not its wrap."""
    step_j = (after.energy_mj - before.energy_mj) / 1000
    most_j = most_w * ((after.at_ns - before.at_ns) / NS_PER_S + _UPDATE_S)
    wraps = (step_j + it for it in sorted(ranges_j) if before.energy_mj <= 1000 * it and 0 <= step_j + it <= most_j)
    return step_j if step_j >= 0 else next(wraps, step_j)


def _narrowed(seen: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """When each change came, (earliest, latest), by its own two polls and by those of its neighbours."""
    # Regular updates lie on a line, so what bounds one bounds the next ones, a period later each. Where updates are
    # less regular than polls are dense, neighbours contradict each other, and the bounds are as wide as the
    # contradiction.
    if len(seen) <= 2 * _NEIGHBOURS:
        return list(seen)
    middles = [(low + high) / 2 for low, high in seen]
    usual_ns = statistics.median(after - before for before, after in pairwise(middles))
    if usual_ns < 2 * statistics.median(high - low for low, high in seen):
        return list(seen)  # polls are too far apart to count the updates between two changes
    counts = [0]
    for before, after in pairwise(middles):
        counts.append(counts[-1] + max(1, round((after - before) / usual_ns)))
    period_ns = statistics.linear_regression(counts, [middle - seen[0][0] for middle in middles]).slope
    lows = [low - count * period_ns for (low, _), count in zip(seen, counts, strict=True)]
    highs = [high - count * period_ns for (_, high), count in zip(seen, counts, strict=True)]
    bounds = []
    for place, (low, high) in enumerate(seen):
        around = slice(max(0, place - _NEIGHBOURS), place + _NEIGHBOURS + 1)
        since_ns = counts[place] * period_ns
        first, last = sorted((max(lows[around]) + since_ns, min(highs[around]) + since_ns))
        bounds.append((round(min(max(first, low), high)), round(max(min(last, high), low))))
    return bounds


def power_curve(samples: Iterable[GpuSample], gpu: int, period_s: float, what: str, lag_s: float = 0.0) -> Curve:
    """The integral of a GPU's sampled power by trapezoids; more than three periods without a sample are a hole."""
    # A sensor that sees 25 of every 100 ms (A100, H100) aliases load with a rhythm near 10 Hz, and no sum over its
    # samples undoes that (Yang et al., SC24).
    rows = [(row.at_ns, row.power_w) for row in samples if row.gpu == gpu and row.power_w is not None]

    def why(gap_s: float) -> Reason:
        return Reason.of("power_hole", what=what, gap_s=gap_s, periods=HOLE_PERIODS, period_s=period_s)

    return replace(trapezoids(what, rows, HOLE_PERIODS * period_s, why), lag_s=lag_s, period_s=period_s)


def mean_power_curve(seconds: Iterable[GpuSecond], gpu: int, what: str) -> Curve:
    """The energy of a GPU by means over a second, read once a second; its edges are sharp at knots alone."""
    # A mean that was read late leaves out what came before its second, so that there is a hole.
    rows = [row for row in seconds if row.gpu == gpu and row.average_w is not None]
    energy_j = [0.0] * len(rows)
    holes = []
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        length_s = (after.at_ns - before.at_ns) / NS_PER_S
        energy_j[place] = energy_j[place - 1] + (after.average_w or 0.0) * length_s
        if length_s > _MEAN_S + _MEAN_LATE_S:
            holes.append(Hole(Span(before.at_ns, after.at_ns), Reason.of("mean_hole", what=what, gap_s=length_s)))
    return exact(what, [row.at_ns for row in rows], energy_j, holes)


def trapezoids(what: str, rows: Sequence[tuple[int, float]], longest_s: float, why: Callable[[float], Reason]) -> Curve:
    energy_j, holes = [0.0] * len(rows), []
    for place, ((before_ns, before_w), (after_ns, after_w)) in enumerate(pairwise(rows), start=1):
        length_s = (after_ns - before_ns) / NS_PER_S
        if length_s > longest_s:
            holes.append(Hole(Span(before_ns, after_ns), why(length_s)))
        energy_j[place] = energy_j[place - 1] + (before_w + after_w) / 2 * length_s
    return exact(what, [at_ns for at_ns, _ in rows], energy_j, holes)


def load_curve(loads: Sequence[CpuLoad], design_power_w: float, what: str) -> Curve:
    """What the CPU would take by its load alone: its design power times the share of its time that was busy."""
    rows = [row for place, row in enumerate(loads) if place == 0 or row.busy_ratio is not None]
    energy_j = [0.0] * len(rows)
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        busy_s = (after.busy_ratio or 0.0) * (after.at_ns - before.at_ns) / NS_PER_S
        energy_j[place] = energy_j[place - 1] + design_power_w * busy_s
    return exact(what, [row.at_ns for row in rows], energy_j, [])


def own_load_curve(usage: Sequence[CpuUse], design_power_w: float, what: str) -> Curve:
    """An estimate and no measurement: the design power times the share of all CPU time that the engine and lem had.

    There is no share of an engine before its first reading, and 0 is added until then.
    """
    first = next((place for place, row in enumerate(usage) if row.own_s is not None), len(usage))
    rows = [row for place, row in enumerate(usage) if place < first or row.own_s is not None]
    energy_j = [0.0] * len(rows)
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        cpu_s = sum(getattr(after, name) - getattr(before, name) for name in ("busy_s", "idle_s", "steal_s"))
        own_s = 0.0 if before.own_s is None or after.own_s is None else max(0.0, after.own_s - before.own_s)
        share = min(1.0, own_s / cpu_s) if cpu_s > 0 else 0.0
        energy_j[place] = energy_j[place - 1] + design_power_w * share * (after.at_ns - before.at_ns) / NS_PER_S
    return exact(what, [row.at_ns for row in rows], energy_j, [])


def update_period_s(changes: Iterable[CounterChange], gpu: int, span: Span) -> float:
    """How often the counter of a GPU is updated, from a span under load; `NotMeasured` for fewer than three changes."""
    # The mean spacing of the changes, without those longer than one and a half times the median by more than polls lie
    # apart, where one was missed. It is the resolution of the counter (20 to 100 ms seen, 500 ms a documented default).
    in_span = (row for row in changes if row.gpu == gpu and span.opened_ns <= row.at_ns <= span.closed_ns)
    rows = [row for row in in_span if row.before_ns < row.at_ns]
    spacings = [after.at_ns - before.at_ns for before, after in pairwise(rows)]
    if len(spacings) < 2:
        raise NotMeasured("counter_slow")
    longest_ns = 1.5 * statistics.median(spacings) + statistics.median(row.at_ns - row.before_ns for row in rows)
    return statistics.fmean(item for item in spacings if item <= longest_ns) / NS_PER_S


def exact(what: str, at_ns: Sequence[int], energy_j: Sequence[float], holes: Sequence[Hole]) -> Curve:
    times = tuple(at_ns)
    return Curve(what, times, times, times, tuple(energy_j), tuple(holes))
