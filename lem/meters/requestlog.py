"""The requests of a window as they were observed, what they add up to, and the file in which they are kept."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.clock import seconds_between
from lem.base.codec import MOST, decode
from lem.base.dataclass import dataclass, replace
from lem.base.measurement import STEADY_TOLERANCE, UNSTEADY_SIGMAS, Measured, known
from lem.base.units import GIB, MIB

CLOSED_BATCH = "closed_batch"
OPEN_LOOP = ("poisson", "constant")  # arrivals do not wait for completions
_MODES = (CLOSED_BATCH, *OPEN_LOOP, "closed")

REQUESTS_FILENAME = "requests.jsonl.gz"
_SCHEMA_VERSION = 1
_MOST_B = GIB  # a damaged or hostile file must not fill the memory
_HEAD = ("traffic_mode", "opened_ns", "closed_ns", "prompts", "passes_ns", "burstiness")
_ROW = ("prompt", "input_tok", "output_tok", "padding_tok", "arrived_ns", "started_ns", "finished_ns")


class RequestLogError(ValueError):
    """A file that is not a whole log of requests of this schema."""


@dataclass(frozen=True)
class Request:
    prompt: int  # its place in the prompt set, from 0
    input_tok: int
    output_tok: int = 0
    padding_tok: int | None = None  # computed in front of the prompt to fill its batch; None if unknown
    arrived_ns: int | None = None  # open loop: as scheduled; closed loop: when it was sent; None in a closed batch
    started_ns: int | None = None  # when the engine took it from its queue
    finished_ns: int | None = None
    token_times_ns: tuple[int, ...] | None = None  # one per output token; None if the engine does not time them
    error: str | None = None

    @property
    def is_good(self) -> bool:
        return self.finished_ns is not None and self.error is None

    @property
    def e2e_ns(self) -> int:
        return (self.finished_ns or 0) - self._origin_ns

    @property
    def ttft_ns(self) -> int:
        """To be asked only of a request with token times."""
        return (self.token_times_ns or ())[0] - self._origin_ns

    @property
    def tpot_ns(self) -> float | None:
        return (self.e2e_ns - self.ttft_ns) / (self.output_tok - 1) if self.output_tok > 1 else None

    @property
    def _origin_ns(self) -> int:
        """Its arrival, or in a closed batch the moment when the engine took it up."""
        return (self.started_ns if self.arrived_ns is None else self.arrived_ns) or 0

    @property
    def counted_ns(self) -> Sequence[int]:
        return (self.finished_ns or 0,) * self.output_tok if self.token_times_ns is None else self.token_times_ns

    @cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        return tuple((at_ns, len([*group])) for at_ns, group in itertools.groupby(self.token_times_ns or ()))


@dataclass(frozen=True)
class RequestLog:
    traffic_mode: str
    opened_ns: int
    closed_ns: int
    prompts: int  # in the prompt set
    requests: tuple[Request, ...]  # pass by pass; under traffic also those of the ramp, and those never finished
    passes_ns: tuple[tuple[int, ...], ...] = ()  # begin and end of each pass over the prompt set; () under traffic
    burstiness: float = 1.0  # of poisson arrivals: the shape of the gamma gaps between them

    @property
    def is_batch(self) -> bool:
        return self.traffic_mode == CLOSED_BATCH

    @property
    def window_s(self) -> float:
        return seconds_between(self.opened_ns, self.closed_ns)

    def is_inside(self, at_ns: int | None) -> bool:
        return at_ns is not None and self.opened_ns < at_ns <= self.closed_ns

    @cached_property
    def finished(self) -> tuple[Request, ...]:
        return self.requests if self.is_batch else tuple(it for it in self.requests if self.is_inside(it.finished_ns))

    @cached_property
    def completed(self) -> tuple[Request, ...]:
        return tuple(item for item in self.finished if item.is_good)

    @cached_property
    def failures(self) -> tuple[str, ...]:
        """Those without an answer count where they arrived: when they end is up to the client's patience."""
        unanswered = (it for it in self.requests if it.finished_ns is None and self.is_inside(it.arrived_ns))
        failed = (*self.finished, *unanswered)
        return tuple(item.error for item in failed if item.error is not None)

    @property
    def arrived(self) -> int:
        return len(self.requests) if self.is_batch else sum(self.is_inside(item.arrived_ns) for item in self.requests)

    @cached_property
    def prefilled(self) -> tuple[Request, ...]:
        """The requests whose input counts: the first output token, which ends a prefill, came in the window."""
        if self.is_batch:
            return self.completed
        good = (item for item in self.requests if item.is_good)
        return tuple(it for it in good if self.is_inside(next(iter(it.counted_ns), it.finished_ns)))

    @cached_property
    def tokens_ns(self) -> tuple[int, ...]:
        good = (item for item in self.requests if item.is_good)
        return tuple(at_ns for item in good for at_ns in item.counted_ns if self.is_batch or self.is_inside(at_ns))

    @property
    def input_tok(self) -> int:
        return sum(item.input_tok for item in self.prefilled)

    @property
    def output_tok(self) -> int:
        return len(self.tokens_ns)

    @property
    def padding_tok(self) -> int | None:
        found = [item.padding_tok for item in self.prefilled if item.padding_tok is not None]
        return sum(found) if len(found) == len(self.prefilled) else None

    @property
    def repeats(self) -> int:
        return len(self.passes_ns) if self.is_batch else len(self.finished) // self.prompts

    @cached_property
    def steady(self) -> Measured[bool]:
        # Halves of the passes and not extremes: the slowest and the fastest of a hundred short passes always differ.
        if self.is_batch and len(self.passes_ns) < 2:
            return known(None, "one_pass")
        if not self.tokens_ns:
            return known(None, "no_tokens_to_compare")
        if self.is_batch:
            half = len(self.passes_ns) // 2
            first, second = self._rate(0, half), self._rate(len(self.passes_ns) - half, len(self.passes_ns))
        else:
            first, second = map(sum, zip(*self._tokens_by_half, strict=True))
        return Measured(abs(first - second) < self.steady_tolerance * (first + second) / 2)

    @cached_property
    def steady_tolerance(self) -> float:
        """By how much the halves of a steady window may differ in power or throughput, over their mean."""
        # Under traffic, chance alone moves work from one half to the other, and only one window in 1,000 exceeds 3.29
        # standard deviations. Lengths vary, and so does the number of arrivals, by `arrival_variance` of their mean.
        # If arrivals do not vary, the edges of the halves may still cut off two requests.
        if self.is_batch or not self.tokens_ns:
            return STEADY_TOLERANCE
        moved = [first - second for first, second in self._tokens_by_half if first or second]
        usual = math.fsum(map(abs, moved)) / len(moved)
        varying = max(2.0, self.arrival_variance * len(moved))
        variance = math.fsum((abs(it) - usual) ** 2 for it in moved) + varying * usual**2
        return max(STEADY_TOLERANCE, UNSTEADY_SIGMAS * math.sqrt(variance) / (len(self.tokens_ns) / 2))

    @property
    def arrival_variance(self) -> float:
        """Variance over mean of the number of arrivals in a long time: 1 of a Poisson process, 0 of regular ones.

        With gamma gaps 1 / shape, the square of their coefficient of variation (Cox, "Renewal Theory", 1962, section
        3.3: long counts of a renewal process).
        """
        return 1 / self.burstiness if self.traffic_mode == "poisson" else 0.0

    @cached_property
    def _tokens_by_half(self) -> tuple[tuple[int, int], ...]:
        middle_ns = (self.opened_ns + self.closed_ns) // 2
        inside = ([at for at in it.counted_ns if self.is_inside(at)] for it in self.requests if it.is_good)
        return tuple((first := sum(at <= middle_ns for at in times), len(times) - first) for times in inside)

    def _rate(self, first: int, end: int) -> float:
        elapsed_s = seconds_between(self.passes_ns[first][0], self.passes_ns[end - 1][1])
        members = self.requests[first * self.prompts : end * self.prompts]
        return sum(item.output_tok for item in members if item.is_good) / elapsed_s if elapsed_s > 0 else 0.0


