from __future__ import annotations

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Engine, TokenRequest
from tests.doubles.trivial_engine import TrivialEngine, answer
from tests.integration.engine_answers import Arrivals

CONFIG = ExperimentConfig.from_dict({"model": "none", "pytorch": {"batch_size": 2}})
REQUESTS = (TokenRequest(0, (1, 2, 3), 4), TokenRequest(1, (9,), 2), TokenRequest(2, (1, 2, 3), 3))


def loaded(**script: object) -> TrivialEngine:
    return TrivialEngine(script, CONFIG)


def test_the_same_prompt_has_the_same_answer_in_batches_padded_to_their_longest_prompt():
    engine: Engine = loaded()
    first, second, third = engine.generate(REQUESTS, observe_tokens=False)

    assert engine.decode(engine.encode("text")) == "text"
    assert [len(item.output_ids) for item in (first, second, third)] == [4, 2, 3]
    assert first.output_ids == answer(REQUESTS[0])
    assert first.output_ids[:3] == third.output_ids
    assert [item.padding_tok for item in (first, second, third)] == [0, 2, 0]
    assert first.started_ns == second.started_ns < third.started_ns


def test_observed_tokens_have_a_time_each_and_run_alone():
    for completion in loaded().generate(REQUESTS, observe_tokens=True):
        times = completion.token_times_ns
        assert times is not None
        assert len(times) == len(completion.output_ids)
        assert list(times) == sorted(times)
        assert completion.started_ns <= times[0]
        assert (completion.finished_ns, completion.padding_tok) == (times[-1], 0)


def test_serving_answers_each_request_with_token_times_in_batches():
    arrivals = Arrivals(REQUESTS)
    loaded().serve(arrivals)
    assert arrivals.taken == [2, 1]
    assert [item.index for item in arrivals.completions] == [0, 1, 2]
    assert all(item.token_times_ns is not None for item in arrivals.completions)


def test_a_request_can_fail_by_itself():
    _, second, _ = loaded(failing_requests=[1]).generate(REQUESTS, observe_tokens=False)
    assert second.error is not None
    assert second.output_ids == ()


def test_rules_apply_where_they_say_and_to_the_experiments_they_name():
    engine = loaded(rules=[{"at": "configure", "do": "refuse", "when": {"max_output_tokens": 8}}])
    engine.configure(CONFIG)
    with pytest.raises(OptionRefused):
        engine.configure(ExperimentConfig.from_dict({**CONFIG.to_dict(), "max_output_tokens": 8}))


def test_a_rule_can_apply_once_in_all_processes(tmp_path):
    rule = {"at": "load", "do": "fail", "kind": "engine", "once": str(tmp_path / "done")}
    with pytest.raises(EngineError):
        loaded(rules=[rule])
    assert loaded(rules=[rule]).report.engine_name == "trivial"
