"""The process that works on the GPU: orders come as JSON lines through stdin, answers go through stdout.

It is a process of its own since a CUDA context draws power: bare idle is measured without it, and lem takes any other
process on the GPU for a disturbance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lem.base import process
from lem.base.clock import Clock
from lem.config.experiment import ExperimentConfig
from lem.engines.common import load_engine
from lem.engines.protocol import Engine, TokenRequest
from lem.worker.window import measure_batch
from tests.gpu.load import CudaLoad, Load, RehearsedLoad, fixed_lengths, stay_busy, swing

# Ids that both tokenizer and model know, special ones left out.
_FIRST_ID, _IDS = 3, 200


def main() -> int:
    """0, once stdin has ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rehearse", nargs=2, metavar=("UUID", "LOG"), help="against the NVML double")
    options = parser.parse_args()
    process.die_with_parent(options.parent)
    # Engines print: the channel is taken away from fd 1 before one is imported.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker(_make_load(options.rehearse))
    for line in sys.stdin:
        _answer(channel, worker.obey(json.loads(line)))
    return 0


def _make_load(rehearsed: list[str] | None) -> Load:
    return CudaLoad() if rehearsed is None else RehearsedLoad(rehearsed[0], Path(rehearsed[1]))


def _answer(channel: IO[str], answer: Mapping[str, Any]) -> None:
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


class _Worker:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._engine: Engine | None = None
        self._requests: list[TokenRequest] = []

    def obey(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer; what went wrong is one too."""
        try:
            return self._do(order)
        except Exception as error:  # noqa: BLE001 - the top of this program: the driver is told
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _do(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        if order["do"] == "hello":
            return {"uuid": self._load.uuid, "versions": _versions()}
        if order["do"] == "busy":
            return dataclasses.asdict(stay_busy(self._load, order["s"]))
        if order["do"] == "swing":
            return dataclasses.asdict(swing(self._load, order["period_s"], order["s"]))
        if order["do"] == "load":
            return self._load_model(order)
        return self._generate(order["s"])

    def _load_model(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        batch, input_tok, output_tok = order["batch"], order["input_tok"], order["output_tok"]
        config = ExperimentConfig.from_dict(
            {
                "model": order["model"],
                **fixed_lengths(input_tok, output_tok),
                "pytorch": {"batch_size": batch},
            }
        )
        if self._engine is not None:
            self._engine.close()
        self._engine = load_engine(config, {})
        report = self._engine.report
        prompts = [
            [_FIRST_ID + (31 * index + 7 * place) % _IDS for place in range(input_tok)] for index in range(batch)
        ]
        self._requests = [TokenRequest(index, tuple(ids), output_tok, output_tok) for index, ids in enumerate(prompts)]
        self._generate(0.0)  # the first run of an engine is slower
        return {"parameters": report.model_parameters, "gpus": report.gpu_uuids}

    def _generate(self, duration_s: float) -> Mapping[str, Any]:
        if self._engine is None:
            raise RuntimeError("no model is loaded")
        measured = measure_batch(
            self._engine,
            self._requests,
            min_window_s=duration_s,
            observe_tokens=False,
            clock=Clock(),
            report=lambda _done: None,
        )
        if measured.failures:
            raise RuntimeError(f"{len(measured.failures)} requests failed: {measured.failures[0]}")
        return {"output_tok": measured.output_tok, "opened_ns": measured.opened_ns, "closed_ns": measured.closed_ns}


def _versions() -> Mapping[str, str]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return versions | ({"cuda": str(torch.version.cuda)} if torch.version.cuda else {})


if __name__ == "__main__":
    sys.exit(main())
