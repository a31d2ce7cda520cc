"""The meters of this host: sampling, power at rest, and gaps that end when the device has recovered."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lem.base.dataclass import asdict, dataclass, field, replace
from lem.base.durable import reason_of
from lem.base.errors import UserError
from lem.base.launch import own_command
from lem.base.measurement import is_estimate, is_gpu_source
from lem.base.units import NS_PER_S
from lem.config.experiment import MeteredConfig
from lem.meters.attempt import Baselines
from lem.meters.hwmon import hwmon_gpus, metered_gpus
from lem.meters.interference import interference_now
from lem.meters.machine import named_gpus
from lem.meters.nvml import find_gpus, open_nvml
from lem.meters.rapl import find_rapl
from lem.meters.samples import (
    HWMON,
    PART_FILENAME,
    CpuUse,
    GpuSample,
    PartReader,
    Row,
    SampleLog,
    SampleLogError,
    read_tail,
)
from lem.meters.sensors import find_sensors
from lem.meters.usage import HERE, find_by_namespace, read_cpu_times
from lem.orchestration.dispatch import Worker
from lem.orchestration.served import find_server
from lem.orchestration.status import Event
from lem.record import Record
from lem.worker.channel import FIRST_PHASE, LOADED_PHASE, RunRequest
from lem.worker.children import SamplerProcess, interval_ms

_logger = logging.getLogger(__name__)

# The state of a device without an engine; with one, the state is the engine's key.
BARE = ""


def _state(name: str, clock_mhz: int | None) -> str:
    """A GPU whose clock is locked draws another power at rest. A power limit is above it and changes nothing."""
    return name if clock_mhz is None else f"{name} at {clock_mhz} MHz"


@dataclass(frozen=True)
class Reference:
    power_w: float
    temp_c: float | None  # of its hottest GPU; None without a sensor


class _Place(NamedTuple):
    gpus: tuple[str, ...]
    state: str
    source: str


@dataclass
class BaselineBook:
    _entries: dict[_Place, tuple[float, float]] = field(default_factory=dict)  # power in watts, and when
    # The devices at their first baseline in a state; none where no meter of theirs measured one.
    references: dict[tuple[tuple[str, ...], str], Reference] = field(default_factory=dict)

    def note(self, record: Record, engine_key: str, now_s: float, clock_mhz: int | None = None) -> None:
        idle, source, gpus = record.idle, record.energy.energy_source, record.environment.gpu_uuids
        if source is None:
            return
        bare, loaded = _state(BARE, clock_mhz), _state(engine_key, clock_mhz)
        if idle.idle_bare_power_w is not None and not record.validity.engine_reused:
            self._put(_Place(gpus, bare, source), idle.idle_bare_power_w, idle.idle_bare_temp_c, now_s)
        if idle.idle_loaded_power_w is not None and idle.baseline_age_s == 0.0:
            self._put(_Place(gpus, loaded, source), idle.idle_loaded_power_w, idle.idle_loaded_temp_c, now_s)

    def known(
        self, gpus: Sequence[str], engine_key: str, clock_mhz: int | None = None, *, ttl_s: float, now_s: float
    ) -> dict[str, Baselines]:
        found, bare, loaded = {}, _state(BARE, clock_mhz), _state(engine_key, clock_mhz)
        for source in dict.fromkeys(place.source for place in self._entries):
            fresh = {}
            for state in (bare, loaded):
                power_w, measured_s = self._entries.get(_Place(tuple(gpus), state, source), (0.0, float("-inf")))
                if now_s - measured_s <= ttl_s:
                    fresh[state] = (power_w, now_s - measured_s)
            if fresh:
                bare_w, _ = fresh.get(bare, (None, None))
                loaded_w, age_s = fresh.get(loaded, (None, None))
                found[source] = Baselines(bare_power_w=bare_w, loaded_power_w=loaded_w, age_s=age_s)
        return found

    def _put(self, place: _Place, power_w: float, temp_c: float | None, now_s: float) -> None:
        known_w, _ = self._entries.get(place, (None, None))
        if known_w == power_w:
            return  # exactly the value passed on: not measured again, so as old as before
        self._entries[place] = (power_w, now_s)
        if is_gpu_source(place.source):  # what a gap watches is the power of GPUs
            self.references.setdefault((place.gpus, place.state), Reference(power_w, temp_c))


_POLL_S = 1.0

# Whether temperature and power are back at the reference of this state; None while the sensors do not answer.
RecoveryProbe = Callable[[], "bool | None"]


class GapOutcome(NamedTuple):
    gap_s: float
    code: str


@dataclass(frozen=True)
class Rest:
    rested_s: float = math.inf  # before the first window, long enough for any gap
    gap: GapOutcome | None = None  # all of it as one gap

    def is_enough(self, cap_s: float) -> bool:
        return self.rested_s > 0 and self.rested_s >= cap_s

    def after(self, kept: GapOutcome) -> Rest:
        gap = GapOutcome(self.rested_s + kept.gap_s, kept.code)
        return Rest(math.inf if kept.code == "gap_recovered" else gap.gap_s, gap)


def keep_gap(
    cap_s: float,
    *,
    is_recovered: RecoveryProbe | None,  # called at once and then every second; None on a host without sensors
    monotonic: Callable[[], float],  # in seconds
    wait: Callable[[float], bool],  # sleeps, less when a stop is requested; returns whether it was
) -> GapOutcome:
    started_s = monotonic()
    if cap_s <= 0:
        return GapOutcome(0.0, "gap_none")
    has_answered = False
    while True:
        answer = is_recovered() if is_recovered is not None else None
        has_answered = has_answered or answer is not None
        elapsed_s = monotonic() - started_s
        if answer:
            return GapOutcome(elapsed_s, "gap_recovered")
        left_s = cap_s - elapsed_s
        if left_s <= 0:
            return GapOutcome(elapsed_s, "gap_cap_reached" if has_answered else "gap_no_sensors")
        if wait(left_s if is_recovered is None else min(_POLL_S, left_s)):
            return GapOutcome(monotonic() - started_s, "gap_interrupted")


# docs/measurement.md, step 7: within these of the reference, for as long as the sensors need to follow.
RECOVERED_TEMP_C = 3.0
RECOVERED_POWER_RATIO = 0.05
RECOVERED_OVER_S = 3.0

_GAP_INTERVAL_MS = 100
_STOP_TIMEOUT_S = 5.0
_NOT_WANTED = "neither energy nor a time series was asked for"


@dataclass(frozen=True)
class Attendance:
    request: RunRequest  # with what its worker has to know about the meters
    sampler: SamplerProcess | None = None  # the host's own

    _usage: deque[CpuUse] = field(default_factory=lambda: deque(maxlen=2))  # the last two readings

    def follow(self, event: Event, worker: Worker) -> Event:
        if event.kind == "phase" and self.sampler is not None:
            phase = event.data["phase"]
            # A container that is the server begins with the load.
            others = worker.server_pids() if phase == LOADED_PHASE else self.request.server_pids
            is_due = phase == FIRST_PHASE or (phase == LOADED_PHASE and others)
            if is_due and (pid := _find_engine(worker)) is not None:
                self.sampler.watch(pid, *others)
            self.sampler.set_interval(interval_ms(self.request.config, event.data["phase"]))
        if event.kind == "progress" and self.request.samples_path is not None:
            rows = read_tail(Path(self.request.samples_path))
            last_ns = self._usage[-1].at_ns if self._usage else 0
            used = (row for row in rows if isinstance(row, CpuUse) and row.run_s is not None)
            self._usage.extend(row for row in used if row.at_ns > last_ns)
            now = {"power_w": _power_now_w(rows, len(self.request.sampled_gpus)), **interference_now(self._usage)}
            return replace(event, data={**event.data, **now})
        return event


def _find_engine(worker: Worker) -> int | None:
    engine = worker.engine
    if engine is None or worker.shares_pids:
        return None if engine is None else engine.pid
    with contextlib.suppress(OSError):
        return find_by_namespace(HERE.proc, engine.pid, engine.started_ticks)
    return None


def _power_now_w(rows: Sequence[Row], gpus: int) -> float | None:
    """Of the GPUs, or of the sensors that cover them: those come after the GPUs."""
    latest = {row.gpu: row.power_w for row in rows if isinstance(row, GpuSample) and row.power_w is not None}
    sensed = [power_w for place, power_w in latest.items() if place >= gpus]
    return sum(sensed or latest.values()) if latest else None


@dataclass
class HostMeters:
    gpu_error: str | None  # why it cannot read GPUs; None when it can
    rapl_error: str | None  # why it cannot read CPU packages; None when it can
    usage_error: str | None = None  # why it cannot read who uses the CPUs; None when it can
    has_sensors: bool = False  # of a module, of CPUs or of the machine
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)  # names the visible GPUs
    command: Sequence[str] = field(default_factory=lambda: own_command(sys.executable))  # runs this lem
    monotonic: Callable[[], float] = time.monotonic  # in seconds
    book: BaselineBook = field(default_factory=BaselineBook)
    _state: tuple[tuple[str, ...], str] | None = None

    @classmethod
    def found(cls, environ: Mapping[str, str] = os.environ) -> HostMeters:
        with open_nvml() as nvml:
            gpu_error = nvml if isinstance(nvml, str) else None
            if gpu_error is None and not find_gpus():
                gpu_error = "NVML sees no GPU"
        if hwmon_gpus():
            gpu_error = None
        usage_error = None
        try:
            read_cpu_times(HERE.proc)
        except (OSError, ValueError) as error:
            usage_error = str(error)
        return cls(gpu_error, find_rapl().explained, usage_error, bool(find_sensors()), environ)

    @contextlib.contextmanager
    def attending(self, config: MeteredConfig, request: RunRequest) -> Iterator[Attendance]:
        """An attempt with a sampler beside it within the block; a UserError when that cannot be started."""
        # A worker in a container samples by itself what this host may not be able to see.
        server_pids, why_not = find_server(config, self.environ)
        is_unread = self.gpu_error is not None or why_not is not None
        visible = () if is_unread else metered_gpus(self.environ)
        gpus = tuple(gpu.uuid for gpu in named_gpus(config.gpus, visible))
        ttl_s = config.baseline.cache_ttl_sec
        known = self.book.known(gpus, request.engine_key, _clock_of(request), ttl_s=ttl_s, now_s=self.monotonic())
        baselines = {source: asdict(item) for source, item in known.items()}
        request = replace(request, baselines=baselines, server_pids=server_pids)
        path = Path(request.result_dir) / PART_FILENAME
        is_wanted = config.measurement.energy != "none" or config.timeseries.enabled
        is_here = is_wanted and why_not is None
        wanted, tdp_w = config.measurement.energy, config.measurement.cpu_tdp_w
        has_sensors = wanted == HWMON or (wanted == "auto" and self.has_sensors)
        if is_here and (gpus or self.rapl_error is None or is_estimate(wanted) or has_sensors):
            request = replace(request, samples_path=str(path), sampled_gpus=gpus)
            interval = interval_ms(request.config, "prepare")
            with self._sampling(path, gpus, interval, tdp_w, wanted) as sampler:
                yield Attendance(request, sampler)
            return
        is_due = is_here and request.executor == "docker" and not gpus and config.gpus != ()
        named = {"gpu": self.gpu_error, "rapl": self.rapl_error}
        errors = {name: why for name, error in named.items() if (why := error if is_wanted else _NOT_WANTED)}
        errors |= {"server": why_not} if why_not is not None else {}
        has_usage = is_wanted and not is_due and self.usage_error is None
        samples_path = str(path) if is_due or has_usage else None
        request = replace(request, samples_path=samples_path, is_worker_sampling=is_due, meter_errors=errors)
        try:
            with self._sampling(path, (), 0) if has_usage else contextlib.nullcontext() as sampler:
                yield Attendance(request, sampler)
        finally:
            _remove(path)  # the worker's, also where the attempt was interrupted

    def note(self, record: Record | None, request: RunRequest) -> None:
        self._state = None
        if record is not None:
            self.book.note(record, request.engine_key, self.monotonic(), _clock_of(request))
            # Of the gap, in which the GPUs have their own settings again.
            self._state = (record.environment.gpu_uuids, request.engine_key if request.keep_engine else BARE)

    @contextlib.contextmanager
    def watching(self) -> Iterator[RecoveryProbe | None]:
        """Whether the devices are back at their reference for the state they are in now; None without a reference."""
        reference = None if self._state is None else self.book.references.get(self._state)
        # GPUs only: no sensor of a CPU tells when it has recovered.
        if self._state is None or reference is None or not self._state[0] or self.gpu_error is not None:
            yield None
            return
        with contextlib.ExitStack() as stack:
            probe: RecoveryProbe | None = None
            try:
                folder = tempfile.mkdtemp(prefix="lem-gap-")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                path = Path(folder, PART_FILENAME)
                stack.enter_context(self._sampling(path, self._state[0], _GAP_INTERVAL_MS))
                probe = functools.partial(_ask, PartReader(path), reference)
            except (OSError, UserError) as error:
                _logger.warning("the gap lasts its full time, since nothing can be sampled: %s", error)
            yield probe

    @contextlib.contextmanager
    def _sampling(
        self, path: Path, gpus: Sequence[str], step_ms: int, tdp_w: float | None = None, energy: str = "none"
    ) -> Iterator[SamplerProcess]:
        sampler = SamplerProcess(self.command, path, gpus, step_ms, tdp_w, energy)
        try:
            yield sampler
            died = sampler.death()
            if died is not None:
                _logger.warning("%s", died)
        finally:
            sampler.stop(_STOP_TIMEOUT_S)
            _remove(path)


def _clock_of(request: RunRequest) -> int | None:
    clock_mhz: int | None = (request.config.get("gpu") or {}).get("lock_clock_mhz")
    return clock_mhz


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the attempt is over, and its result counts
        _logger.warning("%s cannot be removed: %s", path, reason_of(error))


def _ask(reader: PartReader, reference: Reference) -> bool | None:
    try:
        return has_recovered(reader.read(), reference)
    except (OSError, SampleLogError):
        return None  # the sampler has not started, or has ended


def has_recovered(log: SampleLog, reference: Reference) -> bool | None:
    """Whether GPUs are no warmer, and draw no more, than at their reference; None while the log is too short."""
    if not log.samples:
        return None
    since_ns = log.samples[-1].at_ns - round(RECOVERED_OVER_S * NS_PER_S)
    if log.samples[0].at_ns > since_ns:
        return None
    recent = [row for row in log.samples if row.at_ns >= since_ns]
    power_w = 0.0
    for gpu in range(len(log.header.gpus)):
        drawn = [row.power_w for row in recent if row.gpu == gpu and row.power_w is not None]
        if not drawn:
            return None
        power_w += statistics.fmean(drawn)
    if power_w > (1 + RECOVERED_POWER_RATIO) * reference.power_w:
        return False
    temps = [row.temp_c for row in recent if row.temp_c is not None]
    if reference.temp_c is None:
        return True
    return max(temps) <= reference.temp_c + RECOVERED_TEMP_C if temps else None
