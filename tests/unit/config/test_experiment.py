"""An experiment's configuration."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.backends import BACKENDS, PRESETS, PyTorchConfig, TensorRTConfig, VllmConfig, find_preset
from lem.config.campaign_config import CampaignNotificationConfig
from lem.config.experiment import ExperimentConfig, ProgramConfig
from lem.config.kinds import ConfigProblems, dotted
from lem.config.option import nest
from lem.config.sections import (
    DATASET_ALIASES,
    DatasetConfig,
    DecoderConfig,
    FilePrompts,
    HuggingFacePrompts,
    SyntheticPrompts,
)

ROOT = Path(__file__).resolve().parents[3]


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def problems(**options: Any) -> list[str]:
    """The option of each problem, and its code where it has one."""
    with pytest.raises(ConfigProblems) as caught:
        experiment(**options)
    found = caught.value.problems
    return [f"{dotted(item.path)}{f' {item.reason.code}' if item.reason is not None else ''}" for item in found]


@pytest.mark.parametrize(
    ("option", "accepted", "refused"),
    [
        ("gpus", (0, [0], ["0"], [], None, "GPU-8c7a11f2-33d0"), (-1, "first", [0, 0], 1.5)),
        ("random_seed", (0, None, 2**32 - 1), (-1, 2**32)),
        ("pytorch.torch_compile", (False, "default"), (True, "fast")),
        ("pytorch.max_memory", ({0: "10GiB", "cpu": "1.5 GB"},), ({0: "10"}, ["10GiB"])),
        ("vllm.logit_bias", ({"15": 1}, {15: -100}), ({"a": 1}, {"1": 101})),
    ],
)
def test_values_of_a_form(option: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    section = option.partition(".")[0]
    backend = {"backend": section} if section in BACKENDS else {}
    for value in accepted:
        experiment(**{**backend, **nest(option, value)})
    for value in refused:
        assert problems(**{**backend, **nest(option, value)})[0].startswith(section), value


# Prompts


def test_a_dataset_by_alias_or_in_full():
    assert experiment(dataset="alpaca").dataset == DatasetConfig(name="alpaca")
    assert experiment(dataset={"name": "alpaca", "sample_size": 3}).dataset == DatasetConfig("alpaca", 3)
    assert set(DATASET_ALIASES) == {"ai_energy_score", "alpaca", "sharegpt", "gsm8k", "mmlu"}
    assert DATASET_ALIASES["mmlu"].split == "test"


def test_prompts_by_type():
    assert experiment(prompts={"type": "file", "path": "p.txt"}).prompts == FilePrompts(path="p.txt")
    assert experiment(prompts={"type": "synthetic", "input_tokens": 8}).prompts == SyntheticPrompts(input_tokens=8)
    assert experiment(prompts={"type": "huggingface", "dataset": "d"}).prompts == HuggingFacePrompts(dataset="d")
    assert experiment(prompts="p.txt").prompts == FilePrompts(path="p.txt")
    for prompts in ({"type": "file", "path": "p"}, {"type": "synthetic"}, {"type": "huggingface", "dataset": "d"}):
        assert (
            experiment(prompts={**prompts, "num_samples": 5}).prompts
            == experiment(prompts={**prompts, "sample_size": 5}).prompts
        )
    assert experiment(dataset={"name": "d", "num_samples": 5}).dataset == DatasetConfig(name="d", sample_size=5)
    with pytest.raises(ConfigProblems, match="duplicate option: sample_size is another name of num_samples"):
        experiment(dataset={"name": "d", "num_samples": 5, "sample_size": 5})
    assert problems(prompts=["p.txt"]) == ["prompts"]
    assert problems(prompts={"type": "sql"}) == ["prompts.type"]
    assert problems(prompts={"type": "file"}) == ["prompts.path"]


# Decoder


def test_the_preset_of_ai_energy_score_is_its_rule_for_text_generation() -> None:
    config = ExperimentConfig.from_dict({"model": "any", **find_preset("ai-energy-score").values})
    assert config.dataset is not None
    assert (DATASET_ALIASES[config.dataset.name].path, config.dataset.sample_size) == (
        "AIEnergyScore/text_generation",
        1000,
    )
    assert (config.min_output_tokens, config.max_output_tokens) == (10, 10)
    assert (config.backend, getattr(config.section, "batch_size", None)) == ("pytorch", 1)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("deterministic", (0.0, False, 1.0, 1.0)),
        ("standard", (1.0, True, 0.95, 1.0)),
        ("creative", (0.8, True, 0.9, 1.1)),
        ("factual", (0.3, True, 1.0, 1.0)),
        (None, (1.0, True, 1.0, 1.0)),
    ],
)
def test_decoder_presets(preset: str | None, expected: tuple[Any, ...]):
    decoder = DecoderConfig(preset=preset)
    assert (decoder.temperature, decoder.do_sample, decoder.top_p, decoder.repetition_penalty) == expected


def test_explicit_values_win_over_a_preset_even_when_they_equal_the_default():
    decoder = DecoderConfig.from_dict({"preset": "creative", "temperature": 1.0, "top_p": 0.5})
    assert (decoder.temperature, decoder.top_p, decoder.repetition_penalty) == (1.0, 0.5, 1.1)


def test_temperature_decides_about_sampling_unless_told_otherwise():
    assert DecoderConfig(temperature=0).is_greedy
    assert not DecoderConfig(preset="deterministic", temperature=0.7).is_greedy
    assert DecoderConfig(temperature=0.7, do_sample=False).is_greedy
    assert problems(decoder={"temperature": 0, "do_sample": True}) == ["decoder.do_sample"]


# Sections, names, keys


def test_the_section_of_the_chosen_backend():
    assert experiment().section == PyTorchConfig()
    assert experiment(backend="vllm", vllm={"max_num_seqs": 8}).section == VllmConfig(max_num_seqs=8)
    assert experiment(backend="tensorrt").section == TensorRTConfig()


def test_names():
    assert experiment(config_name="mine").name == "mine"
    assert experiment(model="org/Llama-3-8B").name == "Llama-3-8B-pytorch"
    assert experiment(model="models/tiny/").name == "tiny-pytorch"


def test_traffic_that_is_not_switched_on_is_refused():
    assert problems(traffic_simulation={"target_qps": 5}) == ["traffic_simulation.target_qps"]
    assert not experiment(traffic_simulation={"target_qps": 5, "enabled": False}).traffic_simulation.enabled


SAMPLES: tuple[dict[str, Any], ...] = (
    {},
    {"gpus": [], "random_seed": None, "decoder": {"preset": "creative", "top_k": 3}},
    {"prompts": {"type": "file", "path": "p"}, "extra_metadata": {"a": [1, {"b": None}]}},
    {"prompts": {"type": "huggingface", "dataset": "d", "shuffle": True}},
    {"dataset": "mmlu", "gpus": "GPU-1", "warmup": {"enabled": False}},
    {"backend": "vllm", "vllm": {"logit_bias": {3: 1}, "speculative": {"method": "ngram"}, "extra": {"a": 1}}},
    {"backend": "tensorrt", "tensorrt": {"quantization": "int4_awq", "calibration": {"num_samples": 3}}},
    {"pytorch": {"max_memory": {0: "1GiB"}, "beam_search": {"enabled": True, "num_beams": 4}}},
)


@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_round_trip(options: dict[str, Any]):
    config = experiment(**options)
    again = ExperimentConfig.from_dict(config.to_dict())
    assert again == config
    assert again.identity() == config.identity()
    assert again.engine_key() == config.engine_key()


@pytest.mark.parametrize(
    ("options", "can_change_numbers", "needs_load"),
    [
        ({"config_name": "x"}, False, False),
        ({"io": {"results_dir": "r"}}, False, False),
        ({"extra_metadata": {"a": 1}}, False, False),
        ({"save_outputs": True}, False, False),
        ({"num_cycles": 2}, False, False),
        ({"timeseries": {"save": False}}, False, False),
        ({"measurement": {"grid_g_per_kwh": 300.0, "pue": 1.2, "price_per_kwh": 0.3}}, False, False),
        ({"baseline": {"cache_ttl_sec": 1.0}}, False, False),
        ({"warmup": {"timeout_seconds": 5.0}}, False, False),
        ({"traffic_simulation": {"enabled": False, "slo": {"ttft_ms": 200, "attainment_pct": 90}}}, False, False),
        ({"traffic_simulation": {"enabled": False, "burstiness": 0.5}}, True, False),
        ({"pytorch": {}}, False, False),
        ({"decoder": {"preset": "standard", "top_p": 1.0}}, False, False),
        ({"random_seed": 1}, True, False),
        ({"max_output_tokens": 9}, True, False),
        ({"warmup": {"enabled": False}}, True, False),
        ({"measurement": {"min_window_sec": 1}}, True, False),
        ({"decoder": {"preset": "deterministic"}}, True, False),
        ({"pytorch": {"batch_size": 2}}, True, False),
        ({"pytorch": {"extra": {"a": 1}}}, True, False),
        ({"pytorch": {"assisted_generation": {"num_tokens": 3}}}, True, False),
        ({"prompts": {"type": "synthetic", "input_tokens": 9}}, True, False),
        ({"model": "opt"}, True, True),
        ({"model": {"name": "gpt2", "revision": "abc"}}, True, True),
        ({"fp_precision": "bfloat16"}, True, True),
        ({"gpus": [1]}, True, True),
        ({"pytorch": {"attn_implementation": "eager"}}, True, True),
        ({"pytorch": {"load_in_4bit": True}}, True, True),
        ({"pytorch": {"assisted_generation": {"model": "tiny"}}}, True, True),
        ({"backend": "vllm"}, True, True),
    ],
    ids=str,
)
def test_identity_and_engine_key(options: dict[str, Any], can_change_numbers: bool, needs_load: bool) -> None:
    config, base = experiment(**options), experiment()
    assert (config.identity() != base.identity(), config.engine_key() != base.engine_key()) == (
        can_change_numbers,
        needs_load,
    )
    assert int(config.engine_key(), 16) < 16**12
    greedy = {"temperature": 0}
    kept = experiment(decoder=greedy, measurement={"agreement": True})
    assert kept.identity() == experiment(decoder=greedy).identity()
    one, two = ({"type": "file", "path": path} for path in ("a/p.txt", "b/p.txt"))
    assert experiment(prompts=one).identity() == experiment(prompts=two).identity()


def test_lengths_that_engines_are_built_for_are_derived():
    def key(**options: Any) -> str:
        return experiment(backend="vllm", **options).engine_key()

    assert key(max_input_tokens=10, max_output_tokens=20) == key(max_input_tokens=20, max_output_tokens=10)
    assert key(max_output_tokens=20) != key(max_output_tokens=30)
    fixed = {"max_model_len": 4096}
    assert key(max_output_tokens=20, vllm=fixed) == key(max_output_tokens=30, vllm=fixed)
    built = [experiment(backend="tensorrt", max_input_tokens=tokens).engine_key() for tokens in (10, 20)]
    assert built[0] != built[1]


# Combinations


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_output_tokens": 9, "max_output_tokens": 8}, "min_output_tokens above_limit"),
        ({"vllm": {}}, "vllm other_backend"),
        ({"backend": "vllm", "pytorch": {"batch_size": 2}}, "pytorch other_backend"),
        ({"backend": "tensorrt", "fp_precision": "float32"}, "fp_precision tensorrt_precision"),
        ({"backend": "tensorrt", "gpus": []}, "gpus tensorrt_gpu"),
        ({"measurement": {"agreement": True}}, "measurement.agreement agreement_sampled"),
        (
            {"measurement": {"agreement": True}, "decoder": {"preset": "factual"}},
            "measurement.agreement agreement_sampled",
        ),
        ({"pytorch": {"load_in_4bit": True, "load_in_8bit": True}}, "pytorch.load_in_8bit"),
        ({"warmup": {"window_size": 9, "max_prompts": 8}}, "warmup.window_size above_limit"),
        ({"warmup": {"min_prompts": 9, "max_prompts": 8}}, "warmup.min_prompts above_limit"),
        (
            {"backend": "vllm", "gpus": [0], "vllm": {"tensor_parallel_size": 2}},
            "vllm.tensor_parallel_size gpus_not_named",
        ),
        (
            {"backend": "tensorrt", "gpus": [0, 1], "tensorrt": {"tp_size": 2, "pp_size": 2}},
            "tensorrt.tp_size gpus_not_named",
        ),
        ({"gpus": [0, 1]}, "gpus pytorch_one_gpu"),
        ({"pytorch": {"parallelism_degree": 2}}, "pytorch.parallelism_degree"),
        ({"pytorch": {"parallelism_strategy": "device_map"}}, "pytorch.parallelism_strategy"),
        ({"dataset": "alpaca", "prompts": {"type": "synthetic"}}, "prompts two_prompt_sources"),
        (
            {"prompts": {"type": "synthetic", "input_tokens": 9}, "max_input_tokens": 8},
            "prompts.input_tokens above_limit",
        ),
        ({"prompts": {"type": "synthetic", "output_tokens": 129}}, "prompts.output_tokens above_limit"),
        (
            {"streaming": True, "pytorch": {"beam_search": {"enabled": True, "num_beams": 2}}},
            "pytorch.beam_search beams_untimed",
        ),
        ({"pytorch": {"beam_search": {"enabled": True}}}, "pytorch.beam_search.num_beams"),
        ({"pytorch": {"bnb_4bit_quant_type": "nf4"}}, "pytorch.bnb_4bit_quant_type"),
        ({"pytorch": {"torch_compile_backend": "inductor"}}, "pytorch.torch_compile_backend"),
        ({"pytorch": {"batching_strategy": "dynamic", "batch_size": 8}}, "pytorch.batching_strategy"),
        ({"pytorch": {"max_tokens_per_batch": 99}}, "pytorch.max_tokens_per_batch"),
        ({"backend": "vllm", "vllm": {"speculative": {"num_tokens": 3}}}, "vllm.speculative.num_tokens"),
        ({"backend": "tensorrt", "tensorrt": {"calibration": {"num_samples": 3}}}, "tensorrt.calibration"),
        ({"backend": "tensorrt", "tensorrt": {"num_draft_tokens": 3}}, "tensorrt.num_draft_tokens"),
        (
            {"measurement": {"phases": True}, "traffic_simulation": {"enabled": True}},
            "measurement.phases phases_under_traffic",
        ),
        ({"measurement": {"phases": True, "energy": "none"}}, "measurement.phases needs_energy"),
        ({"baseline": {"required": True}, "measurement": {"energy": "none"}}, "baseline.required needs_energy"),
        ({"baseline": {"required": True}, "measurement": {"energy": "tdp_estimate"}}, "baseline.required needs_rest"),
        ({"baseline": {"required": True, "enabled": False}}, "baseline.required needs_baseline"),
        ({"measurement": {"cpu_tdp_w": 65}}, "measurement.cpu_tdp_w tdp_unused"),
    ],
)
def test_what_cannot_run_as_written_is_refused(options: dict[str, Any], problem: str) -> None:
    assert problems(**options) == [problem]


# Presets


def test_presets_are_greedy_and_an_unknown_one_is_refused_with_the_nearest() -> None:
    assert all(experiment(**preset.values).decoder.is_greedy for preset in PRESETS.values())
    with pytest.raises(ConfigurationError, match="quick-test") as caught:
        find_preset("quicktest")
    assert "vllm-throughput" in caught.value.hint


def test_settings_of_gpus_need_a_gpu_and_samples_that_show_them() -> None:
    assert problems(gpus=[], gpu={"power_limit_w": 250}) == ["gpu.power_limit_w needs_a_gpu"]
    unseen = {"gpu": {"lock_clock_mhz": 1005}, "timeseries": {"enabled": False}}
    assert problems(**unseen) == ["gpu.lock_clock_mhz needs_timeseries"]


def test_settings_of_gpus_are_of_the_identity_and_need_no_load() -> None:
    plain, none, limited = experiment(), experiment(gpu={"power_limit_w": None}), experiment(gpu={"power_limit_w": 250})
    assert plain.identity() == none.identity() != limited.identity()
    assert plain.engine_key() == limited.engine_key()


def test_a_value_that_was_refused_is_refused_in_each_experiment_that_shares_it() -> None:
    known: dict[Any, Any] = {}
    shared = {1.5: "no text"}
    for _ in range(2):
        with pytest.raises(ConfigProblems, match="extra_metadata"):
            ExperimentConfig.from_dict({"model": "gpt2", "extra_metadata": shared}, known)


def test_a_mapping_that_was_not_given_is_of_its_own_experiment() -> None:
    first, second = experiment(), experiment()
    first.extra_metadata["k"] = 1  # type: ignore[index]
    assert (second.extra_metadata, experiment().extra_metadata, second.changed()) == ({}, {}, experiment().changed())
    assert not first.is_given("extra_metadata")
    assert experiment(extra_metadata={}).is_given("extra_metadata")


def test_what_has_changed_leaves_out_lists_and_sections_that_are_as_by_default() -> None:
    assert CampaignNotificationConfig().changed() == {}
    assert CampaignNotificationConfig(on=("failure",)).changed() == {"on": ["failure"]}
    assert experiment(max_output_tokens=7).changed().keys() == experiment().changed().keys() | {"max_output_tokens"}
    assert "warmup" not in experiment(warmup={"min_prompts": 5}).changed()
    assert "warmup" in experiment(warmup={"min_prompts": 7}).changed()


def test_a_stored_measurement_that_is_refused_now_is_still_read() -> None:
    stored = {"command": ["true"], "whole_machine": True, "measurement": {"energy": "tdp_estimate"}}
    assert ProgramConfig.from_dict(stored).whole_machine


def test_an_experiment_goes_to_another_process_with_its_defaults() -> None:
    code = "import pickle, sys; it = pickle.load(sys.stdin.buffer); print(it.max_output_tokens, it.backend)"
    data = pickle.dumps(experiment(max_output_tokens=7))
    ended = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=ROOT, check=True)
    assert ended.stdout.decode().split() == ["7", experiment().backend]
