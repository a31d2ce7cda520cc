"""A vLLM engine from outside: tokens counted and timed as they are seen, none lost; its output; its failures."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.common import EngineRaised
from lem.engines.protocol import Completion, TokenRequest, say_nothing
from lem.engines.vllm.options import EngineFacts
from lem.engines.vllm.running import (
    StepLoop,
    explain_load_failure,
    explain_request_failure,
    explain_run_failure,
)
from tests.integration.engine_answers import Arrivals, served

S = 1_000_000_000


class Rejected(Exception):
    """What the engine raises over a request that it does not take."""


class Work:
    """A request in the engine."""

    def __init__(self, name: str, first_id: int, parameters: Any) -> None:
        self.name, self.first_id, self.parameters = name, first_id, parameters
        self.scheduled_ts = 0.0
        self.made: list[int] = []


class Engine:
    """Answers a prompt with the numbers after its first id, `per_step` of them a step; a step takes one second."""

    def __init__(self, *, per_step: int = 1, reason: str = "length") -> None:
        self.now_s = 100.0
        self.seen: list[tuple[Any, str]] = []
        self.steps: list[list[str]] = []
        self.callers: set[int] = set()
        self.answers: queue.Queue[Any] | None = None
        self.dies_at: int | None = None
        self._per_step = per_step
        self._reason = reason
        self._arriving: queue.Queue[Work] = queue.Queue()
        self._working: list[Work] = []

    def clock(self) -> int:
        return round(self.now_s * S)

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any = None) -> None:
        self.callers.add(threading.get_ident())
        token_ids, _salt = prompt
        if token_ids[0] < 0:
            raise Rejected("id  -1 is\nno token")
        self.seen.append((prompt, lora_request))
        self._arriving.put(Work(request_id, token_ids[0], params))

    def step(self) -> list[Any]:
        self.callers.add(threading.get_ident())
        return self.compute()

    def compute(self) -> list[Any]:
        while not self._arriving.empty():
            self._working.append(self._arriving.get())
        self.steps.append([work.name for work in self._working])
        if len(self.steps) == self.dies_at:
            raise RuntimeError("the engine died")
        for work in self._working:
            work.scheduled_ts = work.scheduled_ts or self.now_s
        self.now_s += 1.0
        outputs = [output for work in self._working if (output := self.answer(work)) is not None]
        self._working = [work for work in self._working if len(work.made) < work.parameters.maximum]
        return outputs

    def answer(self, work: Work) -> Any:
        count = min(self._per_step, work.parameters.maximum - len(work.made))
        new = [work.first_id + len(work.made) + place + 1 for place in range(count)]
        work.made += new
        finished = len(work.made) == work.parameters.maximum
        if not finished and not work.parameters.is_observed:
            return None
        token_ids = new if work.parameters.is_observed else list(work.made)
        part = SimpleNamespace(token_ids=token_ids, finish_reason=self._reason if finished else None)
        metrics = SimpleNamespace(scheduled_ts=work.scheduled_ts, last_token_ts=self.now_s, arrival_time=1.7e9)
        return SimpleNamespace(request_id=work.name, finished=finished, metrics=metrics, outputs=[part])


class Apart(Engine):
    """An engine in a process of its own, played by a thread: a step waits until it has put something there."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.answers = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def step(self) -> list[Any]:
        self.callers.add(threading.get_ident())
        assert self.answers is not None
        found = self.answers.get(timeout=30)
        if isinstance(found, Exception):
            raise found
        return list(found)

    def _work(self) -> None:
        assert self.answers is not None
        try:
            while True:
                if not self._working:
                    self._working.append(self._arriving.get())
                self.answers.put(self.compute())
        except RuntimeError as error:
            self.answers.put(error)


ENGINES = pytest.mark.parametrize("kind", [Engine, Apart])


def request(index: int, first_id: int, length: int = 3, maximum: int = 4) -> TokenRequest:
    return TokenRequest(index, (first_id, *range(length - 1)), maximum)


