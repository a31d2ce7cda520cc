"""lem's window beside vLLM's own offline benchmark: the same engine, prompts and settings.

    PYTHON_WITH_VLLM -m tests.bench.offline MODEL_FOLDER [PAIRS]

One engine is loaded, by lem's backend and in processes of its own, as by default. On one side lem's `measure_batch`
drives it; on the other `vllm.benchmarks.throughput`, the code behind `vllm bench throughput`, does, through an `LLM`
that was given this engine instead of making its own: two loads of the same thing differ by more than is looked for
here. The sides are run in turn, in the order ABBA. What is printed is the ratio of their throughputs with its 95 % t
interval on logs over the pairs. Both sample without a seed, as that benchmark does, and neither turns tokens into text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from lem.base.clock import Clock
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Engine, TokenRequest
from lem.engines.vllm import load
from lem.worker.window import measure_batch
from tests.bench.host import in_turn, told

PAIRS = 20
PROMPTS, INPUT_TOK, OUTPUT_TOK, SEQUENCES = 64, 64, 64, 32
# GiB; without a bound vLLM takes most of the memory there is.
CACHE_GIB = "1"

Measure = Callable[[], float]
"""Output tokens per second of one run."""


def main() -> int:
    """0; the ratio is for a person to judge on a machine that may be busy."""
    model = sys.argv[1]
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else PAIRS
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    engine = load(experiment(model), {})
    try:
        ratios = []
        for ours, theirs in in_turn(lem_side(engine), vllm_side(engine, model), pairs):
            ratios.append(ours / theirs)
            print(f"pair {len(ratios)}: lem {ours:.1f}, vLLM {theirs:.1f} tok/s", flush=True)
    finally:
        engine.close()
    print(told("vLLM's own offline benchmark", ratios))
    return 0


def lem_side(engine: Engine) -> Measure:
    requests = [TokenRequest(index, tuple(ids), OUTPUT_TOK) for index, ids in enumerate(prompts())]

    def measure() -> float:
        measured = measure_batch(
            engine, requests, min_window_s=0.0, observe_tokens=False, clock=Clock(), report=lambda _done: None
        )
        assert not measured.failures
        assert measured.output_tok == PROMPTS * OUTPUT_TOK
        return measured.output_tok / measured.window_s

    return measure


def vllm_side(loaded: Any, model: str) -> Measure:
    from vllm import LLM
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.throughput import _run_vllm_requests
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine: Any = loaded._engine
    # `LLM` takes no engine, it makes its own by this one call, and there is no option to give it another. A subclass
    # would have to repeat all that its constructor does with the engine afterwards.
    with mock.patch.object(LLMEngine, "from_engine_args", return_value=engine):
        llm = LLM.from_engine_args(EngineArgs(model=model, dtype="float32"))
    requests = [
        SampleRequest(prompt={"prompt_token_ids": ids}, prompt_len=INPUT_TOK, expected_output_len=OUTPUT_TOK)
        for ids in prompts()
    ]

    def measure() -> float:
        llm.reset_prefix_cache()
        elapsed_s, outputs = _run_vllm_requests(
            llm, requests, 1, disable_detokenize=True, do_profile=False, prequeue_requests=False, enable_lora=False
        )
        return float(sum(len(output.outputs[0].token_ids) for output in outputs) / elapsed_s)

    return measure


def experiment(model: str) -> ExperimentConfig:
    """What vLLM's benchmark does, as an experiment."""
    return ExperimentConfig.from_dict(
        {
            "model": model,
            "backend": "vllm",
            "fp_precision": "float32",
            "ignore_eos": True,
            "max_input_tokens": INPUT_TOK,
            "max_output_tokens": OUTPUT_TOK,
            "random_seed": None,
            "decoder": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "vllm": {"max_num_seqs": SEQUENCES},
        }
    )


def prompts() -> list[list[int]]:
    """Ids that the demo model knows, each prompt another one."""
    return [[3 + (31 * index + 7 * place) % 1400 for place in range(INPUT_TOK)] for index in range(PROMPTS)]


if __name__ == "__main__":
    sys.exit(main())
