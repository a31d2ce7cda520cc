"""What became of the requests of a load: replies from the bytes that came, and the client's check of itself."""

from __future__ import annotations

import bisect
import operator
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from lem.base import process
from lem.base.clock import seconds_between
from lem.base.codec import pack
from lem.base.dataclass import dataclass, field
from lem.base.reasons import Reason
from lem.base.units import NS_PER_MS, NS_PER_S, NS_PER_US
from lem.engines.server.client import Call, ClientCheck, Target, count_tokens
from lem.engines.server.stream import (
    Answer,
    Arrivals,
    BrokenAnswer,
    Framing,
    number_of,
    read_answer,
    refusal,
)

# Beyond these the client decides the figures; calibrated by `python -m tests.bench client`.
MOST_SHARED = 0.005  # of the events with tokens; p99 of ICL moves at 1 %
MOST_BUSY = 0.7  # of a core
MOST_MISSED = 0.01  # of the concurrency asked for
MOST_LATE = 0.01  # of TTFT
MOST_WAITED = 0.05  # of the window, without stamps of the kernel
_MOST_STEP_NS = 50 * NS_PER_US  # of the time of day against the monotonic clock within a load
_MOST_LAGS = 50_000
_LATE_NS = 3 * NS_PER_MS  # a pass of the loop, after the stamp of what had waited longest for it


class Exchange:
    """One request under way and the bytes of its answer, with the size and the times of each read."""

    __slots__ = (
        *("call", "scheduled_ns", "sent_ns", "body_sent_ns", "unsent", "turn", "tries", "lost", "is_whole"),
        *("raw", "sizes", "stamps", "seen_ns", "times_ns", "ended_ns", "framing", "looks"),
    )

    def __init__(self, call: int, scheduled_ns: int | None, turn: int = 0) -> None:
        self.call = call
        self.turn = turn  # how often its call was sent before
        self.scheduled_ns = scheduled_ns
        self.sent_ns: int | None = None
        self.body_sent_ns: int | None = None
        self.unsent: memoryview | None = None
        self.tries = 0
        self.lost: Reason | None = None  # why the answer is not whole
        self.is_whole = False
        self.raw = bytearray()
        self.sizes = array("H")
        self.stamps = bytearray()  # timespecs of the kernel; zeros where it gave none
        self.seen_ns = array("q")  # when the loop's pass began that read it
        self.times_ns = array("q")  # when it had arrived, once that is worked out
        self.ended_ns: int | None = None  # when the client was done with it
        self.framing = Framing(self.raw)
        self.looks = True  # at every read: its framing does not show at the end of one

    def restart(self) -> None:
        self.tries += 1
        self.sent_ns = self.body_sent_ns = self.unsent = None

    @property
    def last_ns(self) -> int:
        return self.seen_ns[-1] if self.seen_ns else self.sent_ns or 0


def realtime_ahead_ns() -> int:
    """By how much CLOCK_REALTIME is ahead of CLOCK_MONOTONIC, by the quickest of some readings."""
    readings = []
    for _ in range(9):
        before_ns, real_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after_ns - before_ns, real_ns - (before_ns + after_ns) // 2))
    return min(readings)[1]


def _run_delay_ns() -> int:
    try:
        words = process.read_small("/proc/self/schedstat").split()
    except OSError:  # a kernel without it
        return 0
    return int(words[1])


@dataclass
class Usage:
    """What the client's process has used at a moment."""

    at_ns: int = field(default_factory=time.monotonic_ns)
    cpu_ns: int = field(default_factory=time.process_time_ns)
    waited_ns: int = field(default_factory=_run_delay_ns)


@dataclass
class Load:
    """What was measured, as the loop leaves it."""

    exchanges: Sequence[Exchange]
    opened_ns: int
    closed_ns: int
    has_turned_over: bool
    ahead_ns: tuple[int, int]  # realtime over monotonic, before and after
    used: tuple[Usage, Usage]  # at the opening and at the closing
    concurrency: int | None  # closed loop
    connections: int
    reconnects: int


