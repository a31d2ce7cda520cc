from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from lem.base.clock import Clock
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, RequestQueue, TokenRequest
from lem.engines.traffic import TrafficPlan, arrival_offsets_s
from lem.worker.requests import (
    DisjointRequests,
    PreparedQueue,
    check_lengths,
    encode_prompts,
    measure_traffic,
    serve_all,
)
from lem.worker.shapes import Prompt
from lem.worker.window import MeasuredWindow
from tests.records import codes
from tests.unit.worker.timed_backend import BEGIN_OF_TEXT, NS_PER_MS, SteppedClock, TimedBackend, make_requests

Encoded = tuple[tuple[TokenRequest, ...], tuple[Reason, ...]]


END = 900


class Bytes(TimedBackend):
    """A token for each byte; with `begin` and `end`, these are put around every whole text."""

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def encode(self, text: str, *, is_whole: bool = True) -> list[int]:
        ids = list(text.encode())
        return [*self.begin, *ids, *self.end] if is_whole else ids


class Closed(Bytes):
    begin, end = (BEGIN_OF_TEXT,), (END,)


def encode(*prompts: Prompt, engine: type[TimedBackend] = TimedBackend, template: str = "", **options: Any) -> Encoded:
    limits = {"max_input_tokens": 8, "max_output_tokens": 16, "min_output_tokens": 0, **options}
    config = ExperimentConfig.from_dict({"model": "any", **limits})
    return encode_prompts(prompts, engine(SteppedClock()), config, template or None)


@pytest.mark.parametrize(
    ("prompts", "options", "shapes", "warnings"),
    [
        ([Prompt("a b"), Prompt("c")], {"min_output_tokens": 2}, [(3, 16, 2), (2, 16, 2)], []),
        ([Prompt("a b c d"), Prompt("a")], {"max_input_tokens": 3}, [(3, 16, 0), (2, 16, 0)], [("prompts_cut", 3)]),
        ([Prompt("a b", input_tokens=20)], {}, [(8, 16, 0)], [("prompts_cut", 8)]),
        (
            [Prompt("a", output_tokens=4), Prompt("b", output_tokens=99)],
            {"min_output_tokens": 6},
            [(2, 4, 4), (2, 16, 6)],
            [("outputs_bounded", 16)],
        ),
        *(([Prompt("a b", input_tokens=length)], {}, [(length, 16, 0)], []) for length in (1, 2, 3, 5, 8)),
    ],
)
def test_prompts_become_requests_within_their_bounds(
    prompts: list[Prompt], options: dict[str, Any], shapes: list[tuple[int, int, int]], warnings: list[tuple[str, int]]
) -> None:
    requests, told = encode(*prompts, **options)
    assert [item.index for item in requests] == list(range(len(prompts)))
    bounds = [(len(item.token_ids), item.max_output_tokens, item.min_output_tokens) for item in requests]
    assert bounds == shapes
    assert [(item.code, item.data["limit"]) for item in told] == warnings


def test_a_prompt_is_cut_at_its_end_and_extended_by_its_text_alone() -> None:
    (cut,), (whole,) = encode(Prompt("a b c d"), max_input_tokens=3)[0], encode(Prompt("a b"))[0]
    assert cut.token_ids == whole.token_ids
    begin, first, second, *rest = encode(Prompt("a b", input_tokens=7))[0][0].token_ids
    assert begin == BEGIN_OF_TEXT
    assert rest == [first, second, first, second]
    # A tokenizer without a beginning of texts: the whole text is cycled.
    (found,), _ = encode(Prompt("abc", input_tokens=5), engine=Bytes)
    assert found.token_ids == (97, 98, 99, 97, 98)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8])
def test_an_end_that_the_tokenizer_appends_is_in_no_synthetic_prompt(length: int) -> None:
    (given,), _ = encode(Prompt("abc"), engine=Closed)
    assert given.token_ids == (BEGIN_OF_TEXT, 97, 98, 99, END)
    (made,), _ = encode(Prompt("abc", input_tokens=length), engine=Closed)
    assert made.token_ids == (BEGIN_OF_TEXT, 97, 98, 99, 97, 98, 99, 97)[:length]


