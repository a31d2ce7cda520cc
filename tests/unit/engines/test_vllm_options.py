"""What an experiment asks for in vLLM's words, and whether the engine has it afterwards."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.config.option import walk
from lem.engines.common import Folders
from lem.engines.vllm.options import (
    OPTIONS,
    SAMPLING_OPTIONS,
    EngineFacts,
    describe_effective,
    effective_options,
    engine_arguments,
    idle_options,
    refuse_differences,
    sampling_settings,
    seed_of,
)

SAMPLING = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}


def experiment(section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "backend": "vllm", "vllm": section or {}, **options})


def arguments(section: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return engine_arguments(experiment(section, **options), Folders("/models/m"), 7)


def test_every_option_of_the_section_has_a_place() -> None:
    declared = {key for key, _item, _section in walk(VllmConfig)}
    assert declared == {*OPTIONS, *SAMPLING_OPTIONS, "extra"}


def test_what_is_left_out_is_left_to_the_engine() -> None:
    always = {
        "model": "/models/m",
        "dtype": "float16",
        "seed": 7,
        "trust_remote_code": False,
        "disable_log_stats": False,
    }
    given = {"max_model_len": 512 + 128, "max_num_seqs": 256, "gpu_memory_utilization": 0.9, "disable_log_stats": False}
    assert arguments() == {**always, **given}


NGRAMS = {"method": "ngram", "num_tokens": 5, "prompt_lookup_max": 4}
NGRAM_ARGUMENTS = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
ATTENTION_ARGUMENTS = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
ROOM, ROOM_ARGUMENTS = {"max_loras": 2, "max_rank": 8}, {"max_loras": 2, "max_lora_rank": 8}
COMPILED = {"compilation_config": {"mode": 0}}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"distributed_backend": "mp"}, {"distributed_executor_backend": "mp"}),
        ({"attention": {"disable_sliding_window": True}}, {"disable_sliding_window": True}),
        ({"attention": {"backend": "FLASH_ATTN", "flash_version": 3}}, {"attention_config": ATTENTION_ARGUMENTS}),
        ({"speculative": NGRAMS}, {"speculative_config": NGRAM_ARGUMENTS}),
        ({"lora": {"enabled": True, **ROOM}}, {"enable_lora": True, **ROOM_ARGUMENTS}),
        ({"extra": COMPILED}, COMPILED),
    ],
)
def test_options_become_arguments(section: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value for name, value in arguments(section).items() if name not in arguments()} == expected


def test_lengths_and_room_for_an_adapter_follow_from_the_experiment() -> None:
    assert arguments(max_input_tokens=10, max_output_tokens=5)["max_model_len"] == 15
    assert arguments({"max_model_len": 99}, max_input_tokens=10)["max_model_len"] == 99
    assert arguments(model={"name": "m", "adapter": "lora"})["enable_lora"] is True


def test_a_drafting_model_and_a_tokenizer_are_given_as_folders() -> None:
    config = experiment({"speculative": {"model": "small", "num_tokens": 3}}, model={"name": "m", "tokenizer": "t"})
    made = engine_arguments(config, Folders("/models/m", "/models/t", "/models/small"), 7)
    assert made["speculative_config"] == {"model": "/models/small", "num_speculative_tokens": 3}
    assert made["tokenizer"] == "/models/t"


def test_sampling_values_are_the_decoders() -> None:
    settings = sampling_settings(experiment({"min_p": 0.1}, decoder={**SAMPLING, "repetition_penalty": 1.2}))
    expected = {"temperature": 0.7, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert {name: settings[name] for name in expected} == expected
    assert sampling_settings(experiment(decoder={"top_k": 5}))["top_k"] == 5
    greedy = sampling_settings(experiment({"min_p": 0.5}, decoder={"do_sample": False, "temperature": 0.7}))
    assert greedy["temperature"] == 0.0
    assert not {"top_k", "top_p", "min_p"} & set(greedy)


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


# After the load

FACTS = EngineFacts("0.32.0", frozenset(), {}, "cuda", {"VLLM_USE_X": "1"})
EFFECTIVE = {
    "temperature": 0.7,
    "top_k": -1,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "logprobs": None,
    "logit_bias": {17: 2.5},
}


class AttentionBackend(enum.Enum):
    FLASH_ATTN = "path.of.a.class"


class Dtype:
    """As torch's are: known by their text."""

    def __init__(self, name: str = "float16") -> None:
        self.name = name

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass
class CacheConfig:
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    num_gpu_blocks: int = 100
    hf_token: str = "hunter2hunter2"
    download_path: str = "/tmp/x"
    names: frozenset[str] = frozenset({"b", "a"})
    opaque: Any = field(default_factory=object)


