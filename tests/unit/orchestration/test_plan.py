from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError, UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig
from lem.config.experiment import ExperimentConfig
from lem.config.load import Loaded, complete_campaign, load_campaign, load_experiment
from lem.config.sections import FilePrompts
from lem.config.yamlfile import FileProblems
from lem.orchestration.grid import NO_MODEL, config_hash, cycle_order, prompts_fingerprint
from lem.orchestration.plan import (
    ExpectedDurations,
    ExpectedTime,
    Experiment,
    Plan,
    build_plan,
    order_experiments,
    plan_campaign,
    write_configs,
)


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
    assert order(found) == "3/1 4/1 5/1 1/1 2/1 2/2 1/2 5/2 4/2 3/2"
    assert len(found.configurations) == 5


# What is left out, and what is warned about


def test_an_invalid_combination_is_filtered_and_grouped_by_reason() -> None:
    axes = {"fp_precision": ["float16", "float32"], "max_output_tokens": [1, 2]}
    found = plan(grid={"backends": ["pytorch", "tensorrt"], "shared": axes}, execution={"cycles": 1})
    assert found.summary == "Generated 8 experiments (2 filtered, 0 warnings)"
    assert found.filtered_by_reason == [("tensorrt needs float16 or bfloat16", 2)]
    assert len(found.experiments) == 6


def test_an_option_set_for_all_comes_after_those_of_the_grid(tmp_path: Path) -> None:
    text = "campaign_name: x\ngrid: {backends: [pytorch], models: [a, b], shared: {max_output_tokens: [3, 4]}}\n"
    (tmp_path / "c.yaml").write_text(text)
    loaded = load_campaign(tmp_path / "c.yaml", [("model", "zz")])
    made = build_plan(loaded.config, loaded.listed, preset=loaded.preset, source=loaded.source)
    assert {(*item.config_dict,) for item in made.experiments} == {("backend", "max_output_tokens", "model", "warmup")}


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({"execution": {"seed": 5}}, ["execution.seed: has no effect with structure: balanced"]),
        ({"execution": {"seed": 5, "structure": "shuffled"}}, []),
        (
            {"health_check": {"restart_on_failure": False, "max_restarts": 9}},
            ["health_check.max_restarts: has no effect with restart_on_failure: false"],
        ),
        ({"health_check": {"max_restarts": 9}}, []),
        ({"notification": {"on": "failure"}}, ["notification.on: has no effect with webhook_url: null"]),
        ({"notification": {"on": "failure", "webhook_url": "https://example.org"}}, []),
    ],
)
def test_an_option_of_the_campaign_without_effect_is_warned_about(options: dict[str, Any], warnings: list[str]) -> None:
    assert [*plan_campaign(load(grid=grid(3), **options)).warnings] == warnings


def test_planning_leaves_what_its_caller_has_frozen() -> None:
    gc.freeze()
    try:
        plan_campaign(load(grid=grid(3)))
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_nothing_valid_is_an_empty_plan() -> None:
    found = plan(model=None, grid=grid(1, 2))
    assert (found.experiments, found.loads(), found.gap_kinds()) == ((), [], [])
    assert found.summary == "Generated 2 experiments (2 filtered, 0 warnings)"
    assert found.filtered_by_reason == [(NO_MODEL.text, 2)]


def test_the_same_twice_runs_once_with_a_warning(file_a: str) -> None:
    found = plan(configs=[file_a], grid=grid(3, 4), execution={"cycles": 1})
    assert order(found) == "3/1 4/1"
    assert found.warnings == {Reason.of("repeated_experiment", name="a").text: 1}
    assert found.summary == "Generated 3 experiments (0 filtered, 1 warnings)"


