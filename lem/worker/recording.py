"""The record of one attempt, and the engine that it was measured in."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from lem.base import __version__
from lem.base.clock import Clock, SystemClock, seconds_between, utc_text
from lem.base.errors import EngineError
from lem.base.measurement import MAX_FAILED_RATIO
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.common import load_engine
from lem.engines.protocol import Engine, EngineReport
from lem.meters.energy import EnergyFindings, carbon_of, efficiency_of
from lem.record import (
    Compute,
    Identity,
    Measured,
    Record,
    Throughput,
    Validity,
    Window,
    Work,
    decode_record,
    encode_record,
)
from lem.worker.channel import RunRequest, redact
from lem.worker.environment import GpuSurroundings, HostFacts, describe_environment
from lem.worker.prompts import ResolvedPrompts
from lem.worker.requests import EncodedPrompts
from lem.worker.warmup import WarmupOutcome
from lem.worker.window import MeasuredWindow, latency_of


def new_load_id() -> str:
    """A name for one engine load that no other load anywhere has."""
    return uuid.uuid4().hex[:16]


class Residence(NamedTuple):
    """An engine that is loaded and set up for one experiment.

    Attributes:
        engine: the engine.
        report: what was loaded, with the options in effect for this experiment.
        load_s: seconds that the load took, less `EngineReport.checks_s` and `compile_s`; None when the engine was
            there already.
        is_reused: it was loaded for an earlier experiment.
        load_id: which load it is.
    """

    engine: Engine
    report: EngineReport
    load_s: float | None
    is_reused: bool
    load_id: str


class ResidentEngine:
    """At most one loaded engine, with the key of the options that would need a reload.

    Attributes:
        own_pids: its processes on the GPUs as a sampler numbers them; None while nobody has looked.
    """

    def __init__(
        self,
        load: Callable[[ExperimentConfig, Mapping[str, str]], Engine] = load_engine,
        clock: Clock | None = None,
        load_id: Callable[[], str] = new_load_id,
    ) -> None:
        self._load = load
        self._clock = clock or SystemClock()
        self._new_load_id = load_id
        self._engine: Engine | None = None
        self._engine_key: str | None = None
        self._load_id = ""
        self.own_pids: frozenset[int] | None = None

    def is_resident(self, engine_key: str) -> bool:
        """Whether `ensure` would reuse what is loaded."""
        return self._engine is not None and self._engine_key == engine_key

    def ensure(self, config: ExperimentConfig, engine_key: str, secrets: Mapping[str, str]) -> Residence:
        """The engine for this experiment: reused when its key is the same, else loaded after the other one left.

        A load that fails leaves nothing loaded; a reused engine that refuses the experiment stays loaded.

        Raises:
            EngineError: see `Engine`.
        """
        if self._engine is not None and self._engine_key == engine_key:
            self._engine.configure(config)
            return Residence(self._engine, self._engine.report, None, True, self._load_id)
        self.unload()
        started_ns = self._clock.monotonic_ns()
        engine = self._load(config, secrets)
        report = engine.report
        load_s = seconds_between(started_ns, self._clock.monotonic_ns()) - report.checks_s
        load_s -= report.compile_s or 0.0
        self._engine, self._engine_key, self._load_id = engine, engine_key, self._new_load_id()
        return Residence(engine, report, load_s, False, self._load_id)

    def unload(self) -> None:
        """Give up what is loaded; nothing counts as loaded afterwards, also when the engine fails at it."""
        engine, self._engine, self._engine_key, self.own_pids = self._engine, None, None, None
        if engine is not None:
            engine.close()


_NO_PADDING = "the engine does not tell how much padding it computed on; input never holds any"


@dataclass(frozen=True)
class Findings:
    """Everything that one attempt found.

    Attributes:
        requested: the configuration as written, `${VAR}` unexpanded.
        energy, surroundings: what the meters tell.
    """

    request: RunRequest
    config: ExperimentConfig
    requested: Mapping[str, Any]
    start_utc: datetime
    host: HostFacts
    residence: Residence
    prompts: ResolvedPrompts
    encoded: EncodedPrompts
    warmup: WarmupOutcome
    measured: MeasuredWindow
    peak_memory_b: int | None
    energy: EnergyFindings
    surroundings: GpuSurroundings


def compose_record(found: Findings) -> Record:
    """The record, in which no secret of the request stands.

    Raises:
        EngineError: kind `channel`, the host left out part of the identity.
    """
    report, energy, work = found.residence.report, found.energy, _work(found)
    record = Record(
        identity=_identity(found),
        validity=_validity(found),
        window=_window(found),
        energy=energy.energy,
        gpus=energy.gpus,
        idle=energy.idle,
        work=work,
        throughput=_throughput(found.measured),
        latency=latency_of(found.measured.requests),
        compute=_compute(found.measured, report, found.peak_memory_b),
        efficiency=efficiency_of(energy.energy.primary_j, work),
        carbon=carbon_of(energy.energy.primary_j, found.config.measurement),
        environment=describe_environment(
            found.host,
            report,
            found.config,
            executor=found.request.executor,
            image=found.request.image,
            gpus=found.surroundings,
        ),
        requested=found.requested,
        extra_metadata=_metadata(found),
    )
    return _redact(record, found.request.secrets)


def _identity(found: Findings) -> Identity:
    start_utc = utc_text(found.start_utc, "milliseconds")
    values = {**found.request.identity, "start_utc": start_utc, "lem_version": __version__}
    known = {item.name for item in dataclasses.fields(Identity)}
    if strange := sorted(known ^ values.keys()):
        raise EngineError(f"run: identity: missing or unknown: {', '.join(strange)}", kind="channel")
    return Identity(**values)


def _validity(found: Findings) -> Validity:
    measured, report, energy = found.measured, found.residence.report, found.energy
    failed, notes = _judge(measured)
    invalid = (*failed, *energy.invalid_reasons)
    steady, unsteady_notes = _steadiness(measured, energy)
    reasons = {
        name: reason
        for name, value, reason in (
            ("warmup_converged", found.warmup.converged, found.warmup.null_reason),
            ("steady", steady, measured.steady_null_reason),
        )
        if value is None and reason is not None
    }
    warnings = (
        *report.warnings,
        *found.prompts.warnings,
        *found.encoded.warnings,
        *found.warmup.warnings,
        *measured.warnings,
        *notes,
        *unsteady_notes,
        *energy.warnings,
    )
    return Validity(
        valid=not invalid,
        invalid_reasons=invalid,
        warnings=tuple(dict.fromkeys(warnings)),
        warmup_converged=found.warmup.converged,
        steady=steady,
        engine_reused=found.residence.is_reused,
        engine_load_id=found.residence.load_id,
        null_reasons=reasons,
    )


def _steadiness(measured: MeasuredWindow, energy: EnergyFindings) -> tuple[bool | None, tuple[Reason, ...]]:
    """Whether the window was one state, in throughput and, where it is known, in power; and which of them was not."""
    apart = [
        what
        for what, is_alike in (("throughput", measured.steady), ("power", energy.power_steady.value))
        if is_alike is False
    ]
    if apart:
        return False, (Reason.of("unsteady", what=" and ".join(apart)),)
    return measured.steady, ()


def _judge(measured: MeasuredWindow) -> tuple[tuple[Reason, ...], tuple[Reason, ...]]:
    """Why the window is invalid, and what else is to be known of its requests."""
    invalid: list[Reason] = []
    notes: list[Reason] = []
    failed, total = len(measured.failures), len(measured.failures) + len(measured.requests)
    if failed:
        reason = Reason.of("requests_failed", failed=failed, total=total, first=measured.failures[0])
        (invalid if failed > MAX_FAILED_RATIO * total else notes).append(reason)
    if measured.output_tok == 0:
        invalid.append(Reason.of("no_output"))
    return tuple(invalid), tuple(notes)


def _window(found: Findings) -> Window:
    load_s, warmup_s = found.residence.load_s, found.warmup.elapsed_s
    request = found.request
    gap_end_reason = None if request.gap_end_code is None else Reason.of(request.gap_end_code)
    # An engine that is reused was compiled with its load, or anew for this experiment: only the latter is this one's.
    compile_s = found.residence.report.compile_s
    optional = {
        "warmup_s": (warmup_s, found.warmup.null_reason or "warm-up did not run"),
        "load_s": (load_s, f"the engine was loaded before (load {found.residence.load_id})"),
        "compile_s": (compile_s, "nothing was compiled for this experiment"),
        "gap_s": (request.gap_s, "the host told of no gap before this experiment"),
        "gap_end_reason": (gap_end_reason, "the host told of no gap before this experiment"),
    }
    return Window(
        traffic_mode=found.measured.traffic_mode,
        window_s=found.measured.window_s,
        window_repeats=found.measured.repeats,
        warmup_s=warmup_s,
        warmup_prompts=found.warmup.prompts,
        load_s=load_s,
        compile_s=compile_s,
        gap_s=request.gap_s,
        gap_end_reason=gap_end_reason,
        null_reasons={name: reason for name, (value, reason) in optional.items() if value is None},
    )


def _work(found: Findings) -> Work:
    measured = found.measured
    return Work(
        requests_ok=len(measured.requests),
        requests_failed=len(measured.failures),
        input_tok=measured.input_tok,
        output_tok=measured.output_tok,
        padding_tok=measured.padding_tok,
        token_source="engine_ids",  # noqa: S106 (no password)
        prompt_source=found.prompts.source,
        null_reasons={} if measured.padding_tok is not None else {"padding_tok": _NO_PADDING},
    )


def _throughput(measured: MeasuredWindow) -> Throughput:
    window_s = measured.window_s
    if window_s <= 0:
        why = "the window took no time that the clock could tell"
        return Throughput.of(
            **dict.fromkeys(("output_tok_per_s", "total_tok_per_s", "requests_per_s"), Measured(None, why))
        )
    return Throughput(
        output_tok_per_s=measured.output_tok / window_s,
        total_tok_per_s=(measured.input_tok + measured.output_tok) / window_s,
        requests_per_s=len(measured.requests) / window_s,
    )


def _compute(measured: MeasuredWindow, report: EngineReport, peak_memory_b: int | None) -> Compute:
    """Forward passes only: 2 FLOPs for each non-embedding parameter and token (Kaplan et al. 2020, section 2.1).

    Attention over the context is left out, and parameters that a token does not use (experts) are counted in.
    """
    parameters, embeddings = report.model_parameters, report.embedding_parameters
    reasons: dict[str, str] = {}
    flops = method = confidence = None
    if parameters is None:
        why = "the engine does not tell the number of parameters"
        reasons.update(dict.fromkeys(("flops_total", "flops_method", "flops_confidence", "model_parameters"), why))
    else:
        flops = 2.0 * (parameters - (embeddings or 0)) * (measured.input_tok + measured.output_tok)
        counted = "all parameters (embeddings unknown)" if embeddings is None else "non-embedding parameters"
        method = f"2 x {counted} x (input + output tokens)"
        confidence = "low" if embeddings is None else "medium"
    if peak_memory_b is None:
        reasons["peak_memory_b"] = f"the engine does not tell the peak of its memory on {report.device}"
    return Compute(
        flops_total=flops,
        flops_method=method,
        flops_confidence=confidence,
        model_parameters=parameters,
        peak_memory_b=peak_memory_b,
        null_reasons=reasons,
    )


def _metadata(found: Findings) -> Mapping[str, Any]:
    """The user's metadata as written: a reference to the environment stays a reference."""
    written = found.requested.get("extra_metadata")
    return written if isinstance(written, dict) else found.config.extra_metadata


def _redact(record: Record, secrets: Mapping[str, str]) -> Record:
    """The record with every secret blotted out, wherever an engine's message or option may have carried it."""
    words = sorted(filter(None, secrets.values()), key=len, reverse=True)
    return decode_record(_blot(encode_record(record), words)) if words else record


def _blot(value: Any, words: Sequence[str]) -> Any:
    if isinstance(value, str):
        return redact(value, words)
    if isinstance(value, dict):
        return {redact(key, words): _blot(item, words) for key, item in value.items()}
    if isinstance(value, list):
        return [_blot(item, words) for item in value]
    return value
