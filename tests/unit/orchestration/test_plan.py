from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.load import Loaded, load_campaign
from lem.orchestration.grid import NO_MODEL
from lem.orchestration.plan import ExpectedDurations, ExpectedTime, Plan, build_plan
from lem.worker.prompts import ResolvedPrompts, resolve_on_host


def load(**options: Any) -> Loaded[CampaignConfig]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"campaign_name": "demo", "model": "gpt2", **options}, file)
        file.flush()
        return load_campaign(file.name)


def plan(**options: Any) -> Plan:
    loaded = load(**options)
    return build_plan(loaded.config, loaded.listed)


def grid(*values: int) -> dict[str, Any]:
    return {"backends": ["pytorch"], "shared": {"max_output_tokens": list(values)}}


def order(found: Plan, key: str = "max_output_tokens") -> str:
    return " ".join(f"{getattr(item.config, key)}/{item.cycle_index + 1}" for item in found.experiments)


@pytest.fixture
def file_a(tmp_path: Path) -> str:
    path = tmp_path / "a.yaml"
    path.write_text("max_output_tokens: 3\n")
    return str(path)


# What is in


def test_configs_grid_and_experiments_stand_together(file_a: str) -> None:
    found = plan(
        configs=[file_a],
        grid=grid(1, 2),
        experiments=[{"config": file_a, "overrides": {"max_output_tokens": 4}}, {"max_output_tokens": 5}],
        execution={"cycles": 2},
    )
    assert found.summary == "Generated 5 experiments (0 filtered, 0 warnings)"
    assert order(found) == "3/1 4/1 5/1 1/1 2/1 3/2 4/2 5/2 1/2 2/2"
    assert len(found.configurations) == 5


@pytest.mark.parametrize(
    ("structure", "expected"),
    [("interleaved", "1/1 2/1 1/2 2/2"), ("grouped", "1/1 1/2 2/1 2/2")],
)
def test_structure(structure: str, expected: str) -> None:
    found = plan(grid=grid(1, 2), execution={"cycles": 2, "structure": structure})
    assert order(found) == expected
    assert found.shuffle_seed is None


def test_shuffled_records_its_seed() -> None:
    options = {"grid": grid(*range(1, 9)), "execution": {"cycles": 2, "structure": "shuffled", "seed": 7}}
    found = plan(**options)
    assert found.shuffle_seed == 7
    assert order(found) == order(plan(**options))
    assert order(found) != order(plan(**{**options, "execution": {"cycles": 2, "structure": "shuffled", "seed": 8}}))
    assert Counter(item.cycle_index for item in found.experiments) == {0: 8, 1: 8}


def test_every_experiment_has_a_place_and_a_name_of_its_own() -> None:
    found = plan(grid=grid(1, 2, 3), execution={"cycles": 3})
    assert [item.order_index for item in found.experiments] == list(range(9))
    assert len({item.exp_id for item in found.experiments}) == 9
    assert len({item.config_name for item in found.experiments}) == 3
    assert {item.exp_id for item in found.experiments} == {
        f"{item.config_hash[:12]}-c{item.cycle_index + 1}" for item in found.experiments
    }
    assert all(item.backend == "pytorch" and item.container is None for item in found.experiments)
    assert all(item.manifest_entry is None for item in found.experiments)


# What is left out, and what is warned about


def test_an_invalid_combination_is_filtered_and_grouped_by_reason() -> None:
    axes = {"fp_precision": ["float16", "float32"], "max_output_tokens": [1, 2]}
    found = plan(grid={"backends": ["pytorch", "tensorrt"], "shared": axes}, execution={"cycles": 1})
    assert found.summary == "Generated 8 experiments (2 filtered, 0 warnings)"
    assert found.filtered_by_reason == [("tensorrt needs float16 or bfloat16", 2)]
    assert len(found.experiments) == 6


def test_an_experiment_without_a_model_is_filtered_with_that_reason(file_a: str) -> None:
    found = plan(model=None, configs=[file_a], grid={**grid(1), "models": ["gpt2"]}, experiments=[{"backend": "vllm"}])
    assert found.filtered_by_reason == [(NO_MODEL.text, 2)]
    assert [issue.config_desc for issue in found.filtered][:1] == ["a"]
    assert len(found.configurations) == 1


def test_nothing_valid_is_an_empty_plan() -> None:
    found = plan(model=None, grid=grid(1, 2))
    assert found.experiments == ()
    assert found.summary == "Generated 2 experiments (2 filtered, 0 warnings)"
    assert found.loads() == []
    assert found.gap_kinds() == []


