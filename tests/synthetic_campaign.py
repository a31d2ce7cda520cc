"""Whole campaigns on disk without running one: manifest, results and sample logs as lem leaves them, from known truth.

    campaign = Campaign(
        configurations=(
            Configuration("pytorch-bfloat16", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900),
            Configuration("vllm-bfloat16", energy_per_output_tok_j=0.2, throttled_cycles=(1,), failed_cycles=(3,)),
        ),
        cycles=5, load_sd=0.01, run_sd=0.005, drift=0.02,
    )
    written = campaign.write(tmp_path)   # written.results_dir, .state_dir, .manifest_path, .run_id
    records = campaign.records()         # the same records in memory, without a disk: quick enough for 1,000 campaigns

Everything is made from `seed`, run and names alone, so equal descriptions give equal bytes; a cell's noise is its own
and does not move when another configuration or cycle is added. `dataclasses.replace` makes variants: another card,
driver, prompts, output length. `sweep(10_000)` is a campaign of that many experiments. `stop_after=k` leaves one that
has done k experiments and was running the next. A filtered configuration leaves nothing on disk but a gap in the
grid: leave it out of `configurations`. Cycles are from 0, as in the data.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from lem.base.clock import utc_text
from lem.base.measurement import WINDOW
from lem.config.campaign_config import BALANCED, generate_campaign_id, slug_of
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import AttemptLog
from lem.meters.energy import measure
from lem.meters.requestlog import REQUESTS_FILENAME, Request, RequestLog, write_requests
from lem.meters.samples import FINISHED_FILENAME, GpuHeader, Mark, SampleLog, write_finished
from lem.meters.sources import choose_sources
from lem.orchestration.grid import cycle_order, experiment_id
from lem.orchestration.manifest import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    encode_manifest,
)
from lem.record import Identity, Record, encode_record
from lem.results.index import record_result
from lem.worker.prompts import write_prompts
from lem.worker.shapes import Prompt
from tests.records import with_measured, with_requests
from tests.synthetic_log import LogPlan, make_log
from tests.synthetic_record import Configuration, Run

__all__ = ["Campaign", "Configuration", "Experiment", "Written", "sweep"]

_START = datetime(2026, 7, 14, 10, tzinfo=timezone.utc)
_BATCH_OPTION = {"pytorch": "batch_size", "vllm": "max_num_seqs", "tensorrt": "max_batch_size"}


@dataclass(frozen=True)
class Experiment:
    """One cell: a configuration in a cycle, in its place of the order."""

    configuration: Configuration
    cycle: int
    order: int
    exp_id: str
    config_hash: str


@dataclass(frozen=True)
class Written:
    """Where a campaign was written to."""

    results_dir: Path
    state_dir: Path
    manifest_path: Path
    campaign: str
    run_id: str


@dataclass(frozen=True)
class Campaign:
    """A campaign as described; noises are standard deviations of logs, each drawn anew for energy and for speed."""

    configurations: tuple[Configuration, ...]
    name: str = "demo"
    cycles: int = 5
    seed: int = 1
    cycle_sd: float = 0.0  # what all experiments of a cycle share (a warm room)
    load_sd: float = 0.01  # what all attempts with one engine load share; under `is_reused` that is all cycles
    run_sd: float = 0.005  # of each attempt alone
    place_effect: float = 0.0  # log of energy per token that the second place of each cycle adds
    drift: float = 0.0  # log of energy per token gained from the first experiment to the last; true in the middle
    day_sd: float = 0.0  # what the whole run shares, drawn from `seed` and `run_id`
    invalid_probability: float = 0.0  # of each attempt, by another process on the GPU; it is rerun once
    invalid_shift: float = 0.0  # log of energy per token that an invalid attempt has too much
    is_reused: bool = False  # `execution.reuse: campaign`
    structure: str = "interleaved"  # or another one of lem; `shuffled` is this module's own
    run_id: str = "20260714T100000Z-3fa1"
    host: str = "lab1"
    gpu_name: str = "NVIDIA H200"
    gpu_count: int = 1
    gpu_serial: int = 1  # other serials are other cards of the kind
    power_limit_w: float = 700.0
    driver: str = "575.51.03"
    prompts: str = "a" * 64
    requests: int = 128
    output_tok_per_request: int = 128  # `max_output_tokens`, unless a configuration's options say another
    ignore_eos: bool = True
    window_s: float = 30.0
    has_samples: bool = True  # whether a sample log is written with each result
    is_verifiable: bool = False  # every figure follows from samples, requests and prompts, and digests are recorded
    stop_after: int | None = None  # how many experiments are done; the next one was running. None: all

    def __post_init__(self) -> None:
        if len({self.hash_of(item) for item in self.configurations}) < len(self.configurations):
            raise ValueError("two configurations are the same experiment: give them other options")

    def records(self) -> list[Record]:
        """Every record, in the order in which the attempts ended."""
        return [run.record for experiment in self._done() for run in self._attempts(experiment)]

    def experiments(self) -> tuple[Experiment, ...]:
        """All that was planned, in order."""
        cells = [(cycle, number) for cycle in range(self.cycles) for number in range(len(self.configurations))]
        if self.structure == "grouped":
            cells.sort(key=lambda cell: (cell[1], cell[0]))
        elif self.structure == "shuffled":
            cells.sort(key=lambda cell: (cell[0], self._random("order", cell).random()))
        hashes = [self.hash_of(item) for item in self.configurations]
        if self.structure == BALANCED:  # each has an engine of its own
            orders = (cycle_order(hashes, BALANCED, self.seed, cycle) for cycle in range(self.cycles))
            cells = [(cycle, number) for cycle, order in enumerate(orders) for number in order]
        return tuple(
            Experiment(self.configurations[number], cycle, order, experiment_id(hashes[number], cycle), hashes[number])
            for order, (cycle, number) in enumerate(cells)
        )

    def hash_of(self, configuration: Configuration) -> str:
        """The configuration's `config_hash`."""
        return _hash(self._config_text(configuration))

    def write(self, folder: Path) -> Written:
        """Write the campaign under `folder`, which may hold others: `results/` and `.state/`."""
        results_dir, state_dir, slug = folder / "results", folder / ".state", slug_of(self.name)
        done = {experiment.exp_id for experiment in self._done()}
        entries, indexed = [], set[str]()  # as the one process of a campaign writes its index
        for experiment in self.experiments():
            place = results_dir / slug / self.run_id / experiment.exp_id
            if experiment.exp_id in done:
                entries.append(self._write_experiment(experiment, place, indexed))
            else:
                entries.append(self._write_undone(experiment, place, is_running=len(entries) == len(done)))
        manifest_path = state_dir / slug / "campaign_manifest.json"
        manifest_path.parent.mkdir(parents=True, exist_ok=True)
        manifest_path.write_bytes(b"".join(encode_manifest(self._manifest(entries))))
        return Written(results_dir, state_dir, manifest_path, slug, self.run_id)

    def _done(self) -> tuple[Experiment, ...]:
        return self.experiments()[: self.stop_after]

    def _config_text(self, configuration: Configuration) -> str:
        """The experiment's options as a file would have them, and what its prompts are known by."""
        section = {_BATCH_OPTION[configuration.backend]: configuration.batch_size}
        requested = {
            "model": {"name": configuration.model},
            "backend": configuration.backend,
            "fp_precision": configuration.precision,
            "max_output_tokens": self.output_tok_per_request,
            "ignore_eos": self.ignore_eos,
            **configuration.options,
        }
        requested[configuration.backend] = {**section, **requested.get(configuration.backend, {})}
        return json.dumps([requested, configuration.prompts or self.prompts])

    # -- noise

    def _random(self, *where: object) -> random.Random:
        return random.Random(repr((self.seed, self.run_id, *where)))

    def _factor(self, quantity: str, experiment: Experiment, attempt: int) -> float:
        """The true value times this is what the attempt saw."""
        name = experiment.configuration.name
        load = (name,) if self.is_reused else (name, experiment.cycle)
        total = max(len(self.configurations) * self.cycles - 1, 1)
        deviations = (
            (self.day_sd, ("day",)),
            (self.cycle_sd, ("cycle", experiment.cycle)),
            (self.load_sd, ("load", *load)),
            (self.run_sd, ("run", name, experiment.cycle, attempt)),
        )
        log = sum(sd * self._random(quantity, *where).gauss(0, 1) for sd, where in deviations if sd)
        if quantity == "energy":
            log += self.drift * (experiment.order / total - 0.5)
            log += self.place_effect * (experiment.order % len(self.configurations) == 1)
        return math.exp(log)

    def _invalid_count(self, experiment: Experiment) -> int:
        configuration = experiment.configuration
        given = configuration.invalid_attempts.get(experiment.cycle, 0)
        if given or not self.invalid_probability:
            return max(given, int(experiment.cycle in configuration.throttled_cycles))
        chance = self._random("invalid", configuration.name, experiment.cycle)
        return 0 if chance.random() > self.invalid_probability else 1 + (chance.random() < self.invalid_probability)

    # -- records

    def _attempts(self, experiment: Experiment) -> Iterator[Run]:
        """The runs of a cell: the invalid ones, and after fewer than two of them the valid one."""
        if experiment.cycle in experiment.configuration.failed_cycles:
            return
        invalid = self._invalid_count(experiment)
        for number in range(1, min(invalid + 1, 2) + 1):
            yield self._run(experiment, number, is_valid=number > invalid)

    def _run(self, experiment: Experiment, attempt: int, *, is_valid: bool) -> Run:
        configuration = experiment.configuration
        joules = configuration.energy_per_output_tok_j
        is_throttled = attempt == 1 and experiment.cycle in configuration.throttled_cycles
        slowed = 0.7 if is_throttled else 1.0
        shift = 1.0 if is_valid else math.exp(self.invalid_shift)
        return Run(
            identity=self._identity(experiment, attempt),
            configuration=configuration,
            requested=_requested(self._config_text(configuration)),
            energy_per_output_tok_j=None
            if joules is None
            else joules * self._factor("energy", experiment, attempt) / math.sqrt(slowed) * shift,
            output_tok_per_s=configuration.output_tok_per_s * slowed * self._factor("speed", experiment, attempt),
            is_valid=is_valid,
            is_throttled=is_throttled,
            load_id=self._load_id(experiment),
            is_engine_reused=attempt > 1 or (self.is_reused and experiment.cycle > 0),
            gpus=self._gpus(),
            prompts=configuration.prompts or self.prompts,
            requests=self.requests,
            least_window_s=self.window_s,
        )

    def _identity(self, experiment: Experiment, attempt: int) -> Identity:
        started = _START + timedelta(seconds=experiment.order * 120 + (attempt - 1) * 60)
        return Identity(
            experiment_id=experiment.exp_id,
            config_name=experiment.configuration.name,
            config_hash=experiment.config_hash,
            campaign_id=generate_campaign_id(self.name),
            campaign_name=self.name,
            run_id=self.run_id,
            host=self.host,
            backend=experiment.configuration.backend,
            model=experiment.configuration.model,
            cycle_index=experiment.cycle,
            order_index=experiment.order,
            attempt=attempt,
            shuffle_seed=self.seed if self.structure == "shuffled" else None,
            start_utc=utc_text(started),
            lem_version="0.1.0",
        )

    def _load_id(self, experiment: Experiment) -> str:
        cycle = "all" if self.is_reused else str(experiment.cycle)
        return hashlib.sha256(f"{self.run_id}/{experiment.config_hash}/{cycle}".encode()).hexdigest()[:16]

    def _gpus(self) -> tuple[GpuHeader, ...]:
        return tuple(
            GpuHeader(
                index=index,
                uuid=f"GPU-{self.gpu_serial + index:08x}-0000-4000-8000-000000000000",
                name=self.gpu_name,
                driver=self.driver,
                vbios="96.00.CF.00.01",
                power_limit_w=self.power_limit_w,
                persistence_mode=True,
                mig_mode=False,
                power_source="instant",
            )
            for index in range(self.gpu_count)
        )

    # -- files

    def _manifest(self, entries: list[CampaignManifestEntry]) -> CampaignManifest:
        started = utc_text(_START)
        return CampaignManifest(
            campaign_id=generate_campaign_id(self.name),
            campaign_name=self.name,
            created_at=started,
            updated_at=max((entry.completed_at or entry.started_at or started for entry in entries), default=started),
            config_hash=_hash(repr(sorted(map(self._config_text, self.configurations)))),
            total_experiments=len(entries),
            experiments=entries,
            run_id=self.run_id,
            shuffle_seed=self.seed if self.structure == "shuffled" else None,
            environment={"driver": self.driver, "gpus": [gpu.uuid for gpu in self._gpus()]},
        )

    def _write_experiment(self, experiment: Experiment, place: Path, indexed: set[str]) -> CampaignManifestEntry:
        attempts = [
            self._write_run(run, place / f"attempt-{run.identity.attempt}", indexed)
            for run in self._attempts(experiment)
        ]
        if not attempts:  # what went wrong goes wrong again
            attempts = [self._write_failure(experiment, place / f"attempt-{number}", number) for number in (1, 2)]
        last = attempts[-1]
        return self._entry(
            experiment,
            started_at=attempts[0].started_at,
            attempts=tuple(attempts),
            retry_count=len(attempts) - 1,
            completed_at=last.completed_at,
            status=COMPLETED if last.result_path else FAILED,
            result_path=last.result_path,
            error=last.error,
        )

    def _write_undone(self, experiment: Experiment, place: Path, *, is_running: bool) -> CampaignManifestEntry:
        if not is_running:
            return self._entry(experiment, status=PENDING)
        self._write_config(experiment.configuration, place / "attempt-1")
        started_at = self._identity(experiment, 1).start_utc
        attempts = (Attempt(1, started_at=started_at, host=self.host),)
        return self._entry(experiment, status=RUNNING, started_at=started_at, attempts=attempts)

    def _entry(self, experiment: Experiment, **course: Any) -> CampaignManifestEntry:
        return CampaignManifestEntry(
            exp_id=experiment.exp_id,
            config_name=experiment.configuration.name,
            config_path=f"configs/{slug_of(self.name)}/{experiment.configuration.name}.yaml",
            config_hash=experiment.config_hash,
            backend=experiment.configuration.backend,
            container=None,
            cycle_index=experiment.cycle,
            order_index=experiment.order,
            host=self.host,
            **course,
        )

    def _write_run(self, run: Run, folder: Path, indexed: set[str]) -> Attempt:
        self._write_config(run.configuration, folder)
        record, path, digest = run.record, folder / "result.json", None
        if self.has_samples and run.energy_per_output_tok_j is not None:
            log, marks = make_log(self._log_plan(run), self._random("samples", run.identity.key))
            write_finished(folder / FINISHED_FILENAME, log, marks)
            if self.is_verifiable:
                record = _with_raw_data(record, log, marks, folder)
        data = (json.dumps(encode_record(record), indent=2, ensure_ascii=False) + "\n").encode()
        path.write_bytes(data)
        if self.is_verifiable:
            digest = hashlib.sha256(data).hexdigest()
            record_result(folder.parents[1], path, record, digest, indexed)
        return self._ended(
            run.identity, folder, 50, result_path=str(path), valid=record.validity.valid, result_sha256=digest
        )

    def _write_failure(self, experiment: Experiment, folder: Path, number: int) -> Attempt:
        self._write_config(experiment.configuration, folder)
        return self._ended(self._identity(experiment, number), folder, 20, error=experiment.configuration.error)

    def _ended(self, identity: Identity, folder: Path, after_s: float, **outcome: Any) -> Attempt:
        started = datetime.fromisoformat(identity.start_utc.replace("Z", "+00:00"))
        return Attempt(
            identity.attempt,
            log_path=str(folder / "log.txt"),
            started_at=identity.start_utc,
            completed_at=utc_text(started + timedelta(seconds=after_s)),
            host=self.host,
            **outcome,
        )

    def _write_config(self, configuration: Configuration, folder: Path) -> None:
        folder.mkdir(parents=True)
        document = _config_document(self._config_text(configuration), configuration.name)
        (folder / "config.json").write_text(document, encoding="utf-8")
        (folder / "log.txt").write_text("what the engine printed\n", encoding="utf-8")

    def _log_plan(self, run: Run) -> LogPlan:
        gpu, idle = run.record.gpus[0], run.record.idle
        return LogPlan(
            host=self.host,
            gpus=self._gpus(),
            started_ns=1_000_000_000_000 + run.identity.order_index * 120_000_000_000,
            started_utc=run.identity.start_utc,
            window_power_w=gpu.power_mean_w or 0.0,
            window_s=run.record.window.window_s,
            idle_bare_power_w=(idle.idle_bare_power_w or 0.0) / self.gpu_count,
            idle_loaded_power_w=(idle.idle_loaded_power_w or 0.0) / self.gpu_count,
            load_s=run.record.window.load_s,
            warmup_s=run.record.window.warmup_s or 0.0,
            temp_start_c=gpu.temp_start_c or 0.0,
            temp_end_c=gpu.temp_end_c or 0.0,
            throttled_s=gpu.throttle_thermal_s or 0.0,
            capped_s=gpu.throttle_power_s or 0.0,
        )


