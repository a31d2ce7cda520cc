"""What other tools call lem's options: for suggestions, and for `lem config convert`.

The names are those in the documentation of transformers 5 (GenerationConfig, from_pretrained), vLLM 0.32 (EngineArgs,
SamplingParams, `vllm bench`), TensorRT-LLM 1.2 (LLM, trtllm-bench), AIPerf 0.13, guidellm 0.8 and LLenergyMeasure (both
forms of its files).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lem.base.dataclass import dataclass
from lem.base.errors import nearest


@dataclass(frozen=True)
class Term:
    """What a name of another tool is in lem."""

    options: tuple[str, ...] = ()  # dotted, of an experiment or a campaign; several where it depends on the rest
    advice: str = ""  # where no single option corresponds: what to do


# Options, and the names that mean them. A name with a dot is one of the last section before it.
_NAMES: Mapping[str, str] = {
    "campaign_name config_name": "name study_name label experiment_name run_name",
    "model": "model_id model_path model_name_or_path pretrained_model_name_or_path model_names hf_model",
    "model.name": "model.model_id model.model_path model.model_name_or_path model.id model.path",
    "model.tokenizer": "tokenizer tokenizer_name processor",
    "model.adapter": "lora lora_path lora_request lora_modules adapter_id adapter_path",
    "model.trust_remote_code": "trust_remote_code tokenizer_trust_remote_code",
    "backend": "engine framework inference_engine backend_type",
    "max_output_tokens": "max_new_tokens max_tokens max_completion_tokens max_gen_tokens output_len output_tokens "
    "output_tokens_mean osl random_output_len sharegpt_output_len",
    "min_output_tokens": "min_new_tokens min_tokens",
    "max_input_tokens": "max_prompt_length max_prompt_len max_prompt_tokens max_input_length truncate_prompt_tokens "
    "max_input_len",
    "fp_precision": "dtype torch_dtype precision data_type model_dtype",
    "gpus": "gpu_ids gpu_list gpu_indices device_ids cuda_visible_devices visible_devices",
    "random_seed": "seed",
    "streaming": "stream",
    "dataset": "dataset_name public_dataset",
    "dataset prompts": "data",
    "dataset.split prompts.split": "dataset_split hf_split",
    "dataset.column prompts.column": "text_column prompt_column",
    "prompts.subset": "dataset_config hf_subset subset",
    "prompts": "input_file prompt_file prompts_file dataset_path",
    "prompts.output_tokens": "prompts.output_len prompts.output_tokens_mean",
    "num_samples dataset.sample_size prompts.sample_size": "num_samples sample_size n num_prompts num_requests "
    "num_input_prompts request_count max_requests num_dataset_entries num_sessions conversation_num",
    "prompts.input_tokens": "input_len input_tokens prompt_tokens isl synthetic_input_tokens_mean random_input_len",
    "traffic_simulation.target_qps": "request_rate rate query_rate qps",
    "traffic_simulation.concurrency": "concurrency max_concurrency",
    "traffic_simulation.mode": "rate_type arrival_pattern profile",
    "traffic_simulation.burstiness": "burstiness arrival_smoothness",
    "traffic_simulation.slo": "goodput",
    "chat_template": "apply_chat_template use_chat_template",
    "warmup.min_prompts execution.warmup_prompts": "num_warmups n_warmup warmup_request_count num_warmup_requests "
    "num_iters_warmup",
    "baseline.duration_sec": "baseline.duration_seconds",
    "measurement.min_window_sec": "max_seconds benchmark_duration duration",
    "measurement.energy": "energy energy_backend",
    "extra_metadata": "metadata output_extras",
    "io.results_dir": "output_dir output_path result_dir artifact_dir output_artifact_dir",
    "num_cycles execution.cycles": "n_cycles num_iters num_iterations num_runs num_profile_runs",
    "execution.structure": "cycle_order",
    "execution.seed": "shuffle_seed",
    "execution.config_gap_seconds": "experiment_gap_seconds profile_run_cooldown_seconds thermal_floor_seconds",
    "grid": "sweep",
    "grid.shared": "axes",
    "pytorch.batch_size vllm.max_num_seqs tensorrt.max_batch_size": "batch_size max_batch_size bs",
    "pytorch.batching_strategy": "batching.strategy",
    "pytorch.beam_search.num_beams": "num_beams beam_width max_beam_width",
    "pytorch.torch_compile": "torch_compile_mode",
    "pytorch.min_p vllm.min_p": "min_p",
    "pytorch.extra vllm.extra tensorrt.extra_runtime_args": "generation_kwargs model_kwargs engine_args "
    "passthrough_kwargs",
    "pytorch.attn_implementation vllm.attention.backend": "attn_implementation attention_backend attn_backend",
    "pytorch.load_in_4bit pytorch.load_in_8bit vllm.quantization tensorrt.quantization": "quantization quant_algo "
    "quantization_config quant_config",
    "pytorch.assisted_generation.model vllm.speculative.model tensorrt.draft_model": "speculative_model "
    "assistant_model draft_model spec_model",
    "pytorch.assisted_generation.num_tokens vllm.speculative.num_tokens tensorrt.num_draft_tokens": "spec_tokens "
    "num_speculative_tokens num_assistant_tokens num_draft_tokens prompt_lookup_num_tokens",
    "vllm.speculative": "speculative_config",
    "vllm.speculative.prompt_lookup_max": "ngram_prompt_lookup_max",
    "vllm.speculative.prompt_lookup_min": "ngram_prompt_lookup_min",
    "vllm.tensor_parallel_size tensorrt.tp_size": "tensor_parallel_size tp_size tp tensor_parallel",
    "vllm.pipeline_parallel_size tensorrt.pp_size": "pipeline_parallel_size pp_size pp",
    "vllm.gpu_memory_utilization tensorrt.gpu_memory_utilization": "gpu_memory_utilization free_gpu_memory_fraction "
    "kv_cache_free_gpu_memory_fraction kv_cache_free_gpu_mem_fraction",
    "vllm.max_model_len": "max_model_len max_seq_len max_seq_length model_max_length",
    "vllm.max_num_batched_tokens tensorrt.max_num_tokens": "max_num_batched_tokens max_num_tokens",
    "vllm.enable_prefix_caching tensorrt.enable_kv_cache_reuse": "enable_prefix_caching enable_kv_cache_reuse "
    "enable_block_reuse",
    "vllm.enable_chunked_prefill tensorrt.enable_chunked_context": "enable_chunked_prefill enable_chunked_context",
    "vllm.kv_cache_dtype tensorrt.kv_cache_type": "kv_cache_dtype kv_cache_type",
    "vllm.distributed_backend": "distributed_executor_backend",
    "vllm.lora.enabled": "enable_lora",
    "vllm.lora.max_rank": "max_lora_rank",
    "vllm.attention.flash_version": "flash_attn_version",
    "server.url": "base_url url target endpoint_url server_url",
    "server.command": "serve_command server_command serve_cmd",
    "server.options": "server_args serve_args",
    "server.api": "endpoint endpoint_type custom_endpoint request_type",
    "server.api_key_env": "api_key",
    "server.served_name": "served_model_name",
    "server.request": "extra_inputs extra_body extra_request_body",
    "server.metrics_path": "server_metrics",
}

# What to do about names without a counterpart.
_ADVICE: Mapping[str, str] = {
    "set server.url, which has host and port": "host port",
    "execution.experiment_timeout_seconds limits an experiment, not each request": "request_timeout_seconds",
    "lem generates one answer for each prompt": "num_return_sequences best_of vllm.n",
    "lem has no such penalty, only decoder.repetition_penalty": "presence_penalty frequency_penalty",
    "lem stops at the end of the text, or with ignore_eos at max_output_tokens": "stop stop_strings stop_token_ids "
    "eos_token_id",
    "it counts the tokens of the prompt; set max_output_tokens and min_output_tokens": "max_length min_length",
    "set max_input_len and max_output_len": "tensorrt.max_seq_len",
    "set gpus: [0] is GPU 0, [] is the CPU": "device device_map num_gpus gpu_count",
    "lem measures one copy of the model": "num_processes data_parallel_size",
    "pytorch runs on one GPU; vllm has tensor_parallel_size, tensorrt has tp_size": "sharding sharding_config",
    "set batch_size and batching_strategy under pytorch": "batching batching_options",
    "set the lengths of synthetic prompts by prompts.input_tokens and prompts.distribution": "random_range_ratio "
    "synthetic_input_tokens_stddev prompt_tokens_stdev",
    "lem warms up by prompts: warmup.min_prompts, warmup.max_prompts": "warmup_duration",
    "prompts keep the order of their source, unless prompts.shuffle is true": "dataset_order data_sampler "
    "dataset_sampling_strategy",
    "put its options into vllm itself": "vllm.engine",
    "put its options into decoder": "vllm.sampling sampling_params generation_config",
    "only the backend pytorch has beam_search": "vllm.beam_search",
    "the command line decides: --executor docker or --executor local": "runners",
    "lem compares configurations when they are measured: lem compare NAME --by AXIS": "group_by",
    "remove it: a file for lem has no version": "schema_version",
}

# Names by which a file of LLenergyMeasure is recognised, if it has at least two of them.
LLENERGY_NAMES = frozenset(
    {
        *("sweep", "precision", "n", "n_cycles", "cycle_order", "dataset_order", "runners", "energy", "n_warmup"),
        *("passthrough_kwargs", "duration_seconds", "schema_version", "num_input_prompts", "query_rate", "group_by"),
        *("decode_token_to_text", "streaming_warmup_requests"),
    }
)

# What other tools call the values of an option.
VALUES: Mapping[str, Mapping[str, str]] = {
    "fp_precision": {
        **dict.fromkeys(("fp16", "half", "f16", "torch.float16"), "float16"),
        **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp32", "float", "full", "single", "f32", "torch.float32"), "float32"),
    },
    "backend": {
        **dict.fromkeys(("hf", "transformers", "huggingface", "torch"), "pytorch"),
        **dict.fromkeys(("trtllm", "trt-llm", "trt", "tensorrt-llm", "tensorrt_llm"), "tensorrt"),
        **dict.fromkeys(
            ("openai", "openai-chat", "openai_http", "http", "llamacpp", "sglang", "tgi", "ollama"), "server"
        ),
    },
    "server.engine": {
        **dict.fromkeys(("llama.cpp", "llama-cpp", "llama-server"), "llamacpp"),
        **dict.fromkeys(("trtllm", "trtllm-serve", "tensorrt-llm"), "tensorrt"),
    },
    "traffic_simulation.mode": {"concurrent": "closed", "synchronous": "closed"},
    "execution.structure": {"sequential": "grouped", "random": "shuffled"},
    "pytorch.torch_compile": {"inductor": "default"},
}


def squashed(name: str) -> str:
    """A name without what people write differently: `batchSize`, `batch-size` and `batchsize` are `batch_size`."""
    return name.lower().replace("_", "").replace("-", "")


@functools.cache
def _terms() -> Mapping[str, Term]:
    terms = {squashed(name): Term(tuple(key.split())) for key, names in _NAMES.items() for name in names.split()}
    return terms | {squashed(name): Term(advice=key) for key, names in _ADVICE.items() for name in names.split()}


def find_term(name: str, section: str = "") -> Term | None:
    """What a name of another tool is in lem; `section` is the name of the section that it was found in."""
    return _terms().get(squashed(f"{section}.{name}")) or _terms().get(squashed(name))


def value_named(word: str, choices: Collection[str]) -> str | None:
    """The choice that other tools call by this word."""
    return next((table[word] for table in VALUES.values() if table.get(word) in choices), None)


def meant(
    key: str,
    at: Sequence[str],
    own: Sequence[str],
    known: Collection[str],
    chosen: Collection[str],
    elsewhere: Iterable[Callable[[Sequence[str]], str | None]],
) -> tuple[str, str | None]:
    """What to do about a key of the section `at` that is no option, and the name of its `own` or `known` ones meant."""
    # Names come before spelling, and no suggestion means something else.
    within = "".join(f"{part}." for part in at)
    term = find_term(key, at[-1] if at else "") or Term()
    inside = [name.removeprefix(within) for name in term.options if name in known and name.startswith(within)]
    here = _fitting([name for name in inside if name.partition(".")[0] in own], chosen)
    same = [name for name in own if squashed(name) == squashed(key) or (at and name.startswith(f"{key}_"))]
    named = [name for name in known if name.endswith(f".{key}") and "[" not in name]
    below = [name.removeprefix(within) for name in named if name.startswith(within)]
    below = [name for name in below if name.partition(".")[0] in own]
    likely = same or here or (() if term.advice else below)
    if len(likely) == 1:
        return "", likely[0]
    if term.advice or here:
        return term.advice or f"set {either(here)}", None
    if at and (others := _fitting([name for name in term.options if name in known], chosen)):
        return f"set {either(others)}, outside {within[:-1]}", None
    for names in (_fitting(term.options, chosen), [key]):
        if (place := next(filter(None, (find(names) for find in elsewhere)), None)) is not None:
            return place, None
    if (like := _alike(key, own)) is not None:
        return "", like
    others = [key] if key in known else [name for name in named if not name.startswith(within)]
    if at and len(others) == 1:
        return f"set {others[0]}, outside {within[:-1]}", None
    exact = {squashed(name): name for name in (*_terms(), *(name.rpartition(".")[2] for name in known))}
    if (near := nearest(squashed(key), list(exact), cutoff=0.9)) is not None and exact[near] != key:
        return meant(exact[near], at, own, known, chosen, elsewhere)
    extra = next((name for name in own if name.startswith("extra_") or name == "extra"), None) if at else None
    return f"arguments of the engine that are no options of lem belong under {extra}" if extra else "", None


def either(names: Sequence[str]) -> str:
    """Names as a sentence has them: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _fitting(options: Sequence[str], chosen: Collection[str]) -> Sequence[str]:
    """Of several options that may be meant, those of the chosen sections, else those of no section."""
    of_chosen = [name for name in options if name.partition(".")[0] in chosen]
    return of_chosen or [name for name in options if "." not in name] or options


def _alike(key: str, names: Sequence[str]) -> str | None:
    """The name nearest to a key of those that have all its words, so that it means the same."""
    words = re.split("[_-]", key.lower())
    fitting = [name for name in names if all(_has_word(name.split("_"), word) for word in words)]
    found = nearest(key, fitting)
    return None if found is None or (len(fitting) > 1 and len(words) < len(found.split("_"))) else found


def _has_word(parts: Sequence[str], word: str) -> bool:
    return nearest(word, parts) is not None or any(part.startswith(word) or word.startswith(part) for part in parts)
