"""The measured window: its requests and their times, their latency, and whether it was steady."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lem.base.clock import Clock, seconds_between
from lem.base.errors import EngineError
from lem.base.measured import Measured, known
from lem.base.measurement import STEADY_TOLERANCE
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, Engine, TokenRequest
from lem.record import OBSERVATIONS_NEEDED, Distribution, Latency

NOTHING_TO_COMPARE = Reason.of("no_tokens_to_compare")
CLOSED_BATCH = "closed_batch"


@dataclass(frozen=True)
class Answer:
    prompt_index: int  # from 0
    input_tok: int
    arrived_ns: int | None  # open loop: its arrival; closed loop: when it was sent; None in a closed batch
    completion: Completion

    @property
    def output_tok(self) -> int:
        return len(self.completion.output_ids)

    @property
    def origin_ns(self) -> int:
        """Where latency counts from: the arrival, or in a closed batch the moment the engine took it up."""
        return self.completion.started_ns if self.arrived_ns is None else self.arrived_ns

    @property
    def e2e_s(self) -> float:
        return seconds_between(self.origin_ns, self.completion.finished_ns)

    @property
    def ttft_s(self) -> float:
        """To be asked only of a request with token times."""
        return seconds_between(self.origin_ns, (self.completion.token_times_ns or ())[0])


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


def latency_of(requests: Sequence[Answer]) -> Latency:
    """The latency section over completed requests; what was not observed is None with its reason, never spread evenly.

    A request without output counts towards end-to-end and queue times only. One request whose tokens were not timed
    voids TTFT, TPOT and ITL for all: the rest would be a sample chosen by the engine.
    """
    with_output = [item for item in requests if item.output_tok > 0]
    is_timed = all(item.completion.token_times_ns for item in with_output)
    timed = [item for item in with_output if item.completion.token_times_ns] if is_timed else []
    why_not = "no_token" if is_timed else "tokens_not_observed"
    why_not_between = "no_second_token" if timed else why_not
    tpot_s = [(item.e2e_s - item.ttft_s) / (item.output_tok - 1) for item in timed if item.output_tok > 1]
    gaps = (pair for item in timed for pair in itertools.pairwise(item.completion.token_times_ns or ()))
    queued = ((item.arrived_ns, item.completion.started_ns) for item in requests)
    queue_s = [seconds_between(arrived, started) for arrived, started in queued if arrived is not None]
    values: dict[str, tuple[Sequence[float], str]] = {
        "ttft_s": ([item.ttft_s for item in timed], why_not),
        "tpot_s": (tpot_s, why_not_between),
        "itl_s": ([seconds_between(earlier, later) for earlier, later in gaps], why_not_between),
        "e2e_s": ([item.e2e_s for item in requests], "no_request"),
        "queue_s": (queue_s, "no_arrivals"),
    }
    found = ((name, distribute(seconds), why) for name, (seconds, why) in values.items())
    return Latency.of(**{name: known(value, why if requests else "no_request") for name, value, why in found})


@dataclass(frozen=True)
class MeasuredWindow:
    """The work between two stamps of CLOCK_MONOTONIC."""

    traffic_mode: str
    opened_ns: int
    closed_ns: int
    repeats: int  # runs of the prompt set; under traffic completed requests over prompts, rounded down
    requests: tuple[Answer, ...]  # the completed requests that count
    failures: tuple[str, ...]  # the error of each failed request that counts
    input_tok: int  # of requests that did not fail, without padding
    output_tok: int
    padding_tok: int | None  # in front of the prompts behind `input_tok`; None where the engine does not report it
    steady: Measured[bool]  # whether its halves are alike
    outputs: tuple[Answer, ...]  # of the first pass, or of the requests that count under traffic
    warnings: tuple[Reason, ...] = ()
    passes_ns: tuple[tuple[int, int], ...] = ()  # begin and end of each pass over the prompt set; () under traffic

    @property
    def window_s(self) -> float:
        return seconds_between(self.opened_ns, self.closed_ns)


def check_completion(completion: Completion) -> None:
    """Refuse impossible times.

    Raises EngineError: another number of token times than of tokens, or an end before the start.
    """
    times = completion.token_times_ns
    if completion.error is None and times is not None and len(times) != len(completion.output_ids):
        what = f"{len(times)} times for {len(completion.output_ids)} tokens"
        raise EngineError(f"request {completion.index}: the backend gave {what}")
    if completion.finished_ns < completion.started_ns:
        raise EngineError(f"request {completion.index}: the backend reports an end before the start")


def are_alike(first: float, second: float) -> Measured[bool]:
    """Whether two rates differ by less than the tolerance, relative to their mean."""
    return Measured(abs(first - second) < STEADY_TOLERANCE * (first + second) / 2)


def padding_of(answers: Sequence[Answer]) -> int | None:
    """The padding of all the requests; None when it is not reported for one."""
    found = [item.completion.padding_tok for item in answers if item.completion.padding_tok is not None]
    return sum(found) if len(found) == len(answers) else None


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
    lengths = {request.index: len(request.token_ids) for request in requests}
    for item in passes:
        if sorted(completion.index for completion in item.completions) != sorted(lengths):
            what = f"{len(item.completions)} completions that do not match the {len(lengths)} requests"
            raise EngineError(f"the backend gave {what}")
        for completion in item.completions:
            check_completion(completion)
    everything = [completion for item in passes for completion in item.completions]
    good = [Answer(item.index, lengths[item.index], None, item) for item in everything if item.error is None]
    first_pass = good[: sum(completion.error is None for completion in passes[0].completions)]
    return MeasuredWindow(
        traffic_mode=CLOSED_BATCH,
        opened_ns=passes[0].begin_ns,
        closed_ns=passes[-1].end_ns,
        repeats=len(passes),
        requests=tuple(good),
        failures=tuple(item.error for item in everything if item.error is not None),
        input_tok=sum(item.input_tok for item in good),
        output_tok=sum(item.output_tok for item in passes),
        padding_tok=padding_of(good),
        steady=_compare_passes(passes),
        outputs=tuple(sorted(first_pass, key=lambda item: item.prompt_index)),
        passes_ns=tuple((item.begin_ns, item.end_ns) for item in passes),
    )


def _compare_passes(passes: Sequence[_Pass]) -> Measured[bool]:
    """Whether the first half of the passes ran as fast as the last.

    Halves and not extremes: the slowest and the fastest of a hundred short passes always differ.
    """
    half = len(passes) // 2
    if half == 0:
        return known(None, "one_pass")
    if not any(item.output_tok for item in passes):
        return Measured(None, NOTHING_TO_COMPARE)
    return are_alike(_rate(passes[:half]), _rate(passes[-half:]))


def _rate(passes: Sequence[_Pass]) -> float:
    elapsed_s = seconds_between(passes[0].begin_ns, passes[-1].end_ns)
    return sum(item.output_tok for item in passes) / elapsed_s if elapsed_s > 0 else 0.0
