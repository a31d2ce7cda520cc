"""The server backend on a real `vllm serve`: the tokens of the vllm backend, and of text as of ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Driven, Engine
from tests.integration.engine_answers import SAMPLING, answers, experiment, loaded, outputs, prompts, vllm_experiment

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

MODULE = "vllm.entrypoints.openai.api_server"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": 1, "VLLM_NO_USAGE_STATS": 1, "PYTHONPATH": ":".join(sys.path)}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 48, "max_num_seqs": 4}


def served(model: Path, **options: Any) -> ExperimentConfig:
    command = [sys.executable, "-m", MODULE, "--model", "{model}", "--port", "{port}", "--host", "127.0.0.1"]
    server: dict[str, Any] = {"engine": "vllm", "command": command, "options": OPTIONS, "env": ENVIRONMENT}
    return experiment(model, backend="server", server=server, fp_precision="float16", **options)


@pytest.fixture(scope="module")
def engine(wide_tiny_model: Path) -> Iterator[Engine]:
    with loaded(served(wide_tiny_model)) as there:
        yield there


def test_greedy_tokens_are_those_of_the_vllm_backend(
    engine: Engine, wide_tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text = "The quick brown fox"
    with loaded(vllm_experiment(wide_tiny_model, {"max_num_seqs": 4})) as own:
        expected = outputs(own, prompts())
        for is_whole in (True, False):
            assert engine.encode(text, is_whole=is_whole) == own.encode(text, is_whole=is_whole)
    assert outputs(engine, prompts()) == expected
    assert all(expected)


def test_what_the_server_says_agrees_with_what_was_counted(engine: Engine) -> None:
    assert isinstance(engine, Driven)
    engine.begin_window()
    found = answers(engine, prompts())
    answers(engine, prompts())  # repeats are not served from the cache
    seen = engine.observed()
    tok = 2 * sum(item.output_tok for item in found)
    assert seen.token_source == "engine_ids"
    assert (seen.facts["counted"]["output_tok"], seen.facts["reported"]["output_tok"]) == (tok, tok)
    assert seen.facts["reported"]["cached_tok"] == 0
    assert seen.facts["counted"].get("cached_tok", 0) == 0  # vLLM says it only if it is asked to
    assert [reason.code for reason in seen.warnings] == []
    assert engine.report.effective["server"]["options"] == {"max_model_len": 48}
    assert engine.report.longest_tok == 48


def test_a_seed_draws_the_same_tokens_again_and_another_seed_others(engine: Engine, wide_tiny_model: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        engine.configure(served(wide_tiny_model, random_seed=seed, decoder=SAMPLING))
        found.append(outputs(engine, prompts()))
    engine.configure(served(wide_tiny_model))
    assert found[0] == found[1] != found[2]
