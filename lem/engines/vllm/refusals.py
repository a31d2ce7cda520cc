"""What vLLM refuses, what its processes print, and what their failures mean."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lem.base.errors import EngineError, OptionRefused
from lem.base.units import KIB
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.config.problems import did_you_mean
from lem.engines.common import Refusal, refuse, shortened
from lem.engines.vllm.options import (
    ARGUMENTS,
    NESTED_ARGUMENTS,
    SAMPLING_OPTIONS,
    EngineFacts,
    extra_of,
    given_options,
    section_of,
)

# Arguments of the engine that an option outside the section decides.
_OWNED = MappingProxyType(
    {
        **{argument: f"vllm.{option}" for option, argument in ARGUMENTS.items()},
        "model": "model.name",
        "revision": "model.revision",
        "code_revision": "model.revision",
        "tokenizer": "model.tokenizer",
        "tokenizer_revision": "model.tokenizer",
        "trust_remote_code": "model.trust_remote_code",
        "dtype": "fp_precision",
        "seed": "random_seed",
        "device_ids": "gpus",
        "hf_token": "the secret HF_TOKEN",
        "attention_backend": "vllm.attention.backend",
        "spec_method": "vllm.speculative.method",
        "spec_model": "vllm.speculative.model",
        "spec_tokens": "vllm.speculative.num_tokens",
    }
)

_NO_TEXT = "one language model that generates tokens is measured"
_REFUSED = MappingProxyType(
    {
        "disable_log_stats": "the times of requests are among these statistics",
        "skip_tokenizer_init": "prompts are turned into tokens with the engine's tokenizer",
        "override_generation_config": "lem gives every sampling value itself",
        "max_num_queued_reqs": "requests that the engine turns away would be counted as failed",
        "max_num_queued_tokens": "requests that the engine turns away would be counted as failed",
        **dict.fromkeys(("runner", "convert", "task", "pooler_config"), _NO_TEXT),
    }
)
_DATA_PARALLEL = "several copies of the engine were not yet run with lem"
_SEVERAL = ("data_parallel_", "nnodes", "node_rank", "enable_elastic_ep")

_WHY_GONE = MappingProxyType(
    {"swap_space": "it has no swap space: a request that has to make room is computed again (the V1 engine)"}
)
_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def check_options(config: ExperimentConfig, facts: EngineFacts) -> None:
    """Refuse what cannot be honoured here, everything at once.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    refusals = [
        *_device(config, facts),
        *_unknown(config, facts),
        *_idle_on_cpu(config, facts),
        *_memory(config, facts),
        *_extra(config, facts),
    ]
    refuse(refusals, facts)


