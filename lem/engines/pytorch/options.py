"""Options of the pytorch backend: batches, arguments of transformers' `generate`, and what is refused.

Imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.errors import did_you_mean
from lem.base.reasons import Reason
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.common import section_of, set_by
from lem.engines.protocol import TokenRequest

FOUR_BIT_OPTIONS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
# Arguments that transformers reads from the assistant's own generation config and nowhere else.
_ASSISTANT_ARGUMENTS = (
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind"),
)
_BEAM_ARGUMENTS = ("num_beams", "length_penalty", "early_stopping")
# Modes of torch.compile that record CUDA graphs on a GPU (its reference, torch.compile, mode).
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
# Caches that `generate` makes by name; the others it knows are old names, which it turns into one of these.
_CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")

_MOVED = "transformers moved it to code that is downloaded from the hub"
_OUTPUT = "lem only reads the tokens"
_DRAFT_LENGTH = "is set by pytorch.assisted_generation.num_tokens"
# Why an argument of `generate` is not taken from `extra`.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("max_length", "max_new_tokens"), "is set by max_output_tokens"),
        **dict.fromkeys(("min_length", "min_new_tokens"), "is set by min_output_tokens"),
        **set_by("decoder", ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")),
        **set_by("pytorch", ("min_p", "no_repeat_ngram_size", "use_cache", "cache_implementation")),
        **set_by("pytorch.beam_search", _BEAM_ARGUMENTS),
        **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens"), _DRAFT_LENGTH),
        "compile_config": "is set by pytorch.torch_compile",
        "eos_token_id": "is set by ignore_eos",
        "stop_strings": "a row that ends with one looks padded, so its tokens cannot be counted",
        "token_healing": "it changes the prompts",
        "num_return_sequences": "lem counts one answer per request",
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


@dataclass(frozen=True)
class EngineFacts:
    versions: Mapping[str, str]  # of the packages that matter, by distribution
    device: str  # cpu or cuda
    gpu_index: int | None = None  # the CUDA device in use
    compile_backends: tuple[str, ...] = ()  # names that torch.compile takes
    generate_arguments: tuple[str, ...] = ()  # the fields of GenerationConfig

    def __str__(self) -> str:
        return f"transformers {self.versions['transformers']} with torch {self.versions['torch']} on {self.device}"

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.versions["transformers"].split(".")[:2]
        return int(major), int(minor)

    def missing(self, *packages: str) -> str | None:
        missing = [name for name in packages if name not in self.versions]
        return f"needs {' and '.join(missing)} (pip install {' '.join(missing)})" if missing else None


@dataclass(frozen=True)
class SpecialTokens:
    pad_id: int  # any id would do: padding is masked
    end_ids: tuple[int, ...]  # each ends a sequence


# --- batches


def plan_batches(requests: Sequence[TokenRequest], section: PyTorchConfig) -> tuple[tuple[TokenRequest, ...], ...]:
    """The requests in batches, each in exactly one, by `batching_strategy`."""
    # `static` takes requests as they come, `dynamic` as many as the token budget holds (a request that is larger runs
    # alone); `sorted_…` takes the longest prompts first, so that the lengths in a batch differ little.
    # Python's sort is stable: equal prompts keep their order, so a plan depends on the requests alone.
    is_sorted = section.batching_strategy.startswith("sorted_")
    ordered = sorted(requests, key=lambda request: -len(request.token_ids)) if is_sorted else list(requests)
    groups: dict[Any, list[TokenRequest]] = {}
    for request in ordered:
        # A beam search has one bound for all its rows; otherwise each row can end at its own.
        bounds = (request.max_output_tokens, request.min_output_tokens) if section.beam_search.enabled else None
        groups.setdefault(bounds, []).append(request)
    return tuple(batch for group in groups.values() for batch in _fill(group, section))


def _fill(requests: Iterable[TokenRequest], section: PyTorchConfig) -> Iterator[tuple[TokenRequest, ...]]:
    budget = section.max_tokens_per_batch  # only given with a dynamic strategy
    batch: list[TokenRequest] = []
    for request in requests:
        grown = [*batch, request]
        longest_output = max(item.max_output_tokens for item in grown)
        positions = len(grown) * (max(len(item.token_ids) for item in grown) + longest_output)
        is_too_large = budget is not None and positions > budget
        if batch and (len(grown) > section.batch_size or is_too_large):
            yield tuple(batch)
            batch = [request]
        else:
            batch = grown
    if batch:
        yield tuple(batch)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """The rows padded to the longest, and the mask: 1 for a token, 0 for padding."""
    # A decoder continues from the last position, so padding comes first.
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return ids, mask


def cut_output(generated: Sequence[int], max_tokens: int, end_ids: Set[int]) -> tuple[int, ...]:
    """A row of a batch up to and including its end (one of `end_ids`), and never beyond its bound."""
    # A row that ended before the batch is padded; one without an end was generated further.
    ends = (index + 1 for index, token in enumerate(generated[:max_tokens]) if token in end_ids)
    return tuple(generated[: next(ends, max_tokens)])


# --- arguments


def is_assisted(section: PyTorchConfig) -> bool:
    return section.assisted_generation.model is not None or section.assisted_generation.num_tokens is not None


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    is_unused = section_of(config, PyTorchConfig).min_p is not None and config.decoder.is_greedy
    return (Reason.of("min_p_unused", backend="pytorch"),) if is_unused else ()


def compiles_steps(section: PyTorchConfig, device: str) -> bool:
    """Whether transformers compiles the steps after the prompt, instead of lem the whole model."""
    # CUDA graphs replay on tensors that stay in place. A whole model makes its cache inside the first of its graphs,
    # and the next one overwrites it: torch 2.11 reports this and stops.
    return device != "cpu" and section.torch_compile in _CUDA_GRAPH_MODES


def generation_settings(config: ExperimentConfig, tokens: SpecialTokens, device: str) -> dict[str, Any]:
    """Arguments of GenerationConfig without the output bounds, which come with the requests."""
    # The model's own generation config is not used: everything that is not set here has transformers' default.
    section, decoder = section_of(config, PyTorchConfig), config.decoder
    settings: dict[str, Any] = {
        "do_sample": not decoder.is_greedy,
        "repetition_penalty": decoder.repetition_penalty,
        "pad_token_id": tokens.pad_id,
        "eos_token_id": None if config.ignore_eos or not tokens.end_ids else list(tokens.end_ids),
        "use_cache": section.use_cache,
        "cache_implementation": section.cache_implementation,
        "no_repeat_ngram_size": section.no_repeat_ngram_size,
    }
    if not decoder.is_greedy:
        settings |= {name: getattr(decoder, name) for name in ("temperature", "top_k", "top_p")}
        settings["min_p"] = section.min_p
    if section.beam_search.enabled:
        settings |= {name: getattr(section.beam_search, name) for name in _BEAM_ARGUMENTS}
    if section.torch_compile and not compiles_steps(section, device):
        # With a static cache on a GPU transformers would compile once more, in a mode of its own.
        settings["disable_compile"] = True
    if section.assisted_generation.model is None:
        settings["prompt_lookup_num_tokens"] = section.assisted_generation.num_tokens
    settings |= {name: value for name, value in common.extra_of(config).items() if name not in _ASSISTANT_ARGUMENTS}
    return {name: value for name, value in settings.items() if value is not None}


def assistant_settings(config: ExperimentConfig) -> dict[str, Any]:
    # With `num_tokens` the assistant drafts exactly that many tokens at each step: no schedule changes their number,
    # and it does not stop early when it is unsure of itself (transformers' own threshold is 0.4).
    drafted_tok = section_of(config, PyTorchConfig).assisted_generation.num_tokens
    settings = {name: value for name, value in common.extra_of(config).items() if name in _ASSISTANT_ARGUMENTS}
    if drafted_tok is None:
        return settings
    constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    return {"num_assistant_tokens": drafted_tok, **constant, **settings}


# --- before the load


def check(config: ExperimentConfig, facts: EngineFacts) -> None:
    section = section_of(config, PyTorchConfig)
    refusals = [*_loading(section, facts), *_running(config, section, facts), *_refused_extra(section, facts)]
    if config.model.adapter is not None and (missing := facts.missing("peft")):
        refusals.insert(0, ("model.adapter", missing))
    common.refuse(refusals, facts)


def _loading(section: PyTorchConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    name = "pytorch.low_cpu_mem_usage"
    if section.low_cpu_mem_usage is False and facts.release >= (5, 0):
        yield name, "false is no longer supported: weights always load without a second copy"
    if section.low_cpu_mem_usage and facts.release < (5, 0) and (missing := facts.missing("accelerate")):
        yield name, missing
    name = "pytorch.max_memory"
    if section.max_memory is not None and facts.device == "cpu":
        yield name, "it splits a model between a GPU and the CPU, and no GPU is in use"
    elif section.max_memory is not None:
        if missing := facts.missing("accelerate"):
            yield name, missing
        others = sorted(str(key) for key in section.max_memory if str(key) not in {"cpu", str(facts.gpu_index)})
        if others:
            yield name, f"expected cpu or the GPU in use ({facts.gpu_index}), got {', '.join(others)}"
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(section, name) and facts.device != "cuda":
            yield f"pytorch.{name}", "bitsandbytes needs a CUDA GPU"
        elif getattr(section, name) and (missing := facts.missing("bitsandbytes", "accelerate")):
            yield f"pytorch.{name}", missing


def _running(config: ExperimentConfig, section: PyTorchConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    budget, largest = section.max_tokens_per_batch, config.max_input_tokens + config.max_output_tokens
    if budget is not None and budget < largest:
        reason = f"must be at least {largest}, the largest request (max_input_tokens + max_output_tokens), got {budget}"
        yield "pytorch.max_tokens_per_batch", reason
    name, mode, backend = "pytorch.torch_compile", section.torch_compile, section.torch_compile_backend
    if backend is not None and backend not in facts.compile_backends:
        known = ", ".join(facts.compile_backends)
        reason = f"expected one of {known}, got {backend}{did_you_mean(backend, facts.compile_backends)}"
        yield "pytorch.torch_compile_backend", reason
    if mode == "reduce-overhead" and facts.device == "cpu":
        yield name, "reduce-overhead uses CUDA graphs and has no effect on the CPU"
    if compiles_steps(section, facts.device) and section.cache_implementation != "static":
        yield name, f"{mode} records CUDA graphs and requires cache_implementation: static"
    if mode not in {False, "default"} and backend not in {None, "inductor"}:
        yield name, f"{mode} is a mode of the inductor backend, got {backend}"
    name, cache = "pytorch.cache_implementation", section.cache_implementation
    if cache is not None and cache not in _CACHES:
        yield name, f"expected one of {', '.join(_CACHES)}, got {cache}{did_you_mean(cache, _CACHES)}"
    if cache is not None and section.use_cache is False:
        yield name, "has no effect with use_cache: false"
    if cache is not None and cache.startswith("offloaded") and facts.device == "cpu":
        yield name, f"{cache} moves the cache from GPU to CPU, where it already is"
    name = "pytorch.assisted_generation"
    if is_assisted(section) and section.beam_search.enabled:
        yield name, "cannot be combined with beam_search"
    if is_assisted(section) and section.batch_size > 1:
        yield name, f"requires batch_size 1, got {section.batch_size}"


def _refused_extra(section: PyTorchConfig, facts: EngineFacts) -> Iterator[tuple[str, str]]:
    for name in section.extra:
        reason = common.reason_against(name, _REFUSED, facts.generate_arguments, "unknown argument of generate")
        if reason is None and (need := _need_of(name, section)):
            reason = f"has no effect without {need}"
        if reason:
            yield f"pytorch.extra.{name}", reason


def _need_of(name: str, section: PyTorchConfig) -> str | None:
    cache = section.cache_implementation or ""
    has_model = section.assisted_generation.model is not None
    if name == "max_cache_len" and "static" not in cache:
        return "cache_implementation: static"
    if name == "cache_config" and cache != "quantized":
        return "cache_implementation: quantized"
    if name == "disable_compile" and ("static" not in cache or section.torch_compile):
        return "cache_implementation: static and torch_compile: false, with which transformers compiles on a GPU"
    if name == "max_matching_ngram_size" and (has_model or not is_assisted(section)):
        return "assisted_generation.num_tokens and no model, which looks up n-grams in the prompt"
    if name in {*_ASSISTANT_ARGUMENTS, "assistant_ensemble_weight", "speculation_type"} and not has_model:
        return "assisted_generation.model"
    return None
