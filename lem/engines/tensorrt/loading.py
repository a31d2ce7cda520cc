"""Loading TensorRT-LLM: checkpoints and serving."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from lem.base import durable
from lem.base.codec import shown
from lem.base.errors import EngineError
from lem.base.units import NS_PER_US
from lem.config.experiment import ExperimentConfig
from lem.engines.common import GOOD_ENDS, TAKE_LIMIT, EngineRaised, Refusal, refuse, shortened
from lem.engines.protocol import Completion, OnProgress, RequestQueue, TokenRequest
from lem.engines.tensorrt.options import TYPE_KEYS, EngineFacts, section_of

# Its ModelLoader hands `dtype` to nothing, and takes what the checkpoint's config.json says: bfloat16 where that says
# nothing (ModelConfig.torch_dtype; TensorRT-LLM 1.0 to 1.3).
_AS_IT_IS = "and the PyTorch flow loads a checkpoint in its own type"
_TYPE_UNTOLD = "bfloat16"

# How a checkpoint names its quantization (hf_quant_config.json of ModelOpt, quantization_config of transformers).
_ALGORITHMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp8": ("fp8",),
        "int8_sq": ("w8a8_sq", "smoothquant"),
        "int8_weight_only": ("w8a16",),
        "int4_awq": ("w4a16_awq", "awq"),
        "int4_gptq": ("w4a16_gptq", "gptq"),
    }
)


# The files that describe a checkpoint, with the sections that are read of them.
_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"hf_quant_config.json": ("quantization",), "config.json": ("text_config", "quantization_config")}
)


def documents_of(folder: Path) -> dict[str, Any]:
    """The JSON files of a checkpoint that describe it, by name; those that are not there or no JSON are left out.

    Raises:
        EngineError: kind `model`, one cannot be read, or does not hold what it should.
    """
    found = {}
    for name, sections in _FILES.items():
        path = folder / name
        try:
            document = durable.read_json(path)
        except (FileNotFoundError, ValueError):
            continue
        except OSError as error:
            raise _broken(f"{path}: cannot be read: {durable.reason_of(error)}") from error
        _check_object(document, str(path))
        for section in sections:
            _check_object(document.get(section) or {}, f"{path}: {section}")
        found[name] = document
    return found


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _broken(f"{where}: expected an object, got {shown(value)}")


def _broken(message: str) -> EngineError:
    return EngineError(message, "download the checkpoint again", kind="model", is_permanent=True)


def check_checkpoint(config: ExperimentConfig, documents: Mapping[str, Any], facts: EngineFacts) -> None:
    """Refuse a checkpoint that is of another type or quantization than asked for, or whose code would be run unasked.

    Args:
        documents: its JSON files by name, as `quantization_of` takes them.

    Raises:
        OptionRefused: names what was asked for and what was found.
    """
    refuse(
        [*_quantization(config, documents), *_precision(config, documents), *_own_code(config, documents)],
        facts,
        "ask for what the checkpoint has, or name one that has what you ask for",
    )


def _quantization(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    wanted, found = section_of(config).quantization, quantization_of(documents)
    if wanted is None:
        return
    algorithms = _ALGORITHMS.get(wanted, ())
    if (found is None) != (wanted == "none") or (found is not None and not found.lower().startswith(algorithms)):
        what = "not quantized" if found is None else f"quantized to {found}"
        reason = f"{config.model.name} is {what}, and the PyTorch flow takes checkpoints as they are"
        yield Refusal("tensorrt.quantization", f"{wanted}: {reason}")


def _precision(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    told = next((place[key] for place in _descriptions(documents) for key in TYPE_KEYS if place.get(key)), None)
    found = str(told or _TYPE_UNTOLD).removeprefix("torch.")
    if found != config.fp_precision:
        what = f"{config.model.name} is {found}" if told else f"{config.model.name} tells no type, so it is {found}"
        yield Refusal("fp_precision", f"{config.fp_precision}: {what}, {_AS_IT_IS}")


def _descriptions(documents: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where the model is described; models that see as well as read describe their text part apart."""
    description = documents.get("config.json") or {}
    return description, description.get("text_config") or {}


