"""What of an experiment transformers cannot honour here, as far as that shows before a model is loaded.

Nothing here imports an engine: what is found of it comes in as facts. What only a run can tell is tried by
`pytorch_trial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lem.backends.pytorch_options import ASSISTANT_ARGUMENTS, EngineFacts, compiles_steps, is_assisted, section_of
from lem.backends.refusals import Refusal, refuse
from lem.config.backend_config import PyTorchConfig
from lem.config.experiment_config import ExperimentConfig
from lem.config.problems import did_you_mean

__all__ = ["check_options"]

# Caches that `generate` makes by name; others that it knows are old names which it turns into one of these.
CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")

# Arguments of `generate` that follow from an option of their own, or from the requests.
_OWNED = MappingProxyType(
    {
        "max_length": "max_output_tokens",
        "max_new_tokens": "max_output_tokens",
        "min_length": "min_output_tokens",
        "min_new_tokens": "min_output_tokens",
        "do_sample": "decoder.do_sample",
        "temperature": "decoder.temperature",
        "top_k": "decoder.top_k",
        "top_p": "decoder.top_p",
        "repetition_penalty": "decoder.repetition_penalty",
        "min_p": "pytorch.min_p",
        "no_repeat_ngram_size": "pytorch.no_repeat_ngram_size",
        "num_beams": "pytorch.beam_search.num_beams",
        "length_penalty": "pytorch.beam_search.length_penalty",
        "early_stopping": "pytorch.beam_search.early_stopping",
        "use_cache": "pytorch.use_cache",
        "cache_implementation": "pytorch.cache_implementation",
        "compile_config": "pytorch.torch_compile",
        "num_assistant_tokens": "pytorch.assisted_generation.num_tokens",
        "prompt_lookup_num_tokens": "pytorch.assisted_generation.num_tokens",
        "eos_token_id": "ignore_eos",
    }
)

_MOVED = "transformers moved it out into code that is fetched from a hub"
_OUTPUT = "lem reads the tokens alone"
_REFUSED = MappingProxyType(
    {
        "stop_strings": "a row that it ends cannot be told from padding, so its tokens could not be counted",
        "token_healing": "it changes the prompts",
        "num_return_sequences": "one answer a request is counted",
        "bos_token_id": "the prompts are token ids already",
        "pad_token_id": "padding is masked, so its id changes nothing",
        "decoder_start_token_id": "the model has no encoder",
        "forced_bos_token_id": "it only works on prompts of one token",
        "is_assistant": "transformers sets it itself",
        "continuous_batching_config": "lem forms the batches",
        **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _OUTPUT),
        **dict.fromkeys(("return_dict_in_generate", "return_legacy_cache"), _OUTPUT),
        **dict.fromkeys(("penalty_alpha", "dola_layers", "low_memory", "constraints", "force_words_ids"), _MOVED),
        **dict.fromkeys(("num_beam_groups", "diversity_penalty"), _MOVED),
    }
)


def check_options(config: ExperimentConfig, facts: EngineFacts) -> None:
    """Refuse what cannot be honoured here, everything at once; what only a run can tell is tried by the engine.

    Raises:
        OptionRefused: names each option, the versions found, and why.
    """
    section = section_of(config)
    refusals = [
        *_placement(config, section, facts),
        *_quantization(section, facts),
        *_batching(config, section),
        *_compilation(section, facts),
        *_caching(section, facts),
        *_decoding(section),
        *_extra(section, facts),
    ]
    refuse(refusals, facts)


def _placement(config: ExperimentConfig, section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
    if config.model.adapter is not None and (lack := facts.lacks("peft")):
        yield Refusal("model.adapter", lack)
    if section.low_cpu_mem_usage is False and facts.release >= (5, 0):
        yield Refusal("pytorch.low_cpu_mem_usage", "false is gone, weights always load without a second copy")
    if section.low_cpu_mem_usage and facts.release < (5, 0) and (lack := facts.lacks("accelerate")):
        yield Refusal("pytorch.low_cpu_mem_usage", lack)
    if section.max_memory is not None:
        yield from _memory_limits(section.max_memory, facts)


def _memory_limits(limits: Mapping[str, Any], facts: EngineFacts) -> Iterator[Refusal]:
    name = "pytorch.max_memory"
    if facts.device == "cpu":
        yield Refusal(name, "it shares a model out between a GPU and the CPU, and no GPU is in use")
        return
    if lack := facts.lacks("accelerate"):
        yield Refusal(name, lack)
    others = sorted(str(key) for key in limits if str(key) not in {"cpu", str(facts.gpu_index)})
    if others:
        yield Refusal(name, f"knows cpu and the GPU in use ({facts.gpu_index}), got {', '.join(others)}")


def _quantization(section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
    for name in ("load_in_4bit", "load_in_8bit"):
        if not getattr(section, name):
            continue
        if facts.device != "cuda":
            yield Refusal(f"pytorch.{name}", "bitsandbytes needs a CUDA GPU")
        elif lack := facts.lacks("bitsandbytes", "accelerate"):
            yield Refusal(f"pytorch.{name}", lack)


def _batching(config: ExperimentConfig, section: PyTorchConfig) -> Iterator[Refusal]:
    budget = section.max_tokens_per_batch
    if budget is None:
        return
    largest = config.max_input_tokens + config.max_output_tokens
    if budget < largest:
        reason = f"one request can take {largest} (max_input_tokens + max_output_tokens), got {budget}"
        yield Refusal("pytorch.max_tokens_per_batch", reason)


def _compilation(section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
    mode, backend = section.torch_compile, section.torch_compile_backend
    if backend is not None and backend not in facts.compile_backends:
        known = ", ".join(facts.compile_backends)
        reason = f"torch.compile knows {known}, got {backend}{did_you_mean(backend, facts.compile_backends)}"
        yield Refusal("pytorch.torch_compile_backend", reason)
    if mode == "reduce-overhead" and facts.device == "cpu":
        yield Refusal("pytorch.torch_compile", "reduce-overhead means CUDA graphs, on the CPU it does nothing")
    if compiles_steps(section, facts.device) and section.cache_implementation != "static":
        reason = (
            f"{mode} records CUDA graphs, which replay on a cache that stays in place: cache_implementation: static"
        )
        yield Refusal("pytorch.torch_compile", reason)
    if mode not in {False, "default"} and backend not in {None, "inductor"}:
        yield Refusal("pytorch.torch_compile", f"{mode} is a mode of the inductor backend, got {backend}")


def _caching(section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
    name = section.cache_implementation
    if name is None:
        return
    if name not in CACHES:
        reason = f"knows {', '.join(CACHES)}, got {name}{did_you_mean(name, CACHES)}"
        yield Refusal("pytorch.cache_implementation", reason)
    if section.use_cache is False:
        yield Refusal("pytorch.cache_implementation", "does nothing with use_cache: false")
    if name.startswith("offloaded") and facts.device == "cpu":
        yield Refusal("pytorch.cache_implementation", f"{name} moves the cache from GPU to CPU, where it is already")


def _decoding(section: PyTorchConfig) -> Iterator[Refusal]:
    if not is_assisted(section):
        return
    if section.beam_search.enabled:
        yield Refusal("pytorch.assisted_generation", "goes with greedy decoding and sampling, not with beam_search")
    if section.batch_size > 1:
        reason = f"runs one request at a time, got batch_size {section.batch_size}"
        yield Refusal("pytorch.assisted_generation", reason)


def _extra(section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
    for name in section.extra:
        reason = _reason_against(name, section, facts)
        if reason is not None:
            yield Refusal(f"pytorch.extra.{name}", reason)


def _reason_against(name: str, section: PyTorchConfig, facts: EngineFacts) -> str | None:
    if name in _OWNED:
        return f"is set by {_OWNED[name]}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name not in facts.generate_arguments:
        usable = sorted({*facts.generate_arguments} - {*_OWNED} - {*_REFUSED})
        return f"generate has no such argument{did_you_mean(name, usable)}"
    return next((f"does nothing without {need}" for need in _needs(name, section)), None)


def _needs(name: str, section: PyTorchConfig) -> Iterator[str]:
    """What an argument works with and does not have; transformers passes over such an argument in silence."""
    cache = section.cache_implementation or ""
    if name == "max_cache_len" and "static" not in cache:
        yield "cache_implementation: static"
    if name == "cache_config" and cache != "quantized":
        yield "cache_implementation: quantized"
    if name == "disable_compile" and ("static" not in cache or section.torch_compile):
        yield "cache_implementation: static, for which transformers compiles by itself on a GPU, alone"
    has_model = section.assisted_generation.model is not None
    if name == "max_matching_ngram_size" and (has_model or not is_assisted(section)):
        yield "assisted_generation.num_tokens alone, which looks n-grams up in the prompt"
    if name in {*ASSISTANT_ARGUMENTS, "assistant_ensemble_weight", "speculation_type"} and not has_model:
        yield "assisted_generation.model"
