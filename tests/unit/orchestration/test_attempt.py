from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from lem.orchestration.dispatch import Outcome, Timeouts, Watch, event_of, outcome_of
from lem.orchestration.status import Event
from lem.worker.channel import ChannelError, RunRequest

TIMEOUTS = Timeouts(load_s=100.0, experiment_s=50.0, silence_s=30.0, heartbeat_s=20.0)
REQUEST = RunRequest({}, {"experiment_id": "e"}, "/results/e", "key", True)

HEARTBEAT = {"type": "heartbeat"}
RESULT = {
    "type": "result",
    "exp_id": "e",
    "valid": True,
    "engine_load_id": "load-1",
    "engine_reused": False,
    "summary": {"output_tok": 8},
}
ERROR = {
    "type": "error",
    "exp_id": "e",
    "kind": "out_of_memory",
    "message": "does not fit",
    "hint": "ask for less",
    "permanent": True,
    "phase": "load",
    "engine_lost": True,
    "log_tail": "last words",
}


def phase(name: str) -> dict[str, str]:
    return {"type": "phase", "exp_id": "e", "phase": name}


def progress(done: int) -> dict[str, object]:
    return {"type": "progress", "exp_id": "e", "done": done, "total": 9, "text": "requests"}


def kept_alive(watch: Watch, *messages: Mapping[str, object], until: float, start: float = 0.0) -> None:
    """Tell the watch something every 10 s from a start until a moment, all of the messages at once."""
    now = start
    while now < until:
        for message in messages:
            watch.heard(message, now)
        now += 10.0


def kind_at(watch: Watch, now: float) -> str | None:
    error = watch.expired(now)
    return None if error is None else error.kind


def test_nothing_is_late_before_its_time():
    watch = Watch(TIMEOUTS, 0.0)

    assert watch.next_deadline == 20.0
    assert watch.expired(19.9) is None


def test_a_worker_that_says_nothing_at_all_is_lost_after_the_heartbeats_are_due():
    watch = Watch(TIMEOUTS, 0.0)

    error = watch.expired(20.0)

    assert error is not None
    assert error.kind == "channel"
    assert "20.0 s" in error.message


def test_heartbeats_are_no_sign_of_progress():
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, HEARTBEAT, until=30.0)

    error = watch.expired(30.0)

    assert error is not None
    assert error.kind == "silent"
    assert "silence_timeout_seconds" in error.hint
    assert error.is_permanent is False


@pytest.mark.parametrize("sign", [phase("prepare"), progress(1)])
def test_phases_and_progress_are_signs_of_progress(sign: Mapping[str, object]):
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, HEARTBEAT, until=25.0)
    watch.heard(sign, 25.0)
    kept_alive(watch, HEARTBEAT, until=55.0, start=30.0)

    assert kind_at(watch, 54.9) is None
    assert kind_at(watch, 55.0) == "silent"


def test_loading_has_a_time_of_its_own():
    watch = Watch(TIMEOUTS, 0.0)
    watch.heard(phase("load"), 1.0)
    kept_alive(watch, progress(1), phase("load"), until=100.0)

    assert kind_at(watch, 100.9) is None
    error = watch.expired(101.0)
    assert error is not None
    assert error.kind == "timeout"
    assert "load_timeout_seconds" in error.hint
    assert "phase load" in error.message


def test_power_at_rest_before_the_load_is_no_part_of_it():
    watch = Watch(replace(TIMEOUTS, rest_s=45.0), 0.0)
    kept_alive(watch, phase("prepare"), until=140.0)
    assert kind_at(watch, 144.0) is None
    assert "2m 25s (in phase prepare)" in str(watch.expired(145.0))
    watch.heard(phase("load"), 144.0)
    kept_alive(watch, progress(1), start=144.0, until=240.0)
    assert kind_at(watch, 243.0) is None
    assert "1m 40s (in phase load)" in str(watch.expired(244.0))


def test_the_rest_has_its_time_from_the_end_of_the_load_whatever_phases_follow():
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, progress(1), until=90.0)
    watch.heard(phase("idle"), 90.0)
    kept_alive(watch, phase("window"), until=140.0, start=90.0)

    assert kind_at(watch, 139.9) is None
    error = watch.expired(140.0)
    assert error is not None
    assert error.kind == "timeout"
    assert "experiment_timeout_seconds" in error.hint


def test_a_result_is_an_outcome():
    assert outcome_of(REQUEST, RESULT) == Outcome(engine_reused=False)


def test_an_error_is_an_outcome_with_all_that_the_worker_reported():
    outcome = outcome_of(REQUEST, ERROR)
    error = outcome.error

    assert error is not None
    assert (error.kind, error.message, error.hint) == ("out_of_memory", "does not fit", "ask for less")
    assert error.is_permanent is True
    assert (outcome.phase, outcome.log_tail) == ("load", "last words")


@pytest.mark.parametrize("message", [{**RESULT, "exp_id": "other"}, {**ERROR, "exp_id": None}])
def test_an_answer_to_something_else_is_an_error_of_the_channel(message: dict[str, object]):
    with pytest.raises(ChannelError, match="an answer to"):
        outcome_of(REQUEST, message)


def test_events_are_those_of_this_experiment_alone():
    how_far = {"phase_done": 3, "phase_total": 9, "text": "requests", "power_w": None}
    assert event_of(REQUEST, phase("load")) == Event("phase", data={"exp_id": "e", "phase": "load"})
    assert event_of(REQUEST, progress(3)) == Event("progress", data={"exp_id": "e", **how_far})
    assert event_of(REQUEST, HEARTBEAT) == Event("tick")
    assert event_of(REQUEST, {**phase("load"), "exp_id": "other"}) is None
    assert event_of(REQUEST, {"type": "engine", "pgid": 1, "started_ticks": 1}) is None
