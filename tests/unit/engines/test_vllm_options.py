"""What an experiment asks for, in vLLM's words."""

from __future__ import annotations

from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import walk
from lem.engines.vllm.options import (
    OPTIONS,
    SAMPLING_OPTIONS,
    Places,
    engine_arguments,
    given_options,
    idle_options,
    sampling_settings,
    section_of,
    seed_of,
)

SAMPLING = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}


def experiment(section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "backend": "vllm", "vllm": section or {}, **options})


def arguments(section: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return engine_arguments(experiment(section, **options), Places("/models/m"), 7)


def test_every_option_of_the_section_has_a_place() -> None:
    declared = {key for key, _item, _section in walk(VllmConfig)}
    assert declared == {*OPTIONS, *SAMPLING_OPTIONS, "extra"}


def test_what_is_left_out_is_left_to_the_engine() -> None:
    assert arguments() == {
        "model": "/models/m",
        "dtype": "float16",
        "seed": 7,
        "trust_remote_code": False,
        "disable_log_stats": False,
        "max_model_len": 512 + 128,
        "max_num_seqs": 256,
        "gpu_memory_utilization": 0.9,
    }


def test_the_longest_sequence_is_that_of_the_experiment_unless_given() -> None:
    assert arguments(max_input_tokens=10, max_output_tokens=5)["max_model_len"] == 15
    assert arguments({"max_model_len": 99}, max_input_tokens=10)["max_model_len"] == 99


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"distributed_backend": "mp"}, {"distributed_executor_backend": "mp"}),
        ({"attention": {"disable_sliding_window": True}}, {"disable_sliding_window": True}),
        (
            {"attention": {"backend": "FLASH_ATTN", "flash_version": 3}},
            {"attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 3}},
        ),
        (
            {"speculative": {"method": "ngram", "num_tokens": 5, "prompt_lookup_max": 4}},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}},
        ),
        (
            {"lora": {"enabled": True, "max_loras": 2, "max_rank": 8}},
            {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
        ),
        ({"extra": {"compilation_config": {"mode": 0}}}, {"compilation_config": {"mode": 0}}),
    ],
)
def test_options_become_arguments(section: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value for name, value in arguments(section).items() if name not in arguments()} == expected


def test_a_drafting_model_and_a_tokenizer_are_given_as_folders() -> None:
    config = experiment({"speculative": {"model": "small", "num_tokens": 3}}, model={"name": "m", "tokenizer": "t"})
    made = engine_arguments(config, Places("/models/m", "/models/t", "/models/small"), 7)
    assert made["speculative_config"] == {"model": "/models/small", "num_speculative_tokens": 3}
    assert made["tokenizer"] == "/models/t"


def test_an_adapter_makes_room_for_itself() -> None:
    assert "enable_lora" not in arguments()
    assert arguments(model={"name": "m", "adapter": "lora"})["enable_lora"] is True
    assert given_options(experiment(model={"name": "m", "adapter": "lora"}))["lora.enabled"] is True


def test_greedy_decoding_names_no_sampling_values() -> None:
    settings = sampling_settings(experiment({"min_p": 0.5}, decoder={"do_sample": False, "temperature": 0.7}))
    assert settings["temperature"] == 0.0
    assert not {"top_k", "top_p", "min_p"} & set(settings)


def test_sampling_values_are_the_decoders() -> None:
    settings = sampling_settings(experiment({"min_p": 0.1}, decoder={**SAMPLING, "repetition_penalty": 1.2}))
    expected = {"temperature": 0.7, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert {name: settings[name] for name in expected} == expected
    assert sampling_settings(experiment(decoder={"top_k": 5}))["top_k"] == 5


def test_options_of_a_request_reach_it() -> None:
    section = {"logprobs": 3, "logit_bias": {"17": 2.5}}
    settings = sampling_settings(experiment(section, ignore_eos=True))
    assert settings["logprobs"] == 3
    assert settings["logit_bias"] == {17: 2.5}
    assert settings["ignore_eos"] is True
    assert settings["detokenize"] is False


def test_each_request_has_a_seed_of_its_own_while_sampling() -> None:
    assert [seed_of(experiment(decoder=SAMPLING, random_seed=5), index) for index in (0, 3)] == [5, 8]
    assert seed_of(experiment(decoder=SAMPLING, random_seed=None), 3) is None
    assert seed_of(experiment(decoder={"preset": "deterministic"}), 3) is None


def test_what_does_nothing_or_costs_something_is_told() -> None:
    greedy = experiment({"min_p": 0.5}, decoder={"preset": "deterministic"})
    assert idle_options(greedy)[0] == Reason.of("min_p_unused", backend="vllm")
    assert idle_options(experiment(decoder=SAMPLING)) == (Reason.of("vllm_seeded"),)
    assert idle_options(experiment(decoder=SAMPLING, random_seed=None)) == ()


def test_another_backends_experiment_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="pytorch came to vllm"):
        section_of(ExperimentConfig.from_dict({"model": "m"}))
