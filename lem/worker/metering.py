"""The meters beside one experiment: what is waited for, what is marked in the sample log, and the figures at the end.

A sampler in another process writes the log. Here it is only read, before and after the window, never in it.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lem.base import durable, measurement
from lem.base.clock import Clock, seconds_between
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import EngineError, MeterRefused
from lem.base.measurement import (
    WINDOW_UPDATES,
    EnergySource,
    Measured,
    is_counter,
    is_cpu_source,
    is_gpu_source,
    known,
)
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import MeteredConfig, ProgramConfig
from lem.meters import samples
from lem.meters.attempt import AttemptLog, Baselines, span_of, without_still_counters
from lem.meters.curve import NotMeasured, Span, update_period_s
from lem.meters.energy import EnergyFindings, measure
from lem.meters.external import LEAST_READINGS, LONGEST_WINDOW_S, ExternalReadings, is_short_of, read_external
from lem.meters.machine import read_machine
from lem.meters.samples import Mark, Row, SampleHeader, SampleLog
from lem.meters.sources import LEAVE_AT_AUTO, Sources, choose_sources
from lem.meters.usage import HERE
from lem.worker.channel import RunRequest
from lem.worker.children import READY_TIMEOUT_S, wait_until_ready
from lem.worker.window import MeasuredWindow

_logger = logging.getLogger(__name__)

# docs/measurement.md, step 3: power is at rest once its mean over 10 s moves by less than 2 %; waited for 60 s at most.
SETTLE_WINDOW_S = 10.0
SETTLE_TOLERANCE = 0.02
SETTLE_CAP_S = 60.0

# A guard holds two updates of the slowest counter; before that is known, of one that is documented to be this slow.
GUARD_PERIODS = 2
UNKNOWN_PERIOD_S = 0.5

# A window holds WINDOW_UPDATES updates of the counter, or of a sensor whose power is integrated; such a sensor is
# updated every 100 ms at best (Yang et al., SC24).
SENSOR_PERIOD_S = 0.1

_EDGE_NS = 1_500_000_000  # a slow meter was last read up to a second ago
_EXTERNAL_LAG_S = 10.0  # a user's own meter writes its readings some time after they were taken
_LAG_S = 5.0  # a sampler that is further behind is not waited for
_POLL_S = 0.02
_REPORT_S = 1.0


class Reporter(Protocol):
    def phase(self, name: str) -> None:
        """A phase begins."""

    def progress(self, done: int, total: int | None, text: str) -> None:
        """How much of the phase is done."""


def open_metering(
    request: RunRequest, config: MeteredConfig, *, is_resident: bool, clock: Clock, reporter: Reporter
) -> Metering:
    """The meters, once the sampler writes; MeterRefused, or EngineError of kind `meter` if it does not write."""
    if config.measurement.external_csv is not None:
        # Refused now, not after an hour.
        read_external(Path(config.measurement.external_csv), config.measurement.external_unit)
    nothing = SampleHeader(
        started_ns=clock.monotonic_ns(),
        started_utc=clock.utc_now().isoformat(),
        host=str(request.identity.get("host", "")),
        interval_ms=0,
        machine=read_machine(HERE.proc, HERE.sys),
        gpu_error=request.meter_errors.get("gpu", "the host did not start a sampler"),
        rapl_error=request.meter_errors.get("rapl", "the host did not start a sampler"),
    )
    path = None if request.samples_path is None else Path(request.samples_path)
    deadline_ns = clock.monotonic_ns() + round(READY_TIMEOUT_S * NS_PER_S)
    if path is not None and not wait_until_ready(path, deadline_ns, clock):
        raise EngineError(f"{path}: no sampler has written to it for {READY_TIMEOUT_S:g} s", kind="meter")
    baselines = {by: Baselines(**fields) for by, fields in request.baselines.items() if config.baseline.enabled}
    metering = Metering(path, nothing, config, baselines, clock, reporter)
    metering.gpu_error = None if request.is_worker_sampling else request.meter_errors.get("gpu")
    metering.elsewhere = request.meter_errors.get("server")
    if metering.elsewhere is not None and config.measurement.energy not in ("auto", "none"):
        raise MeterRefused(f"measurement.energy: {config.measurement.energy}: {metering.elsewhere}", LEAVE_AT_AUTO)
    if not is_resident or request.server_pids:
        there, own = metering.find_processes(), frozenset(request.server_pids)
        metering.foreign = {uuid: tuple(pid for pid in pids if pid not in own) for uuid, pids in there.items()}
    metering.choose([gpu.uuid for gpu in metering.read().header.gpus])
    return metering


@dataclass
class Metering:
    path: Path | None  # what the sampler writes; None where nothing is sampled
    nothing: SampleHeader  # the header of the empty log where nothing is sampled
    config: MeteredConfig
    known_baselines: Mapping[str, Baselines]  # what the host knows of power at rest, by `energy_source`
    clock: Clock
    reporter: Reporter
    foreign: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # {uuid: pids} of before the engine's load
    gpu_error: str | None = None  # why the host cannot read GPUs
    elsewhere: str | None = None  # why no meter here measures the server that answers
    marks: list[Mark] = field(default_factory=list)
    own_pids: frozenset[int] | None = None  # the engine's as the sampler numbers them; None while unknown
    sources: Sources = field(init=False)  # what gives the energy; chosen again when the engine reports its GPUs

    def __post_init__(self) -> None:
        self._reader = None if self.path is None else samples.PartReader(self.path)

    def read(self) -> SampleLog:
        if self._reader is None:
            return SampleLog(self.nothing)
        with self._reading():
            log = self._reader.read()
        if (why := self.elsewhere) is not None:
            header = replace(log.header, gpus=(), zones=(), gpu_error=why, rapl_error=why, cpu_tdp_w=None)
            return SampleLog(header, loads=log.loads, usage=log.usage, clocks=log.clocks)
        if log.header.gpus or self.gpu_error is None:
            return log
        # A sampler without GPUs does not know why there are none.
        return replace(log, header=replace(log.header, gpu_error=self.gpu_error))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, samples.SampleLogError) as error:
            reason = durable.reason_of(error) if isinstance(error, OSError) else error
            raise EngineError(f"{self.path}: the samples cannot be read: {reason}", kind="meter") from error

    def _latest_ns(self, reader: samples.PartReader, *, is_loads: bool) -> int:
        kinds = _LOADS if is_loads else _ANY_LOADS if self.elsewhere is not None else _READINGS
        with self._reading():
            return reader.latest_ns(kinds)

    @property
    def baselines(self) -> Baselines:
        return self.known_baselines.get(self.sources.primary or "", Baselines())

    def choose(self, gpu_uuids: Sequence[str]) -> None:
        """Choose what gives the energy of an experiment on these GPUs, or on the CPU; raises MeterRefused."""
        self._gpu_uuids = tuple(gpu_uuids)
        self.sources = choose_sources(self.config, self._usable(self.read()).header, gpu_uuids, foreign=self.foreign)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        opened_ns = self.clock.monotonic_ns()
        yield
        self.marks.append(Mark(name, opened_ns, self.clock.monotonic_ns()))

    def rest_bare(self) -> None:
        """Measure power without an engine, unless it is known; MeterRefused if another program has come meanwhile."""
        if self.has_rest and self.baselines.bare_power_w is None:
            text = "idle without an engine"
            self._rest(self._guard_s, text)  # a meter is first read a moment after the sampler's start
            with self.during(measurement.IDLE_BARE):
                self._rest(self.config.baseline.duration_sec, text)
            self._rest(self._guard_s, text)  # the reading that closes it is taken at rest too
        # Prompts may have been fetched for minutes, and a rest takes its time.
        there = self.find_processes()
        if there != self.foreign:
            self.foreign = there
            self.choose([gpu.uuid for gpu in self.read().header.gpus])

    def rest_loaded(self) -> None:
        if not self.has_rest or self.baselines.loaded_power_w is not None:
            return
        begin_ns = self.clock.monotonic_ns()
        duration_s, text = self.config.baseline.duration_sec, "idle with the engine loaded"
        self._rest(2 * SETTLE_WINDOW_S, "settling")
        while not self._has_settled() and self._seconds_since(begin_ns) < SETTLE_CAP_S:
            self._rest(_REPORT_S, "settling")
        # The window over which it settled was rest already.
        settled_ns = self.clock.monotonic_ns() - round(min(SETTLE_WINDOW_S, duration_s) * NS_PER_S)
        self._rest(duration_s - SETTLE_WINDOW_S, text)
        self.marks.append(Mark(measurement.IDLE_LOADED, settled_ns, self.clock.monotonic_ns()))
        self._rest(self._guard_s, text)

    def rest_before(self) -> None:
        """As `rest_bare` for a program, outside of which nothing is loaded: both powers at rest are the same."""
        self.rest_bare()
        self.marks += [replace(mark, name=measurement.IDLE_LOADED) for mark in self.marks]

    def rest_after(self) -> None:
        if self.has_rest:
            with self.during(measurement.IDLE_POST):
                self._rest(self.config.baseline.duration_sec, "idle after the window")
            self._rest(self._guard_s, "idle after the window")

    @property
    def has_rest(self) -> bool:
        primary = self.sources.primary
        is_measured = is_gpu_source(primary) or primary in (EnergySource.RAPL, EnergySource.HWMON_SENSOR)
        return is_measured and self.config.baseline.enabled

    def _rest(self, duration_s: float, text: str) -> None:
        until_ns = self.clock.monotonic_ns() + round(max(0.0, duration_s) * NS_PER_S)
        total = math.ceil(duration_s)
        while (left_s := seconds_between(self.clock.monotonic_ns(), until_ns)) > 0:
            self.reporter.progress(max(0, total - math.ceil(left_s)), total, f"s {text}")
            self.clock.sleep(min(left_s, _REPORT_S))

    def _has_settled(self) -> bool:
        now_ns, length_ns = self.clock.monotonic_ns(), round(SETTLE_WINDOW_S * NS_PER_S)
        self._catch_up(now_ns)
        rest = AttemptLog(self.read(), (), self.sources)
        try:
            last_w = rest.rest_power_w(Span(now_ns - length_ns, now_ns - _EDGE_NS))
            before_w = rest.rest_power_w(Span(now_ns - 2 * length_ns, now_ns - length_ns))
        except NotMeasured:
            return False
        return abs(last_w - before_w) < SETTLE_TOLERANCE * before_w

    def window_floor_s(self) -> float:
        """The least length of the window: as configured, and long enough for the GPUs' meter; raises MeterRefused."""
        self.choose(self._gpu_uuids)
        period_s = 0.0
        if is_counter(self.sources.gpu_method):
            period_s = self._counter_period_s()
        elif self.sources.power_lag_s:
            period_s = max(SENSOR_PERIOD_S, self.sources.sample_period_s)
        external_s = (LEAST_READINGS + 1) * self._external_period_s()
        return max(self.config.measurement.min_window_sec, WINDOW_UPDATES * period_s, external_s)

    def _external_period_s(self) -> float:
        wanted = self.config.measurement
        with contextlib.suppress(MeterRefused):  # the file is read again after the window
            if wanted.external_csv is not None:
                period_s = read_external(Path(wanted.external_csv), wanted.external_unit).period_s or 0.0
                return period_s if (LEAST_READINGS + 1) * period_s <= LONGEST_WINDOW_S else 0.0
        return 0.0

    def measure_closed(self, run: Callable[[], MeasuredWindow]) -> MeasuredWindow:
        measured = self._between_guards(measurement.GUARD_BEFORE, run, measurement.GUARD_AFTER)
        self.marks.append(Mark(measurement.WINDOW, measured.opened_ns, measured.closed_ns))
        return measured

    def measure_prefill(self, run: Callable[[], MeasuredWindow]) -> None:
        measured = self._between_guards(measurement.PREFILL_GUARD_BEFORE, run, measurement.PREFILL_GUARD_AFTER)
        self.marks += [Mark(measurement.PREFILL, *edges) for edges in measured.passes_ns]

    def measure_steady(self, run: Callable[[], MeasuredWindow]) -> MeasuredWindow:
        guard_s = self._guard_s  # found before the window: after it there is an hour's log to read
        measured = run()
        self.marks.append(Mark(measurement.WINDOW, measured.opened_ns, measured.closed_ns))
        self._rest(guard_s, "guard")  # the reading that closes the window comes after its end
        return measured

    def _between_guards(self, before: str, run: Callable[[], MeasuredWindow], after: str) -> MeasuredWindow:
        guard_s = self._guard_s  # found before the guards, in which nothing else may run
        opened_ns = self.clock.monotonic_ns()
        self._rest(guard_s, "guard")
        measured = run()
        self.marks.append(Mark(before, opened_ns, measured.opened_ns))
        self._rest(guard_s, "guard")
        self.marks.append(Mark(after, measured.closed_ns, self.clock.monotonic_ns()))
        return measured

    @property
    def _guard_s(self) -> float:
        """Two readings of the slowest meter in use, and at least the lag of a sensor; 0 without any."""
        # A meter of the user's own counts as far as its readings do not make a window too long.
        period_s = samples.SLOW_PERIOD_S if is_cpu_source(self.sources.cpu_method) else 0.0
        if is_counter(self.sources.gpu_method):
            period_s = max(period_s, self._counter_period_s())
        elif self.sources.power_lag_s:
            period_s = max(period_s, self.sources.sample_period_s)
        return max(GUARD_PERIODS * max(period_s, self._external_period_s()), self.sources.least_guard_s)

    def _counter_period_s(self) -> float:
        warmup = span_of(self.marks, measurement.WARMUP)
        if warmup is None:
            return UNKNOWN_PERIOD_S
        log = self.read()
        try:
            return max(update_period_s(log.counters, place, warmup) for place in self.sources.gpus)
        except NotMeasured:
            return UNKNOWN_PERIOD_S

    def find_own_processes(self, known: frozenset[int] | None) -> frozenset[int] | None:
        """The engine's processes: as known since its load, else those that came with it."""
        # To be asked when the engine has worked, before the window.
        self.own_pids = known
        if known is None:
            asked_ns = self.clock.monotonic_ns()
            there = self.find_processes()
            log = self.read()
            # A GPU whose processes were not read may have some of the engine's.
            last_ns = log.loads[-1].at_ns if log.loads else log.header.started_ns
            if there and last_ns >= asked_ns and len(there) == len(log.header.gpus):
                others = {pid for pids in self.foreign.values() for pid in pids}
                self.own_pids = frozenset(pid for pids in there.values() for pid in pids) - others
        return self.own_pids

    def find_processes(self) -> dict[str, tuple[int, ...]]:
        """{uuid: pids} of the processes that compute on the sampled GPUs, as seen from now on."""
        # The sampler reads them once a second. What it saw before may be an engine that has ended since, or may miss
        # one that has begun. None is another program's where the whole machine is measured.
        if isinstance(self.config, ProgramConfig) and self.config.whole_machine:
            return {}
        if self.read().header.gpus:
            self._catch_up(self.clock.monotonic_ns(), is_loads=True)  # loads are written right after the processes
        return _processes_of(self.read())

    def surroundings(self, gpu_uuids: Sequence[str]) -> dict[str, Measured[tuple[str, ...]]]:
        log = self.read()
        seen = {gpu.uuid: gpu.vbios or "" for gpu in log.header.gpus}
        vbios = tuple(seen.get(uuid, "") for uuid in gpu_uuids)
        there, own = _processes_of(log), self.own_pids or ()
        other = tuple(f"process {pid} on {uuid}" for uuid in gpu_uuids for pid in there.get(uuid, ()) if pid not in own)
        is_known = self.own_pids is not None
        why = Reason.of("not_reported" if is_known else "own_processes_unknown")
        if not gpu_uuids:
            is_known, why = False, Reason.of("no_gpu_in_use")
        elif any(uuid not in seen for uuid in gpu_uuids):
            error = log.header.gpu_error
            is_known, why = False, Reason.of("sampler_reports", error=error) if error else Reason.of("gpus_unseen")
        return {
            "vbios": known(vbios if vbios and all(vbios) else None, why),
            "other_gpu_processes": known(other if is_known else None, why),
        }

    def close(self, folder: Path, measured: MeasuredWindow) -> EnergyFindings:
        """The figures of the attempt; the log is kept in its folder where that is wanted, or raises OSError."""
        self._catch_up(self.clock.monotonic_ns())
        self._choose_again()
        path = self.config.measurement.external_csv
        external = None if path is None else self._external_readings(Path(path))
        log = self.read()
        if self.config.timeseries.save and (path is not None or self._reader is not None):
            samples.write_finished(folder / samples.FINISHED_FILENAME, log, self.marks)
        repeats, own_pids = measured.repeats, self.own_pids
        return measure(self._attempt(log), window_repeats=repeats, external=external, own_pids=own_pids)

    def _attempt(self, log: SampleLog) -> AttemptLog:
        is_steady_mode = self.config.traffic_simulation.enabled
        return AttemptLog(self._usable(log), tuple(self.marks), self.sources, self.baselines, is_steady_mode)

    def _usable(self, log: SampleLog) -> SampleLog:
        return without_still_counters(log, span_of(self.marks, measurement.WINDOW))

    def _choose_again(self) -> None:
        try:
            self.choose(self._gpu_uuids)
        except MeterRefused as error:
            why = Reason.of("sampler_reports", error=error.message)
            reasons = {**self.sources.reasons, "gpu": why, "primary": why}
            self.sources = replace(self.sources, gpu_method=None, primary=None, scope=None, reasons=reasons)

    def _external_readings(self, path: Path) -> ExternalReadings:
        """The readings of the user's own meter, waited for until they cover the window."""
        # A file that cannot be read any more costs its own figure and not the whole measurement.
        begin_ns = self.clock.monotonic_ns()
        while True:
            try:
                readings = read_external(path, self.config.measurement.external_unit)
            except MeterRefused as error:
                return ExternalReadings(str(path), error=error.message)
            attempt = self._attempt(self.read())
            is_short = is_short_of(readings, attempt.log, attempt.window, attempt.reference_curves())
            if not is_short or self._seconds_since(begin_ns) >= _EXTERNAL_LAG_S:
                return readings
            self._rest(_REPORT_S, f"waiting for {path.name}")

    def _catch_up(self, until_ns: int, *, is_loads: bool = False) -> None:
        if self._reader is None:
            return
        while (latest_ns := self._latest_ns(self._reader, is_loads=is_loads)) < until_ns:
            if self._seconds_since(until_ns) > _LAG_S:
                _logger.warning("the sampler is %.1f s behind", seconds_between(latest_ns, until_ns))
                return
            self.clock.sleep(_POLL_S)

    def _seconds_since(self, moment_ns: int) -> float:
        return seconds_between(moment_ns, self.clock.monotonic_ns())


def _processes_of(log: SampleLog) -> dict[str, tuple[int, ...]]:
    return {log.header.gpus[row.gpu].uuid: row.pids for row in log.processes}


_LOADS: Sequence[type[Row]] = (samples.CpuLoad,)
_ANY_LOADS: Sequence[type[Row]] = (samples.CpuLoad, samples.CpuUse)  # where no meter here measures the server
_READINGS = (samples.CounterChange, samples.GpuSample, samples.RaplReading, *_ANY_LOADS)
