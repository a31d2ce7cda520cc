"""The measured window: its requests and their times, their latency, and whether it was steady."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lem.base.clock import Clock, seconds_between
from lem.base.errors import EngineError
from lem.base.measurement import STEADY_TOLERANCE
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, Engine, TokenRequest
from lem.record import OBSERVATIONS_NEEDED, Distribution, Latency, Measured

_NO_REQUEST = "no request was completed in the window"
_NO_ARRIVALS = "all requests of a closed batch are there at the start; there are no arrivals to wait from"
_NOT_OBSERVED = "the engine did not time each token; set `streaming: true` or use traffic_simulation"
_ONE_TOKEN = "no request has more than one output token"  # noqa: S105
_NO_TOKEN = "no request has an output token"  # noqa: S105
_ONE_PASS = "one pass over the prompt set: nothing to compare it with"  # noqa: S105
_NOTHING_TO_COMPARE = "no output tokens to compare"

CLOSED_BATCH = "closed_batch"


@dataclass(frozen=True)
class RequestTimes:
    """When one completed request was where, in CLOCK_MONOTONIC nanoseconds."""

    arrived_ns: int | None  # open loop: its arrival; closed loop: when it was sent; None in a closed batch
    started_ns: int  # when the engine took it up
    finished_ns: int  # when its last token was there
    output_tok: int
    token_times_ns: tuple[int, ...] | None = None  # when each output token was seen; None where not observed

    @property
    def origin_ns(self) -> int:
        """Where latency counts from: the arrival, or in a closed batch the moment the engine took it up."""
        return self.started_ns if self.arrived_ns is None else self.arrived_ns

    @property
    def e2e_s(self) -> float:
        """From its origin to its last token."""
        return seconds_between(self.origin_ns, self.finished_ns)

    @property
    def ttft_s(self) -> float:
        """From its origin to its first token; to be asked only of a request with token times."""
        return seconds_between(self.origin_ns, (self.token_times_ns or ())[0])


def percentile(sorted_values: Sequence[float], fraction: float) -> float:
    """The percentile by linear interpolation between closest ranks, rank = fraction x (n - 1).

    Hyndman and Fan (1996), definition 7: what numpy, R and spreadsheets give by default.
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
    high = {
        name: percentile(ordered, fraction) if n >= OBSERVATIONS_NEEDED[name] else None
        for name, fraction in (("p90", 0.90), ("p95", 0.95), ("p99", 0.99))
    }
    return Distribution(mean=math.fsum(ordered) / n, p50=percentile(ordered, 0.50), n=n, **high)


def latency_of(requests: Sequence[RequestTimes]) -> Latency:
    """The latency section over completed requests; what was not observed is None with its reason, never spread evenly.

    A request without output counts towards end-to-end and queue times only. One request whose tokens were not timed
    voids TTFT, TPOT and ITL for all: the rest would be a sample chosen by the engine.
    """
    with_output = [item for item in requests if item.output_tok > 0]
    is_timed = all(item.token_times_ns for item in with_output)
    timed = [item for item in with_output if item.token_times_ns] if is_timed else []
    why_not = _NO_TOKEN if is_timed else _NOT_OBSERVED
    why_not_between = _ONE_TOKEN if timed else why_not
    # TPOT = (e2e - TTFT) / (output tokens - 1)
    tpot_s = [(item.e2e_s - item.ttft_s) / (item.output_tok - 1) for item in timed if item.output_tok > 1]
    gaps = (pair for item in timed for pair in itertools.pairwise(item.token_times_ns or ()))
    queue_s = [seconds_between(item.arrived_ns, item.started_ns) for item in requests if item.arrived_ns is not None]
    values: dict[str, tuple[Sequence[float], str]] = {
        "ttft_s": ([item.ttft_s for item in timed], why_not),
        "tpot_s": (tpot_s, why_not_between),
        "itl_s": ([seconds_between(earlier, later) for earlier, later in gaps], why_not_between),
        "e2e_s": ([item.e2e_s for item in requests], _NO_REQUEST),
        "queue_s": (queue_s, _NO_ARRIVALS),
    }
    found = {name: distribute(seconds) for name, (seconds, _) in values.items()}
    reasons = {name: why if requests else _NO_REQUEST for name, (_, why) in values.items() if found[name] is None}
    return Latency(**found, null_reasons=reasons)


@dataclass(frozen=True)
class Output:
    """What the engine answered to one prompt; `prompt_index` counts from 0."""

    prompt_index: int
    input_tok: int
    output_ids: tuple[int, ...]