def test_an_experiment_that_is_wrong_in_its_file_is_an_error_and_not_filtered(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: gpt2\nmax_output_tokns: 3\n")
    with pytest.raises(ConfigurationError, match=r"bad\.yaml:2:1: max_output_tokns.*max_output_tokens"):
        load(configs=[str(tmp_path / "bad.yaml")])


def test_the_same_twice_runs_once_with_a_warning(file_a: str) -> None:
    found = plan(configs=[file_a], grid=grid(3, 4), execution={"cycles": 1})
    assert order(found) == "3/1 4/1"
    (warning,) = found.warnings
    assert warning.severity == "warning"
    assert warning.why == (Reason.of("repeated_experiment", name="a"),)
    assert found.summary == "Generated 3 experiments (0 filtered, 1 warnings)"


def test_what_rules_warn_about_is_kept_with_the_experiment() -> None:
    found = plan(grid={"backends": ["pytorch"], "shared": {"decoder.temperature": [0.5], "decoder.top_p": [0.5, 1.0]}})
    (warning,) = found.warnings
    assert warning.why == (Reason.of("at_option", option="decoder.top_p", what=Reason.of("sampling_compounds")),)
    assert len(found.configurations) == 2


# Campaign defaults


def test_defaults_of_the_campaign_yield_to_the_experiments_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "model: other\ndataset: {name: gsm8k, sample_size: 3}\nwarmup: {min_prompts: 1}\n"
    )
    found = plan(
        dataset="alpaca",
        num_samples=7,
        configs=[str(tmp_path / "own.yaml")],
        grid=grid(1),
        execution={"cycles": 1, "warmup_prompts": 2, "warmup_timeout_seconds": 9},
    )
    own, generated = (item.config for item in found.experiments)
    assert (own.model.name, generated.model.name) == ("other", "gpt2")
    assert own.dataset is not None
    assert generated.dataset is not None
    assert (own.dataset.name, own.dataset.sample_size) == ("gsm8k", 3)
    assert (generated.dataset.name, generated.dataset.sample_size) == ("alpaca", 7)
    assert (own.warmup.min_prompts, generated.warmup.min_prompts) == (1, 2)
    assert (own.warmup.timeout_seconds, generated.warmup.timeout_seconds) == (9, 9)


def test_a_grid_starts_from_the_preset() -> None:
    loaded = load(grid={"backends": ["pytorch"], "shared": {"max_output_tokens": [1]}})
    found = build_plan(loaded.config, preset={"max_input_tokens": 33, "max_output_tokens": 44})
    assert found.experiments[0].config.max_input_tokens == 33
    assert found.experiments[0].config.max_output_tokens == 1


# Names, files, records


def test_experiments_are_named_after_their_file_or_by_themselves_or_by_what_varies(file_a: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("config_name: mine\nmax_output_tokens: 9\n")
    found = plan(
        configs=[file_a, str(tmp_path / "b.yaml")],
        grid=grid(1, 2),
        experiments=[{"max_output_tokens": 5}, {"max_output_tokens": 6, "config_name": "sixth"}],
        execution={"cycles": 1},
    )
    assert [item.config_name for item in found.experiments] == [
        "a",
        "mine",
        "pytorch-gpt2",
        "sixth",
        "pytorch-max_output_tokens=1",
        "pytorch-max_output_tokens=2",
    ]


def test_two_experiments_of_one_file_have_two_names(file_a: str) -> None:
    found = plan(configs=[file_a], experiments=[{"config": file_a, "overrides": {"max_output_tokens": 4}}])
    first, second = (item.config_name for item in found.configurations)
    assert first == "a"
    assert second.startswith("a-")


def test_a_generated_experiment_has_a_file_to_be_written(file_a: str) -> None:
    found = plan(campaign_name="My Demo", configs=[file_a], grid=grid(1), io={"configs_dir": "made"})
    own, generated = found.configurations
    assert (own.config_path, own.is_generated) == (file_a, False)
    assert (generated.config_path, generated.is_generated) == ("made/my-demo/pytorch-gpt2.yaml", True)


def test_a_record_holds_what_was_written_and_not_what_a_variable_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHICH", "secret-model")
    (tmp_path / "v.yaml").write_text("model: org/${WHICH}\n")
    (item,) = plan(configs=[str(tmp_path / "v.yaml")]).configurations
    assert item.config.model.name == "org/secret-model"
    assert item.requested["model"] == {"name": "org/${WHICH}"}
    assert item.resolved["model"] == {**item.config.to_dict()["model"], "name": "org/${WHICH}"}
    assert item.resolved["max_output_tokens"] == item.config.max_output_tokens


def test_a_record_holds_the_name_that_an_experiment_was_given() -> None:
    items = plan(grid=grid(1, 2)).configurations
    assert [item.resolved["config_name"] for item in items] == [item.config_name for item in items]
    assert all("config_name" not in item.requested for item in items)


def test_a_new_entry_says_what_is_planned() -> None:
    item = plan(grid=grid(1), execution={"cycles": 2}).experiments[1]
    entry = item.new_entry()
    assert entry.status == "pending"
    assert (entry.exp_id, entry.config_hash, entry.config_name) == (item.exp_id, item.config_hash, item.config_name)
    assert (entry.cycle_index, entry.order_index, entry.backend) == (1, 1, "pytorch")


# Prompts


def test_each_source_of_prompts_is_read_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    calls: list[str] = []

    def resolve(config: ExperimentConfig) -> ResolvedPrompts | None:
        calls.append(str(config.prompts))
        return resolve_on_host(config)

    sources = [{"type": "file", "path": str(tmp_path / f"{name}.txt")} for name in ("one", "two")]
    loaded = load(grid={**grid(1, 2, 3), "shared": {"max_output_tokens": [1, 2, 3], "prompts": sources}})
    found = build_plan(loaded.config, resolve_prompts=resolve)
    assert len(found.configurations) == 6
    assert len(calls) == 2


def test_prompts_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigurationError, match=r"empty\.txt"):
        plan(experiments=[{"prompts": {"type": "file", "path": str(tmp_path / "empty.txt")}}])


