"""Meters of this host: sampling, baselines, gaps that end when the device has recovered."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lem.base.errors import UserError
from lem.base.measurement import is_estimate, is_gpu_source
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.meters.nvml import find_gpus, named_gpus, open_nvml, visible_gpus
from lem.meters.rapl import find_rapl
from lem.meters.samples import PART_FILENAME, GpuSample, PartReader, SampleLog, SampleLogError, read_tail
from lem.meters.sources import Baselines
from lem.orchestration.attempt import WorkerEvent
from lem.record import Record
from lem.worker.channel import RunRequest
from lem.worker.launch import own_command
from lem.worker.sampling import SamplerProcess, interval_ms

# The state of a device without an engine; with one, the state is the engine's key.
BARE = ""


@dataclass(frozen=True)
class Reference:
    """A device at rest: power in watts and the temperature of its hottest GPU in °C; None without a sensor for it."""

    power_w: float
    temp_c: float | None


class _Place(NamedTuple):
    """What rested, how, and by which meter: the power of a GPU says nothing of that of a CPU."""

    gpus: tuple[str, ...]
    state: str
    source: str


@dataclass(frozen=True)
class _Entry:
    power_w: float
    measured_s: float


@dataclass
class BaselineBook:
    """What is known of power at rest, by the devices, the engine that is loaded on them, and the meter.

    Times are seconds of one monotonic clock.
    """

    _entries: dict[_Place, _Entry] = field(default_factory=dict)
    _references: dict[tuple[tuple[str, ...], str], Reference] = field(default_factory=dict)

    def note(self, record: Record, engine_key: str, now_s: float) -> None:
        """Take in what an experiment has measured itself; what it was given is known already."""
        idle, source, gpus = record.idle, record.energy.energy_source, record.environment.gpu_uuids
        if source is None:
            return
        if idle.idle_bare_power_w is not None and not record.validity.engine_reused:
            self._put(_Place(gpus, BARE, source), idle.idle_bare_power_w, idle.idle_bare_temp_c, now_s)
        if idle.idle_loaded_power_w is not None and idle.baseline_age_s == 0.0:
            self._put(_Place(gpus, engine_key, source), idle.idle_loaded_power_w, idle.idle_loaded_temp_c, now_s)

    def known(self, gpus: Sequence[str], engine_key: str, *, ttl_s: float, now_s: float) -> dict[str, Baselines]:
        """The baselines of these devices that are not older than `ttl_s`, by what measured them (`energy_source`)."""
        found = {}
        for source in dict.fromkeys(place.source for place in self._entries):
            places = (_Place(tuple(gpus), state, source) for state in (BARE, engine_key))
            bare, loaded = (self._fresh(place, ttl_s, now_s) for place in places)
            if bare is not None or loaded is not None:
                found[source] = Baselines(
                    bare_power_w=None if bare is None else bare.power_w,
                    loaded_power_w=None if loaded is None else loaded.power_w,
                    age_s=None if loaded is None else now_s - loaded.measured_s,
                )
        return found

    def reference(self, gpus: Sequence[str], state: str) -> Reference | None:
        """What the devices were like at their first baseline in this state; None where no meter of theirs told."""
        return self._references.get((tuple(gpus), state))

    def _put(self, place: _Place, power_w: float, temp_c: float | None, now_s: float) -> None:
        entry = self._entries.get(place)
        if entry is not None and entry.power_w == power_w:
            return  # to the last bit what was handed on: not measured again, so as old as before
        self._entries[place] = _Entry(power_w, now_s)
        if is_gpu_source(place.source):  # what a gap watches is the power of GPUs
            self._references.setdefault((place.gpus, place.state), Reference(power_w, temp_c))

    def _fresh(self, place: _Place, ttl_s: float, now_s: float) -> _Entry | None:
        entry = self._entries.get(place)
        return entry if entry is not None and now_s - entry.measured_s <= ttl_s else None


# Why a gap ended, as the record's `gap_end_reason` says it.
RECOVERED = Reason.of("gap_recovered")
CAP_REACHED = Reason.of("gap_cap_reached")
NO_SENSORS = Reason.of("gap_no_sensors")
NO_GAP = Reason.of("gap_none")
INTERRUPTED = Reason.of("gap_interrupted")

POLL_S = 1.0

RecoveryProbe = Callable[[], "bool | None"]
"""Whether temperature and power are back at the reference of this state; None while the sensors give no answer."""


class GapOutcome(NamedTuple):
    """How long a gap took in seconds, and why it ended."""

    gap_s: float
    reason: Reason


def keep_gap(
    cap_s: float,
    *,
    is_recovered: RecoveryProbe | None,
    monotonic: Callable[[], float],
    wait: Callable[[float], bool],
    poll_s: float = POLL_S,
) -> GapOutcome:
    """How the gap went: it ends once the device is back, at the latest after `cap_s` seconds.

    Without a probe, or with one that never answers, it is the whole gap.

    Args:
        is_recovered: asked first at once and then every `poll_s` seconds; None on a host without sensors.
        monotonic: seconds that never go back.
        wait: sleeps that many seconds, less when the campaign is asked to stop; whether it was.
    """
    started_s = monotonic()
    if cap_s <= 0:
        return GapOutcome(0.0, NO_GAP)
    has_answered = False
    while True:
        answer = is_recovered() if is_recovered is not None else None
        has_answered = has_answered or answer is not None
        elapsed_s = monotonic() - started_s
        if answer:
            return GapOutcome(elapsed_s, RECOVERED)
        left_s = cap_s - elapsed_s
        if left_s <= 0:
            return GapOutcome(elapsed_s, CAP_REACHED if has_answered else NO_SENSORS)
        if wait(left_s if is_recovered is None else min(poll_s, left_s)):
            return GapOutcome(monotonic() - started_s, INTERRUPTED)


_logger = logging.getLogger(__name__)

# docs/measurement.md, step 7: within these of the reference, here for as long as the sensors take to tell.
RECOVERED_TEMP_C = 3.0
RECOVERED_POWER_RATIO = 0.05
RECOVERED_OVER_S = 3.0

_GAP_INTERVAL_MS = 100
_STOP_TIMEOUT_S = 5.0
_NOT_WANTED = "neither energy nor a time series was asked for"


@dataclass(frozen=True)
class Attendance:
    """An attempt that the meters attend.

    Attributes:
        request: with what its worker is to know of the meters.
        sampler: the host's own; None where it has none.
    """

    request: RunRequest
    sampler: SamplerProcess | None = None

    def follow(self, event: WorkerEvent) -> WorkerEvent:
        """The event with the power that is drawn now; and sample as a phase that begins wants it."""
        if self.sampler is None:
            return event
        if event.kind == "phase" and event.phase is not None:
            self.sampler.set_interval(interval_ms(self.request.config, event.phase))
        if event.kind == "progress" and self.request.sampled_gpus:
            return dataclasses.replace(event, power_w=_power_now_w(self.sampler.output))
        return event


def _power_now_w(path: Path) -> float | None:
    """The sum of what the GPUs drew when they were last looked at; None where the log's end does not tell."""
    latest: dict[int, float] = {}
    for row in read_tail(path):
        if isinstance(row, GpuSample) and row.power_w is not None:
            latest[row.gpu] = row.power_w
    return sum(latest.values()) if latest else None