def test_what_rules_warn_about_is_kept_with_the_experiment() -> None:
    found = plan(grid={"backends": ["pytorch"], "shared": {"decoder.temperature": [0.5], "decoder.top_p": [0.5, 1.0]}})
    why = Reason.of("at_option", option="decoder.top_p", what=Reason.of("sampling_compounds"))
    assert found.warnings == {why.text: 1}
    assert len(found.configurations) == 2


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
        io={"configs_dir": "made"},
    )
    assert [(item.config_name, item.config_path, item.is_generated) for item in found.experiments] == [
        ("a", file_a, False),
        ("mine", str(tmp_path / "b.yaml"), False),
        *(
            (name, f"made/demo/{name}.yaml", True)
            for name in ("pytorch-gpt2", "sixth", "pytorch-max_output_tokens=1", "pytorch-max_output_tokens=2")
        ),
    ]


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
    assert ("config_name" in item.requested, item.resolved["config_name"]) == (False, item.config_name)


# Prompts


_opened: list[str] = []  # an audit hook cannot be removed, so there is one for all
sys.addaudithook(lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None)


def test_each_source_of_prompts_is_read_once(tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in paths:
        path.write_text(path.stem)
    sources = [{"type": "file", "path": str(path)} for path in paths]
    loaded = load(grid={**grid(1, 2, 3), "shared": {"max_output_tokens": [1, 2, 3], "prompts": sources}})
    _opened.clear()
    assert len(build_plan(loaded.config).configurations) == 6
    assert sorted(name for name in _opened if name.endswith(".txt")) == [str(path) for path in paths]


def test_prompts_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigurationError, match=r"empty\.txt"):
        plan(experiments=[{"prompts": {"type": "file", "path": str(tmp_path / "empty.txt")}}])


