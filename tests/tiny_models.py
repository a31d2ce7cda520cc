"""Models of many architectures with random weights, a few hundred thousand each, made in seconds without a download.

Each has the tokenizer of examples/make_demo_model.py, heads as wide as vLLM takes them on CPUs, and 512 positions,
where its architecture has positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples import make_demo_model

POSITIONS = 512
_SHAPE = make_demo_model.SHAPES["tiny"]
# The names of most configurations; the others have their own.
_USUAL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GPT: Mapping[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: Mapping[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
_ROPE_OF_IMAGES: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@dataclass(frozen=True)
class Kind:
    """How to configure a model of one architecture: the `model_type` of transformers, and its values."""

    model_type: str
    values: Mapping[str, Any]
    has_images: bool = False
    has_positions: bool = True
    nested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _text(model_type: str, **values: Any) -> Kind:
    return Kind(model_type, {**_USUAL, **values})


def _seeing(model_type: str, text: Kind, vision: Mapping[str, Any], **values: Any) -> Kind:
    nested = {"text_config": {"model_type": text.model_type, **text.values}, "vision_config": vision}
    return Kind(model_type, values, has_images=True, nested=nested)


KINDS: Mapping[str, Kind] = {
    "llama": _text("llama"),
    "mistral": _text("mistral", sliding_window=None),
    "mixtral": _text("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _text("qwen2"),
    "qwen3": _text("qwen3", head_dim=32),
    "qwen3_moe": _text(
        "qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
    "gemma2": _text("gemma2", head_dim=32, sliding_window=128),
    "gemma3_text": _text("gemma3_text", head_dim=32, sliding_window=128),
    "phi3": _text("phi3"),
    "phi": _text("phi"),
    "olmo2": _text("olmo2"),
    "granite": _text("granite"),
    "smollm3": _text("smollm3"),
    "cohere": _text("cohere"),
    "stablelm": _text("stablelm"),
    "starcoder2": _text("starcoder2"),
    "glm4": _text("glm4", head_dim=32),
    "gpt_oss": _text("gpt_oss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=128),
    "gpt2": Kind("gpt2", _GPT),
    "gptj": Kind("gptj", {**_GPT, "rotary_dim": 16}),
    "gpt_neox": _text("gpt_neox"),
    "opt": _text("opt", ffn_dim=128, word_embed_proj_dim=64),
    "bloom": Kind("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 2}, has_positions=False),
    "falcon": _text("falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "mamba": Kind("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, has_positions=False),
    "gemma3": _seeing(
        "gemma3",
        _text("gemma3_text", head_dim=32, sliding_window=128),
        {**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "llava": _seeing("llava", _text("llama"), {**_VISION, "model_type": "clip_vision_model"}, image_seq_length=4),
    "qwen2_vl": _seeing(
        "qwen2_vl",
        _text("qwen2_vl_text", rope_parameters=_ROPE_OF_IMAGES),
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
    "qwen2_5_vl": _seeing(
        "qwen2_5_vl", _text("qwen2_5_vl_text", rope_parameters=_ROPE_OF_IMAGES), {**_QWEN_VISION, "out_hidden_size": 64}
    ),
    "mistral3": _seeing("mistral3", _text("mistral"), {**_VISION, "model_type": "pixtral"}),
}


def make_model(folder: Path, name: str, **values: Any) -> Path:
    """A model of this kind in the folder, with its tokenizer; `values` win over those of the kind."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = KINDS[name]
    vocabulary = make_demo_model.save_tokenizer(folder, _SHAPE)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": vocabulary, **tokens}
    nested = {part: dict(given) for part, given in kind.nested.items()}
    if "text_config" in nested:
        nested["text_config"] |= sizes
    config = CONFIG_MAPPING[kind.model_type](**{**kind.values, **sizes, **nested, **values})
    torch.manual_seed(7)
    builder = AutoModelForImageTextToText if kind.has_images else AutoModelForCausalLM
    model = builder.from_config(config)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    return folder
