"""Experiments on the tiny model, and their requests, for the tests of the vllm backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Engine, TokenRequest
from lem.engines.vllm import load
from tests.integration.engine_answers import GREEDY, LENGTHS

# A few MB of cache are enough here; without a bound vLLM takes most of the memory there is.
BLOCKS = {"num_gpu_blocks_override": 64}


def experiment(model: Path, section: dict[str, Any] | None = None, /, **options: Any) -> ExperimentConfig:
    """An experiment on the CPU in float32, greedy and uncompiled unless told otherwise."""
    given: dict[str, Any] = {
        "model": str(model),
        "backend": "vllm",
        "gpus": [],
        "fp_precision": "float32",
        "decoder": GREEDY,
        "max_input_tokens": 32,
        "max_output_tokens": 16,
    }
    own = {"enforce_eager": True, **(section or {})}
    own["extra"] = {**BLOCKS, **own.get("extra", {})}
    return ExperimentConfig.from_dict({**given, **options, "vllm": own})


def prompts(lengths: Iterable[int] = LENGTHS, maximum: int = 16, minimum: int = 0) -> list[TokenRequest]:
    """Requests of these lengths, each prompt another one."""
    return [
        TokenRequest(index, tuple(100 + (31 * index + 7 * place) % 800 for place in range(length)), maximum, minimum)
        for index, length in enumerate(lengths)
    ]


@contextmanager
def loaded(config: ExperimentConfig) -> Iterator[Engine]:
    """The engine with the model of an experiment, closed afterwards."""
    engine = load(config, {})
    try:
        yield engine
    finally:
        engine.close()
