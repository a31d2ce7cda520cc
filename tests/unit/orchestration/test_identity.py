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
from lem.orchestration.names import (
    campaign_config_hash,
    canonical_json,
    config_hash,
    experiment_id,
    make_run_id,
    prompts_fingerprint,
)
from lem.worker.prompts import ResolvedPrompts, resolve_on_host


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def identity(**options: Any) -> str:
    experiment = config(**options)
    return config_hash(experiment, prompts_fingerprint(experiment, resolve_on_host))


def test_a_model_in_a_folder_that_is_no_utf8_has_an_identity_of_its_own() -> None:
    names = [os.fsdecode(name) for name in (b"m-\xff", b"m-\xfe", b"m")]
    assert len({identity(model=name) for name in names}) == 3


def test_canonical_json_knows_no_order_of_keys() -> None:
    assert canonical_json({"b": [1, 1.0], "a": None}) == canonical_json({"a": None, "b": [1, 1.0]})
    assert canonical_json({"a": "ü"}) == '{"a":"ü"}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_a_hash_is_sixteen_hex_digits_and_the_same_for_the_same() -> None:
    assert len(identity()) == 16
    assert int(identity(), 16) >= 0
    assert identity(max_output_tokens=64) == identity(max_output_tokens=64)


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
    def refuse(_: ExperimentConfig) -> ResolvedPrompts | None:
        raise AssertionError("a million prompts made for a hash")

    many = config(prompts={"type": "synthetic", "sample_size": 1_000_000, "input_tokens": 512})
    assert prompts_fingerprint(many, refuse)


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
    digest = "0123456789abcdef"
    assert experiment_id(digest, 0) == "0123456789ab-c1"
    assert experiment_id(digest, 19) == "0123456789ab-c20"


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