def conclude(load: Load, calls: Sequence[Call], target: Target) -> Iterator[tuple[str, Any]]:
    """The messages about a load: a `reply` per exchange, whose bytes are given up, and the `end`."""
    before_ns, after_ns = load.ahead_ns
    was_set = abs(after_ns - before_ns) > _MOST_STEP_NS
    tally = _Tally(load, None if was_set else (before_ns + after_ns) // 2)
    for exchange in load.exchanges:
        yield "reply", tally.reply(exchange, calls[exchange.call], target)
    warnings = [Reason.of("client_clock_set")] if was_set else []
    warnings += [] if tally.check.stamp_source == "kernel" else [Reason.of("client_user_stamps")]
    bound = tally.bound()
    yield "end", (load.opened_ns, load.closed_ns, load.has_turned_over, *map(pack, (tally.check, warnings, bound)))


class _Tally:
    def __init__(self, load: Load, ahead_ns: int | None) -> None:
        """`ahead_ns` is None if stamps of the kernel cannot be converted."""
        self._load = load
        self._lags_ns = array("q")
        self._late_ns: list[int] = []
        self._ttft_ns: list[int] = []
        self._reads = self._chunks = self._unstamped = self._in_flight_ns = 0
        self._shared, self._passes = [0, 0], [0, 0]  # reads in prompt and in late passes: with several events, and all
        self._late_passes: set[int] = set()
        for exchange in load.exchanges:
            exchange.stamps, stamps = bytearray(), array("q", bytes(exchange.stamps))
            if ahead_ns is None:
                stamps = array("q", bytes(8 * len(stamps)))
            pairs = zip(stamps[0::2], stamps[1::2], exchange.seen_ns, strict=True)
            exchange.times_ns = array(
                "q", [s * NS_PER_S + ns - (ahead_ns or 0) if s else seen for s, ns, seen in pairs]
            )
            lags_ns = list(map(operator.sub, exchange.seen_ns, exchange.times_ns))
            if max(lags_ns, default=0) > _LATE_NS:
                pairs_ns = zip(lags_ns, exchange.seen_ns, strict=True)
                self._late_passes.update(seen for lag, seen in pairs_ns if lag > _LATE_NS)

    def reply(self, exchange: Exchange, call: Call, target: Target) -> list[Any]:
        times_ns = exchange.times_ns
        arrivals = Arrivals(exchange.sizes, times_ns)
        finished_ns = times_ns[-1] if times_ns else None
        notes: list[Reason] = []
        answer, error = Answer(), exchange.lost
        try:
            framing, answer = read_answer(exchange.raw, arrivals)
            if framing.status is not None:
                error = refusal(framing, exchange.raw) or answer.error or error
            if error is None and exchange.is_whole:
                error, notes = judge(answer, call, target)
        except BrokenAnswer as broken:
            framing, error = exchange.framing, broken.reason
        self._count(exchange, arrivals, answer, finished_ns)
        exchange.raw = bytearray()
        return [
            *(exchange.call, exchange.scheduled_ns, exchange.sent_ns, exchange.body_sent_ns, finished_ns),
            *(exchange.ended_ns, framing.status, list(answer.at_ns), answer.texts if target.keeps_texts else None),
            *(answer.ids if any(answer.ids) else None, answer.usage, answer.finish_reason),
            *(pack(error), pack(notes)),
        ]

    def _count(self, exchange: Exchange, arrivals: Arrivals, answer: Answer, finished_ns: int | None) -> None:
        opened_ns, closed_ns, sent_ns = self._load.opened_ns, self._load.closed_ns, exchange.sent_ns
        if exchange.scheduled_ns is not None and sent_ns is not None:
            self._late_ns.append(sent_ns - exchange.scheduled_ns)
        since_ns = sent_ns if exchange.scheduled_ns is None else exchange.scheduled_ns
        if answer.at_ns and since_ns is not None:
            self._ttft_ns.append(answer.at_ns[0] - since_ns)
        if sent_ns is not None:
            until_ns = finished_ns or exchange.ended_ns or closed_ns
            self._in_flight_ns += max(0, min(until_ns, closed_ns) - max(sent_ns, opened_ns))
        seen_ns, late_passes = exchange.seen_ns, self._late_passes
        lags_ns = list(map(operator.sub, seen_ns, arrivals.times_ns))
        late = sum(map(late_passes.__contains__, seen_ns)) if late_passes else 0
        late_shared = sum(seen_ns[read] in late_passes for read in arrivals.shared)
        self._reads += len(lags_ns)
        self._chunks += len(answer.at_ns)
        self._passes = [self._passes[0] + len(lags_ns) - late, self._passes[1] + late]
        self._shared = [self._shared[0] + len(arrivals.shared) - late_shared, self._shared[1] + late_shared]
        self._unstamped += lags_ns.count(0)
        first, end = bisect.bisect_left(seen_ns, opened_ns), bisect.bisect_right(seen_ns, closed_ns)
        self._lags_ns.extend(filter(None, lags_ns[first:end]))

    @property
    def _spoiled(self) -> float:
        """Reads that the client let several events wait for.

        A server may send two events at once, which share a read however prompt the client is: as many in late passes of
        the loop as in prompt ones. What is above that is the client's doing.
        """
        by_server = self._shared[0] / self._passes[0] if self._passes[0] else 0.0
        return self._shared[1] - by_server * self._passes[1]

    @property
    def check(self) -> ClientCheck:
        load, (opening, closing) = self._load, self._load.used
        elapsed_ns = max(1, closing.at_ns - opening.at_ns)
        window_ns = max(1, load.closed_ns - load.opened_ns)
        lags_ns, late_ns = self._lags_ns[:: 1 + len(self._lags_ns) // _MOST_LAGS], self._late_ns
        return ClientCheck(
            pid=os.getpid(),
            cpu_s=seconds_between(opening.cpu_ns, closing.cpu_ns),
            stamp_source="kernel" if lags_ns else "user",
            busy_share=(closing.cpu_ns - opening.cpu_ns) / elapsed_ns,
            waited_share=(closing.waited_ns - opening.waited_ns) / elapsed_ns,
            lag_p50_us=_quantile_us(lags_ns, 50),
            lag_p99_us=_quantile_us(lags_ns, 99),
            reads=self._reads,
            shared_reads=sum(self._shared),
            late_shared_reads=self._shared[1],
            unstamped_reads=self._unstamped,
            concurrency_asked=load.concurrency,
            concurrency_reached=self._in_flight_ns / window_ns,
            late_p50_us=_quantile_us(late_ns, 50),
            late_p99_us=_quantile_us(late_ns, 99),
            connections=load.connections,
            reconnects=load.reconnects,
        )

    def bound(self) -> Reason | None:
        """Why the client decided the figures; None also where there are none, since no request brought a token."""
        if not self._chunks:
            return None
        check = self.check
        asked, reached = check.concurrency_asked, check.concurrency_reached
        why = None
        if self._spoiled > MOST_SHARED * self._chunks:
            why = Reason.of("client_shared_reads", share=self._spoiled / self._chunks)
        elif check.busy_share > MOST_BUSY:
            why = Reason.of("client_busy", share=check.busy_share)
        elif asked is not None and reached < (1 - MOST_MISSED) * asked:
            why = Reason.of("client_concurrency", reached=reached, asked=asked)
        elif self._late_ns and self._ttft_ns and sum(self._late_ns) > MOST_LATE * sum(self._ttft_ns):
            late_ms = sum(self._late_ns) / len(self._late_ns) / NS_PER_MS
            why = Reason.of("client_late", late_ms=late_ms)
        elif check.stamp_source == "user" and check.waited_share > MOST_WAITED:
            why = Reason.of("client_waited", share=check.waited_share)
        return None if why is None else Reason.of("client_bound", why=why)


def _quantile_us(values_ns: Sequence[int], percent: int) -> float | None:
    return sorted(values_ns)[(len(values_ns) - 1) * percent // 100] / NS_PER_US if values_ns else None


def judge(answer: Answer, call: Call, target: Target) -> tuple[Reason | None, list[Reason]]:
    """Why an answer that came whole failed all the same; and what is to be said of one that did not."""
    found, source = count_tokens(answer.ids, answer.usage, len(answer.at_ns))
    data = {"found": found, "least": call.least_tok, "most": call.most_tok}
    if target.needs_done and not answer.is_done:
        return Reason.of("server_no_end"), []
    if not answer.at_ns:
        return Reason.of("server_empty"), []
    if target.needs_usage and answer.usage_tok is None:
        return Reason.of("server_no_usage"), []
    if answer.finish_reason == "length" and found < call.most_tok and source != "chunks":
        return Reason.of("server_cut", found=found, most=call.most_tok), []
    if source != "chunks" and not call.least_tok <= found <= call.most_tok:
        return Reason.of("server_other_length", **data), []
    notes = []
    if answer.ids_tok is not None and answer.usage_tok not in (None, answer.ids_tok):
        notes.append(Reason.of("server_usage_differs", ids=answer.ids_tok, usage=answer.usage_tok))
    cached = number_of(answer.usage, "prompt_tokens_details", "cached_tokens")
    if cached:
        notes.append(Reason.of("server_cached", cached=cached))
    return None, notes
