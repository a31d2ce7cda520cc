from __future__ import annotations

import copy
import itertools
import json
import os
import random
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignConfig, CampaignGridConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Expanded
from lem.orchestration.grid import (
    NO_MODEL,
    GridExpansionResult,
    GridValidationIssue,
    campaign_config_hash,
    config_hash,
    expand_campaign_grid,
    experiment_id,
    file_stem,
    make_run_id,
    name_configurations,
    prompts_fingerprint,
    validate_campaign_grid,
)


def expand(base_config: dict[str, Any] | None = None, /, **grid: Any) -> list[dict[str, Any]]:
    return expand_campaign_grid(CampaignGridConfig(**{"backends": ["pytorch"], **grid}), base_config)


PRECISE = {"name": "three", "revision": "def"}
PYTORCH = {"backend": "pytorch"}


@pytest.mark.parametrize(
    ("base", "grid", "configs"),
    [
        # A model of the grid is not mixed with another.
        ({"model": {"name": "one", "revision": "abc"}}, {"models": ["two"]}, [{**PYTORCH, "model": "two"}]),
        ({"model": {"name": "one", "revision": "abc"}}, {"models": [PRECISE]}, [{**PYTORCH, "model": PRECISE}]),
        # Dotted keys nest.
        (
            {},
            {"shared": {"decoder.preset": ["factual"], "decoder.top_k": [1, 2]}},
            [{**PYTORCH, "decoder": {"preset": "factual", "top_k": top_k}} for top_k in (1, 2)],
        ),
        # An override is a field of its backend's section.
        (
            {},
            {
                "backends": ["pytorch", "vllm"],
                "backend_overrides": {"pytorch": {"batch_size": [1, 4], "use_cache": True}},
            },
            [
                *({**PYTORCH, "pytorch": {"batch_size": size, "use_cache": True}} for size in (1, 4)),
                {"backend": "vllm"},
            ],
        ),
        # An option that is itself a list takes a list of lists; a mapping is one value; null and false are values.
        (
            {},
            {"shared": {"gpus": [[], ["0"], ["0", "1"]]}},
            [{**PYTORCH, "gpus": gpus} for gpus in ([], ["0"], ["0", "1"])],
        ),
        (
            {},
            {"backend_overrides": {"pytorch": {"beam_search": {"enabled": True, "num_beams": 4}}}},
            [{**PYTORCH, "pytorch": {"beam_search": {"enabled": True, "num_beams": 4}}}],
        ),
        (
            {},
            {"backend_overrides": {"pytorch": {"use_cache": [None, False]}}},
            [{**PYTORCH, "pytorch": {"use_cache": value}} for value in (None, False)],
        ),
        # Axes win over the base, and the rest of it stays; each backend gets its own section of it.
        (
            {"model": "gpt2", "max_output_tokens": 8, "decoder": {"top_k": 5, "top_p": 0.5}},
            {"shared": {"max_output_tokens": [16], "decoder.top_k": [7]}},
            [{**PYTORCH, "model": "gpt2", "max_output_tokens": 16, "decoder": {"top_k": 7, "top_p": 0.5}}],
        ),
        (
            {"pytorch": {"batch_size": 2}, "vllm": {"max_num_seqs": 8}, "backend": "tensorrt"},
            {"backends": ["pytorch", "vllm"]},
            [{**PYTORCH, "pytorch": {"batch_size": 2}}, {"backend": "vllm", "vllm": {"max_num_seqs": 8}}],
        ),
        # Among axes that need no reload the first varies slowest.
        (
            {},
            {"shared": {"random_seed": [1, 2], "max_output_tokens": [16, 32]}},
            [{**PYTORCH, "random_seed": seed, "max_output_tokens": most} for seed in (1, 2) for most in (16, 32)],
        ),
    ],
)
def test_the_combinations_of_a_grid(base: dict[str, Any], grid: dict[str, Any], configs: list[dict[str, Any]]) -> None:
    assert expand(base, **grid) == configs


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


# Validation


def test_an_invalid_one_is_left_out_with_its_reason_and_the_others_stay() -> None:
    good = {"model": "gpt2", "max_output_tokens": 8}
    result = validate_campaign_grid([{**good, "max_output_tokens": 0, "random_seed": "x"}, good])
    assert result.total_generated == 2
    assert list(result.valid_configs) == [good]
    (issue,) = result.filtered_configs
    assert issue.severity == "error"
    assert "max_output_tokens: must be at least 1, got 0" in issue.reason
    assert "; random_seed: " in issue.reason  # every reason is told
    assert issue.config_desc == "pytorch-max_output_tokens=0-random_seed=x"


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


