"""One attempt at one experiment: prompts, engine, warm-up, window, record."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import answers, durable, measurement
from lem.base.clock import Clock, seconds_between
from lem.base.dataclass import replace
from lem.base.errors import ConfigurationError, EngineError
from lem.base.measurement import Measured, known
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.base.variables import TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.config.sections import WarmupConfig
from lem.engines.common import load_engine
from lem.engines.named import find_server_problem, named_models
from lem.engines.protocol import Completion, Driven, Engine, TokenRequest
from lem.engines.traffic import TrafficPlan
from lem.meters.requestlog import REQUESTS_FILENAME, write_requests
from lem.record import CONFIG_FILE, OUTPUTS_FILE, PROMPTS_FILE, Record
from lem.worker.channel import RunRequest, redact
from lem.worker.datasets import check_dataset, resolve_dataset
from lem.worker.metering import Metering, Reporter, open_metering
from lem.worker.prompts import (
    ResolvedPrompts,
    read_template,
    resolve_on_host,
    seed_of_draw,
    template_digest,
    write_prompts,
)
from lem.worker.recording import Findings, Residence, WarmupOutcome, compose_record, read_host
from lem.worker.requests import DisjointRequests, check_lengths, encode_prompts, measure_traffic, serve_all
from lem.worker.window import Answer, MeasuredWindow, measure_batch

# A ramp must hold a few turns of requests; one turn takes about as long as a step of the warm-up.
RAMP_STEPS = 3
REPORT_EVERY_S = 1.0


class ResidentEngine:
    def __init__(
        self, load: Callable[[ExperimentConfig, Mapping[str, str]], Engine] = load_engine, clock: Clock | None = None
    ) -> None:
        self._load = load
        self._clock = clock or Clock()
        self._engine: Engine | None = None
        self._engine_key: str | None = None
        self._load_id = ""
        # Its processes on the GPUs as a sampler numbers them; None until they are known.
        self.own_pids: frozenset[int] | None = None

    def is_resident(self, engine_key: str) -> bool:
        return self._engine is not None and self._engine_key == engine_key

    def ensure(self, config: ExperimentConfig, engine_key: str, secrets: Mapping[str, str]) -> Residence:
        """The engine for this experiment: reused when its key is the same, else loaded after the other one left."""
        if self._engine is not None and self.is_resident(engine_key):
            self._engine.configure(config)
            return Residence(self._engine, self._engine.report, None, self._load_id)
        self.unload()
        started_ns = self._clock.monotonic_ns()
        engine = self._load(config, secrets)
        try:
            report = engine.report
        except BaseException:
            engine.close()
            raise
        load_s = seconds_between(started_ns, self._clock.monotonic_ns()) - report.checks_s - (report.compile_s or 0.0)
        self._engine, self._engine_key, self._load_id = engine, engine_key, report.load_id or uuid.uuid4().hex[:16]
        return Residence(engine, report, None if report.load_id else load_s, self._load_id)

    def unload(self) -> None:
        engine, self._engine, self._engine_key, self.own_pids = self._engine, None, None, None
        if engine is not None:
            engine.close()


def run_experiment(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
    """The record of one attempt; the caller writes it, as the last file of the result folder."""
    # `prompts.jsonl` is written where the host left none, and `outputs.jsonl` when asked for. The engine is left
    # loaded. Raises EngineError: kind `option`, `meter`, `prompts`, `model`, `out_of_memory`, `channel` or `engine`;
    # OSError: a file cannot be written.
    start_utc = clock.utc_now()
    reporter.phase("prepare")
    host = read_host()  # before the engine loads, whose runtime may pin this thread to a core
    folder = Path(request.result_dir)
    requested = _read_requested(folder)
    with _refusing("option"):
        config = ExperimentConfig.from_dict(request.config)
    is_resident = engine.is_resident(request.engine_key) or config.has_running_engine
    metering = open_metering(request, config, is_resident=is_resident, clock=clock, reporter=reporter)
    prompts = _resolve_prompts(config, folder, request)

    if not is_resident:
        metering.rest_bare()
        reporter.phase("load")
    with metering.during(measurement.LOAD) if not is_resident else contextlib.nullcontext():
        residence = engine.ensure(config, request.engine_key, request.secrets)
    loaded = residence.engine
    if isinstance(loaded, Driven):
        # Only the configuration says on which GPUs a server runs.
        gpus = tuple(gpu.uuid for gpu in metering.read().header.gpus)
        report = replace(residence.report, gpu_uuids=gpus, device="cuda" if gpus else "cpu")
        residence = residence._replace(report=report)
    metering.choose(residence.report.gpu_uuids)

    reporter.phase("idle")
    template, source = _template(loaded, config, folder, prompts)
    prompts = replace(prompts, source={**prompts.source, **source})
    requests, warnings = encode_prompts(prompts.prompts, loaded, config, template)
    check_lengths(requests, residence.report.longest_tok)
    metering.rest_loaded()
    reporter.phase("warmup")
    with metering.during(measurement.WARMUP) if config.warmup.enabled else contextlib.nullcontext():
        warmup = _warm_up(loaded, requests, config, clock, reporter)
    engine.own_pids = metering.find_own_processes(engine.own_pids)
    reporter.phase("window")
    loaded.reset_peak_memory()
    if isinstance(loaded, Driven):
        loaded.begin_window()
    measured = _measure(loaded, requests, config, warmup, metering, _seed_of_arrivals(config, request))
    peak_b = loaded.peak_memory_b()
    served = loaded.observed() if isinstance(loaded, Driven) else None
    reporter.phase("cooldown")
    if request.keep_engine:
        metering.rest_after()

    reporter.phase("write")
    write_requests(folder / REQUESTS_FILENAME, measured, lambda text: redact(text, request.secrets.values()))
    energy = metering.close(folder, measured)
    if config.save_outputs:
        _write_outputs(folder, measured.outputs, loaded.decode)
    output_ids = _keep_output_ids(folder, measured.outputs, requests, config, residence.report.engine_name)
    seen = metering.surroundings(residence.report.gpu_uuids)
    found = Findings(
        *(request, config, requested, start_utc, residence, prompts, warnings, warmup, measured, peak_b, energy, seen),
        *(output_ids, served),
    )
    return compose_record(found, host)


def find_problems(config: ExperimentConfig, secrets: Mapping[str, str]) -> Iterator[EngineError]:
    """Why an attempt would end before its window, as far as that shows without a load; not permanent if uncertain."""
    if (problem := find_server_problem(config)) is not None:
        yield problem
    if named_models(config):
        try:
            from lem.engines import checkpoints
        except (ImportError, OSError, RuntimeError) as error:
            text = f"transformers cannot be imported by {sys.executable}: {error}"
            yield EngineError(text, "check that the versions of the packages are compatible", is_permanent=True)
        else:
            yield from checkpoints.find_problems(config, secrets.get(TOKEN_VARIABLE) or None)
    if config.uses_dataset:
        try:
            check_dataset(config, os.environ, secrets)
        except EngineError as error:
            yield error


def _read_requested(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    try:
        requested = durable.read_sealed(path).get("requested")
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read: {error}", kind="channel") from error
    if not isinstance(requested, dict):
        raise EngineError(f"{path}: it does not hold the requested configuration", kind="channel")
    return requested


@contextlib.contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """What is wrong with the user's configuration or files is there the next time too."""
    try:
        yield
    except ConfigurationError as error:
        raise EngineError(error.message, error.hint, kind=kind, is_permanent=True) from error


