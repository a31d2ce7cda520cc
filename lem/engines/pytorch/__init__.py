"""The pytorch backend: transformers' `generate` on CPU or CUDA. PyTorch is imported when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lem.config.experiment import ExperimentConfig
from lem.engines.common import SessionBackend, explain_import
from lem.engines.protocol import Backend

if TYPE_CHECKING:
    from lem.engines.pytorch.session import Session


class PyTorchBackend(SessionBackend["Session"]):
    """`Backend` on transformers."""

    name = "pytorch"
    packages = ("torch", "transformers")
    package_hint = "{python} -m pip install {missing}, or name another Python with --python"

    def open_session(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> Session:
        """Import PyTorch and load the model."""
        try:
            from lem.engines.pytorch.session import Session, free_memory
        except (ImportError, OSError) as error:
            hint = "do their versions fit each other, and are the libraries they need there?"
            raise explain_import("PyTorch or transformers", error, hint) from error
        try:
            return Session(config, secrets)
        except BaseException as error:
            free_memory(error)
            raise

    def unload(self) -> None:
        """As `Backend`."""
        if self._session is None:
            return
        from lem.engines.pytorch.session import free_memory

        self._session = None  # nothing else holds the weights
        free_memory()


def create() -> Backend:
    """The backend, nothing loaded."""
    return PyTorchBackend()
