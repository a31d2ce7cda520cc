"""Why an engine died, as far as the Docker engine knows."""

from __future__ import annotations

import dataclasses
import time

from lem.errors import EngineError
from lem.experiment.channel import LOADING_PHASES
from lem.orchestration.attempt import Outcome
from lem.orchestration.services import Services

__all__ = ["explain_death"]

# How much later than the death of a process the Docker engine may tell why.
_NEWS_DELAY_S = 1.0


def explain_death(services: Services, service: str, outcome: Outcome, begun_s: float | None) -> Outcome:
    """The outcome of an attempt whose engine died, with what became of its container.

    Args:
        begun_s: when the attempt began, in seconds since 1970; None when nobody knows.

    Raises:
        ContainerError: the Docker engine cannot be asked.
    """
    error, until_s = outcome.error, time.time() + _NEWS_DELAY_S
    if error is None:
        return outcome
    if begun_s is not None and services.was_out_of_memory(service, begun_s, until_s):
        explained = EngineError(
            f"{error.message}; the container ran out of memory",
            "raise its limit (LEM_MEMORY_LIMIT, mem_limit in the compose file), or ask the engine for less",
            kind="out_of_memory",
            is_permanent=outcome.phase in LOADING_PHASES,
        )
        return dataclasses.replace(outcome, error=explained)
    state = services.state(service)
    if state is not None and state.is_running:
        return outcome
    how = "it was removed" if state is None else state.describe()
    explained = EngineError(
        f"{error.message}; its container does not run any more: {how}",
        "somebody ended the container, not lem: docker events --since 1h tells when",
        kind=error.kind,
    )
    return dataclasses.replace(outcome, error=explained)
