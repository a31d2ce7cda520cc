"""Rules across fields: what is refused, what is warned about, and what is said only when the GPUs are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lem.config import rules
from lem.config.experiment import ExperimentConfig
from lem.config.problems import ConfigProblems


@dataclass(frozen=True)
class Gpu:
    name: str = "NVIDIA H200"
    compute_capability: tuple[int, int] = (9, 0)
    memory_b: int = 141 * 10**9
    index: int = 0
    uuid: str = "GPU-0"


V100 = Gpu("Tesla V100", (7, 0), 16 * 10**9)
A100 = Gpu("NVIDIA A100", (8, 0), 80 * 10**9)
H200 = Gpu()


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def warnings(*gpus: Gpu, **options: Any) -> list[str]:
    known = gpus or None
    return [str(finding) for finding in rules.warnings(experiment(**options), known)]


def errors(**options: Any) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        experiment(**options)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"min_output_tokens": 9, "max_output_tokens": 8},
            "min_output_tokens: 9 is above max_output_tokens, 8",
        ),
        ({"vllm": {}}, "vllm: has no effect: the backend is pytorch"),
        ({"backend": "vllm", "pytorch": {"batch_size": 2}}, "pytorch: has no effect: the backend is vllm"),
        ({"backend": "tensorrt", "fp_precision": "float32"}, "fp_precision: tensorrt needs float16 or bfloat16"),
        ({"backend": "tensorrt", "gpus": []}, "gpus: tensorrt needs a GPU"),
        (
            {"pytorch": {"load_in_4bit": True, "load_in_8bit": True}},
            "pytorch.load_in_8bit: cannot stand with load_in_4bit: a weight has 4 bits or 8",
        ),
        ({"warmup": {"window_size": 9, "max_prompts": 8}}, "warmup.window_size: 9 is above max_prompts, 8"),
        ({"warmup": {"min_prompts": 9, "max_prompts": 8}}, "warmup.min_prompts: 9 is above max_prompts, 8"),
        (
            {"backend": "vllm", "gpus": [0], "vllm": {"tensor_parallel_size": 2}},
            "vllm.tensor_parallel_size: 2 GPUs are needed, 1 named in gpus",
        ),
        (
            {"backend": "tensorrt", "gpus": [0, 1], "tensorrt": {"tp_size": 2, "pp_size": 2}},
            "tensorrt.tp_size: 4 GPUs are needed, 2 named in gpus",
        ),
        ({"gpus": [0, 1]}, "gpus: pytorch runs on one GPU, 2 are named"),
        (
            {"pytorch": {"parallelism_degree": 2}},
            "pytorch.parallelism_degree: is refused: the pytorch backend was not yet run on two GPUs",
        ),
        (
            {"pytorch": {"parallelism_strategy": "device_map"}},
            "pytorch.parallelism_strategy: is refused: the pytorch backend was not yet run on two GPUs",
        ),
        (
            {"dataset": "alpaca", "prompts": {"type": "synthetic"}},
            "prompts: stands beside dataset: one of them is the source of prompts",
        ),
        (
            {"prompts": {"type": "synthetic", "input_tokens": 9}, "max_input_tokens": 8},
            "prompts.input_tokens: 9 is above max_input_tokens, 8",
        ),
        (
            {"prompts": {"type": "synthetic", "output_tokens": 129}},
            "prompts.output_tokens: 129 is above max_output_tokens, 128",
        ),
        (
            {"streaming": True, "pytorch": {"beam_search": {"enabled": True, "num_beams": 2}}},
            "pytorch.beam_search: cannot stand with streaming or traffic: beams have no token times",
        ),
        (
            {"pytorch": {"beam_search": {"enabled": True}}},
            "pytorch.beam_search.num_beams: is required while beam search is enabled; 4 is usual",
        ),
        (
            {"pytorch": {"bnb_4bit_quant_type": "nf4"}},
            "pytorch.bnb_4bit_quant_type: has no effect without load_in_4bit: true",
        ),
        (
            {"pytorch": {"torch_compile_backend": "inductor"}},
            "pytorch.torch_compile_backend: has no effect without torch_compile",
        ),
        (
            {"pytorch": {"batching_strategy": "dynamic", "batch_size": 8}},
            "pytorch.batching_strategy: dynamic needs max_tokens_per_batch",
        ),
        (
            {"pytorch": {"max_tokens_per_batch": 99}},
            "pytorch.max_tokens_per_batch: has no effect without batching_strategy: dynamic or sorted_dynamic",
        ),
        (
            {"backend": "vllm", "vllm": {"speculative": {"num_tokens": 3}}},
            "vllm.speculative.num_tokens: has no effect without method (such as ngram) or model beside it",
        ),
        (
            {"backend": "tensorrt", "tensorrt": {"calibration": {"num_samples": 3}}},
            "tensorrt.calibration: has no effect without quantization",
        ),
        (
            {"backend": "tensorrt", "tensorrt": {"num_draft_tokens": 3}},
            "tensorrt.num_draft_tokens: has no effect alone: draft_model and num_draft_tokens belong together",
        ),
        (
            {"measurement": {"phases": True}, "traffic_simulation": {"enabled": True}},
            "measurement.phases: needs a closed batch: under traffic prefill and decode run at the same time",
        ),
        (
            {"measurement": {"phases": True, "energy": "none"}},
            "measurement.phases: needs energy, and measurement.energy is none",
        ),
        (
            {"baseline": {"required": True}, "measurement": {"energy": "none"}},
            "baseline.required: needs energy, and measurement.energy is none",
        ),
        ({"baseline": {"required": True, "enabled": False}}, "baseline.required: needs baseline.enabled"),
        (
            {"measurement": {"cpu_tdp_w": 65}},
            "measurement.cpu_tdp_w: has no effect with measurement.energy: auto",
        ),
    ],
)
def test_what_cannot_run_as_written_is_refused(options: dict[str, Any], error: str):
    assert errors(**options) == [error]


def test_a_plain_experiment_has_no_findings():
    assert warnings() == []
    assert warnings(H200) == []
    for backend in ("vllm", "tensorrt"):
        assert warnings(H200, backend=backend) == []


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"decoder": {"do_sample": False, "temperature": 0.7, "top_p": 0.9}},
            "decoder.temperature: temperature and top_p have no effect under greedy decoding",
        ),
        (
            {"decoder": {"preset": "deterministic", "top_k": 10}},
            "decoder.top_k: top_k has no effect under greedy decoding",
        ),
        (
            {"traffic_simulation": {"enabled": True, "mode": "closed", "target_qps": 5}},
            "traffic_simulation.target_qps: has no effect with mode: closed",
        ),
        (
            {"traffic_simulation": {"enabled": True, "mode": "closed", "seed": 5}},
            "traffic_simulation.seed: has no effect with mode: closed",
        ),
        (
            {"traffic_simulation": {"enabled": True, "mode": "constant", "concurrency": 8}},
            "traffic_simulation.concurrency: has no effect with mode: constant",
        ),
        ({"decoder": {"preset": "creative"}}, "decoder.top_p: temperature and top_p are both set"),
        ({"pytorch": {"cache_implementation": "static"}}, "pytorch.cache_implementation: a static cache is sized"),
        (
            {"pytorch": {"batching_strategy": "dynamic", "max_tokens_per_batch": 99}},
            "pytorch.batch_size: 1 leaves a dynamic batch nothing to put together",
        ),
        ({"backend": "vllm", "vllm": {"gpu_memory_utilization": 0.96}}, "vllm.gpu_memory_utilization: 0.96 leaves"),
        ({"backend": "vllm", "vllm": {"enable_prefix_caching": True}}, "vllm.enable_prefix_caching: prompts are"),
        (
            {"backend": "tensorrt", "tensorrt": {"enable_kv_cache_reuse": True}},
            "tensorrt.enable_kv_cache_reuse: prompts are repeated",
        ),
        ({"backend": "vllm", "vllm": {"quantization": "awq"}}, "vllm.quantization: awq needs a checkpoint"),
        ({"backend": "tensorrt", "tensorrt": {"quantization": "int4_gptq"}}, "tensorrt.quantization: int4_gptq needs"),
        ({"backend": "vllm", "vllm": {"tensor_parallel_size": 2}}, "vllm: needs 2 GPUs"),
        ({"dataset": "alpacca"}, "dataset.name: 'alpacca' is no alias of a dataset; alpaca is"),
    ],
)
def test_what_a_person_should_know_is_warned_about(options: dict[str, Any], warning: str):
    (found,) = warnings(**options)
    assert found.startswith(warning)


def test_a_checkpoint_named_as_quantized_is_not_warned_about():
    assert warnings(model="org/Llama-AWQ", backend="vllm", vllm={"quantization": "awq"}) == []


@pytest.mark.parametrize("name", ["0", "GPU-8c7a11ee", "GPU-8C7A"])
def test_a_gpu_is_known_by_index_and_by_uuid_also_shortened(name: str):
    old = Gpu("Tesla V100", (7, 0), 16 * 10**9, index=0, uuid="GPU-8c7a11ee")
    new = Gpu(index=1, uuid="GPU-90")
    options: dict[str, Any] = {"backend": "tensorrt"}
    assert len(warnings(old, new, gpus=[name], **options)) == 1
    assert warnings(old, new, gpus=["GPU-9"], **options) == []


def test_a_warning_names_its_option_and_reason():
    (finding,) = rules.warnings(experiment(decoder={"preset": "creative"}))
    assert finding.reason is not None
    assert (finding.path, finding.reason.code) == (("decoder", "top_p"), "sampling_compounds")


@pytest.mark.parametrize(
    ("gpu", "options", "warning"),
    [
        (
            V100,
            {"pytorch": {"attn_implementation": "flash_attention_2"}},
            "pytorch.attn_implementation: flash attention 2 needs compute capability 8.0, Tesla V100 has 7.0",
        ),
        (V100, {"backend": "tensorrt"}, "backend: TensorRT-LLM needs compute capability 8.0, Tesla V100 has 7.0"),
        (
            A100,
            {"backend": "vllm", "vllm": {"kv_cache_dtype": "fp8"}},
            "vllm.kv_cache_dtype: fp8 needs compute capability 8.9, NVIDIA A100 has 8.0",
        ),
        (
            A100,
            {"backend": "vllm", "vllm": {"quantization": "fp8"}},
            "vllm.quantization: fp8 needs compute capability 8.9, NVIDIA A100 has 8.0",
        ),
        (
            V100,
            {"backend": "vllm", "vllm": {"attention": {"backend": "FLASH_ATTN"}}},
            "vllm.attention: flash attention needs compute capability 8.0, Tesla V100 has 7.0",
        ),
    ],
)
def test_capability_is_checked_when_the_gpu_is_known(gpu: Gpu, options: dict[str, Any], warning: str):
    assert warnings(**options) == []
    assert warnings(gpu, **options) == [warning]
    assert warnings(H200, **options) == []


def test_only_the_gpus_in_use_are_looked_at():
    old = Gpu("Tesla V100", (7, 0), index=1, uuid="GPU-1")
    options = {"pytorch": {"attn_implementation": "flash_attention_2"}}
    assert warnings(H200, old, **options) == []
    assert len(warnings(H200, old, gpus=[1], **options)) == 1
    assert len(warnings(H200, old, gpus=["GPU-1"], **options)) == 1
    assert warnings(old, gpus=[], **options) == []


def test_too_few_gpus_are_told_when_known():
    found = warnings(H200, backend="vllm", vllm={"tensor_parallel_size": 2})
    assert found == ["vllm: needs 2 GPUs", "vllm: needs 2 GPUs, this host has 1"]


def test_a_model_that_will_not_fit_is_told():
    assert warnings(V100, model="org/Model-7B") == []
    assert warnings(V100, model="org/Model-13b-chat") == [
        "model.name: 13 billion weights take 26 GB, going by its name; Tesla V100 offers 16 GB"
    ]
    assert warnings(V100, model="org/Model-13b-chat", pytorch={"load_in_4bit": True}) == []
    assert len(warnings(V100, model="org/Model-7B", fp_precision="float32")) == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen2.5-0.5B", 0.5e9),
        ("pythia-160m", 160e6),
        ("gpt2", None),
        ("bert-base", None),
        ("7b-models/gpt2", None),
    ],
)
def test_parameters_by_name(name: str, parameters: float | None):
    assert rules.parameters_by_name(name) == parameters