@dataclass
class HostMeters:
    """What this host can read, and what it has learned of its devices at rest.

    Attributes:
        gpu_error, rapl_error: why it cannot read GPUs, or CPU packages; None when it can.
        environ: says which GPUs are visible.
        command: what runs this lem.
        monotonic: seconds that never go back.
    """

    gpu_error: str | None
    rapl_error: str | None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    command: Sequence[str] = field(default_factory=lambda: own_command(sys.executable))
    monotonic: Callable[[], float] = time.monotonic
    book: BaselineBook = field(default_factory=BaselineBook)
    _state: tuple[tuple[str, ...], str] | None = None

    @classmethod
    def found(cls, environ: Mapping[str, str] = os.environ) -> HostMeters:
        """The meters of this host as they can be read now."""
        gpu_error: str | None = None
        with open_nvml() as nvml:
            if isinstance(nvml, str):
                gpu_error = nvml
            elif not find_gpus():
                gpu_error = "NVML sees no GPU"
        return cls(gpu_error, find_rapl().explained, environ)

    @contextlib.contextmanager
    def attending(self, config: ExperimentConfig, request: RunRequest) -> Iterator[Attendance]:
        """An attempt with a sampler beside it within the block.

        A worker in a container is asked to sample by itself what this host may not be able to see.

        Raises:
            UserError: the sampler cannot be started.
        """
        gpus = self._gpus(config)
        request = dataclasses.replace(request, baselines=self._baselines(config, gpus, request.engine_key))
        path = Path(request.result_dir) / PART_FILENAME
        is_wanted = config.measurement.energy != "none" or config.timeseries.enabled
        if is_wanted and self._has_something_to_read(config, gpus):
            request = dataclasses.replace(request, samples_path=str(path), sampled_gpus=gpus)
            with self._sampling(
                path, gpus, interval_ms(request.config, "prepare"), config.measurement.cpu_tdp_w
            ) as sampler:
                yield Attendance(request, sampler)
            return
        is_due = is_wanted and request.executor == "docker" and not gpus and config.gpus != ()
        errors = self._errors() if is_wanted else {"gpu": _NOT_WANTED, "rapl": _NOT_WANTED}
        path_seen = str(path) if is_due else None
        try:
            yield Attendance(
                dataclasses.replace(request, samples_path=path_seen, is_sampler_due=is_due, meter_errors=errors)
            )
        finally:
            path.unlink(missing_ok=True)  # the worker's, also where the attempt was broken off

    def note(self, record: Record | None, request: RunRequest) -> None:
        """Learn from an attempt: what its devices were like at rest, and what is left on them."""
        if record is None:
            self._state = None
            return
        self.book.note(record, request.engine_key, self.monotonic())
        gpus = record.environment.gpu_uuids
        self._state = (gpus, request.engine_key if request.keep_engine else BARE)

    @contextlib.contextmanager
    def watching(self) -> Iterator[RecoveryProbe | None]:
        """Whether the devices are back at their reference for the state they are in now; None without a reference."""
        reference = None if self._state is None else self.book.reference(*self._state)
        if self._state is None or reference is None or not self._has_sensors():
            yield None
            return
        with contextlib.ExitStack() as stack:
            probe: RecoveryProbe | None = None
            try:
                folder = tempfile.mkdtemp(prefix="lem-gap-")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                path = Path(folder, PART_FILENAME)
                stack.enter_context(self._sampling(path, self._state[0], _GAP_INTERVAL_MS, None))
                reader = PartReader(path)
                probe = lambda: _ask(reader, reference)  # noqa: E731 - it closes over what was begun here
            except (OSError, UserError) as error:
                _logger.warning("the whole gap is kept, since nothing can be sampled in it: %s", error)
            yield probe

    def _has_sensors(self) -> bool:
        """Whether the devices of the last attempt can be watched: GPUs only, since nothing tells how warm a CPU is."""
        return self._state is not None and bool(self._state[0]) and self.gpu_error is None

    def _gpus(self, config: ExperimentConfig) -> tuple[str, ...]:
        if self.gpu_error is not None:
            return ()
        return tuple(gpu.uuid for gpu in named_gpus(config.gpus, visible_gpus(find_gpus(), self.environ)))

    def _has_something_to_read(self, config: ExperimentConfig, gpus: Sequence[str]) -> bool:
        return bool(gpus) or self.rapl_error is None or is_estimate(config.measurement.energy)

    def _errors(self) -> dict[str, str]:
        named = {"gpu": self.gpu_error, "rapl": self.rapl_error}
        return {name: error for name, error in named.items() if error is not None}

    def _baselines(
        self, config: ExperimentConfig, gpus: tuple[str, ...], engine_key: str
    ) -> dict[str, dict[str, float | None]]:
        known = self.book.known(gpus, engine_key, ttl_s=config.baseline.cache_ttl_sec, now_s=self.monotonic())
        return {source: dataclasses.asdict(baselines) for source, baselines in known.items()}

    @contextlib.contextmanager
    def _sampling(
        self, path: Path, gpus: Sequence[str], interval: int, tdp_w: float | None
    ) -> Iterator[SamplerProcess]:
        """A sampler within the block; its log goes with it, since the worker keeps what is to be kept."""
        sampler = SamplerProcess.start(self.command, path, gpus, interval, tdp_w)
        try:
            yield sampler
            died = sampler.death()
            if died is not None:
                _logger.warning("%s", died)
        finally:
            sampler.stop(_STOP_TIMEOUT_S)
            path.unlink(missing_ok=True)