def _resolve_prompts(config: ExperimentConfig, folder: Path, request: RunRequest) -> ResolvedPrompts:
    """The prompts the host left in the result folder, else those of the data set, which are then left there."""
    with _refusing("prompts"):
        resolved = resolve_on_host(config, folder, draw=request.draw)
        resolved = resolved or resolve_dataset(config, os.environ, request.secrets, request.draw)
    if not (folder / PROMPTS_FILE).is_file():
        write_prompts(folder, resolved.prompts)
    return resolved


def _template(
    engine: Engine, config: ExperimentConfig, folder: Path, prompts: ResolvedPrompts
) -> tuple[str | None, Mapping[str, Any]]:
    source = {"chat_template": config.chat_template}
    if not config.is_templated or config.is_chat:
        return None, {**source, **({"applied_by": "server"} if config.is_chat else {})}
    with _refusing("prompts"):
        given = read_template(config, folder)
    template = engine.chat_template(given, has_tools=any(prompt.tools for prompt in prompts.prompts))
    return template, {**source, "chat_template_sha256": template_digest(template)}


def _seed_of_arrivals(config: ExperimentConfig, request: RunRequest) -> int | str:
    """The same for all configurations of a cycle: those without a seed share arrivals that no other run has."""
    traffic, identity = config.traffic_simulation, request.identity
    seed = config.random_seed if traffic.seed is None else traffic.seed
    if seed is None:
        return f"{identity.get('run_id')}/{identity.get('cycle_index')}"
    return seed_of_draw(seed, request.draw)


