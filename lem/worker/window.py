"""The measured window: its requests and their times, and whether it was steady."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lem.base.clock import Clock, seconds_between
from lem.base.errors import EngineError
from lem.base.measurement import STEADY_TOLERANCE
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, Engine, OnProgress, TokenRequest
from lem.record import OBSERVATIONS_NEEDED, Distribution, Latency

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


CLOSED_BATCH = "closed_batch"
_ONE_PASS = "one pass over the prompt set: there is no second to compare it with"  # noqa: S105


@dataclass(frozen=True)
class Output:
    """What the engine answered to one prompt; `prompt_index` counts from 0."""

    prompt_index: int
    input_tok: int
    output_ids: tuple[int, ...]


@dataclass(frozen=True)
class MeasuredWindow:
    """The work between two stamps of CLOCK_MONOTONIC.

    Attributes:
        repeats: how often the prompt set was run; under traffic how often as many requests as prompts were completed.
        requests: the completed requests that count.
        failures: the error of each failed request that counts.
        input_tok, output_tok: tokens of requests that did not fail, padding left out.
        padding_tok: padding computed in front of the prompts behind `input_tok`; None where the engine does not tell.
        steady: whether its halves are alike; None with its reason where there is nothing to compare.
        outputs: the answers to keep: of the first pass, or of the requests that count under traffic.
        passes_ns: when each pass over the prompt set began and ended; () under traffic.
    """

    traffic_mode: str
    opened_ns: int
    closed_ns: int
    repeats: int
    requests: tuple[RequestTimes, ...]
    failures: tuple[str, ...]
    input_tok: int
    output_tok: int
    padding_tok: int | None
    steady: bool | None
    steady_null_reason: str | None
    outputs: tuple[Output, ...]
    warnings: tuple[Reason, ...] = ()
    passes_ns: tuple[tuple[int, int], ...] = ()

    @property
    def window_s(self) -> float:
        """Its length in seconds."""
        return seconds_between(self.opened_ns, self.closed_ns)


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

    The whole set is repeated until the window is long enough. With `observe_tokens` each request runs alone.
    Nothing is checked or added up before the window has closed.

    Args:
        report: told the number of requests done so far.

    Raises:
        EngineError: the engine failed, or did not answer each request once.
    """
    passes: list[_Pass] = []
    engine.synchronize()
    opened_ns = begin_ns = clock.monotonic_ns()
    while True:
        told = _counting_on(len(passes) * len(requests), report)
        completions = engine.generate(requests, observe_tokens=observe_tokens, on_progress=told)
        engine.synchronize()
        end_ns = clock.monotonic_ns()
        passes.append(_Pass(begin_ns, end_ns, completions))
        # A set that fails as a whole fails fast: repeating it would only fill the window with failures.
        if seconds_between(opened_ns, end_ns) >= min_window_s or all(item.error is not None for item in completions):
            break
        begin_ns = end_ns
    return _add_up(requests, passes)


def _counting_on(before: int, report: Callable[[int], None]) -> OnProgress:
    """Reports what a pass has done as the total of all passes."""
    return lambda done: report(before + done)


def are_alike(first: float, second: float) -> bool:
    """Whether two rates differ by less than the tolerance, relative to their mean."""
    return abs(first - second) < STEADY_TOLERANCE * (first + second) / 2


def times_of(completion: Completion, arrived_ns: int | None) -> RequestTimes:
    """The times of a completed request."""
    return RequestTimes(
        arrived_ns, completion.started_ns, completion.finished_ns, len(completion.output_ids), completion.token_times_ns
    )


def padding_of(completions: Sequence[Completion]) -> int | None:
    """The padding of all the completions; None as soon as one does not tell."""
    told = [item.padding_tok for item in completions if item.padding_tok is not None]
    return sum(told) if len(told) == len(completions) else None


def check_completion(completion: Completion) -> None:
    """Refuse times that would make figures up.

    Raises:
        EngineError: another number of token times than of tokens, or an end before the start.
    """
    times = completion.token_times_ns
    if completion.error is None and times is not None and len(times) != len(completion.output_ids):
        raise EngineError(
            f"request {completion.index}: the backend gave {len(times)} times for {len(completion.output_ids)} tokens"
        )
    if completion.finished_ns < completion.started_ns:
        raise EngineError(f"request {completion.index}: the backend says it ended before it started")


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
    steady, reason = _compare_passes(passes)
    return MeasuredWindow(
        traffic_mode=CLOSED_BATCH,
        opened_ns=passes[0].begin_ns,
        closed_ns=passes[-1].end_ns,
        repeats=len(passes),
        requests=tuple(times_of(item, None) for item in good),
        failures=tuple(item.error for item in everything if item.error is not None),
        input_tok=sum(len(by_index[item.index].token_ids) for item in good),
        output_tok=sum(item.output_tok for item in passes),
        padding_tok=padding_of(good),
        steady=steady,
        steady_null_reason=reason,
        outputs=tuple(
            Output(item.index, len(by_index[item.index].token_ids), item.output_ids)
            for item in sorted(passes[0].completions, key=lambda item: item.index)
            if item.error is None
        ),
        passes_ns=tuple((item.begin_ns, item.end_ns) for item in passes),
    )