def sweep(n_experiments: int, *, cycles: int = 5, **changes: Any) -> Campaign:
    """A campaign of that many experiments over a grid of batch sizes and backends, without sample logs."""
    configurations = []
    for index in range(math.ceil(n_experiments / cycles)):
        backend, batch_size = ("pytorch", "vllm")[index % 2], index // 2 + 1
        gain = math.log2(batch_size + 1) * (1.0 if backend == "pytorch" else 1.6)
        configurations.append(
            Configuration(
                f"{backend}-batch_size={batch_size}",
                backend=backend,
                batch_size=batch_size,
                energy_per_output_tok_j=2.0 / gain,
                output_tok_per_s=250 * gain,
            )
        )
    return Campaign(**{"configurations": tuple(configurations), "cycles": cycles, "has_samples": False, **changes})


def _with_raw_data(record: Record, log: SampleLog, marks: tuple[Mark, ...], folder: Path) -> Record:
    """Write requests and prompts; the record whose figures follow from them and from the samples."""
    config = ExperimentConfig.from_dict(record.requested)
    prompts = [Prompt(f"prompt number {number}") for number in range(record.work.prompt_source["count"])]
    requests = _make_requests(record, next(mark for mark in marks if mark.name == WINDOW), len(prompts))
    write_prompts(folder, prompts)
    write_requests(folder / REQUESTS_FILENAME, requests, str)
    sources = choose_sources(config, log.header, record.environment.gpu_uuids, foreign={})
    found = measure(AttemptLog(log, marks, sources), window_repeats=requests.repeats)
    return with_measured(with_requests(record, requests, prompts, config), found, config.measurement)