def _own_code(config: ExperimentConfig, documents: Mapping[str, Any]) -> Iterator[Refusal]:
    """Its ModelLoader trusts any code that a checkpoint's configuration names (TensorRT-LLM 1.0 to 1.3)."""
    if not config.model.trust_remote_code and (documents.get("config.json") or {}).get("auto_map"):
        reason = f"{config.model.name} comes with code of its own, which TensorRT-LLM runs unasked"
        yield Refusal("model.trust_remote_code", f"false: {reason}")


def quantization_of(documents: Mapping[str, Any]) -> str | None:
    """How a checkpoint names its quantization; None for one that has none.

    Args:
        documents: its JSON files by name: `hf_quant_config.json` (ModelOpt) and `config.json` (transformers).
    """
    modelopt = documents.get("hf_quant_config.json") or {}
    algorithm = (modelopt.get("quantization") or {}).get("quant_algo")
    if algorithm:
        return str(algorithm)
    own = (documents.get("config.json") or {}).get("quantization_config") or {}
    name = own.get("quant_algo") or own.get("quant_method")
    return str(name) if name else None


def vocabulary_of(documents: Mapping[str, Any]) -> int | None:
    """How many token ids a checkpoint knows; None where it does not tell.

    Args:
        documents: its JSON files by name.
    """
    told = next((place["vocab_size"] for place in _descriptions(documents) if place.get("vocab_size")), None)
    return told if isinstance(told, int) else None


# What `generate_async` and its results raise over one request: RequestError is a RuntimeError.
_REJECTIONS = (RuntimeError, TypeError, ValueError)
# What any of its calls raises.
FAILURES = (AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, *_REJECTIONS)


class Engine(Protocol):
    """What is called of TensorRT-LLM's LLM."""

    def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Any:
        """Hand a request over; the answer can be waited for, or iterated over as it grows."""


