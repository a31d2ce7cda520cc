"""Traffic: requests that arrive while the engine works.

An arrival is a moment, not an act. In the open loop the moments follow from rate and seed alone, and a request is there
for the engine from its moment on, whatever the engine is doing; latency counts from that moment. No thread hands
requests over: it would share the interpreter with the engine, run late whenever the engine computes, and hide exactly
the waiting that is to be measured ("coordinated omission", Tene 2013). In the closed loop a request arrives when an
answer is handed in.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lem.base.clock import Clock, seconds_between
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.engines.protocol import Completion, Engine, TokenRequest
from lem.worker.window import Arrival, MeasuredWindow, SteadyBooks, check_completion

OPEN_MODES = ("poisson", "constant")

# The longest single wait for an arrival, so that a change made meanwhile by another thread of the engine is seen.
MAX_WAIT_S = 0.5


@dataclass(frozen=True)
class TrafficPlan:
    """How requests arrive, and how long the window is.

    Attributes:
        mode: `poisson` or `constant` (open loop), or `closed`.
        target_qps: arrivals a second in the open loop.
        concurrency: requests always in flight in the closed loop.
        seed: of the arrival times; None draws others each time.
        min_window_s: the least length of the window.
        ramp_limit_s: the longest ramp before it.
    """

    mode: str
    target_qps: float
    concurrency: int
    seed: int | None
    min_window_s: float
    ramp_limit_s: float

    @property
    def is_open(self) -> bool:
        """Whether requests arrive regardless of completions."""
        return self.mode in OPEN_MODES


def arrival_offsets_s(mode: str, target_qps: float, rng: random.Random) -> Iterator[float]:
    """Seconds from the start to each arrival, without end: evenly spaced, or a Poisson process (exponential gaps)."""
    if mode == "constant":
        for index in itertools.count():
            yield index / target_qps
    elapsed_s = 0.0
    while True:
        elapsed_s -= math.log(1 - rng.random()) / target_qps
        yield elapsed_s


def measure_traffic(
    engine: Engine,
    requests: Sequence[TokenRequest],
    plan: TrafficPlan,
    clock: Clock,
    report: Callable[[int], None],
) -> MeasuredWindow:
    """The window of steady traffic, opened and closed under load.

    Requests arrive from the start; the window opens once as many were completed as were ever there at the same time
    (one turnover), at the latest after `ramp_limit_s`. It lasts `min_window_s` and as long as it takes to offer (open
    loop) or answer (closed loop) as many requests as there are prompts. Then nothing more is handed out, and what the
    engine is working on is finished.

    Args:
        report: told the number of requests completed so far.

    Raises:
        EngineError: the engine failed, or answered a request twice, or one that it had not.
    """
    queue = TrafficQueue(requests, plan, clock, report)
    engine.serve(queue)
    engine.synchronize()
    return queue.close_books()


def serve_all(engine: Engine, requests: Sequence[TokenRequest]) -> list[Completion]:
    """The completions of requests that are all there from the start, served as traffic is."""
    queue = PreparedQueue(requests)
    engine.serve(queue)
    return queue.completions


class PreparedQueue:
    """A `RequestQueue` that is full at the start and closed."""

    def __init__(self, requests: Sequence[TokenRequest]) -> None:
        self.completions: list[Completion] = []
        self._lock = threading.Lock()
        self._waiting = deque(requests)

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        """Up to `limit` of the requests left."""
        with self._lock:
            return tuple(self._waiting.popleft() for _ in range(min(limit, len(self._waiting))))

    def complete(self, completion: Completion) -> None:
        """Keep a completion."""
        with self._lock:
            self.completions.append(completion)


class TrafficQueue:
    """A `RequestQueue` of requests that arrive by time or by completion, and the window over them. Thread-safe."""

    def __init__(
        self, requests: Sequence[TokenRequest], plan: TrafficPlan, clock: Clock, report: Callable[[int], None]
    ) -> None:
        self._prompts = tuple(requests)
        self._plan = plan
        self._clock = clock
        self._report = report
        self._changed = threading.Condition()
        self._waiting: deque[Arrival] = deque()
        self._in_flight: dict[int, Arrival] = {}
        self._answered: list[tuple[Arrival, Completion]] = []
        self._arrived_ns: list[int] = []
        self._peak = 0
        self._begin_ns = clock.monotonic_ns()
        self._opened_ns: int | None = None
        self._closed_ns: int | None = None
        self._answered_inside = 0
        self._succeeded = 0
        self._has_turned_over = False
        self._offsets_s = arrival_offsets_s(plan.mode, plan.target_qps, random.Random(plan.seed))
        self._next_ns = self._draw_next()
        if not plan.is_open:
            for _ in range(plan.concurrency):
                self._arrive(self._begin_ns)

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        """Up to `limit` requests that have arrived; waits for the first; () once the window has closed."""
        with self._changed:
            while True:
                now_ns = self._clock.monotonic_ns()
                self._advance(now_ns)
                if self._is_over(now_ns):
                    return ()
                if self._waiting:
                    return self._hand_out(limit)
                self._wait(now_ns)

    def complete(self, completion: Completion) -> None:
        """Take a finished or failed request back.

        Raises:
            EngineError: the engine does not have this request, or its times cannot be.
        """
        check_completion(completion)
        with self._changed:
            arrival = self._in_flight.pop(completion.index, None)
            if arrival is None:
                raise EngineError(f"the backend answered request {completion.index}, which it did not have (any more)")
            self._answered.append((arrival, completion))
            self._answered_inside += self._opened_ns is not None and completion.finished_ns > self._opened_ns
            self._succeeded += completion.error is None
            answered = len(self._answered)
            now_ns = self._clock.monotonic_ns()
            self._advance(now_ns)
            if not self._plan.is_open and not self._is_over(now_ns):
                self._arrive(now_ns)
            self._changed.notify_all()
        self._report(answered)

    def close_books(self) -> MeasuredWindow:
        """The window, once the engine has stopped serving.

        Raises:
            EngineError: it stopped while the window was open.
        """
        with self._changed:
            now_ns = self._clock.monotonic_ns()
            if self._opened_ns is None or self._closed_ns is None or not self._is_over(now_ns):
                raise EngineError("the backend stopped serving before the window had closed")
            books = SteadyBooks(
                self._plan.mode, self._plan.is_open, self._opened_ns, self._closed_ns, len(self._prompts)
            )
            lost = [f"request {index}: the backend gave no answer" for index in sorted(self._in_flight)]
            return books.add_up(self._answered, self._arrived_ns, lost, self._warnings())

    def _advance(self, now_ns: int) -> None:
        """Let happen what was due by now: arrivals, the opening of the window and, in the closed loop, its closing."""
        if self._plan.is_open:
            while self._next_ns <= now_ns and (self._closed_ns is None or self._next_ns <= self._closed_ns):
                self._arrive(self._next_ns)
                self._next_ns = self._draw_next()
        if self._fails_as_a_whole() and not self._is_over(now_ns):
            self._opened_ns, self._closed_ns, self._has_turned_over = self._begin_ns, now_ns, True
        elif self._opened_ns is None:
            self._has_turned_over = len(self._answered) >= max(1, self._peak)
            if self._has_turned_over or seconds_between(self._begin_ns, now_ns) >= self._plan.ramp_limit_s:
                self._open(now_ns)
        elif self._closed_ns is None:
            is_long_enough = seconds_between(self._opened_ns, now_ns) >= self._plan.min_window_s
            if is_long_enough and self._answered_inside >= len(self._prompts):
                self._closed_ns = now_ns

    def _fails_as_a_whole(self) -> bool:
        """Whether every prompt failed; going on would only pile up failures, as fast as the engine makes them."""
        return self._succeeded == 0 and len(self._answered) >= max(len(self._prompts), self._peak)

    def _open(self, now_ns: int) -> None:
        self._opened_ns = now_ns
        if self._plan.is_open:
            length_s = max(self._plan.min_window_s, len(self._prompts) / self._plan.target_qps)
            self._closed_ns = now_ns + math.ceil(length_s * NS_PER_S)

    def _is_over(self, now_ns: int) -> bool:
        return self._closed_ns is not None and now_ns >= self._closed_ns

    def _arrive(self, arrived_ns: int) -> None:
        index = len(self._arrived_ns)
        prompt_index = index % len(self._prompts)
        self._arrived_ns.append(arrived_ns)
        self._waiting.append(Arrival(replace(self._prompts[prompt_index], index=index), prompt_index, arrived_ns))
        self._peak = max(self._peak, len(self._waiting) + len(self._in_flight))

    def _hand_out(self, limit: int) -> tuple[TokenRequest, ...]:
        taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        self._in_flight.update((arrival.request.index, arrival) for arrival in taken)
        return tuple(arrival.request for arrival in taken)

    def _wait(self, now_ns: int) -> None:
        if not self._plan.is_open:
            self._changed.wait(MAX_WAIT_S)  # for a completion, which another thread of the engine hands in
            return
        until_ns = self._next_ns if self._closed_ns is None else min(self._next_ns, self._closed_ns)
        self._changed.release()
        try:
            self._clock.sleep(min(seconds_between(now_ns, until_ns), MAX_WAIT_S))
        finally:
            self._changed.acquire()

    def _draw_next(self) -> int:
        return self._begin_ns + math.ceil(next(self._offsets_s) * NS_PER_S)

    def _warnings(self) -> tuple[Reason, ...]:
        if self._has_turned_over:
            return ()
        return (Reason.of("ramp_cut_short", ramp_s=self._plan.ramp_limit_s),)
