"""A campaign's configuration: defaults, every rejection, and what scripts rely on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from lem.config.campaign_config import (
    CampaignColdStartConfig,
    CampaignConfig,
    CampaignDaemonConfig,
    CampaignExecutionConfig,
    CampaignExplicitExperiment,
    CampaignGridConfig,
    CampaignHealthCheckConfig,
    CampaignIOConfig,
    CampaignNotificationConfig,
    CampaignScheduleConfig,
    generate_campaign_id,
    slug_of,
    with_campaign_defaults,
)
from lem.config.experiment import ExperimentConfig
from lem.config.load import load_campaign
from lem.config.problems import ConfigProblems


# Any, since scripts that compare with lists are not typed either.
def make_grid(**options: Any) -> Any:
    return CampaignGridConfig(**options)


GRID = make_grid(backends=["pytorch"])


def campaign(**options: Any) -> Any:
    return CampaignConfig(**{"campaign_name": "test", "grid": GRID, **options})


def complaint(kind: type, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at
        kind(**options)
    return str(caught.value)


# Defaults


def test_sections_that_are_optional_default_to_none_and_lists_to_empty():
    config = campaign()
    assert config.model is None
    assert config.dataset is None
    assert config.num_samples is None
    assert config.daemon is None
    assert config.schedule is None
    assert config.configs == []
    assert config.experiments == []
    assert campaign(grid=None, configs=["a.yaml"]).grid is None


def test_grid_defaults():
    grid = make_grid(backends=["pytorch", "vllm"])
    assert grid.backends == ["pytorch", "vllm"]
    assert grid.models is None
    assert grid.shared == {}
    assert grid.backend_overrides == {}


def test_execution_defaults():
    assert CampaignExecutionConfig().to_dict() == {
        "cycles": 3,
        "structure": "interleaved",
        "warmup_prompts": 5,
        "warmup_timeout_seconds": 30.0,
        "config_gap_seconds": 60.0,
        "cycle_gap_seconds": 300.0,
        "load_timeout_seconds": 1800.0,
        "experiment_timeout_seconds": 3600.0,
        "silence_timeout_seconds": 600.0,
        "reuse": "cycle",
        "seed": 42,
    }


def test_defaults_of_the_other_sections():
    assert CampaignHealthCheckConfig().to_dict() == {
        "enabled": True,
        "interval_experiments": 0,
        "gpu_memory_threshold_pct": 90.0,
        "restart_on_failure": True,
        "max_restarts": 3,
    }
    assert CampaignColdStartConfig().to_dict() == {"force_cold_start": False, "restart_container": False}
    assert CampaignDaemonConfig().to_dict() == {
        "enabled": False,
        "at": None,
        "interval": None,
        "total_duration": None,
        "quiet": True,
    }
    assert CampaignIOConfig().to_dict() == {
        "results_dir": "results",
        "configs_dir": "configs",
        "state_dir": ".state",
        "manifest_filename": "campaign_manifest.json",
        "compose_file": None,
        "env_file": None,
    }
    assert CampaignNotificationConfig().to_dict() == {"webhook_url": None, "on": ["complete", "failure"]}


def test_sections_of_a_campaign_default_to_their_own_defaults():
    config = campaign()
    assert config.execution == CampaignExecutionConfig()
    assert config.health_check == CampaignHealthCheckConfig()
    assert config.cold_start == CampaignColdStartConfig()
    assert config.io == CampaignIOConfig()
    assert config.notification == CampaignNotificationConfig()


# Boundaries


@pytest.mark.parametrize(
    ("kind", "option", "accepted", "refused"),
    [
        (CampaignExecutionConfig, "cycles", (1, 20), (0, 21, 2.5, "3", None, True)),
        (CampaignExecutionConfig, "structure", ("interleaved", "shuffled", "grouped"), ("random", "", None, 1)),
        (CampaignExecutionConfig, "warmup_prompts", (0, 200), (-1, 201)),
        (CampaignExecutionConfig, "warmup_timeout_seconds", (0, 1.5), (-0.1, float("inf"))),
        (CampaignExecutionConfig, "config_gap_seconds", (0, 1e6), (-1, "60s", 1e300)),
        (CampaignExecutionConfig, "cycle_gap_seconds", (0,), (-1, 1e300)),
        (CampaignExecutionConfig, "load_timeout_seconds", (0.1,), (0, -1)),
        (CampaignExecutionConfig, "experiment_timeout_seconds", (0.1,), (0,)),
        (CampaignExecutionConfig, "silence_timeout_seconds", (0.1,), (0,)),
        (CampaignExecutionConfig, "reuse", ("cycle", "campaign", "none"), ("always", False)),
        (CampaignExecutionConfig, "seed", (0,), (-1, None)),
        (CampaignHealthCheckConfig, "interval_experiments", (0, 5), (-1,)),
        (CampaignHealthCheckConfig, "gpu_memory_threshold_pct", (50, 100), (49.9, 100.1)),
        (CampaignHealthCheckConfig, "max_restarts", (0,), (-1,)),
        (CampaignHealthCheckConfig, "enabled", (True, False), ("yes", 1)),
        (CampaignIOConfig, "manifest_filename", ("m.json",), ("a/m.json", "", "..")),
        (CampaignNotificationConfig, "webhook_url", ("https://host/x", None), ("host/x", "ftp://host", "")),
        (CampaignNotificationConfig, "on", (["failure"], "complete", []), (["sometimes"],)),
        (CampaignDaemonConfig, "at", ("00:00", "23:59", None), ("24:00", "7:30", "noon", 730)),
        (CampaignDaemonConfig, "interval", ("90s", "30m", "6h", "2d", "1h30m"), ("6", "6 hours", "", "0s", 6)),
        (CampaignDaemonConfig, "total_duration", ("48h",), ("-1h", "99999999999d")),
    ],
)
def test_bounds(kind: type, option: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]):
    for value in accepted:
        kind(**{option: value})
    for value in refused:
        assert complaint(kind, **{option: value}).startswith(option), value


@pytest.mark.parametrize("name", ["", "  ", None, 7])
def test_a_campaign_needs_a_name(name: Any):
    assert complaint(CampaignConfig, campaign_name=name, grid=GRID).startswith("campaign_name: ")


def test_a_campaign_without_a_name_at_all_is_refused():
    assert complaint(CampaignConfig, grid=GRID) == "campaign_name: is required"


def test_a_campaign_with_nothing_to_run_is_refused():
    assert complaint(CampaignConfig, campaign_name="x") == (
        "nothing to run: at least one of configs, grid, experiments is due"
    )
    assert complaint(CampaignConfig, campaign_name="x", configs=[]).startswith("nothing to run")


def test_num_samples_is_at_least_one():
    assert campaign(num_samples=1).num_samples == 1
    assert complaint(CampaignConfig, campaign_name="x", grid=GRID, num_samples=0).startswith("num_samples: ")


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError):
        CampaignConfig(campaign_name="x", grid=GRID, nothing=1)  # type: ignore[call-arg]


# Grid


@pytest.mark.parametrize("backends", [[], None, ["cuda"], ["pytorch", "pytorch"], [7]])
def test_a_grid_needs_backends_that_there_are(backends: Any):
    assert complaint(CampaignGridConfig, backends=backends).startswith("backends")


def test_a_grid_without_backends_is_refused():
    assert complaint(CampaignGridConfig) == "backends: is required"


def test_a_grid_with_an_unknown_backend_names_those_there_are():
    assert complaint(CampaignGridConfig, backends=["cuda"]) == (
        "backends[0]: 'cuda' is not one of pytorch, vllm, tensorrt"
    )


def test_axes_must_be_options_and_their_values_right():
    text = complaint(
        CampaignGridConfig,
        backends=["pytorch", "vllm"],
        shared={"fp_precison": ["float16"], "decoder.top_q": [1], "max_output_tokens": [0, 8], "decoder.preset": []},
    )
    assert text.splitlines() == [
        "shared.fp_precison: is not an option (did you mean 'fp_precision'?)",
        "shared.decoder.top_q: is not an option (did you mean 'top_p'?)",
        "shared.max_output_tokens[0]: must be at least 1, got 0",
        "shared.decoder.preset: has no values, so nothing would run; leave the axis out",
    ]


@pytest.mark.parametrize(
    ("axis", "remedy"),
    [
        ("backend", "grid.backends"),
        ("model", "grid.models"),
        ("model_name", "grid.models"),
        ("vllm.max_num_seqs", "grid.backend_overrides.vllm"),
    ],
)
def test_an_axis_with_a_place_of_its_own_is_sent_there(axis: str, remedy: str):
    assert remedy in complaint(CampaignGridConfig, backends=["pytorch", "vllm"], shared={axis: ["x"]})


def test_an_option_of_the_only_backend_may_be_a_shared_axis():
    make_grid(backends=["pytorch"], shared={"pytorch.batch_size": [1, 2]})


def test_overrides_of_a_backend_outside_the_grid_are_refused():
    assert complaint(CampaignGridConfig, backends=["pytorch"], backend_overrides={"vllm": {"max_num_seqs": 8}}) == (
        "backend_overrides.vllm: is not in grid.backends, which has pytorch"
    )


def test_overrides_are_fields_of_their_backend():
    text = complaint(
        CampaignGridConfig,
        backends=["pytorch"],
        backend_overrides={"pytorch": {"max_num_seqs": 8, "batch_size": [1, 0], "beam_search.enabled": "yes"}},
    )
    assert [line.partition(": ")[0] for line in text.splitlines()] == [
        "backend_overrides.pytorch.max_num_seqs",
        "backend_overrides.pytorch.batch_size[1]",
        "backend_overrides.pytorch.beam_search.enabled[0]",
    ]


def test_overrides_keep_a_value_and_a_list_of_values_apart():
    overrides = {"pytorch": {"batch_size": [1, 4], "attn_implementation": "eager"}}
    grid = make_grid(backends=["pytorch"], backend_overrides=overrides)
    assert grid.backend_overrides == overrides


def test_a_single_shared_value_is_an_axis_of_one():
    grid = make_grid(backends=["pytorch"], shared={"streaming": True})
    assert grid.shared == {"streaming": [True]}


def test_models_are_names_or_mappings():
    models = ["gpt2", {"name": "opt", "revision": "abc"}]
    assert make_grid(backends=["pytorch"], models=models).models == models
    assert complaint(CampaignGridConfig, backends=["pytorch"], models=[]).startswith("models: ")
    assert complaint(CampaignGridConfig, backends=["pytorch"], models=[{"nam": "x"}]) == (
        "models[0].model.nam: unknown key (did you mean 'name'?)"
    )


def test_a_list_typed_option_takes_a_list_of_lists():
    make_grid(backends=["vllm"], shared={"gpus": [[0], [0, 1]]})


# Experiments


def test_an_entry_is_a_file_with_overrides_or_an_experiment():
    config = campaign(
        experiments=[
            {"config": "a.yaml", "overrides": {"decoder.preset": "factual", "decoder": {"top_k": 3}}},
            {"config": "b.yaml"},
            {"model": "gpt2", "max_output_tokens": 8},
        ]
    )
    assert [entry.config for entry in config.experiments] == ["a.yaml", "b.yaml", None]
    assert config.experiments[1].overrides == {}
    assert config.experiments[2].inline == {"model": "gpt2", "max_output_tokens": 8}
    assert CampaignExplicitExperiment.nest_overrides(config.experiments[0].overrides) == {
        "decoder": {"preset": "factual", "top_k": 3}
    }


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({}, "experiments[0]: a config file or an experiment written in place is due, and not both"),
        ("a.yaml", "experiments[0]: a mapping is due, got the text 'a.yaml'"),
        (
            {"config": "a.yaml", "overrides": {"decoder.presett": 1}},
            "experiments[0].overrides.decoder.presett: unknown key (did you mean 'preset'?)",
        ),
        (
            {"config": "a.yaml", "max_output_tokens": 1},
            "experiments[0].max_output_tokens: unknown key; options laid over the file go under overrides",
        ),
        ({"max_output_tokens": 0}, "experiments[0].max_output_tokens: must be at least 1, got 0"),
        ({"overrides": {"streaming": True}}, "experiments[0]: a config file or an experiment written in place is due"),
    ],
)
def test_entries_that_are_refused(entry: Any, text: str):
    assert complaint(CampaignConfig, campaign_name="x", experiments=[entry]).splitlines()[0].startswith(text)


# Schedule and daemon


def test_durations_in_seconds():
    daemon = CampaignDaemonConfig(enabled=True, interval="6h", total_duration="2d")
    assert daemon.interval_seconds == 6 * 3600
    assert daemon.total_duration_seconds == 2 * 86400
    assert CampaignDaemonConfig(interval="90s").interval_seconds == 90
    assert CampaignDaemonConfig(interval="30m").interval_seconds == 1800
    assert CampaignDaemonConfig().interval_seconds is None
    assert CampaignDaemonConfig().total_duration_seconds is None


def test_a_daemon_that_is_not_switched_on_is_refused_in_a_file():
    mapping = {"campaign_name": "x", "grid": {"backends": ["pytorch"]}, "daemon": {"interval": "6h"}}
    with pytest.raises(ConfigProblems, match=r"daemon\.interval: has no effect while daemon\.enabled is not given"):
        CampaignConfig.from_dict(mapping)
    mapping["daemon"] = {"interval": "6h", "enabled": False}
    assert CampaignConfig.from_dict(mapping).daemon == CampaignDaemonConfig(interval="6h")


def test_a_schedule_needs_a_time():
    assert complaint(CampaignScheduleConfig, days=["mon"]) == "at: is required in a schedule: a time HH:MM"
    assert complaint(CampaignScheduleConfig).startswith("at: ")


def test_days_of_a_schedule():
    def weekdays(days: Any) -> set[int]:
        return set(CampaignScheduleConfig(at="08:00", days=days).weekdays)

    assert weekdays(None) == set(range(7))
    assert weekdays(["mon", "sun"]) == {0, 6}
    assert weekdays("weekdays") == {0, 1, 2, 3, 4}
    assert weekdays(["weekends", "sat"]) == {5, 6}
    assert "days[0]: 'monday' is not one of" in complaint(CampaignScheduleConfig, at="08:00", days=["monday"])
    assert complaint(CampaignScheduleConfig, at="08:00", days=[]).startswith("days: ")


def test_a_grid_of_more_experiments_than_anybody_runs_is_refused_before_it_is_expanded():
    wide = {axis: list(range(1, 101)) for axis in ("max_input_tokens", "max_output_tokens", "random_seed")}
    sizes = [1, 2, 4]
    overrides = {"pytorch": {"batch_size": sizes, "min_p": 0.1}, "vllm": {"logprobs": 1}}
    found = complaint(CampaignGridConfig, backends=["pytorch", "vllm"], shared=wide, backend_overrides=overrides)
    assert found.startswith("makes 4,000,000 experiments, and at most 100,000 are planned;")
    some = {axis: wide[axis] for axis in ("max_input_tokens", "max_output_tokens")}
    CampaignGridConfig(backends=("pytorch",), models=("a", "b", "c"), shared=some)
    found = complaint(
        CampaignGridConfig, backends=["pytorch"], models=[f"m{number}" for number in range(11)], shared=some
    )
    assert found.startswith("makes 110,000 experiments")


# Names, ids and paths


def test_campaign_id_is_the_beginning_of_the_md5_of_the_name():
    expected = hashlib.md5(b"test", usedforsecurity=False).hexdigest()[:8]
    assert campaign().campaign_id == expected
    assert generate_campaign_id("test") == expected
    assert CampaignConfig.generate_campaign_id("test") == expected
    assert generate_campaign_id("tëst") != expected


def test_a_name_of_bytes_that_are_no_utf8_has_an_id_and_a_slug():
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
    ],
)
def test_slugs(name: str, slug: str):
    assert slug_of(name) == slug
    assert campaign(campaign_name=name).slug == slug


@pytest.mark.parametrize("name", ["日本", "!!!", "x" * 300])
def test_names_that_leave_no_usable_slug_are_told_by_their_id(name: str):
    slug = slug_of(name)
    assert generate_campaign_id(name) in slug
    assert 0 < len(slug) <= 64
    assert slug[0].isalnum()


def test_manifest_path():
    assert CampaignIOConfig().manifest_path == Path(".state") / "campaign_manifest.json"
    assert CampaignIOConfig(state_dir="s", manifest_filename="m.json").manifest_path == Path("s/m.json")


def test_config_paths_and_names():
    config = campaign(configs=["a/one.yaml", "two.yml"], experiments=[{"config": "b/three.yaml"}, {"model": "gpt2"}])
    assert config.get_config_paths() == [Path("a/one.yaml"), Path("two.yml"), Path("b/three.yaml")]
    assert config.get_config_names() == ["one", "two", "three"]
    assert campaign().get_config_paths() == []


def test_paths_are_accepted_as_path_objects():
    assert campaign(configs=[Path("a/one.yaml")]).configs == ["a/one.yaml"]
    assert CampaignIOConfig(results_dir=Path("out")).results_dir == "out"  # type: ignore[arg-type]


def test_a_campaign_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        campaign().campaign_name = "other"


# Mappings and YAML


FULL: dict[str, Any] = {
    "campaign_name": "full",
    "model": {"name": "gpt2", "revision": "abc"},
    "dataset": {"name": "alpaca", "sample_size": 5},
    "num_samples": 10,
    "configs": ["a.yaml"],
    "grid": {
        "backends": ["pytorch", "vllm"],
        "models": ["gpt2", {"name": "opt"}],
        "shared": {"decoder.preset": ["deterministic", None], "fp_precision": ["float16"]},
        "backend_overrides": {"pytorch": {"batch_size": [1, 2]}, "vllm": {"enforce_eager": True}},
    },
    "experiments": [{"config": "b.yaml", "overrides": {"streaming": True}}, {"model": "gpt2"}],
    "execution": {"cycles": 5, "structure": "shuffled", "reuse": "none"},
    "schedule": {"at": "08:00", "days": ["weekdays"]},
    "health_check": {"gpu_memory_threshold_pct": 80},
    "cold_start": {"force_cold_start": True},
    "daemon": {"enabled": True, "at": "22:00", "interval": "6h", "total_duration": "2d", "quiet": False},
    "io": {"results_dir": "out"},
    "notification": {"webhook_url": "https://host/hook", "on": ["failure"]},
}


def test_round_trip():
    config = CampaignConfig.from_dict(FULL)
    assert CampaignConfig.from_dict(config.to_dict()) == config
    assert CampaignConfig.from_dict(campaign().to_dict()) == campaign()


def test_keyword_sections_and_mappings_make_equal_campaigns():
    assert campaign(execution=CampaignExecutionConfig(cycles=5)) == campaign(execution={"cycles": 5})


def test_the_webhook_is_not_repeated_in_the_complaint_about_it():
    assert "hunter2" not in complaint(CampaignNotificationConfig, webhook_url="htp://hunter2")


@pytest.mark.parametrize("backends", [["pytorch"], ["pytorch", "vllm", "tensorrt"]])
def test_yaml_without_the_newer_sections(tmp_path: Path, backends: list[str]):
    (tmp_path / "e.yaml").write_text("model: gpt2\n", encoding="utf-8")
    file = tmp_path / "c.yaml"
    file.write_text(
        "campaign_name: old\nconfigs: [e.yaml]\nexecution: {cycles: 2}\n"
        f"grid: {{backends: [{', '.join(backends)}]}}\n",
        encoding="utf-8",
    )
    config: Any = load_campaign(file).config
    assert config.daemon is None
    assert config.schedule is None
    assert config.cold_start == CampaignColdStartConfig()
    assert config.grid.backends == backends
    assert config.execution.cycles == 2


# What a campaign says for all its experiments


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
