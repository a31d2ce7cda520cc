"""Requests through `generate_async`: tokens counted and timed as they are seen, none lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import EngineError
from lem.engines.common import EngineRaised
from lem.engines.protocol import Completion, TokenRequest, say_nothing

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers"), pytest.mark.usefixtures("tensorrt_llm")]

S = 1_000_000_000


class Clock:
    """Goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now_s = 100

    def __call__(self) -> int:
        self.now_s += 1
        return self.now_s * S


class Answer:
    """As scripted: groups of ids, then how it ends."""

    def __init__(
        self, groups: Sequence[Sequence[int]], reason: str | None, timing: Any, error: Exception | None
    ) -> None:
        self._groups, self._reason, self._error = groups, reason, error
        metrics = None if timing is None else SimpleNamespace(timing_metrics=timing)
        self.outputs = [SimpleNamespace(token_ids=[], finish_reason=None, request_perf_metrics=metrics)]

    def _parts(self) -> Iterator[Answer]:
        for group in self._groups:
            self.outputs[0].token_ids += group
            yield self
        if self._error is not None:
            raise self._error
        self.outputs[0].finish_reason = self._reason

    def result(self) -> Answer:
        for _ in self._parts():
            pass
        return self

    def __iter__(self) -> Iterator[Answer]:
        return self._parts()

    async def __aiter__(self) -> AsyncIterator[Answer]:
        for part in self._parts():
            await asyncio.sleep(0)
            yield part


class Engine:
    """Gives the answers it was made with, by the first id of the prompt."""

    def __init__(self, **answers: Any) -> None:
        self.handed: list[tuple[Any, Any, bool]] = []
        self._answers = answers

    def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Answer:
        self.handed.append((inputs, sampling_params, streaming))
        script: dict[str, Any] = {"groups": [[5], [6], [7]], "reason": "length", "timing": None, "error": None}
        script.update(self._answers.get(f"at_{inputs['prompt_token_ids'][0]}", {}))
        if script.get("refused"):
            raise ValueError("not\nthis one")
        script.pop("refused", None)
        return Answer(**script)


class Arrivals:
    """A queue of groups; the next one is there once the one before has been answered."""

    def __init__(self, *groups: Sequence[TokenRequest]) -> None:
        self.completions: list[Completion] = []
        self._groups = list(groups)
        self._changed = threading.Condition()
        self._taken = 0

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.completions) == self._taken, timeout=30)
            group = tuple(self._groups.pop(0)) if self._groups else ()
            self._taken += len(group)
            return group

    def complete(self, completion: Completion) -> None:
        with self._changed:
            self.completions.append(completion)
            self._changed.notify()


def request(index: int, first_id: int = 1, length: int = 2, maximum: int = 3) -> TokenRequest:
    return TokenRequest(index, (first_id, *range(length - 1)), maximum)


def server(
    engine: Engine, clock: Clock | None = None, parameters: Any = lambda made: ("parameters", made.index)
) -> Any:
    from lem.engines.tensorrt.session import Server

    return Server(engine, parameters, longest_input=10, longest=16, clock=clock or Clock())


def timing(scheduled_s: float, last_s: float) -> SimpleNamespace:
    return SimpleNamespace(
        first_scheduled_time=timedelta(seconds=scheduled_s), last_token_time=timedelta(seconds=last_s)
    )


def test_a_closed_set_is_handed_over_at_once_as_ids() -> None:
    engine = Engine()
    found = server(engine).run_closed([request(0), request(1, 2)], say_nothing)
    assert engine.handed == [
        ({"prompt_token_ids": [1, 0]}, ("parameters", 0), False),
        ({"prompt_token_ids": [2, 0]}, ("parameters", 1), False),
    ]
    assert [(item.index, item.output_ids, item.token_times_ns, item.padding_tok) for item in found] == [
        (0, (5, 6, 7), None, 0),
        (1, (5, 6, 7), None, 0),
    ]


def test_in_a_closed_set_requests_are_timed_by_the_engine() -> None:
    # Handed over at 101 s and 102 s; looked at from 103 s on.
    engine = Engine(at_1={"timing": timing(101.5, 102.5)}, at_2={"timing": timing(500.0, 501.0)})
    first, second = server(engine).run_closed([request(0), request(1, 2)], say_nothing)
    assert (first.started_ns, first.finished_ns) == (101.5 * S, 102.5 * S)
    assert (second.started_ns, second.finished_ns) == (102 * S, 104 * S)  # of another clock: not used


def test_times_that_were_cut_to_microseconds_are_not_before_the_request() -> None:
    just_before = timedelta(seconds=100, microseconds=999_999)
    engine = Engine(at_1={"timing": SimpleNamespace(first_scheduled_time=just_before, last_token_time=None)})
    (found,) = server(engine).run_closed([request(0)], say_nothing)
    assert found.started_ns == 101 * S


def test_alone_each_token_has_the_time_it_was_seen_at() -> None:
    engine = Engine(at_2={"groups": [[5], [6, 7], []]})
    first, second = server(engine).run_alone([request(0), request(1, 2)], say_nothing)
    assert first.token_times_ns == (102 * S, 103 * S, 104 * S)
    assert first.finished_ns == 104 * S
    assert second.token_times_ns is not None
    assert second.output_ids == (5, 6, 7)
    assert second.token_times_ns[1] == second.token_times_ns[2] > second.token_times_ns[0]
    assert {streaming for _inputs, _parameters, streaming in engine.handed} == {True}


