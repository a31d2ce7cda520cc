"""What a failure of vLLM means: which option, which model, or too little memory, and whether it would come again.

Nothing here imports an engine: an error is known by its name and words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from lem.backends.refusals import shortened
from lem.backends.vllm_options import ARGUMENTS, NESTED_ARGUMENTS, EngineFacts, extra_of, given_options
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError, OptionRefused

__all__ = ["OPTION_OF_PARAMETER", "explain_load_failure", "explain_request_failure", "explain_run_failure"]

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
