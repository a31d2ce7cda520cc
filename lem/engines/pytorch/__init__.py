"""The pytorch backend: transformers' `generate` on CPU or CUDA. PyTorch is imported when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from lem.config.experiment import ExperimentConfig
from lem.engines.common import importing
from lem.engines.protocol import Engine


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """See `Engine`."""
    hint = "check that their versions are compatible and that the libraries they need are installed"
    with importing("pytorch", "PyTorch or transformers", hint):
        from lem.engines.pytorch.session import Session, free_memory
    try:
        return Session(config, secrets)
    except BaseException as error:
        free_memory(error)
        raise
