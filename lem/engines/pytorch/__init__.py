"""The pytorch backend: transformers' `generate` on CPU or CUDA. PyTorch is imported when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from lem.config.experiment import ExperimentConfig
from lem.engines.common import explain_import, require_packages
from lem.engines.protocol import Engine


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """See `Engine`."""
    require_packages("pytorch", "{python} -m pip install {missing}, or name another Python with --python")
    try:
        from lem.engines.pytorch.session import Session, free_memory
    except (ImportError, OSError) as error:
        hint = "check that their versions are compatible and that the libraries they need are installed"
        raise explain_import("PyTorch or transformers", error, hint) from error
    try:
        return Session(config, secrets)
    except BaseException as error:
        free_memory(error)
        raise
