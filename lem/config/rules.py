"""Rules across fields: combinations that are errors, and those that a person should know about.

Errors hold everywhere and are raised when an `ExperimentConfig` is made. Warnings are kept and shown; those about GPUs
need to know the GPUs and are silent without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lem.config.backend_config import BACKENDS, PyTorchConfig, TensorRTConfig, VllmConfig
from lem.config.problems import Path, Problem, dotted, nearest
from lem.measurement import is_estimate

if TYPE_CHECKING:
    from lem.config.experiment_config import DecoderConfig, ExperimentConfig, TrafficConfig

__all__ = ["Gpu", "RuleFinding", "check", "errors", "parameters_by_name"]

# FP8 tensor cores came with Ada (8.9); flash attention 2 and TensorRT-LLM need Ampere (8.0).
# https://developer.nvidia.com/cuda-gpus, the READMEs of flash-attention and TensorRT-LLM.
FP8_CAPABILITY = (8, 9)
AMPERE = (8, 0)

HIGH_MEMORY_UTILIZATION = 0.95
_PRE_QUANTIZED = ("awq", "gptq", "marlin", "int4_awq", "int4_gptq")
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_PARAMETERS_IN_NAME = re.compile(r"(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class RuleFinding:
    """What a rule found.

    Attributes:
        severity: `error` or `warning`.
        message: in words, with the option it is about.
        path: keys from the top of the experiment.
    """

    severity: str
    message: str
    path: Path

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}"


class Gpu(Protocol):
    """What rules ask of a GPU (`lem.meters.gpus.GpuFacts` has it)."""

    @property
    def index(self) -> int:
        """Its index."""

    @property
    def uuid(self) -> str:
        """`GPU-…`."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def memory_b(self) -> int:
        """Its memory in bytes."""

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor."""


def check(config: ExperimentConfig, gpus: Sequence[Gpu] | None = None) -> tuple[RuleFinding, ...]:
    """What the rules find about an experiment.

    Args:
        gpus: the GPUs of the host it will run on; None when unknown, () for a host that has none.
    """
    found = [RuleFinding("error", problem.message, problem.path) for problem in errors(config)]
    warnings = [*_warnings(config), *(_gpu_warnings(config, gpus) if gpus is not None else ())]
    return (*found, *(RuleFinding("warning", problem.message, problem.path) for problem in warnings))


def errors(config: ExperimentConfig) -> Iterator[Problem]:
    """Combinations that can never run, or never as written."""
    if config.min_output_tokens > config.max_output_tokens:
        yield Problem(
            ("min_output_tokens",), f"{config.min_output_tokens} is above max_output_tokens, {config.max_output_tokens}"
        )
    for backend in BACKENDS:
        if backend != config.backend and getattr(config, backend) is not None:
            yield Problem((backend,), f"has no effect: the backend is {config.backend}", is_about_key=True)
    warmup = config.warmup
    for name in ("window_size", "min_prompts"):
        if getattr(warmup, name) > warmup.max_prompts:
            yield Problem(("warmup", name), f"{getattr(warmup, name)} is above max_prompts, {warmup.max_prompts}")
    yield from _backend_errors(config)
    yield from _prompt_errors(config)
    yield from _measurement_errors(config)


def _backend_errors(config: ExperimentConfig) -> Iterator[Problem]:
    section = config.section
    if isinstance(section, TensorRTConfig):
        if config.fp_precision == "float32":
            yield Problem(("fp_precision",), "tensorrt needs float16 or bfloat16")
        if config.gpus == ():
            yield Problem(("gpus",), "tensorrt needs a GPU")
    if isinstance(section, PyTorchConfig):
        if config.gpus is not None and len(config.gpus) > 1:
            yield Problem(("gpus",), f"pytorch runs on one GPU, {len(config.gpus)} are named")
        if section.beam_search.enabled and (config.streaming or config.traffic_simulation.enabled):
            yield Problem(
                ("pytorch", "beam_search"), "cannot stand with streaming or traffic: beams have no token times"
            )
    degree = _parallel_degree(config)
    if config.gpus is not None and degree > max(len(config.gpus), 1):
        path = (config.backend, "tensor_parallel_size" if config.backend == "vllm" else "tp_size")
        yield Problem(path, f"{degree} GPUs are needed, {len(config.gpus)} named in gpus")


def _measurement_errors(config: ExperimentConfig) -> Iterator[Problem]:
    """What is asked of the meters and contradicts something else that is."""
    measurement = config.measurement
    if measurement.phases and config.traffic_simulation.enabled:
        yield Problem(
            ("measurement", "phases"), "needs a closed batch: under traffic prefill and decode run at the same time"
        )
    if measurement.energy == "none":
        demands = {("measurement", "phases"): measurement.phases, ("baseline", "required"): config.baseline.required}
        for path in (path for path, is_demanded in demands.items() if is_demanded):
            yield Problem(path, "needs energy, and measurement.energy is none")
    if config.baseline.required and not config.baseline.enabled:
        yield Problem(("baseline", "required"), "needs baseline.enabled")
    if measurement.cpu_tdp_w is not None and not is_estimate(measurement.energy):
        yield Problem(("measurement", "cpu_tdp_w"), f"has no effect with measurement.energy: {measurement.energy}")


def _prompt_errors(config: ExperimentConfig) -> Iterator[Problem]:
    prompts = config.prompts
    if prompts is not None and config.dataset is not None:
        yield Problem(("prompts",), "stands beside dataset: one of them is the source of prompts", is_about_key=True)
    for name, limit_name in (("input_tokens", "max_input_tokens"), ("output_tokens", "max_output_tokens")):
        wanted, limit = getattr(prompts, name, None), getattr(config, limit_name)
        if wanted is not None and wanted > limit:
            yield Problem(("prompts", name), f"{wanted} is above {limit_name}, {limit}")


def _parallel_degree(config: ExperimentConfig) -> int:
    """The GPUs that one copy of the model is spread over."""
    section = config.section
    if isinstance(section, VllmConfig):
        return (section.tensor_parallel_size or 1) * (section.pipeline_parallel_size or 1)
    if isinstance(section, TensorRTConfig):
        return (section.tp_size or 1) * (section.pp_size or 1)
    return section.parallelism_degree or 1


def parameters_by_name(name: str) -> float | None:
    """The number of weights a model's name tells ("Llama-3.1-8B": 8e9); None when it tells none."""
    found = _PARAMETERS_IN_NAME.findall(name.rpartition("/")[2])
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * (1e9 if unit in "bB" else 1e6)


