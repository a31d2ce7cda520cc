"""Generating with a loaded transformers model, and the trial run that shows whether its options work."""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lem.base.dataclass import dataclass
from lem.base.errors import REPEATING, EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.checkpoints import Source, is_out_of_memory
from lem.engines.common import ENGINE_FAILURES, EngineRaised, engine_call, out_of_memory, plain, section_of, shortened
from lem.engines.protocol import Completion, TokenRequest
from lem.engines.pytorch import options
from lem.engines.pytorch.options import EngineFacts, SpecialTokens

# Fields of GenerationConfig that say nothing about how tokens are generated.
GENERATION_META = ("transformers_version", "_from_model_config")
# CUDA graphs warm up, record and replay: a fault of theirs shows after a few steps.
_TRIAL_TOKENS = 8

_CACHE_NAMES = {"DynamicCache": "dynamic", "StaticCache": "static", "QuantizedCache": "quantized"}
_OFFLOADED_NAMES = {**_CACHE_NAMES, "DynamicCache": "offloaded", "StaticCache": "offloaded_static"}


@dataclass
class LoadedModel:
    model: Any
    tokenizer: Any
    source: Source
    device: torch.device  # of the inputs
    tokens: SpecialTokens
    positions: int | None  # the longest sequence the model has positions for; None if it does not say
    left_out: Mapping[str, Any]  # the values of the model's own generation config, which are not used
    adapter: Source | None = None
    assistant: Any = None  # of assisted generation
    assistant_name: str | None = None
    assistant_tokenizer: Any = None  # only if it differs
    warnings: tuple[Reason, ...] = ()  # about the weights


