"""The documented configurations (1.3), which refuse what they do not know, as the real ones do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Strict:
    """A model of pydantic, as far as it matters here: fields with defaults, and nothing else."""

    model_fields: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **given: Any) -> None:
        unknown = sorted(given.keys() - self.model_fields.keys())
        if unknown:
            raise ValueError(f"{type(self).__name__}: Extra inputs are not permitted: {', '.join(unknown)}")
        vars(self).update({**self.model_fields, **given})


class KvCacheConfig(Strict):
    model_fields: ClassVar[Mapping[str, Any]] = {
        "enable_block_reuse": True,
        "max_tokens": None,
        "free_gpu_memory_fraction": 0.9,
        "host_cache_size": None,
        "dtype": "auto",
        "tokens_per_block": 32,
    }


class DraftTargetDecodingConfig(Strict):
    model_fields: ClassVar[Mapping[str, Any]] = {"max_draft_len": None, "speculative_model": None}


class TorchLlmArgs(Strict):
    model_fields: ClassVar[Mapping[str, Any]] = {
        "model": None,
        "tokenizer": None,
        "tokenizer_mode": "auto",
        "skip_tokenizer_init": False,
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "dtype": "auto",
        "revision": None,
        "tokenizer_revision": None,
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "kv_cache_config": KvCacheConfig(),
        "enable_chunked_prefill": False,
        "speculative_config": None,
        "max_batch_size": 2048,
        "max_input_len": 1024,
        "max_seq_len": None,
        "max_beam_width": 1,
        "max_num_tokens": 8192,
        "backend": "pytorch",
        "return_perf_metrics": False,
        "attn_backend": "TRTLLM",
        "stream_interval": 1,
        "disable_overlap_scheduler": False,
        "sampler_type": "auto",
    }


class SamplingParams(Strict):
    model_fields: ClassVar[Mapping[str, Any]] = {
        "end_id": None,
        "pad_id": None,
        "max_tokens": 32,
        "min_tokens": None,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "seed": None,
        "repetition_penalty": None,
        "ignore_eos": False,
        "detokenize": True,
        "return_perf_metrics": False,
    }