def _warnings(config: ExperimentConfig) -> Iterator[Problem]:
    yield from _sampling_warnings(config.decoder)
    yield from _traffic_warnings(config.traffic_simulation)
    yield from _engine_warnings(config)
    degree = _parallel_degree(config)
    if degree > 1:
        yield Problem((config.backend,), f"needs {degree} GPUs")
    dataset = config.dataset
    if dataset is not None and "/" not in dataset.name:
        from lem.config.experiment_config import DATASET_ALIASES

        near = nearest(dataset.name, list(DATASET_ALIASES))
        if near is not None and dataset.name not in DATASET_ALIASES:
            yield Problem(("dataset", "name"), f"{dataset.name!r} is no alias of a dataset; {near} is")


def _sampling_warnings(decoder: DecoderConfig) -> Iterator[Problem]:
    if decoder.is_greedy:
        ignored = [
            name
            for name, idle in (("temperature", (0, 1)), ("top_k", (0, 50)), ("top_p", (1,)))
            if getattr(decoder, name) not in idle
        ]
        if ignored:
            have = "has" if len(ignored) == 1 else "have"
            yield Problem(("decoder", ignored[0]), f"{' and '.join(ignored)} {have} no effect under greedy decoding")
    elif decoder.temperature != 1 and decoder.top_p != 1:
        yield Problem(
            ("decoder", "top_p"), "temperature and top_p are both set; vary one of them, since their effects compound"
        )


def _traffic_warnings(traffic: TrafficConfig) -> Iterator[Problem]:
    """What was set for the other kind of traffic; an experiment whose mode is an axis of a grid may have both."""
    if traffic.enabled:
        unused = {"target_qps": 1.0, "seed": None} if traffic.mode == "closed" else {"concurrency": 1}
        for name, default in unused.items():
            if getattr(traffic, name) != default:
                yield Problem(("traffic_simulation", name), f"has no effect with mode: {traffic.mode}")