def engine(**changes: Any) -> Any:
    """A VllmConfig as it comes out for the defaults; `changes` name a field by `part__field`."""
    window = SimpleNamespace(sliding_window=None)
    parts: dict[str, Any] = {
        "model_config": {"max_model_len": 640, "enforce_eager": False, "quantization": None, "dtype": Dtype()}
        | {"disable_sliding_window": False, "hf_text_config": window},
        "scheduler_config": {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "enable_chunked_prefill": True}
        | {"async_scheduling": False},
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "disable_custom_all_reduce": True}
        | {"distributed_executor_backend": "uni"},
        "load_config": {"load_format": "auto"},
        "attention_config": {"backend": None, "flash_attn_version": None},
        "offload_config": {"uva": SimpleNamespace(cpu_offload_gb=0.0)},
    }
    made = SimpleNamespace(**{name: SimpleNamespace(**fields) for name, fields in parts.items()})
    made.cache_config, made.speculative_config, made.lora_config = CacheConfig(), None, None
    for name, value in changes.items():
        part, _, item = name.partition("__")
        setattr(getattr(made, part) if item else made, item or part, value)
    return made


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ({}, {"scheduler_config__max_num_seqs": 128}, "vllm.max_num_seqs: 256 became 128"),
        ({"block_size": 32}, {}, "vllm.block_size: 32 became 16"),
        ({"enable_prefix_caching": False}, {}, "vllm.enable_prefix_caching: False became True"),
        ({"kv_cache_dtype": "fp8"}, {}, "vllm.kv_cache_dtype: fp8 became auto"),
        ({"quantization": "awq"}, {"model_config__quantization": "awq_marlin"}, "awq became awq_marlin"),
        ({"lora": {"enabled": True}}, {}, "vllm.lora.enabled: True became False"),
        ({"speculative": {"method": "ngram"}}, {}, "vllm.speculative.method: ngram became None"),
        ({"extra": {"async_scheduling": True}}, {}, "vllm.extra.async_scheduling: True became False"),
        ({}, {"model_config__dtype": Dtype("float32")}, "fp_precision: float16 became float32"),
        (
            {"attention": {"disable_sliding_window": True}},
            {"model_config__disable_sliding_window": True},
            "no sliding window",
        ),
    ],
)
def test_a_silent_change_is_refused(section: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionRefused) as caught:
        refuse_differences(experiment(section), engine(**changes), FACTS)
    assert told in caught.value.message
    assert "vLLM 0.32.0 on cuda" in caught.value.message


WINDOW = {
    "model_config__disable_sliding_window": True,
    "model_config__hf_text_config": SimpleNamespace(sliding_window=4096),
}


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ({}, {}),
        ({"kv_cache_dtype": "auto"}, {"cache_config__cache_dtype": "fp8"}),
        ({"attention": {"backend": "flash_attn"}}, {"attention_config__backend": AttentionBackend.FLASH_ATTN}),
        ({"attention": {"disable_sliding_window": True}}, WINDOW),
        ({"extra": {"unheard_of": 5}}, {}),
        ({"extra": COMPILED}, {}),
    ],
)
def test_what_took_effect_or_was_left_to_the_engine_is_not_refused(section: Any, changes: Any) -> None:
    refuse_differences(experiment(section), engine(**changes), FACTS)


def test_a_drafting_model_is_told_by_the_name_it_was_given() -> None:
    drafter = SimpleNamespace(model="/cache/snapshots/abc", num_speculative_tokens=3)
    config = experiment({"speculative": {"model": "small", "num_tokens": 3}})
    refuse_differences(config, engine(speculative_config=drafter), FACTS)
    assert effective_options(config, engine(speculative_config=drafter))["speculative.model"] == "small"


def test_the_record_lays_effective_options_under_the_names_of_the_requested_ones() -> None:
    config = experiment({"min_p": 0.1, "logit_bias": {"17": 2.5}}, decoder=SAMPLING)
    told = describe_effective(config, engine(), EFFECTIVE, FACTS)
    expected = {"block_size": 16, "min_p": 0.1, "logit_bias": {"17": 2.5}}
    assert {name: told["vllm"][name] for name in expected} == expected
    assert told["vllm"]["attention"]["disable_sliding_window"] is False
    assert told["decoder"] == {"do_sample": True, "repetition_penalty": 1.0, **SAMPLING}
    assert (told["fp_precision"], told["ignore_eos"]) == ("float16", True)
    assert told["environment"] == {"VLLM_USE_X": "1"}
    # Greedy decoding ignores sampling values.
    greedy = experiment({"min_p": 0.1}, decoder={"preset": "deterministic"})
    told = describe_effective(greedy, engine(), {**EFFECTIVE, "temperature": 0.0}, FACTS)
    assert (told["vllm"]["min_p"], told["decoder"]["top_p"], told["decoder"]["temperature"]) == (None, None, 0.0)


def test_the_rest_is_told_as_json_without_secrets_and_places() -> None:
    told = describe_effective(experiment(), engine(), EFFECTIVE, FACTS)
    kept = {"block_size": 16, "gpu_memory_utilization": 0.9, "cache_dtype": "auto", "enable_prefix_caching": True}
    assert told["engine"]["cache_config"] == {**kept, "num_gpu_blocks": 100, "names": ["a", "b"]}
    assert "hunter2" not in json.dumps(told)
