"""Every energy figure of a record recomputed from its sample log, and whether it agrees with the recorded one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base import measurement as names
from lem.base.measured import Section
from lem.base.measurement import EnergySource
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import AttemptLog, Baselines, choose_sources, span_of, without_still_counters
from lem.meters.energy import EnergyFindings, carbon_of, efficiency_of, measure
from lem.meters.external import ExternalReadings
from lem.meters.samples import Mark, SampleLog
from lem.record import Record

# The same sums over the same rows differ by rounding at most.
_TOLERANCE = 1e-9

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
    compared: int  # figures
    differences: tuple[Difference, ...]  # figures that do not agree
    notes: tuple[str, ...] = ()  # what could not be compared, and why

    @property
    def agrees(self) -> bool:
        return not self.differences


def recompute(
    record: Record,
    config: ExperimentConfig,
    log: SampleLog,
    marks: Sequence[Mark],
    external: ExternalReadings | None = None,
) -> Recomputed:
    """The figures of the log beside those of the record.

    `external` are the readings of the user's own meter, if they still exist. Raises MeterRefused: the log has no meter
    that the configuration demands; it is not the log of this record.
    """
    log = without_still_counters(log, span_of(marks, names.WINDOW))
    uuids, idle = record.environment.gpu_uuids, record.idle
    load = None if record.validity.engine_reused else span_of(marks, names.LOAD)
    # Processes that were there before the engine was loaded are not the engine's.
    before = [row for row in log.processes if load is not None and row.at_ns <= load.opened_ns]
    foreign = {log.header.gpus[row.gpu].uuid: row.pids for row in before}
    sources = choose_sources(config, log.header, uuids, foreign=foreign)
    # For power at rest that was measured before this experiment; marks come first.
    baselines = Baselines(idle.idle_bare_power_w, idle.idle_loaded_power_w, idle.baseline_age_s)
    attempt = AttemptLog(log, tuple(marks), sources, baselines, config.traffic_simulation.enabled)
    findings = measure(attempt, window_repeats=record.window.window_repeats, external=external)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if sources.is_external and external is None and record.energy.external_energy_j is not None:
        left_out = _FROM_CSV + (_FROM_CSV_AS_PRIMARY if sources.primary == EnergySource.EXTERNAL else ())
        notes = (f"not compared, since {config.measurement.external_csv} cannot be read: {', '.join(left_out)}",)
    pairs = [item for item in _pairs(record, config, findings) if not item.field.startswith(left_out)]
    return Recomputed(len(pairs), tuple(item for item in pairs if not _is_same(item.recorded, item.recomputed)), notes)


def has_energy(record: Record) -> bool:
    sections: tuple[Section, ...] = (record.energy, record.idle, *record.gpus)
    return any(
        getattr(section, item.name) is not None
        for section in sections
        for item in dataclasses.fields(section)
        if item.name not in ("uuid", "name", "null_reasons")
    )


def _pairs(record: Record, config: ExperimentConfig, found: EnergyFindings) -> Iterator[Difference]:
    primary_j = found.energy.primary_j
    sections: list[tuple[str, Section, Section]] = [
        ("energy", record.energy, found.energy),
        ("idle", record.idle, found.idle),
        ("efficiency", record.efficiency, efficiency_of(primary_j, record.work)),
        ("carbon", record.carbon, carbon_of(primary_j, config.measurement)),
    ]
    by_uuid = {gpu.uuid: gpu for gpu in found.gpus}
    for place, gpu in enumerate(record.gpus):
        if gpu.uuid in by_uuid:
            sections.append((f"gpus[{place}]", gpu, by_uuid[gpu.uuid]))
        else:
            yield Difference(f"gpus[{place}].uuid", gpu.uuid, None)
    for section, recorded, recomputed in sections:
        for item in dataclasses.fields(recorded):
            if item.name not in ("null_reasons", "name") and recorded.why_none(item.name).code != "not_recorded":
                yield Difference(f"{section}.{item.name}", getattr(recorded, item.name), getattr(recomputed, item.name))


def _is_same(recorded: Any, recomputed: Any) -> bool:
    if isinstance(recorded, float) and isinstance(recomputed, (int, float)):
        return math.isclose(recorded, recomputed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(recorded == recomputed)