def test_progress_is_told() -> None:
    for name in ("run_closed", "run_alone"):
        told: list[int] = []
        getattr(server(Engine()), name)([request(0), request(1)], told.append)
        assert told == [1, 2]


@pytest.mark.parametrize("name", ["run_closed", "run_alone"])
def test_a_request_that_fails_fails_alone(name: str) -> None:
    engine = Engine(at_2={"refused": True}, at_3={"error": RuntimeError("on the way")}, at_4={"reason": "cancelled"})
    requests = [request(0), request(1, 2), request(2, 3), request(3, 4), request(4, 5, length=11), request(5, 6, 9, 8)]
    found = getattr(server(engine), name)(requests, say_nothing)
    assert [item.error for item in found[:4]] == [
        None,
        "not this one",
        "on the way",
        "TensorRT-LLM ended the request with 'cancelled'",
    ]
    assert all("max_input_len 10, both together 16" in str(item.error) for item in found[4:])
    assert len(engine.handed) == 4


def test_traffic_is_streamed_and_timed() -> None:
    engine = Engine(at_2={"refused": True}, at_3={"error": RuntimeError("on the way")})
    arrivals = Arrivals([request(0), request(1, 2)], [request(2, 3), request(3, 4)])
    server(engine).serve(arrivals)
    found = {item.index: item for item in arrivals.completions}
    assert [found[index].error for index in range(4)] == [None, "not this one", "on the way", None]
    times = found[3].token_times_ns
    assert times is not None
    assert len(times) == 3
    assert list(times) == sorted(times)
    assert found[3].started_ns <= times[0]


def test_requests_join_while_others_run() -> None:
    """The second arrives when the first has begun: they are answered in turns."""
    has_begun = threading.Event()
    seen: list[int] = []

    class Slow(Answer):
        async def __aiter__(self) -> AsyncIterator[Answer]:
            for part in self._parts():
                seen.append(part.outputs[0].token_ids[0])
                has_begun.set()
                while len(set(seen)) < 2:
                    await asyncio.sleep(0)
                yield part

    class Watched(Engine):
        def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Answer:
            first = 10 * inputs["prompt_token_ids"][0]
            return Slow([[first], [first + 1]], "length", None, None)

    class Joining(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if len(self._groups) == 1:
                assert has_begun.wait(30)
            return tuple(self._groups.pop(0)) if self._groups else ()

    arrivals = Joining([request(0, 1)], [request(1, 2)])
    server(Watched()).serve(arrivals)
    assert sorted(item.output_ids for item in arrivals.completions) == [(10, 11), (20, 21)]


def test_a_queue_that_fails_fails_serving() -> None:
    class Broken(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            raise EngineError("the queue is broken")

    with pytest.raises(EngineError, match="the queue is broken"):
        server(Engine()).serve(Broken())


def test_a_queue_that_refuses_an_answer_fails_serving() -> None:
    class Refusing(Arrivals):
        def complete(self, completion: Completion) -> None:
            super().complete(completion)
            raise EngineError("it did not have this request")

    with pytest.raises(EngineError, match="did not have"):
        server(Engine()).serve(Refusing([request(0)], [request(1)]))


@pytest.mark.parametrize("name", ["run_closed", "run_alone"])
def test_an_engine_that_fails_is_no_failure_of_a_request(name: str) -> None:
    engine = Engine(at_2={"error": AssertionError("a check of its own")})
    with pytest.raises(EngineRaised) as caught:
        getattr(server(engine), name)([request(0), request(1, 2)], say_nothing)
    assert isinstance(caught.value.error, AssertionError)


def test_an_engine_that_fails_in_traffic_fails_serving() -> None:
    engine = Engine(at_2={"error": AssertionError("a check of its own")})
    with pytest.raises(EngineRaised, match="a check of its own"):
        server(engine).serve(Arrivals([request(0, 2)]))


def test_parameters_that_the_engine_refuses_fail_the_request() -> None:
    def refuse(_request: TokenRequest) -> Any:
        raise EngineRaised(TypeError("no such argument"))

    (found,) = server(Engine(), parameters=refuse).run_closed([request(0)], say_nothing)
    assert found.error == "no such argument"


class WhatLemRaises(TypeError):
    """A bug of lem that looks like something an engine raises."""


def test_a_bug_in_making_parameters_is_not_the_engines() -> None:
    def make(_request: TokenRequest) -> Any:
        raise WhatLemRaises

    with pytest.raises(WhatLemRaises):
        server(Engine(), parameters=make).run_closed([request(0)], say_nothing)


@pytest.mark.parametrize("is_served", [False, True])
def test_a_bug_in_timing_tokens_is_not_the_engines(is_served: bool) -> None:
    class Broken(Clock):
        def __call__(self) -> int:
            if self.now_s > 101:
                raise WhatLemRaises
            return super().__call__()

    tried = server(Engine(), Broken())
    with pytest.raises(WhatLemRaises):
        if is_served:
            tried.serve(Arrivals([request(0)]))
        else:
            tried.run_alone([request(0)], say_nothing)