class TokenClock(BaseStreamer):  # type: ignore[misc]  # transformers is not type-checked
    """Records when tokens arrive. `generate` passes it the prompts first, then the tokens of each step."""

    # A step of a batch brings one token per row; a step of assisted generation several of its one row.

    def __init__(self, rows: int) -> None:
        self.times_ns: list[int] = []
        self._rows = rows
        self._has_prompts = False

    def put(self, value: Any) -> None:
        now_ns = time.monotonic_ns()
        if self._has_prompts:
            self.times_ns.extend([now_ns] * (value.numel() // self._rows))
        self._has_prompts = True

    def end(self) -> None:
        """The batch is done."""


class BatchRunner:
    def __init__(self, loaded: LoadedModel, settings: Mapping[str, Any]) -> None:
        self.loaded = loaded
        self.settings = dict(settings)
        self._end_ids = frozenset(settings.get("eos_token_id") or ())
        self._configs: dict[tuple[int, int], GenerationConfig] = {}
        self._partners: dict[str, Any] = {}
        if loaded.assistant is not None:
            self._partners["assistant_model"] = loaded.assistant
            if loaded.assistant_tokenizer is not None:
                self._partners |= {"tokenizer": loaded.tokenizer, "assistant_tokenizer": loaded.assistant_tokenizer}

    def run(self, batch: Sequence[TokenRequest], *, observe: bool) -> list[Completion]:
        problems, now_ns = [(request, self._problem_of(request)) for request in batch], time.monotonic_ns()
        failed = [Completion(request.index, (), now_ns, now_ns, error=text) for request, text in problems if text]
        fitting = [request for request, text in problems if text is None]
        if not fitting:
            return failed
        started_ns = time.monotonic_ns()
        clock = TokenClock(len(fitting)) if observe else None
        try:
            generated = self._generate(fitting, clock)
            return [*failed, *self._complete(fitting, generated, started_ns, clock)]
        except EngineRaised as raised:
            text = shortened(raised.error)
            if not is_out_of_memory(raised.error):
                what, repeats = type(raised.error).__name__, isinstance(raised.error, REPEATING)
                raise EngineError(f"generate failed: {what}: {text}", is_permanent=repeats) from raised
            problem = f"out of memory in a batch of {len(fitting)}: {text}"
        # Outside the handler, whose traceback still holds the tensors of the batch.
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        now_ns = time.monotonic_ns()
        return failed + [Completion(request.index, (), started_ns, now_ns, error=problem) for request in fitting]

    def try_out(self, batch: Sequence[TokenRequest]) -> Any:
        config = engine_settings({**self.settings, "return_dict_in_generate": True}, *_bounds(batch))
        return self._call(batch, config, None)[0]

    def _generate(self, batch: Sequence[TokenRequest], clock: TokenClock | None) -> list[list[int]]:
        bounds = _bounds(batch)
        if bounds not in self._configs:
            self._configs[bounds] = engine_settings(self.settings, *bounds)
        output, width = self._call(batch, self._configs[bounds], clock)
        # Reading the tokens waits for the device, so the batch is done when they are here.
        with engine_call(RuntimeError):
            rows: list[list[int]] = output[:, width:].tolist()
        return rows

    def _call(
        self, batch: Sequence[TokenRequest], config: GenerationConfig, clock: TokenClock | None
    ) -> tuple[Any, int]:
        ids, mask = options.pad_left([request.token_ids for request in batch], self.loaded.tokens.pad_id)
        arguments: dict[str, Any] = {**self._partners, **self._row_bounds(batch, len(ids[0]))}
        arguments |= {"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask), "streamer": clock}
        try:
            output = self.loaded.model.generate(generation_config=config, **arguments)
        except OSError:  # a full disk, say: not a refusal of the engine
            raise
        except ENGINE_FAILURES as error:
            if _is_of_callback(error):
                raise
            raise EngineRaised(error) from error
        return output, len(ids[0])

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        made = torch.tensor(values)
        with engine_call(RuntimeError):
            return made.to(self.loaded.device)

    def _row_bounds(self, batch: Sequence[TokenRequest], width: int) -> dict[str, Any]:
        """What holds the rows to bounds of their own, if these differ; prompts are `width` tokens long."""
        arguments: dict[str, Any] = {}
        limits = [request.max_output_tokens for request in batch]
        minimums = [request.min_output_tokens for request in batch]
        if len(set(limits)) > 1:
            longest = self._tensor(limits) + width

            def is_done(input_ids: torch.Tensor, _scores: Any, **_rest: Any) -> torch.Tensor:
                return longest <= input_ids.shape[1]

            arguments["stopping_criteria"] = StoppingCriteriaList([is_done])
        if len(set(minimums)) > 1 and self._end_ids:
            shortest, end_ids = self._tensor(minimums) + width, self._tensor(sorted(self._end_ids))

            def keep_open(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                is_early = shortest > input_ids.shape[1]
                scores[:, end_ids] = scores[:, end_ids].masked_fill(is_early[:, None], -torch.inf)
                return scores

            arguments["logits_processor"] = LogitsProcessorList([keep_open])
        return arguments

    def _complete(
        self, batch: Sequence[TokenRequest], generated: list[list[int]], started_ns: int, clock: TokenClock | None
    ) -> Iterator[Completion]:
        now_ns, width = time.monotonic_ns(), max(len(request.token_ids) for request in batch)
        for request, row in zip(batch, generated, strict=True):
            output_ids = options.cut_output(row, request.max_output_tokens, self._end_ids)
            times_ns = None if clock is None else tuple(clock.times_ns[: len(output_ids)])
            finished_ns = times_ns[-1] if times_ns else now_ns
            padding_tok = width - len(request.token_ids)
            yield Completion(request.index, output_ids, started_ns, finished_ns, times_ns, padding_tok=padding_tok)

    def _problem_of(self, request: TokenRequest) -> str | None:
        needed, positions = len(request.token_ids) + request.max_output_tokens, self.loaded.positions
        if positions is None or needed <= positions:
            return None
        wanted = f"{len(request.token_ids)} prompt tokens and {request.max_output_tokens} output tokens"
        return f"{wanted} exceed the {positions} positions of the model; lower max_input_tokens or max_output_tokens"


def _bounds(batch: Sequence[TokenRequest]) -> tuple[int, int]:
    return max(item.max_output_tokens for item in batch), min(item.min_output_tokens for item in batch)


def engine_settings(settings: Mapping[str, Any], maximum: int, minimum: int) -> GenerationConfig:
    bounds = {"max_new_tokens": maximum}
    if minimum > 0 and settings.get("eos_token_id"):
        bounds["min_new_tokens"] = minimum
    with engine_call():
        config = GenerationConfig(**settings, **bounds)
        config.validate(strict=True)
    return config


def _is_of_callback(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, RuntimeError)):
        return False  # the device fails wherever it is used
    _caught, *called = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("lem.") for frame, _line in called)


# --- the trial


def try_out(runner: BatchRunner, section: PyTorchConfig, facts: EngineFacts) -> tuple[str | None, tuple[Reason, ...]]:
    """Generate a few tokens; the kind of cache in use and what transformers warned of. OptionRefused."""
    ends = frozenset(runner.loaded.tokens.end_ids)
    # Ids that every model has. Two requests of different lengths try padding too.
    ids = tuple(itertools.islice((token for token in itertools.count() if token not in ends), 4))
    # Transformers 4 takes no minimum with a draft.
    minimum = 0 if options.is_assisted(section) else _TRIAL_TOKENS
    rows = range(min(section.batch_size, 2))
    graphs_before = _compiled_graphs() if section.torch_compile else 0
    with _transformers_warnings() as warnings, common.raised_as(lambda error: _trial_failure(error, section, facts)):
        output = runner.try_out([TokenRequest(row, ids[row:], _TRIAL_TOKENS, minimum) for row in rows])
    cache = _cache_in(output)
    requested = section.cache_implementation
    if requested is not None and cache != requested:
        raise OptionRefused(f"pytorch.cache_implementation: {facts} used {cache} instead of {requested}")
    if section.use_cache is not None and section.use_cache != (cache is not None):
        raise OptionRefused(f"pytorch.use_cache: {facts} used a cache of kind {cache}")
    if section.torch_compile and _compiled_graphs() == graphs_before:
        raise OptionRefused(f"pytorch.torch_compile: {facts} did not compile this model")
    return cache, tuple(Reason.of("verbatim", text=text) for text in dict.fromkeys(warnings))


def _cache_in(output: Any) -> str | None:
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    kind = type(cache).__name__
    names = _OFFLOADED_NAMES if getattr(cache, "offloading", False) else _CACHE_NAMES
    return names.get(kind, kind)


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _trial_failure(error: BaseException, section: PyTorchConfig, facts: EngineFacts) -> EngineError:
    if is_out_of_memory(error):
        text = f"out of memory while generating {_TRIAL_TOKENS} tokens: {shortened(error)}"
        return out_of_memory(text, "use a smaller model or batch, or a lower fp_precision")
    default = type(section)().to_dict()
    changed = ", ".join(f"{name}: {value}" for name, value in section.to_dict().items() if value != default[name])
    text = f"{facts} cannot generate with {changed or 'this model'}: {type(error).__name__}: {shortened(error)}"
    hint = "torch.compile needs a C++ compiler on the CPU, Triton on a GPU" if section.torch_compile else ""
    return OptionRefused(text, hint)


@contextmanager
def _transformers_warnings() -> Iterator[list[str]]:
    warnings: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(" ".join(record.getMessage().split()))

    handler, logger = Listener(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)


# --- effective options


def describe_effective(
    config: ExperimentConfig, loaded: LoadedModel, settings: Mapping[str, Any], cache: str | None
) -> dict[str, Any]:
    given = engine_settings(settings, config.max_output_tokens, config.min_output_tokens).to_dict()
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    effective = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    # The lengths of a batch follow from max_new_tokens and its prompts; how steps are compiled is in the section.
    skipped = {*GENERATION_META, "max_length", "min_length", "compile_config"}
    generation = {name: value for name, value in sorted(effective.items()) if value is not None and name not in skipped}
    model = loaded.model
    return {
        "pytorch": _describe_section(section_of(config, PyTorchConfig), loaded, generation, cache),
        "decoder": common.describe_decoder(config.decoder, generation, is_sampling=bool(generation["do_sample"])),
        "fp_precision": str(model.dtype).removeprefix("torch."),
        "ignore_eos": config.ignore_eos or not loaded.tokens.end_ids,
        "random_seed": config.random_seed,
        "generation": generation,
        "generation_left_out": dict(loaded.left_out),
        "model_class": type(model).__name__,
        "attention": getattr(model.config, "_attn_implementation", None),
        "device_map": {str(key): str(value) for key, value in (getattr(model, "hf_device_map", None) or {}).items()},
        "eos_token_ids": list(loaded.tokens.end_ids),
        "pad_token_id": loaded.tokens.pad_id,
        "positions": loaded.positions,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def _describe_section(
    section: PyTorchConfig, loaded: LoadedModel, generation: Mapping[str, Any], cache: str | None
) -> dict[str, Any]:
    model = loaded.model
    is_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
    quantization = getattr(model.config, "quantization_config", None) if is_4bit else None
    assistant = loaded.assistant.generation_config if loaded.assistant is not None else None
    has_beams = generation["num_beams"] > 1
    return {
        **section.to_dict(),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "torch_compile_backend": (section.torch_compile_backend or "inductor") if section.torch_compile else None,
        "use_cache": cache is not None,
        "cache_implementation": cache,
        # The only way since transformers 5.
        "low_cpu_mem_usage": True if section.low_cpu_mem_usage is None else section.low_cpu_mem_usage,
        "load_in_4bit": is_4bit,
        "load_in_8bit": bool(getattr(model, "is_loaded_in_8bit", False)),
        **{name: plain(getattr(quantization, name, None)) for name in options.FOUR_BIT_OPTIONS},
        "min_p": generation.get("min_p"),
        "no_repeat_ngram_size": generation["no_repeat_ngram_size"],
        "beam_search": {
            "enabled": has_beams,
            "num_beams": generation["num_beams"],
            "length_penalty": generation["length_penalty"] if has_beams else None,
            "early_stopping": generation["early_stopping"] if has_beams else None,
        },
        "assisted_generation": {
            "model": loaded.assistant_name,
            "num_tokens": getattr(assistant, "num_assistant_tokens", None)
            or generation.get("prompt_lookup_num_tokens")
            or (generation["num_assistant_tokens"] if assistant is not None else None),
        },
    }
