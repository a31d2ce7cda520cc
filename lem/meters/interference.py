"""What kept the engine from its CPUs in the window, and whether it, the sampler or the machine stood still."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lem.base.dataclass import dataclass, fields
from lem.base.measurement import INTERFERENCE_FROM, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.attempt import AttemptLog, measured
from lem.meters.curve import NotMeasured, Span
from lem.meters.samples import HOLE_PERIODS, SLOW_PERIOD_S, CpuUse, SampleLog
from lem.record import Interference

# Less of the window, in threads or in CPUs, can hardly have changed it; a ratio of two such times says nothing.
_NEGLIGIBLE = 0.02
# Shorter pauses of the sampler or the engine are the scheduler's, and shorter suspensions the clocks'.
_SHORTEST_HOLE_S = 1.0
_SHORTEST_STARVING_S = 3.0
_NOTHING_RUN = 0.02  # a thread of lem's own in the engine may get a moment
_ASLEEP_S = 0.1

# The keys of `CpuShares.causes_s` in words.
_CAUSES = {
    "others": "by other programs",
    "limit": "by a CPU limit (cgroup)",
    "hypervisor": "by the hypervisor (steal)",
    "own": "by threads of its own",
}


@dataclass(frozen=True)
class CpuShares:
    """How the CPU time between two moments was shared, in CPU seconds; None: not known."""

    elapsed_s: float
    busy_s: float
    idle_s: float
    steal_s: float
    own_s: float | None
    run_s: float | None
    wait_s: float | None
    throttled_s: float | None

    @property
    def foreign_s(self) -> float | None:
        return None if self.own_s is None else max(0.0, self.busy_s - self.own_s)

    @property
    def foreign_ratio(self) -> float | None:
        if self.foreign_s is None:
            return None
        return self.foreign_s / self.busy_s if self.foreign_s > _NEGLIGIBLE * self.elapsed_s else 0.0

    @property
    def causes_s(self) -> Mapping[str, float]:
        """For how long the engine's threads waited, by cause."""
        # Run-queue delay includes what a CPU limit took on some kernels and not on others, so the larger one counts. A
        # CPU that runs another program for a second delays the threads in its queue by a second each; what is beyond
        # that is their own competition. Steal is the engine's in proportion to its part of the load.
        if self.run_s is None or self.wait_s is None:
            return {}
        throttled_s = self.throttled_s or 0.0
        queued_s = max(0.0, self.wait_s - throttled_s)
        cpu_s = self.busy_s + self.idle_s + self.steal_s
        queue = max(1.0, (self.run_s + queued_s) / cpu_s) if cpu_s else 1.0
        others_s = queued_s if self.foreign_s is None else min(queued_s, queue * self.foreign_s)
        steal_s = self.steal_s * min(1.0, self.run_s / self.busy_s) if self.busy_s else 0.0
        return {"others": others_s, "limit": throttled_s, "hypervisor": steal_s, "own": queued_s - others_s}

    def wait_ratio(self, *, with_own: bool = True) -> float | None:
        """The share of the time in which the engine's threads wanted a CPU and had none; 0 when it is negligible."""
        if self.run_s is None or self.wait_s is None:
            return None
        causes_s = self.causes_s
        waited_s = sum(causes_s.values()) - (0.0 if with_own else causes_s["own"])
        if waited_s <= _NEGLIGIBLE * self.elapsed_s:
            return 0.0
        return waited_s / (self.run_s + sum(causes_s.values()))

    @property
    def steal_ratio(self) -> float | None:
        cpu_s = self.busy_s + self.idle_s + self.steal_s
        return self.steal_s / cpu_s if cpu_s else None


def shares_in(usage: Sequence[CpuUse], span: Span) -> CpuShares:
    names = (item.name for item in fields(CpuShares) if item.name != "elapsed_s")
    grown: dict[str, Any] = {name: _growth(usage, name, span) for name in names}
    if grown["busy_s"] is None:
        raise NotMeasured("usage_not_read")
    return CpuShares(span.seconds, **grown)


def interference_now(latest: Sequence[CpuUse]) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {"wait_pct": None, "foreign_pct": None}
    if len(latest) > 1:
        shares = shares_in(latest, Span(latest[0].at_ns, latest[-1].at_ns))
        ratios = {"wait_pct": shares.wait_ratio(with_own=False), "foreign_pct": shares.foreign_ratio}
    return {name: None if ratio is None else 100 * ratio for name, ratio in ratios.items()}


def _growth(usage: Sequence[CpuUse], name: str, span: Span) -> float | None:
    points = [(row.at_ns, value) for row in usage if (value := getattr(row, name)) is not None]
    before, after = _at(points, span.opened_ns), _at(points, span.closed_ns)
    return None if len(points) < 2 or before is None or after is None else max(0.0, after - before)


def _at(points: Sequence[tuple[int, float]], at_ns: int) -> float | None:
    for (before_ns, before), (after_ns, after) in pairwise(points):
        if before_ns <= at_ns <= after_ns:
            share = (at_ns - before_ns) / (after_ns - before_ns) if after_ns > before_ns else 0.0
            return before + share * (after - before)
    near = [point for point in points if abs(point[0] - at_ns) <= 2 * SLOW_PERIOD_S * NS_PER_S]
    return min(near, key=lambda point: abs(point[0] - at_ns))[1] if near else None


