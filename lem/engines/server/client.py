"""The load client of served engines as the engine process holds it: what it is given, and what it hands back."""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lem.base import process
from lem.base.codec import encode, pack, unpack
from lem.base.dataclass import dataclass, field
from lem.base.errors import EngineError
from lem.base.launch import own_command
from lem.base.reasons import Reason
from lem.engines.server.stream import number_of
from lem.engines.traffic import TrafficPlan

_END_S = 5.0
# In a body: how often its call was sent before in this load, so that a server's prefix cache does not find it again.
SALT = "lem-salt-00000000"


@dataclass(frozen=True)
class Target:
    url: str  # http or https, with the path that requests are sent to
    headers: Mapping[str, str] = field(default_factory=dict)  # beside Host and those of the body
    warm_path: str | None = None  # fetched once on every connection before the load; its answer does not matter
    keeps_alive: bool = True  # False: a connection for each request, which is then timed from before it is made
    needs_done: bool = True  # `data: [DONE]` ends an answer
    needs_usage: bool = True
    keeps_texts: bool = True  # False: replies have no texts, which saves memory
    silence_s: float = 300.0  # the longest time without a byte of an answer
    total_s: float = 3600.0  # the longest request
    connect_s: float = 10.0


@dataclass(frozen=True)
class Call:
    body: str  # JSON
    most_tok: int  # of output, as the body asks
    least_tok: int = 0  # `most_tok` under ignore_eos


@dataclass(frozen=True)
class Reply:
    """One request; times are CLOCK_MONOTONIC nanoseconds, None for what did not happen."""

    call: int  # the place of its call
    scheduled_ns: int | None  # open loop
    sent_ns: int | None  # just before its first byte was sent
    body_sent_ns: int | None  # after its last byte was handed to the kernel
    finished_ns: int | None  # when the last byte of an answer had arrived, whole or not
    ended_ns: int | None  # when the client was done with it
    status: int | None  # of HTTP
    times_ns: Sequence[int]  # of each event that brought tokens: when it had arrived
    texts: Sequence[str] | None  # of the same events; None: not kept
    ids: Sequence[tuple[int, ...]] | None  # None where the server gives none
    usage: Mapping[str, Any] | None  # as the server sent it
    finish_reason: str | None
    error: Reason | None  # why it failed; its tokens do not count then
    notes: tuple[Reason, ...]

    @property
    def output_tok(self) -> int:
        return count_tokens(self.ids, self.usage, len(self.times_ns))[0]

    @property
    def token_source(self) -> str:
        """`ids`, `usage`, or `chunks`, which may hold several tokens each."""
        return count_tokens(self.ids, self.usage, len(self.times_ns))[1]

    @property
    def cached_tok(self) -> int | None:
        """Tokens of the prompt that the server had in its prefix cache."""
        return number_of(self.usage, "prompt_tokens_details", "cached_tokens")


def count_tokens(
    ids: Sequence[tuple[int, ...]] | None, usage: Mapping[str, Any] | None, chunks: int
) -> tuple[int, str]:
    """Output tokens of an answer, and what they are counted by; ids may get lost, but none is invented."""
    reported = number_of(usage, "completion_tokens")
    if ids and all(ids) and (by_ids := sum(map(len, ids))) >= (reported or 0):
        return by_ids, "ids"
    return (chunks, "chunks") if reported is None else (reported, "usage")


@dataclass(frozen=True)
class ClientCheck:
    """How well the client kept up within the window."""

    pid: int
    cpu_s: float
    stamp_source: str  # `kernel` or `user`
    busy_share: float  # of one core
    waited_share: float  # of the window, ready to run without a CPU
    lag_p50_us: float | None  # from the kernel's stamp of bytes to their reading; None without such stamps
    lag_p99_us: float | None
    reads: int
    shared_reads: int  # with more than one event that brought tokens: all but the last of them are stamped too late
    late_shared_reads: int  # of these, in passes of the loop that were over 3 ms late; a server may send two at once
    unstamped_reads: int  # without a stamp of the kernel
    concurrency_asked: float | None  # closed loop
    concurrency_reached: float  # mean of requests in flight
    late_p50_us: float | None  # of sending after the scheduled time, in the open loop
    late_p99_us: float | None
    connections: int
    reconnects: int  # requests sent again, since the server had closed the connection


