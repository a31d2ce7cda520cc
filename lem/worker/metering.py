"""The meters beside one experiment: what is waited for, what is marked in the sample log, and the figures at the end.

A sampler in another process writes the log. Here it is only read, before and after the window, never in it.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lem.base import measurement
from lem.base.clock import Clock, seconds_between
from lem.base.errors import MeterRefused
from lem.base.measurement import WINDOW_UPDATES, EnergySource, is_cpu_source, is_gpu_source
from lem.base.units import NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.meters.curve import NotMeasured, Span, update_period_s
from lem.meters.energy import EnergyFindings, mean_power_w, measure
from lem.meters.external import ExternalReadings, is_short_of, read_external
from lem.meters.samples import FINISHED_FILENAME, SLOW_PERIOD_S, Mark, SampleLog, write_finished
from lem.meters.sources import Baselines, Sources, choose_sources
from lem.meters.window import span_of
from lem.worker.channel import RunRequest
from lem.worker.environment import GpuSurroundings
from lem.worker.sampling import NothingSampled, SampleSource, open_source
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
# brought up to date every 100 ms at best (Yang et al., SC24).
SENSOR_PERIOD_S = 0.1

# A slow meter was last read up to a second ago.
_EDGE_NS = 1_500_000_000

# A meter of the user's own writes its readings some time after they were taken.
_EXTERNAL_LAG_S = 10.0

# How far a sampler may lag behind before what it has written so far is taken for all.
_LAG_S = 5.0
_POLL_S = 0.02
_REPORT_S = 1.0


class Reporter(Protocol):
    """Whoever wants to know how far a wait is."""

    def progress(self, done: int, total: int | None, text: str) -> None:
        """How much of the phase is done."""


def open_metering(
    request: RunRequest, config: ExperimentConfig, *, is_resident: bool, clock: Clock, reporter: Reporter
) -> Metering:
    """The meters of an attempt, ready to be read.

    Args:
        is_resident: its engine is loaded already, so that what is on the GPU now may be its own.

    Raises:
        MeterRefused: the configuration demands energy that cannot be measured here.
        EngineError: kind `meter`, the sampler that was promised does not write.
    """
    if config.measurement.external_csv is not None:
        read_external(Path(config.measurement.external_csv))  # refused now, not after an hour
    source = open_source(request, clock)
    known = request.baselines if config.baseline.enabled else {}
    baselines = {by: Baselines(**fields) for by, fields in known.items()}
    metering = Metering(source, config, baselines, {}, clock, reporter)
    if not is_resident:
        metering.foreign = metering.look_at_processes()
    metering.choose([gpu.uuid for gpu in source.read().header.gpus])
    return metering


@dataclass
class Metering:
    """What the meters are asked in the course of one attempt.

    Attributes:
        known_baselines: what the host knows of power at rest, by what measured it (`energy_source`).
        foreign: {uuid: pids} of compute processes that were there before the engine.
        sources: what gives the energy; chosen again when the engine says which GPUs it runs on.
        marks: set so far.
        own_pids: the engine's processes as the sampler numbers them; None while that is not known.
    """

    source: SampleSource
    config: ExperimentConfig
    known_baselines: Mapping[str, Baselines]
    foreign: Mapping[str, tuple[int, ...]]
    clock: Clock
    reporter: Reporter
    marks: list[Mark] = field(default_factory=list)
    own_pids: frozenset[int] | None = None
    _sources: Sources | None = None

    @property
    def sources(self) -> Sources:
        """What gives the energy."""
        if self._sources is None:
            raise RuntimeError("sources were not chosen")
        return self._sources

    @property
    def baselines(self) -> Baselines:
        """What the host knows of power at rest by the meter that counts."""
        return self.known_baselines.get(self.sources.primary or "", Baselines())

    def choose(self, gpu_uuids: Sequence[str]) -> None:
        """Choose what gives the energy of an experiment on these GPUs; without any it runs on the CPU.

        Raises:
            MeterRefused: the configuration demands energy that cannot be measured here.
        """
        self._sources = choose_sources(
            self.config, self.source.read().header, gpu_uuids, is_cpu=not gpu_uuids, foreign=self.foreign
        )

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Mark what happens within the block."""
        opened_ns = self.clock.monotonic_ns()
        yield
        self.marks.append(Mark(name, opened_ns, self.clock.monotonic_ns()))

    # Power at rest

    def rest_bare(self) -> None:
        """Measure power without an engine, unless it is known; what is on the GPUs when it ends is not the engine's.

        Raises:
            MeterRefused: the configuration demands energy, and another program has come meanwhile.
        """
        if self._has_rest and self.baselines.bare_power_w is None:
            text = "idle without an engine"
            self._rest(self._guard_s, text)  # a meter is first read a moment after the sampler's start
            with self.during(measurement.IDLE_BARE):
                self._rest(self.config.baseline.duration_sec, text)
            self._rest(self._guard_s, text)  # what closes it is read at rest too
        # Prompts may have been fetched for minutes, and a rest takes its time.
        there = self.look_at_processes()
        if there != self.foreign:
            self.foreign = there
            self.choose([gpu.uuid for gpu in self.source.read().header.gpus])

    def rest_loaded(self) -> None:
        """Measure power with the engine loaded, unless it is known: once it has settled, or after a minute."""
        if not self._has_rest or self.baselines.loaded_power_w is not None:
            return
        begin_ns = self.clock.monotonic_ns()
        duration_s = self.config.baseline.duration_sec
        self._rest(2 * SETTLE_WINDOW_S, "settling")
        while not self._has_settled() and self._seconds_since(begin_ns) < SETTLE_CAP_S:
            self._rest(_REPORT_S, "settling")
        # What it has settled over was rest already.
        settled_ns = self.clock.monotonic_ns() - round(min(SETTLE_WINDOW_S, duration_s) * NS_PER_S)
        self._rest(duration_s - SETTLE_WINDOW_S, "idle with the engine loaded")
        self.marks.append(Mark(measurement.IDLE_LOADED, settled_ns, self.clock.monotonic_ns()))
        self._rest(self._guard_s, "idle with the engine loaded")  # what closes it is read at rest too

    def rest_after(self) -> None:
        """Measure power with the engine loaded once more, after the window."""
        if self._has_rest:
            with self.during(measurement.IDLE_POST):
                self._rest(self.config.baseline.duration_sec, "idle after the window")
            self._rest(self._guard_s, "idle after the window")  # what closes it is read at rest too

    @property
    def _has_rest(self) -> bool:
        """Whether power at rest is wanted, and a meter tells it; an estimate from load has none."""
        is_told = is_gpu_source(self.sources.primary) or self.sources.primary == EnergySource.RAPL
        return is_told and self.config.baseline.enabled

    def _rest(self, duration_s: float, text: str) -> None:
        until_ns = self.clock.monotonic_ns() + round(max(0.0, duration_s) * NS_PER_S)
        total = math.ceil(duration_s)
        while (left_s := seconds_between(self.clock.monotonic_ns(), until_ns)) > 0:
            self.reporter.progress(max(0, total - math.ceil(left_s)), total, f"s {text}")
            self.clock.sleep(min(left_s, _REPORT_S))

    def _has_settled(self) -> bool:
        now_ns, length_ns = self.clock.monotonic_ns(), round(SETTLE_WINDOW_S * NS_PER_S)
        self._catch_up(now_ns)
        log = self.source.read()
        try:
            last_w = mean_power_w(log, self.sources, Span(now_ns - length_ns, now_ns - _EDGE_NS))
            before_w = mean_power_w(log, self.sources, Span(now_ns - 2 * length_ns, now_ns - length_ns))
        except NotMeasured:
            return False
        return abs(last_w - before_w) < SETTLE_TOLERANCE * before_w

    # The window

    def window_floor_s(self) -> float:
        """The least length of the window: as configured, and long enough for the meter of the GPUs."""
        least_s = self.config.measurement.min_window_sec
        if self.sources.gpu_method is None:
            return least_s
        if self.sources.gpu_method == EnergySource.COUNTER:
            return max(least_s, WINDOW_UPDATES * self._counter_period_s())
        return max(least_s, WINDOW_UPDATES * max(SENSOR_PERIOD_S, self.sources.sample_period_s))

    def measure_closed(self, run: Callable[[], MeasuredWindow]) -> MeasuredWindow:
        """What a closed batch was measured to be, with idle guards around it."""
        measured = self._between_guards(measurement.GUARD_BEFORE, run, measurement.GUARD_AFTER)
        self.marks.append(Mark(measurement.WINDOW, measured.opened_ns, measured.closed_ns))
        return measured

    def measure_prefill(self, run: Callable[[], MeasuredWindow]) -> None:
        """Mark passes over the prompts for their prefill alone, with guards of their own."""
        measured = self._between_guards(measurement.PREFILL_GUARD_BEFORE, run, measurement.PREFILL_GUARD_AFTER)
        self.marks += [Mark(measurement.PREFILL, *edges) for edges in measured.passes_ns]

    def measure_steady(self, run: Callable[[], MeasuredWindow]) -> MeasuredWindow:
        """What a window under load was measured to be."""
        guard_s = self._guard_s  # found before the window: behind it there is an hour's log to read
        measured = run()
        self.marks.append(Mark(measurement.WINDOW, measured.opened_ns, measured.closed_ns))
        self._rest(guard_s, "guard")  # the reading that closes the window comes after its end
        return measured

    def _between_guards(self, before: str, run: Callable[[], MeasuredWindow], after: str) -> MeasuredWindow:
        guard_s = self._guard_s  # found before the guards, in which nothing else goes on
        opened_ns = self.clock.monotonic_ns()
        self._rest(guard_s, "guard")
        measured = run()
        self.marks.append(Mark(before, opened_ns, measured.opened_ns))
        self._rest(guard_s, "guard")
        self.marks.append(Mark(after, measured.closed_ns, self.clock.monotonic_ns()))
        return measured

    @property
    def _guard_s(self) -> float:
        """Two updates of the slowest meter in use, and as long as a sensor lags behind; 0 without any."""
        return max(GUARD_PERIODS * self._slowest_period_s(), self.sources.least_guard_s)

    def know_own_processes(self, known: frozenset[int] | None) -> frozenset[int] | None:
        """The engine's processes: as known since its load, else those that came with it.

        To be asked when the engine has worked, before the window.
        """
        self.own_pids = known
        if known is None:
            asked_ns = self.clock.monotonic_ns()
            there = self.look_at_processes()
            log = self.source.read()
            # One that was not looked at, or could not be, is not known to be free of the engine.
            if there and _latest_ns(log, _loads) >= asked_ns and len(there) == len(log.header.gpus):
                others = {pid for pids in self.foreign.values() for pid in pids}
                self.own_pids = frozenset(pid for pids in there.values() for pid in pids) - others
        return self.own_pids

    def look_at_processes(self) -> dict[str, tuple[int, ...]]:
        """{uuid: pids} of the processes that compute on the sampled GPUs, as seen from now on.

        The sampler looks once a second. What it saw before may be an engine that has ended since, or not yet the one
        that has begun.
        """
        header = self.source.read().header
        if header.gpus:
            self._catch_up(self.clock.monotonic_ns(), _loads)  # written right after the processes
        return {header.gpus[row.gpu].uuid: row.pids for row in self.source.read().processes}

    def _slowest_period_s(self) -> float:
        """The longest time between two readings of a meter that is used; 0 without one."""
        methods = (self.sources.gpu_method, self.sources.cpu_method)
        periods = [0.0]
        if EnergySource.COUNTER in methods:
            periods.append(self._counter_period_s())
        elif self.sources.gpu_method is not None:
            periods.append(self.sources.sample_period_s)
        if is_cpu_source(self.sources.cpu_method):
            periods.append(SLOW_PERIOD_S)
        return max(periods)

    def _counter_period_s(self) -> float:
        """How often the slowest counter was brought up to date under the load of the warm-up."""
        warmup = span_of(self.marks, measurement.WARMUP)
        if warmup is None:
            return UNKNOWN_PERIOD_S
        log = self.source.read()
        try:
            return max(update_period_s(log.counters, place, warmup) for place in self.sources.gpus)
        except NotMeasured:
            return UNKNOWN_PERIOD_S

    # The end

    def close(self, folder: Path, measured: MeasuredWindow, *, is_steady_mode: bool) -> EnergyFindings:
        """The figures of the attempt; the log they come from is kept in its folder where that is wanted.

        Raises:
            OSError: the log cannot be written.
        """
        self._catch_up(self.clock.monotonic_ns())
        log = self.source.read()
        path = self.config.measurement.external_csv
        external = None if path is None else self._external_readings(Path(path), log, measured)
        if self.config.timeseries.save and (path is not None or not isinstance(self.source, NothingSampled)):
            write_finished(folder / FINISHED_FILENAME, log, self.marks)
        return measure(
            log,
            self.marks,
            self.sources,
            self.baselines,
            is_steady_mode=is_steady_mode,
            window_repeats=measured.repeats,
            external=external,
            own_pids=self.own_pids,
        )

    def _external_readings(self, path: Path, log: SampleLog, measured: MeasuredWindow) -> ExternalReadings:
        """What the user's own meter told, waited for as long as it has not told of the window's end.

        A file that cannot be read any more costs its own figure and not the whole measurement.
        """
        window = Span(measured.opened_ns, measured.closed_ns)
        begin_ns = self.clock.monotonic_ns()
        try:
            readings = read_external(path)
            while is_short_of(readings, log, window) and self._seconds_since(begin_ns) < _EXTERNAL_LAG_S:
                self._rest(_REPORT_S, f"waiting for {path.name}")
                readings = read_external(path)
        except MeterRefused as error:
            return ExternalReadings(str(path), error=error.message)
        return readings

    def surroundings(self, gpu_uuids: Sequence[str]) -> GpuSurroundings:
        """What the sampler told of these GPUs beside their figures."""
        if not gpu_uuids:
            return GpuSurroundings()
        header = self.source.read().header
        seen = {gpu.uuid: gpu for gpu in header.gpus}
        if any(uuid not in seen for uuid in gpu_uuids):
            return GpuSurroundings(null_reason=header.gpu_error or "the sampler does not see the GPUs in use")
        vbios = tuple(seen[uuid].vbios or "" for uuid in gpu_uuids)
        own = self.own_pids
        there = {header.gpus[row.gpu].uuid: row.pids for row in self.source.read().processes}
        others = tuple(
            f"process {pid} on {uuid}" for uuid in gpu_uuids for pid in there.get(uuid, ()) if pid not in (own or ())
        )
        return GpuSurroundings(
            vbios if all(vbios) else None,
            others if own is not None else None,
            "the driver does not tell" if own is not None else "which processes are the engine's is not known",
        )

    def _catch_up(self, until_ns: int, rows_of: Callable[[SampleLog], Sequence[object]] | None = None) -> None:
        """Wait until the sampler has written what it read up to a moment; one that lags too far is not waited for.

        Args:
            rows_of: those to wait for; None for any.
        """
        if isinstance(self.source, NothingSampled):
            return
        while (latest_ns := _latest_ns(self.source.read(), rows_of)) < until_ns:
            if self._seconds_since(until_ns) > _LAG_S:
                _logger.warning("the sampler is %.1f s behind", seconds_between(latest_ns, until_ns))
                return
            self.clock.sleep(_POLL_S)

    def _seconds_since(self, moment_ns: int) -> float:
        return seconds_between(moment_ns, self.clock.monotonic_ns())


def _loads(log: SampleLog) -> Sequence[object]:
    return log.loads


def _latest_ns(log: SampleLog, rows_of: Callable[[SampleLog], Sequence[object]] | None) -> int:
    """When the last of these rows was read."""
    groups: Sequence[Sequence[object]] = (
        (log.counters, log.samples, log.rapl, log.loads) if rows_of is None else (rows_of(log),)
    )
    return max((getattr(rows[-1], "at_ns", 0) for rows in groups if rows), default=log.header.started_ns)