def _ask(reader: PartReader, reference: Reference) -> bool | None:
    try:
        return has_recovered(reader.read(), reference)
    except (OSError, SampleLogError):
        return None  # the sampler has not begun, or has ended


def has_recovered(log: SampleLog, reference: Reference) -> bool | None:
    """Whether GPUs are no warmer, and take no more, than at their reference; None while the log does not tell.

    Power is the sum of each one's mean over the last seconds, temperature that of the hottest. What is below its
    reference is not waited for: no gap would warm it up.
    """
    if not log.samples:
        return None
    since_ns = log.samples[-1].at_ns - round(RECOVERED_OVER_S * NS_PER_S)
    if log.samples[0].at_ns > since_ns:
        return None
    recent = [row for row in log.samples if row.at_ns >= since_ns]
    power_w = 0.0
    for gpu in range(len(log.header.gpus)):
        told = [row.power_w for row in recent if row.gpu == gpu and row.power_w is not None]
        if not told:
            return None
        power_w += statistics.fmean(told)
    if power_w > (1 + RECOVERED_POWER_RATIO) * reference.power_w:
        return False
    temps = [row.temp_c for row in recent if row.temp_c is not None]
    if reference.temp_c is None or not temps:
        return None if reference.temp_c is not None else True
    return max(temps) <= reference.temp_c + RECOVERED_TEMP_C
