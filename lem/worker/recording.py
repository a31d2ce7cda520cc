"""The record of one attempt: what it found, and the host, engine and model that can change its numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lem import record
from lem.base import __version__
from lem.base.clock import utc_text
from lem.base.dataclass import dataclass, fields
from lem.base.errors import EngineError
from lem.base.measurement import MAX_FAILED_RATIO, Measured, known
from lem.base.reasons import Reason
from lem.base.units import KIB
from lem.config.experiment import ExperimentConfig, MeteredConfig
from lem.config.kinds import dotted
from lem.config.option import declared, leaves, plain
from lem.engines.protocol import Engine, EngineReport, Observed
from lem.meters.energy import EnergyFindings, efficiency_of
from lem.meters.nvml import read_gpus
from lem.meters.work import describe_work, unfit_reasons
from lem.record import Compute, Environment, Identity, Record, Validity, Window, Work, carbon_of
from lem.worker.channel import RunRequest, redact
from lem.worker.prompts import ResolvedPrompts
from lem.worker.window import MeasuredWindow


class Residence(NamedTuple):
    engine: Engine
    report: EngineReport  # what was loaded, with the options in effect for this experiment
    load_s: float | None  # of the load less `checks_s` and `compile_s` of the report; None when it was reused
    load_id: str

    @property
    def is_reused(self) -> bool:
        return self.load_s is None


@dataclass(frozen=True)
class WarmupOutcome:
    prompts: int
    elapsed_s: Measured[float]
    converged: Measured[bool]
    step_s: float | None = None  # duration of the last step
    warnings: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Findings:
    request: RunRequest
    config: ExperimentConfig
    requested: Mapping[str, Any]  # the configuration as written, `${VAR}` unexpanded
    start_utc: datetime
    residence: Residence
    prompts: ResolvedPrompts
    encoding_warnings: tuple[Reason, ...]
    warmup: WarmupOutcome
    measured: MeasuredWindow
    peak_memory_b: int | None
    energy: EnergyFindings
    surroundings: Mapping[str, Measured[tuple[str, ...]]]  # `vbios` and `other_gpu_processes`
    output_ids_sha256: Measured[str]  # of the file with the output ids
    served: Observed | None = None  # of a server and its client


def compose_record(found: Findings, host: Mapping[str, Any]) -> Record:
    """The record, redacted; EngineError of kind `channel` if the host left out part of the identity."""
    request, measured, energy = found.request, found.measured, found.energy
    done = describe_work(measured, found.config)
    source, served = {**found.prompts.source, "draw": request.draw}, found.served
    token_source = known("engine_ids" if served is None else served.token_source, "no_request")
    kept = {"output_ids_sha256": found.output_ids_sha256}
    work = Work.of(**done.work, **kept, token_source=token_source, prompt_source=source)
    # The user's metadata as written: a reference to the environment stays a reference.
    metadata = found.requested.get("extra_metadata")
    composed = Record(
        identity=_identity(found),
        validity=_validity(found),
        window=_window(found, done.window),
        energy=energy.energy,
        gpus=energy.gpus,
        idle=energy.idle,
        work=work,
        throughput=done.throughput,
        latency=done.latency,
        compute=_compute(measured, found.residence.report, found.peak_memory_b),
        efficiency=efficiency_of(energy.energy.primary_j, work),
        carbon=carbon_of(energy.energy.primary_j, found.config.measurement),
        environment=describe_environment(request, host, found.residence.report, found.config, found.surroundings),
        requested=found.requested,
        extra_metadata=metadata if isinstance(metadata, dict) else found.config.extra_metadata,
        interference=energy.interference,
        machine=energy.machine,
        served={} if served is None else served.facts,
    )
    # An engine's message or an option may have carried a secret anywhere.
    words = sorted(filter(None, request.secrets.values()), key=len, reverse=True)
    return record.decode_record(_redact(record.encode_record(composed), words)) if words else composed


def _identity(found: Findings) -> Identity:
    start_utc = utc_text(found.start_utc, "milliseconds")
    values = {"node": "", **found.request.identity, "start_utc": start_utc, "lem_version": __version__}
    known = {item.name for item in fields(Identity)}
    if strange := sorted(known ^ values.keys()):
        raise EngineError(f"run: identity: missing or unknown: {', '.join(strange)}", kind="channel")
    return Identity(**values)


def _validity(found: Findings) -> Validity:
    measured, energy, warmup = found.measured, found.energy, found.warmup
    failed, total = len(measured.failures), len(measured.failures) + len(measured.completed)
    failures = (Reason.of("requests_failed", failed=failed, total=total, first=measured.failures[0]),) if failed else ()
    is_invalid = failed > MAX_FAILED_RATIO * total
    no_output = (Reason.of("no_output"),) if measured.completed and not measured.output_tok else ()
    unfit = unfit_reasons(measured, allows_overload=found.config.traffic_simulation.allow_overload)
    served = found.served or Observed("", {})
    invalid = (*(failures if is_invalid else ()), *no_output, *unfit, *served.invalid_reasons, *energy.invalid_reasons)
    # The window was one state when throughput and, where it is known, power were.
    moved = abs(energy.power_change or 0.0) >= measured.steady_tolerance
    unsteady = [what for what, is_it in (("throughput", measured.steady.value is False), ("power", moved)) if is_it]
    warnings = (
        *found.residence.report.warnings,
        *found.prompts.warnings,
        *found.encoding_warnings,
        *warmup.warnings,
        *measured.warnings,
        *served.warnings,
        *(() if is_invalid else failures),
        *((Reason.of("unsteady", what=" and ".join(unsteady)),) if unsteady else ()),
        *energy.warnings,
    )
    return Validity.of(
        valid=not invalid,
        invalid_reasons=invalid,
        warnings=tuple(dict.fromkeys(warnings)),
        warmup_converged=warmup.converged,
        steady=False if unsteady else measured.steady,
        engine_reused=found.residence.is_reused,
        engine_load_id=found.residence.load_id,
    )


def _window(found: Findings, measured: Mapping[str, Any]) -> Window:
    request, residence, warmup = found.request, found.residence, found.warmup
    why_gap_ended = None if request.gap_end_code is None else Reason.of(request.gap_end_code)
    return Window.of(
        **measured,
        warmup_s=warmup.elapsed_s,
        warmup_prompts=warmup.prompts,
        load_s=known(residence.load_s, "engine_was_loaded", load_id=residence.load_id),
        # Of the load; for a reused engine, of this experiment alone.
        compile_s=known(residence.report.compile_s, "nothing_compiled"),
        gap_s=known(request.gap_s, "gap_not_reported"),
        gap_end_reason=known(why_gap_ended, "gap_not_reported"),
    )


def _compute(measured: MeasuredWindow, report: EngineReport, peak_memory_b: int | None) -> Compute:
    """Forward passes only: 2 FLOPs for each non-embedding parameter and token (Kaplan et al. 2020, section 2.1)."""
    # Of a mixture of experts, the parameters that a token uses. Attention over the context is left out.
    active, embeddings = report.active_parameters, report.embedding_parameters
    counted = "all active parameters (embeddings unknown)" if embeddings is None else "active non-embedding parameters"
    flops = method = confidence = None
    if active is not None:
        flops = 2.0 * (active - (embeddings or 0)) * (measured.input_tok + measured.output_tok)
        method = f"2 x {counted} x (input + output tokens)"
        confidence = "low" if embeddings is None else "medium"
    missing = Reason.of("parameters_not_reported")
    why = missing if report.model_parameters is None else Reason.of("experts_uncounted")
    return Compute.of(
        flops_total=known(flops, why),
        flops_method=known(method, why),
        flops_confidence=known(confidence, why),
        model_parameters=known(report.model_parameters, missing),
        active_parameters=known(active, why),
        peak_memory_b=known(peak_memory_b, "peak_memory_not_reported", device=report.device),
    )


def _redact(value: Any, words: Sequence[str]) -> Any:
    if isinstance(value, str):
        return redact(value, words)
    if isinstance(value, dict):
        return {redact(key, words): _redact(item, words) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, words) for item in value]
    return value


# Host, engine and model


def read_host(root: Path = Path("/")) -> dict[str, Any]:
    distribution = _find(root / "etc/os-release", ("PRETTY_NAME",), "=")
    cpu = _find(root / "proc/cpuinfo", ("model name", "Model", "cpu model"), ":")  # x86; Raspberry and others; MIPS
    memory = _find(root / "proc/meminfo", ("MemTotal",), ":")
    governors = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    governor = ", ".join(sorted({line.strip() for file in governors for line in _lines(file)}))
    return {
        "os": platform.system() if distribution is None else distribution.strip("\"'"),
        "kernel": platform.release(),
        "cpu": cpu or platform.processor() or platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0)),  # that this process may run on
        # "kB" there means KiB.
        "memory_b": known(None if memory is None else int(memory.split()[0]) * KIB, "no_meminfo"),
        "governor": known(governor or None, "no_governor"),
    }


def describe_environment(
    request: RunRequest,
    host: Mapping[str, Any],
    report: EngineReport,
    config: MeteredConfig,
    surroundings: Mapping[str, Measured[tuple[str, ...]]],
) -> Environment:
    versions = {"python": platform.python_version(), **report.versions}
    driver = read_gpus().driver if report.gpu_uuids else None
    if driver is not None:
        versions["driver"] = driver
    return Environment.of(
        fingerprint=fingerprint_of(host, report, versions, request.image),
        executor=request.executor,
        **host,
        image=known(request.image, "no_container"),
        engine_name=report.engine_name,
        engine_version=report.engine_version,
        versions=versions,
        device=report.device,
        gpu_uuids=report.gpu_uuids,
        model_revision=known(report.model_revision, "revision_not_reported"),
        weights_sha256=known(report.weights_sha256, "weight_files_not_reported"),
        **surroundings,
        engine_effective=report.effective,
        engine_differs=differing_options(config, report.effective) if isinstance(config, ExperimentConfig) else {},
    )


def fingerprint_of(
    host: Mapping[str, Any], report: EngineReport, versions: Mapping[str, str], image: str | None
) -> str:
    """16 hex over what makes two runs incomparable: image, engine and its libraries, driver, GPUs, and the CPU."""
    # Left out is what an experiment chooses (its options) and what changes without mattering (kernel, free memory).
    parts = {
        "image": image,
        "engine": [report.engine_name, report.engine_version],
        "versions": dict(versions),
        "device": report.device,
        "gpu_uuids": sorted(report.gpu_uuids),
        "cpu": [host["cpu"], host["cpu_count"]],
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def differing_options(config: ExperimentConfig, effective: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{dotted option: [requested, effective]} of the options that the engine reports with another value."""
    # An option left to the engine differs from nothing. Nor does a default that does not apply (effective None), such
    # as top_p under greedy decoding: the user did not ask for it.
    defaults = _flatten({name: plain(item.default) for name, item in declared(ExperimentConfig).items()})
    defaults |= _flatten({config.backend: type(config.section)().to_dict()})
    wanted = _flatten({**config.to_dict(), config.backend: config.section.to_dict()})  # also a section left out
    found = _flatten(effective)
    return {
        name: [value, found[name]]
        for name, value in sorted(wanted.items())
        if value is not None
        and name in found
        and found[name] != value
        and not (found[name] is None and defaults.get(name) == value)
    }


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    values = ((dotted(path), item) for path, item in leaves(tree) if not isinstance(item, Mapping))  # nor empty ones
    return {name: list(item) if isinstance(item, tuple) else item for name, item in values}


def _find(file: Path, names: Collection[str], separator: str) -> str | None:
    for line in _lines(file):
        name, _, value = line.partition(separator)
        if name.strip() in names and value.strip():
            return value.strip()
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
