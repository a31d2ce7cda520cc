"""lem beside a bare loop around `generate`, which knows nothing of lem: the same model, prompts and batches.

    python -m tests.bench.bare [PAIRS]

Both sides are run in turn, in the order ABBA, in this one process. What is printed is the ratio of their throughputs
with its 95 % t interval on logs over the pairs; the tokens must be the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lem.base.clock import Clock
from lem.config.experiment import ExperimentConfig
from lem.engines.common import load_engine
from lem.engines.protocol import Engine, TokenRequest
from lem.worker.prompts import resolve_on_host
from lem.worker.window import measure_batch
from tests.bench.host import in_turn, told

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 20
PROMPTS, INPUT_TOK, OUTPUT_TOK, BATCH = 8, 32, 32, 4

Side = Callable[[], tuple[float, list[list[int]]]]
"""Output tokens per second, and the tokens of each prompt."""


def main() -> int:
    """0 when the tokens are the same; the ratio is for a person to judge on a machine that may be busy."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, str(ROOT / "examples/make_demo_model.py"), str(model)], check=True)
        requests, lem_side = harness_side(model)
        bare_side = loop_side(model, requests)
        found = list(in_turn(lem_side, bare_side, pairs))
    is_same = all(ours[1] == theirs[1] for ours, theirs in found)
    print(f"tokens equal: {'yes' if is_same else 'NO'}")
    print(told("bare generate", [ours[0] / theirs[0] for ours, theirs in found]))
    return 0 if is_same else 1


def harness_side(model: Path) -> tuple[list[TokenRequest], Side]:
    """The requests, and lem's window over them."""
    config = ExperimentConfig.from_dict(
        {
            "model": str(model),
            "fp_precision": "float32",
            "gpus": [],
            "ignore_eos": True,
            "max_input_tokens": INPUT_TOK,
            "max_output_tokens": OUTPUT_TOK,
            "min_output_tokens": OUTPUT_TOK,
            "decoder": {"preset": "deterministic"},
            "prompts": {"type": "synthetic", "input_tokens": INPUT_TOK, "sample_size": PROMPTS},
            "pytorch": {"batch_size": BATCH},
        }
    )
    engine = load_engine(config, {})
    requests = encode(config, engine)

    def measure() -> tuple[float, list[list[int]]]:
        measured = measure_batch(
            engine, requests, min_window_s=0.0, observe_tokens=False, clock=Clock(), report=lambda _done: None
        )
        return measured.output_tok / measured.window_s, [list(item.output_ids) for item in measured.outputs]

    return requests, measure


def encode(config: ExperimentConfig, engine: Engine) -> list[TokenRequest]:
    """The prompts as ids, all of one length, so that no side pads."""
    resolved = resolve_on_host(config)
    assert resolved is not None
    ids = [engine.encode(item.prompt) for item in resolved.prompts]
    return [
        TokenRequest(index, tuple((item * INPUT_TOK)[:INPUT_TOK]), OUTPUT_TOK, OUTPUT_TOK)
        for index, item in enumerate(ids)
    ]


def loop_side(model: Path, requests: list[TokenRequest]) -> Side:
    """What a person writes who has no tool: load, loop, generate, take the time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = torch.tensor([request.token_ids for request in requests])

    def measure() -> tuple[float, list[list[int]]]:
        begin_s = time.perf_counter()
        batches = [
            network.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=OUTPUT_TOK,
                min_new_tokens=OUTPUT_TOK,
                eos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
            )[:, INPUT_TOK:].tolist()
            for batch in prompts.split(BATCH)
        ]
        elapsed_s = time.perf_counter() - begin_s
        outputs = [output for batch in batches for output in batch]
        return sum(map(len, outputs)) / elapsed_s, outputs

    return measure


if __name__ == "__main__":
    sys.exit(main())