# --- the file


def write_requests(path: Path, log: RequestLog, redact: Callable[[str], str]) -> None:
    """Write the log, whole or not at all; errors of requests are redacted. Raises as `durable.write_bytes`."""
    # The first line holds the window, every other one a request. `token_gaps_ns` are the times between its tokens, the
    # first since its start; tokens of one step have gaps of 0.
    lines = [_dump({"schema_version": _SCHEMA_VERSION, **{name: getattr(log, name) for name in _HEAD}})]
    for item in log.requests:
        times_ns, gaps_ns = item.token_times_ns, None
        if times_ns is not None:
            since_ns = itertools.pairwise((item.started_ns or 0, *times_ns))
            gaps_ns = [after_ns - before_ns for before_ns, after_ns in since_ns]
        error = None if item.error is None else redact(item.error)
        row = {name: getattr(item, name) for name in _ROW}
        lines.append(_dump({**row, "token_gaps_ns": gaps_ns, "error": error}))
    durable.write_bytes(path, gzip.compress("".join(f"{line}\n" for line in lines).encode(), compresslevel=6, mtime=0))


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_requests(path: Path, most_b: int = _MOST_B) -> RequestLog:
    try:
        # Tokens of one batch have the same times, which shrink further than rows of meters.
        with contextlib.closing(durable.unpacked_lines(path, most_b, free_b=64 * MIB)) as lines:
            head = _read_head(json.loads(next(lines, b"null")))
            log = replace(head, requests=tuple(_read_row(json.loads(line), head) for line in lines))
        if log.is_batch and len(log.requests) != log.prompts * len(log.passes_ns):
            found = f"{len(log.requests)} requests, {log.prompts} prompts and {len(log.passes_ns)} passes"
            raise ValueError(f"{found} do not match")
    except (EOFError, RecursionError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise RequestLogError(f"{path}: not a log of requests: {error}") from error
    return log


def _read_head(document: Any) -> RequestLog:
    version = document.pop("schema_version", None) if isinstance(document, dict) else None
    if version != _SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r:.40}, this lem reads {_SCHEMA_VERSION}")
    log = decode(RequestLog, {"burstiness": 1.0, **document, "requests": []}, "window")
    edges = [log.opened_ns, *itertools.chain.from_iterable(log.passes_ns), log.closed_ns]
    is_possible = log.traffic_mode in _MODES and log.prompts > 0 and log.burstiness > 0
    if not is_possible or any(len(item) != 2 for item in log.passes_ns):
        raise ValueError("impossible window")
    if sorted(edges) != edges or not -MOST < edges[0] <= edges[-1] < MOST:
        raise ValueError("its times are out of order")
    return log


