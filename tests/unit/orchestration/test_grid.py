from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignGridConfig
from lem.config.experiment import ExperimentConfig
from lem.orchestration.grid import (
    NO_MODEL,
    GridExpansionResult,
    GridValidationIssue,
    expand_campaign_grid,
    validate_campaign_grid,
)


def expand(base_config: dict[str, Any] | None = None, /, **grid: Any) -> list[dict[str, Any]]:
    return expand_campaign_grid(CampaignGridConfig(**{"backends": ["pytorch"], **grid}), base_config)


def test_a_model_of_the_grid_is_not_mixed_with_another() -> None:
    base = {"model": {"name": "one", "revision": "abc"}}
    assert expand(base, models=["two"]) == [{"backend": "pytorch", "model": "two"}]
    models = [{"name": "three", "revision": "def"}]
    assert expand(base, models=models)[0]["model"] == {"name": "three", "revision": "def"}


def test_dotted_keys_nest() -> None:
    configs = expand(shared={"decoder.preset": ["factual"], "decoder.top_k": [1, 2]})
    assert [item["decoder"] for item in configs] == [
        {"preset": "factual", "top_k": 1},
        {"preset": "factual", "top_k": 2},
    ]


def test_an_override_is_a_field_of_its_backends_section() -> None:
    configs = expand(
        backends=["pytorch", "vllm"],
        backend_overrides={"pytorch": {"batch_size": [1, 4], "use_cache": True}},
    )
    assert configs == [
        {"backend": "pytorch", "pytorch": {"batch_size": 1, "use_cache": True}},
        {"backend": "pytorch", "pytorch": {"batch_size": 4, "use_cache": True}},
        {"backend": "vllm"},
    ]


def test_a_list_typed_option_takes_a_list_of_lists() -> None:
    configs = expand(shared={"gpus": [[], ["0"], ["0", "1"]]})
    assert [item["gpus"] for item in configs] == [[], ["0"], ["0", "1"]]


def test_a_mapping_is_one_value() -> None:
    (config,) = expand(backend_overrides={"pytorch": {"beam_search": {"enabled": True, "num_beams": 4}}})
    assert config["pytorch"] == {"beam_search": {"enabled": True, "num_beams": 4}}


def test_null_and_false_are_values() -> None:
    configs = expand(backend_overrides={"pytorch": {"use_cache": [None, False]}})
    assert [item["pytorch"]["use_cache"] for item in configs] == [None, False]


def test_axes_win_over_the_base_and_the_rest_of_it_stays() -> None:
    base = {"model": "gpt2", "max_output_tokens": 8, "decoder": {"top_k": 5, "top_p": 0.5}}
    configs = expand(base, shared={"max_output_tokens": [16], "decoder.top_k": [7]})
    assert configs == [
        {"backend": "pytorch", "model": "gpt2", "max_output_tokens": 16, "decoder": {"top_k": 7, "top_p": 0.5}}
    ]


def test_each_backend_gets_its_own_section_of_the_base() -> None:
    base = {"pytorch": {"batch_size": 2}, "vllm": {"max_num_seqs": 8}, "backend": "tensorrt"}
    assert expand(base, backends=["pytorch", "vllm"]) == [
        {"backend": "pytorch", "pytorch": {"batch_size": 2}},
        {"backend": "vllm", "vllm": {"max_num_seqs": 8}},
    ]


def test_the_base_is_left_alone_and_nothing_is_shared() -> None:
    base = {"decoder": {"top_k": 5}, "extra_metadata": {"tags": ["a"]}}
    before = copy.deepcopy(base)
    first, second = expand(base, shared={"random_seed": [1, 2]})
    first["decoder"]["top_k"] = 99
    first["extra_metadata"]["tags"].append("b")
    assert second["decoder"]["top_k"] == 5
    assert second["extra_metadata"]["tags"] == ["a"]
    assert base == before


def engine_runs(configs: list[dict[str, Any]]) -> tuple[int, int]:
    """How many different engines there are, and how often the engine changes from one to the next."""
    keys = [ExperimentConfig.from_dict(item).engine_key() for item in configs]
    return len(set(keys)), 1 + sum(one != two for one, two in itertools.pairwise(keys))