class Server:
    """Runs requests through an engine.

    Args:
        parameters: the SamplingParams of a request; raises EngineRaised where the engine refuses them.
        longest: the most tokens of a prompt, and of prompt and output together.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Callable[[TokenRequest], Any],
        *,
        longest: tuple[int, int],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._longest_input, self._longest = longest
        self._clock = clock

    def run_closed(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, all handed over at once: the two calls that `LLM.generate` makes for each."""
        handed = [(request, self._clock(), self._hand_over(request, streaming=False)) for request in requests]
        completions = []
        for request, handed_ns, answer in handed:
            completions.append(self._wait_for(request, handed_ns, answer))
            on_progress(len(completions))
        return completions

    def run_alone(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, one after another, with the times of its tokens."""
        completions = []
        for request in requests:
            handed_ns, answer = self._clock(), self._hand_over(request, streaming=True)
            completions.append(self._follow_alone(request, handed_ns, answer))
            on_progress(len(completions))
        return completions

    def serve(self, queue: RequestQueue) -> None:
        """Work a queue off until it is closed and empty; requests join while others run."""
        asyncio.run(self._serve(queue))

    async def _serve(self, queue: RequestQueue) -> None:
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Sequence[TokenRequest] | BaseException | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()

        def settle(task: asyncio.Task[None]) -> None:
            if task.cancelled() or (error := task.exception()) is None:
                tasks.discard(task)
            else:
                arrivals.put_nowait(error)

        def tell(found: Sequence[TokenRequest] | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # serving has failed, and its loop is closed
                loop.call_soon_threadsafe(arrivals.put_nowait, found)

        def take_in() -> None:
            """Fetch requests as they arrive, in a thread of its own."""
            try:
                while arrived := queue.take(TAKE_LIMIT):
                    tell(arrived)
            except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
                tell(error)
            else:
                tell(None)

        threading.Thread(target=take_in, name="requests", daemon=True).start()
        while isinstance(arrived := await arrivals.get(), Sequence):
            for request in arrived:
                task = asyncio.create_task(self._answer(queue, request))
                tasks.add(task)
                task.add_done_callback(settle)
        if arrived is not None:
            raise arrived
        await asyncio.gather(*tasks)

    async def _answer(self, queue: RequestQueue, request: TokenRequest) -> None:
        handed_ns, answer = self._clock(), self._hand_over(request, streaming=True)
        times_ns: list[int] = []
        parts = None if isinstance(answer, str) else aiter(answer)
        while parts is not None:
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                break
            except FAILURES as error:
                answer = _words_of(error)
                break
            self._note(part, times_ns)
        queue.complete(self._complete(request, handed_ns, answer, times_ns))

    def _follow_alone(self, request: TokenRequest, handed_ns: int, answer: Any) -> Completion:
        times_ns: list[int] = []
        parts = None if isinstance(answer, str) else iter(answer)
        while parts is not None:
            try:
                part = next(parts)
            except StopIteration:
                break
            except FAILURES as error:
                answer = _words_of(error)
                break
            self._note(part, times_ns)
        return self._complete(request, handed_ns, answer, times_ns)

    def _wait_for(self, request: TokenRequest, handed_ns: int, answer: Any) -> Completion:
        if not isinstance(answer, str):
            try:
                answer = answer.result()
            except FAILURES as error:
                answer = _words_of(error)
        return self._complete(request, handed_ns, answer, None)

    def _hand_over(self, request: TokenRequest, *, streaming: bool) -> Any:
        """The answer to wait for; words when the request has failed already.

        Raises:
            EngineRaised: the engine failed.
        """
        prompt_tok, output_tok = len(request.token_ids), request.max_output_tokens
        if prompt_tok > self._longest_input or prompt_tok + output_tok > self._longest:
            return (
                f"{prompt_tok} tokens of prompt and {output_tok} of output are more than the engine is set up for "
                f"(tensorrt.max_input_len {self._longest_input}, both together {self._longest})"
            )
        inputs = {"prompt_token_ids": list(request.token_ids)}
        try:
            parameters = self._parameters(request)
        except EngineRaised as raised:
            return _words_of(raised.error)
        try:
            return self._engine.generate_async(inputs, parameters, streaming=streaming)
        except FAILURES as error:
            return _words_of(error)

    def _note(self, part: Any, times_ns: list[int]) -> None:
        """Give each token that a part of an answer brought the time at which it is here: one, several, or none."""
        now_ns = self._clock()
        times_ns += [now_ns] * (len(part.outputs[0].token_ids) - len(times_ns))

    def _complete(self, request: TokenRequest, handed_ns: int, answer: Any, times_ns: list[int] | None) -> Completion:
        now_ns = self._clock()
        if isinstance(answer, str):
            return Completion(request.index, (), handed_ns, now_ns, error=answer)
        output = answer.outputs[0]
        started_ns, last_ns = _span(output, handed_ns, now_ns)
        finished_ns = last_ns if times_ns is None else times_ns[-1] if times_ns else now_ns
        is_good = output.finish_reason in GOOD_ENDS
        return Completion(
            request.index,
            tuple(output.token_ids),
            min(started_ns, finished_ns),
            finished_ns,
            None if times_ns is None else tuple(times_ns),
            error=None if is_good else f"TensorRT-LLM ended the request with {output.finish_reason!r}",
            padding_tok=0,
        )


def _words_of(error: BaseException) -> str:
    """What the engine says against one request.

    Raises:
        EngineRaised: it is about more than a request.
    """
    if isinstance(error, _REJECTIONS):
        return shortened(error)
    raise EngineRaised(error) from error


def _span(output: Any, handed_ns: int, now_ns: int) -> tuple[int, int]:
    """When the engine took a request up and had its last token.

    The engine's metrics count from the start of std::chrono::steady_clock, which is CLOCK_MONOTONIC on Linux. Values
    outside of the request's life are of another clock, and are not used.
    """
    timing = getattr(getattr(output, "request_perf_metrics", None), "timing_metrics", None)

    def read(name: str, otherwise_ns: int) -> int:
        value = getattr(timing, name, None)
        if not isinstance(value, timedelta):
            return otherwise_ns
        found_ns = (value // timedelta(microseconds=1)) * NS_PER_US
        # They are cut to microseconds.
        return max(found_ns, handed_ns) if handed_ns - NS_PER_US <= found_ns <= now_ns else otherwise_ns

    return read("first_scheduled_time", handed_ns), read("last_token_time", now_ns)
