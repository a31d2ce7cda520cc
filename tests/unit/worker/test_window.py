from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, OnProgress, TokenRequest, say_nothing
from lem.worker.window import Answer, MeasuredWindow, distribute, latency_of, measure_batch, percentile
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend, make_requests

MS = 1_000_000


def measure(backend: TimedBackend, requests: Sequence[TokenRequest], min_window_s: float = 0.0) -> MeasuredWindow:
    return measure_batch(
        backend, requests, min_window_s=min_window_s, observe_tokens=False, clock=backend.clock, report=say_nothing
    )


def test_window_spans_exactly_the_work_and_the_device_is_idle_at_both_edges() -> None:
    backend = TimedBackend(SteppedClock(), width=2)
    found = measure(backend, make_requests(4))
    # two batches of a 10 ms prefill and four steps of 1 ms
    assert found.window_s == pytest.approx(0.028)
    assert (found.opened_ns, found.closed_ns) == (backend.clock.start_ns, backend.clock.now_ns)
    assert backend.calls == ["synchronize", "generate", "synchronize"]
    assert found.repeats == 1
    assert (found.steady.value, found.steady.null_reason) == (None, Reason.of("one_pass"))


def test_prompt_set_is_repeated_until_the_window_is_long_enough() -> None:
    found = measure(TimedBackend(SteppedClock(), width=2), make_requests(4), min_window_s=0.1)  # 28 ms a pass
    assert found.repeats == 4
    assert found.window_s == pytest.approx(0.112)
    assert len(found.requests) == 16
    assert (found.input_tok, found.output_tok) == (4 * 4 * 3, 4 * 4 * 4)
    assert [item.prompt_index for item in found.outputs] == [0, 1, 2, 3], "the answers of the first pass"
    assert found.outputs[0].completion.output_ids == (100, 101, 102, 103)


def test_padding_is_neither_input_nor_output() -> None:
    requests = [TokenRequest(0, (1,), 2), TokenRequest(1, tuple(range(9)), 8)]
    found = measure(TimedBackend(SteppedClock(), width=2), requests)
    assert (found.input_tok, found.output_tok) == (10, 10)


@pytest.mark.parametrize(("second", "is_steady"), [(1.0, True), (1.019, True), (1.021, False), (0.979, False)])
def test_halves_that_differ_by_two_percent_are_not_steady(second: float, is_steady: bool) -> None:
    backend = TimedBackend(SteppedClock(), slow_down=lambda batches: 1.0 if batches < 4 else second)  # 14 ms a pass
    found = measure(backend, make_requests(2), min_window_s=0.1)
    assert (found.repeats, found.steady.value) == (8, is_steady)


def test_failed_requests_are_counted_their_tokens_are_not_and_a_set_of_them_is_not_repeated() -> None:
    found = measure(TimedBackend(SteppedClock(), fails=lambda request: request.index == 1), make_requests(4))
    assert found.failures == ("scripted failure",)
    assert (len(found.requests), found.input_tok, found.output_tok) == (3, 9, 12)
    found = measure(TimedBackend(SteppedClock(), fails=lambda _: True), make_requests(2), min_window_s=1000.0)
    assert (found.repeats, len(found.failures)) == (1, 2)


class TamperingBackend(TimedBackend):
    tamper: Callable[[list[Completion]], list[Completion]]

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        return self.tamper(super().generate(requests, observe_tokens=observe_tokens, on_progress=on_progress))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda found: found[1:],
        lambda found: [found[0], *found[:-1]],
        lambda found: [replace(item, token_times_ns=(item.finished_ns,)) for item in found],
        lambda found: [replace(item, finished_ns=item.started_ns - 1) for item in found],
    ],
    ids=["loses one", "answers twice", "miscounts times", "ends before it starts"],
)
def test_an_engine_that_does_not_answer_each_request_once_is_refused(tamper: Any) -> None:
    backend = TamperingBackend(SteppedClock())
    backend.tamper = tamper
    with pytest.raises(EngineError):
        measure(backend, make_requests(3))


# Latency


def times(*, arrived: int | None, started: int, tokens: list[int]) -> Answer:
    """A request with times in milliseconds."""
    ids, stamps = tuple(range(len(tokens))), tuple(token * MS for token in tokens)
    completion = Completion(0, ids, started * MS, stamps[-1], stamps)
    return Answer(0, 3, None if arrived is None else arrived * MS, completion)


def untimed(output_tok: int, finished: int = 100) -> Answer:
    return Answer(0, 3, 0, Completion(0, tuple(range(output_tok)), 0, finished * MS))


def means(*requests: Answer) -> dict[str, float | None]:
    latency = latency_of(requests)
    sections = {name: getattr(latency, name) for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s")}
    return {name: None if found is None else found.mean for name, found in sections.items()}


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 10.0), (0.5, 25.0), (0.9, 37.0), (1.0, 40.0)])
def test_percentile_interpolates_between_closest_ranks(fraction: float, value: float) -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], fraction) == pytest.approx(value)
    assert percentile([7.0], fraction) == 7.0


@pytest.mark.parametrize(("n", "known"), [(1, 0), (9, 0), (10, 1), (19, 1), (20, 2), (99, 2), (100, 3)])
def test_a_percentile_needs_enough_values(n: int, known: int) -> None:
    found = distribute([float(value) for value in reversed(range(n))])
    assert found is not None
    assert found.n == n
    assert found.mean == found.p50 == pytest.approx((n - 1) / 2)
    assert [item is not None for item in (found.p90, found.p95, found.p99)] == [place < known for place in range(3)]


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([times(arrived=100, started=150, tokens=[160, 170, 190])], (0.060, 0.015, 0.015, 0.090, 0.050)),
        ([times(arrived=None, started=100, tokens=[130, 140])], (0.030, 0.010, 0.010, 0.040, None)),
        ([untimed(10)], (None, None, None, 0.100, 0.0)),
        ([times(arrived=0, started=0, tokens=[10, 20]), untimed(2, 30)], (None, None, None, 0.025, 0.0)),
        ([times(arrived=0, started=0, tokens=[10])], (0.010, None, None, 0.010, 0.0)),
        ([times(arrived=0, started=0, tokens=[10, 20]), untimed(0, 5)], (0.010, 0.010, 0.010, 0.0125, 0.0)),
        ([untimed(0)], (None, None, None, 0.100, 0.0)),
        ([], (None, None, None, None, None)),
    ],
    ids=["open loop", "closed batch", "untimed", "one untimed", "one token", "one without output", "no output", "none"],
)
def test_latency_counts_from_the_arrival_and_holds_only_what_was_observed(
    requests: list[Answer], expected: tuple[float | None, ...]
) -> None:
    found = means(*requests)
    assert list(found.values()) == [value if value is None else pytest.approx(value) for value in expected]
    reasons = latency_of(requests).null_reasons
    assert reasons.keys() == {name for name, value in found.items() if value is None}


def test_reasons_tell_missing_times_from_missing_tokens_and_missing_requests() -> None:
    found = [latency_of(item).null_reasons["ttft_s"] for item in ([untimed(10)], [untimed(0)], [])]
    assert found[0].code == "tokens_not_observed"
    assert len(set(found)) == 3