def _read_row(row: Any, log: RequestLog) -> Request:
    gaps_ns = row.pop("token_gaps_ns", None) if isinstance(row, dict) else None
    item = decode(Request, {**row, "token_times_ns": None} if isinstance(row, dict) else row, "request")
    if gaps_ns is not None:
        if not isinstance(gaps_ns, list) or not set(map(type, gaps_ns)) <= {int} or len(gaps_ns) != item.output_tok:
            raise ValueError(f"expected {item.output_tok} token_gaps_ns")
        item = replace(item, token_times_ns=tuple(itertools.accumulate(gaps_ns, initial=item.started_ns or 0))[1:])
    times_ns = [it for it in (item.started_ns, *(item.token_times_ns or ()), item.finished_ns) if it is not None]
    is_timed = (item.started_ns is None) <= (item.finished_ns is None)
    counts = (item.input_tok, item.output_tok, item.padding_tok or 0)
    if not 0 <= item.prompt < log.prompts or min(counts) < 0 or max(counts) > MOST or not is_timed:
        raise ValueError("impossible request")
    if not all(-MOST < at_ns < MOST for at_ns in (*times_ns, item.arrived_ns or 0)):
        raise ValueError("a time is out of range")
    if log.is_batch and item.finished_ns is None:
        raise ValueError("a request of a batch without its end")
    return item