@pytest.mark.parametrize(
    "axes",
    [
        {"shared": {"max_output_tokens": [16, 32], "fp_precision": ["float16", "float32"]}},
        {"shared": {"decoder.top_k": [1, 2], "model.revision": ["a", "b"]}},
        {"models": ["a", "b"], "shared": {"max_output_tokens": [16, 32]}, "backends": ["pytorch", "vllm"]},
        {
            "backends": ["pytorch", "vllm"],
            "shared": {"decoder.top_k": [1, 2], "max_input_tokens": [64, 128]},
            "backend_overrides": {
                "pytorch": {"batch_size": [1, 2], "attn_implementation": ["eager", "sdpa"]},
                "vllm": {"min_p": [0.1, 0.2], "max_num_seqs": [4, 8]},
            },
        },
        {
            "backends": ["vllm"],
            "shared": {"random_seed": [1, 2], "max_output_tokens": [16, 32]},
            "backend_overrides": {"vllm": {"max_model_len": 4096, "logprobs": [1, 2]}},
        },
        {
            "backends": ["tensorrt"],
            "shared": {"random_seed": [1, 2], "max_output_tokens": [16, 32], "max_input_tokens": [16, 32]},
        },
        {"backends": ["vllm"], "shared": {"random_seed": [1, 2]}, "backend_overrides": {"vllm": {"extra.x": [1, 2]}}},
    ],
    ids=["shared", "nested", "models", "overrides", "length given", "lengths of an engine", "free mapping"],
)
def test_equal_engines_lie_together(axes: dict[str, Any]) -> None:
    engines, changes = engine_runs(expand({"model": "m"}, **axes))
    assert changes == engines


def test_among_axes_that_need_no_reload_the_first_varies_slowest() -> None:
    configs = expand(shared={"random_seed": [1, 2], "max_output_tokens": [16, 32]})
    assert [(item["random_seed"], item["max_output_tokens"]) for item in configs] == [
        (1, 16),
        (1, 32),
        (2, 16),
        (2, 32),
    ]


# What the declaration of a grid refuses, instead of a hundred filtered experiments


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"shared": {"fp_precison": ["float16"]}}, "fp_precision"),
        ({"shared": {"decoder.tempreature": [0.5]}}, "temperature"),
        ({"shared": {"batch_size": [1, 2]}}, "pytorch.batch_size"),
        ({"shared": {"fp_precision": ["float17"]}}, "float16"),
        ({"shared": {"fp_precision": []}}, "no values"),
        ({"shared": {"backend": ["pytorch"]}}, "grid.backends"),
        ({"shared": {"model": ["a"]}}, "grid.models"),
        ({"backend_overrides": {"pytorch": {"batchsize": 4}}}, "batch_size"),
        ({"backend_overrides": {"vllm": {"max_num_seqs": 4}}}, "vllm"),
        ({"backends": ["pytorch", "vllm"], "shared": {"pytorch.batch_size": [1]}}, "backend_overrides"),
        ({"backends": []}, "backends"),
        ({"backends": ["cuda"]}, "cuda"),
    ],
)
def test_an_axis_that_cannot_be_is_an_error_with_a_suggestion(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words.replace(".", r"\.")):
        CampaignGridConfig(**{"backends": ["pytorch"], **grid})


# Validation


def test_nothing_generated() -> None:
    result = validate_campaign_grid([])
    assert result.total_generated == 0
    assert not result.valid_configs
    assert result.summary == "Generated 0 experiments (0 filtered)."


def test_an_invalid_one_is_left_out_with_its_reason_and_the_others_stay() -> None:
    good, bad = {"model": "gpt2", "max_output_tokens": 8}, {"model": "gpt2", "max_output_tokens": 0}
    result = validate_campaign_grid([bad, good])
    assert result.total_generated == 2
    assert list(result.valid_configs) == [good]
    (issue,) = result.filtered_configs
    assert issue.severity == "error"
    assert issue.reason == "max_output_tokens: must be at least 1, got 0"
    assert issue.config_desc == "pytorch-max_output_tokens=0"


def test_every_reason_of_one_configuration_is_told() -> None:
    (issue,) = validate_campaign_grid([{"model": "m", "max_output_tokens": 0, "fp_precision": "x"}]).filtered_configs
    assert "max_output_tokens" in issue.reason
    assert "fp_precision" in issue.reason


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": {"revision": "main"}}, {"backend": "vllm"}])
def test_an_experiment_without_model_is_filtered_with_that_reason(config: dict[str, Any]) -> None:
    (issue,) = validate_campaign_grid([config]).filtered_configs
    assert issue.why == (NO_MODEL,)


def test_the_summary_names_the_most_frequent_reason_first() -> None:
    def issues(*reasons: str) -> tuple[GridValidationIssue, ...]:
        return tuple(GridValidationIssue(str(number), reason) for number, reason in enumerate(reasons))

    result = GridExpansionResult((), issues("rare", "often", "often"), issues("x")[:1], total_generated=4)
    assert result.summary == "Generated 4 experiments (3 filtered: often × 2; rare × 1). 1 has warnings."


def test_a_configuration_with_two_warnings_is_counted_once() -> None:
    config = {"model": "m", "backend": "vllm", "vllm": {"gpu_memory_utilization": 0.97, "tensor_parallel_size": 2}}
    result = validate_campaign_grid([config])
    assert len(result.warnings) == 2
    assert result.summary == "Generated 1 experiments (0 filtered). 1 has warnings."
