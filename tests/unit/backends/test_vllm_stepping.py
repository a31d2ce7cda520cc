"""Requests through an engine by `add_request` and `step`: tokens counted and timed as they are seen, none lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lem.backends.protocol import Completion, TokenRequest, say_nothing
from lem.backends.vllm_stepping import StepLoop
from lem.errors import EngineError

S = 1_000_000_000


class Rejected(Exception):
    """What the engine raises over a request that it does not take."""


@dataclass
class Parameters:
    maximum: int
    is_observed: bool


class Forms:
    """Requests in no engine's own types; ids below 0 are rejected."""

    longest = 20
    rejections = (Rejected,)
    adapter = "an adapter"

    def prompt(self, token_ids: Sequence[int], salt: str | None) -> Any:
        return (tuple(token_ids), salt)

    def parameters(self, request: TokenRequest, *, is_observed: bool) -> Parameters:
        return Parameters(request.max_output_tokens, is_observed)


@dataclass
class Work:
    """A request in the engine."""

    name: str
    first_id: int
    parameters: Parameters
    scheduled_ts: float = 0.0
    made: list[int] = field(default_factory=list)


class Engine:
    """Answers a prompt with the numbers after its first id, `per_step` of them a step; a step takes one second.

    In a process of its own (`is_concurrent`) a step waits until there is something to do, as vLLM's does.
    """

    def __init__(self, *, per_step: int = 1, reason: str = "length", is_concurrent: bool = False) -> None:
        self.now_s = 100.0
        self.seen: list[tuple[Any, str]] = []
        self.steps: list[list[str]] = []
        self._per_step = per_step
        self._reason = reason
        self._is_concurrent = is_concurrent
        self._arriving: queue.Queue[Work] = queue.Queue()
        self._working: list[Work] = []
        self.dies_at: int | None = None

    def clock(self) -> int:
        return round(self.now_s * S)

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any = None) -> str:
        token_ids, _salt = prompt
        if token_ids[0] < 0:
            raise Rejected("id  -1 is\nno token")
        self.seen.append((prompt, lora_request))
        self._arriving.put(Work(request_id, token_ids[0], params))
        return request_id

    def step(self) -> list[Any]:
        if self._is_concurrent and not self._working:
            self._working.append(self._arriving.get(timeout=30))
        while not self._arriving.empty():
            self._working.append(self._arriving.get())
        self.steps.append([work.name for work in self._working])
        if len(self.steps) == self.dies_at:
            raise RuntimeError("the engine died")
        for work in self._working:
            work.scheduled_ts = work.scheduled_ts or self.now_s
        self.now_s += 1.0
        outputs = [output for work in self._working if (output := self._answer(work)) is not None]
        self._working = [work for work in self._working if len(work.made) < work.parameters.maximum]
        return outputs

    def _answer(self, work: Work) -> Any:
        count = min(self._per_step, work.parameters.maximum - len(work.made))
        new = [work.first_id + len(work.made) + place + 1 for place in range(count)]
        work.made += new
        is_finished = len(work.made) == work.parameters.maximum
        if not is_finished and not work.parameters.is_observed:
            return None
        return SimpleNamespace(
            request_id=work.name,
            finished=is_finished,
            metrics=SimpleNamespace(scheduled_ts=work.scheduled_ts, last_token_ts=self.now_s, arrival_time=1.7e9),
            outputs=[
                SimpleNamespace(
                    token_ids=new if work.parameters.is_observed else list(work.made),
                    finish_reason=self._reason if is_finished else None,
                )
            ],
        )


class Arrivals:
    """A queue of groups; one is there once the one before it has been answered."""

    def __init__(self, *groups: Sequence[TokenRequest]) -> None:
        self.completions: list[Completion] = []
        self._groups = [list(group) for group in groups]
        self._answered = threading.Semaphore(0)
        self._awaited = 0

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        for _ in range(self._awaited):
            assert self._answered.acquire(timeout=30)
        if not self._groups:
            return ()
        group = self._groups.pop(0)
        self._awaited = len(group)
        return tuple(group)

    def complete(self, completion: Completion) -> None:
        self.completions.append(completion)
        self._answered.release()


