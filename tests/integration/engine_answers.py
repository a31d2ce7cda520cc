"""The requests that the tests of a real engine make, and what it answers them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, Engine, EngineReport, TokenRequest

__all__ = ["GREEDY", "LENGTHS", "SAMPLING", "Arrivals", "answers", "configured", "outputs"]

GREEDY = {"preset": "deterministic"}
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LENGTHS = (9, 3, 14, 1, 6)


def answers(engine: Engine, requests: Sequence[TokenRequest], *, observe_tokens: bool = False) -> list[Completion]:
    """The completions in the order of the requests, none of them failed."""
    found = sorted(engine.generate(requests, observe_tokens=observe_tokens), key=lambda completion: completion.index)
    assert [completion.index for completion in found] == sorted(request.index for request in requests)
    assert [completion.error for completion in found] == [None] * len(found)
    return found


def outputs(engine: Engine, requests: Sequence[TokenRequest]) -> list[tuple[int, ...]]:
    """The ids generated, in the order of the requests."""
    return [completion.output_ids for completion in answers(engine, requests)]


def configured(engine: Engine, config: ExperimentConfig) -> EngineReport:
    """The report once another experiment is set up."""
    engine.configure(config)
    return engine.report


class Arrivals:
    """A queue whose requests arrive in groups: the next group is there once the one before is answered."""

    def __init__(self, *groups: Sequence[TokenRequest]) -> None:
        self.completions: list[Completion] = []
        self.taken: list[int] = []  # how many at a time
        self._groups = [list(group) for group in groups]
        self._arrived: list[TokenRequest] = []
        self._changed = threading.Condition()

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        with self._changed:
            if not self._arrived and self._groups:
                assert self._changed.wait_for(lambda: len(self.completions) == sum(self.taken), timeout=60)
                self._arrived = self._groups.pop(0)
            found, self._arrived = self._arrived[:limit], self._arrived[limit:]
            self.taken += [len(found)] if found else []
            return tuple(found)

    def complete(self, completion: Completion) -> None:
        with self._changed:
            self.completions.append(completion)
            self._changed.notify()