def test_a_chat_template_is_part_of_what_a_configuration_is_and_a_missing_one_is_shown_where_it_is_named(
    tmp_path: Path,
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    templates = ["none", "model", str(template)]
    found = plan(grid={"backends": ["pytorch"], "shared": {"chat_template": templates}}).configurations
    assert len({item.config_hash for item in found}) == 3
    assert found[0].config_hash == plan(grid={"backends": ["pytorch"]}).configurations[0].config_hash
    campaign = tmp_path / "c.yaml"
    head = "campaign_name: c\nmodel: m\ngrid:\n  backends: [pytorch]\n  shared:\n"
    campaign.write_text(f"{head}    chat_template: [{tmp_path}/no.jinja]\n")
    loaded = load_campaign(campaign)
    with pytest.raises(FileProblems) as caught:
        build_plan(loaded.config, loaded.listed, source=loaded.source)
    assert "c.yaml:6:" in str(caught.value)
    assert "no.jinja: cannot be read: no such file" in str(caught.value)
    assert caught.value.hint == "set chat_template to a Jinja file, model or none"


def test_gaps_and_expected_time_of_the_whole_and_of_a_part() -> None:
    found = plan(
        grid=grid(1, 2),
        execution={"cycles": 2, "config_gap_seconds": 10, "cycle_gap_seconds": 100},
    )
    assert found.gap_kinds() == [None, "configuration", "cycle", "configuration"]
    measured = {item.config_hash: 1000.0 for item in found.configurations}
    load_s = {item.engine_key: 5.0 for item in found.configurations}
    assert found.expected_time(ExpectedDurations(measured, load_s)).total_s == 4000 + 2 * 5 + 10 + 100 + 10
    part = replace(found, experiments=found.experiments[1:3])
    assert part.gap_kinds() == [None, "cycle"]
    assert part.expected_time(ExpectedDurations(measured, load_s)).total_s == 2000 + 2 * 5 + 100


def test_the_mean_of_the_known_is_assumed_for_what_never_ran() -> None:
    axes = {"fp_precision": ["float16", "float32"], "max_output_tokens": [1, 2]}
    found = plan(grid={"backends": ["pytorch"], "shared": axes}, execution={"cycles": 1, "config_gap_seconds": 0})
    one, two, *_ = found.experiments
    known = ExpectedDurations({one.config_hash: 10.0, two.config_hash: 20.0}, {one.engine_key: 1.0})
    assert found.expected_time(known) == ExpectedTime(60.0, 2.0, 0.0, 0.0, is_complete=False)
    part = replace(found, experiments=found.experiments[:2])
    assert part.expected_time(known) == ExpectedTime(30.0, 1.0, 0.0, 0.0, is_complete=True)


def test_without_earlier_results_only_the_gaps_are_known_and_take_at_most_their_cap() -> None:
    found = plan(grid=grid(1, 2), execution={"cycles": 2, "config_gap_seconds": 10, "cycle_gap_seconds": 100})
    expected = found.expected_time(ExpectedDurations(gap_s=40.0))
    assert expected == ExpectedTime(None, None, 10 + 40 + 10, 10 + 100 + 10, is_complete=False)
    assert expected.total_s is None
    assert replace(found, experiments=()).expected_time(ExpectedDurations()).total_s == 0.0


CONFIG = ExperimentConfig.from_dict({"model": "any"})


def experiment(word: str, engines: dict[str, str] | None = None) -> Experiment:
    """`A1` is configuration A in cycle 0; its engine is the one given, or its own."""
    name, cycle = word[0], int(word[1:]) - 1
    return Experiment(word, name, CONFIG, {}, "", name, (engines or {}).get(name, name), cycle, 0)


def experiments(text: str, engines: dict[str, str] | None = None) -> tuple[Experiment, ...]:
    return tuple(experiment(word, engines) for word in text.split())


def ordered(
    names: str, structure: str, *, cycles: int = 2, seed: int = 42, engines: dict[str, str] | None = None
) -> str:
    execution = CampaignExecutionConfig(cycles=cycles, structure=structure, seed=seed)
    found = order_experiments([experiment(f"{name}1", engines) for name in names], execution)
    assert [item.order_index for item in found] == list(range(len(found)))
    return " ".join(f"{item.config_hash}{item.cycle_index + 1}" for item in found)


def test_interleaved_and_grouped_orders() -> None:
    assert ordered("ABC", "interleaved") == "A1 B1 C1 A2 B2 C2"
    # Equal engines lie together.
    assert ordered("ABCD", "interleaved", cycles=1, engines={"A": "x", "C": "x", "D": "x"}) == "A1 C1 D1 B1"
    assert ordered("AB", "grouped", cycles=3) == "A1 A2 A3 B1 B2 B3"


def test_balanced_rotates_and_mirrors_the_order_from_cycle_to_cycle() -> None:
    assert ordered("ABC", "balanced", cycles=4) == "A1 B1 C1 C2 B2 A2 B3 C3 A3 A4 C4 B4"
    # Longer campaigns begin like shorter ones.
    assert ordered("ABCD", "balanced", cycles=5).startswith(ordered("ABCD", "balanced", cycles=3))


@pytest.mark.parametrize(
    ("engines", "cycles"), [("xy", 4), ("xyz", 6), ("xxx", 6), ("xxyy", 8), ("xxyyzz", 24), ("xxxyyy", 24)]
)
def test_in_a_balanced_campaign_every_configuration_is_in_every_place_equally_often(engines: str, cycles: int) -> None:
    names = "ABCDEF"[: len(engines)]
    by_name = dict(zip(names, engines, strict=True))
    words = ordered(names, "balanced", cycles=20, engines=by_name).split() if cycles <= 20 else []
    orders = [cycle_order(engines, "balanced", 42, cycle) for cycle in range(cycles)]
    found = Counter((place, index) for order in orders for place, index in enumerate(order))
    assert set(found.values()) == {cycles // len(engines)}
    shown = [word[0] for word in words[: len(names) * cycles]]
    assert not words or shown == [names[index] for order in orders for index in order]


@pytest.mark.parametrize("structure", ["balanced", "interleaved", "shuffled"])
def test_within_a_cycle_experiments_of_an_image_and_of_these_of_an_engine_are_adjacent(structure: str) -> None:
    axes = {"fp_precision": ["float16", "float32"], "max_output_tokens": [1, 2], "image": ["a:1", "a:2", None]}
    listed = [{"fp_precision": precision, "image": image} for precision in ("bfloat16", "float16") for image in "xy"]
    found = plan(
        grid={"backends": ["pytorch"], "shared": axes},
        experiments=listed,
        execution={"cycles": 8, "structure": structure},
    )
    for cycle in range(8):
        configs = [item.config for item in found.experiments if item.cycle_index == cycle]
        assert len(configs) == 16
        assert len(list(itertools.groupby(configs, lambda item: item.image))) == 5
        engines = itertools.groupby(configs, lambda item: item.engine_key())
        assert len(list(engines)) == len({item.engine_key() for item in configs}) == 10


def test_in_a_balanced_campaign_images_are_in_every_place_equally_often() -> None:
    for images, engines, cycles in (("aabb", "xyxy", 8), ("abc", "xyz", 6), ("aaaabbbb", "xxyyxxyy", 32)):
        orders = [cycle_order(engines, "balanced", 42, cycle, images) for cycle in range(cycles)]
        found = Counter((place, index) for order in orders for place, index in enumerate(order))
        assert set(found.values()) == {cycles // len(images)}, (images, engines)
        assert len(found) == len(images) ** 2


def test_an_image_needs_another_engine_and_container_and_without_one_identities_stay() -> None:
    without = ExperimentConfig.from_dict({"model": "m"})
    with_one = ExperimentConfig.from_dict({"model": "m", "image": "reg/two:2"})
    assert without.engine_key() != with_one.engine_key()
    assert "image" not in without.identity()
    assert with_one.identity()["image"] == "reg/two:2"
    found = plan(grid={"backends": ["vllm"], "shared": {"image": [None, "reg/two:2"]}}, execution={"cycles": 1})
    assert [item.place for item in found.experiments] == ["vllm", "vllm@reg/two:2"]
    assert found.loads() == [True, True]
    assert [item.config_name for item in found.given] == ["vllm-image=null", "vllm-image=two_2"]


@pytest.mark.parametrize("image", ["", "--help", "a b", "reg/two:2\n"])
def test_what_is_no_name_of_an_image_is_refused(image: str) -> None:
    with pytest.raises(ConfigurationError, match="image"):
        ExperimentConfig.from_dict({"model": "m", "image": image})


@pytest.mark.parametrize("reuse", ["cycle", "none"])
def test_a_balanced_campaign_loads_as_few_engines_as_an_interleaved_one(reuse: str) -> None:
    engines = dict(zip("ABCDEFG", "xyxzyyx", strict=True))
    given = [experiment(f"{name}1", engines) for name in engines]
    loads = []
    for structure in ("balanced", "interleaved"):
        found = plan(grid=grid(1), execution={"structure": structure, "cycles": 7, "reuse": reuse})
        found = replace(found, experiments=order_experiments(given, found.execution))
        loads.append(sum(found.loads()))
    assert loads[0] == loads[1] == (3 * 7 if reuse == "cycle" else 7 * 7)


def test_shuffled_has_every_configuration_once_a_cycle_in_an_order_of_its_own() -> None:
    words = ordered("ABCDEFGH", "shuffled", cycles=3).split()
    cycles = [words[:8], words[8:16], words[16:]]
    for number, cycle in enumerate(cycles, start=1):
        assert sorted(cycle) == [f"{name}{number}" for name in "ABCDEFGH"]
    assert len({"".join(word[0] for word in cycle) for cycle in cycles}) == 3


def test_shuffled_keeps_equal_engines_together_and_shuffles_both_engines_and_their_configurations() -> None:
    engines = {"A": "x", "B": "y", "C": "x", "D": "y", "E": "x", "F": "y"}
    seen = set()
    for seed in range(40):
        names = [word[0] for word in ordered("ABCDEF", "shuffled", cycles=1, seed=seed, engines=engines).split()]
        keys = "".join(engines[name] for name in names)
        assert keys in ("xxxyyy", "yyyxxx")
        seen.add((keys, "".join(name for name in names if engines[name] == "x")))
    assert {keys for keys, _ in seen} == {"xxxyyy", "yyyxxx"}
    assert len({names for _, names in seen}) == 6


def test_shuffle_is_the_same_for_a_seed_everywhere_and_another_cycle_leaves_the_order_of_the_others() -> None:
    # Written down from CPython 3.11; every version and machine must agree, since the seed stands for the order.
    assert ordered("ABCDEF", "shuffled", cycles=1, seed=42) == "D1 A1 F1 C1 B1 E1"
    assert ordered("ABCDEF", "shuffled", seed=1) != ordered("ABCDEF", "shuffled", seed=2)
    assert ordered("ABCD", "shuffled", cycles=3).startswith(ordered("ABCD", "shuffled", cycles=2))


# Cells that cannot differ

VLLM = {"model": "gpt2", "backend": "vllm"}
EIGHT_PROMPTS = {"type": "synthetic", "sample_size": 8}


def cells(shared: dict[str, Any], overrides: dict[str, Any], backend: str = "vllm") -> list[str]:
    """The warnings about a grid, without those about its parts."""
    axes = {key: value if isinstance(value, list) else [value] for key, value in shared.items()}
    made = plan(grid={"backends": [backend], "shared": axes, "backend_overrides": {backend: overrides}})
    assert len(made.configurations) > 1
    return [*made.warnings.elements()]


GREEDY = {"decoder.preset": "deterministic", "prompts": EIGHT_PROMPTS}
CLOSED = {"traffic_simulation.enabled": True, "traffic_simulation.mode": "closed", "prompts": EIGHT_PROMPTS}
WIDE = "vllm.max_num_seqs: {} acts as {}, since there are never more requests at once"


def same(options: str) -> str:
    return Reason.of("cannot_differ", options=options).text


@pytest.mark.parametrize(
    ("shared", "overrides", "found"),
    [
        # 256 is the default of lem, so nobody asked for it.
        ({"prompts": EIGHT_PROMPTS}, {"max_num_seqs": [64, 256]}, [WIDE.format(64, 8), same("vllm.max_num_seqs")]),
        ({"prompts": EIGHT_PROMPTS}, {"max_num_seqs": [4, 8]}, []),
        ({"dataset": "alpaca"}, {"max_num_seqs": [64, 128]}, []),
        ({"dataset": {"name": "alpaca", "sample_size": 16}}, {"max_num_seqs": [8, 256]}, []),
        ({**GREEDY, "streaming": True}, {"max_num_seqs": [1, 256]}, [same("vllm.max_num_seqs")]),
        (
            {**CLOSED, "traffic_simulation.concurrency": [4, 64]},
            {"max_num_seqs": [16, 32]},
            [WIDE.format(16, 4), WIDE.format(32, 4), same("vllm.max_num_seqs")],
        ),
        (
            {**GREEDY, "decoder.top_k": [5, 50]}, {},
            ["decoder.top_k: top_k has no effect under greedy decoding", same("decoder.top_k")],
        ),
        (
            {**GREEDY, "random_seed": [1, 2]}, {"min_p": [0.1, 0.2]},
            [same("random_seed"), same("vllm.min_p"), same("random_seed and vllm.min_p")],
        ),
        ({**GREEDY, "random_seed": [1, None]}, {}, []),
        ({"ignore_eos": True, "min_output_tokens": [1, 128]}, {}, [same("min_output_tokens")]),
        ({"measurement.energy": "none", "baseline.enabled": [True, False]}, {}, [same("baseline.enabled")]),
        ({"measurement.energy": "rapl", "baseline.enabled": [True, False]}, {}, []),
        ({"max_output_tokens": [1, 128]}, {}, []),
    ],
)  # fmt: skip
def test_cells_that_cannot_differ_are_named_before_the_run(
    shared: dict[str, Any], overrides: dict[str, Any], found: list[str]
) -> None:
    assert sorted(cells(shared, overrides)) == sorted(found)


def test_every_file_of_prompts_that_cannot_be_used_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("good.txt").write_text("one\n")
    Path("c.yaml").write_text(
        "campaign_name: demo\nmodel: gpt2\n"
        "grid:\n  backends: [pytorch]\n  shared:\n    pytorch.batch_size: [1, 2]\n"
        "    prompts: [empty.txt, gone.txt, good.txt]\n"
    )
    with pytest.raises(UserError) as caught:
        loaded = load_campaign("c.yaml")
        build_plan(loaded.config, loaded.listed, source=loaded.source)
    assert [name in caught.value.message for name in ("empty.txt", "gone.txt", "good.txt: ")] == [True, True, False]
    assert "2 problems in the configuration" in caught.value.message


def test_prompts_of_a_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("one\ntwo\nthree\n")
    prompts = {"type": "file", "path": str(tmp_path / "three.txt"), "sample_size": 8}
    wide = "pytorch.batch_size: 4 acts as 3, since there are never more requests at once"
    assert cells({"prompts": prompts}, {"batch_size": [1, 3, 4]}, "pytorch") == [wide, same("pytorch.batch_size")]


GRID = {"backends": ["pytorch"]}
FILE = {"type": "file", "path": "sub/own.txt"}


@pytest.mark.parametrize(
    ("campaign", "places"),
    [
        ({"configs": ["sub/e.yaml"]}, ["set/sub/own.txt"]),
        ({"experiments": [{"prompts": "own.txt"}]}, ["set/own.txt"]),
        ({"experiments": [{"config": "sub/e.yaml", "overrides": {"prompts": "own.txt"}}]}, ["set/own.txt"]),
        ({"grid": {**GRID, "shared": {"prompts": ["own.txt", FILE]}}}, ["set/own.txt", "set/sub/own.txt"]),
        ({"grid": {**GRID, "shared": {"prompts.type": ["file"], "prompts.path": ["own.txt"]}}}, ["set/own.txt"]),
        ({"experiments": [{"prompts": "here.txt"}]}, ["here.txt"]),
        ({"experiments": [{"prompts": "${NAME_OF_PROMPTS:-own}.txt"}]}, ["set/own.txt"]),
        ({"experiments": [{"prompts": "own.txt"}], "sample_size": 1}, ["set/own.txt"]),
    ],
)  # fmt: skip
def test_a_file_of_prompts_is_relative_to_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: dict[str, Any], places: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for place in ("own.txt", "set/own.txt", "set/sub/own.txt", "here.txt"):
        (tmp_path / place).write_text(f"{place}\nsecond\n")
    (tmp_path / "set" / "sub" / "e.yaml").write_text("prompts: own.txt\nmodel: gpt2\n")
    (tmp_path / "set" / "c.yaml").write_text(json.dumps({"campaign_name": "demo", "model": "gpt2", **campaign}))

    loaded = load_campaign("set/c.yaml")
    found = build_plan(loaded.config, loaded.listed, source=loaded.source).given
    assert [item.config.prompts.path for item in found if isinstance(item.config.prompts, FilePrompts)] == places
    assert {item.n_prompts for item in found} == {loaded.config.num_samples or 2}
    if "${" in json.dumps(campaign):
        assert [item.requested["prompts"]["path"] for item in found] == ["set/${NAME_OF_PROMPTS:-own}.txt"]
    on_the_line = load_campaign("set/c.yaml", ["grid=null", "configs=[]", "experiments=[{prompts: own.txt}]"])
    (only,) = build_plan(on_the_line.config, on_the_line.listed, source=on_the_line.source).given
    assert only.config.prompts == FilePrompts(path="own.txt", sample_size=loaded.config.num_samples)


@pytest.mark.parametrize(
    "campaign",
    [
        {"experiments": [{"chat_template": "t.jinja"}]},
        {"grid": {**GRID, "shared": {"chat_template": ["t.jinja", "model"]}}},
    ],
)
def test_a_chat_template_is_relative_to_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "set" / "c.yaml").write_text(json.dumps({"campaign_name": "demo", "model": "gpt2", **campaign}))
    loaded = load_campaign("set/c.yaml")
    found = build_plan(loaded.config, loaded.listed, source=loaded.source).given
    assert [item.config.chat_template for item in found] == ["set/t.jinja", "model"][: len(found)]


def test_files_of_the_home_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("first\nsecond\n")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    files = {"prompts": "~/own.txt", "chat_template": "~/t.jinja"}
    (tmp_path / "c.yaml").write_text(json.dumps({"campaign_name": "demo", "model": "gpt2", "experiments": [files]}))
    loaded = load_campaign(tmp_path / "c.yaml")
    (found,) = build_plan(loaded.config, loaded.listed, source=loaded.source).given
    assert (found.config.prompts, found.n_prompts) == (FilePrompts(path=str(tmp_path / "own.txt")), 2)
    assert found.config.chat_template == str(tmp_path / "t.jinja")


def test_without_prompts_the_synthetic_set_is_as_large_as_the_widest_configuration_needs() -> None:
    made = plan(
        grid={"backends": ["pytorch", "vllm"], "backend_overrides": {"vllm": {"max_num_seqs": [64, 300]}}},
        experiments=[
            {**VLLM, "prompts": EIGHT_PROMPTS, "config_name": "own"},
            {**VLLM, "dataset": {"name": "alpaca", "sample_size": 7}, "config_name": "hub"},
        ],
    )
    assert {item.config_name: item.n_prompts for item in made.configurations} == {
        "own": 8, "hub": 7, "pytorch": 300, "vllm-max_num_seqs=64": 300, "vllm-max_num_seqs=300": 300,
    }  # fmt: skip
    assert (made.enlarged_to, made.warnings) == (300, {})
    before = made.as_by_older_build()
    assert {item.n_prompts for item in before.configurations} == {8, 7, 32}
    assert before.enlarged_to is None
    # As it was before: the bundled set, and its hash.
    bare = ExperimentConfig.from_dict({"model": "gpt2", "warmup": {"min_prompts": 5, "timeout_seconds": 30.0}})
    pytorch = next(item for item in before.configurations if item.backend == "pytorch")
    assert pytorch.config_hash == config_hash(bare, prompts_fingerprint(bare))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"pytorch": {"batch_size": 32}}, 32),
        ({"pytorch": {"batch_size": 33}}, 33),
        ({"pytorch": {"batch_size": 33}, "streaming": True}, 32),
        ({"traffic_simulation": {"enabled": True, "mode": "closed", "concurrency": 40}}, 40),
        ({"backend": "vllm", "traffic_simulation": {"enabled": True, "mode": "poisson"}}, 32),
    ],
)
def test_what_a_configuration_needs(options: dict[str, Any], count: int) -> None:
    assert plan(experiments=[options]).configurations[0].n_prompts == count