def test_a_prompt_without_tokens_is_refused_with_its_number() -> None:
    with pytest.raises(EngineError, match="prompt 2 of 2") as caught:
        encode(Prompt("a"), Prompt(""), engine=Bytes)
    assert (caught.value.kind, caught.value.is_permanent) == ("prompts", True)


def texts(requests: Sequence[TokenRequest]) -> list[str]:
    return [bytes(item.token_ids).decode() for item in requests]


def test_under_a_template_a_text_is_a_turn_and_a_conversation_is_rendered_whole() -> None:
    turns = tuple(
        {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("user", "b"))
    )
    requests, told = encode(
        Prompt("a"), Prompt("hi b", messages=turns), engine=Bytes, template="t", max_input_tokens=64
    )
    assert texts(requests) == ["system a answer", "system hi yo b answer"]
    assert told == ()


def test_under_a_template_only_the_last_turn_of_the_user_is_cut_or_repeated() -> None:
    given = [
        Prompt("abcdef"),
        Prompt("xyz", input_tokens=19),
        Prompt("xyz", input_tokens=3),
        Prompt("x", input_tokens=99),
    ]
    requests, told = encode(*given, engine=Bytes, template="t", max_input_tokens=19)
    assert texts(requests) == ["system abcde answer", "system xyzxy answer", "system x answer", "system xxxxx answer"]
    assert [(item.code, dict(item.data)) for item in told] == [
        ("prompts_cut", {"cut": 2, "total": 4, "limit": 19}),
        ("template_longer", {"longer": 1, "total": 4}),
    ]


class Letters(Bytes):
    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()


@pytest.mark.parametrize(
    ("limit", "length", "last", "is_cut"), [(9, None, "abcd", False), (6, None, "a", True), (9, 8, "abc", False)]
)
def test_a_chat_that_a_server_templates_keeps_its_messages_and_only_the_last_turn_is_cut(
    limit: int, length: int | None, last: str, is_cut: bool
) -> None:
    server = {"engine": "vllm", "url": "http://h", "api": "chat"}
    options: dict[str, Any] = {"backend": "server", "server": server, "decoder": {"preset": "deterministic"}}
    system = {"role": "system", "content": "brief"}
    prompt = Prompt("abcd", input_tokens=length, messages=(system, {"role": "user", "content": "abcd"}))

    (request,), warnings = encode(prompt, engine=Letters, max_input_tokens=limit, **options)

    assert json.loads(request.conversation) == {"messages": [system, {"role": "user", "content": last}]}
    assert bytes(request.token_ids).decode() == f"brief{last}"
    assert [reason.code for reason in warnings] == (["prompts_cut"] if is_cut else [])
    (other,) = DisjointRequests([request], seed=1).take(1)
    assert (other.conversation, len(other.token_ids)) == ("", len(request.token_ids))


def test_a_template_that_leaves_no_room_for_the_prompt_is_an_error_with_the_least_limit() -> None:
    with pytest.raises(EngineError, match="the chat template alone takes 14 tokens") as caught:
        encode(Prompt("x", input_tokens=4), engine=Bytes, template="t", max_input_tokens=14)
    assert caught.value.hint == "set max_input_tokens to at least 15"
    encode(Prompt("x", input_tokens=4), engine=Bytes, template="t", max_input_tokens=15)


def test_requests_beyond_what_the_engine_takes_are_refused_by_their_lengths() -> None:
    requests, _ = encode(Prompt("a"), Prompt("abcdef"), engine=Bytes)
    check_lengths(requests, None)
    check_lengths(requests, 22)
    with pytest.raises(EngineError, match=r"1 of 2 prompts.*21 positions.*prompt 2 has 6 tokens, and 16 of") as caught:
        check_lengths(requests, 21)
    assert (caught.value.kind, caught.value.is_permanent) == ("prompts", True)
    assert "at most 21" in caught.value.hint


def request(index: int, *ids: int, output: int = 5) -> TokenRequest:
    return TokenRequest(index, ids, output, 1)