# Names and identities


SECRET = Expanded("secret", "${TOKEN}", "secret")


@pytest.mark.parametrize(
    ("configs", "names"),
    [
        # A name is made of what varies; one alone is named by backend and model.
        (
            [{"model": "gpt2", "max_output_tokens": most, "random_seed": 1} for most in (16, 32)],
            ["pytorch-max_output_tokens=16", "pytorch-max_output_tokens=32"],
        ),
        ([{"model": "org/gpt2-xl", "backend": "vllm"}], ["vllm-gpt2-xl"]),
        # Values that explain themselves stand alone.
        (
            [
                {"fp_precision": "float16", "decoder": {"preset": "factual"}},
                {"fp_precision": "float32", "decoder": {"preset": None}},
            ],
            ["pytorch-float16-factual", "pytorch-float32-preset=null"],
        ),
        # The model is named where it varies, by as much as tells it apart.
        ([{"model": "a/x"}, {"model": {"name": "b/y"}}], ["pytorch-x", "pytorch-y"]),
        ([{"model": "a/x"}, {"model_name": "b/x"}], ["pytorch-a_x", "pytorch-b_x"]),
        # An option that only some have is named for those.
        (
            [{"backend": "vllm"}, {"backend": "pytorch", "pytorch": {"use_cache": False}}],
            ["vllm", "pytorch-use_cache=false"],
        ),
        # Options of the same last name are told apart.
        (
            [{"warmup": {"enabled": value}, "baseline": {"enabled": value}} for value in (True, False)],
            [f"pytorch-warmup.enabled={value}-baseline.enabled={value}" for value in ("true", "false")],
        ),
        # A path is named by its last part, and a list by its items.
        (
            [
                {"prompts": {"type": "file", "path": "/data/a b.txt"}, "gpus": ["0", "1"]},
                {"prompts": {"type": "file", "path": "/data/c.txt"}, "gpus": []},
            ],
            ["pytorch-path=a_b.txt-gpus=0+1", "pytorch-path=c.txt-gpus=none"],
        ),
        # What a variable holds is in no name.
        ([{"pytorch": {"extra": {"key": SECRET}}}, {}], ["pytorch-key=_TOKEN_", "pytorch"]),
    ],
)
def test_a_name_says_what_varies(configs: list[dict[str, Any]], names: list[str]) -> None:
    assert name_configurations(configs) == names


def test_names_that_come_out_alike_are_told_apart_by_content_whatever_the_order() -> None:
    one, two = {"prompts": {"path": "/a/x"}}, {"prompts": {"path": "/b/x"}}
    first, second = name_configurations([one, two])
    assert first == "pytorch-path=x"
    assert second.startswith("pytorch-path=x-")
    assert len({first, second, *name_configurations([two, one])}) == 3
    assert name_configurations([one, two]) == [first, second]
    assert len(set(name_configurations([{"model": "gpt2"}] * 4))) == 4


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    found = name_configurations([{"dataset": {"name": "y" * 300 + str(number)}} for number in range(3)])
    assert len(set(found)) == 3
    assert max(map(len, found)) <= 110
    alone = {
        name_configurations([config])[0] for config in ({"backend": "vllm", "model": "y" * 300 + end} for end in "ab")
    }
    assert len(alone) == 2, "apart by their hashes, also in campaigns of their own"


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


RECORDED = Path(__file__).parents[2] / "recorded"


@pytest.mark.parametrize("campaign_name", ["demo", "two-backends", "interrupted"])
def test_configurations_have_the_hashes_that_the_first_build_gave_them(campaign_name: str) -> None:
    paths = [*(RECORDED / campaign_name).rglob("result.json")]
    assert paths
    for path in paths:
        resolved = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["resolved"]
        recorded = json.loads(path.read_text(encoding="utf-8"))["identity"]["config_hash"]
        assert identity(**resolved) == recorded