def loop(engine: Engine, **changed: Any) -> StepLoop:
    usual: dict[str, Any] = {
        "prompt": lambda token_ids, salt: (tuple(token_ids), salt),
        "parameters": lambda made, is_observed: SimpleNamespace(
            maximum=made.max_output_tokens, is_observed=is_observed
        ),
        "longest": 20,
        "rejections": (Rejected,),
        "failures": (RuntimeError,),
        "adapter": "an adapter",
        "answers": engine.answers,
        "clock": engine.clock,
    }
    return StepLoop(engine, **{**usual, **changed})


def test_a_closed_set_runs_together_and_is_timed_by_the_engine() -> None:
    engine = Engine()
    first, second = loop(engine).run_closed([request(0, 10), request(1, 50, maximum=2)], say_nothing)[::-1]
    assert [len(names) for names in engine.steps] == [2, 2, 1, 1]
    assert first == Completion(0, (11, 12, 13, 14), 100 * S, 104 * S, None, padding_tok=0)
    assert second == Completion(1, (51, 52), 100 * S, 102 * S, None, padding_tok=0)


def test_alone_each_token_has_the_time_of_its_step() -> None:
    engine = Engine(per_step=3)
    first, second = loop(engine).run_alone([request(0, 10), request(1, 50, maximum=2)], say_nothing)
    assert all(len(names) == 1 for names in engine.steps)
    assert (first.output_ids, second.output_ids) == ((11, 12, 13, 14), (51, 52))
    assert first.token_times_ns == (101 * S, 101 * S, 101 * S, 102 * S)
    assert (first.started_ns, first.finished_ns) == (100 * S, 102 * S)
    assert (second.started_ns, second.token_times_ns) == (102 * S, (103 * S, 103 * S))


