from __future__ import annotations

from collections.abc import Callable

import pytest

from lem.base.errors import EngineError
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import TokenRequest
from lem.worker.prompts import Prompt
from lem.worker.requests import DisjointRequests, EncodedPrompts, encode_prompts
from tests.unit.worker.timed_backend import BEGIN_OF_TEXT, SteppedClock, TimedBackend


def config(max_input: int = 8, max_output: int = 16, min_output: int = 0) -> ExperimentConfig:
    return ExperimentConfig.from_dict(
        {
            "model": "any",
            "max_input_tokens": max_input,
            "max_output_tokens": max_output,
            "min_output_tokens": min_output,
        }
    )


def encode(prompts: list[Prompt], settings: ExperimentConfig) -> EncodedPrompts:
    return encode_prompts(prompts, TimedBackend(SteppedClock()).encode, settings)


def test_prompts_become_requests_in_their_order() -> None:
    found = encode([Prompt("a b"), Prompt("c")], config(min_output=2))
    assert [request.index for request in found.requests] == [0, 1]
    assert [len(request.token_ids) for request in found.requests] == [3, 2]
    assert found.requests[0].max_output_tokens == 16
    assert found.requests[0].min_output_tokens == 2
    assert found.warnings == ()


def test_a_prompt_beyond_the_limit_is_cut_counted_and_told() -> None:
    found = encode([Prompt("a b c d"), Prompt("a")], config(max_input=3))
    assert [len(request.token_ids) for request in found.requests] == [3, 2]
    assert (found.warnings[0].code, found.warnings[0].data["cut"]) == ("prompts_cut", 1)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_a_chosen_length_is_met_exactly(length: int) -> None:
    found = encode([Prompt("a b", input_tokens=length)], config())
    assert len(found.requests[0].token_ids) == length
    assert found.warnings == ()


def test_extending_cycles_the_text_and_not_what_begins_every_text() -> None:
    ids = encode([Prompt("a b", input_tokens=7)], config()).requests[0].token_ids
    begin, first, second = ids[:3]
    assert begin == BEGIN_OF_TEXT
    assert ids[3:] == (first, second, first, second)


def test_a_tokenizer_without_a_beginning_cycles_the_whole_text() -> None:
    found = encode_prompts([Prompt("abc", input_tokens=5)], lambda text: [ord(letter) for letter in text], config())
    assert found.requests[0].token_ids == (97, 98, 99, 97, 98)


def test_a_chosen_length_beyond_the_limit_is_cut_and_told() -> None:
    found = encode([Prompt("a b", input_tokens=20)], config(max_input=8))
    assert len(found.requests[0].token_ids) == 8
    assert [item.code for item in found.warnings] == ["prompts_cut"]


def test_a_prompt_may_bound_its_output_but_not_beyond_the_experiment() -> None:
    found = encode([Prompt("a", output_tokens=4), Prompt("b", output_tokens=99)], config(min_output=6))
    assert [request.max_output_tokens for request in found.requests] == [4, 16]
    assert [request.min_output_tokens for request in found.requests] == [4, 6]
    assert (found.warnings[0].code, found.warnings[0].data["limit"]) == ("outputs_bounded", 16)


def test_a_prompt_without_tokens_is_refused_with_its_number() -> None:
    tokenize: Callable[[str], list[int]] = lambda text: [] if text == "?" else [1]  # noqa: E731
    with pytest.raises(EngineError, match="prompt 2 has no tokens") as caught:
        encode_prompts([Prompt("a"), Prompt("?")], tokenize, config())
    assert caught.value.kind == "prompts"
    assert caught.value.is_permanent


def request(index: int, *ids: int, output: int = 5) -> TokenRequest:
    return TokenRequest(index, ids, output, 1)


def test_disjoint_requests_have_the_shapes_of_the_given_ones_over_and_over() -> None:
    given = [request(0, 1, 5, 6, 7), request(1, 1, 8, output=9)]
    made = DisjointRequests(given, seed=1).take(5)
    assert [len(item.token_ids) for item in made] == [4, 2, 4, 2, 4]
    assert [item.max_output_tokens for item in made] == [5, 9, 5, 9, 5]
    assert [item.index for item in made] == [0, 1, 2, 3, 4]


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


def test_disjoint_requests_differ_from_every_given_one_and_from_each_other() -> None:
    given = [request(index, 1, index + 2, index + 3, index + 4) for index in range(20)]
    source = DisjointRequests(given, seed=1)
    made = {item.token_ids for item in source.take(60)}
    assert made.isdisjoint({item.token_ids for item in given})
    assert len(made) == 60
    assert source.is_disjoint


def test_disjoint_requests_use_known_ids_and_keep_what_begins_every_text() -> None:
    given = [request(index, 1, 10 + index, 20 + index) for index in range(9)]
    known = {token for item in given for token in item.token_ids[1:]}
    for item in DisjointRequests(given, seed=2).take(30):
        assert item.token_ids[0] == 1
        assert set(item.token_ids[1:]) <= known


def test_disjoint_requests_are_the_same_for_the_same_seed() -> None:
    given = [request(index, 1, index + 2, index + 3) for index in range(5)]
    assert DisjointRequests(given, seed=4).take(9) == DisjointRequests(given, seed=4).take(9)
    assert DisjointRequests(given, seed=4).take(9) != DisjointRequests(given, seed=5).take(9)


def test_a_single_prompt_of_one_repeated_token_still_gets_another_one() -> None:
    source = DisjointRequests([request(0, 7, 7, 7)], seed=1)
    assert source.take(1)[0].token_ids != (7, 7, 7)
    assert source.is_disjoint


def test_prompts_that_leave_no_other_are_told() -> None:
    source = DisjointRequests([request(0, 0), request(1, 1)], seed=1)
    source.take(2)
    assert not source.is_disjoint
