"""Names of other tools: each leads to an option that exists, and none takes the place of an option of lem."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Option
from lem.config.load import load_campaign, load_experiment
from lem.config.option import find_option
from lem.config.terms import _ADVICE, _NAMES, VALUES, find_term, squashed
from lem.config.yamlfile import FileProblems

ROOTS = (ExperimentConfig, CampaignConfig)


def found(key: str) -> list[Option]:
    return [item for root in ROOTS if (item := find_option(root, key)) is not None]


@pytest.mark.parametrize("key", sorted({*(" ".join(_NAMES).split()), *VALUES}))
def test_every_term_leads_to_an_option(key: str):
    assert found(key)


def test_a_name_means_one_thing():
    names = [squashed(name) for table in (_NAMES, _ADVICE) for names in table.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", VALUES)
def test_values_lead_to_values_and_are_none_themselves(key: str):
    (item,) = found(key)
    assert set(VALUES[key].values()) <= set(item.choices)
    assert not set(VALUES[key]) & set(item.choices)


@pytest.mark.parametrize("name", ["batch_size", "batchSize", "batch-size", "batchsize"])
def test_a_name_may_be_written_as_flags_and_variables_are(name: str):
    term = find_term(name)
    assert term is not None
    assert term.options == ("pytorch.batch_size", "vllm.max_num_seqs", "tensorrt.max_batch_size")


def test_a_name_can_depend_on_its_section():
    count, answers = find_term("n"), find_term("n", "vllm")
    assert count is not None
    assert "dataset.sample_size" in count.options
    assert answers is not None
    assert answers.options == ()
    assert "one answer" in answers.advice


# Wrong files in the vocabulary of other tools: the text, and for each problem the position, and the suggestion or what
# the message says to do. An experiment begins with its model, a campaign with `campaign_name`.

VLLM, TENSORRT = "backend: vllm\n", "backend: tensorrt\n"
ANSWERS = "; lem generates one answer for each prompt"

EXPERIMENTS: list[tuple[str, str]] = [
    # transformers
    ("max_new_tokens: 64", "2:1 max_output_tokens"),
    ("min_new_tokens: 4", "2:1 min_output_tokens"),
    ("max_length: 64", "2:1 ; it counts the tokens of the prompt; set max_output_tokens and min_output_tokens"),
    ("torch_dtype: bfloat16", "2:1 fp_precision"),
    ("fp_precision: bf16", "2:15 bfloat16"),
    ("fp_precision: torch.float16", "2:15 float16"),
    ("backend: transformers", "2:10 pytorch"),
    ("device_map: auto", "2:1 ; set gpus: [0] is GPU 0, [] is the CPU"),
    ("num_beams: 4", "2:1 pytorch.beam_search.num_beams"),
    ("pytorch: {num_beams: 4}", "2:11 beam_search.num_beams"),
    ("pytorch: {assistant_model: gpt2}", "2:11 assisted_generation.model"),
    ("pytorch:\n  max_new_tokens: 5", "3:3 ; set max_output_tokens, outside pytorch"),
    ("decoder: {max_new_tokens: 5}", "2:11 ; set max_output_tokens, outside decoder"),
    ("temperature: 0", "2:1 decoder.temperature"),
    ("do_sample: false", "2:1 decoder.do_sample"),
    ("num_return_sequences: 2", "2:1 " + ANSWERS),
    ("pytorch: {typical_p: 0.5}", "2:11 ; arguments of the engine that are no options of lem belong under extra"),
    ("generation_config: {top_k: 5}", "2:1 ; put its options into decoder"),
    ("attn_implementation: eager", "2:1 pytorch.attn_implementation"),
    ("quantization_config: {load_in_4bit: true}", "2:1 ; set pytorch.load_in_4bit or pytorch.load_in_8bit"),
    ("stop_strings: [x]", "2:1 ; lem stops at the end of the text, or with ignore_eos at max_output_tokens"),
    # vLLM
    ("max_tokens: 64", "2:1 max_output_tokens"),
    ("max-tokens: 64", "2:1 max_output_tokens"),
    ("dtype: half\nfp_precision: half", "2:1 fp_precision, 3:15 float16"),
    ("tensor_parallel_size: 2", "2:1 ; set vllm.tensor_parallel_size or tensorrt.tp_size"),
    (VLLM + "tensor_parallel_size: 2", "3:1 vllm.tensor_parallel_size"),
    (VLLM + "vllm: {tp_size: 2}", "3:8 tensor_parallel_size"),
    (VLLM + "vllm: {max_tokens: 5}", "3:8 ; set max_output_tokens, outside vllm"),
    (VLLM + "vllm: {temperature: 0}", "3:8 ; set decoder.temperature, outside vllm"),
    (VLLM + "vllm: {n: 4}", "3:8 " + ANSWERS),
    (VLLM + "max_batch_size: 8", "3:1 vllm.max_num_seqs"),
    (VLLM + "max_seq_len: 2048", "3:1 vllm.max_model_len"),
    (VLLM + "quantization: awq", "3:1 vllm.quantization"),
    (VLLM + "gpu_memory_utilisation: 0.8", "3:1 vllm.gpu_memory_utilization"),
    (VLLM + "vllm: {num_speculative_tokens: 5}", "3:8 speculative.num_tokens"),
    (VLLM + "vllm: {max_lora_rank: 8}", "3:8 lora.max_rank"),
    ("presence_penalty: 1", "2:1 ; lem has no such penalty, only decoder.repetition_penalty"),
    ("seed: 1", "2:1 random_seed"),
    ("num_prompts: 10", "2:1 ; set dataset.sample_size or prompts.sample_size"),
    ("dataset: alpaca\nnum_prompts: 10", "3:1 dataset.sample_size"),
    ("dataset: {name: alpaca, num_prompts: 10}", "2:25 sample_size"),
    ("random_input_len: 128\nrandom_output_len: 16", "2:1 prompts.input_tokens, 3:1 max_output_tokens"),
    ("max_concurrency: 8", "2:1 traffic_simulation.concurrency"),
    # TensorRT-LLM
    (TENSORRT + "tensorrt: {tensor_parallel_size: 2}", "3:12 tp_size"),
    (TENSORRT + "tensorrt: {max_seq_len: 2048}", "3:12 ; set max_input_len and max_output_len"),
    (TENSORRT + "tensorrt: {free_gpu_memory_fraction: 0.8}", "3:12 gpu_memory_utilization"),
    (TENSORRT + "enable_block_reuse: true", "3:1 tensorrt.enable_kv_cache_reuse"),
    ("backend: trtllm", "2:10 tensorrt"),
    # AIPerf
    ("model_names: gpt2", "2:1 model"),
    ("concurrency: 8", "2:1 traffic_simulation.concurrency"),
    ("request_rate: 4", "2:1 traffic_simulation.target_qps"),
    ("traffic_simulation: {enabled: true, request_rate: 4}", "2:37 target_qps"),
    ("isl: 128\nosl: 64", "2:1 prompts.input_tokens, 3:1 max_output_tokens"),
    ("request_count: 100", "2:1 ; set dataset.sample_size or prompts.sample_size"),
    ("url: localhost:8000\nendpoint_type: chat", "2:1 server.url, 3:1 server.api"),
    ("base_url: http://localhost:8000/v1\napi_key: x", "2:1 server.url, 3:1 server.api_key_env"),
    ("warmup: {warmup_request_count: 5}", "2:10 min_prompts"),
    ("output_artifact_dir: out", "2:1 io.results_dir"),
    ("benchmark_duration: 60", "2:1 measurement.min_window_sec"),
    # guidellm
    ("target: http://localhost:8000", "2:1 server.url"),
    ("rate_type: constant\nrate: 4", "2:1 traffic_simulation.mode, 3:1 traffic_simulation.target_qps"),
    ("traffic_simulation: {enabled: true, mode: concurrent}", "2:43 closed"),
    ("max_seconds: 30", "2:1 measurement.min_window_sec"),
    ("prompts: {type: synthetic, prompt_tokens: 128}", "2:28 input_tokens"),
    ("processor: gpt2", "2:1 model.tokenizer"),
    # LLenergyMeasure
    ("num_input_prompts: 100", "2:1 ; set dataset.sample_size or prompts.sample_size"),
    ("batch_size: 8", "2:1 pytorch.batch_size"),
    ("pytorch: {batchsize: 8}", "2:11 batch_size"),
    ("batching: {strategy: static}", "2:1 ; set batch_size and batching_strategy under pytorch"),
    ("sharding: {num_shards: 2}", "2:1 ; pytorch runs on one GPU; vllm has tensor_parallel_size, tensorrt has tp_size"),
    ("schema_version: '3.0.0'", "2:1 ; remove it: a file for lem has no version"),
    ("n: 100", "2:1 ; set dataset.sample_size or prompts.sample_size"),
    ("precision: bf16", "2:1 fp_precision"),
    ("energy: {backend: nvml}", "2:1 measurement.energy"),
    ("baseline: {duration_seconds: 30}", "2:12 duration_sec"),
    ("warmup: {n_warmup: 5}", "2:10 min_prompts"),
    (
        "warmup: {thermal_floor_seconds: 5}",
        "2:10 ; a campaign sets execution.config_gap_seconds, an experiment does not",
    ),
    (VLLM + "vllm: {engine: {max_num_seqs: 8}}", "3:8 ; put its options into vllm itself"),
    ("lora: {adapter_id: x}", "2:1 model.adapter"),
    ("runners: {pytorch: local}", "2:1 ; the command line decides: --executor docker or --executor local"),
    # lem's own names, in another place, another spelling, or another kind of file
    ("decoder:\n  preset: factual\n  warmup: {}", "4:3 ; set warmup, outside decoder"),
    ("maxOutputTokens: 5", "2:1 max_output_tokens"),
    ("max_ouput_tokens: 5", "2:1 max_output_tokens"),
    ("max_token: 5", "2:1 max_output_tokens"),
    ("max_something_tokens: 5", "2:1 "),
    ("schedule: {at: '10:00'}", "2:1 ; a campaign sets schedule, an experiment does not"),
    ("campain_name: x", "2:1 campaign_name"),
]

GRID = "grid:\n  backends: [pytorch, vllm]\n"

CAMPAIGNS: list[tuple[str, str]] = [
    (
        "model: gpt2\nmax_new_tokens: 5",
        "3:1 ; it is an option of experiments; in a grid, set grid.shared.max_output_tokens",
    ),
    ("grid: {backends: [pytorch], axes: {}}", "2:29 shared"),
    ("grid: {backends: [hf]}", "2:19 pytorch"),
    ("grid: {backends: [vllm], dtype: [float16]}", "2:26 ; set grid.shared.fp_precision"),
    (GRID + "  shared: {max_new_tokens: [5]}", "4:12 max_output_tokens"),
    (GRID + "  shared: {decoder.temprature: [1]}", "4:12 decoder.temperature"),
    ("grid: {backends: [vllm], shared: {vllm.max_batch_size: [3]}}", "2:35 vllm.max_num_seqs"),
    (
        GRID + "  shared: {batchsize: [1]}",
        "4:12 ; set grid.backend_overrides.pytorch.batch_size or grid.backend_overrides.vllm.max_num_seqs",
    ),
    (
        "grid: {backends: [vllm], shared: {batchsize: [1]}}",
        "2:35 grid.backend_overrides.vllm.max_num_seqs",
    ),
    (GRID + "  backend_overrides: {vllm: {tp: [1, 2]}}", "4:30 tensor_parallel_size"),
    (GRID + "  backend_overrides: {vllm: {max_tokens: [1, 2]}}", "4:30 grid.shared.max_output_tokens"),
    (GRID + "execution: {n_cycles: 5, cycle_order: shuffled}", "4:13 cycles, 4:26 structure"),
    (GRID + "execution: {structure: sequential}", "4:24 grouped"),
    (GRID + "execution: {experiment_gap_seconds: 5, shuffle_seed: 1}", "4:13 config_gap_seconds, 4:40 seed"),
    (
        GRID + "group_by: [backend]",
        "4:1 ; lem compares configurations when they are measured: lem compare NAME --by AXIS",
    ),
    ("experiments: [{model: gpt2, max_new_tokens: 5}]", "2:29 max_output_tokens"),
    # values of axes
    (GRID + "  shared: {fp_precision: [fp16, bf16]}", "4:27 float16, 4:33 bfloat16"),
    (GRID + "  shared:\n    fp_precision: [float16,\n      half]", "6:7 float16"),
    (GRID + "  shared:\n    decoder.preset:\n      - factual\n      - creativ", "7:9 creative"),
    (GRID + "  shared:\n    decoder: [{preset: factual}, {preset: creativ}]", "5:43 creative"),
    (GRID + "  shared:\n    decoder: [{temperature: 1, top_kk: 2}]", "5:32 top_k"),
    (GRID + "  shared:\n    warmup:\n      min_prompts: [1, 2]", "6:20 ; write it as an axis warmup.min_prompts"),
    (GRID + "  backend_overrides:\n    vllm: {max_num_seqs: [8,\n      x]}", "6:7 "),
    (GRID + "  models: [gpt2, {nam: x}]", "4:19 name"),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((f"model: gpt2\n{text}\n", expected) for text, expected in EXPERIMENTS),
        *((f"campaign_name: x\n{text}\n", expected) for text, expected in CAMPAIGNS),
    ],
)
def test_a_wrong_name_leads_to_the_right_one(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text, encoding="utf-8")
    load = load_campaign if text.startswith("campaign_name") else load_experiment
    with pytest.raises(FileProblems) as caught:
        load(path)
    found = []
    for place, problem in caught.value.located:
        assert place.mark is not None
        advice = re.search("; .*", problem.message) if problem.suggestion is None else None
        found.append(f"{place.mark.line}:{place.mark.column} {problem.suggestion or (advice[0] if advice else '')}")
    assert ", ".join(found) == expected
