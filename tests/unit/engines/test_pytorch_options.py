"""What an experiment asks of `generate`, and how its requests form batches."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from lem.config.backends import BeamSearchConfig, PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.common import section_of
from lem.engines.protocol import TokenRequest
from lem.engines.pytorch.options import (
    SpecialTokens,
    assistant_settings,
    compiles_steps,
    cut_output,
    generation_settings,
    idle_options,
    pad_left,
    plan_batches,
)

TOKENS = SpecialTokens(pad_id=0, end_ids=(2, 7))
GREEDY = {"preset": "deterministic"}


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", **options})


def settings(device: str = "cpu", **options: Any) -> dict[str, Any]:
    return generation_settings(experiment(**options), TOKENS, device)


def test_sampling_values_are_those_of_the_decoder() -> None:
    decoder = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.2}
    found = settings(decoder=decoder)
    assert found["do_sample"] is True
    # top_k 0 is given as 0: left out, it would be transformers' 50.
    assert {name: found[name] for name in decoder} == decoder


@pytest.mark.parametrize("decoder", [GREEDY, {"temperature": 0}, {"do_sample": False}])
def test_greedy_decoding_leaves_sampling_values_out(decoder: dict[str, Any]) -> None:
    found = settings(decoder=decoder, pytorch={"min_p": 0.1})
    assert found["do_sample"] is False
    assert not {"temperature", "top_k", "top_p", "min_p"} & set(found)


def test_ends_are_those_of_the_model_and_lengths_those_of_the_requests() -> None:
    found = settings(max_output_tokens=9, min_output_tokens=3)
    assert found["eos_token_id"] == [2, 7]
    assert not [name for name in found if "max_" in name or "min_" in name]
    assert "eos_token_id" not in settings(ignore_eos=True)
    assert "eos_token_id" not in generation_settings(experiment(), SpecialTokens(0, ()), "cpu")


def test_extra_arguments_go_to_whoever_reads_them() -> None:
    # A list stays a list: transformers takes no tuple for one.
    extra = {"suppress_tokens": [5], "assistant_confidence_threshold": 0.2}
    options = {"assisted_generation": {"model": "small"}, "extra": extra}
    assert settings(pytorch=options)["suppress_tokens"] == [5]
    assert "assistant_confidence_threshold" not in settings(pytorch=options)
    assert assistant_settings(experiment(pytorch=options)) == {"assistant_confidence_threshold": 0.2}


def test_transformers_does_not_compile_beside_torch_compile() -> None:
    assert settings(pytorch={"torch_compile": "default"})["disable_compile"] is True
    assert "disable_compile" not in settings()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_transformers_compiles_what_is_recorded_as_cuda_graphs(mode: str) -> None:
    options = {"torch_compile": mode, "cache_implementation": "static"}
    assert "disable_compile" not in settings("cuda", pytorch=options)
    assert compiles_steps(section_of(experiment(pytorch=options), PyTorchConfig), "cuda")
    assert not compiles_steps(section_of(experiment(pytorch=options), PyTorchConfig), "cpu")
    assert not compiles_steps(section_of(experiment(pytorch={"torch_compile": "default"}), PyTorchConfig), "cuda")


def test_min_p_under_greedy_decoding_is_told() -> None:
    assert idle_options(experiment(decoder=GREEDY, pytorch={"min_p": 0.1})) != ()
    assert idle_options(experiment(pytorch={"min_p": 0.1})) == ()
    assert idle_options(experiment(decoder=GREEDY)) == ()


# Batches

END = frozenset({2})
STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic")
BEAMS = BeamSearchConfig(enabled=True, num_beams=2)


def request(index: int, length: int, maximum: int = 8, minimum: int = 0) -> TokenRequest:
    return TokenRequest(index, tuple(range(10, 10 + length)), maximum, minimum)


def plan(requests: list[TokenRequest], strategy: str, size: int, budget: int | None = None, **more: Any) -> Any:
    section = PyTorchConfig(batching_strategy=strategy, batch_size=size, max_tokens_per_batch=budget, **more)
    return plan_batches(requests, section)


def indices(batches: Any) -> list[list[int]]:
    return [[item.index for item in batch] for batch in batches]


@pytest.mark.parametrize(
    ("lengths", "rules", "batches"),
    [
        ([5, 1, 9, 2, 7], ("static", 2), [[0, 1], [2, 3], [4]]),
        ([5, 1, 9, 2, 7], ("sorted_static", 2), [[2, 4], [0, 3], [1]]),
        ([4] * 5, ("sorted_static", 2), [[0, 1], [2, 3], [4]]),  # equal lengths keep their order
        # Rows of up to 2 + 8 positions fit four times into 40; the prompt of 12 makes each row 20 wide: two fit.
        ([2, 2, 2, 2, 2, 12, 2], ("dynamic", 9, 40), [[0, 1, 2, 3], [4, 5], [6]]),
        ([1] * 5, ("dynamic", 2, 10_000), [[0, 1], [2, 3], [4]]),
        ([2, 90, 2], ("dynamic", 4, 40), [[0], [1], [2]]),  # a request above the budget runs alone
        ([], ("static", 4), []),
    ],
)
def test_batches_follow_strategy_size_and_budget(lengths: list[int], rules: Any, batches: list[list[int]]) -> None:
    assert indices(plan([request(index, length) for index, length in enumerate(lengths)], *rules)) == batches


def test_requests_with_one_bound_go_together_in_a_beam_search() -> None:
    requests = [request(index, 3, maximum=4 + 4 * (index % 2)) for index in range(6)]
    assert indices(plan(requests, "static", 2, beam_search=BEAMS)) == [[0, 2], [4], [1, 3], [5]]


@pytest.mark.parametrize(("strategy", "more"), list(itertools.product(STRATEGIES, ({}, {"beam_search": BEAMS}))))
def test_every_request_is_in_one_batch_and_no_batch_is_too_large(strategy: str, more: dict[str, Any]) -> None:
    rng = random.Random(7)
    for _ in range(50):
        requests = [request(index, rng.randint(1, 20), rng.choice([4, 8])) for index in range(rng.randint(1, 30))]
        size, budget = rng.randint(1, 6), 120 if strategy.endswith("dynamic") else None
        batches = plan(requests, strategy, size, budget, **more)
        assert sorted(itertools.chain.from_iterable(indices(batches))) == list(range(len(requests)))
        for batch in batches:
            width = max(len(item.token_ids) for item in batch) + max(item.max_output_tokens for item in batch)
            assert len(batch) <= size
            assert budget is None or len(batch) * width <= budget


def test_padding_stands_in_front_and_is_masked() -> None:
    ids, mask = pad_left([(5, 6, 7), (8,)], 0)
    assert ids == [[5, 6, 7], [0, 0, 8]]
    assert mask == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([(0, 0, 7), (8,)], 0)[1] == mask  # the padding id of a prompt is not masked


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
