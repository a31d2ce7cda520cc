"""Options of the pytorch backend: batching, arguments for transformers, refusals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lem.base.reasons import Reason
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.config.problems import did_you_mean
from lem.engines.common import Refusal, refuse
from lem.engines.protocol import TokenRequest

BATCHING_STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic")

Batch = tuple[TokenRequest, ...]


@dataclass(frozen=True)
class BatchRules:
    """How requests are put together.

    Attributes:
        strategy: one of `BATCHING_STRATEGIES`. `static` takes requests as they come, `dynamic` as many as the token
            budget holds, `sorted_…` takes the longest prompts first, so that neighbours differ little.
        batch_size: the most requests in a batch, under every strategy.
        max_tokens: the budget of a dynamic batch in positions, padding and room for output included:
            rows × (longest prompt + longest output).
        has_one_bound: all requests of a batch must have the same bounds on their output.
    """

    strategy: str
    batch_size: int
    max_tokens: int | None = None
    has_one_bound: bool = False

    @property
    def is_sorted(self) -> bool:
        """Whether requests are ordered by length first."""
        return self.strategy.startswith("sorted_")

    @property
    def budget(self) -> int | None:
        """The budget where it holds, else None."""
        return self.max_tokens if self.strategy.endswith("dynamic") else None


def plan_batches(requests: Sequence[TokenRequest], rules: BatchRules) -> tuple[Batch, ...]:
    """The requests in batches, each request in exactly one; a request larger than the budget runs alone."""
    # Python's sort is stable: equal prompts keep their order, so a plan depends on the requests alone.
    ordered = sorted(requests, key=lambda request: -len(request.token_ids)) if rules.is_sorted else list(requests)
    groups = _by_bounds(ordered) if rules.has_one_bound else [ordered]
    return tuple(batch for group in groups for batch in _fill(group, rules))


def _by_bounds(requests: Iterable[TokenRequest]) -> list[list[TokenRequest]]:
    groups: dict[tuple[int, int], list[TokenRequest]] = {}
    for request in requests:
        groups.setdefault((request.max_output_tokens, request.min_output_tokens), []).append(request)
    return list(groups.values())


def _fill(requests: Iterable[TokenRequest], rules: BatchRules) -> Iterable[Batch]:
    batch: list[TokenRequest] = []
    for request in requests:
        grown = [*batch, request]
        is_too_large = rules.budget is not None and positions(grown) > rules.budget
        if batch and (len(grown) > rules.batch_size or is_too_large):
            yield tuple(batch)
            batch = [request]
        else:
            batch = grown
    if batch:
        yield tuple(batch)


def positions(batch: Sequence[TokenRequest]) -> int:
    """Positions a batch can come to take: its rows times its longest prompt and longest output."""
    return len(batch) * (
        max(len(request.token_ids) for request in batch) + max(request.max_output_tokens for request in batch)
    )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """The rows filled up in front to the longest, and the mask: 1 where a token is, 0 where padding is.

    A decoder goes on from the last position, so the padding must stand in front.
    """
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return ids, mask


def cut_output(generated: Sequence[int], max_tokens: int, end_ids: Set[int]) -> tuple[int, ...]:
    """What counts of a row of a batch: up to and including the first id that ends it, and never beyond its bound.

    A row that ended before the batch did is filled up with padding, or was generated further where nothing ends it.

    Args:
        end_ids: ids that end a sequence; none where they are ignored.
    """
    for index, token in enumerate(generated[:max_tokens]):
        if token in end_ids:
            return tuple(generated[: index + 1])
    return tuple(generated[:max_tokens])


# Arguments that transformers reads from the assistant's own generation config and nowhere else.
ASSISTANT_ARGUMENTS = (
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
)

# Modes of torch.compile that record CUDA graphs where there is a GPU (its reference, torch.compile, mode).
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class EngineFacts:
    """What was found.

    Attributes:
        versions: of the packages that matter, by distribution: `transformers`, `torch`, `accelerate`, …
        device: `cpu` or `cuda`.
        gpu_index: the CUDA device in use.
        compile_backends: names that torch.compile takes.
        generate_arguments: names of the fields of GenerationConfig.
    """

    versions: Mapping[str, str]
    device: str
    gpu_index: int | None = None
    compile_backends: tuple[str, ...] = ()
    generate_arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"transformers {self.versions['transformers']} with torch {self.versions['torch']} on {self.device}"

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number of transformers."""
        major, minor = self.versions["transformers"].split(".")[:2]
        return int(major), int(minor)

    def lacks(self, *packages: str) -> str | None:
        """What must be installed; None when it is."""
        missing = [name for name in packages if name not in self.versions]
        return f"needs {' and '.join(missing)} (pip install {' '.join(missing)})" if missing else None


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning. `end_ids` end a sequence; padding is masked, so its id only fills the rectangle."""

    pad_id: int
    end_ids: tuple[int, ...]


def section_of(config: ExperimentConfig) -> PyTorchConfig:
    """The options of this backend, defaults where the experiment gives none."""
    section = config.section
    if not isinstance(section, PyTorchConfig):
        raise TypeError(f"an experiment of the backend {config.backend} came to pytorch")
    return section


def is_assisted(section: PyTorchConfig) -> bool:
    """Whether tokens are drafted, by an assistant or from n-grams of the prompt, before the model checks them."""
    return section.assisted_generation.model is not None or section.assisted_generation.num_tokens is not None


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    """What the experiment asks for in vain; the rules across fields tell of the decoder's own values."""
    if section_of(config).min_p is not None and config.decoder.is_greedy:
        return (Reason.of("min_p_unused", backend="pytorch"),)
    return ()


