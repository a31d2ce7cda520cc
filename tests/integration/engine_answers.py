"""Experiments and requests of the tests of real engines, and what an engine answers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lem.config.experiment import ExperimentConfig
from lem.engines.common import load_engine
from lem.engines.protocol import Completion, Engine, EngineReport, TokenRequest

GREEDY = {"preset": "deterministic"}
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LENGTHS = (9, 3, 14, 1, 6)
# A few MB of vLLM's cache are enough here; without a bound vLLM takes most of the memory there is.
BLOCKS = {"num_gpu_blocks_override": 64}


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


def vllm_experiment(model: Path, section: Mapping[str, Any] | None = None, /, **options: Any) -> ExperimentConfig:
    """As `experiment`, uncompiled unless told otherwise."""
    own: dict[str, Any] = {"enforce_eager": True, **(section or {})}
    own["extra"] = {**BLOCKS, **own.get("extra", {})}
    return experiment(model, backend="vllm", vllm=own, **options)


def prompts(lengths: Iterable[int] = LENGTHS, maximum: int = 16, minimum: int = 0) -> list[TokenRequest]:
    """Requests of these lengths, each prompt another one."""
    return [
        TokenRequest(index, tuple(100 + (31 * index + 7 * place) % 800 for place in range(length)), maximum, minimum)
        for index, length in enumerate(lengths)
    ]


@contextmanager
def loaded(config: ExperimentConfig) -> Iterator[Any]:
    """The engine with the model of an experiment, closed afterwards."""
    engine = load_engine(config, {})
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


def answers(engine: Engine, requests: Sequence[TokenRequest], *, observe_tokens: bool = False) -> list[Completion]:
    """The completions in the order of the requests, none of them failed."""
    found = sorted(engine.generate(requests, observe_tokens=observe_tokens), key=lambda completion: completion.index)
    assert [completion.index for completion in found] == sorted(request.index for request in requests)
    assert [completion.error for completion in found] == [None] * len(found)
    return found


def outputs(engine: Engine, requests: Sequence[TokenRequest]) -> list[tuple[int, ...]]:
    """The ids generated, in the order of the requests."""
    return [completion.output_ids for completion in answers(engine, requests)]


def served(engine: Engine, *groups: Sequence[TokenRequest]) -> list[Completion]:
    """The completions of traffic, in the order of the requests."""
    arrivals = Arrivals(*groups)
    engine.serve(arrivals)
    return sorted(arrivals.completions, key=lambda completion: completion.index)


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
