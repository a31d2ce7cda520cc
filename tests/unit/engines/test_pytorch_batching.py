"""Batches: every request once, no batch larger than it may be, and only what was generated counts."""

from __future__ import annotations

import itertools
import random

import pytest

from lem.config.backends import PyTorchConfig
from lem.config.option import declared
from lem.engines.protocol import TokenRequest
from lem.engines.pytorch.options import BATCHING_STRATEGIES, BatchRules, cut_output, pad_left, plan_batches

END = frozenset({2})


def request(index: int, length: int, maximum: int = 8, minimum: int = 0) -> TokenRequest:
    return TokenRequest(index, tuple(range(10, 10 + length)), maximum, minimum)


def indices(batches: tuple[tuple[TokenRequest, ...], ...]) -> list[list[int]]:
    return [[item.index for item in batch] for batch in batches]


def test_the_strategies_are_those_that_are_declared() -> None:
    assert declared(PyTorchConfig)["batching_strategy"].choices == BATCHING_STRATEGIES


def test_static_batches_take_requests_as_they_come_and_the_last_is_smaller() -> None:
    requests = [request(index, length) for index, length in enumerate([5, 1, 9, 2, 7])]
    assert indices(plan_batches(requests, BatchRules("static", 2))) == [[0, 1], [2, 3], [4]]


def test_sorted_batches_put_the_longest_prompts_together_and_first() -> None:
    requests = [request(index, length) for index, length in enumerate([5, 1, 9, 2, 7])]
    assert indices(plan_batches(requests, BatchRules("sorted_static", 2))) == [[2, 4], [0, 3], [1]]


def test_prompts_of_equal_length_keep_their_order_when_sorted() -> None:
    requests = [request(index, 4) for index in range(5)]
    assert indices(plan_batches(requests, BatchRules("sorted_static", 2))) == [[0, 1], [2, 3], [4]]


def test_dynamic_batches_end_where_padding_and_output_would_pass_the_budget() -> None:
    # Rows of up to 2 + 8 positions fit four times into 40; the prompt of 12 makes every row 20 wide, two of which fit.
    requests = [request(index, length) for index, length in enumerate([2, 2, 2, 2, 2, 12, 2])]
    assert indices(plan_batches(requests, BatchRules("dynamic", 9, 40))) == [[0, 1, 2, 3], [4, 5], [6]]


def test_room_for_output_counts_towards_the_budget() -> None:
    short = [request(index, 2, maximum=8) for index in range(4)]
    long = [request(index, 2, maximum=18) for index in range(4)]
    assert len(plan_batches(short, BatchRules("dynamic", 9, 40))) == 1
    assert len(plan_batches(long, BatchRules("dynamic", 9, 40))) == 2


def test_batch_size_caps_dynamic_batches_too() -> None:
    requests = [request(index, 1) for index in range(5)]
    assert indices(plan_batches(requests, BatchRules("dynamic", 2, 10_000))) == [[0, 1], [2, 3], [4]]


def test_a_request_above_the_budget_runs_alone_and_is_not_lost() -> None:
    requests = [request(0, 2), request(1, 90), request(2, 2)]
    assert indices(plan_batches(requests, BatchRules("dynamic", 4, 40))) == [[0], [1], [2]]


def test_static_batches_have_no_budget() -> None:
    requests = [request(index, 90) for index in range(4)]
    assert len(plan_batches(requests, BatchRules("static", 4, 40))) == 1


def test_requests_with_one_bound_go_together_where_a_batch_has_one_bound() -> None:
    requests = [request(index, 3, maximum=4 + 4 * (index % 2)) for index in range(6)]
    batches = plan_batches(requests, BatchRules("static", 2, has_one_bound=True))
    assert indices(batches) == [[0, 2], [4], [1, 3], [5]]
    assert all(len({item.max_output_tokens for item in batch}) == 1 for batch in batches)


def test_nothing_to_do_is_no_batch() -> None:
    assert plan_batches([], BatchRules("static", 4)) == ()


@pytest.mark.parametrize(("strategy", "has_one_bound"), list(itertools.product(BATCHING_STRATEGIES, (False, True))))
def test_every_request_is_in_one_batch_and_no_batch_is_too_large(strategy: str, has_one_bound: bool) -> None:
    rng = random.Random(7)
    for _ in range(50):
        requests = [request(index, rng.randint(1, 20), rng.choice([4, 8])) for index in range(rng.randint(1, 30))]
        rules = BatchRules(strategy, rng.randint(1, 6), 120 if strategy.endswith("dynamic") else None, has_one_bound)
        batches = plan_batches(requests, rules)
        assert sorted(itertools.chain.from_iterable(indices(batches))) == list(range(len(requests)))
        for batch in batches:
            width = max(len(item.token_ids) for item in batch) + max(item.max_output_tokens for item in batch)
            assert len(batch) <= rules.batch_size
            assert rules.max_tokens is None or len(batch) * width <= rules.max_tokens


def test_padding_stands_in_front_and_is_masked() -> None:
    ids, mask = pad_left([(5, 6, 7), (8,)], 0)
    assert ids == [[5, 6, 7], [0, 0, 8]]
    assert mask == [[1, 1, 1], [0, 0, 1]]


def test_an_id_of_a_prompt_that_is_the_padding_id_is_not_masked() -> None:
    assert pad_left([(0, 0, 7), (8,)], 0)[1] == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("generated", "maximum", "ends", "kept"),
    [
        ((5, 6, 2, 0, 0), 9, END, (5, 6, 2)),  # the end counts, what fills the row up does not
        ((5, 6, 2, 2, 2), 9, END, (5, 6, 2)),  # also where the padding is the end itself
        ((2, 0, 0), 9, END, (2,)),
        ((5, 2, 6, 7), 9, frozenset(), (5, 2, 6, 7)),  # an end that is ignored is a token like any other
        ((5, 6, 7, 8), 3, END, (5, 6, 7)),  # a row beyond its own bound, generated because others went on
        ((5, 6, 7, 2), 3, END, (5, 6, 7)),  # an end beyond the bound
        ((5, 6, 9, 0), 9, frozenset({9, 2}), (5, 6, 9)),
        ((), 9, END, ()),
    ],
)
def test_output_is_cut_after_its_end(
    generated: tuple[int, ...], maximum: int, ends: frozenset[int], kept: tuple[int, ...]
) -> None:
    assert cut_output(generated, maximum, ends) == kept