def describe_interference(log: SampleLog, span: Span) -> Interference:
    pause_s = known(sampler_pause_s(log, span), "window_not_sampled")
    shares = measured(lambda: shares_in(log.usage, span)).value
    if shares is None:
        nothing = Interference.absent(Reason.of("usage_not_read"))
        given = {name: nothing.measured(name) for name in nothing.null_reasons}
        return Interference.of(**{**given, "sampler_pause_max_s": pause_s})
    why_not = Reason.of("engine_not_watched" if shares.own_s is None else "threads_not_read")
    return Interference.of(
        wait_ratio=known(shares.wait_ratio(), why_not),
        wait_by_others_ratio=known(shares.wait_ratio(with_own=False), why_not),
        foreign_ratio=known(shares.foreign_ratio, why_not),
        steal_ratio=known(shares.steal_ratio, "usage_not_read"),
        throttled_s=known(shares.throttled_s, why_not),
        stopped_s=known(_growth(log.usage, "stopped_s", span), why_not),
        suspended_s=suspended_s(log, span),
        sampler_pause_max_s=pause_s,
    )


def sampler_pause_s(log: SampleLog, window: Span) -> float | None:
    times = sorted(row.at_ns for row in log.rows())
    pauses = (b - a for a, b in pairwise(times) if a < window.closed_ns and b > window.opened_ns)
    longest_ns = max(pauses, default=None)
    if longest_ns is None:
        return None
    # Where nothing was written after the end of the window, or before its begin.
    return max(longest_ns, times[0] - window.opened_ns, window.closed_ns - times[-1]) / NS_PER_S


def suspended_s(log: SampleLog, span: Span) -> float:
    inside = (it for it in pairwise(log.usage) if it[0].at_ns < span.closed_ns and it[1].at_ns > span.opened_ns)
    steps_s = (after.asleep_s - before.asleep_s for before, after in inside)
    return math.fsum(step_s for step_s in steps_s if step_s > _ASLEEP_S)


def starved_s(usage: Sequence[CpuUse], window: Span) -> float:
    """The longest time in which threads of the engine were ready and none of them got a CPU."""
    # The kernel adds up a thread's delay when it gets a CPU at last, so that the reading after the pause tells.
    rows = [row for row in usage if row.run_s is not None and row.wait_s is not None]
    longest_s, begin = 0.0, None
    for before, after in pairwise(rows):
        if before.at_ns >= window.closed_ns or after.at_ns <= window.opened_ns:
            continue
        elapsed_s = (after.at_ns - before.at_ns) / NS_PER_S
        has_run = (after.run_s or 0.0) - (before.run_s or 0.0) > _NOTHING_RUN * elapsed_s
        begin = begin or before
        paused_s = (before.at_ns - begin.at_ns) / NS_PER_S
        if has_run or after is rows[-1]:
            waited_s = (after.wait_s or 0.0) - (begin.wait_s or 0.0)
            longest_s = max(longest_s, paused_s if waited_s >= paused_s else 0.0)
            begin = after
    return longest_s


def holes(attempt: AttemptLog, span: Span, found: Interference) -> Iterator[Reason]:
    if found.suspended_s:
        yield Reason.of("host_suspended", suspended_s=found.suspended_s)
    if found.stopped_s:
        yield Reason.of("engine_stopped", stopped_s=found.stopped_s)
    if (longest_s := starved_s(attempt.log.usage, span)) >= _SHORTEST_STARVING_S:
        yield Reason.of("engine_starved", starved_s=longest_s)
    is_fast = attempt.sources.gpus and attempt.sources.is_watched
    period_s = attempt.sources.sample_period_s if is_fast else float(SLOW_PERIOD_S)
    most_s = max(HOLE_PERIODS * period_s, _SHORTEST_HOLE_S)
    if found.sampler_pause_max_s is not None and found.sampler_pause_max_s > most_s:
        yield Reason.of("sampler_starved", pause_s=found.sampler_pause_max_s, most_s=most_s)


def waited_too_long(attempt: AttemptLog, found: Interference) -> Iterator[Reason]:
    limit = attempt.sources.max_wait_ratio
    if limit is not None and (found.wait_by_others_ratio or 0.0) > limit:
        yield Reason.of("engine_waited_too_long", **_wait_data(attempt, found), limit=100 * limit)


def interference_warnings(attempt: AttemptLog, found: Interference) -> Iterator[Reason]:
    if (found.wait_by_others_ratio or 0.0) > INTERFERENCE_FROM:
        if not any(waited_too_long(attempt, found)):
            yield Reason.of("engine_waited", **_wait_data(attempt, found))
    elif (found.wait_ratio or 0.0) > INTERFERENCE_FROM:
        yield Reason.of("threads_compete", share=found.wait_ratio)
    if (found.foreign_ratio or 0.0) > INTERFERENCE_FROM:
        yield Reason.of("foreign_cpu", share=found.foreign_ratio)


def _wait_data(attempt: AttemptLog, found: Interference) -> dict[str, Any]:
    causes_s = shares_in(attempt.log.usage, attempt.window).causes_s
    total_s = sum(causes_s.values())
    parts = sorted(((part_s / total_s, _CAUSES[cause]) for cause, part_s in causes_s.items()), reverse=True)
    named = [f"{share:.0%} {cause}" for share, cause in parts if share >= INTERFERENCE_FROM]
    return {"share": found.wait_ratio, "causes": ", ".join(named)}


def refuse_foreign(attempt: AttemptLog, found: Interference) -> None:
    limit = attempt.sources.max_foreign_ratio
    if limit is not None and (found.foreign_ratio or 0.0) > limit:
        raise NotMeasured("foreign_cpu_energy", share=found.foreign_ratio, limit=100 * limit)
