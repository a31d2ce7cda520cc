"""What a worker stands on, found out without importing an engine: for the plan, and for a resume to compare."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from lem.backends.registry import BACKEND_DISTRIBUTIONS, OTHER_NAMES
from lem.meters.gpus import find_driver, find_gpus

__all__ = ["missing_distributions", "probe_environment"]


def probe_environment() -> dict[str, Any]:
    """Versions and devices by name, as JSON values: `python`, each engine distribution found, `driver`, `gpus`.

    None stands for a distribution or driver that is not there. The GPUs are their UUIDs, sorted.
    """
    distributions = sorted({name for names in BACKEND_DISTRIBUTIONS.values() for name in names})
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in distributions},
        "driver": find_driver(),
        "gpus": sorted(gpu.uuid for gpu in find_gpus()),
    }


def missing_distributions(backend: str, environment: Mapping[str, Any]) -> tuple[str, ...]:
    """The distributions that a backend needs and that the environment probed lacks."""
    return tuple(name for name in BACKEND_DISTRIBUTIONS.get(backend, ()) if environment.get(name) is None)


def _version(distribution: str) -> str | None:
    for name in (distribution, *OTHER_NAMES.get(distribution, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