# What it will cost


@pytest.mark.parametrize(
    ("options", "loads"),
    [({}, 6), ({"execution": {"reuse": "none"}}, 12), ({"execution": {"reuse": "campaign"}}, 6)],
)
def test_engine_loads(options: dict[str, Any], loads: int) -> None:
    axes = {"max_output_tokens": [1, 2], "fp_precision": ["float16", "float32"]}
    assert sum(plan(grid={"backends": ["pytorch"], "shared": axes}, **options).loads()) == loads


@pytest.mark.parametrize("cold_start", [{"force_cold_start": True}, {"restart_container": True}])
def test_a_cold_start_loads_every_time(cold_start: dict[str, bool]) -> None:
    found = plan(grid=grid(1, 2), cold_start=cold_start, execution={"reuse": "campaign"})
    assert found.is_cold
    assert sum(found.loads()) == 6


def test_one_engine_for_the_whole_campaign_when_it_is_kept() -> None:
    assert sum(plan(grid=grid(1, 2), execution={"reuse": "campaign"}).loads()) == 1


def test_gaps_and_expected_time_of_the_whole_and_of_a_part() -> None:
    found = plan(
        grid=grid(1, 2),
        execution={"cycles": 2, "config_gap_seconds": 10, "cycle_gap_seconds": 100},
    )
    assert found.gap_kinds() == [None, "configuration", "cycle", "configuration"]
    measured = {item.config_hash: 1000.0 for item in found.configurations}
    load_s = {item.engine_key: 5.0 for item in found.configurations}
    assert found.expected_time(ExpectedDurations(measured, load_s)).total_s == 4000 + 2 * 5 + 10 + 100 + 10
    part = found.experiments[1:3]
    assert found.gap_kinds(part) == [None, "cycle"]
    assert found.expected_time(ExpectedDurations(measured, load_s), part).total_s == 2000 + 2 * 5 + 100


def test_the_mean_of_the_known_is_assumed_for_what_never_ran() -> None:
    axes = {"fp_precision": ["float16", "float32"], "max_output_tokens": [1, 2]}
    found = plan(grid={"backends": ["pytorch"], "shared": axes}, execution={"cycles": 1, "config_gap_seconds": 0})
    one, two, *_ = found.experiments
    known = ExpectedDurations({one.config_hash: 10.0, two.config_hash: 20.0}, {one.engine_key: 1.0})
    assert found.expected_time(known) == ExpectedTime(60.0, 2.0, 0.0, is_complete=False)
    assert found.expected_time(known, found.experiments[:2]) == ExpectedTime(30.0, 1.0, 0.0, is_complete=True)


def test_without_earlier_results_only_the_gaps_are_known() -> None:
    found = plan(grid=grid(1), execution={"cycles": 2, "cycle_gap_seconds": 5}).expected_time(ExpectedDurations())
    assert found == ExpectedTime(None, None, 5.0, is_complete=False)
    assert found.total_s is None


def test_an_empty_part_takes_no_time() -> None:
    assert plan(grid=grid(1)).expected_time(ExpectedDurations(), ()).total_s == 0.0


def test_a_gap_is_expected_to_take_what_it_took_before_and_never_more_than_its_cap() -> None:
    found = plan(grid=grid(1, 2), execution={"cycles": 2, "config_gap_seconds": 10, "cycle_gap_seconds": 100})
    assert found.expected_time(ExpectedDurations(gap_s=40.0)).gaps_s == 10 + 40 + 10


# Resume


def test_an_edit_elsewhere_keeps_the_identity_of_an_experiment(file_a: str) -> None:
    before = {item.exp_id for item in plan(grid=grid(1, 2)).experiments}
    after = plan(campaign_name="renamed", configs=[file_a], grid=grid(2, 1, 5), execution={"cycles": 3}).experiments
    assert before < {item.exp_id for item in after}


def test_the_campaign_hash_changes_with_what_is_measured() -> None:
    known = plan(grid=grid(1, 2)).config_hash
    assert plan(grid=grid(1, 2), io={"results_dir": "elsewhere"}).config_hash == known
    assert plan(grid=grid(1, 3)).config_hash != known
    assert plan(grid=grid(1, 2), execution={"cycles": 4}).config_hash != known
