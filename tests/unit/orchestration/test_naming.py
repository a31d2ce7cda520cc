from __future__ import annotations

from typing import Any

import pytest

from lem.config.kinds import Expanded
from lem.orchestration.names import distinct_names, file_stem, name_configurations


def names(*configs: dict[str, Any]) -> list[str]:
    return name_configurations(configs)


def test_a_name_is_made_of_what_varies() -> None:
    assert names(
        {"model": "gpt2", "max_output_tokens": 16, "random_seed": 1},
        {"model": "gpt2", "max_output_tokens": 32, "random_seed": 1},
    ) == ["pytorch-max_output_tokens=16", "pytorch-max_output_tokens=32"]


def test_one_alone_is_named_by_backend_and_model() -> None:
    assert names({"model": "org/gpt2-xl", "backend": "vllm"}) == ["vllm-gpt2-xl"]


def test_values_that_explain_themselves_stand_alone() -> None:
    assert names(
        {"fp_precision": "float16", "decoder": {"preset": "factual"}},
        {"fp_precision": "float32", "decoder": {"preset": None}},
    ) == ["pytorch-float16-factual", "pytorch-float32-preset=null"]


def test_the_model_is_named_where_it_varies_by_as_much_as_tells_it_apart() -> None:
    assert names({"model": "a/x"}, {"model": {"name": "b/y"}}) == ["pytorch-x", "pytorch-y"]
    assert names({"model": "a/x"}, {"model_name": "b/x"}) == ["pytorch-a_x", "pytorch-b_x"]


def test_an_option_that_only_some_have_is_named_for_those() -> None:
    assert names({"backend": "vllm"}, {"backend": "pytorch", "pytorch": {"use_cache": False}}) == [
        "vllm",
        "pytorch-use_cache=false",
    ]


def test_options_of_the_same_last_name_are_told_apart() -> None:
    found = names(
        {"warmup": {"enabled": True}, "baseline": {"enabled": True}},
        {"warmup": {"enabled": False}, "baseline": {"enabled": False}},
    )
    assert found[1] == "pytorch-warmup.enabled=false-baseline.enabled=false"


def test_a_path_is_named_by_its_last_part_and_a_list_by_its_items() -> None:
    found = names(
        {"prompts": {"type": "file", "path": "/data/a b.txt"}, "gpus": ["0", "1"]},
        {"prompts": {"type": "file", "path": "/data/c.txt"}, "gpus": []},
    )
    assert found == ["pytorch-path=a_b.txt-gpus=0+1", "pytorch-path=c.txt-gpus=none"]


def test_what_a_variable_holds_is_in_no_name() -> None:
    secret = Expanded("secret", "${TOKEN}", "secret")
    assert names({"pytorch": {"extra": {"key": secret}}}, {}) == ["pytorch-key=_TOKEN_", "pytorch"]


def test_names_that_come_out_alike_are_told_apart_by_content_whatever_the_order() -> None:
    one, two = {"prompts": {"path": "/a/x"}}, {"prompts": {"path": "/b/x"}}
    first, second = names(one, two)
    assert first == "pytorch-path=x"
    assert second.startswith("pytorch-path=x-")
    assert len({*names(one, two), *names(two, one)}) == 3
    assert names(one, two) == names(one, two)


def test_the_same_twice_still_has_two_names() -> None:
    assert len(set(names(*[{"model": "gpt2"}] * 4))) == 4


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    long = [{"config_path": "x", "model": "m", "dataset": {"name": "y" * 300 + str(number)}} for number in range(3)]
    found = names(*long)
    assert len(set(found)) == 3
    assert max(map(len, found)) <= 110


def test_distinct_names_leave_distinct_ones_alone() -> None:
    assert distinct_names(["a", "b"], [{}, {}]) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("pytorch-float16-batch_size=4", "pytorch-float16-batch_size=4"),
        ("../../etc/passwd", "_.._etc_passwd"),
        (".hidden", "hidden"),
        ("größe 1", "gr_e_1"),
        ("..", "experiment"),
    ],
)
def test_a_file_name_is_harmless(name: str, stem: str) -> None:
    assert file_stem(name) == stem