@dataclass(frozen=True)
class LoadResult:
    replies: tuple[Reply, ...]  # in the order in which they were due
    opened_ns: int
    closed_ns: int
    has_turned_over: bool  # before the window opened
    check: ClientCheck
    warnings: tuple[Reason, ...]
    bound: Reason | None  # why the client, not the server, decided the figures; they are invalid then


class LoadClient:
    """A running client process, which ends with this object or its holder."""

    def __init__(self, target: Target) -> None:
        """Start it. Raises UserError: it cannot be started."""
        command, streams = (*own_command(sys.executable), "worker", "--load"), (process.PIPE, process.PIPE, 2)
        # Answers that grow side by side would leave holes in a heap (glibc, mallopt(3)).
        self._child = process.spawn(command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384"}, streams=streams)
        self._orders, output = process.pipes(self._child)
        self._lines = open(output.fileno(), "rb", closefd=False)  # noqa: SIM115 - buffered, kept by the object
        self._order(encode(target, "target"))

    @property
    def pid(self) -> int:
        return self._child.pid

    def run_all(
        self, calls: Sequence[Call], concurrency: int, report: Callable[[int], None], least_s: float = 0.0
    ) -> LoadResult:
        """Send each call once, with at most that many in flight, and all of them again until so much time has passed.

        Each pass begins when the one before is answered, and their replies follow each other. Raises as `run_traffic`.
        """
        order = {"calls": pack(calls), "concurrency": concurrency, "plan": None, "least_s": least_s}
        return self._run(order, report)

    def run_traffic(self, calls: Sequence[Call], plan: TrafficPlan, report: Callable[[int], None]) -> LoadResult:
        """Send the calls in turn by the plan, over and over, until the window has closed and what was sent is answered.

        `report` gets the number of requests finished so far, about once a second. Raises EngineError: there is no
        connection to the server, it stopped taking any, or the client process ended.
        """
        return self._run(
            {"calls": pack(calls), "concurrency": plan.concurrency, "plan": pack(plan), "least_s": 0.0}, report
        )

    def _run(self, order: Mapping[str, Any], report: Callable[[int], None]) -> LoadResult:
        self._order(order)
        replies: list[Reply] = []
        while (line := self._lines.readline()).endswith(b"\n"):  # a client that is killed may leave part of one
            kind, value = json.loads(line)
            if kind == "reply":
                replies.append(self._reply(value))
            elif kind == "progress":
                report(value)
            elif kind == "failed":
                raise EngineError(*value)
            else:
                return LoadResult(tuple(replies), *(unpack(hint, item) for hint, item in zip(_END, value, strict=True)))
        raise EngineError(f"the load client {process.describe_exit(self._child.wait())}")

    def _reply(self, row: list[Any]) -> Reply:
        *_, times_ns, _, ids, _, _, error, notes = row
        row[7], row[9] = array("q", times_ns), None if ids is None else tuple(map(tuple, ids))
        row[12:] = unpack(Reason | None, error), unpack(tuple[Reason, ...], notes)
        return Reply(*row)

    def _order(self, order: Any) -> None:
        try:
            view = memoryview(json.dumps(order).encode() + b"\n")
            while view:
                view = view[self._orders.write(view) :]
        except BrokenPipeError as error:
            raise EngineError(f"the load client {process.describe_exit(self._child.wait())}") from error

    def close(self) -> None:
        """End the process; not an error when it has ended."""
        if self._child.poll() is None:
            process.kill_group(self._child.pid)
        self._child.wait(_END_S)
        for pipe in (self._orders, self._lines, *process.pipes(self._child)):
            pipe.close()

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_END: Sequence[Any] = (int, int, bool, ClientCheck, tuple[Reason, ...], Reason | None)
