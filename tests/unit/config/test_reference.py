"""What is rendered from the declarations: introspection, schema, reference page and templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.backends import BACKENDS
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import (
    campaign_template,
    document_schema,
    experiment_template,
    get_campaign_grid_params,
    get_campaign_health_check_params,
    get_campaign_params,
    get_experiment_params,
    render_page,
    render_text,
    render_yaml,
    yaml_scalar,
)
from lem.config.load import load_campaign, load_experiment
from lem.config.yamlfile import parse_value

ROOT = Path(__file__).resolve().parents[3]

# Every option that the project promises, written out apart from the declarations: taking one away must fail here.
CAMPAIGN_OPTIONS = """
    campaign_name num_samples configs
    model.{name revision tokenizer adapter trust_remote_code}
    dataset.{name sample_size split column}
    grid.{backends models shared backend_overrides}
    experiments[].{config overrides}
    execution.{cycles structure warmup_prompts warmup_timeout_seconds config_gap_seconds cycle_gap_seconds
        load_timeout_seconds experiment_timeout_seconds silence_timeout_seconds reuse seed}
    schedule.{at days}
    health_check.{enabled interval_experiments gpu_memory_threshold_pct restart_on_failure max_restarts}
    cold_start.{force_cold_start restart_container}
    daemon.{enabled at interval total_duration quiet}
    io.{results_dir configs_dir state_dir manifest_filename compose_file env_file}
    notification.{webhook_url on}
"""

SHARED_OPTIONS = """
    model.{name revision tokenizer adapter trust_remote_code}
    backend config_name max_input_tokens max_output_tokens min_output_tokens fp_precision gpus ignore_eos random_seed
    streaming num_cycles save_outputs extra_metadata
    dataset.{name sample_size split column}
    prompts.{type path input_tokens output_tokens sample_size seed distribution dataset split subset column shuffle}
    decoder.{preset temperature do_sample top_k top_p repetition_penalty}
    traffic_simulation.{enabled mode target_qps concurrency seed}
    warmup.{enabled convergence_detection cv_threshold min_prompts max_prompts window_size timeout_seconds}
    baseline.{enabled required duration_sec cache_ttl_sec sample_interval_ms}
    timeseries.{enabled save sample_interval_ms}
    measurement.{min_window_sec energy phases cpu_tdp_w external_csv grid_g_per_kwh pue price_per_kwh}
    io.{results_dir}
