"""A loaded TensorRT-LLM and the experiments that run on it, one after another. Imports TensorRT-LLM and torch."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorrt_llm
import torch
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import DraftTargetDecodingConfig, KvCacheConfig, TorchLlmArgs

from lem.base.errors import EngineError, OptionRefused
from lem.base.variables import GPU_VARIABLE, TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import WEIGHTS, Source, fetch, identify
from lem.engines.common import (
    TRIAL_TOKENS,
    EngineRaised,
    ServedSession,
    check_ids,
    check_same_engine,
    installed_versions,
    seconds_since,
    shortened,
    visible_gpus,
)
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.engines.tensorrt.loading import FAILURES, Server, check_checkpoint, documents_of, vocabulary_of
from lem.engines.tensorrt.options import (
    EngineFacts,
    cache_arguments,
    check_options,
    describe_effective,
    draft_arguments,
    engine_arguments,
    gpus_needed,
    idle_options,
    lengths_of,
    refuse_differences,
    sampling_settings,
    section_of,
)

_PENALTIES = "tensorrt_llm._torch.pyexecutor.sampler.penalties"
_PACKAGES = ("flashinfer-python", "huggingface-hub", "nvidia-modelopt", "tensorrt", "tensorrt-llm", "transformers")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "cudaerrormemoryallocation")
_REFUSALS = (TypeError, ValueError)

FindGpus = Callable[[], tuple[str, ...]]


class Session(ServedSession):
    """A loaded engine with the experiment that is set up on it."""

    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str], find_gpus: FindGpus | None = None) -> None:
        """Load.

        Args:
            find_gpus: the UUIDs of the GPUs that CUDA sees, in its order; by default as PyTorch tells.

        Raises:
            OptionRefused, EngineError: as for `Engine`.
        """
        self._facts = find_facts()
        check_options(config, self._facts)
        self._engine_key = config.engine_key()
        self._restore_gpus = contextlib.ExitStack()
        self._uuids = self._restore_gpus.enter_context(_visible_gpus(config, find_gpus or _find_gpus))
        try:
            self._source, self._engine = _load(config, self._facts, secrets.get(TOKEN_VARIABLE) or None)
        except BaseException:
            self._restore_gpus.close()
            raise
        began_ns = time.monotonic_ns()
        try:
            refuse_differences(config, self._engine.args, self._facts)
            self._set_up(config)
            self._identity = identify(self._source)
            self._vocabulary = vocabulary_of(documents_of(self._source.folder))
        except BaseException:
            self.close()
            raise
        self._checks_s = seconds_since(began_ns)

    def configure(self, config: ExperimentConfig) -> None:
        """Set another experiment up on the same engine.

        Raises:
            OptionRefused: as for `Engine`.
        """
        check_same_engine(config, self._engine_key)
        check_options(config, self._facts)
        self._set_up(config)

    @property
    def report(self) -> EngineReport:
        """What is loaded and in effect."""
        return EngineReport(
            engine_name="tensorrt_llm",
            engine_version=self._facts.version,
            versions=_find_versions(),
            device="cuda",
            gpu_uuids=self._uuids,
            effective=describe_effective(self._config, self._engine.args, sampling_settings(self._config)),
            model_revision=self._source.commit,
            weights_sha256=self._identity.weights_sha256,
            model_parameters=self._identity.parameters,
            embedding_parameters=self._identity.embedding_parameters,
            warnings=idle_options(self._config),
            checks_s=self._checks_s,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them, special ones included."""
        ids = list(self._engine.tokenizer.encode(text))
        return ids if self._vocabulary is None else check_ids(ids, self._vocabulary)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special ones left out."""
        return str(self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """A completion for each request."""
        run = self._server.run_alone if observe_tokens else self._server.run_closed
        with self._explained():
            return run(requests, on_progress)

    def serve(self, queue: RequestQueue) -> None:
        """Work the queue off; requests join the running batch as they arrive."""
        with self._explained():
            self._server.serve(queue)

    def close(self) -> None:
        """End the engine and its processes."""
        engine, self._engine = self._engine, None
        try:
            engine.shutdown()
        finally:
            self._restore_gpus.close()
        del engine
        gc.collect()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises what a failure of the engine means."""
        try:
            yield
        except EngineRaised as raised:
            words = f"{type(raised.error).__name__}: {shortened(raised.error)}"
            raise EngineError(f"{self._facts} failed while generating: {words}", "see the log") from raised

    def _set_up(self, config: ExperimentConfig) -> None:
        self._config = config
        settings = sampling_settings(config)

        def parameters(request: TokenRequest) -> Any:
            bounds = {"max_tokens": request.max_output_tokens}
            if request.min_output_tokens:
                bounds["min_tokens"] = request.min_output_tokens
            try:
                return SamplingParams(**settings, **bounds)
            except FAILURES as error:
                raise EngineRaised(error) from error

        longest_input, longest_output = lengths_of(config)
        self._server = Server(self._engine, parameters, longest=(longest_input, longest_input + longest_output))
        self._try_out()

    def _try_out(self) -> None:
        """A few tokens for one request: what the engine has against an option it says to a request."""
        output_tok = min(TRIAL_TOKENS, lengths_of(self._config)[1])
        try:
            (tried,) = self._server.run_closed((TokenRequest(0, (1,), output_tok, output_tok),), say_nothing)
        except EngineRaised as raised:
            raise _explain(raised.error, self._config, self._facts) from raised
        if tried.error is not None:
            raise OptionRefused(f"{self._facts} takes no request of this experiment: {tried.error}")


