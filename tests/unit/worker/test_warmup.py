from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.config.experiment import WarmupConfig
from lem.engines.protocol import Completion, TokenRequest
from lem.worker.harness import has_settled, warm_up
from lem.worker.recording import WarmupOutcome
from lem.worker.requests import DisjointRequests
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend, make_requests


def run(
    backend: TimedBackend, width: int = 1, report: Callable[[int], None] = lambda _: None, **settings: Any
) -> WarmupOutcome:
    def run_step(requests: Sequence[TokenRequest]) -> list[Completion]:
        return backend.generate(requests, observe_tokens=False)

    source = DisjointRequests(make_requests(6), seed=3)
    return warm_up(source, width, WarmupConfig(**settings), run_step, backend.clock, report)


def test_steady_engine_settles_once_the_window_is_full() -> None:
    found = run(TimedBackend(SteppedClock()), min_prompts=1, window_size=4)
    assert found.converged is True
    assert found.prompts == 4
    assert found.elapsed_s == pytest.approx(4 * 0.014)
    assert found.step_s == pytest.approx(0.014)
    assert found.warnings == ()


def test_at_least_min_prompts_are_run() -> None:
    assert run(TimedBackend(SteppedClock()), min_prompts=12, window_size=3).prompts == 12


def test_at_least_twice_the_concurrency_is_run_and_at_that_concurrency() -> None:
    backend = TimedBackend(SteppedClock(), width=4)
    found = run(backend, width=4, min_prompts=0, convergence_detection=False)
    assert found.prompts == 8
    assert [len(batch) for batch in backend.batches] == [4, 4]


def test_it_goes_on_until_the_speed_has_settled() -> None:
    slow_start = TimedBackend(SteppedClock(), slow_down=lambda batches: 5.0 - batches if batches < 4 else 1.0)
    found = run(slow_start, min_prompts=1, window_size=3)
    assert found.converged is True
    assert found.prompts == 4 + 3


def test_cap_on_prompts_is_kept_and_told() -> None:
    erratic = TimedBackend(SteppedClock(), slow_down=lambda batches: 1.0 + batches % 2)
    found = run(erratic, max_prompts=20)
    assert found.converged is False
    assert found.prompts == 20
    assert found.warnings[0].code == "warmup_unsettled"


def test_cap_on_prompts_is_not_passed_by_part_of_a_batch() -> None:
    erratic = TimedBackend(SteppedClock(), width=3, slow_down=lambda batches: 1.0 + batches % 2)
    found = run(erratic, width=3, max_prompts=26)
    assert found.converged is False
    assert found.prompts == 24


def test_cap_on_time_is_kept_and_told() -> None:
    found = run(TimedBackend(SteppedClock(), token_ms=1000.0), timeout_seconds=5.0)
    assert found.converged is False
    assert found.prompts == 2
    assert Reason.of("warmup_too_few_steps", prompts=2) in found.warnings
    assert Reason.of("warmup_timed_out", prompts=2, floor=5) in found.warnings


def test_time_of_zero_is_no_limit() -> None:
    found = run(TimedBackend(SteppedClock(), token_ms=60_000.0), timeout_seconds=0)
    assert found.converged is True
    assert found.prompts == 5


def test_wide_batches_run_enough_steps_to_be_judged() -> None:
    found = run(TimedBackend(SteppedClock(), width=20), width=20, max_prompts=50, window_size=5)
    assert found.converged is True
    assert found.prompts == 5 * 20


def test_prompts_of_unlike_lengths_are_compared_on_equal_steps() -> None:
    clock = SteppedClock()
    backend = TimedBackend(clock)
    lengths = (3, 400, 20, 90, 7, 250)
    unlike = [TokenRequest(index, tuple(range(length)), 4) for index, length in enumerate(lengths)]

    def run_step(requests: Sequence[TokenRequest]) -> list[Completion]:
        clock.advance_ms(sum(len(request.token_ids) for request in requests))  # prefill by length
        return backend.generate(requests, observe_tokens=False)

    found = warm_up(DisjointRequests(unlike, seed=1), 1, WarmupConfig(), run_step, clock, lambda _: None)
    ran = [len(batch[0].token_ids) for batch in backend.batches]
    assert found.converged is True
    assert ran[:5] == list(lengths[:5]), "the measured shapes first"
    assert set(ran[5:]) == {90}, "then the one in the middle, until it has settled"
    assert ran.count(90) == 5


def test_without_detection_convergence_is_null_with_its_reason() -> None:
    found = run(TimedBackend(SteppedClock()), convergence_detection=False)
    assert found.converged is None
    assert found.prompts == 5
    assert "convergence_detection" in (found.null_reason or "")


def test_steps_of_unequal_work_are_compared_by_the_token() -> None:
    backend = TimedBackend(
        SteppedClock(), prefill_ms=0.0, output_of=lambda request: 1 + request.index % 4
    )  # 1 ms a token, however many
    assert run(backend, min_prompts=1).converged is True


def test_failed_requests_are_told() -> None:
    found = run(TimedBackend(SteppedClock(), fails=lambda request: request.index == 0))
    (failed,) = [item.data for item in found.warnings if item.code == "warmup_requests_failed"]
    assert (failed["failed"], failed["first"]) == (1, "scripted failure")


def test_progress_tells_the_prompts_run() -> None:
    done: list[int] = []
    run(TimedBackend(SteppedClock(), width=2), 2, done.append, min_prompts=6, convergence_detection=False)
    assert done == [2, 4, 6]


def test_variation_is_sample_deviation_over_mean_of_the_last_values() -> None:
    settings = WarmupConfig(window_size=3, cv_threshold=0.1)
    assert not has_settled([1.0, 1.0], settings)
    assert has_settled([99.0, 1.0, 1.0, 1.18], settings)  # 0.098
    assert not has_settled([1.0, 1.0, 1.19], settings)  # 0.103; the population's deviation would give 0.084
