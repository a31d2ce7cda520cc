"""Latencies of requests from the times that were observed, and from nothing else.

TTFT, TPOT, ITL and end-to-end latency as the field uses them (NVIDIA GenAI-Perf, MLPerf Inference):
time to first token; (end-to-end - TTFT) / (output tokens - 1); time between two tokens of one request.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lem.clock import seconds_between
from lem.record import OBSERVATIONS_NEEDED, Distribution, Latency

__all__ = ["RequestTimes", "distribute", "latency_of", "percentile"]

_NO_REQUEST = "no request was completed in the window"
_NO_ARRIVALS = "the requests of a closed batch are all there at the start; none waits for its turn by arriving"
_NOT_OBSERVED = "the engine gave no time for each token; streaming: true or traffic_simulation observes them"
_ONE_TOKEN = "no request has more than one output token"  # noqa: S105
_NO_TOKEN = "no request has an output token"  # noqa: S105


@dataclass(frozen=True)
class RequestTimes:
    """When one completed request was where, in CLOCK_MONOTONIC nanoseconds.

    Attributes:
        arrived_ns: when it was due (open loop) or sent (closed loop); None in a closed batch, where nothing arrives.
        started_ns: when the engine took it up.
        finished_ns: when its last token was there.
        output_tok: number of output tokens.
        token_times_ns: when each of them was seen; None where that was not observed.
    """

    arrived_ns: int | None
    started_ns: int
    finished_ns: int
    output_tok: int
    token_times_ns: tuple[int, ...] | None = None

    @property
    def origin_ns(self) -> int:
        """Where latency counts from: the arrival, or in a closed batch the moment the engine took it up."""
        return self.started_ns if self.arrived_ns is None else self.arrived_ns


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The percentile by linear interpolation between closest ranks, rank = fraction x (n - 1).

    Hyndman and Fan (1996), definition 7: what numpy, R and spreadsheets give by default.

    Args:
        sorted_values: at least one value, ascending.
        fraction: 0 to 1.
    """
    rank = fraction * (len(sorted_values) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(sorted_values) - 1)
    return sorted_values[below] + (rank - below) * (sorted_values[above] - sorted_values[below])


def distribute(values: Sequence[float]) -> Distribution | None:
    """Mean and percentiles of values in seconds; None of none; a percentile is None below `OBSERVATIONS_NEEDED`."""
    if not values:
        return None
    ordered = sorted(values)
    n = len(ordered)

    def above(name: str, fraction: float) -> float | None:
        return percentile(ordered, fraction) if n >= OBSERVATIONS_NEEDED[name] else None

    return Distribution(
        mean=math.fsum(ordered) / n,
        p50=percentile(ordered, 0.50),
        p90=above("p90", 0.90),
        p95=above("p95", 0.95),
        p99=above("p99", 0.99),
        n=n,
    )


def latency_of(requests: Sequence[RequestTimes]) -> Latency:
    """The latency section over completed requests; what was not observed is None with its reason, never spread evenly.

    A request without output counts towards end-to-end and queue times only. One request whose tokens were not timed
    voids TTFT, TPOT and ITL for all: the rest would be a sample chosen by the engine.
    """
    reasons: dict[str, str] = {}

    def section(name: str, values: Sequence[float], reason: str) -> Distribution | None:
        found = distribute(values)
        if found is None:
            reasons[name] = reason if requests else _NO_REQUEST
        return found

    queues = [seconds_between(item.arrived_ns, item.started_ns) for item in requests if item.arrived_ns is not None]
    ends = [seconds_between(item.origin_ns, item.finished_ns) for item in requests]
    talking = [item for item in requests if item.output_tok > 0]
    is_timed = all(item.token_times_ns for item in talking)
    timed = [item for item in talking if item.token_times_ns] if is_timed else []
    why_not = _NO_TOKEN if is_timed else _NOT_OBSERVED
    why_not_between = _ONE_TOKEN if timed else why_not
    return Latency(
        ttft_s=section("ttft_s", [_ttft_s(item) for item in timed], why_not),
        tpot_s=section("tpot_s", [_tpot_s(item) for item in timed if item.output_tok > 1], why_not_between),
        itl_s=section("itl_s", [gap for item in timed for gap in _gaps_s(item)], why_not_between),
        e2e_s=section("e2e_s", ends, _NO_REQUEST),
        queue_s=section("queue_s", queues, _NO_ARRIVALS),
        null_reasons=reasons,
    )


def _ttft_s(request: RequestTimes) -> float:
    times = request.token_times_ns or ()
    return seconds_between(request.origin_ns, times[0])


def _tpot_s(request: RequestTimes) -> float:
    e2e_s = seconds_between(request.origin_ns, request.finished_ns)
    return (e2e_s - _ttft_s(request)) / (request.output_tok - 1)


def _gaps_s(request: RequestTimes) -> list[float]:
    times = request.token_times_ns or ()
    return [seconds_between(earlier, later) for earlier, later in itertools.pairwise(times)]
