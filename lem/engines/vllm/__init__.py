"""The vllm backend: vLLM's engine, on whatever its build runs on. vLLM is imported when a model is loaded.

One engine answers closed sets, single requests and traffic: vLLM's `LLMEngine`, driven by `add_request` and `step`.
These two calls are all that `LLM.generate`, which vLLM's own offline benchmark measures, makes for a batch, so a batch
here is as fast as there; and unlike `LLM.generate` they tell how far it is, when each request was taken up and done,
and let requests join while others run.

Traffic needs an engine that takes requests while it computes. The default has it in a process of its own, exactly the
one that `AsyncLLM` and the server talk to. One thread talks to it: it wakes for an arrival as for the result of a
step, so requests wait no longer for their first step than under `AsyncLLM`, without its event loop between the engine
and the clock. An engine of `AsyncLLM` could not be stepped through a closed set as `LLM` does, and a second engine
for one load would need the memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lem.config.experiment import ExperimentConfig
from lem.engines.common import SessionBackend, explain_import
from lem.engines.protocol import Backend

if TYPE_CHECKING:
    from lem.engines.vllm.session import Session


# Both spellings, of older and newer versions.
_NO_TELEMETRY = ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK")


class VllmBackend(SessionBackend["Session"]):
    """`Backend` on vLLM."""

    name = "vllm"
    packages = ("vllm",)
    package_hint = "{python} -m pip install vllm, or name another Python with --python"

    def open_session(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> Session:
        """Import vLLM and start its engine."""
        for name in _NO_TELEMETRY:
            os.environ.setdefault(name, "1")
        try:
            from lem.engines.vllm.session import Session
        except (ImportError, OSError, RuntimeError) as error:
            hint = "do the versions of vllm, torch and what stands beside them fit each other?"
            raise explain_import("vLLM", error, hint) from error
        return Session(config, secrets)


def create() -> Backend:
    """The backend, nothing loaded."""
    return VllmBackend()