def batch_rules(config: ExperimentConfig) -> BatchRules:
    """How the requests of this experiment are put together."""
    section = section_of(config)
    return BatchRules(
        section.batching_strategy,
        section.batch_size,
        section.max_tokens_per_batch,
        # A beam search has one bound for all its rows; other ways of decoding can end each row at its own.
        has_one_bound=section.beam_search.enabled,
    )


def compiles_steps(section: PyTorchConfig, device: str) -> bool:
    """Whether transformers compiles the steps that follow the prompt, instead of lem the whole model.

    CUDA graphs replay on tensors that stay where they are. A whole model makes its cache within the first of its
    graphs, and the next one writes over it: torch 2.11 says so and stops.
    """
    return device != "cpu" and section.torch_compile in CUDA_GRAPH_MODES


def generation_settings(config: ExperimentConfig, tokens: SpecialTokens, device: str) -> dict[str, Any]:
    """Arguments of GenerationConfig without the bounds on the output, which come with the requests.

    Nothing is left to the generation config that a model brings along: what is not named here has the default of
    transformers.
    """
    section, decoder = section_of(config), config.decoder
    settings: dict[str, Any] = {
        "do_sample": not config.decoder.is_greedy,
        "repetition_penalty": decoder.repetition_penalty,
        "pad_token_id": tokens.pad_id,
        "eos_token_id": None if config.ignore_eos or not tokens.end_ids else list(tokens.end_ids),
        "use_cache": section.use_cache,
        "cache_implementation": section.cache_implementation,
        "no_repeat_ngram_size": section.no_repeat_ngram_size,
    }
    if settings["do_sample"]:
        settings |= {name: getattr(decoder, name) for name in ("temperature", "top_k", "top_p")}
        settings["min_p"] = section.min_p
    if section.beam_search.enabled:
        settings |= {
            name: getattr(section.beam_search, name) for name in ("num_beams", "length_penalty", "early_stopping")
        }
    if section.torch_compile and not compiles_steps(section, device):
        # With a static cache on a GPU transformers would compile once more, in a mode of its own.
        settings["disable_compile"] = True
    if section.assisted_generation.model is None:
        settings["prompt_lookup_num_tokens"] = section.assisted_generation.num_tokens
    settings |= {name: value for name, value in _extra_arguments(section).items() if name not in ASSISTANT_ARGUMENTS}
    return {name: value for name, value in settings.items() if value is not None}


def assistant_settings(section: PyTorchConfig) -> dict[str, Any]:
    """Arguments of the GenerationConfig of an assistant.

    With `num_tokens` the assistant drafts exactly so many tokens at each step: no schedule changes their number, and
    it does not stop early when it is unsure of itself (transformers' own threshold is 0.4).
    """
    settings: dict[str, Any] = {}
    if section.assisted_generation.num_tokens is not None:
        settings = {
            "num_assistant_tokens": section.assisted_generation.num_tokens,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
    return settings | {name: value for name, value in _extra_arguments(section).items() if name in ASSISTANT_ARGUMENTS}


def _extra_arguments(section: PyTorchConfig) -> dict[str, Any]:
    """The extra arguments as JSON has them: a section freezes lists into tuples, which transformers does not take."""
    extra: dict[str, Any] = section.to_dict()["extra"]
    return extra


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
        *_refused_extra(section, facts),
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


def _refused_extra(section: PyTorchConfig, facts: EngineFacts) -> Iterator[Refusal]:
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