# Gaps


@pytest.mark.parametrize(
    ("structure", "planned", "gaps"),
    [
        ("interleaved", "A1 B1 A2 B2", "- configuration cycle configuration"),
        ("shuffled", "B1 A1 A2 B2", "- configuration cycle configuration"),
        ("grouped", "A1 A2 B1 B2", "- configuration cycle configuration"),
        # A resumed part: the first cycle ends with B, though B is not the last of the campaign's configurations.
        ("interleaved", "B1 A2 B2 C2", "- cycle configuration configuration"),
        ("interleaved", "C1 C2 C3", "- cycle cycle"),
        ("grouped", "A3 B1 B3 C2", "- cycle configuration cycle"),
        ("interleaved", "A1", "-"),
    ],
)
def test_gaps(structure: str, planned: str, gaps: str) -> None:
    found = replace(plan(grid=grid(1), execution={"structure": structure}), experiments=experiments(planned))
    assert [kind or "-" for kind in found.gap_kinds()] == gaps.split()


# Loads


@pytest.mark.parametrize(
    ("planned", "reuse", "is_cold", "loads"),
    [
        ("A1 B1 C1 A2 B2 C2", "cycle", False, "1 0 1 1 0 1"),
        ("A1 B1 C1 A2 B2 C2", "campaign", False, "1 0 1 1 0 1"),
        ("A1 B1 C1 A2 B2 C2", "none", False, "1 1 1 1 1 1"),
        ("A1 B1 C1 A2 B2 C2", "campaign", True, "1 1 1 1 1 1"),
        ("A1 A2 A3", "campaign", False, "1 0 0"),
        ("A1 A2 A3", "cycle", False, "1 1 1"),
        ("A1 C1 B1", "cycle", False, "1 1 1"),
        ("B2", "cycle", False, "1"),
    ],
)
def test_loads(planned: str, reuse: str, is_cold: bool, loads: str) -> None:
    options = {"execution": {"reuse": reuse}, "cold_start": {"restart_container": is_cold}}
    found = replace(plan(grid=grid(1), **options), experiments=experiments(planned, {"A": "x", "B": "x"}))
    assert "".join(str(int(item)) for item in found.loads()) == loads.replace(" ", "")