def _device(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    if config.gpus is None:
        return
    if config.gpus and facts.device == "cpu":
        yield Refusal("gpus", "this build runs on the CPU alone; name no GPU, or take a build for them")
    if not config.gpus and facts.device != "cpu":
        yield Refusal("gpus", f"this build runs on {facts.device} and not on the CPU, which [] asks for")


def _unknown(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    """Options whose argument this version does not have."""
    for name in given_options(config):
        if name in ARGUMENTS and ARGUMENTS[name] not in facts.arguments:
            yield Refusal(f"vllm.{name}", _WHY_GONE.get(name, f"EngineArgs has no {ARGUMENTS[name]}"))
        if name in NESTED_ARGUMENTS:
            outer, inner = NESTED_ARGUMENTS[name]
            if outer not in facts.arguments or inner not in facts.nested.get(outer, frozenset()):
                yield Refusal(f"vllm.{name}", f"EngineArgs has no {outer}.{inner}")


def _idle_on_cpu(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    """What vLLM takes on the CPU, and then does nothing with."""
    section = section_of(config)
    if facts.device != "cpu":
        return
    if section.cpu_offload_gb:
        yield Refusal("vllm.cpu_offload_gb", "the weights are in CPU memory already")
    backend = section.attention.backend
    if backend is not None and not backend.upper().startswith(("CPU_", "AMX_")):
        yield Refusal("vllm.attention.backend", f"{backend} needs a GPU; vLLM would use its own for the CPU instead")
    if section.attention.flash_version is not None:
        yield Refusal("vllm.attention.flash_version", "flash attention needs a GPU")


def _memory(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    section = section_of(config)
    if section.disable_custom_all_reduce is not None and _degree(section) == 1:
        yield Refusal("vllm.disable_custom_all_reduce", "there is nothing to reduce with tensor_parallel_size 1")
    if section.gpu_memory_utilization == VllmConfig().gpu_memory_utilization:
        return
    ruling = "extra.kv_cache_memory_bytes" if "kv_cache_memory_bytes" in section.extra else None
    if facts.device == "cpu" and facts.environment.get(_KV_CACHE_VARIABLE):
        ruling = f"the variable {_KV_CACHE_VARIABLE}"
    if ruling is not None:
        yield Refusal("vllm.gpu_memory_utilization", f"{ruling} decides on the size of the cache")


def _degree(section: VllmConfig) -> int:
    return section.tensor_parallel_size or 1


def _extra(config: ExperimentConfig, facts: EngineFacts) -> Iterator[Refusal]:
    taken = {NESTED_ARGUMENTS[name][0]: name for name in given_options(config) if name in NESTED_ARGUMENTS}
    for name in extra_of(config):
        reason = _reason_against(name, facts)
        if reason is None and name in taken:
            reason = f"stands beside vllm.{taken[name]}, which is a part of it; give all of it here or there"
        if reason is not None:
            yield Refusal(f"vllm.extra.{name}", reason)


def _reason_against(name: str, facts: EngineFacts) -> str | None:
    if name in _OWNED:
        return f"is set by {_OWNED[name]}"
    if name in _REFUSED:
        return _REFUSED[name]
    if name.startswith(_SEVERAL):
        return _DATA_PARALLEL
    if name in SAMPLING_OPTIONS:
        return f"is set by vllm.{name}"
    if name not in facts.arguments:
        usable = sorted(facts.arguments - _OWNED.keys() - _REFUSED.keys())
        return f"EngineArgs has no such field{did_you_mean(name, usable)}"
    return None


_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks|"
    r"less than desired (GPU|CPU)? ?memory utilization|can't allocate memory|"
    r"larger than the available KV cache memory|Cannot allocate memory|No space left on device.*shm",
    re.IGNORECASE,
)
_NO_SUCH_MODEL = re.compile(
    r"are not supported for now|Unsupported architecture|Unrecognized model|no `?architectures`?|"
    r"Cannot find any model weights|weights were not initialized|Unsupported CPU attention configuration|"
    r"does not appear to have a file named|Error while deserializing header|trust_remote_code",
    re.IGNORECASE,
)
# What vLLM says in the caller when the cause was printed by one of its processes.
_ELSEWHERE = re.compile(r"root cause above|stack trace \(above\)|See stack trace for root cause")
_PARAMETER = re.compile(r"parameter=(?P<name>\w+)")
_KILLED = re.compile(r"'(?P<name>[^']+)': -(?P<signal>\d+)")

# A line of a log: `(EngineCore pid=7) ERROR 11-20 08:27:10 [core.py:402] ValueError: words`, its prefixes optional.
_ERROR_LINE = re.compile(
    r"^(?:\([^)]*\)\s*)*(?:ERROR\s[^\]]*\]\s*)?"
    r"(?P<name>(?:\w+\.)*\w*(?:Error|Exception))(?:: (?P<words>.*))?$"
)
# What vLLM says no with; the same configuration brings these again.
_REFUSALS = frozenset({"AssertionError", "NotImplementedError", "ValidationError", "ValueError", "VLLMValidationError"})
# pydantic wraps the words of a check into a report on its input.
_WRAPPING = re.compile(r"^\d+ validation errors? for \w+\s+(Value error, )?|\s*\[type=\w+, input_value=.*$")
OPTION_OF_PARAMETER: Mapping[str, str] = MappingProxyType(
    {
        "temperature": "decoder.temperature",
        "top_p": "decoder.top_p",
        "top_k": "decoder.top_k",
        "repetition_penalty": "decoder.repetition_penalty",
        "min_p": "vllm.min_p",
        "logprobs": "vllm.logprobs",
        "logit_bias": "vllm.logit_bias",
        "lora": "model.adapter",
    }
)
_MEMORY_HINT = (
    "use a smaller model, a lower fp_precision or quantization, a shorter vllm.max_model_len, fewer max_num_seqs, or "
    "another vllm.gpu_memory_utilization; on the CPU VLLM_CPU_KVCACHE_SPACE (GiB) bounds the cache"
)


def explain_load_failure(
    error: BaseException, output: str, config: ExperimentConfig, facts: EngineFacts
) -> EngineError:
    """The error to raise when an engine could not be made.

    Args:
        output: what the engine's processes printed.
    """
    name, words = _cause(error, output)
    text = f"{name}: {words}" if words else name
    if _OUT_OF_MEMORY.search(f"{text} {output if _ELSEWHERE.search(str(error)) else ''}"):
        return _error(f"{facts}: out of memory while loading: {text}", _MEMORY_HINT, "out_of_memory")
    if killed := _KILLED.search(str(error)):
        process, signal = killed["name"], killed["signal"]
        hint = "signal 9 is what the kernel sends when memory runs out" if signal == "9" else ""
        return _error(
            f"{facts}: its process {process} was ended by signal {signal} while loading", hint, "engine", False
        )
    if _NO_SUCH_MODEL.search(text):
        hint = "is it a causal language model, whole, of a kind that this build of vLLM knows?"
        return _error(f"{facts} cannot load {config.model.name}: {text}", hint, "model")
    is_lasting = name in _REFUSALS
    changed = _options_behind(text, config)
    if is_lasting and changed:
        return OptionRefused(f"{facts} cannot load {config.model.name} with {changed}: {text}", "leave one of them out")
    return _error(f"{facts} cannot load {config.model.name}: {text}", "see the log", "engine", is_lasting)


def explain_request_failure(words: str, config: ExperimentConfig, facts: EngineFacts) -> OptionRefused:
    """The error to raise when vLLM takes no request under these options, with what it says about it."""
    words = shortened(words)
    named = _PARAMETER.search(words)
    told = named["name"] if named else words.lower()
    options = [option for word, option in OPTION_OF_PARAMETER.items() if word in told]
    listed = " or ".join(options) or _options_behind(words, config) or "these options"
    return OptionRefused(f"{facts} cannot honour {listed}: {words}", "change the value, or leave the option out")


def explain_run_failure(error: BaseException, output: str, facts: EngineFacts) -> EngineError:
    """The error to raise when the engine failed while it generated."""
    name, words = _cause(error, output)
    text = f"{name}: {words}" if words else name
    if _OUT_OF_MEMORY.search(text):
        return _error(f"{facts}: out of memory while generating: {text}", _MEMORY_HINT, "out_of_memory", False)
    return _error(f"{facts} failed while generating: {text}", "see the log", "engine", False)


def _error(message: str, hint: str, kind: str, is_permanent: bool = True) -> EngineError:
    return EngineError(message, hint, kind=kind, is_permanent=is_permanent)


def _cause(error: BaseException, output: str) -> tuple[str, str]:
    """Name and words of the error behind an error; from what was printed where the caller was told nothing."""
    name, words = type(error).__name__, str(error)
    if _ELSEWHERE.search(words):
        lines = (_ERROR_LINE.match(line.strip()) for line in output.splitlines())
        told = [line for line in lines if line is not None and not _ELSEWHERE.search(line["words"] or "")]
        if told:
            # The process that failed first tells the cause; those that waited for it fail after it.
            name, words = told[0]["name"].rpartition(".")[2], told[0]["words"] or ""
        elif name == "EngineDeadError":
            words = "its process ended without a word, as one does that the kernel kills for its memory"
    return name, shortened(_WRAPPING.sub("", " ".join(words.split())))


def _options_behind(words: str, config: ExperimentConfig) -> str:
    """The options that an error is about, going by their names in its words; else all that were given."""
    default = ExperimentConfig.from_dict({"model": config.model.name, "backend": "vllm"})
    plain = given_options(default)
    given = {**given_options(config), **{f"extra.{name}": value for name, value in extra_of(config).items()}}
    changed = {name: value for name, value in given.items() if plain.get(name) != value}
    told = _spaced(words)
    named = [name for name in changed if _spaced(name.rpartition(".")[2]) in told or _spaced(_argument(name)) in told]
    return ", ".join(f"vllm.{name}: {changed[name]}" for name in named or changed)


def _argument(option: str) -> str:
    return NESTED_ARGUMENTS[option][1] if option in NESTED_ARGUMENTS else ARGUMENTS.get(option, option)


def _spaced(words: str) -> str:
    return re.sub(r"[\W_]+", " ", words.lower())


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
        """The end of what was printed so far."""
        with self._lock:
            return self._tail.decode("utf-8", "replace")

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Meanwhile descriptors 1 and 2 lead here, so that new processes inherit them.

        What is written to them goes on to what descriptor 2 was. On leaving they are what they were, and all that was
        printed until then has been passed on.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        thread = threading.Thread(target=self._pass_on, args=(reader, os.dup(2)), name="engine output", daemon=True)
        thread.start()
        try:
            with _redirected(writer, saved):
                yield
        finally:
            self._drain(writer)
            for descriptor in (writer, *saved):
                os.close(descriptor)

    def _pass_on(self, reader: int, target: int) -> None:
        """Copy until the last process that can write is gone."""
        with contextlib.suppress(OSError):
            while True:
                select.select((reader,), (), ())
                # Whoever has the lock and finds the pipe empty knows that all of it is in the tail.
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
        """Wait until everything written so far was passed on."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with self._lock:
                if _pending(writer) == 0:
                    return
            time.sleep(_POLL_S)


def _pending(pipe: int) -> int:
    """Bytes in a pipe that nobody read yet."""
    answer = fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(answer, sys.byteorder)


@contextlib.contextmanager
def _redirected(writer: int, saved: list[int]) -> Iterator[None]:
    _flush()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