@dataclass(frozen=True)
class MeasuredWindow:
    """The work between two stamps of CLOCK_MONOTONIC."""

    traffic_mode: str
    opened_ns: int
    closed_ns: int
    repeats: int  # runs of the prompt set; under traffic completed requests over prompts, rounded down
    requests: tuple[RequestTimes, ...]  # the completed requests that count
    failures: tuple[str, ...]  # the error of each failed request that counts
    input_tok: int  # of requests that did not fail, without padding
    output_tok: int
    padding_tok: int | None  # in front of the prompts behind `input_tok`; None where the engine does not report it
    steady: Measured[bool]  # whether its halves are alike
    outputs: tuple[Output, ...]  # of the first pass, or of the requests that count under traffic
    warnings: tuple[Reason, ...] = ()
    passes_ns: tuple[tuple[int, int], ...] = ()  # begin and end of each pass over the prompt set; () under traffic

    @property
    def window_s(self) -> float:
        """Its length in seconds."""
        return seconds_between(self.opened_ns, self.closed_ns)


def check_completion(completion: Completion) -> None:
    """Refuse impossible times.

    Raises EngineError: another number of token times than of tokens, or an end before the start.
    """
    times = completion.token_times_ns
    if completion.error is None and times is not None and len(times) != len(completion.output_ids):
        raise EngineError(
            f"request {completion.index}: the backend gave {len(times)} times for {len(completion.output_ids)} tokens"
        )
    if completion.finished_ns < completion.started_ns:
        raise EngineError(f"request {completion.index}: the backend reports an end before the start")


def _are_alike(first: float, second: float) -> Measured[bool]:
    """Whether two rates differ by less than the tolerance, relative to their mean."""
    return Measured(abs(first - second) < STEADY_TOLERANCE * (first + second) / 2)


def _times_of(completion: Completion, arrived_ns: int | None) -> RequestTimes:
    tokens = len(completion.output_ids)
    return RequestTimes(arrived_ns, completion.started_ns, completion.finished_ns, tokens, completion.token_times_ns)


def _padding_of(completions: Sequence[Completion]) -> int | None:
    """The padding of all the completions; None when one does not report it."""
    found = [item.padding_tok for item in completions if item.padding_tok is not None]
    return sum(found) if len(found) == len(completions) else None


# A closed batch


def measure_batch(
    engine: Engine,
    requests: Sequence[TokenRequest],
    *,
    min_window_s: float,
    observe_tokens: bool,
    clock: Clock,
    report: Callable[[int], None],
) -> MeasuredWindow:
    """The window of a closed batch: the device idle, all requests, the device idle again.

    The whole set is repeated until the window is long enough. With `observe_tokens` each request runs alone. Nothing is
    checked or added up before the window has closed. `report` gets the number of requests done so far. Raises
    EngineError: the engine failed, or did not answer each request once.
    """
    passes: list[_Pass] = []
    engine.synchronize()
    opened_ns = begin_ns = clock.monotonic_ns()
    while True:
        before = len(passes) * len(requests)
        completions = engine.generate(
            requests,
            observe_tokens=observe_tokens,
            on_progress=lambda done, before=before: report(before + done),  # type: ignore[misc]
        )
        engine.synchronize()
        end_ns = clock.monotonic_ns()
        passes.append(_Pass(begin_ns, end_ns, completions))
        # A set that fails as a whole fails fast: repeating it would only fill the window with failures.
        if seconds_between(opened_ns, end_ns) >= min_window_s or all(item.error is not None for item in completions):
            break
        begin_ns = end_ns
    return _add_up(requests, passes)


@dataclass(frozen=True)
class _Pass:
    begin_ns: int
    end_ns: int
    completions: list[Completion] = field(repr=False)

    @property
    def output_tok(self) -> int:
        return sum(len(item.output_ids) for item in self.completions if item.error is None)


def _add_up(requests: Sequence[TokenRequest], passes: Sequence[_Pass]) -> MeasuredWindow:
    by_index = {request.index: request for request in requests}
    for item in passes:
        _check_pass(by_index.keys(), item.completions)
    everything = [completion for item in passes for completion in item.completions]
    good = [completion for completion in everything if completion.error is None]
    first_pass = sorted((item for item in passes[0].completions if item.error is None), key=lambda item: item.index)
    return MeasuredWindow(
        traffic_mode=CLOSED_BATCH,
        opened_ns=passes[0].begin_ns,
        closed_ns=passes[-1].end_ns,
        repeats=len(passes),
        requests=tuple(_times_of(item, None) for item in good),
        failures=tuple(item.error for item in everything if item.error is not None),
        input_tok=sum(len(by_index[item.index].token_ids) for item in good),
        output_tok=sum(item.output_tok for item in passes),
        padding_tok=_padding_of(good),
        steady=_compare_passes(passes),
        outputs=tuple(Output(item.index, len(by_index[item.index].token_ids), item.output_ids) for item in first_pass),
        passes_ns=tuple((item.begin_ns, item.end_ns) for item in passes),
    )


