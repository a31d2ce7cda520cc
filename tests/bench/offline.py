"""lem's window beside vLLM's own offline benchmark: the same model, prompts, settings and kind of engine.

    PYTHON_WITH_VLLM -m tests.bench.offline MODEL_FOLDER [PAIRS]

Each side has an engine of its own in processes of its own, as by default: here `vllm.benchmarks.throughput`, the code
behind `vllm bench throughput`, there lem's backend under `measure_batch`. They are run in turn, in the order ABBA. What
is printed is the ratio of their throughputs with its 95 % t interval on logs over the pairs. Both sample without a
seed, as that benchmark does, and neither turns tokens into text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lem.config.experiment_config import ExperimentConfig
from lem.results.statistics import log_t_interval

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 20
PROMPTS, INPUT_TOK, OUTPUT_TOK, SEQUENCES = 64, 64, 64, 32
TARGET = 0.97
# GiB; without a bound vLLM takes most of the memory there is, twice.
CACHE_GIB = "1"

Measure = Callable[[], float]
"""Output tokens per second of one run."""


def main() -> int:
    """0; the ratio is for a person to judge on a machine that may be busy."""
    if sys.argv[1] == "--side":
        return answer(SIDES[sys.argv[2]](sys.argv[3]))
    model = sys.argv[1]
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else PAIRS
    with side("lem", model) as ours, side("vllm", model) as theirs:
        ours(), theirs()  # the first run of each is slower
        ratios = []
        for index in range(pairs):
            first, second = (ours, theirs) if index % 2 == 0 else (theirs, ours)
            rates = {first: first(), second: second()}
            ratios.append(rates[ours] / rates[theirs])
            print(f"pair {index + 1}: lem {rates[ours]:.1f}, vLLM {rates[theirs]:.1f} tok/s", flush=True)
    interval = log_t_interval(ratios)
    print(
        f"throughput, lem over vLLM's own offline benchmark: {interval.geometric_mean:.4f} "
        f"({interval.ci_lower:.4f} to {interval.ci_upper:.4f}, 95 % t interval, {pairs} pairs; target above {TARGET})"
    )
    return 0


@contextmanager
def side(name: str, model: str) -> Iterator[Measure]:
    """A side in a process of its own, its engine loaded."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.offline", "--side", name, model],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    told, asked = child.stdout, child.stdin

    def measure() -> float:
        print("run", file=asked, flush=True)
        return float(json.loads(told.readline()))

    try:
        assert json.loads(told.readline()) == "ready"
        yield measure
    finally:
        child.stdin.close()
        child.wait(timeout=120)


def answer(measure: Measure) -> int:
    """Exit code of a side: a figure for each line that comes, until no more do. vLLM prints, so it gets no stdout."""
    with told_on_stdout() as told:
        print(json.dumps("ready"), file=told, flush=True)
        for _line in sys.stdin:
            print(json.dumps(measure()), file=told, flush=True)
    return 0


@contextmanager
def told_on_stdout() -> Iterator[IO[str]]:
    """The pipe that was stdout when this process began."""
    with os.fdopen(_STDOUT, "w") as told:
        yield told


def lem_side(model: str) -> Measure:
    """lem's backend and its closed window."""
    from lem.backends.registry import create_backend
    from lem.experiment.clock import SystemClock
    from lem.experiment.window import measure_batch

    backend = create_backend("vllm")
    backend.load(experiment(model), {})
    requests = [_request(index, ids) for index, ids in enumerate(prompts())]

    def measure() -> float:
        measured = measure_batch(
            backend, requests, min_window_s=0.0, observe_tokens=False, clock=SystemClock(), report=lambda _done: None
        )
        assert not measured.failures
        assert measured.output_tok == PROMPTS * OUTPUT_TOK
        return measured.output_tok / measured.window_s

    return measure


def _request(index: int, ids: list[int]) -> Any:
    from lem.backends.protocol import TokenRequest

    return TokenRequest(index, tuple(ids), OUTPUT_TOK)


def vllm_side(model: str) -> Measure:
    """vLLM's offline benchmark as it is, on the engine arguments that lem ends up with."""
    from vllm import LLM
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.throughput import _run_vllm_requests
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=model,
        dtype="float32",
        max_model_len=INPUT_TOK + OUTPUT_TOK,
        max_num_seqs=SEQUENCES,
        gpu_memory_utilization=0.9,
    )
    llm = LLM.from_engine_args(arguments)
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
            "gpus": [],
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


SIDES = {"lem": lem_side, "vllm": vllm_side}
_STDOUT = -1

if __name__ == "__main__":
    # Before anything is imported that prints.
    _STDOUT = os.dup(1)
    if "--side" in sys.argv:
        os.dup2(2, 1)
    sys.exit(main())
