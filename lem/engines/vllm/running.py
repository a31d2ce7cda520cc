"""Running vLLM's engine: the steps it makes, what its processes print, and what its failures mean.

Imports no vLLM. The engine's own interface is called, the two calls that `LLM.generate` makes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import re
import select
import signal
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lem.base.dataclass import dataclass, field
from lem.base.errors import REPEATING, EngineError, OptionRefused
from lem.base.process import describe_exit, hint_on_exit, would_repeat
from lem.base.units import KIB, NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.engines import common, texts
from lem.engines.common import GOOD_ENDS, TAKE_LIMIT, EngineRaised, plain, shortened
from lem.engines.protocol import Completion, OnProgress, RequestQueue, TokenRequest
from lem.engines.vllm import options
from lem.engines.vllm.options import EngineFacts


@dataclass
class _Stream:
    request: TokenRequest
    submitted_ns: int
    is_observed: bool
    output_ids: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)

    def take(self, output: Any, now_ns: int) -> Completion | None:
        """Add the tokens of a step (one, several or none); the completion after the last."""
        # A token's time is when the caller has it. The engine itself reports when it started the request, by the same
        # clock (CLOCK_MONOTONIC); its `arrival_time` is of another clock and not used.
        part = output.outputs[0]
        self.output_ids += part.token_ids
        if self.is_observed:
            self.times_ns += [now_ns] * len(part.token_ids)
        if not output.finished:
            return None
        started_ns, finished_ns = self._span(output.metrics, now_ns)
        error = None if part.finish_reason in GOOD_ENDS else f"vLLM ended the request with {part.finish_reason!r}"
        output_ids, times_ns = tuple(self.output_ids), tuple(self.times_ns) if self.is_observed else None
        return Completion(self.request.index, output_ids, started_ns, finished_ns, times_ns, error, padding_tok=0)

    def _span(self, metrics: Any, now_ns: int) -> tuple[int, int]:
        started_s, last_s = (getattr(metrics, name, 0.0) for name in ("scheduled_ts", "last_token_ts"))
        started_ns = round(started_s * NS_PER_S) if started_s else self.submitted_ns
        if self.is_observed:
            return started_ns, self.times_ns[-1] if self.times_ns else now_ns
        return started_ns, max(started_ns, round(last_s * NS_PER_S) if last_s else now_ns)


@dataclass
class StepLoop:
    """Runs requests through an engine. The thread that runs it is the only one that calls the engine."""

    # Requests go to an engine in a process of its own as they arrive, while it computes; otherwise they wait for the
    # end of the step.

    engine: Any  # vLLM's LLMEngine; only `add_request` and `step` are used
    prompt: Callable[[Sequence[int], str | None], Any]  # equal prompts with different salts share no cache
    parameters: Callable[[TokenRequest, bool], Any]  # with True, tokens are returned as they come, else at the end
    longest: int  # the most tokens of prompt and output together
    rejections: tuple[type[Exception], ...]  # what the engine raises for a request that it does not accept
    failures: tuple[type[Exception], ...]  # what else its calls raise
    adapter: Any = None  # the LoRA adapter of every request
    answers: queue.Queue[Any] | None = None  # where an engine in a process of its own puts what `step` takes
    is_salted: bool = False  # in traffic, a repeated prompt is not found in the prefix cache
    clock: Callable[[], int] = time.monotonic_ns
    _streams: dict[str, _Stream] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def run_closed(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        completions = [failed for request in requests if (failed := self._add(request, is_observed=False)) is not None]
        return completions + self._finish(len(completions), on_progress)

    def run_alone(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        completions: list[Completion] = []
        for request in requests:
            failed = self._add(request, is_observed=True)
            completions += [failed] if failed is not None else self._finish(len(completions), on_progress)
        return completions

    def serve(self, arrivals: RequestQueue) -> None:
        desk = _Desk(arrivals, self.answers)
        occurrences: Counter[tuple[int, ...]] = Counter()
        thread = threading.Thread(target=desk.receive, name="requests", daemon=True)
        thread.start()
        while (arrived := desk.collect(is_busy=bool(self._streams))) is not None:
            for request in arrived:
                salt = None
                if self.is_salted:
                    times = occurrences[request.token_ids] = occurrences[request.token_ids] + 1
                    salt = None if times == 1 else str(times)
                failed = self._add(request, is_observed=True, salt=salt)
                if failed is not None:
                    arrivals.complete(failed)
            if self._streams and desk.can_step():
                for completion in self._step():
                    arrivals.complete(completion)
        if desk.failure is not None:
            raise desk.failure
        thread.join()

    def _finish(self, done: int, on_progress: OnProgress) -> list[Completion]:
        completions: list[Completion] = []
        while self._streams:
            completions += self._step()
            on_progress(done + len(completions))
        return completions

    def _add(self, request: TokenRequest, *, is_observed: bool, salt: str | None = None) -> Completion | None:
        now_ns, prompt_tok, output_tok = self.clock(), len(request.token_ids), request.max_output_tokens
        if prompt_tok + output_tok > self.longest:
            wanted = f"{prompt_tok} prompt tokens and {output_tok} output tokens"
            problem = f"{wanted} exceed vllm.max_model_len ({self.longest})"
            return Completion(request.index, (), now_ns, now_ns, error=problem)
        self._count += 1
        name = f"lem-{self._count}"
        try:
            prompt, parameters = self.prompt(request.token_ids, salt), self.parameters(request, is_observed)
        except self.rejections as error:
            return Completion(request.index, (), now_ns, self.clock(), error=shortened(error))
        try:
            self.engine.add_request(name, prompt, parameters, lora_request=self.adapter)
        except self.rejections as error:
            return Completion(request.index, (), now_ns, self.clock(), error=shortened(error))
        except self.failures as error:
            raise EngineRaised(error) from error
        self._streams[name] = _Stream(request, now_ns, is_observed)
        return None

    def _step(self) -> list[Completion]:
        with common.engine_call(*self.failures):
            outputs = self.engine.step()
        now_ns = self.clock()
        completions = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                raise EngineError(f"vLLM answered an unknown request: {output.request_id}")
            completion = stream.take(output, now_ns)
            if completion is not None:
                del self._streams[output.request_id]
                completions.append(completion)
        return completions


class _Desk:
    def __init__(self, arrivals: RequestQueue, answers: queue.Queue[Any] | None) -> None:
        self.failure: Exception | None = None  # why no more requests can be taken in
        self._arrivals = arrivals
        self._answers = answers
        # One condition for arrivals and for answers: `queue.Queue` notifies it when something is put there.
        self._changed = threading.Condition() if answers is None else answers.not_empty
        self._inbox: list[TokenRequest] = []
        self._is_closed = False

    def receive(self) -> None:
        try:
            while arrived := self._arrivals.take(TAKE_LIMIT):
                with self._changed:
                    self._inbox.extend(arrived)
                    self._changed.notify()
        except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
            self.failure = error
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify()

    def collect(self, *, is_busy: bool) -> list[TokenRequest] | None:
        """The requests that have arrived, once there are any or the engine can step; None if no more will come."""
        with self._changed:
            while not self._inbox and not (is_busy and self._has_answer()):
                if self.failure is not None or (self._is_closed and not is_busy):
                    return None
                self._changed.wait()
            if self.failure is not None:
                return None
            arrived, self._inbox = self._inbox, []
            return arrived

    def can_step(self) -> bool:
        with self._changed:
            return self._has_answer()

    def _has_answer(self) -> bool:
        return self._answers is None or bool(self._answers.queue)


# --- what its failures mean

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks|"
    r"less than desired (GPU|CPU)? ?memory utilization|can't allocate memory|"
    r"larger than the available KV cache memory|Cannot allocate memory|No space left on device.*shm",
    re.IGNORECASE,
)
_NO_SUCH_MODEL = re.compile(
    r"are not supported for now|Unsupported architecture|Unrecognized model|no `?architectures`?|"
    r"Cannot find any model weights|weights were not initialized|Unsupported CPU attention configuration|"
    r"failed to be inspected|does not appear to have a file named|Error while deserializing header|trust_remote_code",
    re.IGNORECASE,
)
# What vLLM says in the caller when the cause was printed by one of its processes.
_ELSEWHERE = re.compile(r"root cause above|stack trace \(above\)|See stack trace for root cause")
_PARAMETER = re.compile(r"parameter=(?P<name>\w+)")
# Messages about a process that ended: of the caller about its own, of these about theirs, and of Python's faulthandler.
_ENDED = re.compile(
    r"'(?P<core>EngineCore\w*)': (?P<code>-\d+)|Worker proc (?P<worker>\S+) died .*?exit code: (?P<exit>-\d+)"
)
_FATAL = re.compile(r"Fatal Python error: (Illegal instruction|Segmentation fault|Bus error|Aborted|Floating point)")
_FATAL_SIGNALS = {
    "Illegal instruction": signal.SIGILL,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "Aborted": signal.SIGABRT,
    "Floating point": signal.SIGFPE,
}
_TOO_LONG = re.compile(r"max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=(?P<most>[\d.]+)")

# A line of a log: `(EngineCore pid=7) ERROR 11-20 08:27:10 [core.py:402] ValueError: words`, its prefixes optional.
_ERROR_LINE = re.compile(
    r"^(?:\([^)]*\)\s*)*(?:ERROR\s[^\]]*\]\s*)?"
    r"(?P<name>(?:\w+\.)*\w*(?:Error|Exception))(?:: (?P<words>.*))?$"
)
# The same configuration brings these again; the first two are pydantic's and vLLM's own.
_REPEATING = frozenset({"ValidationError", "VLLMValidationError", *(kind.__name__ for kind in REPEATING)})
# pydantic wraps the words of a check into a report on its input.
_WRAPPING = re.compile(r"^\d+ validation errors? for \w+\s+(Value error, )?|\s*\[type=\w+, input_value=.*$")
_MEMORY_HINT = (
    "use a smaller model, a lower fp_precision or quantization, a shorter vllm.max_model_len, fewer max_num_seqs, or "
    "another vllm.gpu_memory_utilization; on the CPU VLLM_CPU_KVCACHE_SPACE (GiB) limits the cache"
)


def explain_load_failure(
    error: BaseException, output: str, config: ExperimentConfig, facts: EngineFacts
) -> EngineError:
    name, text = _cause(error, output)
    what = f"{facts} cannot load {config.model.name}"
    if _OUT_OF_MEMORY.search(f"{text} {output if _ELSEWHERE.search(str(error)) else ''}"):
        return common.out_of_memory(f"{facts}: out of memory while loading: {text}", _MEMORY_HINT)
    if killed := _explain_end(error, output, facts, is_loading=True):
        return killed
    if too_long := _TOO_LONG.search(text):
        return texts.too_long(config, float(too_long["most"]))
    if _NO_SUCH_MODEL.search(text):
        hint = "check that it is a complete causal language model that this build of vLLM supports"
        return common.model_error(f"{what}: {text}", hint)
    is_permanent = name in _REPEATING
    named, given = _options_behind(text, config)
    if is_permanent and named:
        return OptionRefused(f"{what} with {named}: {text}", "leave one of them out")
    return EngineError(
        f"{what}: {text}", f"see the log; given: {given}" if given else "see the log", is_permanent=is_permanent
    )


def _explain_end(error: BaseException, output: str, facts: EngineFacts, *, is_loading: bool) -> EngineError | None:
    name, code = "", 0
    if ended := _ENDED.search(f"{error}\n{output}"):
        name, code = f" {ended['core'] or ended['worker']}", int(ended["code"] or ended["exit"])
    elif _ELSEWHERE.search(str(error)) and (fatal := _FATAL.search(output)):
        code = -_FATAL_SIGNALS[fatal[1]]
    if not code:
        return None
    what = f"{facts}: its process{name} {describe_exit(code)} while {'loading' if is_loading else 'generating'}"
    return EngineError(what, hint_on_exit(code), is_permanent=would_repeat(code, is_loading=is_loading))


def explain_request_failure(words: str, config: ExperimentConfig, facts: EngineFacts) -> OptionRefused:
    words = shortened(words)
    parameter = _PARAMETER.search(words)
    text = parameter["name"] if parameter else words.lower()
    behind = [option for word, option in options.OPTION_OF_PARAMETER.items() if word in text]
    listed = " or ".join(behind) or next(filter(None, _options_behind(words, config)), "these options")
    return OptionRefused(f"{facts} does not support {listed}: {words}", "change the value, or leave the option out")


def explain_run_failure(error: BaseException, output: str, facts: EngineFacts) -> EngineError:
    name, text = _cause(error, output)
    if _OUT_OF_MEMORY.search(text):
        return common.out_of_memory(f"{facts}: out of memory while generating: {text}", _MEMORY_HINT)
    if killed := _explain_end(error, output, facts, is_loading=False):
        return killed
    return EngineError(f"{facts} failed while generating: {text}", "see the log", is_permanent=name in _REPEATING)


def _cause(error: BaseException, output: str) -> tuple[str, str]:
    name, words = type(error).__name__, str(error)
    if _ELSEWHERE.search(words):
        lines = (_ERROR_LINE.match(line.strip()) for line in output.splitlines())
        # The process that failed first prints the cause; those that waited for it fail after it.
        cause = next((line for line in lines if line and not _ELSEWHERE.search(line["words"] or "")), None)
        if cause is not None:
            name, words = cause["name"].rpartition(".")[2], cause["words"] or ""
        else:
            words = "a process of the engine ended without a message; the kernel may have killed it to free memory"
    words = shortened(_WRAPPING.sub("", " ".join(words.split())))
    return name, f"{name}: {words}" if words else name


def _options_behind(words: str, config: ExperimentConfig) -> tuple[str, str]:
    usual = options.given_options(ExperimentConfig.from_dict({"model": config.model.name, "backend": "vllm"}))
    sampling = common.given_options(config.section, options.SAMPLING_OPTIONS)
    extra = {f"extra.{name}": value for name, value in common.extra_of(config).items()}
    given = {**options.given_options(config), **sampling, **extra}
    changed = {name: plain(value) for name, value in given.items() if usual.get(name) != value}
    spaced = _spaced(words)

    def is_named(option: str) -> bool:
        names, value = (option, options.OPTIONS.get(option, (option,))[0]), changed[option]
        if isinstance(value, str) and f" {_spaced(value)} " in f" {spaced} ":
            return True
        if option.endswith("parallel_size") and re.search("workers|world size", spaced):
            return True
        return any(_spaced(name.rpartition(".")[2]) in spaced for name in names)

    named, listed = (
        ", ".join(f"vllm.{name}: {changed[name]}" for name in it) for it in (filter(is_named, changed), changed)
    )
    return named, listed


def _spaced(words: str) -> str:
    return re.sub(r"[\W_]+", " ", words.lower())


# --- what its processes print

_TAIL_B = 256 * KIB
_READ_B = 64 * KIB
_PATIENCE_S = 5.0
_POLL_S = 0.005


class ChildOutput:
    """The output of the processes that are started while `inherited` is open, for as long as they live."""

    def __init__(self) -> None:
        self._tail = bytearray()
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        with self._lock:
            return self._tail.decode("utf-8", "replace")

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Meanwhile descriptors 1 and 2 lead here, so that new processes inherit them."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        thread = threading.Thread(target=self._pass_on, args=(reader, os.dup(2)), name="engine output", daemon=True)
        thread.start()
        try:
            _redirect(writer, writer)
            try:
                yield
            finally:
                _redirect(*saved)
        finally:
            self._drain(writer)
            for descriptor in (writer, *saved):
                os.close(descriptor)

    def _pass_on(self, reader: int, target: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                select.select((reader,), (), ())
                # An empty pipe, seen under this lock, means that everything is in the tail.
                with self._lock:
                    data = os.read(reader, _READ_B)
                    self._tail += data
                    del self._tail[:-_TAIL_B]
                    view = memoryview(data)
                    while view:
                        view = view[os.write(target, view) :]
                if not data:
                    break
        os.close(reader)
        os.close(target)

    def _drain(self, writer: int) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with self._lock:
                unread_b = fcntl.ioctl(writer, termios.FIONREAD, b"\0" * 4)
                if int.from_bytes(unread_b, sys.byteorder) == 0:
                    return
            time.sleep(_POLL_S)


def _redirect(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
