"""Combinations of options that work, but that a person should know about.

Combinations that cannot work are errors and are raised when an `ExperimentConfig` is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from lem.base.errors import nearest
from lem.config.backends import PyTorchConfig, ServerConfig, TensorRTConfig, VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Path, Problem, dotted
from lem.config.option import Memo, Section, declared, identity_text, joined_texts, leaves
from lem.config.sections import DATASET_ALIASES, HuggingFacePrompts, TrafficConfig

# FP8 tensor cores came with Ada (8.9); flash attention 2 and TensorRT-LLM need Ampere (8.0).
# https://developer.nvidia.com/cuda-gpus, the READMEs of flash-attention and TensorRT-LLM.
FP8_CAPABILITY = (8, 9)
AMPERE = (8, 0)

HIGH_MEMORY_UTILIZATION = 0.95
_PRE_QUANTIZED = ("awq", "gptq", "marlin", "int4_awq", "int4_gptq")
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_PARAMETERS_IN_NAME = re.compile(r"(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


_UNUSED_BY_MODE: Mapping[str, tuple[str, ...]] = {
    "poisson": ("concurrency",),
    "constant": ("concurrency", "seed", "burstiness"),
    "closed": ("target_qps", "seed", "burstiness", "allow_overload"),
}
_SWITCHED = ("traffic_simulation", "warmup", "baseline", "timeseries")  # sections that `enabled` switches off


class Gpu(Protocol):
    """The facts about a GPU that warnings need (`lem.meters.nvml.GpuFacts` has them)."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_b(self) -> int | None: ...  # None where it shares that of the machine
    @property
    def compute_capability(self) -> tuple[int, int] | None: ...


def warnings(config: ExperimentConfig, gpus: Sequence[Gpu] | None = None) -> tuple[Problem, ...]:
    found = (*_work_warnings(config), *_meter_warnings(config), *_engine_warnings(config), *_other_warnings(config))
    return found if gpus is None else (*found, *_gpu_warnings(config, gpus))


def width_warning(config: ExperimentConfig, prompts: int | None) -> Problem | None:
    name, width, most = config.width_option, config.width, config.most_at_once(prompts)
    if name is None or width is None or most is None or width <= most:
        return None
    option = declared(type(config.section)).get(name.rpartition(".")[2])
    if option is not None and width == option.default:
        return None
    return Problem.of(name, "width_unreached", width=width, most=most)


def effective(config: ExperimentConfig, texts: Mapping[str, str], prompts: int | None) -> dict[str, str]:
    """The texts of its identity, as far as they have an effect; equal ones with equal prompts cannot differ."""
    decoder, traffic, own = config.decoder, config.traffic_simulation, config.backend
    found = dict(texts)
    idle: dict[str, tuple[str, ...]] = {own: ("min_p",) if decoder.is_greedy else ()}
    if decoder.is_greedy:
        idle["decoder"] = ("temperature", "top_k", "top_p")
    if traffic.enabled:
        idle["traffic_simulation"] = _UNUSED_BY_MODE[traffic.mode]
    if not config.warmup.convergence_detection:
        idle["warmup"] = ("cv_threshold", "max_prompts", "window_size")
    most = config.most_at_once(prompts)
    if (name := config.width_option) is not None and (width := config.width) is not None:
        idle[own] = (*idle[own], name.partition(".")[2])
        found[name] = str(width if most is None else min(width, most))
    for name, options in idle.items():
        found[name] = _TEXTS_WITHOUT(config.section if name == own else getattr(config, name), options)
    for name in ("prompts", "dataset", *(name for name in _SWITCHED if not getattr(config, name).enabled)):
        found.pop(name, None)
    if not config.measurement.has_rest:
        found.pop("baseline", None)
    if config.ignore_eos:
        del found["min_output_tokens"]
    if config.streaming and not config.runs_alone:
        del found["streaming"]
    draws_arrivals = traffic.enabled and traffic.mode == "poisson" and traffic.seed is None
    if decoder.is_greedy and not draws_arrivals:
        found["random_seed"] = str(config.random_seed is not None)  # vLLM samples more slowly with a seed
    return found