def test_typical_requests_are_spread_over_the_lengths_and_always_the_same() -> None:
    given = [request(index, *range(1, length + 1)) for index, length in enumerate((90, 10, 50, 30, 70))]
    source = DisjointRequests(given, seed=1)
    assert [len(item.token_ids) for item in source.take_typical(1)] == [50]
    assert [len(item.token_ids) for item in source.take_typical(2)] == [30, 70]
    assert [len(item.token_ids) for item in source.take_typical(5)] == [10, 30, 50, 70, 90]
    assert [len(item.token_ids) for item in source.take_typical(10)] == [10, 10, 30, 30, 50, 50, 70, 70, 90, 90]
    assert source.is_typical(source.take_typical(2))
    assert not source.is_typical(source.take(2))
    assert source.take_typical(1) != source.take_typical(1), "other ids each time"
    assert len(source.take(1)[0].token_ids) == 50, "which does not move the place in the order"


def test_disjoint_requests_differ_from_every_given_one_and_each_other_by_known_ids() -> None:
    given = [request(index, 1, index + 2, index + 3, index + 4) for index in range(20)]
    known = {token for item in given for token in item.token_ids[1:]}
    source = DisjointRequests(given, seed=1)
    made = {item.token_ids for item in source.take(60)}
    assert made.isdisjoint({item.token_ids for item in given})
    assert len(made) == 60
    assert {ids[0] for ids in made} == {1}, "what begins every text is kept"
    assert all(known.issuperset(ids[1:]) for ids in made)
    assert source.is_disjoint


@pytest.mark.parametrize(("given", "is_disjoint"), [([(7, 7, 7)], True), ([(0,), (1,)], False)])
def test_prompts_that_leave_no_other_are_told(given: list[tuple[int, ...]], is_disjoint: bool) -> None:
    source = DisjointRequests([request(index, *ids) for index, ids in enumerate(given)], seed=1)
    assert {item.token_ids for item in source.take(2)}.isdisjoint(given) is is_disjoint
    assert source.is_disjoint is is_disjoint


def closed_loop(concurrency: int, min_window_s: float = 0.05) -> TrafficPlan:
    return TrafficPlan("closed", 1.0, concurrency, seed=1, min_window_s=min_window_s, ramp_limit_s=10.0)


def open_loop(
    qps: float, min_window_s: float = 0.1, *, mode: str = "constant", ramp_limit_s: float = 1.0, seed: int = 1
) -> TrafficPlan:
    return TrafficPlan(mode, qps, 1, seed=seed, min_window_s=min_window_s, ramp_limit_s=ramp_limit_s)


def measure(backend: TimedBackend, plan: TrafficPlan, requests: Sequence[TokenRequest] | None = None) -> MeasuredWindow:
    given = make_requests(4) if requests is None else requests
    return measure_traffic(backend, given, plan, backend.clock, lambda _: None)