def _load(config: ExperimentConfig, facts: EngineFacts, token: str | None) -> tuple[Source, Any]:
    """Where the model lies, and the engine."""
    model, drafter = config.model, section_of(config).draft_model
    source = fetch(model.name, marker="config.json", option="model", revision=model.revision, token=token)
    check_checkpoint(config, documents_of(source.folder), facts)
    tokenizer = _fetch_tokenizer(model.tokenizer, token)
    arguments = engine_arguments(config, str(source.folder), tokenizer, facts)
    if drafter is not None:
        drafter = str(fetch(drafter, marker="config.json", option="tensorrt.draft_model", token=token).folder)
    cache = cache_arguments(config)
    draft = None if drafter is None else draft_arguments(config, drafter, facts)
    try:
        arguments["kv_cache_config"] = KvCacheConfig(**cache)
        if draft is not None:
            arguments["speculative_config"] = DraftTargetDecodingConfig(**draft)
        engine = LLM(**arguments)
    except FAILURES as error:
        raise _explain(error, config, facts) from error
    return source, engine


def _fetch_tokenizer(name: str | None, token: str | None) -> str | None:
    if name is None:
        return None
    marker, option = "tokenizer_config.json", "model.tokenizer"
    return str(fetch(name, marker=marker, option=option, token=token, ignored=WEIGHTS).folder)


def find_facts() -> EngineFacts:
    """What this installation of TensorRT-LLM can do.

    Raises:
        EngineError: it is from before the PyTorch flow was the default.
    """
    version = str(tensorrt_llm.__version__)
    if int(version.split(".")[0]) < 1:
        raise EngineError(
            f"TensorRT-LLM {version} builds engines; lem uses the PyTorch flow, which is the default since 1.0",
            "take a newer image",
            is_permanent=True,
        )
    return EngineFacts(
        version=version,
        arguments=_fields(TorchLlmArgs),
        cache_arguments=_fields(KvCacheConfig),
        draft_arguments=_fields(DraftTargetDecodingConfig),
        sampling_arguments=_fields(SamplingParams),
        has_penalties=_has_module(_PENALTIES),
    )


def _fields(found: Any) -> frozenset[str]:
    """The fields of a pydantic model or a dataclass."""
    names = getattr(found, "model_fields", None)
    return frozenset(names if names is not None else (item.name for item in dataclasses.fields(found)))


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _find_gpus() -> tuple[str, ...]:
    return visible_gpus(torch)


@contextlib.contextmanager
def _visible_gpus(config: ExperimentConfig, find_gpus: FindGpus) -> Iterator[tuple[str, ...]]:
    """The UUIDs of the GPUs in use; what the engine and its processes see is set by the environment.

    Raises:
        EngineError: kind `option`, a GPU is named that is not there; no GPU; or CUDA was started before.
    """
    before = os.environ.get(GPU_VARIABLE)
    wanted = before
    if config.gpus:
        seen = before.split(",") if before else None
        names = [
            seen[int(name)] if seen and name.isdecimal() and int(name) < len(seen) else name for name in config.gpus
        ]
        wanted = ",".join(names)
    if torch.cuda.is_initialized() and wanted != before:
        raise EngineError(f"gpus: this process has started CUDA already, seeing others than {wanted}")
    try:
        if wanted is not None:
            os.environ[GPU_VARIABLE] = wanted
        found = find_gpus()
        if not found:
            raise EngineError("TensorRT-LLM needs a GPU, and none is to be seen", is_permanent=True, kind="option")
        if config.gpus and len(found) < len(config.gpus):
            # CUDA hides a name that stands for nothing, and all behind it.
            missing = config.gpus[len(found)]
            raise EngineError(f"gpus: {missing} is not there", is_permanent=True, kind="option")
        needed = gpus_needed(config)
        if needed > len(found):
            what = f"the model is to be spread over {needed} GPUs, and {len(found)} can be seen"
            hint = "change tensorrt.tp_size, pp_size or gpus"
            raise EngineError(f"tensorrt.tp_size: {what}", hint, is_permanent=True, kind="option")
        yield found[:needed]
    finally:
        if before is None:
            os.environ.pop(GPU_VARIABLE, None)
        else:
            os.environ[GPU_VARIABLE] = before


def _find_versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "cuda": str(torch.version.cuda), **installed_versions(_PACKAGES)}


def _explain(error: BaseException, config: ExperimentConfig, facts: EngineFacts) -> EngineError:
    words = f"{type(error).__name__}: {shortened(error)}"
    if isinstance(error, MemoryError) or any(mark in words.lower().replace("_", "") for mark in _OUT_OF_MEMORY):
        hint = "use a smaller model, a quantized checkpoint, shorter lengths, or a lower tensorrt.max_batch_size"
        return EngineError(
            f"{facts}: out of memory while loading: {words}", hint, kind="out_of_memory", is_permanent=True
        )
    if isinstance(error, _REFUSALS):
        return OptionRefused(f"{facts} cannot load {config.model.name} with these options: {words}")
    return EngineError(f"{facts} cannot load {config.model.name}: {words}", "see the log")
