from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.engines.protocol import Completion, OnProgress, TokenRequest, say_nothing
from lem.worker.window import MeasuredWindow, measure_batch
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend, make_requests


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
    assert len(found.completed) == 16
    assert (found.input_tok, found.output_tok) == (4 * 4 * 3, 4 * 4 * 4)
    assert [item.request.prompt for item in found.outputs] == [0, 1, 2, 3], "the answers of the first pass"
    assert found.outputs[0].output_ids == (100, 101, 102, 103)


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
    assert (len(found.completed), found.input_tok, found.output_tok) == (3, 9, 12)
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
