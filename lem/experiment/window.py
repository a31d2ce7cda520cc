"""The measured window: what was done between its edges, and the closed-batch way of opening and closing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lem.backends.protocol import Backend, Completion, OnProgress, TokenRequest
from lem.clock import Clock, seconds_between
from lem.errors import EngineError
from lem.experiment.latency import RequestTimes
from lem.measurement import STEADY_TOLERANCE
from lem.reasons import Reason

__all__ = [
    "MeasuredWindow",
    "Output",
    "are_alike",
    "check_completion",
    "measure_batch",
    "padding_of",
    "times_of",
]

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
    backend: Backend,
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
    backend.synchronize()
    opened_ns = begin_ns = clock.monotonic_ns()
    while True:
        told = _counting_on(len(passes) * len(requests), report)
        completions = backend.generate(requests, observe_tokens=observe_tokens, on_progress=told)
        backend.synchronize()
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
