"""A few tokens generated before anything is measured, to learn what the engine makes of the options.

Imports torch and transformers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lem.backends.model_sources import is_out_of_memory
from lem.backends.protocol import TokenRequest
from lem.backends.pytorch_generation import BatchRunner
from lem.backends.pytorch_options import EngineFacts, is_assisted
from lem.backends.refusals import EngineRaised, shortened
from lem.config.backend_config import PyTorchConfig
from lem.errors import EngineError, OptionRefused
from lem.reasons import Reason

__all__ = ["Trial", "try_out"]

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
