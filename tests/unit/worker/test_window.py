from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from lem.base.errors import EngineError
from lem.engines.protocol import Completion, OnProgress, TokenRequest, say_nothing
from lem.worker.window import MeasuredWindow, measure_batch
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend, make_requests


def measure(
    backend: TimedBackend, requests: Sequence[TokenRequest], min_window_s: float = 0.0, *, observe_tokens: bool = False
) -> MeasuredWindow:
    return measure_batch(
        backend,
        requests,
        min_window_s=min_window_s,
        observe_tokens=observe_tokens,
        clock=backend.clock,
        report=lambda _: None,
    )


def test_window_spans_exactly_the_work() -> None:
    clock = SteppedClock()
    found = measure(TimedBackend(clock, width=2), make_requests(4))
    # two batches of a 10 ms prefill and four steps of 1 ms
    assert found.window_s == pytest.approx(0.028)
    assert (found.opened_ns, found.closed_ns) == (clock.start_ns, clock.now_ns)
    assert found.repeats == 1


def test_device_is_idle_at_both_edges() -> None:
    backend = TimedBackend(SteppedClock())
    measure(backend, make_requests(2))
    assert backend.calls == ["synchronize", "generate", "synchronize"]


def test_prompt_set_is_repeated_until_the_window_is_long_enough() -> None:
    backend = TimedBackend(SteppedClock(), width=2)  # 28 ms a pass
    found = measure(backend, make_requests(4), min_window_s=0.1)
    assert found.repeats == 4
    assert found.window_s == pytest.approx(0.112)
    assert len(found.requests) == 16
    assert found.input_tok == 4 * 4 * 3
    assert found.output_tok == 4 * 4 * 4


def test_padding_is_neither_input_nor_output() -> None:
    requests = [TokenRequest(0, (1,), 2), TokenRequest(1, tuple(range(9)), 8)]
    found = measure(TimedBackend(SteppedClock(), width=2), requests)
    assert found.input_tok == 10
    assert found.output_tok == 10


def test_without_observation_there_are_no_token_times() -> None:
    found = measure(TimedBackend(SteppedClock()), make_requests(2))
    assert [item.token_times_ns for item in found.requests] == [None, None]


def test_observed_requests_run_alone_with_their_token_times() -> None:
    backend = TimedBackend(SteppedClock(), width=8)
    found = measure(backend, make_requests(3), observe_tokens=True)
    assert [len(batch) for batch in backend.batches] == [1, 1, 1]
    assert [len(item.token_times_ns or ()) for item in found.requests] == [4, 4, 4]


def test_single_pass_has_nothing_to_compare_with() -> None:
    found = measure(TimedBackend(SteppedClock()), make_requests(2))
    assert found.steady is None
    assert "one pass" in (found.steady_null_reason or "")


@pytest.mark.parametrize(("second", "is_steady"), [(1.0, True), (1.019, True), (1.021, False), (0.979, False)])
def test_halves_that_differ_by_two_percent_are_not_steady(second: float, is_steady: bool) -> None:
    backend = TimedBackend(SteppedClock(), slow_down=lambda batches: 1.0 if batches < 4 else second)  # 14 ms a pass
    found = measure(backend, make_requests(2), min_window_s=0.1)
    assert (found.repeats, found.steady) == (8, is_steady)


def test_failed_requests_are_counted_and_their_tokens_are_not() -> None:
    backend = TimedBackend(SteppedClock(), fails=lambda request: request.index == 1)
    found = measure(backend, make_requests(4))
    assert found.failures == ("scripted failure",)
    assert len(found.requests) == 3
    assert found.input_tok == 9
    assert found.output_tok == 12


def test_a_set_that_fails_as_a_whole_is_not_repeated() -> None:
    backend = TimedBackend(SteppedClock(), fails=lambda _: True)
    found = measure(backend, make_requests(2), min_window_s=1000.0)
    assert found.repeats == 1
    assert len(found.failures) == 2


def test_answers_of_the_first_pass_are_kept_in_order() -> None:
    found = measure(TimedBackend(SteppedClock(), width=2), make_requests(3), min_window_s=0.1)
    assert found.repeats > 1
    assert [item.prompt_index for item in found.outputs] == [0, 1, 2]
    assert found.outputs[0].output_ids == (100, 101, 102, 103)


class TamperingBackend(TimedBackend):
    """Changes what it hands in."""

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        return self.tamper(super().generate(requests, observe_tokens=observe_tokens, on_progress=on_progress))

    def tamper(self, completions: list[Completion]) -> list[Completion]:
        raise NotImplementedError


class LosesOne(TamperingBackend):
    def tamper(self, completions: list[Completion]) -> list[Completion]:
        return completions[1:]


class AnswersTwice(TamperingBackend):
    def tamper(self, completions: list[Completion]) -> list[Completion]:
        return [completions[0], *completions[:-1]]


class MiscountsTimes(TamperingBackend):
    def tamper(self, completions: list[Completion]) -> list[Completion]:
        return [replace(item, token_times_ns=(item.finished_ns,)) for item in completions]


class EndsBeforeItStarts(TamperingBackend):
    def tamper(self, completions: list[Completion]) -> list[Completion]:
        return [replace(item, finished_ns=item.started_ns - 1) for item in completions]


@pytest.mark.parametrize("kind", [LosesOne, AnswersTwice, MiscountsTimes, EndsBeforeItStarts])
def test_an_engine_that_does_not_answer_each_request_once_is_refused(kind: type[TamperingBackend]) -> None:
    with pytest.raises(EngineError):
        measure(kind(SteppedClock()), make_requests(3))


def test_progress_tells_the_requests_done() -> None:
    backend = TimedBackend(SteppedClock())
    done: list[int] = []
    measure_batch(
        backend, make_requests(3), min_window_s=0.05, observe_tokens=True, clock=backend.clock, report=done.append
    )
    assert done == [1, 2, 3, 4, 5, 6]