def _engine_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    section = config.section
    if isinstance(section, PyTorchConfig):
        if section.cache_implementation == "static":
            yield Problem(
                ("pytorch", "cache_implementation"),
                "a static cache is sized for the longest sequence and costs its memory and a compilation first",
            )
        if section.batching_strategy.endswith("dynamic") and section.batch_size == 1:
            yield Problem(("pytorch", "batch_size"), "1 leaves a dynamic batch nothing to put together; raise it")
        return
    if section.gpu_memory_utilization > HIGH_MEMORY_UTILIZATION:
        yield Problem(
            (config.backend, "gpu_memory_utilization"),
            f"{section.gpu_memory_utilization:g} leaves little room on the GPU; out of memory is likely",
        )
    caching = "enable_prefix_caching" if isinstance(section, VllmConfig) else "enable_kv_cache_reuse"
    if getattr(section, caching) and config.measurement.min_window_sec > 0:
        yield Problem(
            (config.backend, caching),
            "prompts are repeated until the window is long enough, and repeats are then served from the cache",
        )
    quantization = section.quantization or ""
    if quantization.startswith(_PRE_QUANTIZED) and not any(
        word in config.model.name.lower() for word in ("awq", "gptq", "int4", "4bit", "w4a16")
    ):
        yield Problem(
            (config.backend, "quantization"), f"{quantization} needs a checkpoint that was quantized so beforehand"
        )


def _gpu_warnings(config: ExperimentConfig, gpus: Sequence[Gpu]) -> Iterator[Problem]:
    used = _used_gpus(config, gpus)
    if not used:
        return
    degree = _parallel_degree(config)
    if degree > len(gpus):
        yield Problem((config.backend,), f"needs {degree} GPUs, this host has {len(gpus)}")
    for path, needed, what in _capabilities_needed(config):
        for gpu in used:
            if gpu.compute_capability < needed:
                found = _version(gpu.compute_capability)
                yield Problem(path, f"{what} needs compute capability {_version(needed)}, {gpu.name} has {found}")
                break
    yield from _memory_warning(config, used)


def _used_gpus(config: ExperimentConfig, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    if config.gpus is None:
        return tuple(gpus[: _parallel_degree(config)])
    return tuple(gpu for gpu in gpus if any(_names(name, gpu) for name in config.gpus))


def _names(name: str, gpu: Gpu) -> bool:
    """Whether a GPU is meant: by its index, or its UUID, also shortened as CUDA takes it."""
    return name == str(gpu.index) or (not name.isdecimal() and gpu.uuid.lower().startswith(name.lower()))


def _capabilities_needed(config: ExperimentConfig) -> Iterator[tuple[Path, tuple[int, int], str]]:
    section = config.section
    if isinstance(section, PyTorchConfig):
        if section.attn_implementation == "flash_attention_2":
            yield ("pytorch", "attn_implementation"), AMPERE, "flash attention 2"
        return
    if isinstance(section, TensorRTConfig):
        yield ("backend",), AMPERE, "TensorRT-LLM"
    elif "FLASH_ATTN" in (section.attention.backend or "").upper() or section.attention.flash_version is not None:
        yield ("vllm", "attention"), AMPERE, "flash attention"
    cache = "kv_cache_dtype" if isinstance(section, VllmConfig) else "kv_cache_type"
    for name in ("quantization", cache):
        if (getattr(section, name) or "").startswith("fp8"):
            yield (config.backend, name), FP8_CAPABILITY, "fp8"


def _memory_warning(config: ExperimentConfig, used: Sequence[Gpu]) -> Iterator[Problem]:
    parameters = parameters_by_name(config.model.name)
    if parameters is None:
        return
    needed_b = parameters * _bytes_per_weight(config)
    share = getattr(config.section, "gpu_memory_utilization", 1.0)
    memory_b = sum(gpu.memory_b for gpu in used) * share
    if needed_b > memory_b:
        yield Problem(
            ("model", "name"),
            f"{parameters / 1e9:.3g} billion weights take {needed_b / 1e9:.3g} GB, going by its name; "
            f"{used[0].name} offers {memory_b / 1e9:.3g} GB",
        )


def _bytes_per_weight(config: ExperimentConfig) -> float:
    section = config.section
    plain = _BYTES_PER_WEIGHT[config.fp_precision]
    if isinstance(section, PyTorchConfig):
        return 0.5 if section.load_in_4bit else 1.0 if section.load_in_8bit else plain
    quantization = section.quantization or "none"
    if quantization == "none":
        return plain
    return 1.0 if quantization.startswith(("fp8", "int8")) else 0.5


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
