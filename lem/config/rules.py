"""Rules across fields: combinations that are errors, and those that a person should know about.

Errors hold everywhere and are raised when an `ExperimentConfig` is made. Warnings are kept and shown; those about GPUs
need to know the GPUs and are silent without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lem.base.measurement import is_estimate
from lem.base.reasons import Reason
from lem.config.backends import BACKENDS, PyTorchConfig, TensorRTConfig, VllmConfig
from lem.config.problems import Path, Problem, dotted, nearest

if TYPE_CHECKING:
    from lem.config.experiment import DecoderConfig, ExperimentConfig, TrafficConfig


# FP8 tensor cores came with Ada (8.9); flash attention 2 and TensorRT-LLM need Ampere (8.0).
# https://developer.nvidia.com/cuda-gpus, the READMEs of flash-attention and TensorRT-LLM.
FP8_CAPABILITY = (8, 9)
AMPERE = (8, 0)

HIGH_MEMORY_UTILIZATION = 0.95
_PRE_QUANTIZED = ("awq", "gptq", "marlin", "int4_awq", "int4_gptq")
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Where the key itself is wrong, not its value.
_ABOUT_KEYS = frozenset({"other_backend", "two_prompt_sources"})
_PARAMETERS_IN_NAME = re.compile(r"(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


Found = Iterator[tuple[Path, Reason]]


@dataclass(frozen=True)
class RuleFinding:
    """What a rule found.

    Attributes:
        severity: `error` or `warning`.
        path: keys from the top of the experiment, to the option it is about.
    """

    severity: str
    reason: Reason
    path: Path

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.reason}"


class Gpu(Protocol):
    """What rules ask of a GPU (`lem.meters.nvml.GpuFacts` has it)."""

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
    found = [RuleFinding("error", reason, path) for path, reason in _errors(config)]
    warnings = [*_warnings(config), *(_gpu_warnings(config, gpus) if gpus is not None else ())]
    return (*found, *(RuleFinding("warning", reason, path) for path, reason in warnings))


def errors(config: ExperimentConfig) -> Iterator[Problem]:
    """Combinations that can never run, or never as written."""
    for path, reason in _errors(config):
        yield Problem.of(path, reason, is_about_key=reason.code in _ABOUT_KEYS)


def _errors(config: ExperimentConfig) -> Found:
    if config.min_output_tokens > config.max_output_tokens:
        yield ("min_output_tokens",), _above(config.min_output_tokens, "max_output_tokens", config.max_output_tokens)
    for backend in BACKENDS:
        if backend != config.backend and getattr(config, backend) is not None:
            yield (backend,), Reason.of("other_backend", backend=config.backend)
    warmup = config.warmup
    for name in ("window_size", "min_prompts"):
        if getattr(warmup, name) > warmup.max_prompts:
            yield ("warmup", name), _above(getattr(warmup, name), "max_prompts", warmup.max_prompts)
    yield from _backend_errors(config)
    yield from _prompt_errors(config)
    yield from _measurement_errors(config)


def _above(value: int, limit_name: str, limit: int) -> Reason:
    return Reason.of("above_limit", value=value, limit_name=limit_name, limit=limit)


def _backend_errors(config: ExperimentConfig) -> Found:
    section = config.section
    if isinstance(section, TensorRTConfig):
        if config.fp_precision == "float32":
            yield ("fp_precision",), Reason.of("tensorrt_precision")
        if config.gpus == ():
            yield ("gpus",), Reason.of("tensorrt_gpu")
    if isinstance(section, PyTorchConfig):
        if config.gpus is not None and len(config.gpus) > 1:
            yield ("gpus",), Reason.of("pytorch_one_gpu", count=len(config.gpus))
        if section.beam_search.enabled and (config.streaming or config.traffic_simulation.enabled):
            yield ("pytorch", "beam_search"), Reason.of("beams_untimed")
    degree = _parallel_degree(config)
    if config.gpus is not None and degree > max(len(config.gpus), 1):
        path = (config.backend, "tensor_parallel_size" if config.backend == "vllm" else "tp_size")
        yield path, Reason.of("gpus_not_named", needed=degree, named=len(config.gpus))


def _measurement_errors(config: ExperimentConfig) -> Found:
    """What is asked of the meters and contradicts something else that is."""
    measurement = config.measurement
    if measurement.phases and config.traffic_simulation.enabled:
        yield ("measurement", "phases"), Reason.of("phases_under_traffic")
    if measurement.energy == "none":
        demands = {("measurement", "phases"): measurement.phases, ("baseline", "required"): config.baseline.required}
        for path in (path for path, is_demanded in demands.items() if is_demanded):
            yield path, Reason.of("needs_energy")
    if config.baseline.required and not config.baseline.enabled:
        yield ("baseline", "required"), Reason.of("needs_baseline")
    if measurement.cpu_tdp_w is not None and not is_estimate(measurement.energy):
        yield ("measurement", "cpu_tdp_w"), Reason.of("tdp_unused", energy=measurement.energy)


def _prompt_errors(config: ExperimentConfig) -> Found:
    prompts = config.prompts
    if prompts is not None and config.dataset is not None:
        yield ("prompts",), Reason.of("two_prompt_sources")
    for name, limit_name in (("input_tokens", "max_input_tokens"), ("output_tokens", "max_output_tokens")):
        wanted, limit = getattr(prompts, name, None), getattr(config, limit_name)
        if wanted is not None and wanted > limit:
            yield ("prompts", name), _above(wanted, limit_name, limit)


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


def _warnings(config: ExperimentConfig) -> Found:
    yield from _sampling_warnings(config.decoder)
    yield from _traffic_warnings(config.traffic_simulation)
    yield from _engine_warnings(config)
    degree = _parallel_degree(config)
    if degree > 1:
        yield (config.backend,), Reason.of("needs_gpus", needed=degree)
    dataset = config.dataset
    if dataset is not None and "/" not in dataset.name:
        from lem.config.experiment import DATASET_ALIASES

        near = nearest(dataset.name, list(DATASET_ALIASES))
        if near is not None and dataset.name not in DATASET_ALIASES:
            yield ("dataset", "name"), Reason.of("no_dataset_alias", name=dataset.name, near=near)


def _sampling_warnings(decoder: DecoderConfig) -> Found:
    if decoder.is_greedy:
        ignored = [
            name
            for name, idle in (("temperature", (0, 1)), ("top_k", (0, 50)), ("top_p", (1,)))
            if getattr(decoder, name) not in idle
        ]
        if ignored:
            code = "greedy_ignores_one" if len(ignored) == 1 else "greedy_ignores_several"
            yield ("decoder", ignored[0]), Reason.of(code, options=" and ".join(ignored))
    elif decoder.temperature != 1 and decoder.top_p != 1:
        yield ("decoder", "top_p"), Reason.of("sampling_compounds")


def _traffic_warnings(traffic: TrafficConfig) -> Found:
    """What was set for the other kind of traffic; an experiment whose mode is an axis of a grid may have both."""
    if traffic.enabled:
        unused = {"target_qps": 1.0, "seed": None} if traffic.mode == "closed" else {"concurrency": 1}
        for name, default in unused.items():
            if getattr(traffic, name) != default:
                yield ("traffic_simulation", name), Reason.of("other_traffic_mode", mode=traffic.mode)


def _engine_warnings(config: ExperimentConfig) -> Found:
    section = config.section
    if isinstance(section, PyTorchConfig):
        if section.cache_implementation == "static":
            yield ("pytorch", "cache_implementation"), Reason.of("static_cache")
        if section.batching_strategy.endswith("dynamic") and section.batch_size == 1:
            yield ("pytorch", "batch_size"), Reason.of("dynamic_batch_of_one")
        return
    if section.gpu_memory_utilization > HIGH_MEMORY_UTILIZATION:
        share = section.gpu_memory_utilization
        yield (config.backend, "gpu_memory_utilization"), Reason.of("memory_tight", share=share)
    caching = "enable_prefix_caching" if isinstance(section, VllmConfig) else "enable_kv_cache_reuse"
    if getattr(section, caching) and config.measurement.min_window_sec > 0:
        yield (config.backend, caching), Reason.of("cached_repeats")
    quantization = section.quantization or ""
    if quantization.startswith(_PRE_QUANTIZED) and not any(
        word in config.model.name.lower() for word in ("awq", "gptq", "int4", "4bit", "w4a16")
    ):
        yield (config.backend, "quantization"), Reason.of("needs_quantized_checkpoint", quantization=quantization)


def _gpu_warnings(config: ExperimentConfig, gpus: Sequence[Gpu]) -> Found:
    used = _used_gpus(config, gpus)
    if not used:
        return
    degree = _parallel_degree(config)
    if degree > len(gpus):
        yield (config.backend,), Reason.of("host_has_fewer_gpus", needed=degree, there=len(gpus))
    for path, needed, what in _capabilities_needed(config):
        for gpu in used:
            if gpu.compute_capability < needed:
                found = _version(gpu.compute_capability)
                least = _version(needed)
                yield path, Reason.of("needs_capability", what=what, needed=least, gpu=gpu.name, found=found)
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


def _memory_warning(config: ExperimentConfig, used: Sequence[Gpu]) -> Found:
    parameters = parameters_by_name(config.model.name)
    if parameters is None:
        return
    needed_b = parameters * _bytes_per_weight(config)
    share = getattr(config.section, "gpu_memory_utilization", 1.0)
    memory_b = sum(gpu.memory_b for gpu in used) * share
    if needed_b > memory_b:
        yield (
            ("model", "name"),
            Reason.of(
                "memory_short",
                billions=parameters / 1e9,
                needed_gb=needed_b / 1e9,
                gpu=used[0].name,
                memory_gb=memory_b / 1e9,
            ),
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