def _check_pass(expected: Iterable[int], completions: Sequence[Completion]) -> None:
    answered = sorted(completion.index for completion in completions)
    if answered != sorted(expected):
        raise EngineError(
            f"the backend gave {len(answered)} completions for other requests than the {len(set(expected))} it had"
        )
    for completion in completions:
        check_completion(completion)


def _compare_passes(passes: Sequence[_Pass]) -> tuple[bool | None, str | None]:
    """Whether the first half of the passes ran as fast as the last, and why that is not known.

    Halves and not extremes: the slowest and the fastest of a hundred short passes always lie apart.
    """
    half = len(passes) // 2
    if half == 0:
        return None, _ONE_PASS
    if not any(item.output_tok for item in passes):
        return None, "no output tokens to compare"
    return are_alike(_rate(passes[:half]), _rate(passes[-half:])), None


def _rate(passes: Sequence[_Pass]) -> float:
    elapsed_s = seconds_between(passes[0].begin_ns, passes[-1].end_ns)
    return sum(item.output_tok for item in passes) / elapsed_s if elapsed_s > 0 else 0.0


@dataclass(frozen=True)
class Arrival:
    """A request that arrived; its `index` is a number of its own, `prompt_index` the prompt's."""

    request: TokenRequest
    prompt_index: int
    arrived_ns: int


@dataclass(frozen=True)
class SteadyBooks:
    """What counts in a window; an instant is in it after its opening and up to its closing."""

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
            warnings: what is known already.
        """
        finished = [pair for pair in answered if self._holds(pair[1].finished_ns)]
        good = [(arrival, item) for arrival, item in finished if item.error is None]
        prefilled = self._prefilled(answered)
        steady, reason = self._compare_halves(answered)
        return MeasuredWindow(
            traffic_mode=self.mode,
            opened_ns=self.opened_ns,
            closed_ns=self.closed_ns,
            repeats=len(finished) // self.prompt_count,
            requests=tuple(times_of(item, arrival.arrived_ns) for arrival, item in good),
            failures=(*(item.error for _, item in finished if item.error is not None), *lost),
            input_tok=sum(len(arrival.request.token_ids) for arrival, _ in prefilled),
            output_tok=sum(1 for time_ns in _token_times(answered) if self._holds(time_ns)),
            padding_tok=padding_of([item for _, item in prefilled]),
            steady=steady,
            steady_null_reason=reason,
            outputs=tuple(
                Output(arrival.prompt_index, len(arrival.request.token_ids), item.output_ids) for arrival, item in good
            ),
            warnings=(*warnings, *self._backlog_warning(arrived_ns, len(finished)), *_untimed_warning(answered)),
        )

    def _holds(self, time_ns: int) -> bool:
        return self.opened_ns < time_ns <= self.closed_ns

    def _prefilled(self, answered: Sequence[tuple[Arrival, Completion]]) -> list[tuple[Arrival, Completion]]:
        """The requests whose input counts: those whose first output token, the end of prefill, was in the window."""
        return [
            (arrival, item)
            for arrival, item in answered
            if item.error is None and self._holds(next(_times(item), item.finished_ns))
        ]

    def _compare_halves(self, answered: Sequence[tuple[Arrival, Completion]]) -> tuple[bool | None, str | None]:
        middle_ns = (self.opened_ns + self.closed_ns) // 2
        inside = [time_ns for time_ns in _token_times(answered) if self._holds(time_ns)]
        if not inside:
            return None, "no output tokens to compare"
        first = sum(1 for time_ns in inside if time_ns <= middle_ns)
        return are_alike(first, len(inside) - first), None

    def _backlog_warning(self, arrived_ns: Sequence[int], finished: int) -> tuple[Reason, ...]:
        """Whether arrivals exceed completions by more than a tenth, and than two deviations of a Poisson count."""
        arrived = sum(1 for time_ns in arrived_ns if self._holds(time_ns))
        growth = arrived - finished
        if not self.is_open_loop or growth <= max(0.1 * arrived, 2 * math.sqrt(arrived)):
            return ()
        return (Reason.of("load_too_high", arrived=arrived, finished=finished),)


def _times(completion: Completion) -> Iterator[int]:
    """When each output token was there; untimed tokens when the request was finished."""
    if completion.token_times_ns is not None:
        return iter(completion.token_times_ns)
    return itertools.repeat(completion.finished_ns, len(completion.output_ids))


def _token_times(answered: Sequence[tuple[Arrival, Completion]]) -> Iterator[int]:
    return (time_ns for _, item in answered if item.error is None for time_ns in _times(item))


def _untimed_warning(answered: Sequence[tuple[Arrival, Completion]]) -> tuple[Reason, ...]:
    if all(item.token_times_ns is not None for _, item in answered if item.error is None and item.output_ids):
        return ()
    return (Reason.of("tokens_untimed"),)
