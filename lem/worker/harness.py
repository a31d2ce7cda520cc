"""One attempt at one experiment: prompts, engine, warm-up, window, record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lem.base import durable, measurement
from lem.base.clock import Clock
from lem.base.errors import ConfigurationError, EngineError
from lem.base.units import NS_PER_S
from lem.config.backends import WIDTH_OPTIONS
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, Engine, TokenRequest
from lem.record import CONFIG_FILE, OUTPUTS_FILE, Record
from lem.worker.channel import RunRequest
from lem.worker.datasets import resolve_dataset
from lem.worker.environment import read_host
from lem.worker.metering import Metering, open_metering
from lem.worker.prompts import (
    ResolvedPrompts,
    describe,
    is_resolved_on_host,
    read_prompts,
    resolve_on_host,
    write_prompts,
)
from lem.worker.recording import Findings, ResidentEngine, compose_record
from lem.worker.requests import DisjointRequests, EncodedPrompts, encode_prompts
from lem.worker.traffic import TrafficPlan, measure_traffic, serve_all
from lem.worker.warmup import WarmupOutcome, skipped_warmup, warm_up
from lem.worker.window import MeasuredWindow, Output, measure_batch

# A ramp must hold a few turns of requests; one turn takes about as long as a step of the warm-up.
RAMP_STEPS = 3
REPORT_EVERY_S = 1.0


class Reporter(Protocol):
    """Whoever wants to know how far the experiment is."""

    def phase(self, name: str) -> None:
        """A phase of `channel.PHASES` begins."""

    def progress(self, done: int, total: int | None, text: str) -> None:
        """How much of the phase is done."""


def run_experiment(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
    """The record of one attempt; the caller writes it, as the last file of the result folder.

    `prompts.jsonl` is written where the host left none, and `outputs.jsonl` when asked for. The engine is left loaded;
    whether it stays is its keeper's business.

    Raises:
        EngineError: kind `option`, `meter`, `prompts`, `model`, `out_of_memory`, `channel` or `engine`.
        OSError: a file cannot be written.
    """
    start_utc = clock.utc_now()
    reporter.phase("prepare")
    folder = Path(request.result_dir)
    requested = _read_requested(folder)
    config = _read_config(request.config)
    is_resident = engine.is_resident(request.engine_key)
    metering = open_metering(request, config, is_resident=is_resident, clock=clock, reporter=reporter)
    resolved = _resolve_prompts(config, folder, request.secrets)
    host = read_host()

    if not is_resident:
        metering.rest_bare()
        reporter.phase("load")
    with metering.during(measurement.LOAD) if not is_resident else contextlib.nullcontext():
        residence = engine.ensure(config, request.engine_key, request.secrets)
    loaded = residence.engine
    metering.choose(residence.report.gpu_uuids)

    reporter.phase("idle")
    encoded = encode_prompts(resolved.prompts, loaded.encode, config)
    metering.rest_loaded()
    reporter.phase("warmup")
    with metering.during(measurement.WARMUP) if config.warmup.enabled else contextlib.nullcontext():
        warmup = _warm_up(loaded, encoded, config, clock, reporter)
    engine.own_pids = metering.know_own_processes(engine.own_pids)
    reporter.phase("window")
    loaded.reset_peak_memory()
    measured = _measure(loaded, encoded, config, warmup, metering, reporter)
    peak_memory_b = loaded.peak_memory_b()
    reporter.phase("cooldown")
    if request.keep_engine:
        metering.rest_after()

    reporter.phase("write")
    is_steady_mode = config.traffic_simulation.enabled
    energy = metering.close(folder, measured, is_steady_mode=is_steady_mode)
    if config.save_outputs:
        _write_outputs(folder, measured.outputs, loaded.decode)
    return compose_record(
        Findings(
            request=request,
            config=config,
            requested=requested,
            start_utc=start_utc,
            host=host,
            residence=residence,
            prompts=resolved,
            encoded=encoded,
            warmup=warmup,
            measured=measured,
            peak_memory_b=peak_memory_b,
            energy=energy,
            surroundings=metering.surroundings(residence.report.gpu_uuids),
        )
    )


def _read_requested(folder: Path) -> Mapping[str, Any]:
    """The configuration as the user wrote it, `${VAR}` unexpanded, from the `config.json` that the host wrote."""
    path = folder / CONFIG_FILE
    try:
        document = durable.read_json(path)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read: {error}", kind="channel") from error
    requested = document.get("requested") if isinstance(document, dict) else None
    if not isinstance(requested, dict):
        raise EngineError(f"{path}: it does not hold the requested configuration", kind="channel")
    return requested


def _read_config(resolved: Mapping[str, Any]) -> ExperimentConfig:
    try:
        return ExperimentConfig.from_dict(resolved)
    except ConfigurationError as error:
        raise EngineError(error.message, error.hint, kind="option", is_permanent=True) from error


def _resolve_prompts(config: ExperimentConfig, folder: Path, secrets: Mapping[str, str]) -> ResolvedPrompts:
    """The prompts the host left in the result folder, else those of the data set, which are then left there."""
    try:
        is_given = is_resolved_on_host(config)
        found = read_prompts(folder) if is_given else None
        if found is not None:
            return describe(config, found)
        resolved = resolve_on_host(config) if is_given else None
    except ConfigurationError as error:
        raise EngineError(error.message, error.hint, kind="prompts", is_permanent=True) from error
    if resolved is None:
        resolved = resolve_dataset(config, os.environ, secrets)
    write_prompts(folder, resolved.prompts)
    return resolved


def _warm_up(
    engine: Engine, encoded: EncodedPrompts, config: ExperimentConfig, clock: Clock, reporter: Reporter
) -> WarmupOutcome:
    if not config.warmup.enabled:
        return skipped_warmup()
    source = DisjointRequests(encoded.requests, seed=config.random_seed or 0)
    report = _Progress(reporter, clock, lambda done: (done, None, "warm-up prompts"))
    width = _width(config, len(encoded.requests))
    return warm_up(source, width, config.warmup, _step_runner(engine, config), clock, report)


def _step_runner(engine: Engine, config: ExperimentConfig) -> Callable[[Sequence[TokenRequest]], Sequence[Completion]]:
    """How requests are run in warm-up: as in the window."""
    if config.traffic_simulation.enabled:
        return functools.partial(serve_all, engine)

    def run_step(requests: Sequence[TokenRequest]) -> Sequence[Completion]:
        completions = engine.generate(requests, observe_tokens=config.streaming)
        engine.synchronize()
        return completions

    return run_step


def _measure(
    engine: Engine,
    encoded: EncodedPrompts,
    config: ExperimentConfig,
    warmup: WarmupOutcome,
    metering: Metering,
    reporter: Reporter,
) -> MeasuredWindow:
    clock = metering.clock
    min_window_s = metering.window_floor_s()
    traffic = config.traffic_simulation
    if traffic.enabled:
        plan = TrafficPlan(
            mode=traffic.mode,
            target_qps=traffic.target_qps,
            concurrency=traffic.concurrency,
            seed=config.random_seed if traffic.seed is None else traffic.seed,
            min_window_s=min_window_s,
            ramp_limit_s=max(min_window_s, RAMP_STEPS * (warmup.step_s or 0.0)),
        )
        report = _Progress(reporter, clock, lambda done: (done, None, f"{done} requests"))
        return metering.measure_steady(lambda: measure_traffic(engine, encoded.requests, plan, clock, report))

    def run(requests: Sequence[TokenRequest], what: str) -> MeasuredWindow:
        # How often the set will be repeated is known when the window is long enough: only the first pass has an end.
        def describe_pass(done: int) -> tuple[int, int | None, str]:
            return done, len(requests) if done <= len(requests) else None, f"{done} {what}"

        return measure_batch(
            engine,
            requests,
            min_window_s=min_window_s,
            observe_tokens=config.streaming,
            clock=clock,
            report=_Progress(reporter, clock, describe_pass),
        )

    measured = metering.measure_closed(lambda: run(encoded.requests, "requests"))
    if config.measurement.phases:
        metering.measure_prefill(lambda: run([_prefill_of(item) for item in encoded.requests], "prefills"))
    return measured


def _prefill_of(request: TokenRequest) -> TokenRequest:
    """The request for its prefill alone, which ends with the first output token."""
    return dataclasses.replace(request, max_output_tokens=1, min_output_tokens=min(1, request.min_output_tokens))


def _width(config: ExperimentConfig, prompts: int) -> int:
    """How many requests the measurement runs at once."""
    traffic = config.traffic_simulation
    if traffic.enabled and traffic.mode == "closed":
        return traffic.concurrency
    if config.streaming and not traffic.enabled:
        return 1
    width: int = getattr(config.section, WIDTH_OPTIONS[config.backend])
    return min(width, prompts)


class _Progress:
    """Reports at most once a second: reporting is not what is being measured."""

    def __init__(
        self, reporter: Reporter, clock: Clock, describe_done: Callable[[int], tuple[int, int | None, str]]
    ) -> None:
        self._reporter = reporter
        self._clock = clock
        self._describe = describe_done
        self._next_ns = clock.monotonic_ns()

    def __call__(self, done: int) -> None:
        now_ns = self._clock.monotonic_ns()
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + round(REPORT_EVERY_S * NS_PER_S)
            self._reporter.progress(*self._describe(done))


def _write_outputs(folder: Path, outputs: Sequence[Output], decode: Callable[[Sequence[int]], str]) -> None:
    lines = [
        json.dumps(
            {
                "index": output.prompt_index,
                "input_tok": output.input_tok,
                "output_tok": len(output.output_ids),
                "output_ids": list(output.output_ids),
                "text": decode(output.output_ids),
            },
            ensure_ascii=False,
        )
        for output in outputs
    ]
    durable.write_text(folder / OUTPUTS_FILE, "".join(f"{line}\n" for line in lines))
