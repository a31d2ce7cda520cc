"""Generating with transformers, and the trial run that shows whether it works."""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import PyTorchConfig
from lem.engines.checkpoints import is_out_of_memory
from lem.engines.common import EngineRaised, shortened
from lem.engines.protocol import Completion, TokenRequest
from lem.engines.pytorch.loading import LoadedModel
from lem.engines.pytorch.options import EngineFacts, cut_output, is_assisted, pad_left

# What `generate`, torch.compile and the packages they call raise over what they are given or what they run on.
_FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TokenClock(BaseStreamer):  # type: ignore[misc]  # transformers is not looked into
    """Notes when tokens were there. `generate` hands it the prompts first, then each step's tokens of all rows.

    A step of a batch brings one token a row; a step of assisted generation several of its one row.
    """

    def __init__(self, rows: int, clock: Callable[[], int]) -> None:
        self.times_ns: list[int] = []
        self._rows = rows
        self._clock = clock
        self._has_prompts = False

    def put(self, value: Any) -> None:
        """Take a step's tokens; the first call brings the prompts."""
        now_ns = self._clock()
        if self._has_prompts:
            self.times_ns.extend([now_ns] * (value.numel() // self._rows))
        self._has_prompts = True

    def end(self) -> None:
        """The batch is done."""


class RowLimits(StoppingCriteria):  # type: ignore[misc]  # transformers is not looked into
    """Ends each row at its own bound."""

    def __init__(self, width: int, limits: torch.Tensor) -> None:
        self._width = width
        self._limits = limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_rest: Any) -> torch.Tensor:  # noqa: ARG002
        """Which rows are at their end."""
        return self._limits <= input_ids.shape[1] - self._width


class RowMinimums:
    """Keeps each row from ending before its own least length."""

    def __init__(self, width: int, minimums: torch.Tensor, end_ids: torch.Tensor) -> None:
        self._width = width
        self._minimums = minimums
        self._end_ids = end_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, with no chance of an end where it is too early."""
        is_early = self._minimums > input_ids.shape[1] - self._width
        ends = scores[:, self._end_ids]
        scores[:, self._end_ids] = ends.masked_fill(is_early[:, None], -torch.inf)
        return scores


class BatchRunner:
    """Generates for one experiment: a loaded model with the settings of `generate`."""

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
        """A completion for each request of the batch; running out of memory fails its requests and nothing else.

        Raises:
            EngineError: the engine failed.
        """
        fitting = [request for request in batch if self._complaint(request) is None]
        failed = [self._reject(request) for request in batch if self._complaint(request) is not None]
        if not fitting:
            return failed
        started_ns = time.monotonic_ns()
        clock = TokenClock(len(fitting), time.monotonic_ns) if observe else None
        try:
            generated = self._generate(fitting, clock)
        except EngineRaised as raised:
            told = shortened(raised.error)
            if not is_out_of_memory(raised.error):
                raise EngineError(f"generate failed: {type(raised.error).__name__}: {told}") from raised
            problem = f"out of memory in a batch of {len(fitting)}: {told}"
        else:
            finished_ns = time.monotonic_ns()
            return failed + self._complete(fitting, generated, started_ns, finished_ns, clock)
        # Outside the handler: the traceback there still holds the tensors of the batch.
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        now_ns = time.monotonic_ns()
        return failed + [Completion(request.index, (), started_ns, now_ns, error=problem) for request in fitting]

    def try_out(self, batch: Sequence[TokenRequest]) -> Any:
        """The whole output of `generate`, cache included, for a few tokens.

        Raises:
            EngineRaised: transformers refuses the settings, or fails.
        """
        config = engine_settings({**self.settings, "return_dict_in_generate": True}, *_bounds(batch))
        return self._call(batch, config, None)[0]

    def _generate(self, batch: Sequence[TokenRequest], clock: TokenClock | None) -> list[list[int]]:
        output, width = self._call(batch, self._config_for(batch), clock)
        # Reading the tokens waits for the device, so the batch is done when they are here.
        try:
            rows: list[list[int]] = output[:, width:].tolist()
        except RuntimeError as error:
            raise EngineRaised(error) from error
        return rows

    def _call(
        self, batch: Sequence[TokenRequest], config: GenerationConfig, clock: TokenClock | None
    ) -> tuple[Any, int]:
        ids, mask = pad_left([request.token_ids for request in batch], self.loaded.tokens.pad_id)
        arguments: dict[str, Any] = {**self._partners, **self._row_bounds(batch, len(ids[0]))}
        if clock is not None:
            arguments["streamer"] = clock
        arguments |= {"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask)}
        try:
            output = self.loaded.model.generate(generation_config=config, **arguments)
        except _FAILURES as error:
            if _is_of_callback(error):
                raise
            raise EngineRaised(error) from error
        return output, len(ids[0])

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        made = torch.tensor(values)
        try:
            return made.to(self.loaded.device)
        except RuntimeError as error:
            raise EngineRaised(error) from error

    def _config_for(self, batch: Sequence[TokenRequest]) -> GenerationConfig:
        bounds = _bounds(batch)
        if bounds not in self._configs:
            self._configs[bounds] = engine_settings(self.settings, *bounds)
        return self._configs[bounds]

    def _row_bounds(self, batch: Sequence[TokenRequest], width: int) -> dict[str, Any]:
        """What holds the rows to bounds of their own, where these differ."""
        arguments: dict[str, Any] = {}
        limits = [request.max_output_tokens for request in batch]
        minimums = [request.min_output_tokens for request in batch]
        if len(set(limits)) > 1:
            criterion = RowLimits(width, self._tensor(limits))
            arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
        if len(set(minimums)) > 1 and self._end_ids:
            processor = RowMinimums(width, self._tensor(minimums), self._tensor(sorted(self._end_ids)))
            arguments["logits_processor"] = LogitsProcessorList([processor])
        return arguments

    def _complete(
        self,
        batch: Sequence[TokenRequest],
        generated: Sequence[Sequence[int]],
        started_ns: int,
        finished_ns: int,
        clock: TokenClock | None,
    ) -> list[Completion]:
        width = max(len(request.token_ids) for request in batch)
        completions = []
        for request, row in zip(batch, generated, strict=True):
            output_ids = cut_output(row, request.max_output_tokens, self._end_ids)
            times_ns = None if clock is None else tuple(clock.times_ns[: len(output_ids)])
            completions.append(
                Completion(
                    request.index,
                    output_ids,
                    started_ns,
                    times_ns[-1] if times_ns else finished_ns,
                    times_ns,
                    padding_tok=width - len(request.token_ids),
                )
            )
        return completions

    def _complaint(self, request: TokenRequest) -> str | None:
        needed, there = len(request.token_ids) + request.max_output_tokens, self.loaded.positions
        if there is None or needed <= there:
            return None
        return (
            f"{len(request.token_ids)} tokens of prompt and {request.max_output_tokens} of output are more than "
            f"the {there} positions of the model; lower max_input_tokens or max_output_tokens"
        )

    def _reject(self, request: TokenRequest) -> Completion:
        now_ns = time.monotonic_ns()
        return Completion(request.index, (), now_ns, now_ns, error=self._complaint(request))


def _bounds(batch: Sequence[TokenRequest]) -> tuple[int, int]:
    """Bounds that hold for every row: the largest maximum, the smallest minimum."""
    return (
        max(request.max_output_tokens for request in batch),
        min(request.min_output_tokens for request in batch),
    )


def engine_settings(settings: Mapping[str, Any], maximum: int, minimum: int) -> GenerationConfig:
    """The GenerationConfig of these settings.

    Raises:
        EngineRaised: transformers says that a setting is wrong or would do nothing beside the others.
    """
    bounds = {"max_new_tokens": maximum}
    if minimum > 0 and settings.get("eos_token_id"):
        bounds["min_new_tokens"] = minimum
    try:
        config = GenerationConfig(**settings, **bounds)
        config.validate(strict=True)
    except _FAILURES as error:
        raise EngineRaised(error) from error
    return config


def _is_of_callback(error: BaseException) -> bool:
    """Whether it comes from what `generate` calls back, which is code of lem: the clock and the bounds of rows."""
    if isinstance(error, (MemoryError, RuntimeError)):
        return False  # the device fails wherever it is used
    _caught, *called = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("lem.") for frame, _line in called)


# CUDA graphs warm up, record and replay: a fault of theirs shows after a few steps.
OUTPUT_TOKENS = 8

_CACHE_NAMES = {"DynamicCache": "dynamic", "StaticCache": "static", "QuantizedCache": "quantized"}


@dataclass(frozen=True)
class Trial:
    """What was seen.

    Attributes:
        cache: the kind of key-value cache in use, as `cache_implementation` names it; None without a cache.
        warnings: what transformers warned about.
    """

    cache: str | None
    warnings: tuple[Reason, ...]


def try_out(runner: BatchRunner, section: PyTorchConfig, facts: EngineFacts) -> Trial:
    """Generate a few tokens for one request, or for two of different lengths where batches are formed.

    Raises:
        OptionRefused: the engine cannot honour the options, or does something else than they say.
        EngineError: kind `out_of_memory`.
    """
    graphs_before = _compiled_graphs() if section.torch_compile else 0
    with _transformers_warnings() as heard:
        try:
            output = runner.try_out(_requests(runner, section))
        except EngineRaised as raised:
            if is_out_of_memory(raised.error):
                hint = "use a smaller model or batch, or a lower fp_precision"
                text = f"out of memory on {OUTPUT_TOKENS} tokens: {shortened(raised.error)}"
                raise EngineError(text, hint, kind="out_of_memory", is_permanent=True) from raised
            raise _refusal(raised.error, section, facts) from raised
    cache = _cache_in(output)
    wanted = section.cache_implementation
    if wanted is not None and cache != wanted:
        raise OptionRefused(f"pytorch.cache_implementation: {facts} made a cache of the kind {cache}, not {wanted}")
    if section.use_cache is not None and section.use_cache != (cache is not None):
        raise OptionRefused(f"pytorch.use_cache: {facts} worked with a cache of the kind {cache}")
    if section.torch_compile and _compiled_graphs() == graphs_before:
        raise OptionRefused(f"pytorch.torch_compile: {facts} compiled nothing of this model")
    return Trial(cache, tuple(Reason.of("said", text=text) for text in dict.fromkeys(heard)))


def _requests(runner: BatchRunner, section: PyTorchConfig) -> tuple[TokenRequest, ...]:
    """Requests of ids that no model lacks, of different lengths so that padding is tried as well."""
    ends = frozenset(runner.loaded.tokens.end_ids)
    ids = tuple(itertools.islice((token for token in itertools.count() if token not in ends), 4))
    # Transformers 4 takes no least length beside a draft.
    minimum = 0 if is_assisted(section) else OUTPUT_TOKENS
    return tuple(TokenRequest(row, ids[row:], OUTPUT_TOKENS, minimum) for row in range(min(section.batch_size, 2)))


def _cache_in(output: Any) -> str | None:
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    kind = type(cache).__name__
    name = _CACHE_NAMES.get(kind, kind)
    if getattr(cache, "offloading", False):
        return {"dynamic": "offloaded", "static": "offloaded_static"}.get(name, name)
    return name


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _refusal(error: BaseException, section: PyTorchConfig, facts: EngineFacts) -> OptionRefused:
    """The engine's own words beside the options that can have led to them."""
    given = section.to_dict()
    default = type(section)().to_dict()
    changed = ", ".join(f"{name}: {value}" for name, value in given.items() if value != default[name])
    text = f"{facts} cannot generate with {changed or 'this model'}: {type(error).__name__}: {shortened(error)}"
    hint = ""
    if section.torch_compile:
        hint = "torch.compile needs a C++ compiler on the CPU, Triton on a GPU"
    return OptionRefused(text, hint)


@contextmanager
def _transformers_warnings() -> Iterator[list[str]]:
    """What transformers logs as a warning meanwhile."""
    heard: list[str] = []
    handler = _Listener(heard)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(" ".join(record.getMessage().split()))
