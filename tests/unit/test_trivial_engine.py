from __future__ import annotations

import resource
from collections import deque
from pathlib import Path

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, Engine, TokenRequest
from tests.doubles.trivial_engine import TrivialEngine, answer

CONFIG = ExperimentConfig.from_dict({"model": "none", "pytorch": {"batch_size": 2}})
REQUESTS = (TokenRequest(0, (1, 2, 3), 4), TokenRequest(1, (9,), 2), TokenRequest(2, (1, 2, 3), 3))


class Queue:
    """All requests are there from the start."""

    def __init__(self, requests: tuple[TokenRequest, ...]) -> None:
        self._waiting = deque(requests)
        self.limits: list[int] = []
        self.completed: list[Completion] = []

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        self.limits.append(limit)
        return tuple(self._waiting.popleft() for _ in range(min(limit, len(self._waiting))))

    def complete(self, completion: Completion) -> None:
        self.completed.append(completion)


def loaded(**script: object) -> TrivialEngine:
    return TrivialEngine(script, CONFIG)


def test_it_is_an_engine():
    engine: Engine = loaded()

    assert engine.report.device == "cpu"
    assert engine.report.effective["pytorch"] == {"batch_size": 2}
    assert engine.decode(engine.encode("text")) == "text"


def test_the_same_prompt_has_the_same_answer_of_the_length_asked_for():
    first, second, third = loaded().generate(REQUESTS, observe_tokens=False)

    assert [len(item.output_ids) for item in (first, second, third)] == [4, 2, 3]
    assert first.output_ids[:3] == third.output_ids
    assert first.output_ids == answer(REQUESTS[0])
    assert second.output_ids != first.output_ids[:2]


def test_batches_pad_to_their_longest_prompt_and_tell_no_token_times():
    first, second, third = loaded().generate(REQUESTS, observe_tokens=False)

    assert [item.padding_tok for item in (first, second, third)] == [0, 2, 0]
    assert [item.token_times_ns for item in (first, second, third)] == [None] * 3
    assert first.started_ns == second.started_ns < third.started_ns


def test_observed_tokens_have_a_time_each_and_run_alone():
    completions = loaded().generate(REQUESTS, observe_tokens=True)

    for completion in completions:
        times = completion.token_times_ns
        assert times is not None
        assert len(times) == len(completion.output_ids)
        assert list(times) == sorted(times)
        assert completion.started_ns <= times[0]
        assert completion.finished_ns == times[-1]
    assert [item.padding_tok for item in completions] == [0, 0, 0]


def test_serving_answers_each_request_with_token_times_in_batches():
    queue = Queue(REQUESTS)

    loaded().serve(queue)

    assert queue.limits == [2, 2, 2]
    assert [item.index for item in queue.completed] == [0, 1, 2]
    assert all(item.token_times_ns is not None for item in queue.completed)


def test_a_request_can_fail_by_itself():
    _, second, _ = loaded(failing_requests=[1]).generate(REQUESTS, observe_tokens=False)

    assert second.error is not None
    assert second.output_ids == ()


def test_rules_apply_where_they_say_and_to_the_experiments_they_name():
    rule = {"at": "configure", "do": "refuse", "when": {"max_output_tokens": 8}}
    engine = loaded(rules=[rule])

    engine.configure(CONFIG)
    with pytest.raises(OptionRefused):
        engine.configure(ExperimentConfig.from_dict({**CONFIG.to_dict(), "max_output_tokens": 8}))


def test_a_rule_can_apply_once_in_all_processes(tmp_path):
    rule = {"at": "load", "do": "fail", "kind": "engine", "once": str(tmp_path / "done")}

    with pytest.raises(EngineError):
        loaded(rules=[rule])
    assert loaded(rules=[rule]).report.engine_name == "trivial"


def test_it_can_take_memory_and_keep_it():
    before = _resident_b()
    engine = loaded(rules=[{"at": "generate", "do": "allocate", "bytes": 64 * 1024 * 1024}])

    engine.generate(REQUESTS, observe_tokens=False)

    assert _resident_b() - before > 48 * 1024 * 1024


def _resident_b() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