def generated_plan(folder: Path, **options: Any) -> Plan:
    campaign = CampaignConfig.from_dict(
        {
            "campaign_name": "demo",
            "model": "gpt2",
            "num_samples": 3,
            "grid": {
                "backends": ["pytorch", "vllm"],
                "shared": {"decoder.temperature": [0.5, 1.0], "gpus": [[0, "GPU-1"]]},
                "backend_overrides": {"pytorch": {"max_memory": {"0": "10GiB"}}, "vllm": {"extra.x": [[1, 2], None]}},
            },
            "io": {"configs_dir": str(folder / "configs")},
            **options,
        }
    )
    loaded = complete_campaign(campaign)
    return build_plan(loaded.config, loaded.listed)


def test_every_file_gives_its_experiment_again(tmp_path: Path) -> None:
    single_gpu = {"backends": ["pytorch"], "shared": {"gpus": [[], [0]], "decoder.temperature": [1e-05, 1.0]}}
    for found in (generated_plan(tmp_path), generated_plan(tmp_path, campaign_name="single", grid=single_gpu)):
        configurations = found.configurations
        write_configs(configurations)
        assert configurations
        for item in configurations:
            again = load_experiment(item.config_path).config
            assert again.identity() == item.config.identity()
            assert again.name == item.config_name


