"""The configuration that vLLM ends up with is told, and refused where it is another than the one asked for."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.common import plain
from lem.engines.vllm.options import (
    OPTIONS,
    EngineFacts,
    describe_effective,
    effective_options,
    refuse_differences,
)

FACTS = EngineFacts("0.32.0", "cuda", frozenset(), environment={"VLLM_USE_X": "1"})
SAMPLING = {
    "temperature": 0.7,
    "top_k": -1,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "logprobs": None,
    "logit_bias": {17: 2.5},
}


class Backend(enum.Enum):
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
    """A VllmConfig as it comes out for the defaults; `changes` name a field by `part.field`."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            max_model_len=640,
            enforce_eager=False,
            quantization=None,
            dtype=Dtype(),
            disable_sliding_window=False,
            hf_text_config=SimpleNamespace(sliding_window=None),
        ),
        "cache_config": CacheConfig(),
        "scheduler_config": SimpleNamespace(
            max_num_seqs=256, max_num_batched_tokens=8192, enable_chunked_prefill=True, async_scheduling=False
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            distributed_executor_backend="uni",
            disable_custom_all_reduce=True,
        ),
        "load_config": SimpleNamespace(load_format="auto"),
        "attention_config": SimpleNamespace(backend=None, flash_attn_version=None),
        "offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=0.0)),
        "speculative_config": None,
        "lora_config": None,
    }
    for name, value in changes.items():
        part, _, item = name.partition("__")
        if item:
            setattr(parts[part], item, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def experiment(section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "backend": "vllm", "vllm": section or {}, **options})


def test_every_engine_option_is_read_back() -> None:
    found = effective_options(experiment(), engine())
    assert set(found) == {*OPTIONS}
    assert found["max_num_batched_tokens"] == 8192
    assert found["cpu_offload_gb"] == 0.0
    assert found["lora.enabled"] is False
    assert found["speculative.num_tokens"] is None


def test_the_engines_own_choices_are_no_difference() -> None:
    refuse_differences(experiment(), engine(), FACTS)
    refuse_differences(experiment({"kv_cache_dtype": "auto"}), engine(cache_config__cache_dtype="fp8"), FACTS)


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
        ({"attention": {"disable_sliding_window": True}}, {"model_config__disable_sliding_window": True}, "no such"),
    ],
)
def test_a_silent_change_is_refused(section: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionRefused) as caught:
        refuse_differences(experiment(section), engine(**changes), FACTS)
    assert told in caught.value.message
    assert "vLLM 0.32.0 on cuda" in caught.value.message


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ({"attention": {"backend": "flash_attn"}}, {"attention_config__backend": Backend.FLASH_ATTN}),
        (
            {"attention": {"disable_sliding_window": True}},
            {
                "model_config__disable_sliding_window": True,
                "model_config__hf_text_config": SimpleNamespace(sliding_window=4096),
            },
        ),
        ({"extra": {"unheard_of": 5}}, {}),
        ({"extra": {"compilation_config": {"mode": 0}}}, {}),
    ],
)
def test_what_took_effect_is_not_refused(section: dict[str, Any], changes: dict[str, Any]) -> None:
    refuse_differences(experiment(section), engine(**changes), FACTS)


def test_a_drafting_model_is_told_by_the_name_it_was_given() -> None:
    drafter = SimpleNamespace(model="/cache/snapshots/abc", num_speculative_tokens=3)
    config = experiment({"speculative": {"model": "small", "num_tokens": 3}})
    refuse_differences(config, engine(speculative_config=drafter), FACTS)
    assert effective_options(config, engine(speculative_config=drafter))["speculative.model"] == "small"


def test_the_record_lays_effective_options_under_the_names_of_the_requested_ones() -> None:
    config = experiment({"min_p": 0.1, "logit_bias": {"17": 2.5}}, decoder={"temperature": 0.7, "top_k": 0})
    told = describe_effective(config, engine(), SAMPLING, FACTS)
    assert told["vllm"]["block_size"] == 16
    assert told["vllm"]["min_p"] == 0.1
    assert told["vllm"]["logit_bias"] == {"17": 2.5}
    assert told["vllm"]["attention"]["disable_sliding_window"] is False
    assert told["decoder"] == {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
    }
    assert told["fp_precision"] == "float16"
    assert told["ignore_eos"] is True
    assert told["environment"] == {"VLLM_USE_X": "1"}


def test_greedy_decoding_looks_at_no_sampling_values() -> None:
    sampling = {**SAMPLING, "temperature": 0.0}
    told = describe_effective(
        experiment({"min_p": 0.1}, decoder={"preset": "deterministic"}), engine(), sampling, FACTS
    )
    assert told["vllm"]["min_p"] is None
    assert told["decoder"]["top_p"] is None
    assert told["decoder"]["temperature"] == 0.0


def test_the_rest_is_told_as_json_without_secrets_and_places() -> None:
    told = describe_effective(experiment(), engine(), SAMPLING, FACTS)
    assert told["engine"]["cache_config"] == {
        "block_size": 16,
        "gpu_memory_utilization": 0.9,
        "cache_dtype": "auto",
        "enable_prefix_caching": True,
        "num_gpu_blocks": 100,
        "names": ["a", "b"],
    }
    assert "hunter2" not in json.dumps(told)


def test_a_long_list_is_kept_whole() -> None:
    sizes = [1, 2, 4, *range(8, 1025, 8)]  # what vLLM captures CUDA graphs for
    assert plain(sizes) == sizes
    assert plain(set(sizes)) == sorted(sizes, key=str)