def _make_requests(record: Record, window: Mark, prompts: int) -> RequestLog:
    """Passes of equal length over the prompts, each one batch, in which each step brings a token of every request."""
    work, repeats = record.work, record.window.window_repeats
    length_ns = window.closed_ns - window.opened_ns
    edges_ns = [window.opened_ns + length_ns * place // repeats for place in range(repeats + 1)]
    passes_ns = tuple(itertools.pairwise(edges_ns))
    assert work.requests_ok
    assert work.input_tok is not None
    assert work.output_tok is not None
    input_tok, steps = work.input_tok // work.requests_ok, work.output_tok // work.requests_ok
    requests: list[Request] = []
    for begin_ns, end_ns in passes_ns:
        times_ns = tuple(begin_ns + (end_ns - begin_ns) * step // steps for step in range(1, steps + 1))
        one = Request(0, input_tok, steps, 0, None, begin_ns, end_ns, times_ns)
        requests += (replace(one, prompt=prompt) for prompt in range(prompts))
    return RequestLog("closed_batch", window.opened_ns, window.closed_ns, prompts, tuple(requests), passes_ns)


def _requested(text: str) -> dict[str, Any]:
    requested: dict[str, Any] = json.loads(text)[0]
    return requested


@functools.lru_cache(maxsize=20_000)
def _config_document(text: str, name: str) -> str:
    requested = _requested(text)
    resolved = {**ExperimentConfig.from_dict(requested).to_dict(), "config_name": name}
    return json.dumps({"schema_version": 1, "requested": requested, "resolved": resolved}, indent=2) + "\n"


@functools.lru_cache(maxsize=20_000)
def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