def _check_pass(expected: Iterable[int], completions: Sequence[Completion]) -> None:
    answered = sorted(completion.index for completion in completions)
    if answered != sorted(expected):
        raise EngineError(
            f"the backend gave {len(answered)} completions that do not match the {len(set(expected))} requests"
        )
    for completion in completions:
        check_completion(completion)


def _compare_passes(passes: Sequence[_Pass]) -> Measured[bool]:
    """Whether the first half of the passes ran as fast as the last.

    Halves and not extremes: the slowest and the fastest of a hundred short passes always differ.
    """
    half = len(passes) // 2
    if half == 0:
        return Measured(None, _ONE_PASS)
    if not any(item.output_tok for item in passes):
        return Measured(None, _NOTHING_TO_COMPARE)
    return _are_alike(_rate(passes[:half]), _rate(passes[-half:]))


def _rate(passes: Sequence[_Pass]) -> float:
    elapsed_s = seconds_between(passes[0].begin_ns, passes[-1].end_ns)
    return sum(item.output_tok for item in passes) / elapsed_s if elapsed_s > 0 else 0.0


# Steady traffic


@dataclass(frozen=True)
class Arrival:
    """A request that arrived; its `index` is a number of its own, `prompt_index` the prompt's."""

    request: TokenRequest
    prompt_index: int
    arrived_ns: int


@dataclass(frozen=True)
class SteadyWindow:
    """What counts in a window of traffic; a time is in it after its opening and up to its closing."""

    mode: str
    is_open_loop: bool
    opened_ns: int
    closed_ns: int
    prompt_count: int

    def add_up(
        self,
        answered: Sequence[tuple[Arrival, Completion]],
        arrived_ns: Sequence[int],
        lost: Sequence[str],
        warnings: tuple[Reason, ...],
    ) -> MeasuredWindow:
        """The window.

        Args:
            answered: every request that was handed in, also before the opening and after the closing.
            arrived_ns: when each request arrived, also those that were never handed out.
            lost: an error for each request that the engine took and never handed in.
            warnings: those that are known already.
        """
        finished = [pair for pair in answered if self._holds(pair[1].finished_ns)]
        good = [(arrival, item) for arrival, item in finished if item.error is None]
        answers = [(arrival, item) for arrival, item in answered if item.error is None]
        token_times = [time_ns for _, item in answers for time_ns in _token_times(item) if self._holds(time_ns)]
        # The input of a request counts when its first output token, the end of prefill, was in the window.
        prefilled = [
            (arrival, item) for arrival, item in answers if self._holds(next(_token_times(item), item.finished_ns))
        ]
        warnings = (*warnings, *self._backlog(arrived_ns, len(finished)))
        if any(item.token_times_ns is None and item.output_ids for _, item in answers):
            warnings = (*warnings, Reason.of("tokens_untimed"))
        return MeasuredWindow(
            traffic_mode=self.mode,
            opened_ns=self.opened_ns,
            closed_ns=self.closed_ns,
            repeats=len(finished) // self.prompt_count,
            requests=tuple(_times_of(item, arrival.arrived_ns) for arrival, item in good),
            failures=(*(item.error for _, item in finished if item.error is not None), *lost),
            input_tok=sum(len(arrival.request.token_ids) for arrival, _ in prefilled),
            output_tok=len(token_times),
            padding_tok=_padding_of([item for _, item in prefilled]),
            steady=self._compare_halves(token_times),
            outputs=tuple(
                Output(arrival.prompt_index, len(arrival.request.token_ids), item.output_ids) for arrival, item in good
            ),
            warnings=warnings,
        )

    def _holds(self, time_ns: int) -> bool:
        return self.opened_ns < time_ns <= self.closed_ns

    def _compare_halves(self, token_times: Sequence[int]) -> Measured[bool]:
        if not token_times:
            return Measured(None, _NOTHING_TO_COMPARE)
        middle_ns = (self.opened_ns + self.closed_ns) // 2
        first = sum(1 for time_ns in token_times if time_ns <= middle_ns)
        return _are_alike(first, len(token_times) - first)

    def _backlog(self, arrived_ns: Sequence[int], finished: int) -> tuple[Reason, ...]:
        """Whether arrivals exceed completions by more than a tenth, and than two deviations of a Poisson count."""
        arrived = sum(1 for time_ns in arrived_ns if self._holds(time_ns))
        if not self.is_open_loop or arrived - finished <= max(0.1 * arrived, 2 * math.sqrt(arrived)):
            return ()
        return (Reason.of("load_too_high", arrived=arrived, finished=finished),)


def _token_times(completion: Completion) -> Iterator[int]:
    """When each output token was there; untimed tokens when the request was finished."""
    if completion.token_times_ns is not None:
        return iter(completion.token_times_ns)
    return itertools.repeat(completion.finished_ns, len(completion.output_ids))
