"""What vLLM's failures mean: option, model or memory, and whether they would come again."""

from __future__ import annotations

from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.vllm.options import EngineFacts
from lem.engines.vllm.running import explain_load_failure, explain_request_failure, explain_run_failure

FACTS = EngineFacts("0.32.0", "cuda", frozenset())
ELSEWHERE = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

# As a run of vLLM 0.32.0 printed them, shortened.
WORKER_FAILED = """\
(EngineCore pid=1) INFO 11-20 08:27:10 [core.py:402] init engine
(Worker_TP0 pid=2) ERROR 11-20 08:27:11 [multiproc_executor.py:912] WorkerProc failed to start.
(Worker_TP0 pid=2) ERROR 11-20 08:27:11 [multiproc_executor.py:912] Traceback (most recent call last):
(Worker_TP0 pid=2) ERROR 11-20 08:27:11 [multiproc_executor.py:912]   File "x.py", line 1, in f
(Worker_TP0 pid=2) ERROR 11-20 08:27:11 [multiproc_executor.py:912] {cause}
(EngineCore pid=1) ERROR 11-20 08:27:12 [core.py:1511] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
"""


class EngineDeadError(Exception):
    """As vLLM names it."""


def experiment(section: dict[str, Any] | None = None) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", "backend": "vllm", "vllm": section or {}})


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        "Free memory on device cuda:0 (3.0/79.0 GiB) on startup is less than desired GPU memory utilization (0.9)",
        "2 GiB KV cache is needed for one request, which is larger than the available KV cache memory (1 GiB)",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_too_little_memory_is_not_tried_again(words: str) -> None:
    for error, output in (
        (RuntimeError(words), ""),
        (ELSEWHERE, WORKER_FAILED.format(cause=f"torch.OutOfMemoryError: {words}")),
    ):
        explained = explain_load_failure(error, output, experiment(), FACTS)
        assert (explained.kind, explained.is_permanent) == ("out_of_memory", True)
        assert words[:20] in explained.message
        assert "gpu_memory_utilization" in explained.hint


def test_the_cause_is_the_first_failure_that_a_process_printed() -> None:
    output = WORKER_FAILED.format(cause="ValueError: No common block size for 16.")
    explained = explain_load_failure(ELSEWHERE, output, experiment({"block_size": 16}), FACTS)
    assert isinstance(explained, OptionRefused)
    assert "vllm.block_size: 16" in explained.message
    assert "ValueError: No common block size for 16." in explained.message
    assert "WorkerProc" not in explained.message


def test_a_failure_that_left_no_word_is_told_as_it_came() -> None:
    explained = explain_load_failure(ELSEWHERE, "nothing of use", experiment(), FACTS)
    assert "See root cause above" in explained.message
    assert (explained.kind, explained.is_permanent) == ("engine", False)


def test_a_process_that_the_kernel_ended_is_told_with_its_signal() -> None:
    error = RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}")
    explained = explain_load_failure(error, "", experiment(), FACTS)
    assert "EngineCore_DP0 was ended by signal 9" in explained.message
    assert "memory" in explained.hint
    assert not explained.is_permanent


def test_a_report_of_pydantic_is_reduced_to_its_words() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, Unknown quantization method: nonsense. "
        "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n    For further information"
    )
    explained = explain_load_failure(error, "", experiment({"quantization": "nonsense"}), FACTS)
    assert explained.message.endswith("ValueError: Unknown quantization method: nonsense.")


def test_the_options_named_are_those_in_the_words_else_all_that_were_given() -> None:
    section = {"block_size": 16, "load_format": "pt", "extra": {"stream_interval": 3}}
    named = explain_load_failure(ValueError("bad Block-Size"), "", experiment(section), FACTS)
    assert "with vllm.block_size: 16: " in named.message
    every = explain_load_failure(ValueError("no"), "", experiment(section), FACTS)
    assert "with vllm.block_size: 16, vllm.load_format: pt, vllm.extra.stream_interval: 3: " in every.message


def test_a_model_that_vllm_does_not_know_is_not_tried_again() -> None:
    error = ValueError("Model architectures ['Odd'] are not supported for now.")
    explained = explain_load_failure(error, "", experiment({"block_size": 16}), FACTS)
    assert (explained.kind, explained.is_permanent) == ("model", True)


def test_a_refusal_without_options_is_permanent_and_a_fault_is_not() -> None:
    assert explain_load_failure(ValueError("no"), "", experiment(), FACTS).is_permanent
    fault = explain_load_failure(
        AttributeError("'x' has no attribute 'get'"), "", experiment({"block_size": 16}), FACTS
    )
    assert (fault.kind, fault.is_permanent) == ("engine", False)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("top_p must be in (0, 1], got 0.0. (parameter=top_p, value=0.0)", "decoder.top_p"),
        ("token ids out of vocabulary (parameter=logit_bias, value=[5])", "vllm.logit_bias"),
        ("LoRA rank 64 is greater than max_lora_rank 16", "model.adapter"),
        ("something else", "vllm.block_size: 32"),
    ],
)
def test_a_request_that_is_not_taken_names_the_option(words: str, options: str) -> None:
    explained = explain_request_failure(words, experiment({"block_size": 32}), FACTS)
    assert f"cannot honour {options}: {words}" in explained.message


def test_an_engine_that_dies_while_it_generates_may_be_tried_again() -> None:
    error = EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    explained = explain_run_failure(
        error, "(EngineCore pid=1) ERROR 1 [a.py:1] RuntimeError: device-side assert", FACTS
    )
    assert "RuntimeError: device-side assert" in explained.message
    assert (explained.kind, explained.is_permanent) == ("engine", False)
    explained = explain_run_failure(error, "INFO nothing of use", FACTS)
    assert "ended without a word" in explained.message
    explained = explain_run_failure(error, "torch.OutOfMemoryError: CUDA out of memory.", FACTS)
    assert (explained.kind, explained.is_permanent) == ("out_of_memory", False)
