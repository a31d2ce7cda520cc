"""The examples are valid as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.config import rules
from lem.config.backends import BACKENDS
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import template
from lem.config.load import load_campaign, load_experiment
from lem.orchestration.grid import expand_campaign_grid, validate_campaign_grid
from lem.orchestration.plan import build_plan
from tests.documentation import Block, blocks, pages

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> list[ExperimentConfig]:
    campaign = load_campaign(EXAMPLES / "demo.yaml").config
    assert campaign.grid is not None
    found = validate_campaign_grid(expand_campaign_grid(campaign.grid, {"model": campaign.model}))
    assert not found.filtered_configs
    assert not found.warnings
    return [ExperimentConfig.from_dict(config) for config in found.valid_configs]


def test_the_demo_is_two_batch_sizes_by_two_output_lengths_by_three_cycles(demo: list[ExperimentConfig]) -> None:
    campaign = load_campaign(EXAMPLES / "demo.yaml").config
    assert campaign.execution.cycles == 3
    assert {(config.section.to_dict()["batch_size"], config.max_output_tokens) for config in demo} == {
        (1, 16),
        (1, 32),
        (4, 16),
        (4, 32),
    }


def test_the_demo_loads_one_engine_a_cycle_and_all_do_the_same_work(demo: list[ExperimentConfig]) -> None:
    assert len({config.engine_key() for config in demo}) == 1
    assert all(config.ignore_eos and config.decoder.is_greedy for config in demo)


def test_the_demo_measures_the_model_that_the_makefile_makes(demo: list[ExperimentConfig]) -> None:
    makefile = (EXAMPLES.parent / "Makefile").read_text(encoding="utf-8")
    assert {config.model.name for config in demo} == {"build/demo-model"}
    assert "examples/make_demo_model.py build/demo-model" in makefile


CAMPAIGNS = ("demo.yaml", "two-backends.yaml", "vllm-serve.yaml", "llama-server.yaml", "power-limit.yaml")


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml") if path.name not in CAMPAIGNS))
def test_an_experiment_is_valid_and_nothing_is_wrong_with_it(name: str) -> None:
    config = load_experiment(EXAMPLES / name).config
    assert rules.warnings(config) == ()
    assert config.model.name == "build/demo-model"


def test_two_backends_run_the_same_work_in_another_order_every_cycle() -> None:
    loaded = load_campaign(EXAMPLES / "two-backends.yaml")
    plan = build_plan(loaded.config, loaded.listed)
    assert (plan.filtered, plan.warnings, plan.execution.structure) == ((), {}, "shuffled")
    assert {item.backend for item in plan.experiments} == {"pytorch", "vllm"}
    assert len(plan.experiments) == 2 * 2 * 3
    assert all(item.config.ignore_eos and item.config.decoder.is_greedy for item in plan.experiments)


BLOCKS = [it for page in pages() for it in blocks(page) if "campaign_name:" in it.text and "grid:" in it.text]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_grids_of_the_documentation_compare_what_can_differ(block: Block, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(block.text, encoding="utf-8")
    assert not _cannot_differ(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_the_grids_of_the_examples_compare_what_can_differ(name: str) -> None:
    assert not _cannot_differ(EXAMPLES / name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_grid_of_a_template_compares_what_can_differ(backend: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(template("campaign", backend), encoding="utf-8")
    assert not _cannot_differ(tmp_path / "c.yaml")
    # With fewer prompts, it would not.
    loaded = load_campaign(tmp_path / "c.yaml", [("num_samples", 4)])
    made = build_plan(loaded.config, loaded.listed)
    assert any("there are never more requests at once" in text for text in made.warnings)


def _cannot_differ(path: Path) -> list[str]:
    loaded = load_campaign(path)
    plan = build_plan(loaded.config, loaded.listed)
    assert len(plan.configurations) > 1
    return [text for text in plan.warnings if "same as another" in text or "never more requests at once" in text]
