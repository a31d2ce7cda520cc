from __future__ import annotations

import os
import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Expanded
from lem.orchestration.grid import (
    campaign_config_hash,
    config_hash,
    experiment_id,
    file_stem,
    make_run_id,
    name_configurations,
    prompts_fingerprint,
)


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


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def identity(**options: Any) -> str:
    experiment = config(**options)
    return config_hash(experiment, prompts_fingerprint(experiment))


def test_a_model_in_a_folder_that_is_no_utf8_has_an_identity_of_its_own() -> None:
    names = [os.fsdecode(name) for name in (b"m-\xff", b"m-\xfe", b"m")]
    assert len({identity(model=name) for name in names}) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"max_output_tokens": 64},
        {"model": {"name": "gpt2", "revision": "main"}},
        {"backend": "vllm"},
        {"gpus": []},
        {"decoder": {"top_k": 7}},
        {"pytorch": {"batch_size": 2}},
        {"measurement": {"min_window_sec": 1}},
        {"warmup": {"min_prompts": 7}},
        {"traffic_simulation": {"enabled": True}},
        {"prompts": {"type": "synthetic", "seed": 1}},
        {"dataset": "alpaca"},
    ],
)
def test_whatever_can_change_the_numbers_changes_the_hash(options: dict[str, Any]) -> None:
    assert identity(**options) != identity()


@pytest.mark.parametrize(
    "options",
    [
        {"config_name": "other"},
        {"io": {"results_dir": "elsewhere"}},
        {"extra_metadata": {"who": "me"}},
        {"num_cycles": 3},
        {"save_outputs": True},
        {"pytorch": {}},
        {"fp_precision": "float16"},
        {"model": {"name": "gpt2"}},
    ],
)
def test_names_places_metadata_and_defaults_written_out_do_not(options: dict[str, Any]) -> None:
    assert identity(**options) == identity()


def test_a_preset_is_the_values_it_stands_for() -> None:
    assert identity(decoder={"preset": "factual"}) == identity(decoder={"temperature": 0.3})


@pytest.fixture
def prompt_file(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, text: str, **options: Any) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        return {"type": "file", "path": str(tmp_path / name), **options}

    return make


def test_a_file_of_prompts_is_known_by_its_content(prompt_file: Callable[..., dict[str, Any]]) -> None:
    one = identity(prompts=prompt_file("one.txt", "a\nb\n"))
    assert identity(prompts=prompt_file("two.txt", "a\nb\n")) == one
    assert identity(prompts=prompt_file("one.txt", "a\nc\n")) != one
    assert identity(prompts=prompt_file("two.txt", "a\nb\n", sample_size=1)) != one


def test_a_missing_file_of_prompts_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.txt"):
        identity(prompts={"type": "file", "path": str(tmp_path / "missing.txt")})


def test_the_bundled_set_is_the_synthetic_one_it_is_made_of() -> None:
    written_out = {"type": "synthetic", "input_tokens": 128, "sample_size": 32, "seed": 42, "distribution": "lognormal"}
    assert identity(prompts=written_out) == identity()
    assert identity(prompts={**written_out, "sample_size": 31}) != identity()


def test_synthetic_prompts_are_not_made_to_be_known() -> None:
    # A million prompts, which would take minutes to make.
    many = config(prompts={"type": "synthetic", "sample_size": 1_000_000, "input_tokens": 512})
    assert prompts_fingerprint(many)["synthetic"]["sample_size"] == 1_000_000


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"dataset": "alpaca"}, {"dataset": "gsm8k"}),
        ({"dataset": {"name": "alpaca", "sample_size": 4}}, {"dataset": {"name": "alpaca", "sample_size": 5}}),
        ({"dataset": {"name": "x", "split": "a"}}, {"dataset": {"name": "x", "split": "b"}}),
        (
            {"prompts": {"type": "huggingface", "dataset": "x", "seed": 1}},
            {"prompts": {"type": "huggingface", "dataset": "x", "seed": 2}},
        ),
    ],
)
def test_a_dataset_is_known_by_its_name_and_what_is_taken_of_it(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert identity(**one) == identity(**one)
    assert identity(**one) != identity(**two)


def test_an_experiment_has_a_name_in_each_cycle() -> None:
    assert [experiment_id("0123456789abcdef", cycle) for cycle in (0, 19)] == ["0123456789ab-c1", "0123456789ab-c20"]


def test_a_run_is_named_by_its_start_in_utc_and_by_chance() -> None:
    at = datetime(2026, 7, 14, 12, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    first = make_run_id(at, random.Random(1))
    assert first.startswith("20260714T100005Z-")
    assert len(first) == len("20260714T100005Z-") + 4
    assert make_run_id(at, random.Random(1)) == first != make_run_id(at, random.Random(2))


def campaign(**options: Any) -> CampaignConfig:
    return CampaignConfig.from_dict({"campaign_name": "demo", "configs": ["a.yaml"], **options})


def test_a_campaign_is_known_by_its_configurations_and_how_it_runs_them() -> None:
    known = campaign_config_hash(campaign(), ["a", "b"])
    assert campaign_config_hash(campaign(), ["a", "b"]) == known
    assert campaign_config_hash(campaign(), ["b", "a"]) != known
    assert campaign_config_hash(campaign(execution={"cycles": 4}), ["a", "b"]) != known
    assert campaign_config_hash(campaign(cold_start={"force_cold_start": True}), ["a", "b"]) != known


def test_names_places_and_notification_do_not_change_a_campaign() -> None:
    changed = campaign(
        campaign_name="other",
        io={"results_dir": "elsewhere"},
        notification={"webhook_url": "http://localhost"},
        daemon={"enabled": True},
    )
    assert campaign_config_hash(changed, ["a"]) == campaign_config_hash(campaign(), ["a"])