def request(index: int, first_id: int, length: int = 3, maximum: int = 4) -> TokenRequest:
    return TokenRequest(index, (first_id, *range(length - 1)), maximum)


def loop(engine: Engine, *, is_concurrent: bool = False) -> StepLoop:
    return StepLoop(engine, Forms(), is_concurrent=is_concurrent, clock=engine.clock)


def test_a_closed_set_runs_together_and_is_timed_by_the_engine() -> None:
    engine = Engine()
    first, second = loop(engine).run_closed([request(0, 10), request(1, 50, maximum=2)], say_nothing)[::-1]
    assert [len(names) for names in engine.steps] == [2, 2, 1, 1]
    assert first == Completion(0, (11, 12, 13, 14), 100 * S, 104 * S, None, padding_tok=0)
    assert second == Completion(1, (51, 52), 100 * S, 102 * S, None, padding_tok=0)


def test_progress_is_told_after_every_step() -> None:
    told: list[int] = []
    loop(Engine()).run_closed([request(0, 10), request(1, 50, maximum=2)], told.append)
    assert told == [0, 1, 1, 2]


def test_alone_each_token_has_the_time_it_was_seen_at() -> None:
    engine = Engine()
    first, second = loop(engine).run_alone([request(0, 10), request(1, 50, maximum=2)], say_nothing)
    assert all(len(names) == 1 for names in engine.steps)
    assert first.token_times_ns == (101 * S, 102 * S, 103 * S, 104 * S)
    assert (first.started_ns, first.finished_ns) == (100 * S, 104 * S)
    assert (second.started_ns, second.token_times_ns) == (104 * S, (105 * S, 106 * S))


def test_tokens_of_one_chunk_share_its_time() -> None:
    (found,) = loop(Engine(per_step=3)).run_alone([request(0, 10)], say_nothing)
    assert found.output_ids == (11, 12, 13, 14)
    assert found.token_times_ns == (101 * S, 101 * S, 101 * S, 102 * S)


def test_without_statistics_a_request_starts_when_it_is_handed_over() -> None:
    class Silent(Engine):
        def _answer(self, work: Work) -> Any:
            output = super()._answer(work)
            output.metrics = None
            return output

    (found,) = loop(Silent()).run_alone([request(0, 10, maximum=1)], say_nothing)
    assert (found.started_ns, found.finished_ns) == (100 * S, 101 * S)


def test_a_request_that_is_too_long_or_not_taken_fails_alone() -> None:
    requests = [request(0, 10), request(1, 50, length=17, maximum=4), request(2, -1)]
    good, too_long, rejected = sorted(
        loop(Engine()).run_closed(requests, say_nothing), key=lambda completion: completion.index
    )
    assert good.error is None
    assert too_long.error is not None
    assert "17 tokens of prompt and 4 of output" in too_long.error
    assert "20" in too_long.error
    assert rejected.error == "id -1 is no token"


def test_the_longest_request_is_not_too_long() -> None:
    (found,) = loop(Engine()).run_closed([request(0, 10, length=16, maximum=4)], say_nothing)
    assert found.error is None


@pytest.mark.parametrize(("reason", "is_good"), [("stop", True), ("length", True), ("abort", False), ("error", False)])
def test_how_a_request_ended_decides_whether_it_failed(reason: str, is_good: bool) -> None:
    (found,) = loop(Engine(reason=reason)).run_closed([request(0, 10)], say_nothing)
    assert (found.error is None) == is_good


def test_the_adapter_goes_with_every_request() -> None:
    engine = Engine()
    loop(engine).run_closed([request(0, 10), request(1, 50)], say_nothing)
    assert [adapter for _prompt, adapter in engine.seen] == ["an adapter"] * 2


