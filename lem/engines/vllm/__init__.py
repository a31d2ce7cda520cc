"""The vllm backend: vLLM's engine, on whatever its build runs on. vLLM is imported when a model is loaded.

One engine answers closed sets, single requests and traffic: vLLM's `LLMEngine`, driven by `add_request` and `step`,
the two calls that `LLM.generate` makes for a batch. So a batch here is as fast, and the calls show progress and when
each request started and ended, and let requests join while others run.

By default the engine runs in a process of its own, the same one that `AsyncLLM` and the server use. A single thread
drives it: it wakes for an arrival as well as for the result of a step, so requests wait no longer for their first step
than under `AsyncLLM`. An `AsyncLLM` could not be stepped through a closed set as `LLM` does it, and two engines for one
load would need the memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lem.config.experiment import ExperimentConfig
from lem.engines.common import importing
from lem.engines.protocol import Engine


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    # Telemetry is off; older versions spell it differently.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    hint = "check that the versions of vllm, torch and their dependencies are compatible"
    with importing("vllm", "vLLM", hint):
        from lem.engines.vllm.session import Session
    return Session(config, secrets)