def _text_without(section: Section, options: tuple[str, ...]) -> str:
    """Its identity as JSON, without some options, by their dotted names."""
    found = section.identity_texts()
    for name in options:
        top, _, nested = name.partition(".")
        if nested:
            held = getattr(section, top)
            found[top] = identity_text({key: value for key, value in held.items() if key != nested})
        else:
            found.pop(top, None)
    return joined_texts(found)


_TEXTS_WITHOUT = Memo[str](_text_without)


def differing(one: ExperimentConfig, other: ExperimentConfig) -> list[str]:
    """The options, by dotted names, in which the identities of two configurations differ."""
    texts = one.identity_texts(), other.identity_texts()
    found = []
    for name in declared(ExperimentConfig):
        if texts[0].get(name) != texts[1].get(name):
            before, now = (_leaves_of(config, name, text) for config, text in zip((one, other), texts, strict=True))
            found += [dotted((name, *path)) for path in {**before, **now} if before.get(path) != now.get(path)]
    return found


def _leaves_of(config: ExperimentConfig, name: str, texts: Mapping[str, str]) -> Mapping[Path, Any]:
    value = config.section if name == config.backend else getattr(config, name)
    if isinstance(value, Section) and name in texts:
        return _LEAVES(value)
    return {(): json.loads(f"{{{texts[name]}}}")[name]} if name in texts else {}


_LEAVES = Memo[Mapping[Path, Any]](lambda section: dict(leaves(section.identity())))


def parameters_by_name(name: str) -> float | None:
    found = _PARAMETERS_IN_NAME.findall(name.rpartition("/")[2])
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * (1e9 if unit in "bB" else 1e6)


def _other_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    if config.parallel_degree > 1:
        yield Problem.of(config.backend, "needs_gpus", needed=config.parallel_degree)
    dataset = config.dataset
    if dataset is not None and "/" not in dataset.name and dataset.name not in DATASET_ALIASES:
        near = nearest(dataset.name, list(DATASET_ALIASES))
        if near is not None:
            yield Problem.of("dataset.name", "no_dataset_alias", name=dataset.name, near=near)


def _work_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    decoder, traffic = config.decoder, config.traffic_simulation
    if decoder.is_greedy:
        idle_values = {"temperature": (0, 1), "top_k": (0, 50), "top_p": (1,)}
        ignored = [name for name, idle in idle_values.items() if getattr(decoder, name) not in idle]
        if ignored:
            code = "greedy_ignores_one" if len(ignored) == 1 else "greedy_ignores_several"
            yield Problem.of(f"decoder.{ignored[0]}", code, options=" and ".join(ignored))
    elif decoder.temperature != 1 and decoder.top_p != 1:
        yield Problem.of("decoder.top_p", "sampling_compounds")
    if traffic.enabled:  # where the mode is an axis of a grid, an experiment may have options of the other mode
        for name in _UNUSED_BY_MODE[traffic.mode]:
            if getattr(traffic, name) != declared(TrafficConfig)[name].default:
                yield Problem.of(f"traffic_simulation.{name}", "other_traffic_mode", mode=traffic.mode)
    warmup, prompts = config.warmup, config.prompts
    if warmup.enabled and not warmup.convergence_detection:
        for name in sorted(warmup.changed().keys() & {"cv_threshold", "window_size"}):
            yield Problem.of(f"warmup.{name}", "unused_with", setting="convergence_detection: false")
    if isinstance(prompts, HuggingFacePrompts) and not prompts.shuffle and "seed" in prompts.changed():
        yield Problem.of("prompts.seed", "unused_with", setting="shuffle: false")


def _meter_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    baseline, measurement = config.baseline, config.measurement
    if baseline.enabled and not measurement.has_rest:  # the energy may be an axis of a grid
        for name in sorted(baseline.changed()):
            yield Problem.of(f"baseline.{name}", "unused_with", setting=f"measurement.energy: {measurement.energy}")
    if measurement.external_unit is not None and measurement.external_csv is None:
        yield Problem.of("measurement.external_unit", "unused_with", setting="external_csv: null")


