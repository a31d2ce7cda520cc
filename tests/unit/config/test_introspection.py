"""What is rendered from the declarations: introspection, schema, reference page and templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.backends import BACKENDS
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import (
    get_campaign_params,
    get_experiment_params,
    render_page,
    render_text,
    render_yaml,
    template,
    yaml_scalar,
)
from lem.config.load import load_campaign, load_experiment
from lem.config.yamlfile import parse_value

ROOT = Path(__file__).resolve().parents[3]


def test_without_a_backend_the_options_of_all_are_listed():
    assert set(get_experiment_params()) == set().union(*(get_experiment_params(backend) for backend in BACKENDS))
    with pytest.raises(ConfigurationError, match="unknown backend 'cuda'"):
        get_experiment_params("cuda")


def test_an_option_is_described_as_plain_json() -> None:
    params = {**get_campaign_params(), **get_experiment_params()}
    assert json.loads(json.dumps(params)) == params
    assert {name for name, entry in params.items() if entry["description"][-1] not in ".!"} == set()
    assert max(len(line) for line in render_text(params).splitlines()) <= 80
    assert params["execution.cycles"]["bounds"] == {"minimum": 1, "maximum": 20}
    assert params["grid.backends"]["choices"] == list(BACKENDS)
    assert params["traffic_simulation.target_qps"]["bounds"] == {"exclusiveMinimum": 0}
    assert params["vllm.max_num_seqs"]["backends"] == ["vllm"]
    assert params["model.name"]["reload"] is True
    assert params["prompts.seed"]["variants"] == ["synthetic", "huggingface"]


def test_the_reference_page_is_fresh():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render_page(), "lem config fields --markdown > docs/configuration.md"


# Templates


@pytest.mark.parametrize("backend", BACKENDS)
def test_templates_are_valid_as_they_are(tmp_path: Path, backend: str):
    campaign, experiment = tmp_path / "c.yaml", tmp_path / "e.yaml"
    campaign.write_text(template("campaign", backend), encoding="utf-8")
    experiment.write_text(template("experiment", backend), encoding="utf-8")
    config = load_campaign(campaign).config
    assert config.to_dict()["grid"]["backends"] == [backend]
    assert load_experiment(experiment).config.backend == backend


def test_every_option_of_a_template_is_valid_when_it_is_uncommented(tmp_path: Path):
    text = re.sub(r"(?m)^( *)#(?=\S)", r"\1", template("experiment", "pytorch"))
    file = tmp_path / "e.yaml"
    file.write_text(text, encoding="utf-8")
    loaded = load_experiment(file)
    assert loaded.config == ExperimentConfig.from_dict({"model": "gpt2", "pytorch": {}})
    assert loaded.provenance["pytorch.beam_search.num_beams"] == "file"


def test_templates_show_every_option():
    shown = set(re.findall(r"(?m)^ *#?([a-z_0-9]+):", template("campaign") + template("experiment", "vllm")))
    wanted = {*get_campaign_params(), *get_experiment_params("vllm")}
    missing = {
        name.rpartition(".")[2] for name in wanted if not name.startswith(("prompts.", "experiments", "dataset"))
    }
    assert missing - shown == {"name", "revision", "tokenizer", "adapter", "trust_remote_code"}


def test_templates_fit_a_terminal():
    for text in (template("campaign"), *(template("experiment", backend) for backend in BACKENDS)):
        assert max(len(line) for line in text.splitlines()) <= 80


# YAML as lem writes it


TEXTS = [
    "",
    " x",
    "a: b",
    "# c",
    "a/b c.d",
    *["x", "no", "on", "12:30", "1e3", "~", "true", "5", "é", '"', "-", "@x", "${A}"],
]


@pytest.mark.parametrize("value", TEXTS)
def test_text_written_is_read_back(value: str):
    assert parse_value(yaml_scalar(value).replace("${", "$${"), {}, "v") == value


@pytest.mark.parametrize("value", [None, True, 3, 0.5, 1e300, 3.0, [], [1, ["no"]], {"a": None, "on": [1]}])
def test_values_written_are_read_back(value: Any):
    assert parse_value(yaml_scalar(value), {}, "v") == value


def test_yaml_is_aligned_with_its_comments():
    text = render_yaml({"a": 1, "b": {"long_name": [1, 2]}, "c": {}}, {("a",): "x", ("b", "long_name"): "y"})
    assert text == "a: 1                 # x\nb:\n  long_name: [1, 2]  # y\nc: {}\n"


def test_what_is_no_mapping_or_empty_stays_in_a_list_of_mappings() -> None:
    tree = {"warmup": [{}, None, {"min_prompts": 3, "max_prompts": 4}]}
    assert render_yaml(tree, {}) == ("warmup:\n  - {}\n  - null\n  - min_prompts: 3\n    max_prompts: 4\n")
