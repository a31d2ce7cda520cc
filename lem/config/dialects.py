"""What each server adds to the API of OpenAI, which is what all of them share.

vLLM 0.32 and llama.cpp b11549 were tried; the others follow the documentation and the protocol modules of SGLang,
TensorRT-LLM (`trtllm-serve`), text-generation-inference 3 and Ollama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    # Fields that keep a prompt out of the prefix cache; {salt} is replaced by a text that no other window has.
    uncached: Mapping[str, Any] = field(default_factory=dict)
    tokenize: str | None = None  # the field of /tokenize's body that holds the text; None without that path
    decoded: str = ""  # the field of /detokenize's answer with the text

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
        uncached={"cache_salt": "{salt}"},
        tokenize="prompt",
        decoded="prompt",
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
        uncached={"cache_prompt": False},
        tokenize="content",
        decoded="content",
    ),
    # A seed has an effect only with deterministic inference, which is not the default.
    "sglang": Dialect(
        "SGLang",
        "/health",
        "/metrics",
        fields={**_VLLM_FIELDS, "random_seed": None},
        width="max_running_requests",
        takes_ids=True,
    ),
    "tensorrt": Dialect(
        "trtllm-serve",
        "/health",
        "/prometheus/metrics",
        fields=_VLLM_FIELDS,
        width="max_batch_size",
        takes_ids=True,
    ),
    "tgi": Dialect("text-generation-inference", "/health", "/metrics", width="max_batch_size"),
    "ollama": Dialect("Ollama", "/api/version"),
}
