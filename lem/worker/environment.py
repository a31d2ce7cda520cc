"""Host, engine and model: everything that can change the numbers, and a fingerprint of what makes runs incomparable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base.units import KIB
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import EngineReport
from lem.meters.nvml import find_driver
from lem.record import Environment


@dataclass(frozen=True)
class HostFacts:
    """The machine, as Linux describes it.

    Attributes:
        os: name and version of the distribution.
        cpu: model name.
        cpu_count: logical CPUs that this process may run on.
        memory_b: main memory; None where /proc does not tell.
        governor: frequency governors in use, usually one; None where the kernel shows none.
    """

    os: str
    kernel: str
    cpu: str
    cpu_count: int
    memory_b: int | None
    governor: str | None


@dataclass(frozen=True)
class GpuSurroundings:
    """What the sampler told of the GPUs in use beside their figures.

    Attributes:
        vbios: of each GPU.
        other_processes: `process 4711 on GPU-…` for what else computes there; () when nothing does.
        null_reason: why either is None.
    """

    vbios: tuple[str, ...] | None = None
    other_processes: tuple[str, ...] | None = None
    null_reason: str = "no GPU in use"


def read_host(root: Path = Path("/")) -> HostFacts:
    """The machine this runs on.

    Args:
        root: where `etc`, `proc` and `sys` are.
    """
    return HostFacts(
        os=_read_os(root),
        kernel=platform.release(),
        cpu=_read_cpu(root),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_b=_read_memory(root),
        governor=_read_governor(root),
    )


def describe_environment(
    host: HostFacts,
    report: EngineReport,
    config: ExperimentConfig,
    *,
    executor: str,
    image: str | None,
    gpus: GpuSurroundings | None = None,
) -> Environment:
    """The environment section of the record."""
    versions = {"python": platform.python_version(), **report.versions}
    driver = find_driver() if report.gpu_uuids else None
    if driver is not None:
        versions["driver"] = driver
    seen = gpus or GpuSurroundings()
    optional = {
        "other_gpu_processes": (seen.other_processes, seen.null_reason),
        "vbios": (seen.vbios, seen.null_reason),
        "memory_b": (host.memory_b, "/proc/meminfo does not tell"),
        "governor": (host.governor, "the kernel shows no frequency governor, as in most virtual machines"),
        "image": (image, "not run in a container"),
        "model_revision": (report.model_revision, "the model is a local folder, or the engine does not tell"),
        "weights_sha256": (report.weights_sha256, "the engine does not tell which weight files it read"),
    }
    return Environment(
        fingerprint=fingerprint_of(host, report, versions, image),
        executor=executor,
        os=host.os,
        kernel=host.kernel,
        cpu=host.cpu,
        cpu_count=host.cpu_count,
        memory_b=host.memory_b,
        governor=host.governor,
        image=image,
        engine_name=report.engine_name,
        engine_version=report.engine_version,
        versions=versions,
        device=report.device,
        gpu_uuids=report.gpu_uuids,
        vbios=seen.vbios,
        model_revision=report.model_revision,
        weights_sha256=report.weights_sha256,
        other_gpu_processes=seen.other_processes,
        engine_effective=report.effective,
        engine_differs=differing_options(config, report.effective),
        null_reasons={name: reason for name, (value, reason) in optional.items() if value is None},
    )


def fingerprint_of(host: HostFacts, report: EngineReport, versions: Mapping[str, str], image: str | None) -> str:
    """16 hex over what makes two runs incomparable: image, engine and its libraries, driver, GPUs, and the CPU.

    Left out is what an experiment chooses (its options) and what changes without mattering (kernel, free memory).
    """
    parts = {
        "image": image,
        "engine": [report.engine_name, report.engine_version],
        "versions": dict(versions),
        "device": report.device,
        "gpu_uuids": sorted(report.gpu_uuids),
        "cpu": [host.cpu, host.cpu_count],
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def differing_options(config: ExperimentConfig, effective: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{dotted option: [requested, effective]} of the options that the engine reports with another value.

    An option left to the engine differs from nothing. Nor does a default that does not apply (effective None), such as
    top_p under greedy decoding: nobody asked for it.
    """
    wanted = _options_of(config)
    defaults = _options_of(ExperimentConfig.from_dict({"model": config.model.name, "backend": config.backend}))
    found = _flatten(effective)
    return {
        name: [value, found[name]]
        for name, value in sorted(wanted.items())
        if value is not None
        and name in found
        and found[name] != value
        and not (found[name] is None and defaults.get(name) == value)
    }


def _options_of(config: ExperimentConfig) -> dict[str, Any]:
    """Every option by its dotted name, the backend's defaults included where its section was left out."""
    return _flatten({**config.to_dict(), config.backend: config.section.to_dict()})


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out.update(_flatten(item, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return out


def _read_os(root: Path) -> str:
    for line in _lines(root / "etc/os-release"):
        if line.startswith("PRETTY_NAME="):
            return line.removeprefix("PRETTY_NAME=").strip().strip("\"'")
    return platform.system()


def _read_cpu(root: Path) -> str:
    wanted = ("model name", "Model", "cpu model")  # x86; Raspberry and others; MIPS
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in wanted and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _read_memory(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * KIB  # "kB" there means KiB
    return None


def _read_governor(root: Path) -> str | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    found = {line.strip() for file in files for line in _lines(file)}
    return ", ".join(sorted(found)) or None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
