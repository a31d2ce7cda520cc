"""Every figure of a record that follows from its samples and its requests, recomputed, beside the recorded one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import measurement as names
from lem.base.dataclass import dataclass, fields, replace
from lem.base.measurement import EnergySource, Measured, Section, known
from lem.config.experiment import ExperimentConfig, MeteredConfig, ProgramConfig
from lem.config.sections import SloConfig
from lem.meters.attempt import AttemptLog, Baselines, span_of, without_still_counters
from lem.meters.energy import EnergyFindings, efficiency_of, measure
from lem.meters.external import ExternalReadings
from lem.meters.requestlog import REQUESTS_FILENAME, RequestLog, RequestLogError, read_requests
from lem.meters.samples import Mark, SampleLog
from lem.meters.sources import choose_sources
from lem.meters.work import WorkFindings, count_good, describe_work, goodput_of
from lem.record import RATES, Record, Work, carbon_of

# The same sums over the same rows differ by rounding at most.
_TOLERANCE = 1e-9

# What the user or the hardware says: no figure.
_NOT_COMPUTED = ("null_reasons", "name", *RATES)

# Left out of the comparison if the CSV is gone.
_FROM_CSV = ("energy.external_energy_j",)
_FROM_CSV_AS_PRIMARY = ("energy.energy_source", "energy.energy_scope", "efficiency.", "carbon.")


@dataclass(frozen=True)
class Difference:
    """A figure that does not agree, by its place in the record: `energy.gpu_energy_j`, `gpus[0].power_max_w`."""

    field: str
    recorded: Any
    recomputed: Any


@dataclass(frozen=True)
class Recomputed:
    compared: int  # figures; what is absent in the record and in its raw data is none
    differences: tuple[Difference, ...]  # figures that do not agree
    notes: tuple[str, ...] = ()  # what could not be compared, and why

    @property
    def agrees(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class RawData:
    log: SampleLog | None = None
    marks: Sequence[Mark] = ()
    external: ExternalReadings | None = None  # of the user's own meter
    requests: RequestLog | None = None
    prompts_sha256: str | None = None
    output_ids_sha256: str | None = None


def recompute(record: Record, config: MeteredConfig, raw: RawData) -> Recomputed:
    """The figures that follow from the raw data beside those of the record; MeterRefused if they do not fit."""
    work = record.work
    notes: tuple[str, ...] = ()
    pairs: list[Difference] = []
    if raw.requests is not None and isinstance(config, ExperimentConfig):
        done = describe_work(raw.requests, config)
        pairs += _work_pairs(record, done)
        work = replace(work, null_reasons={}, **{name: _value(item) for name, item in done.work.items()})
    if raw.log is not None:
        energy_pairs, notes = _energy_pairs(record, config, raw.log, raw, work)
        pairs += energy_pairs
    pairs += _digest_pairs(record, raw)
    pairs = [item for item in pairs if item.recorded is not None or item.recomputed is not None]
    return Recomputed(len(pairs), tuple(item for item in pairs if not _is_same(item.recorded, item.recomputed)), notes)


def recount(result: Path, record: Record, slo: SloConfig) -> Mapping[str, Section]:
    """The sections of a record in which other service levels change figures; `result` is its file."""
    try:
        good = count_good(read_requests(result.with_name(REQUESTS_FILENAME)), slo)
    except (OSError, RequestLogError) as error:
        good = known(None, "requests_unread", error=str(error))
    work = record.work.having(requests_good=good)
    tried = work.tried
    per_good = efficiency_of(record.energy.primary_j, work).measured("energy_per_good_request_j")
    return {
        "work": work,
        "throughput": record.throughput.having(**goodput_of(good, tried, record.window.window_s)),
        "efficiency": record.efficiency.having(energy_per_good_request_j=per_good),
    }


def _digest_pairs(record: Record, raw: RawData) -> Iterator[Difference]:
    """The digests of prompts and output ids where they differ: one that agrees is no figure, nor counts as one."""
    for name, recorded, found in (
        ("prompt_source.sha256", record.work.prompt_source.get("sha256"), raw.prompts_sha256),
        ("output_ids_sha256", record.work.output_ids_sha256, raw.output_ids_sha256),
    ):
        if None not in (recorded, found) and recorded != found:
            yield Difference(f"work.{name}", recorded, found)


def _value(item: Any) -> Any:
    return item.value if isinstance(item, Measured) else item


def _work_pairs(record: Record, found: WorkFindings) -> Iterator[Difference]:
    for name, values in (("window", found.window), ("work", found.work)):
        recorded: Section = getattr(record, name)
        for field, item in values.items():
            yield Difference(f"{name}.{field}", getattr(recorded, field), _value(item))
    yield from _of_section("throughput", record.throughput, found.throughput)
    for item in fields(found.latency):
        sides = [getattr(latency, item.name) for latency in (record.latency, found.latency)]
        if item.name == "null_reasons" or None in sides:
            yield from () if item.name == "null_reasons" else (Difference(f"latency.{item.name}", *sides),)
        else:
            yield from _of_section(f"latency.{item.name}", *sides)


def _of_section(name: str, recorded: Any, recomputed: Any) -> Iterator[Difference]:
    for item in fields(recorded):
        why = recorded.null_reasons.get(item.name)
        if item.name not in _NOT_COMPUTED and (why is None or why.code != "not_recorded"):
            yield Difference(f"{name}.{item.name}", getattr(recorded, item.name), getattr(recomputed, item.name))


def _energy_pairs(
    record: Record, config: MeteredConfig, log: SampleLog, raw: RawData, work: Work
) -> tuple[list[Difference], tuple[str, ...]]:
    marks = raw.marks
    log = without_still_counters(log, span_of(marks, names.WINDOW))
    uuids, idle = record.environment.gpu_uuids, record.idle
    load = None if record.validity.engine_reused else span_of(marks, names.LOAD)
    if isinstance(config, ProgramConfig):
        load = None if config.whole_machine else span_of(marks, names.WINDOW)
    # Processes that were there before the engine was loaded are not the engine's.
    before = [row for row in log.processes if load is not None and row.at_ns <= load.opened_ns]
    foreign = {log.header.gpus[row.gpu].uuid: row.pids for row in before}
    sources = choose_sources(config, log.header, uuids, foreign=foreign)
    # For power at rest that was measured before this experiment; marks come first.
    baselines = Baselines(idle.idle_bare_power_w, idle.idle_loaded_power_w, idle.baseline_age_s)
    attempt = AttemptLog(log, tuple(marks), sources, baselines, config.traffic_simulation.enabled)
    repeats = record.window.window_repeats if raw.requests is None else raw.requests.repeats
    findings = measure(attempt, window_repeats=repeats, external=raw.external)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if sources.is_external and raw.external is None and record.energy.external_energy_j is not None:
        left_out = _FROM_CSV + (_FROM_CSV_AS_PRIMARY if sources.primary == EnergySource.EXTERNAL else ())
        notes = (f"not compared, since {config.measurement.external_csv} cannot be read: {', '.join(left_out)}",)
    if idle.why_none("idle_net_power_w").code == "not_recorded" and idle.idle_loaded_post_power_w is not None:
        # Only power at rest before the window counted then.
        left_out += ("energy.gpu_energy_net_j",)
        notes += ("not compared, since an older lem computed it otherwise: energy.gpu_energy_net_j",)
    found = [item for item in _pairs(record, config, findings, work) if not item.field.startswith(left_out)]
    return found, notes


def has_requests(record: Record) -> bool:
    return record.window.why_none("in_flight_mean").code not in ("not_recorded", "program_unseen")


def has_energy(record: Record) -> bool:
    sections: tuple[Section, ...] = (record.energy, record.idle, *record.gpus)
    return any(
        getattr(section, item.name) is not None
        for section in sections
        for item in fields(section)
        if item.name not in ("uuid", "name", "null_reasons")
    )


def _pairs(record: Record, config: MeteredConfig, found: EnergyFindings, work: Work) -> Iterator[Difference]:
    primary_j = found.energy.primary_j
    sections: list[tuple[str, Section, Section]] = [
        ("energy", record.energy, found.energy),
        ("idle", record.idle, found.idle),
        ("efficiency", record.efficiency, efficiency_of(primary_j, work)),
        ("carbon", record.carbon, carbon_of(primary_j, config.measurement)),
    ]
    by_uuid = {gpu.uuid: gpu for gpu in found.gpus}
    for place, gpu in enumerate(record.gpus):
        if gpu.uuid in by_uuid:
            sections.append((f"gpus[{place}]", gpu, by_uuid[gpu.uuid]))
        else:
            yield Difference(f"gpus[{place}].uuid", gpu.uuid, None)
    for section, recorded, recomputed in sections:
        yield from _of_section(section, recorded, recomputed)


def _is_same(recorded: Any, recomputed: Any) -> bool:
    if isinstance(recorded, float) and isinstance(recomputed, (int, float)):
        return math.isclose(recorded, recomputed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(recorded == recomputed)