def test_an_answer_to_a_stranger_is_a_fault() -> None:
    class Confused(Engine):
        def _answer(self, work: Work) -> Any:
            output = super()._answer(work)
            output.request_id = "another"
            return output

    with pytest.raises(EngineError, match="another, which it did not have"):
        loop(Confused()).run_alone([request(0, 10)], say_nothing)


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_a_queue_is_worked_off_as_it_fills(is_concurrent: bool) -> None:
    engine = Engine(is_concurrent=is_concurrent)
    arrivals = Arrivals([request(0, 10), request(1, 30)], [request(2, 50)], [request(3, 70)])
    loop(engine, is_concurrent=is_concurrent).serve(arrivals, is_salted=False)
    assert sorted(completion.index for completion in arrivals.completions) == [0, 1, 2, 3]
    assert [completion.output_ids[0] for completion in arrivals.completions[2:]] == [51, 71]
    assert all(completion.error is None for completion in arrivals.completions)
    assert all(completion.token_times_ns is not None for completion in arrivals.completions)


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_requests_join_while_others_run(is_concurrent: bool) -> None:
    """The second arrives when the first has one token of many: it does not wait for its end."""
    engine = Engine(is_concurrent=is_concurrent)
    has_begun, is_in = threading.Event(), threading.Event()

    class Joining(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if self._groups and len(self._groups) == 1:
                assert has_begun.wait(30)
            found = super().take(limit)
            if not self._groups and found:
                is_in.set()
            self._awaited = 0
            return found

    class Watched(Engine):
        def step(self) -> list[Any]:
            outputs = super().step()
            has_begun.set()
            # Python's threads take turns as they like: the next step waits until the arrival is on its way.
            assert is_in.wait(30)
            return outputs

    engine = Watched(is_concurrent=is_concurrent)
    arrivals = Joining([request(0, 10, maximum=15)], [request(1, 50, maximum=2)])
    loop(engine, is_concurrent=is_concurrent).serve(arrivals, is_salted=False)
    assert [completion.index for completion in arrivals.completions] == [1, 0]
    assert max(len(names) for names in engine.steps) == 2


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_a_request_that_fails_at_the_door_is_answered_and_serving_goes_on(is_concurrent: bool) -> None:
    engine = Engine(is_concurrent=is_concurrent)
    arrivals = Arrivals([request(0, -1)], [request(1, 10, length=18)], [request(2, 50)])
    loop(engine, is_concurrent=is_concurrent).serve(arrivals, is_salted=False)
    assert [completion.error is None for completion in arrivals.completions] == [False, False, True]


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_a_prompt_that_comes_again_shares_nothing_with_itself(is_concurrent: bool) -> None:
    engine = Engine(is_concurrent=is_concurrent)
    groups = [[request(index, first_id)] for index, first_id in enumerate((10, 10, 50, 10))]
    loop(engine, is_concurrent=is_concurrent).serve(Arrivals(*groups), is_salted=True)
    assert [salt for (_ids, salt), _adapter in engine.seen] == [None, "2", None, "3"]
    engine = Engine(is_concurrent=is_concurrent)
    loop(engine, is_concurrent=is_concurrent).serve(Arrivals(*groups), is_salted=False)
    assert [salt for (_ids, salt), _adapter in engine.seen] == [None] * 4


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_a_queue_that_fails_fails_serving(is_concurrent: bool) -> None:
    class Broken(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if not self._groups:
                raise EngineError("the queue is broken")
            return super().take(limit)

    with pytest.raises(EngineError, match="the queue is broken"):
        loop(Engine(is_concurrent=is_concurrent), is_concurrent=is_concurrent).serve(
            Broken([request(0, 10)]), is_salted=False
        )


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_an_engine_that_dies_fails_serving_at_once(is_concurrent: bool) -> None:
    engine = Engine(is_concurrent=is_concurrent)
    engine.dies_at = 2
    arrivals = Arrivals([request(0, 10)], [request(1, 50)])
    with pytest.raises(RuntimeError, match="the engine died"):
        loop(engine, is_concurrent=is_concurrent).serve(arrivals, is_salted=False)
    assert arrivals.completions == []


def test_an_empty_queue_is_no_work() -> None:
    engine = Engine(is_concurrent=True)
    loop(engine, is_concurrent=True).serve(Arrivals(), is_salted=False)
    assert engine.steps == []
