"""Layers laid over each other."""

from __future__ import annotations

from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.config.option import canonical, merge, put
from lem.config.problems import leaves, nest


def over(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    return merge(ExperimentConfig, base, layer)


def test_mappings_merge_and_anything_else_replaces():
    base = {"decoder": {"top_k": 5, "top_p": 0.5}, "gpus": [0, 1]}
    assert over(base, {"decoder": {"top_k": 7}, "gpus": [2]}) == {"decoder": {"top_k": 7, "top_p": 0.5}, "gpus": [2]}


def test_layers_stay_as_they_are():
    base: dict[str, Any] = {"decoder": {"top_k": 5}}
    over(base, {"decoder": {"top_k": 7}})
    assert base == {"decoder": {"top_k": 5}}


def test_another_model_takes_nothing_from_the_one_below():
    base = {"model": {"name": "one", "revision": "abc"}}
    assert over(base, {"model": "two"}) == {"model": {"name": "two"}}
    assert over(base, {"model_name": "two"}) == {"model": {"name": "two"}}


def test_a_part_of_a_model_merges_with_the_one_below():
    assert over({"model": "one"}, {"model": {"revision": "abc"}}) == {"model": {"name": "one", "revision": "abc"}}


def test_an_alias_below_is_the_same_option():
    assert over({"model_name": "one"}, {"model": {"revision": "abc"}}) == {"model": {"name": "one", "revision": "abc"}}


def test_prompts_of_another_type_replace_those_below():
    base = {"prompts": {"type": "file", "path": "p.txt"}}
    layer = {"prompts": {"type": "synthetic", "input_tokens": 8}}
    assert over(base, layer) == layer
    assert over(layer, {"prompts": {"input_tokens": 9}}) == {"prompts": {"type": "synthetic", "input_tokens": 9}}


def test_null_takes_away_what_was_inherited():
    assert over({"dataset": "alpaca"}, {"dataset": None}) == {"dataset": None}


def test_free_mappings_merge_by_key():
    assert over({"extra_metadata": {"a": 1, "b": {"c": 2}}}, {"extra_metadata": {"b": {"d": 3}}}) == {
        "extra_metadata": {"a": 1, "b": {"c": 2, "d": 3}}
    }


def test_both_names_of_an_option_are_left_for_validation():
    assert canonical(ExperimentConfig, {"model": "a", "model_name": "b"}) == {"model": {"name": "a"}, "model_name": "b"}


def test_unknown_keys_stay_for_validation():
    assert over({"x": {"y": 1}}, {"x": {"z": 2}}) == {"x": {"y": 1, "z": 2}}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({}, {"model": {"revision": "abc"}}),
        ({"model": "gpt2"}, {"model": {"name": "gpt2", "revision": "abc"}}),
        ({"model": {"name": "gpt2"}}, {"model": {"name": "gpt2", "revision": "abc"}}),
    ],
)
def test_a_dotted_name_is_set_whatever_form_is_below(start: dict[str, Any], expected: dict[str, Any]):
    assert put(ExperimentConfig, start, "model.revision", "abc") == expected


def test_nesting_and_leaves():
    assert nest("a.b", 1) == {"a": {"b": 1}}
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == {("a", "b"): 1, ("a", "c"): {}, ("d",): [1]}
