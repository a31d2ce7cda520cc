"""An experiment's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.backends import BACKENDS, PRESETS, PyTorchConfig, TensorRTConfig, VllmConfig, find_preset
from lem.config.experiment import (
    DATASET_ALIASES,
    BaselineConfig,
    DatasetConfig,
    DecoderConfig,
    ExperimentConfig,
    FilePrompts,
    HuggingFacePrompts,
    MeasurementConfig,
    SyntheticPrompts,
    TimeseriesConfig,
    TrafficConfig,
    WarmupConfig,
)
from lem.config.kinds import ConfigProblems, dotted
from lem.config.option import nest


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def problems(**options: Any) -> list[str]:
    """The option of each problem, and its code where it has one."""
    with pytest.raises(ConfigProblems) as caught:
        experiment(**options)
    found = caught.value.problems
    return [f"{dotted(item.path)}{f' {item.reason.code}' if item.reason is not None else ''}" for item in found]


def test_defaults():
    config = experiment()
    assert (config.backend, config.max_input_tokens, config.max_output_tokens) == ("pytorch", 512, 128)
    assert (config.min_output_tokens, config.fp_precision, config.gpus) == (0, "float16", None)
    assert (config.ignore_eos, config.random_seed, config.streaming) == (False, 42, False)
    assert (config.num_cycles, config.save_outputs, config.dataset, config.prompts) == (1, False, None, None)
    assert config.decoder == DecoderConfig()
    assert (config.decoder.temperature, config.decoder.do_sample, config.decoder.top_k) == (1.0, True, 50)
    assert (config.decoder.top_p, config.decoder.repetition_penalty) == (1.0, 1.0)
    assert config.warmup == WarmupConfig(True, True, 0.05, 5, 50, 5, 30.0)
    assert config.baseline == BaselineConfig(True, False, 30.0, 3600.0, 100)
    assert config.timeseries == TimeseriesConfig(True, True, 100)
    assert config.traffic_simulation == TrafficConfig(False, "poisson", 1.0, 1, None)
    assert config.measurement == MeasurementConfig(10.0, "auto", False, None, None, None, None)
    assert config.io.results_dir is None
    assert config.extra_metadata == {}


@pytest.mark.parametrize(
    ("option", "accepted", "refused"),
    [
        ("backend", BACKENDS, ("cuda", None)),
        ("max_input_tokens", (1,), (0, "512")),
        ("max_output_tokens", (1,), (0,)),
        ("min_output_tokens", (0, 128), (-1, 129)),
        ("fp_precision", ("float16", "float32", "bfloat16"), ("fp16", 16)),
        ("random_seed", (0, None, 2**32 - 1), (-1, 2**32)),
        ("num_cycles", (1, 10), (0, 11)),
        ("gpus", (0, [0], ["0"], [], None, "GPU-8c7a11f2-33d0"), (-1, "first", [0, 0], 1.5)),
        ("config_name", ("x", None), ("", 3)),
        ("extra_metadata", ({}, {"a": {"b": [1]}}), ([], "x")),
        ("decoder.temperature", (0, 2), (-0.1, 2.1)),
        ("decoder.top_k", (0,), (-1,)),
        ("decoder.top_p", (0, 1), (-0.1, 1.1)),
        ("decoder.repetition_penalty", (0.1, 10), (0, 11)),
        ("warmup.cv_threshold", (0.001, 1), (0, 1.1)),
        ("warmup.min_prompts", (0, 50), (-1, 51)),
        ("warmup.max_prompts", (5, 200), (201, 4)),
        ("warmup.window_size", (3, 20), (2, 21)),
        ("baseline.duration_sec", (0.5, 120), (0.4, 121)),
        ("baseline.sample_interval_ms", (20, 1000), (19, 1001)),
        ("timeseries.sample_interval_ms", (20, 5000), (19, 5001)),
        ("measurement.energy", ("auto", "nvml", "rapl", "tdp_estimate", "none"), ("cpu",)),
        ("measurement.pue", (1, None), (0.9,)),
        ("measurement.min_window_sec", (0,), (-1,)),
        ("pytorch.batch_size", (1,), (0,)),
        ("pytorch.batching_strategy", ("static", "sorted_static"), ("random",)),
        ("pytorch.torch_compile", (False, "default", "reduce-overhead", "max-autotune"), (True, "fast")),
        ("pytorch.attn_implementation", ("sdpa", "flash_attention_2", "eager"), ("flash",)),
        ("pytorch.max_memory", ({0: "10GiB", "cpu": "1.5 GB"},), ({0: "10"}, ["10GiB"])),
        ("pytorch.min_p", (0, 1), (1.1,)),
        ("vllm.gpu_memory_utilization", (0.5, 0.99), (0.49, 1)),
        ("vllm.kv_cache_dtype", ("auto", "fp8"), ("int8",)),
        ("vllm.logit_bias", ({"15": 1}, {15: -100}), ({"a": 1}, {"1": 101})),
        ("vllm.distributed_backend", ("mp", "ray"), ("nccl",)),
        ("tensorrt.builder_opt_level", (0, 5), (6, -1)),
        ("tensorrt.quantization", ("none", "int4_awq"), ("awq",)),
    ],
)
def test_bounds(option: str, accepted: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    section = option.partition(".")[0]
    backend = {"backend": section} if section in BACKENDS else {}
    for value in accepted:
        experiment(**{**backend, **nest(option, value)})
    for value in refused:
        assert problems(**{**backend, **nest(option, value)})[0].startswith(section), value


def test_options_of_engines_that_are_not_given_are_left_to_the_engine():
    given = {
        "pytorch": ("batch_size", "batching_strategy", "torch_compile"),
        "vllm": ("max_num_seqs", "gpu_memory_utilization"),
        "tensorrt": ("max_batch_size", "gpu_memory_utilization"),
    }
    for kind in (PyTorchConfig, VllmConfig, TensorRTConfig):
        name = kind.__name__.removesuffix("Config").lower()
        plain = {key: value for key, value in kind().to_dict().items() if not isinstance(value, dict)}
        assert {key for key, value in plain.items() if value is not None} == set(given[name])


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
    assert problems(prompts={"type": "sql"}) == ["prompts.type"]
    assert problems(prompts={"type": "file"}) == ["prompts.path"]


# Decoder


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


def test_where_a_prompt_file_is_does_not_change_the_identity() -> None:
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
        ({"baseline": {"required": True, "enabled": False}}, "baseline.required needs_baseline"),
        ({"measurement": {"cpu_tdp_w": 65}}, "measurement.cpu_tdp_w tdp_unused"),
    ],
)
def test_what_cannot_run_as_written_is_refused(options: dict[str, Any], problem: str) -> None:
    assert problems(**options) == [problem]


# Presets


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("quick-test", (64, 32)),
        ("benchmark", (2048, 512)),
        ("throughput", (512, 256)),
        ("vllm-throughput", (2048, 512)),
        ("vllm-speculative", (2048, 256)),
        ("vllm-memory-efficient", (4096, 512)),
        ("vllm-low-latency", (512, 128)),
        ("pytorch-optimized", (2048, 512)),
        ("pytorch-speculative", (2048, 256)),
        ("pytorch-compatible", (512, 128)),
    ],
)
def test_presets_are_greedy_experiments(name: str, tokens: tuple[int, int]) -> None:
    config = experiment(**PRESETS[name].values)
    assert (config.max_input_tokens, config.max_output_tokens, config.decoder.is_greedy) == (*tokens, True)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="quick-test") as caught:
        find_preset("quicktest")
    assert "vllm-throughput" in caught.value.hint