def _engine_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    section = config.section
    if isinstance(section, PyTorchConfig):
        if section.cache_implementation == "static":
            yield Problem.of("pytorch.cache_implementation", "static_cache")
        if section.batching_strategy.endswith("dynamic") and section.batch_size == 1:
            yield Problem.of("pytorch.batch_size", "dynamic_batch_of_one")
        return
    if isinstance(section, ServerConfig):
        if config.streaming:
            yield Problem.of("streaming", "server_streams")
        if section.wants_cache and config.measurement.min_window_sec > 0:
            yield Problem.of("server", "cached_repeats")
        if not section.dialect.uncached:
            yield Problem.of("server.engine", "prompts_may_be_cached", server=section.dialect.server)
        return
    share = section.gpu_memory_utilization
    if share > HIGH_MEMORY_UTILIZATION:
        yield Problem.of(f"{config.backend}.gpu_memory_utilization", "memory_tight", share=share)
    caching = "enable_prefix_caching" if isinstance(section, VllmConfig) else "enable_kv_cache_reuse"
    if getattr(section, caching) and config.measurement.min_window_sec > 0:
        yield Problem.of(f"{config.backend}.{caching}", "cached_repeats")
    quantization = section.quantization or ""
    if quantization.startswith(_PRE_QUANTIZED) and not any(
        word in config.model.name.lower() for word in ("awq", "gptq", "int4", "4bit", "w4a16")
    ):
        yield Problem.of(f"{config.backend}.quantization", "needs_quantized_checkpoint", quantization=quantization)


def _gpu_warnings(config: ExperimentConfig, gpus: Sequence[Gpu]) -> Iterator[Problem]:
    if config.gpus is None:
        used = gpus[: config.parallel_degree]
    else:
        # By index, or by a UUID that may be shortened as for CUDA.
        uuids = tuple(name.lower() for name in config.gpus if not name.isdecimal())
        used = [gpu for gpu in gpus if str(gpu.index) in config.gpus or gpu.uuid.lower().startswith(uuids)]
    if not used:
        return
    if config.parallel_degree > len(gpus):
        yield Problem.of(config.backend, "host_has_fewer_gpus", needed=config.parallel_degree, there=len(gpus))
    for option, needed, what in _capabilities_needed(config):
        versions = ((gpu.name, gpu.compute_capability) for gpu in used)
        old = next(((name, version) for name, version in versions if version and version < needed), None)
        if old is not None:
            found, least = ("{}.{}".format(*version) for version in (old[1], needed))
            yield Problem.of(option, "needs_capability", what=what, needed=least, gpu=old[0], found=found)
    parameters = parameters_by_name(config.model.name)
    memories_b = [gpu.memory_b for gpu in used if gpu.memory_b is not None]
    if parameters is not None and len(memories_b) == len(used):
        needed_gb = parameters * _bytes_per_weight(config) / 1e9
        memory_gb = sum(memories_b) * getattr(config.section, "gpu_memory_utilization", 1.0) / 1e9
        if needed_gb > memory_gb:
            sizes: dict[str, Any] = {"billions": parameters / 1e9, "needed_gb": needed_gb, "memory_gb": memory_gb}
            yield Problem.of("model.name", "memory_short", gpu=used[0].name, **sizes)


def _capabilities_needed(config: ExperimentConfig) -> Iterator[tuple[str, tuple[int, int], str]]:
    section = config.section
    if isinstance(section, PyTorchConfig) and section.attn_implementation == "flash_attention_2":
        yield "pytorch.attn_implementation", AMPERE, "flash attention 2"
    if isinstance(section, (PyTorchConfig, ServerConfig)):
        return
    if isinstance(section, TensorRTConfig):
        yield "backend", AMPERE, "TensorRT-LLM"
    elif "FLASH_ATTN" in (section.attention.backend or "").upper() or section.attention.flash_version is not None:
        yield "vllm.attention", AMPERE, "flash attention"
    cache = "kv_cache_dtype" if isinstance(section, VllmConfig) else "kv_cache_type"
    for name in ("quantization", cache):
        if (getattr(section, name) or "").startswith("fp8"):
            yield f"{config.backend}.{name}", FP8_CAPABILITY, "fp8"


def _bytes_per_weight(config: ExperimentConfig) -> float:
    section = config.section
    plain = _BYTES_PER_WEIGHT[config.fp_precision]
    if isinstance(section, PyTorchConfig):
        return 0.5 if section.load_in_4bit else 1.0 if section.load_in_8bit else plain
    if isinstance(section, ServerConfig):
        return 0.5  # it may quantize
    quantization = section.quantization or "none"
    if quantization == "none":
        return plain
    return 1.0 if quantization.startswith(("fp8", "int8")) else 0.5
