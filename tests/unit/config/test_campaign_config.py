"""A campaign's configuration: defaults, every rejection, and what it gives its experiments."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.config.campaign_config import (
    CampaignConfig,
    CampaignDaemonConfig,
    CampaignExecutionConfig,
    CampaignExplicitExperiment,
    CampaignGridConfig,
    CampaignIOConfig,
    CampaignNotificationConfig,
    CampaignScheduleConfig,
    generate_campaign_id,
    slug_of,
    with_campaign_defaults,
)
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems, dotted

GRID = CampaignGridConfig(backends=("pytorch",))


def campaign(**options: Any) -> Any:
    return CampaignConfig(**{"campaign_name": "test", "grid": GRID, **options})


def problems(kind: Callable[..., Any], **options: Any) -> list[tuple[str, str | None]]:
    """The option of each problem, and the suggestion."""
    with pytest.raises(ConfigProblems) as caught:
        kind(**options)
    return [(dotted(problem.path), problem.suggestion) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("kind", "option", "accepted", "refused"),
    [
        (CampaignExecutionConfig, "config_gap_seconds", (0, 1e6), (-1, "60s", 1e300)),
        (CampaignIOConfig, "manifest_filename", ("m.json",), ("a/m.json", "", "..")),
        (CampaignNotificationConfig, "webhook_url", ("https://host/x", None), ("host/x", "ftp://host", "")),
        (CampaignDaemonConfig, "at", ("00:00", "23:59", None), ("24:00", "7:30", "noon", 730)),
        (CampaignDaemonConfig, "interval", ("90s", "30m", "6h", "2d", "1h30m"), ("6", "6 hours", "", "0s", 6)),
        (CampaignDaemonConfig, "total_duration", ("48h",), ("-1h", "99999999999d")),
    ],
)
def test_texts_of_a_form(kind: type, option: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    for value in accepted:
        kind(**{option: value})
    for value in refused:
        assert {name.partition("[")[0] for name, _ in problems(kind, **{option: value})} == {option}, value


# Grid

TWO = ["pytorch", "vllm"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"backends": TWO, "shared": {"fp_precison": ["float16"], "decoder.top_q": [1]}},
            [("shared.fp_precison", "fp_precision"), ("shared.decoder.top_q", None)],
        ),
        (
            {"backends": TWO, "shared": {"max_output_tokens": [0, 8], "decoder.preset": []}},
            [("shared.max_output_tokens[0]", None), ("shared.decoder.preset", None)],
        ),
        ({"backends": TWO, "shared": {"backend": ["x"]}}, [("shared.backend", None)]),
        ({"backends": TWO, "shared": {"model_name": ["x"]}}, [("shared.model_name", None)]),
        ({"backends": TWO, "shared": {"vllm.max_num_seqs": [8]}}, [("shared.vllm.max_num_seqs", None)]),
        (
            {"backends": ["pytorch"], "backend_overrides": {"vllm": {"max_num_seqs": 8}}},
            [("backend_overrides.vllm", None)],
        ),
        ({"backends": ["vllm"], "backend_overrides": {"vlm": {}}}, [("backend_overrides.vlm", "vllm")]),
        (
            {
                "backends": ["pytorch"],
                "backend_overrides": {"pytorch": {"max_num_seqs": 8, "batch_size": [1, 0], "beam_search.enabled": 1}},
            },
            [
                ("backend_overrides.pytorch.max_num_seqs", None),
                ("backend_overrides.pytorch.batch_size[1]", None),
                ("backend_overrides.pytorch.beam_search.enabled", None),
            ],
        ),
        ({"backends": ["pytorch"], "models": []}, [("models", None)]),
        ({"backends": ["pytorch"], "models": [{"nam": "x"}]}, [("models[0].nam", "name")]),
    ],
)
def test_axes_must_be_options_in_their_place_with_valid_values(
    options: dict[str, Any], expected: list[tuple[str, str | None]]
) -> None:
    assert problems(CampaignGridConfig, **options) == expected


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"shared": {"pytorch.batch_size": [1, 2]}}, {}),
        ({"backend_overrides": {"pytorch": {"batch_size": [1, 4], "attn_implementation": "eager"}}}, {}),
        ({"shared": {"streaming": True}}, {"shared": {"streaming": [True]}}),
        ({"models": ["gpt2", {"name": "opt", "revision": "abc"}]}, {}),
        ({"shared": {"gpus": [[0], [0, 1]]}}, {}),
    ],
)
def test_axes_are_kept_as_written_but_for_a_single_shared_value(options: dict[str, Any], read: dict[str, Any]) -> None:
    grid = CampaignGridConfig(backends=("pytorch",), **options)
    assert {name: getattr(grid, name) for name in options} == (read or options)


def test_a_grid_of_too_many_experiments_is_refused_before_it_is_expanded() -> None:
    wide = {axis: list(range(1, 101)) for axis in ("max_input_tokens", "max_output_tokens", "random_seed")}
    some = {axis: wide[axis] for axis in ("max_input_tokens", "max_output_tokens")}
    CampaignGridConfig(backends=("pytorch",), models=("a", "b", "c"), shared=some)
    eleven = [f"m{number}" for number in range(11)]
    for options in ({"shared": wide}, {"shared": some, "models": eleven}):
        assert problems(CampaignGridConfig, backends=["pytorch"], **options) == [("", None)]
    with pytest.raises(ConfigProblems, match="makes 4,000,000 experiments"):
        overrides: Any = {"pytorch": {"batch_size": [1, 2, 4], "min_p": 0.1}, "vllm": {"logprobs": 1}}
        CampaignGridConfig(backends=("pytorch", "vllm"), shared=wide, backend_overrides=overrides)


# Experiments


def test_an_entry_is_a_file_with_overrides_or_an_experiment() -> None:
    overrides = {"decoder.preset": "factual", "decoder": {"top_k": 3}}
    written = {"model": "gpt2", "max_output_tokens": 8}
    config = campaign(experiments=[{"config": "a.yaml", "overrides": overrides}, {"config": "b.yaml"}, written])
    assert [entry.config for entry in config.experiments] == ["a.yaml", "b.yaml", None]
    assert [entry.overrides for entry in config.experiments] == [overrides, {}, {}]
    assert config.experiments[2].inline == written
    assert CampaignExplicitExperiment.nest_overrides(overrides) == {"decoder": {"preset": "factual", "top_k": 3}}


@pytest.mark.parametrize(
    ("entry", "first"),
    [
        ({}, ("experiments[0]", None)),
        ("a.yaml", ("experiments[0]", None)),
        (
            {"config": "a.yaml", "overrides": {"decoder.presett": 1}},
            ("experiments[0].overrides.decoder.presett", "preset"),
        ),
        ({"config": "a.yaml", "max_output_tokens": 1}, ("experiments[0].max_output_tokens", None)),
        ({"max_output_tokens": 0}, ("experiments[0].max_output_tokens", None)),
        ({"overrides": {"streaming": True}}, ("experiments[0]", None)),
        ({"inline": {"model": "gpt2"}, "overrides": {"streaming": True}}, ("experiments[0].overrides", None)),
    ],
)
def test_entries_that_are_refused(entry: Any, first: tuple[str, str | None]) -> None:
    assert problems(CampaignConfig, campaign_name="x", experiments=[entry])[0] == first


# Schedule and daemon


def test_a_daemon_that_is_not_switched_on_is_refused_in_a_file() -> None:
    mapping: dict[str, Any] = {"campaign_name": "x", "grid": {"backends": ["pytorch"]}, "daemon": {"interval": "6h"}}
    assert problems(CampaignConfig.from_dict, mapping=mapping) == [("daemon.interval", None)]
    mapping["daemon"]["enabled"] = False
    assert CampaignConfig.from_dict(mapping).daemon == CampaignDaemonConfig(interval="6h")


@pytest.mark.parametrize(
    ("days", "weekdays"),
    [(None, range(7)), (["mon", "sun"], [0, 6]), ("weekdays", range(5)), (["weekends", "sat"], [5, 6])],
)
def test_days_of_a_schedule(days: Any, weekdays: Any) -> None:
    assert CampaignScheduleConfig(at="08:00", days=days).weekdays == set(weekdays)


def test_a_schedule_needs_a_time_and_days_that_there_are() -> None:
    assert problems(CampaignScheduleConfig, days=["mon"]) == [("at", None)]
    assert problems(CampaignScheduleConfig, at="08:00", days=[]) == [("days", None)]
    assert problems(CampaignScheduleConfig, at="08:00", days=["monday"]) == [("days[0]", "mon")]


# Names and paths


def test_a_name_of_bytes_that_are_no_utf8_has_an_id_and_a_slug() -> None:
    odd, other = (campaign(campaign_name=os.fsdecode(name)) for name in (b"d\xe9mo", b"d\xe8mo"))
    assert len({odd.campaign_id, other.campaign_id, generate_campaign_id("démo")}) == 3
    assert odd.slug == "d-mo"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("demo", "demo"),
        ("My Campaign (v2)!", "my-campaign-v2"),
        ("_a_b-", "a_b"),
        ("../../etc/passwd", "etc-passwd"),
        ("9lives", "9lives"),
        ("Größe", "gr-e"),
        ("日本", f"campaign-{generate_campaign_id('日本')}"),
        ("!!!", f"campaign-{generate_campaign_id('!!!')}"),
        ("x" * 300, f"{'x' * 55}-{generate_campaign_id('x' * 300)}"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert slug_of(name) == slug
    assert campaign(campaign_name=name).slug == slug


def test_paths_may_be_path_objects() -> None:
    assert CampaignIOConfig(state_dir=Path("s"), manifest_filename="m.json").manifest_path == Path("s/m.json")  # type: ignore[arg-type]
    assert campaign(configs=[Path("a/one.yaml")]).configs == ["a/one.yaml"]


def test_round_trip() -> None:
    grid = {
        "backends": ["pytorch"],
        "models": ["gpt2", {"name": "opt"}],
        "shared": {"decoder.preset": ["factual", None]},
    }
    daemon = {"enabled": True, "interval": "6h", "quiet": False}
    experiments = [{"config": "b.yaml", "overrides": {"streaming": True}}, {"model": "gpt2"}]
    config = campaign(model="gpt2", grid=grid, daemon=daemon, experiments=experiments, execution={"cycles": 5})
    assert CampaignConfig.from_dict(config.to_dict()) == config
    assert config.execution == CampaignExecutionConfig(cycles=5)


# Options that a campaign has for all its experiments


def filled(experiment: dict[str, Any], /, forced: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    return with_campaign_defaults(campaign(**options), experiment, forced)


def test_model_and_dataset_fill_in_where_an_experiment_names_none():
    assert filled({}, model="gpt2")["model"] == {"name": "gpt2"}
    assert filled({"model": "opt"}, model={"name": "gpt2", "revision": "abc"})["model"] == {"name": "opt"}
    assert filled({"model": {"revision": "x"}}, model="gpt2")["model"] == {"name": "gpt2", "revision": "x"}
    assert filled({}, dataset="alpaca")["dataset"] == {"name": "alpaca"}
    assert "dataset" not in filled({"prompts": {"type": "synthetic"}}, dataset="alpaca")
    assert "model" not in filled({})


def test_num_samples_goes_to_whatever_the_prompts_come_from():
    assert filled({"dataset": "alpaca"}, num_samples=7)["dataset"]["sample_size"] == 7
    assert filled({"dataset": {"name": "alpaca", "sample_size": 3}}, num_samples=7)["dataset"]["sample_size"] == 3
    assert filled({"prompts": {"type": "file", "path": "p"}}, num_samples=7)["prompts"]["sample_size"] == 7
    bundled = filled({"max_input_tokens": 64}, num_samples=7)["prompts"]
    assert bundled == {"type": "synthetic", "input_tokens": 64, "sample_size": 7, "distribution": "lognormal"}


def test_warmup_fills_in_and_stays_consistent():
    execution = {"warmup_prompts": 60, "warmup_timeout_seconds": 5}
    mapping = filled({"model": "gpt2"}, execution=execution)
    assert mapping["warmup"] == {"min_prompts": 60, "max_prompts": 60, "timeout_seconds": 5.0}
    ExperimentConfig.from_dict(mapping)
    own = filled({"warmup": {"min_prompts": 1, "timeout_seconds": 2}}, execution=execution)["warmup"]
    assert own == {"min_prompts": 1, "timeout_seconds": 2}


def test_the_command_line_wins_over_an_experiment():
    experiment = {"model": {"name": "opt", "revision": "r"}, "warmup": {"min_prompts": 1}, "dataset": "mmlu"}
    forced = ("model.name", "execution.warmup_prompts", "dataset.name", "num_samples")
    mapping = filled(experiment, forced, model="gpt2", execution={"warmup_prompts": 3}, dataset="alpaca", num_samples=2)
    assert mapping["model"] == {"name": "gpt2"}
    assert mapping["warmup"]["min_prompts"] == 3
    assert mapping["dataset"] == {"name": "alpaca", "sample_size": 2}
    assert experiment["model"] == {"name": "opt", "revision": "r"}