@pytest.mark.parametrize(
    "options",
    [
        {"traffic_simulation": {"allow_overload": True}},
        {"measurement": {"max_wait_pct": 10}},
        {"measurement": {"max_foreign_pct": None}},
    ],
)
def test_an_option_that_was_added_counts_where_it_is_not_at_its_default(options: dict[str, Any]) -> None:
    base: dict[str, Any] = {"streaming": True, "traffic_simulation": {"enabled": True, "target_qps": 9}}
    changed = {name: {**base.get(name, {}), **values} for name, values in options.items()}
    assert identity(**{**base, **changed}) != identity(**base)


def test_service_levels_change_no_identity_since_they_are_counted_by_the_reader() -> None:
    base: dict[str, Any] = {"streaming": True, "traffic_simulation": {"enabled": True, "target_qps": 9}}
    levels = {**base["traffic_simulation"], "slo": {"ttft_ms": 30}}
    assert identity(**{**base, "traffic_simulation": levels}) == identity(**base)


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
        {"prompts": {"type": "synthetic", "input_tokens": 128, "sample_size": 32, "distribution": "lognormal"}},
    ],
)
def test_names_places_metadata_and_defaults_written_out_do_not(options: dict[str, Any]) -> None:
    assert identity(**options) == identity()
    assert identity(decoder={"preset": "factual"}) == identity(decoder={"temperature": 0.3})


def test_a_file_of_prompts_is_known_by_its_content(tmp_path: Path) -> None:
    def known(name: str, text: str, **options: Any) -> str:
        (tmp_path / name).write_text(text)
        return identity(prompts={"type": "file", "path": str(tmp_path / name), **options})

    one = known("one.txt", "a\nb\n")
    assert known("two.txt", "a\nb\n") == one
    assert known("one.txt", "a\nc\n") != one
    assert known("two.txt", "a\nb\n", sample_size=1) != one
    with pytest.raises(ConfigurationError, match=r"missing\.txt"):
        identity(prompts={"type": "file", "path": str(tmp_path / "missing.txt")})


def test_a_chat_template_is_known_by_its_content_and_none_changes_no_hash(tmp_path: Path) -> None:
    def known(name: str, text: str, **options: Any) -> str:
        (tmp_path / name).write_text(text)
        return identity(chat_template=str(tmp_path / name), **options)

    one = known("one.jinja", "{{ messages }}")
    assert known("two.jinja", "{{ messages }}") == one
    others = {one, known("one.jinja", "{{ messages }}!"), identity(chat_template="model"), identity()}
    assert len(others) == 4
    assert identity(chat_template="none") == identity()
    assert known("two.jinja", "{{ messages }}", dataset="alpaca") not in {one, identity(dataset="alpaca")}
    # A result folder has a copy of the template, by which an old result is recognised.
    experiment = config(chat_template="gone.jinja")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert config_hash(experiment, prompts_fingerprint(experiment, folder=tmp_path)) == one
    with pytest.raises(ConfigurationError, match=r"gone\.jinja"):
        identity(chat_template="gone.jinja")


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


def test_a_campaign_is_known_by_its_configurations_and_how_it_runs_them_not_by_names_and_places() -> None:
    known = campaign_config_hash(campaign(), ["a", "b"])
    assert campaign_config_hash(campaign(), ["b", "a"]) != known
    assert campaign_config_hash(campaign(execution={"cycles": 4}), ["a", "b"]) != known
    assert campaign_config_hash(campaign(cold_start={"force_cold_start": True}), ["a", "b"]) != known
    changed = campaign(
        campaign_name="other",
        io={"results_dir": "elsewhere"},
        notification={"webhook_url": "http://localhost"},
        daemon={"enabled": True},
    )
    assert campaign_config_hash(changed, ["a", "b"]) == known


@pytest.mark.parametrize(
    ("dataset", "columns"),
    [
        ("alpaca", ["instruction", "input"]),
        ("tatsu-lab/alpaca", ["instruction", "input"]),
        ("mmlu", ["question", "choices"]),
        ({"name": "alpaca", "column": "instruction"}, None),
        ("gsm8k", None),
        ("someone/else", None),
    ],
)
def test_results_of_prompts_that_an_earlier_lem_took_from_one_column_are_of_another_configuration(
    dataset: Any, columns: list[str] | None
) -> None:
    found = prompts_fingerprint(ExperimentConfig.from_dict({"model": "m", "dataset": dataset}))
    assert found.get("columns") == columns
    if isinstance(dataset, str):
        named = {"type": "huggingface", "dataset": dataset}
        assert (
            prompts_fingerprint(ExperimentConfig.from_dict({"model": "m", "prompts": named})).get("columns") == columns
        )
