"""What each server adds to the API of OpenAI, which is what all of them share.

vLLM 0.32 and llama.cpp b11549 were tried; the others follow the documentation and the protocol modules of SGLang,
TensorRT-LLM (`trtllm-serve`), text-generation-inference 3 and Ollama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lem.base.dataclass import dataclass, field

SALT = "{salt}"


@dataclass(frozen=True)
class Dialect:
    server: str  # its name, for messages
    ready_path: str  # answers 200 once requests are
    metrics_path: str | None = None  # Prometheus text
    # {lem's option: field of the body}, beyond the fields of OpenAI: temperature, top_p, max_tokens and (unless given
    # as None) seed.
    fields: Mapping[str, str | None] = field(default_factory=dict)
    width: str | None = None  # the option of its command that bounds how many requests are computed together
    takes_ids: bool = False  # as the prompt of a completion
    ids: Mapping[str, Any] = field(default_factory=dict)  # fields that make it return the ids of tokens
    # Fields that keep a prompt out of the prefix cache; SALT is replaced by a text that no other window has.
    uncached: Mapping[str, Any] = field(default_factory=dict)
    cache_option: str | None = None  # the option of its command that, if it is true, asks for that cache
    # The fields of /tokenize's body with the text and with the flag for special tokens; None without that path.
    tokenize: tuple[str, str] | None = None
    completion_path: str = "/v1/completions"
    keeps_alive: bool = True  # an idle connection costs it nothing
    length_field: str = "max_tokens"
    no_top_k: int = 0  # the value of its top_k that is off
    info_path: str | None = None  # JSON of its settings
    version_fields: tuple[str, ...] = ("version",)  # in the answers to /version and to info_path
    # {option of its command: field of the answer to info_path with its value}, where the names differ.
    settings: Mapping[str, str] = field(default_factory=dict)
    # {what is counted: the Prometheus counters that add up to it}
    counters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def field_of(self, option: str) -> str | None:
        """The field of the body for one of lem's options; None if the server does not honour it."""
        return {"random_seed": "seed", **self.fields}.get(option)


_VLLM_FIELDS: Mapping[str, str | None] = {
    "decoder.top_k": "top_k",
    "decoder.repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
    "ignore_eos": "ignore_eos",
    "min_output_tokens": "min_tokens",
}

DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect("the OpenAI API", "/v1/models"),
    "vllm": Dialect(
        "vLLM",
        "/health",
        "/metrics",
        fields=_VLLM_FIELDS,
        width="max_num_seqs",
        takes_ids=True,
        ids={"return_token_ids": True},
        uncached={"cache_salt": SALT},
        cache_option="enable-prefix-caching",
        tokenize=("prompt", "add_special_tokens"),
        counters={
            "input_tok": ("vllm:prompt_tokens_total",),
            "cached_tok": ("vllm:prompt_tokens_cached_total",),
            "output_tok": ("vllm:generation_tokens_total",),
            "preemptions": ("vllm:num_preemptions_total",),
        },
    ),
    "llamacpp": Dialect(
        "llama.cpp",
        "/health",
        "/metrics",
        # No min_output_tokens: the field is accepted and ignored.
        fields={
            "decoder.top_k": "top_k",
            "decoder.repetition_penalty": "repeat_penalty",
            "min_p": "min_p",
            "ignore_eos": "ignore_eos",
        },
        width="parallel",
        takes_ids=True,
        # Its native path: that of OpenAI returns no ids.
        ids={"return_tokens": True},
        completion_path="/completion",
        keeps_alive=False,  # each connection has one of a few threads for as long as it is open
        length_field="n_predict",
        uncached={"cache_prompt": False},
        cache_option="cache-prompt",
        tokenize=("content", "add_special"),
        info_path="/props",
        version_fields=("build_info",),
        settings={"parallel": "total_slots", "alias": "model_alias", "model": "model_path"},
        counters={
            # The first leaves out what came from the cache.
            "input_tok": ("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
            "cached_tok": ("llamacpp:prompt_tokens_cached_total",),
            "output_tok": ("llamacpp:tokens_predicted_total",),
        },
    ),
    # A seed has an effect only with deterministic inference, which is not the default.
    "sglang": Dialect(
        "SGLang",
        "/health",
        "/metrics",
        fields={**_VLLM_FIELDS, "random_seed": None},
        width="max_running_requests",
        takes_ids=True,
        no_top_k=-1,
        info_path="/get_server_info",
        counters={
            "input_tok": ("sglang:prompt_tokens_total",),
            "cached_tok": ("sglang:cached_tokens_total",),
            "output_tok": ("sglang:generation_tokens_total",),
        },
    ),
    "tensorrt": Dialect(
        "trtllm-serve",
        "/health",
        "/prometheus/metrics",
        fields=_VLLM_FIELDS,
        width="max_batch_size",
        takes_ids=True,
    ),
    "tgi": Dialect("text-generation-inference", "/health", "/metrics", width="max_batch_size", info_path="/info"),
    "ollama": Dialect("Ollama", "/api/version", info_path="/api/version"),
}