def _measure(
    engine: Engine,
    requests: Sequence[TokenRequest],
    config: ExperimentConfig,
    warmup: WarmupOutcome,
    metering: Metering,
    arrival_seed: int | str,
) -> MeasuredWindow:
    clock, traffic = metering.clock, config.traffic_simulation
    min_window_s = metering.window_floor_s()
    if traffic.enabled:
        plan = TrafficPlan(
            mode=traffic.mode,
            target_qps=traffic.target_qps,
            concurrency=traffic.concurrency,
            seed=arrival_seed,
            min_window_s=min_window_s,
            ramp_limit_s=max(min_window_s, RAMP_STEPS * (warmup.step_s or 0.0)),
            burstiness=traffic.burstiness,
        )
        report = _at_intervals(metering.reporter, clock, "{} requests")
        return metering.measure_steady(lambda: measure_traffic(engine, requests, plan, clock, report))

    def run(requests: Sequence[TokenRequest], what: str) -> MeasuredWindow:
        return measure_batch(
            engine,
            requests,
            min_window_s=min_window_s,
            observe_tokens=config.runs_alone,
            clock=clock,
            # How often the set will be repeated is not known before its end: only the first pass has a total.
            report=_at_intervals(metering.reporter, clock, what, len(requests)),
        )

    measured = metering.measure_closed(lambda: run(requests, "{} requests"))
    if config.measurement.phases:
        # A prefill ends with the first output token.
        prefills = [
            replace(item, max_output_tokens=1, min_output_tokens=min(1, item.min_output_tokens)) for item in requests
        ]
        metering.measure_prefill(lambda: run(prefills, "{} prefills"))
    return measured


def _at_intervals(reporter: Reporter, clock: Clock, text: str, total: int = 0) -> Callable[[int], None]:
    """Reports at most once a second, since reporting is not part of what is measured; without a total beyond it."""
    next_ns = clock.monotonic_ns()

    def report(done: int) -> None:
        nonlocal next_ns
        now_ns = clock.monotonic_ns()
        if now_ns >= next_ns:
            next_ns = now_ns + round(REPORT_EVERY_S * NS_PER_S)
            reporter.progress(done, total if done <= total else None, text.format(done))

    return report