def test_only_a_file_that_is_missing_or_broken_is_written_again(tmp_path: Path) -> None:
    configurations = generated_plan(tmp_path).configurations
    write_configs(configurations)
    paths = [Path(item.config_path) for item in configurations]
    before, content = [path.stat().st_ino for path in paths], paths[0].read_text()
    paths[0].write_text("half a")
    write_configs(configurations)
    assert paths[0].read_text() == content
    assert [path.stat().st_ino for path in paths[1:]] == before[1:]


def test_a_file_of_the_user_is_never_written(file_a: str, tmp_path: Path) -> None:
    write_configs(generated_plan(tmp_path, grid=None, configs=[file_a]).configurations)
    assert Path(file_a).read_text() == "max_output_tokens: 3\n"
    assert not (tmp_path / "configs").exists()


def test_a_variable_stays_a_variable_and_its_value_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "home-of-somebody")
    monkeypatch.setenv("TOKEN", "hunter2-of-somebody")
    monkeypatch.setenv("TOKENS", "12")
    file = tmp_path / "campaign.yaml"
    file.write_text(
        "campaign_name: demo\n"
        "experiments:\n"
        "  - model: /${FOLDER}/small\n"
        "    max_output_tokens: ${TOKENS}\n"
        '    pytorch: {extra: {key: "${TOKEN}"}}\n'
        "  - model: other\n"
        '    extra_metadata: {literal: "$${TOKEN}"}\n'
        f"io: {{configs_dir: {tmp_path}/configs}}\n"
    )
    loaded = load_campaign(file)
    one, two = build_plan(loaded.config, loaded.listed).configurations
    write_configs([one, two])
    written = one.config_path + Path(one.config_path).read_text()
    assert "of-somebody" not in written
    again = load_experiment(one.config_path).config
    assert again.identity() == one.config.identity()
    assert again.model.name == "/home-of-somebody/small"
    assert again.max_output_tokens == 12
    assert load_experiment(two.config_path).config.extra_metadata == {"literal": "${TOKEN}"}


def test_a_value_that_is_no_utf8_is_written(tmp_path: Path) -> None:
    found = generated_plan(tmp_path, model=os.fsdecode(b"m-\xff"), grid={"backends": ["pytorch"]})
    write_configs(found.configurations)
    (path,) = (tmp_path / "configs" / "demo").iterdir()
    assert '"m-\\udcff"' in path.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_made_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "configs").write_text("a file")
    with pytest.raises(UserError, match="configs") as error:
        write_configs(generated_plan(tmp_path).configurations)
    assert "io.configs_dir" in error.value.hint