class Odd(Engine):
    """An engine whose answers have other values than they should."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def answer(self, work: Work) -> Any:
        output = super().answer(work)
        vars(output).update(self.changes)
        return output


def test_without_statistics_a_request_starts_when_it_is_handed_over() -> None:
    (found,) = loop(Odd(metrics=None)).run_alone([request(0, 10, maximum=1)], say_nothing)
    assert (found.started_ns, found.finished_ns) == (100 * S, 101 * S)


def test_an_answer_to_a_stranger_is_a_fault() -> None:
    with pytest.raises(EngineError, match="an unknown request: another"):
        loop(Odd(request_id="another")).run_alone([request(0, 10)], say_nothing)


def test_a_request_that_is_too_long_or_not_taken_fails_alone() -> None:
    # 16 + 4 are the most tokens of a request.
    requests = [request(0, 10, length=16), request(1, 50, length=17), request(2, -1)]
    engine, done = Engine(), list[int]()
    good, too_long, rejected = sorted(loop(engine).run_closed(requests, done.append), key=lambda item: item.index)
    assert (good.error, engine.seen[0][1], done[-1]) == (None, "an adapter", 3)
    assert "17 prompt tokens and 4 output tokens exceed vllm.max_model_len (20)" in str(too_long.error)
    assert rejected.error == "id -1 is no token"


@pytest.mark.parametrize(("reason", "is_good"), [("stop", True), ("length", True), ("abort", False), ("error", False)])
def test_how_a_request_ended_decides_whether_it_failed(reason: str, is_good: bool) -> None:
    (found,) = loop(Engine(reason=reason)).run_closed([request(0, 10)], say_nothing)
    assert (found.error is None) == is_good


@ENGINES
def test_a_queue_is_worked_off_as_it_fills_by_one_thread(kind: type[Engine]) -> None:
    engine = kind()
    bad = [request(4, -1), request(5, 10, length=18)]
    groups = [[request(0, 10), request(1, 30)], bad, [request(2, 50)], [request(3, 70)]]
    found: list[Completion] = served(loop(engine), *groups)  # type: ignore[arg-type]  # it serves as an engine does
    assert [item.output_ids[0] for item in found[:4]] == [11, 31, 51, 71]
    assert [item.error is None for item in found] == [True] * 4 + [False] * 2
    assert all(item.token_times_ns is not None for item in found[:4])
    assert engine.callers == {threading.get_ident()}


class Joining(Arrivals):
    """A queue whose second group is there as soon as `may_join` is set."""

    def __init__(self, *groups: list[TokenRequest]) -> None:
        super().__init__(*groups)
        self.may_join, self.is_in = threading.Event(), threading.Event()

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        if len(self._groups) == 1:
            assert self.may_join.wait(30)
        if not self._groups:  # asked for more: the loop has what came before
            self.is_in.set()
            return ()
        return tuple(self._groups.pop(0))


def test_requests_reach_an_engine_apart_while_it_computes() -> None:
    """Its first step does not end before the second request is there, which no loop that waits in `step` can bring."""
    arrivals = Joining([request(0, 10)], [request(1, 50)])
    is_there = threading.Semaphore(0)

    class Waiting(Apart):
        def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any = None) -> None:
            super().add_request(request_id, prompt, params, lora_request=lora_request)
            is_there.release()

        def compute(self) -> list[Any]:
            if not self.steps:
                arrivals.may_join.set()
                assert is_there.acquire(timeout=30)
                assert is_there.acquire(timeout=30)
            return super().compute()

    engine = Waiting()
    loop(engine).serve(arrivals)
    assert sorted(completion.index for completion in arrivals.completions) == [0, 1]
    assert engine.steps[0] == ["lem-1", "lem-2"]


@ENGINES
@pytest.mark.parametrize(("is_salted", "salts"), [(True, [None, "2", None, "3"]), (False, [None] * 4)])
def test_a_prompt_that_comes_again_shares_nothing_with_itself(kind: type[Engine], is_salted: bool, salts: Any) -> None:
    engine = kind()
    groups = [[request(index, first_id)] for index, first_id in enumerate((10, 10, 50, 10))]
    loop(engine, is_salted=is_salted).serve(Arrivals(*groups))
    assert [salt for (_ids, salt), _adapter in engine.seen] == salts


@ENGINES
def test_a_queue_that_fails_fails_serving(kind: type[Engine]) -> None:
    class Broken(Arrivals):
        def take(self, limit: int) -> tuple[TokenRequest, ...]:
            if not self._groups:
                raise EngineError("the queue is broken")
            return super().take(limit)

    with pytest.raises(EngineError, match="the queue is broken"):
        loop(kind()).serve(Broken([request(0, 10)]))


@ENGINES
def test_an_engine_that_dies_fails_serving_at_once(kind: type[Engine]) -> None:
    engine = kind()
    engine.dies_at = 2
    arrivals = Arrivals([request(0, 10)], [request(1, 50)])
    with pytest.raises(EngineRaised, match="the engine died") as caught:
        loop(engine).serve(arrivals)
    assert isinstance(caught.value.error, RuntimeError)
    assert arrivals.completions == []


def test_a_bug_in_taking_an_answer_or_making_a_request_is_not_the_engines() -> None:
    with pytest.raises(TypeError):
        loop(Odd(outputs=None)).serve(Arrivals([request(0, 10)]))
    broken = loop(Engine(), parameters=lambda _made: None, failures=(TypeError,))
    with pytest.raises(TypeError, match="positional argument"):
        broken.run_closed([request(0, 10)], say_nothing)


# What failures mean

FACTS = EngineFacts("0.32.0", frozenset(), {}, "cuda")
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


def explain(error: Exception, section: dict[str, Any] | None = None, output: str = "") -> EngineError:
    return explain_load_failure(error, output, experiment(section), FACTS)


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
    printed = WORKER_FAILED.format(cause=f"torch.OutOfMemoryError: {words}")
    for explained in (explain(RuntimeError(words)), explain(ELSEWHERE, output=printed)):
        assert (explained.kind, explained.is_permanent) == ("out_of_memory", True)
        assert words[:20] in explained.message
        assert "gpu_memory_utilization" in explained.hint


def test_the_cause_is_the_first_failure_that_a_process_printed() -> None:
    explained = explain(ELSEWHERE, output="nothing of use")
    assert (explained.kind, explained.is_permanent) == ("engine", False)
    output = WORKER_FAILED.format(cause="ValueError: No common block size for 16.")
    explained = explain(ELSEWHERE, {"block_size": 16}, output)
    assert isinstance(explained, OptionRefused)
    assert "with vllm.block_size: 16: ValueError: No common block size for 16." in explained.message


PYDANTIC = (
    "1 validation error for ModelConfig\n  Value error, Unknown quantization method: nonsense. "
    "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]\n    For further information"
)
KILLED = "Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -9}"
PARALLEL = {"tensor_parallel_size": 2, "block_size": 16}
SECTION = {"block_size": 16, "load_format": "pt", "extra": {"stream_interval": 3}}


@pytest.mark.parametrize(
    ("error", "section", "words", "verdict"),
    [
        (RuntimeError(KILLED), {}, "EngineCore_DP0 was killed by SIGKILL while loading", ("engine", False)),
        (ValueError(PYDANTIC), {"quantization": "x"}, ": ValueError: Unknown quantization method: nonsense.", None),
        (ValueError("bad Block-Size"), SECTION, "with vllm.block_size: 16: ", ("option", True)),
        (ValueError("no config file for pt."), SECTION, "with vllm.load_format: pt: ", ("option", True)),
        (ValueError("too few for 2 CPUWorkers"), PARALLEL, "with vllm.tensor_parallel_size: 2: ", ("option", True)),
        # Numbers that vLLM prints are no ends of processes.
        (ValueError("no {'max_logprobs': -1}"), {}, "ValueError: no", ("engine", True)),
        # No option is blamed that is not in the words.
        (ValueError("no"), SECTION, "cannot load m: ValueError: no", ("engine", True)),
        (ValueError("['Odd'] are not supported for now."), SECTION, "['Odd'] are not", ("model", True)),
        (ValueError("Model architectures ['Odd'] failed to be inspected."), SECTION, "['Odd'] failed", ("model", True)),
        # A refusal without options is permanent, and so is a bug; what a device or the machine does is not.
        (ValueError("no"), {}, "ValueError: no", ("engine", True)),
        (AttributeError("'x' has no attribute 'get'"), SECTION, "no attribute", ("engine", True)),
        (RuntimeError("device-side assert"), SECTION, "device-side assert", ("engine", False)),
    ],
)
def test_a_failed_load_is_explained(error: Exception, section: dict[str, Any], words: str, verdict: Any) -> None:
    explained = explain(error, section)
    assert words in explained.message
    assert verdict in {None, (explained.kind, explained.is_permanent)}


def test_a_failure_without_an_option_in_its_words_lists_what_was_given() -> None:
    hint = explain(ValueError("no"), SECTION).hint
    assert hint == "see the log; given: vllm.block_size: 16, vllm.load_format: pt, vllm.extra.stream_interval: 3"


# As vLLM 0.32.0 printed them, when a worker was killed while it computed, and while it started.
WORKER_DIED = """\
(EngineCore pid=1) ERROR 11-30 10:58:54 [multiproc_executor.py:316] Worker proc VllmWorker-0 died unexpectedly \
(exit code: -{number}), shutting down executor.
(EngineCore pid=1) ERROR 11-30 10:58:54 [core.py:1510] RuntimeError: cancelled
"""
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
FAULT = "Fatal Python error: Illegal instruction\n\nCurrent thread 0x1 (most recent call first):\n"


def test_a_fault_that_the_engine_survived_is_not_blamed_for_a_later_error() -> None:
    explained = explain(ValueError("no"), output=FAULT)
    assert explained.message.endswith("cannot load m: ValueError: no")


@pytest.mark.parametrize(
    ("output", "words", "is_permanent", "hint"),
    [
        (WORKER_DIED.format(number=4), "its process VllmWorker-0 was killed by SIGILL", (True, True), "float32"),
        (WORKER_DIED.format(number=11), "its process VllmWorker-0 was killed by SIGSEGV", (True, False), "log"),
        (WORKER_DIED.format(number=9), "its process VllmWorker-0 was killed by SIGKILL", (False, False), "memory"),
        (FAULT, "its process was killed by SIGILL", (True, True), "float32"),
    ],
)
def test_a_signal_that_killed_a_worker_is_named_and_a_fault_is_not_tried_again(
    output: str, words: str, is_permanent: tuple[bool, bool], hint: str
) -> None:
    loading, running = explain(ELSEWHERE, output=output), explain_run_failure(EngineDeadError(DEAD), output, FACTS)
    assert (loading.message, running.message) == tuple(
        f"vLLM 0.32.0 on cuda: {words} while {phase}" for phase in ("loading", "generating")
    )
    assert (loading.is_permanent, running.is_permanent) == is_permanent
    assert hint in loading.hint


@pytest.mark.parametrize(
    ("section", "message", "hint"),
    [
        (
            {},
            "max_input_tokens: 512 and max_output_tokens: 128: 640 tokens exceed the 512 positions of the model",
            "lower max_input_tokens or max_output_tokens: together at most 512",
        ),
        (
            {"max_model_len": 640, "enforce_eager": True},
            "vllm.max_model_len: 640: 640 tokens exceed the 512 positions of the model",
            "lower vllm.max_model_len: together at most 512",
        ),
    ],
)
def test_lengths_beyond_the_positions_are_named_as_the_options_that_set_them(
    section: dict[str, Any], message: str, hint: str
) -> None:
    words = (
        "User-specified max_model_len (640) is greater than the derived max_model_len (max_position_embeddings=512 or"
    )
    explained = explain(ValueError(f"{words} model_max_length=None in model's config.json)."), section)
    assert (explained.kind, explained.message, explained.hint) == ("option", message, hint)


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
    assert f"does not support {options}: {words}" in explained.message


@pytest.mark.parametrize(
    ("output", "words", "kind"),
    [
        ("(EngineCore pid=1) ERROR 1 [a.py:1] RuntimeError: device-side assert", "RuntimeError: device-", "engine"),
        ("INFO nothing of use", "ended without a message", "engine"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "out of memory while generating", "out_of_memory"),
    ],
)
def test_an_engine_that_dies_while_it_generates_is_explained(output: str, words: str, kind: str) -> None:
    error = EngineDeadError(DEAD)
    explained = explain_run_failure(error, output, FACTS)
    assert words in explained.message
    assert (explained.kind, explained.is_permanent) == (kind, kind == "out_of_memory")


# What processes print

ROOT = Path(__file__).parents[3]

# In a process of its own: descriptors 1 and 2 are the whole process's.
PROGRAM = """
import os, subprocess, sys
from lem.engines.vllm.running import ChildOutput
output = ChildOutput()
print("before")
with output.inherited():
    print("inside")
    os.write(2, b"direct\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('child'); print('child error', file=sys.stderr)"])
    late = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); print('late')"], stdin=subprocess.PIPE
    )
    print("y" * 100_000)
kept = output.text.replace("y" * 100_000, "yy")
print("after")
late.communicate(b"")
while "late" not in output.text:
    pass
print(sorted(kept.split("\\n")), flush=True)
"""


def test_output_is_passed_on_to_where_errors_go_and_kept_whole() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    before, after, kept = finished.stdout.splitlines()
    assert (before, after) == ("before", "after")
    assert kept == "['', 'child', 'child error', 'direct', 'inside', 'yy']"
    passed_on = finished.stderr.replace("y" * 100_000, "yy").split()
    assert sorted(passed_on) == ["child", "child", "direct", "error", "inside", "late", "yy"]