def _write_outputs(folder: Path, outputs: Sequence[Answer], decode: Callable[[Sequence[int]], str]) -> None:
    rows = [
        {
            "index": output.request.prompt,
            "input_tok": output.request.input_tok,
            "output_tok": output.request.output_tok,
            "output_ids": list(output.output_ids),
            "text": decode(output.output_ids) if output.text is None else output.text,
        }
        for output in outputs
    ]
    durable.write_text(folder / OUTPUTS_FILE, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _keep_output_ids(
    folder: Path,
    outputs: Sequence[Answer],
    requests: Sequence[TokenRequest],
    config: ExperimentConfig,
    engine: str,
) -> Measured[str]:
    """Write the first answer to each prompt that has ids; the SHA-256 of the file."""
    if not config.measurement.agreement:
        return known(None, "agreement_off")
    kept: dict[int, answers.Answer] = {}
    for item in outputs:
        request = requests[item.request.prompt]
        asked = (request.token_ids, request.max_output_tokens, request.min_output_tokens, request.conversation)
        if len(item.output_ids) == item.request.output_tok:
            answer = answers.Answer(item.request.prompt, answers.request_digest(*asked), item.output_ids)
            kept.setdefault(answer.prompt, answer)
    if outputs and not kept:
        return known(None, "ids_not_returned", engine=engine)
    return Measured(answers.write_answers(folder / answers.OUTPUT_IDS_FILE, kept.values()))


# Warm-up: work of the measured kind until its speed has settled, on prompts that are not measured


def _warm_up(
    engine: Engine, requests: Sequence[TokenRequest], config: ExperimentConfig, clock: Clock, reporter: Reporter
) -> WarmupOutcome:
    if not config.warmup.enabled:
        disabled: Measured[Any] = known(None, "warmup_off")
        return WarmupOutcome(0, disabled, disabled)

    def run_step(requests: Sequence[TokenRequest]) -> Sequence[Completion]:
        completions = engine.generate(requests, observe_tokens=config.runs_alone)
        engine.synchronize()
        return completions

    source = DisjointRequests(requests, seed=config.random_seed or 0)
    report = _at_intervals(reporter, clock, "warm-up prompts")
    step = functools.partial(serve_all, engine) if config.traffic_simulation.enabled else run_step
    return warm_up(source, _width(config, len(requests)), config.warmup, step, clock, report)


def _width(config: ExperimentConfig, prompts: int) -> int:
    most = config.most_at_once(None)
    return min(config.width or prompts, prompts) if most is None else most


def warm_up(
    source: DisjointRequests,
    width: int,
    settings: WarmupConfig,
    run_step: Callable[[Sequence[TokenRequest]], Sequence[Completion]],
    clock: Clock,
    report: Callable[[int], None],
) -> WarmupOutcome:
    """The outcome of warming up in steps of `width` requests at once, the concurrency of the measurement."""
    # First come at least `min_prompts` and twice the width, of the measured shapes in their order. Then come steps of
    # the same typical shapes each, until the seconds for each output token have settled over the last `window_size` of
    # them: only steps of equal shapes can be compared. The caps are the time (0 is none) and `max_prompts`, the latter
    # never before `window_size` typical steps were run, else a wide batch could never settle. At a cap `converged` is
    # False. `run_step` runs requests as the measurement will; `report` gets the number of prompts run so far.
    floor = cap = max(settings.min_prompts, 2 * width)
    if settings.convergence_detection:
        cap = max(settings.max_prompts, floor + settings.window_size * width)
    costs: list[float] = []  # of the comparable steps, for each token: free output lengths make unequal work
    failures: list[str] = []
    prompts, converged = 0, False
    begin_ns = now_ns = clock.monotonic_ns()
    while True:
        requests = source.take(width) if prompts < floor else source.take_typical(width)
        step_ns = clock.monotonic_ns()
        completions = run_step(requests)
        now_ns = clock.monotonic_ns()
        prompts += width
        failures += [item.error for item in completions if item.error is not None]
        step_s = seconds_between(step_ns, now_ns)
        if source.is_typical(requests):
            costs.append(step_s / max(1, sum(item.output_tok for item in completions)))
        report(prompts)
        variation = variation_of(costs, settings.window_size)
        if prompts >= floor:
            converged = settings.convergence_detection and variation < settings.cv_threshold
            if converged or prompts + width > cap:
                break
        if settings.timeout_seconds and seconds_between(begin_ns, now_ns) >= settings.timeout_seconds:
            break
    warnings = []
    if settings.convergence_detection and not converged:
        unsettled = {"variation": variation, "threshold": settings.cv_threshold}
        code, data = ("warmup_too_few_steps", {}) if variation == math.inf else ("warmup_unsettled", unsettled)
        warnings.append(Reason.of(code, prompts=prompts, **data))
    if failures:
        warnings.append(Reason.of("warmup_requests_failed", failed=len(failures), total=prompts, first=failures[0]))
    if prompts < floor:
        warnings.append(Reason.of("warmup_timed_out", prompts=prompts, floor=floor))
    if not source.is_disjoint:
        warnings.append(Reason.of("warmup_overlaps"))
    return WarmupOutcome(
        prompts=prompts,
        elapsed_s=Measured(seconds_between(begin_ns, now_ns)),
        converged=known(converged if settings.convergence_detection else None, "convergence_off"),
        step_s=step_s,
        warnings=tuple(warnings),
    )


def variation_of(costs: Sequence[float], window_size: int) -> float:
    last = costs[-window_size:]
    mean = statistics.fmean(last) if last else 0.0
    return statistics.stdev(last) / mean if len(last) == window_size and mean > 0 else math.inf