"""

BACKEND_OPTIONS = {
    "pytorch": """
        pytorch.{batch_size batching_strategy max_tokens_per_batch parallelism_strategy parallelism_degree load_in_4bit
            load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant attn_implementation
            torch_compile torch_compile_backend use_cache cache_implementation low_cpu_mem_usage max_memory min_p
            no_repeat_ngram_size extra}
        pytorch.beam_search.{enabled num_beams length_penalty early_stopping}
        pytorch.assisted_generation.{model num_tokens}
    """,
    "vllm": """
        vllm.{max_num_seqs max_num_batched_tokens max_model_len gpu_memory_utilization swap_space cpu_offload_gb
            tensor_parallel_size pipeline_parallel_size distributed_backend enable_prefix_caching enable_chunked_prefill
            enforce_eager disable_custom_all_reduce kv_cache_dtype block_size load_format quantization min_p logprobs
            logit_bias extra}
        vllm.attention.{backend flash_version disable_sliding_window}
        vllm.speculative.{model num_tokens method prompt_lookup_min prompt_lookup_max draft_tp_size}
        vllm.lora.{enabled max_loras max_rank}
    """,
    "tensorrt": """
        tensorrt.{engine_path engine_cache_dir force_rebuild max_batch_size max_input_len max_output_len max_num_tokens
            builder_opt_level tp_size pp_size quantization kv_cache_type enable_chunked_context enable_kv_cache_reuse
            gpu_memory_utilization draft_model num_draft_tokens extra_build_args extra_runtime_args}
        tensorrt.calibration.{dataset split num_samples max_length}
    """,
}


def names(table: str) -> set[str]:
    """The dotted names in a table, in which `a.{b c}` stands for a.b and a.c."""
    out: set[str] = set()
    for prefix, inner, plain in re.findall(r"(\S+)\.\{([^}]*)\}|(\S+)", table):
        out |= {f"{prefix}.{name}" for name in inner.split()} if inner else {plain}
    return out


def test_names_are_read_from_a_table():
    assert names("a b.{c\n d} e.f.{g}") == {"a", "b.c", "b.d", "e.f.g"}


def test_exactly_the_promised_options_of_a_campaign_are_declared():
    # An experiment written in place has no key of its own in a file.
    assert set(get_campaign_params()) - {"experiments[].inline"} == names(CAMPAIGN_OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exactly_the_promised_options_of_a_backend_are_declared(backend: str):
    assert set(get_experiment_params(backend)) == names(SHARED_OPTIONS) | names(BACKEND_OPTIONS[backend])


def test_without_a_backend_the_options_of_all_are_listed():
    assert set(get_experiment_params()) == set().union(*(get_experiment_params(backend) for backend in BACKENDS))
    with pytest.raises(ConfigurationError, match="there is no backend 'cuda'"):
        get_experiment_params("cuda")


def test_introspection_tells_type_default_bounds_unit_and_description():
    cycles = get_campaign_params()["execution.cycles"]
    assert (cycles["type"], cycles["default"], cycles["required"]) == ("integer", 3, False)
    assert cycles["bounds"] == {"minimum": 1, "maximum": 20}
    assert cycles["description"].startswith("How often")
    threshold = get_campaign_health_check_params()["health_check.gpu_memory_threshold_pct"]
    assert (threshold["default"], threshold["unit"]) == (90.0, "%")
    backends = get_campaign_grid_params()["grid.backends"]
    assert (backends["type"], backends["required"]) == ("list of text", True)
    assert backends["choices"] == list(BACKENDS)
    qps = get_experiment_params()["traffic_simulation.target_qps"]
    assert qps["bounds"] == {"exclusiveMinimum": 0}
    assert get_experiment_params()["vllm.max_num_seqs"]["backends"] == ["vllm"]
    assert get_experiment_params()["model.name"]["reload"] is True
    assert get_experiment_params()["prompts.seed"]["variants"] == ["synthetic", "huggingface"]


def test_sections_are_part_of_the_whole():
    whole = get_campaign_params()
    assert get_campaign_grid_params().items() <= whole.items()
    assert get_campaign_health_check_params().items() <= whole.items()


def test_introspection_is_plain_json():
    for params in (get_campaign_params(), get_experiment_params()):
        assert json.loads(json.dumps(params)) == params


def test_every_option_is_described_in_a_sentence():
    for name, entry in {**get_campaign_params(), **get_experiment_params()}.items():
        assert re.search(r"[.!]$", entry["description"]), name


def test_the_reference_page_is_fresh():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render_page(), "lem config fields --markdown > docs/configuration.md"


def test_the_reference_fits_a_terminal():
    for params in (get_campaign_params(), get_experiment_params()):
        assert max(len(line) for line in render_text(params).splitlines()) <= 80


# JSON Schema


KEYWORDS = {
    *("$schema", "title", "type", "properties", "additionalProperties", "required", "description", "default", "enum"),
    *("anyOf", "oneOf", "items", "minItems", "uniqueItems", "minLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(schema, dict):
        return
    yield schema
    for part in [*schema.get("properties", {}).values(), *schema.get("anyOf", []), *schema.get("oneOf", [])]:
        yield from subschemas(part)
    for key in ("items", "additionalProperties"):
        yield from subschemas(schema.get(key))


@pytest.mark.parametrize("section", [CampaignConfig, ExperimentConfig])
def test_the_schema_has_every_option_and_no_unknown_keyword(section: Any):
    schema = document_schema(section, "t")
    found = list(subschemas(schema))
    assert set().union(*found) <= KEYWORDS
    properties = {name for part in found for name in part.get("properties", {})}
    params = get_campaign_params() if section is CampaignConfig else get_experiment_params()
    assert {name.rpartition(".")[2] for name in params} <= properties
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


def test_the_schema_of_some_options():
    schema = document_schema(ExperimentConfig, "t")["properties"]
    assert schema["max_output_tokens"] == {
        "description": "Tokens to generate at most. Unit: tokens.",
        "type": "integer",
        "minimum": 1,
        "default": 128,
    }
    assert schema["backend"]["enum"] == list(BACKENDS)
    assert schema["random_seed"]["type"] == ["integer", "null"]
    assert schema["model_name"]["description"] == "Another name of model."
    assert "anyOf" not in document_schema(ExperimentConfig, "t")
    assert document_schema(CampaignConfig, "t")["anyOf"] == [
        {"required": ["campaign_name"]},
        {"required": ["_extends"]},
    ]


# Templates


@pytest.mark.parametrize("backend", BACKENDS)
def test_templates_are_valid_as_they_are(tmp_path: Path, backend: str):
    campaign, experiment = tmp_path / "c.yaml", tmp_path / "e.yaml"
    campaign.write_text(campaign_template(backend), encoding="utf-8")
    experiment.write_text(experiment_template(backend), encoding="utf-8")
    config = load_campaign(campaign).config
    assert config.to_dict()["grid"]["backends"] == [backend]
    assert load_experiment(experiment).config.backend == backend


def test_every_option_of_a_template_is_valid_when_it_is_uncommented(tmp_path: Path):
    text = re.sub(r"(?m)^( *)#(?=\S)", r"\1", experiment_template("pytorch"))
    file = tmp_path / "e.yaml"
    file.write_text(text, encoding="utf-8")
    loaded = load_experiment(file)
    assert loaded.config == ExperimentConfig.from_dict({"model": "gpt2", "pytorch": {}})
    assert loaded.provenance["pytorch.beam_search.num_beams"] == "file"


def test_templates_show_every_option():
    shown = set(re.findall(r"(?m)^ *#?([a-z_0-9]+):", campaign_template() + experiment_template("vllm")))
    wanted = {*get_campaign_params(), *get_experiment_params("vllm")}
    missing = {
        name.rpartition(".")[2] for name in wanted if not name.startswith(("prompts.", "experiments", "dataset"))
    }
    assert missing - shown == {"name", "revision", "tokenizer", "adapter", "trust_remote_code"}


def test_templates_fit_a_terminal():
    for text in (campaign_template(), *map(experiment_template, BACKENDS)):
        assert max(len(line) for line in text.splitlines()) <= 80


# YAML as lem writes it


@pytest.mark.parametrize(
    "value",
    [
        "x",
        "no",
        "on",
        "12:30",
        "1e3",
        "",
        " x",
        "a: b",
        "# c",
        "~",
        "true",
        "5",
        "a/b c.d",
        "é",
        '"',
        "-",
        "@x",
        "${A}",
    ],
)
def test_text_written_is_read_back(value: str):
    assert parse_value(yaml_scalar(value).replace("${", "$${"), {}, "v") == value


@pytest.mark.parametrize("value", [None, True, 3, 0.5, 1e300, 3.0, [], [1, ["no"]], {"a": None, "on": [1]}])
def test_values_written_are_read_back(value: Any):
    assert parse_value(yaml_scalar(value), {}, "v") == value


def test_yaml_is_aligned_with_its_comments():
    text = render_yaml({"a": 1, "b": {"long_name": [1, 2]}, "c": {}}, {("a",): "x", ("b", "long_name"): "y"})
    assert text == "a: 1                 # x\nb:\n  long_name: [1, 2]  # y\nc: {}\n"
