"""The measured window of a closed batch, and what every window holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lem.base.clock import Clock, seconds_between
from lem.base.dataclass import dataclass, field
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, Driven, Engine, TokenRequest
from lem.meters.requestlog import CLOSED_BATCH, Request, RequestLog


class Answer(NamedTuple):
    """What a request was answered with, for `save_outputs`."""

    request: Request
    output_ids: tuple[int, ...]
    text: str | None = None  # where it is known without decoding the ids


@dataclass(frozen=True)
class MeasuredWindow(RequestLog):
    outputs: tuple[Answer, ...] = ()  # of the first pass, or of the requests that count under traffic
    warnings: tuple[Reason, ...] = ()


def as_request(prompt: int, input_tok: int, arrived_ns: int | None, completion: Completion) -> Request:
    return Request(
        prompt,
        input_tok if completion.input_tok is None else completion.input_tok,
        completion.output_tok,
        completion.padding_tok,
        arrived_ns,
        completion.started_ns,
        completion.finished_ns,
        completion.token_times_ns,
        completion.error,
    )


def check_completion(completion: Completion) -> None:
    """Raise EngineError for impossible times: other than one per token, or an end before the start."""
    times = completion.token_times_ns
    if completion.error is None and times is not None and len(times) != completion.output_tok:
        what = f"{len(times)} times for {completion.output_tok} tokens"
        raise EngineError(f"request {completion.index}: the backend gave {what}")
    if completion.finished_ns < completion.started_ns:
        raise EngineError(f"request {completion.index}: the backend reports an end before the start")


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
    """The window of a closed batch: the device idle, all requests, the device idle again."""
    # The whole set is repeated until the window is long enough. With `observe_tokens` each request runs alone. Nothing
    # is checked or added up before the window has closed. `report` gets the number of requests done so far. Raises
    # EngineError: the engine failed, or did not answer each request once.
    if isinstance(engine, Driven):
        found = engine.run_passes(requests, min_window_s, report)
        edges_ns = ((min(it.started_ns for it in done), max(it.finished_ns for it in done)) for done in found)
        return _add_up(requests, [_Pass(*edges, done) for edges, done in zip(edges_ns, found, strict=True)])
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


def _add_up(requests: Sequence[TokenRequest], passes: Sequence[_Pass]) -> MeasuredWindow:
    lengths = {request.index: len(request.token_ids) for request in requests}
    for item in passes:
        if sorted(completion.index for completion in item.completions) != sorted(lengths):
            what = f"{len(item.completions)} completions that do not match the {len(lengths)} requests"
            raise EngineError(f"the backend gave {what}")
        for completion in item.completions:
            check_completion(completion)
    everything = [
        (completion, as_request(completion.index, lengths[completion.index], None, completion))
        for item in passes
        for completion in item.completions
    ]
    first_pass = [
        Answer(request, it.output_ids, it.text) for it, request in everything[: len(requests)] if request.is_good
    ]
    return MeasuredWindow(
        traffic_mode=CLOSED_BATCH,
        opened_ns=passes[0].begin_ns,
        closed_ns=passes[-1].end_ns,
        prompts=len(requests),
        requests=tuple(request for _, request in everything),
        passes_ns=tuple((item.begin_ns, item.end_ns) for item in passes),
        outputs=tuple(sorted(first_pass, key=lambda item: item.request.prompt)),
    )
