"""Run one batch through `generate`: the rectangle in, the tokens that count out, with their times.

Imports torch and transformers.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lem.backends.model_sources import is_out_of_memory
from lem.backends.protocol import Completion, TokenRequest
from lem.backends.pytorch_batching import cut_output, pad_left
from lem.backends.pytorch_loading import LoadedModel
from lem.backends.refusals import EngineRaised, shortened
from lem.errors import EngineError

__all__ = ["BatchRunner", "TokenClock", "engine_settings"]

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
