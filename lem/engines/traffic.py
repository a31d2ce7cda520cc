"""Steady traffic: when requests arrive, and when the window over them opens and closes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from lem.base.clock import seconds_between
from lem.base.dataclass import dataclass
from lem.base.units import NS_PER_S


@dataclass(frozen=True)
class TrafficPlan:
    mode: str  # `poisson` or `constant` (open loop: arrivals do not wait for completions), or `closed`
    target_qps: float  # arrivals a second in the open loop
    concurrency: int  # requests always in flight in the closed loop
    seed: int | str  # of the arrival times
    min_window_s: float
    ramp_limit_s: float  # the longest ramp before the window
    burstiness: float = 1.0  # of `poisson`, see `arrival_offsets_s`

    @property
    def is_open(self) -> bool:
        return self.mode != "closed"


def arrival_offsets_s(mode: str, target_qps: float, rng: random.Random, burstiness: float = 1.0) -> Iterator[float]:
    """Seconds from the start to each arrival, without end: evenly spaced, or a Poisson process (exponential gaps).

    With another burstiness than 1, gaps have a gamma distribution of that shape and the same mean, as in `vllm bench`.
    Another `target_qps` scales the same gaps.
    """
    if mode == "constant":
        for index in itertools.count():
            yield index / target_qps
    elapsed_s = 0.0
    while True:
        gap = -math.log(1 - rng.random()) if burstiness == 1 else rng.gammavariate(burstiness, 1 / burstiness)
        elapsed_s += gap / target_qps
        yield elapsed_s


class WindowRule:
    """When the window over steady traffic opens and closes, and when requests of the open loop arrive.

    The window opens once as many requests were answered as were ever there at the same time (one turnover), at the
    latest after the plan's `ramp_limit_s`. It lasts `min_window_s` and as long as it takes to offer (open loop) or
    answer (closed loop) as many requests as there are prompts.
    """

    def __init__(self, plan: TrafficPlan, prompts: int, begin_ns: int) -> None:
        self.opened_ns: int | None = None
        self.closed_ns: int | None = None
        self.has_turned_over = False
        self._plan = plan
        self._prompts = prompts
        self._begin_ns = begin_ns
        self._peak = self._answered = self._answered_inside = self._succeeded = 0
        self._offsets_s = arrival_offsets_s(plan.mode, plan.target_qps, random.Random(plan.seed), plan.burstiness)
        self._next_ns = self._draw_next()

    @property
    def next_ns(self) -> int:
        """When something happens by itself in the open loop: the next arrival, or the closing."""
        return self._next_ns if self.closed_ns is None else min(self._next_ns, self.closed_ns)

    def arrivals(self, now_ns: int) -> Iterator[int]:
        """The times of requests that have arrived in the open loop since the last call."""
        while self._plan.is_open and self._next_ns <= now_ns:
            if self.closed_ns is not None and self._next_ns > self.closed_ns:
                break
            yield self._next_ns
            self._next_ns = self._draw_next()

    def arrive(self, unanswered: int) -> None:
        """A request arrived; with it so many are unanswered."""
        self._peak = max(self._peak, unanswered)

    def answer(self, finished_ns: int, *, is_good: bool) -> None:
        self._answered += 1
        self._answered_inside += self.opened_ns is not None and finished_ns > self.opened_ns
        self._succeeded += is_good

    def advance(self, now_ns: int) -> None:
        """Open or close the window if it is time."""
        # When every prompt failed, going on would only pile up failures, as fast as the engine makes them.
        fails_as_a_whole = self._succeeded == 0 and self._answered >= max(self._prompts, self._peak)
        if fails_as_a_whole and not self.is_over(now_ns):
            self.opened_ns, self.closed_ns, self.has_turned_over = self._begin_ns, now_ns, True
        elif self.opened_ns is None:
            self.has_turned_over = self._answered >= max(1, self._peak)
            if self.has_turned_over or seconds_between(self._begin_ns, now_ns) >= self._plan.ramp_limit_s:
                self.opened_ns = now_ns
                if self._plan.is_open:
                    length_s = max(self._plan.min_window_s, self._prompts / self._plan.target_qps)
                    self.closed_ns = now_ns + math.ceil(length_s * NS_PER_S)
        elif self.closed_ns is None:
            is_long_enough = seconds_between(self.opened_ns, now_ns) >= self._plan.min_window_s
            if is_long_enough and self._answered_inside >= self._prompts:
                self.closed_ns = now_ns

    def is_over(self, now_ns: int) -> bool:
        return self.closed_ns is not None and now_ns >= self.closed_ns

    def _draw_next(self) -> int:
        return self._begin_ns + math.ceil(next(self._offsets_s) * NS_PER_S)
