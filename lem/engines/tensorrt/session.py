"""A loaded TensorRT-LLM and the experiments that run on it, one after another. Imports TensorRT-LLM and torch."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import tensorrt_llm
import torch
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import DraftTargetDecodingConfig, KvCacheConfig, TorchLlmArgs

from lem.base.dataclass import dataclass
from lem.base.errors import REPEATING, EngineError, OptionRefused
from lem.base.units import NS_PER_US
from lem.base.variables import GPU_VARIABLE, TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.checkpoints import fetch_all, identify
from lem.engines.common import ENGINE_FAILURES, GOOD_ENDS, TAKE_LIMIT, EngineRaised, engine_call, shortened
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest
from lem.engines.tensorrt import options
from lem.engines.tensorrt.options import EngineFacts
from lem.engines.texts import TextSession

_PENALTIES = "tensorrt_llm._torch.pyexecutor.sampler.penalties"
_PACKAGES = ("flashinfer-python", "huggingface-hub", "nvidia-modelopt", "tensorrt", "tensorrt-llm", "transformers")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "cudaerrormemoryallocation")
# What `generate_async` and its results raise about one request: RequestError is a RuntimeError.
_REJECTIONS = (RuntimeError, TypeError, ValueError)

# The configurations among the arguments of LLM.
_CONFIGURATIONS: Mapping[str, Any] = {"kv_cache_config": KvCacheConfig, "speculative_config": DraftTargetDecodingConfig}

FindGpus = Callable[[], tuple[str, ...]]


class Session(common.ServedSession, TextSession):
    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str], find_gpus: FindGpus | None = None) -> None:
        self._facts, self._config = _find_facts(), config
        options.check(config, self._facts)
        self._engine_key = config.engine_key()
        self._engine: Any = None  # LLM
        self._restore_gpus = contextlib.ExitStack()
        self._uuids = self._restore_gpus.enter_context(_visible_gpus(config, find_gpus))
        try:
            token = secrets.get(TOKEN_VARIABLE) or None
            source, _no_adapter, folders = fetch_all(config, token, check=self._check_checkpoint)
            arguments = options.engine_arguments(config, self._facts, folders)
            with common.raised_as(self._load_failure), engine_call():
                made = {name: kind(**arguments[name]) for name, kind in _CONFIGURATIONS.items() if name in arguments}
                self._engine = LLM(**{**arguments, **made})
            began_ns = time.monotonic_ns()
            options.refuse_differences(config, self._engine.args, self._facts)
            self._set_up(config)
            self._identity = identify(source)
            # TensorRT-LLM wraps the tokenizer of transformers, and leaves out some of its functions.
            self._tokenizer = getattr(self._engine.tokenizer, "tokenizer", self._engine.tokenizer)
            self._known_ids = options.vocabulary_of(options.documents_of(source.folder))
        except BaseException:
            self.close()
            raise
        self._checks_s = common.seconds_since(began_ns)

    def _check_checkpoint(self, folder: Path) -> None:
        options.check_checkpoint(self._config, options.documents_of(folder), self._facts)

    @property
    def report(self) -> EngineReport:
        return EngineReport(
            engine_name="tensorrt_llm",
            engine_version=self._facts.version,
            versions=common.installed_versions(torch, _PACKAGES, has_gpu=True),
            device="cuda",
            gpu_uuids=self._uuids,
            effective=options.describe_effective(self._config, self._engine.args),
            **vars(self._identity),
            warnings=options.idle_options(self._config),
            checks_s=self._checks_s,
            longest_tok=self._runner.longest,
        )

    def close(self) -> None:
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.shutdown()
        finally:
            self._restore_gpus.close()
        del engine
        gc.collect()

    def _set_up(self, config: ExperimentConfig) -> None:
        options.check(config, self._facts)
        self._config = config
        settings = options.sampling_settings(config)

        def parameters(request: TokenRequest) -> Any:
            bounds = {"max_tokens": request.max_output_tokens}
            if request.min_output_tokens:
                bounds["min_tokens"] = request.min_output_tokens
            with engine_call():
                return SamplingParams(**settings, **bounds)

        longest_input, longest_output = config.engine_lengths().values()
        self._runner = Server(self._engine, parameters, longest_input, longest_input + longest_output)
        self._try_out(longest_output)

    def _load_failure(self, error: BaseException) -> EngineError:
        text = f"{type(error).__name__}: {shortened(error)}"
        if isinstance(error, MemoryError) or any(mark in text.lower().replace("_", "") for mark in _OUT_OF_MEMORY):
            hint = "use a smaller model, a quantized checkpoint, shorter lengths, or a lower tensorrt.max_batch_size"
            return common.out_of_memory(f"{self._facts}: out of memory while loading: {text}", hint)
        what = f"{self._facts} cannot load {self._config.model.name}"
        if isinstance(error, (TypeError, ValueError)):
            return OptionRefused(f"{what} with these options: {text}")
        return EngineError(f"{what}: {text}", "see the log", is_permanent=isinstance(error, REPEATING))

    def _run_failure(self, error: BaseException) -> EngineError:
        what = f"{self._facts} failed while generating: {type(error).__name__}: {shortened(error)}"
        return EngineError(what, "see the log", is_permanent=isinstance(error, REPEATING))

    def _rejection(self, text: str) -> EngineError:
        return OptionRefused(f"{self._facts} rejects the requests of this experiment: {text}")


def _find_facts() -> EngineFacts:
    version = str(tensorrt_llm.__version__)
    if int(version.split(".")[0]) < 1:
        what = f"TensorRT-LLM {version} builds engines; lem uses the PyTorch flow, which is the default since 1.0"
        raise EngineError(what, "use a newer image", is_permanent=True)
    try:
        has_penalties = importlib.util.find_spec(_PENALTIES) is not None
    except ModuleNotFoundError:
        has_penalties = False
    return EngineFacts(
        version=version,
        arguments=common.field_names(TorchLlmArgs),
        nested={name: common.field_names(kind) for name, kind in _CONFIGURATIONS.items()},
        sampling_arguments=common.field_names(SamplingParams),
        has_penalties=has_penalties,
    )


@contextlib.contextmanager
def _visible_gpus(config: ExperimentConfig, find_gpus: FindGpus | None) -> Iterator[tuple[str, ...]]:
    """The UUIDs of the GPUs in use; the environment decides what the engine and its processes see."""
    before = visible = os.environ.get(GPU_VARIABLE)
    if config.gpus:
        seen = before.split(",") if before else []
        names = [seen[int(name)] if name.isdecimal() and int(name) < len(seen) else name for name in config.gpus]
        visible = ",".join(names)
    if torch.cuda.is_initialized() and visible != before:
        raise EngineError(f"gpus: CUDA was already initialized with other GPUs than {visible}")
    with common.environment(GPU_VARIABLE, visible):
        found = common.visible_gpus(torch) if find_gpus is None else find_gpus()
        if not found:
            raise OptionRefused("TensorRT-LLM requires a GPU, and none is visible")
        if config.gpus and len(found) < len(config.gpus):
            # CUDA hides the first name that does not exist, and all names after it.
            raise OptionRefused(f"gpus: {config.gpus[len(found)]} not found")
        needed = options.gpus_needed(config)
        if needed > len(found):
            what = f"the model needs {needed} GPUs, but {len(found)} are visible"
            raise OptionRefused(f"tensorrt.tp_size: {what}", "change tensorrt.tp_size, pp_size or gpus")
        yield found[:needed]


# --- requests


@dataclass(frozen=True)
class Server:
    engine: Any  # TensorRT-LLM's LLM; only `generate_async` is used
    parameters: Callable[[TokenRequest], Any]  # the SamplingParams; EngineRaised if the engine rejects them
    longest_input: int  # the most tokens of a prompt
    longest: int  # of prompt and output together
    clock: Callable[[], int] = time.monotonic_ns

    def run_closed(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, all submitted at once: the two calls that `LLM.generate` makes for each."""
        submitted = [(request, self.clock(), self._submit(request, streaming=False)) for request in requests]
        completions = []
        for request, submitted_ns, answer in submitted:
            if not isinstance(answer, str):
                try:
                    answer = answer.result()
                except ENGINE_FAILURES as error:
                    answer = _message_of(error)
            completions.append(self._complete(request, submitted_ns, answer, None))
            on_progress(len(completions))
        return completions

    def run_alone(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        async def run() -> list[Completion]:
            completions = []
            for request in requests:
                completions.append(await self._answer(request))
                on_progress(len(completions))
            return completions

        return asyncio.run(run())

    def serve(self, queue: RequestQueue) -> None:
        asyncio.run(self._serve(queue))

    async def _serve(self, queue: RequestQueue) -> None:
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Sequence[TokenRequest] | BaseException | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()

        async def answer(request: TokenRequest) -> None:
            queue.complete(await self._answer(request))

        def settle(task: asyncio.Task[None]) -> None:
            if task.cancelled() or (error := task.exception()) is None:
                tasks.discard(task)
            else:
                arrivals.put_nowait(error)

        def collect_arrivals() -> None:
            found: Sequence[TokenRequest] | Exception | None = ()
            while isinstance(found, Sequence):
                try:
                    found = queue.take(TAKE_LIMIT) or None
                except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
                    found = error
                with contextlib.suppress(RuntimeError):  # serving has failed, and its loop is closed
                    loop.call_soon_threadsafe(arrivals.put_nowait, found)

        threading.Thread(target=collect_arrivals, name="requests", daemon=True).start()
        while isinstance(arrived := await arrivals.get(), Sequence):
            for request in arrived:
                task = asyncio.create_task(answer(request))
                tasks.add(task)
                task.add_done_callback(settle)
        if arrived is not None:
            raise arrived
        await asyncio.gather(*tasks)

    async def _answer(self, request: TokenRequest) -> Completion:
        submitted_ns, answer = self.clock(), self._submit(request, streaming=True)
        times_ns: list[int] = []
        parts = None if isinstance(answer, str) else aiter(answer)
        while parts is not None:
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                break
            except ENGINE_FAILURES as error:
                answer = _message_of(error)
                break
            now_ns = self.clock()
            # A part may bring one new token, several, or none.
            times_ns += [now_ns] * (len(part.outputs[0].token_ids) - len(times_ns))
        return self._complete(request, submitted_ns, answer, times_ns)

    def _submit(self, request: TokenRequest, *, streaming: bool) -> Any:
        prompt_tok, output_tok = len(request.token_ids), request.max_output_tokens
        if prompt_tok > self.longest_input or prompt_tok + output_tok > self.longest:
            limits = f"(tensorrt.max_input_len {self.longest_input}, {self.longest} in total)"
            return f"{prompt_tok} prompt tokens and {output_tok} output tokens exceed the limits of the engine {limits}"
        inputs = {"prompt_token_ids": list(request.token_ids)}
        try:
            parameters = self.parameters(request)
            with engine_call():
                return self.engine.generate_async(inputs, parameters, streaming=streaming)
        except EngineRaised as raised:
            return _message_of(raised.error)

    def _complete(
        self, request: TokenRequest, submitted_ns: int, answer: Any, times_ns: list[int] | None
    ) -> Completion:
        now_ns = self.clock()
        if isinstance(answer, str):
            return Completion(request.index, (), submitted_ns, now_ns, error=answer)
        output = answer.outputs[0]
        started_ns, last_ns = _span(output, submitted_ns, now_ns)
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


def _message_of(error: BaseException) -> str:
    if isinstance(error, _REJECTIONS):
        return shortened(error)
    raise EngineRaised(error) from error


def _span(output: Any, submitted_ns: int, now_ns: int) -> tuple[int, int]:
    """When the engine started a request and had its last token."""
    # The engine's metrics count from the start of std::chrono::steady_clock, which is CLOCK_MONOTONIC on Linux. Values
    # outside of the request's life are of another clock and ignored.
    timing = getattr(getattr(output, "request_perf_metrics", None), "timing_metrics", None)

    def read(name: str, otherwise_ns: int) -> int:
        value = getattr(timing, name, None)
        if not isinstance(value, timedelta):
            return otherwise_ns
        found_ns = (value // timedelta(microseconds=1)) * NS_PER_US
        # They are truncated to microseconds.
        return max(found_ns, submitted_ns) if submitted_ns - NS_PER_US <= found_ns <= now_ns else otherwise_ns

    return read("first_scheduled_time", submitted_ns), read("last_token_time", now_ns)
