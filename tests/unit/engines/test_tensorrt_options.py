"""What an experiment asks for in TensorRT-LLM's words, and of a checkpoint, which is taken as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.common import Folders
from lem.engines.tensorrt.options import (
    EngineFacts,
    check_checkpoint,
    documents_of,
    engine_arguments,
    quantization_of,
    vocabulary_of,
)

FACTS = EngineFacts("1.3.0", frozenset({"max_input_len", "return_perf_metrics"}), {}, frozenset(), has_penalties=True)

GREEDY = {"decoder": {"preset": "deterministic"}}


def experiment(section: dict[str, Any] | None = None, **options: Any) -> ExperimentConfig:
    given = {"model": "m", "backend": "tensorrt", "tensorrt": section or {}, **GREEDY, **options}
    return ExperimentConfig.from_dict(given)


def made(section: dict[str, Any] | None = None, facts: EngineFacts = FACTS, **options: Any) -> dict[str, Any]:
    return engine_arguments(experiment(section, **options), facts, Folders("/m"))


ALWAYS = {"model": "/m", "dtype": "float16", "trust_remote_code": False, "max_seq_len": 512 + 128, "max_batch_size": 8}
CACHE = {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False}
KEPT = {"enable_kv_cache_reuse": True, "kv_cache_type": "fp8"}


def test_options_become_documented_arguments() -> None:
    section = {"max_batch_size": 4, "max_num_tokens": 64, "tp_size": 2, "extra_runtime_args": {"attn_backend": "X"}}
    assert made(section, max_input_tokens=10, max_output_tokens=5) == {
        **ALWAYS,
        "max_batch_size": 4,
        "max_num_tokens": 64,
        "tensor_parallel_size": 2,
        "attn_backend": "X",
        "max_input_len": 10,
        "max_seq_len": 15,
        "return_perf_metrics": True,
        "kv_cache_config": CACHE,
    }
    # Prompts are not kept unless that is asked for.
    assert made(KEPT)["kv_cache_config"] == {**CACHE, "enable_block_reuse": True, "dtype": "fp8"}


def test_what_lem_can_do_without_is_left_out_where_it_is_unknown() -> None:
    assert made(facts=dataclasses.replace(FACTS, arguments=frozenset())) == {**ALWAYS, "kv_cache_config": CACHE}


# Checkpoints


def check(documents: dict[str, Any], section: dict[str, Any] | None = None, **options: Any) -> None:
    given = {"model": "m", "backend": "tensorrt", "tensorrt": section or {}, **options}
    check_checkpoint(ExperimentConfig.from_dict(given), documents, FACTS)


def checkpoint(algorithm: str | None = None, **described: Any) -> dict[str, Any]:
    documents = {"config.json": {"dtype": "float16", **described}}
    return {**documents, "hf_quant_config.json": {"quantization": {"quant_algo": algorithm}}}


@pytest.mark.parametrize(
    ("wanted", "found", "is_good"),
    [
        (None, None, True),
        (None, "FP8", True),
        ("none", None, True),
        ("none", "FP8", False),
        ("fp8", "FP8", True),
        ("fp8", "FP8_BLOCK_SCALES", True),
        ("fp8", None, False),
        ("fp8", "W4A16_AWQ", False),
        ("int4_awq", "W4A16_AWQ", True),
        ("int4_awq", "awq", True),
        ("int4_gptq", "gptq", True),
        ("int8_sq", "W8A8_SQ_PER_CHANNEL", True),
        ("int8_weight_only", "W8A16", True),
    ],
)
def test_a_checkpoint_must_be_quantized_as_asked_for(wanted: str | None, found: str | None, is_good: bool) -> None:
    section = {} if wanted is None else {"quantization": wanted}
    if is_good:
        check(checkpoint(found), section)
        return
    with pytest.raises(OptionRefused, match=r"tensorrt\.quantization") as caught:
        check(checkpoint(found), section)
    assert ("not quantized" if found is None else found) in caught.value.message


@pytest.mark.parametrize(
    ("documents", "found"),
    [
        ({}, None),
        ({"config.json": {"model_type": "llama"}}, None),
        ({"config.json": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}, "config.json": {}}, "FP8"),
        ({"hf_quant_config.json": {"quantization": {"quant_algo": None}}}, None),
    ],
)
def test_a_checkpoint_tells_its_quantization(documents: dict[str, Any], found: str | None) -> None:
    assert quantization_of(documents) == found


@pytest.mark.parametrize(
    ("described", "found"),
    [
        ({"dtype": "bfloat16"}, "is bfloat16"),
        ({"torch_dtype": "bfloat16"}, "is bfloat16"),
        ({"torch_dtype": "torch.float32"}, "is float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "is bfloat16"),
        ({}, "has no type, so it is bfloat16"),
    ],
)
def test_weights_are_of_the_type_of_the_checkpoint(described: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionRefused, match=f"fp_precision: float16: m {found}") as caught:
        check({"config.json": described}, fp_precision="float16")
    assert "TensorRT-LLM 1.3.0" in caught.value.message
    if "bfloat16" in found:
        check({"config.json": described}, fp_precision="bfloat16")


def test_code_of_a_checkpoint_is_not_run_unasked() -> None:
    own_code = checkpoint(auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(OptionRefused, match=r"model\.trust_remote_code: false: m contains code"):
        check(own_code)
    check(own_code, model={"name": "m", "trust_remote_code": True})


def test_documents_that_are_absent_or_broken_are_left_out(tmp_path: Path) -> None:
    assert documents_of(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"dtype": "float16"}', encoding="utf-8")
    (tmp_path / "hf_quant_config.json").write_text("{", encoding="utf-8")
    assert documents_of(tmp_path) == {"config.json": {"dtype": "float16"}}


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("config.json", "[1]", "config.json: expected an object, got [1]"),
        ("config.json", '{"quantization_config": "awq"}', "config.json: quantization_config: expected an object"),
        ("config.json", '{"text_config": [1]}', "config.json: text_config: expected an object, got [1]"),
        ("hf_quant_config.json", '{"quantization": "FP8"}', "hf_quant_config.json: quantization: expected an object"),
    ],
)
def test_a_document_of_another_shape_is_an_error_of_the_checkpoint(
    tmp_path: Path, name: str, text: str, where: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EngineError) as caught:
        documents_of(tmp_path)
    assert f"{tmp_path}/{where}" in caught.value.message
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


@pytest.mark.parametrize("described", [{"dtype": 7}, {"quantization_config": None}, {"vocab_size": "many"}])
def test_values_of_another_type_are_shown_or_left_out(described: dict[str, Any]) -> None:
    documents = {"config.json": described}
    assert (quantization_of(documents), vocabulary_of(documents)) == (None, None)
    with pytest.raises(OptionRefused, match="fp_precision: float16"):
        check(documents, fp_precision="float16")