def take_offsets(mode: str, qps: float, seed: int, count: int) -> list[float]:
    return list(itertools.islice(arrival_offsets_s(mode, qps, random.Random(seed)), count))


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert take_offsets("constant", 4.0, 1, 4) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_have_the_rate_and_the_spread_of_exponential_gaps() -> None:
    offsets = take_offsets("poisson", 5.0, 7, 20_000)
    gaps = [later - earlier for earlier, later in itertools.pairwise(offsets)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_gaps_of_bursty_arrivals_have_the_rate_and_the_spread_of_a_gamma_distribution(burstiness: float) -> None:
    def gaps(qps: float) -> list[float]:
        offsets = arrival_offsets_s("poisson", qps, random.Random(7), burstiness)
        return [after - before for before, after in itertools.pairwise(itertools.islice(offsets, 20_000))]

    found = gaps(5.0)
    assert statistics.fmean(found) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(found) == pytest.approx(0.2 / math.sqrt(burstiness), rel=0.05)
    assert gaps(10.0)[:100] == pytest.approx([gap / 2 for gap in found[:100]]), "another rate scales the same gaps"


def test_closed_loop_window_opens_after_one_turn_and_closes_under_load() -> None:
    clock = SteppedClock()
    backend = TimedBackend(clock, width=8)  # a turn is a 10 ms prefill and four steps of 1 ms
    found = measure(backend, closed_loop(2, min_window_s=0.05))
    assert {len(batch) for batch in backend.batches} == {2}, "as many in flight as configured"
    edges_ms = [(time_ns - clock.start_ns) / NS_PER_MS for time_ns in (found.opened_ns, found.closed_ns)]
    assert edges_ms == [14, 70]
    assert (len(found.completed), found.output_tok, found.input_tok, found.repeats) == (8, 8 * 4, 8 * 3, 2)
    assert (found.steady.value, found.warnings) == (True, ())


def test_closed_loop_answers_as_many_requests_as_there_are_prompts() -> None:
    found = measure(TimedBackend(SteppedClock(), width=2), closed_loop(2, min_window_s=0.0), make_requests(10))
    assert len(found.completed) == 10


def test_closed_loop_latency_counts_from_the_hand_in_before_it() -> None:
    found = measure(TimedBackend(SteppedClock(), width=1), closed_loop(2))
    # of two in flight, one waits for the other's turn of 14 ms
    assert {(item.started_ns or 0) - (item.arrived_ns or 0) for item in found.completed} == {14 * NS_PER_MS}
    assert {(item.finished_ns or 0) - (item.arrived_ns or 0) for item in found.completed} == {28 * NS_PER_MS}


def test_open_loop_latency_counts_from_the_scheduled_time() -> None:
    clock = SteppedClock()
    found = measure(TimedBackend(clock, width=1), open_loop(100.0, ramp_limit_s=0.0, min_window_s=0.05))
    times = [(item.arrived_ns, item.started_ns, item.finished_ns) for item in found.completed]
    # arrivals at 0, 10, 20 ms; a turn takes 14 ms, so each waits 4 ms more than the one before
    assert [
        tuple((stamp - clock.start_ns) // NS_PER_MS for stamp in stamps if stamp is not None) for stamps in times
    ] == [(0, 0, 14), (10, 14, 28), (20, 28, 42)]
    assert found.repeats == 0, "four prompts were not gone through"


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    found = measure(TimedBackend(SteppedClock()), open_loop(1.0, min_window_s=3.0))
    assert all(item.started_ns == item.arrived_ns for item in found.completed)
    assert found.window_s == pytest.approx(4.0)  # the time it takes to offer four prompts
    assert len(found.completed) == 4


def test_load_above_capacity_is_told_and_load_below_is_not() -> None:
    found = measure(TimedBackend(SteppedClock(), width=1), open_loop(1000.0, min_window_s=1.0, ramp_limit_s=0.5))
    assert {"load_too_high", "ramp_cut_short"} <= set(codes(found.warnings))
    assert found.window_s == pytest.approx(1.0)
    below = measure(TimedBackend(SteppedClock(), width=4), open_loop(50.0, min_window_s=2.0, mode="poisson"))
    assert below.warnings == ()


def test_tokens_count_by_their_own_time_and_requests_by_their_end() -> None:
    clock = SteppedClock()
    backend = TimedBackend(clock, width=1, prefill_ms=0.0, token_ms=30.0)  # 120 ms a request of four tokens
    found = measure(backend, open_loop(1000.0, min_window_s=0.2, ramp_limit_s=0.05), make_requests(1))
    # opened at the first hand-in, 120 ms; closed at 320 ms; tokens at 150, 180, 210, 240, 270, 300 | 330, 360
    assert (found.opened_ns - clock.start_ns, found.closed_ns - clock.start_ns) == (120 * NS_PER_MS, 320 * NS_PER_MS)
    assert found.output_tok == 6
    assert len(found.completed) == 1
    assert found.input_tok == 2 * 3, "two prefills were done in the window"


def test_without_token_times_tokens_count_at_the_end_and_the_record_says_so() -> None:
    found = measure(TimedBackend(SteppedClock(), is_timing_tokens=False), closed_loop(2))
    assert found.output_tok == len(found.completed) * 4
    assert "tokens_untimed" in codes(found.warnings)


@pytest.mark.parametrize("plan", [closed_loop(2, min_window_s=3600.0), open_loop(20.0, min_window_s=3600.0)])
def test_a_load_that_fails_as_a_whole_is_not_kept_up(plan: TrafficPlan) -> None:
    found = measure(TimedBackend(SteppedClock(), width=2, fails=lambda _: True), plan)
    assert 4 <= len(found.failures) <= 6
    assert found.completed == ()
    assert found.window_s < 10
    assert found.steady.value is None


def test_prompts_are_offered_in_turn_by_requests_of_their_own_and_each_answer_is_told() -> None:
    backend = TimedBackend(SteppedClock(), width=8)
    done: list[int] = []
    found = measure_traffic(backend, make_requests(3), closed_loop(6), backend.clock, done.append)
    indices = [item.request.prompt for item in found.outputs]
    assert indices == [(indices[0] + offset) % 3 for offset in range(len(indices))]
    assert all(len({request.index for request in batch}) == len(batch) for batch in backend.batches)
    assert done == list(range(1, len(done) + 1))


class ScriptedBackend(TimedBackend):
    """Hands in each completion as often as its script says, and stops serving once the script has no number for it."""

    times: Callable[[int], int | None]

    def serve(self, queue: RequestQueue) -> None:
        while requests := queue.take(self.width):
            for completion in self._run(requests, is_timed=True):
                times = self.times(completion.index)
                if times is None:
                    return
                for _ in range(times):
                    queue.complete(completion)


def scripted(times: Callable[[int], int | None]) -> ScriptedBackend:
    backend = ScriptedBackend(SteppedClock())
    backend.times = times
    return backend


def test_a_request_that_was_never_answered_counts_as_failed() -> None:
    found = measure(scripted(lambda index: int(index != 2)), open_loop(100.0))
    assert found.failures == ("request 2: the backend gave no answer",)


@pytest.mark.parametrize("plan", [closed_loop(2), open_loop(100.0)])
@pytest.mark.parametrize(
    ("times", "message"),
    [(lambda _: 2, "did not have"), (lambda index: 1 if index < 2 else None, "before the window closed")],
    ids=["answers twice", "stops too early"],
)
def test_an_engine_that_does_not_serve_the_whole_window_once_is_refused(
    plan: TrafficPlan, times: Callable[[int], int | None], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        measure(scripted(times), plan)


def test_a_prepared_queue_serves_everything_and_is_then_closed() -> None:
    backend = TimedBackend(SteppedClock(), width=2)
    assert sorted(item.index for item in serve_all(backend, make_requests(5))) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in backend.batches] == [2, 2, 1]
    assert PreparedQueue([]).take(1) == ()


Handover = SimpleQueue[tuple[TokenRequest, ...]]


class ThreadedBackend(TimedBackend):
    """Takes requests in one thread and works on them in another, as continuous batching does; by the real clock.

    With `is_holding` it works on its first request until it has taken another one.
    """

    is_holding = False

    def serve(self, queue: RequestQueue) -> None:
        self.has_taken_meanwhile = threading.Event()
        self._is_at_work = threading.Event()
        taken = Handover()
        worker = threading.Thread(target=self._work, args=(queue, taken))
        worker.start()
        while requests := queue.take(3):
            if self._is_at_work.is_set():
                self.has_taken_meanwhile.set()
            taken.put(requests)
            self._is_at_work.wait(timeout=60)
        taken.put(())
        worker.join()

    def _work(self, queue: RequestQueue, taken: Handover) -> None:
        real = Clock()
        while requests := taken.get():
            for request in requests:
                begin_ns = real.monotonic_ns()
                self._is_at_work.set()
                if self.is_holding:
                    self.has_taken_meanwhile.wait(timeout=60)
                end_ns = real.monotonic_ns()
                queue.complete(Completion(request.index, (7,), begin_ns, end_ns, (end_ns,)))


@pytest.mark.parametrize("is_open", [False, True])
def test_real_threads_answer_every_request_once_and_take_requests_while_they_work(is_open: bool) -> None:
    backend = ThreadedBackend(SteppedClock())
    backend.is_holding = is_open
    plan = closed_loop(2, min_window_s=0.02)
    if is_open:
        plan = open_loop(500.0, min_window_s=0.05, mode="poisson", ramp_limit_s=0.01)
    found = measure_traffic(backend, make_requests(5), plan, Clock(), lambda _: None)
    assert backend.has_taken_meanwhile.is_set() or not is_open, "no request arrived while the first was worked on"
    assert found.failures == ()
    assert len(found.completed) >= 5
    assert all((item.started_ns or 0) >= (item.arrived_ns or 0) for item in found.completed)
