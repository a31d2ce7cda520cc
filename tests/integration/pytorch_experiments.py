"""Experiments on the tiny model, and their requests, for the tests of the pytorch backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import TokenRequest
from lem.engines.pytorch import load
from tests.integration.engine_answers import GREEDY, LENGTHS


def experiment(model: Path, /, **options: Any) -> ExperimentConfig:
    """An experiment on the CPU in float32, greedy unless told otherwise."""
    given: dict[str, Any] = {
        "model": str(model),
        "gpus": [],
        "fp_precision": "float32",
        "decoder": GREEDY,
        "max_input_tokens": 32,
        "max_output_tokens": 16,
    }
    return ExperimentConfig.from_dict({**given, **options})


def prompts(lengths: Iterable[int] = LENGTHS, maximum: int = 16, minimum: int = 0) -> list[TokenRequest]:
    """Requests of these lengths, each prompt another one."""
    return [
        TokenRequest(index, tuple(100 + 31 * index + 7 * place for place in range(length)), maximum, minimum)
        for index, length in enumerate(lengths)
    ]


@contextmanager
def loaded(config: ExperimentConfig) -> Iterator[Any]:
    """The engine with the model of an experiment, closed afterwards."""
    engine = load(config, {})
    try:
        yield engine
    finally:
        engine.close()


def copy_model(model: Path, folder: Path, **generation_config: Any) -> Path:
    """A copy of the model with other values in its generation config."""
    shutil.copytree(model, folder)
    path = folder / "generation_config.json"
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **generation_config}), encoding="utf-8")
    return folder
