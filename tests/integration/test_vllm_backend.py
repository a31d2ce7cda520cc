"""The vllm backend on a real model: tokens are those of vLLM's own `LLM.generate`, timed as they are seen."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.engines.protocol import Engine, EngineReport, TokenRequest
from lem.engines.vllm import load
from tests.integration.engine_answers import BLOCKS, answers, configured, loaded, outputs, prompts, served
from tests.integration.engine_answers import vllm_experiment as experiment

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

# vLLM as its manual says, in a process of its own: two engines do not share one.
BARE = """
import json, sys
from vllm import LLM, SamplingParams
model, requests, options = json.loads(sys.argv[1])
engine = LLM(model=model, dtype="float32", max_model_len=48, enforce_eager=True, **options)
parameters = [SamplingParams(temperature=0, max_tokens=maximum) for _ids, maximum in requests]
answers = engine.generate([{"prompt_token_ids": ids} for ids, _maximum in requests], parameters, use_tqdm=False)
print("ANSWER", json.dumps([answer.outputs[0].token_ids for answer in answers]), flush=True)
"""


def bare_generate(model: Path, requests: list[TokenRequest]) -> list[tuple[int, ...]]:
    """What `LLM.generate` makes of requests."""
    given = [[list(request.token_ids), request.max_output_tokens] for request in requests]
    finished = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps([str(model), given, BLOCKS])],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, finished.stderr[-3000:]
    return [tuple(ids) for ids in json.loads(lines[0].removeprefix("ANSWER "))]


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The engine in this process, where it loads in seconds; and no more memory than it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def module_engine(wide_tiny_model: Path, in_process: None) -> Iterator[Engine]:
    with loaded(experiment(wide_tiny_model, {"max_num_seqs": 4})) as there:
        yield there


@pytest.fixture
def engine(module_engine: Engine, wide_tiny_model: Path) -> Engine:
    module_engine.configure(experiment(wide_tiny_model, {"max_num_seqs": 4}))
    return module_engine


def set_up(engine: Engine, model: Path, section: dict[str, Any] | None = None, **options: Any) -> EngineReport:
    return configured(engine, experiment(model, {"max_num_seqs": 4, **(section or {})}, **options))


# Tokens


def test_greedy_tokens_are_those_of_bare_generate(engine: Engine, wide_tiny_model: Path) -> None:
    assert outputs(engine, prompts()) == bare_generate(wide_tiny_model, prompts())


def test_alone_and_in_traffic_the_tokens_are_the_same(engine: Engine) -> None:
    expected = outputs(engine, prompts())
    assert [item.output_ids for item in answers(engine, prompts(), observe_tokens=True)] == expected
    assert [item.output_ids for item in served(engine, prompts()[:2], prompts()[2:])] == expected


END = 2  # </s> of the tiny model


def test_output_ends_with_its_end_and_not_before_its_least_length(engine: Engine, wide_tiny_model: Path) -> None:
    candidates = [TokenRequest(index, (100 + index, 7 * index % 900 + 3), 16) for index in range(200)]
    found = zip(candidates, outputs(engine, candidates), strict=True)
    ending = next(request for request, answer in found if answer[-1] == END and len(answer) < 10)
    assert outputs(engine, [ending])[0][-1] == END
    assert len(outputs(engine, [TokenRequest(0, ending.token_ids, 16, 10)])[0]) >= 10
    set_up(engine, wide_tiny_model, ignore_eos=True)
    assert len(outputs(engine, [ending])[0]) == 16


def test_each_request_has_its_own_bound(engine: Engine, wide_tiny_model: Path) -> None:
    set_up(engine, wide_tiny_model, ignore_eos=True)
    requests = [TokenRequest(index, request.token_ids, index + 1) for index, request in enumerate(prompts())]
    assert [len(output) for output in outputs(engine, requests)] == [1, 2, 3, 4, 5]


# Times


def test_alone_requests_do_not_overlap_and_each_token_has_its_time(engine: Engine) -> None:
    began_ns = time.monotonic_ns()
    found = answers(engine, prompts(), observe_tokens=True)
    for completion in found:
        times = completion.token_times_ns
        assert times is not None
        assert len(times) == len(completion.output_ids)
        assert list(times) == sorted(times)
        assert began_ns <= completion.started_ns < times[0]
        assert completion.finished_ns == times[-1] <= time.monotonic_ns()
    spans = sorted((item.started_ns, item.finished_ns) for item in found)
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def test_in_a_batch_requests_are_timed_by_the_engine(engine: Engine) -> None:
    began_ns = time.monotonic_ns()
    found = answers(engine, prompts())
    ended_ns = time.monotonic_ns()
    assert all(began_ns <= item.started_ns < item.finished_ns <= ended_ns for item in found)
    assert {item.token_times_ns for item in found} == {None}
    # Four fit at a time: the fifth is taken up when another has made room.
    assert max(item.started_ns for item in found) >= min(item.finished_ns for item in found)


def test_traffic_is_timed_and_joins_what_runs(engine: Engine) -> None:
    found = served(engine, prompts()[:3], prompts()[3:])
    for completion in found:
        times = completion.token_times_ns
        assert times is not None
        assert completion.started_ns < times[0] <= times[-1] == completion.finished_ns
    assert max(item.started_ns for item in found[:3]) < min(item.finished_ns for item in found[:3])


# Failures


@pytest.mark.parametrize(
    ("bad", "words"),
    [(TokenRequest(9, tuple(range(100, 140)), 16), "max_model_len (48)"), (TokenRequest(9, (5, 5000), 16), "vocab")],
)
def test_a_request_that_is_too_long_or_has_an_unknown_id_fails_alone(
    engine: Engine, bad: TokenRequest, words: str
) -> None:
    requests = [*prompts()[:2], bad]
    for observe in (False, True):
        found = {item.index: item for item in engine.generate(requests, observe_tokens=observe)}
        assert words in str(found[9].error)
        assert found[0].error is found[1].error is None
    assert [item.error is None for item in served(engine, requests)] == [True, True, False]


def test_a_model_that_is_not_there_is_told_without_a_load(tmp_path: Path, wide_tiny_model: Path) -> None:
    with pytest.raises(EngineError, match="no such folder") as caught:
        load(experiment(tmp_path / "nothing"), {})
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)
    with pytest.raises(EngineError, match=r"has no config\.json"):
        load(experiment(tmp_path), {})
    with pytest.raises(OptionRefused, match="not supported for a folder"):
        load(experiment(tmp_path, model={"name": str(wide_tiny_model), "revision": "main"}), {})


# What is told


def test_the_report_tells_what_was_loaded(engine: Engine, wide_tiny_model: Path) -> None:
    report = engine.report
    assert (report.engine_name, report.device, report.gpu_uuids) == ("vllm", "cpu", ())
    assert report.engine_version == report.versions.get("vllm-cpu", report.engine_version)
    assert report.versions["torch"]
    assert (report.model_revision, len(str(report.weights_sha256))) == (None, 64)
    made = json.loads((wide_tiny_model / "config.json").read_text(encoding="utf-8"))
    assert report.embedding_parameters == 2 * made["vocab_size"] * made["hidden_size"]
    assert (report.model_parameters or 0) > (report.embedding_parameters or 0)
    assert report.checks_s > 0
    assert report.effective["fp_precision"] == "float32"
    assert report.effective["multiprocessing"] is False
    assert report.effective["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert json.loads(json.dumps(report.effective)) == report.effective


def test_text_goes_to_tokens_and_back(engine: Engine) -> None:
    ids = engine.encode("The sea is wide")
    assert ids[0] == 1  # <s>
    assert engine.decode(ids).strip() == "The sea is wide"
