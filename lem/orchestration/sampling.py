"""The meters as the host uses them: a sampler beside each attempt, and one in each gap to tell when it may end."""

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

from lem.config.experiment_config import ExperimentConfig
from lem.errors import UserError
from lem.experiment.channel import RunRequest
from lem.experiment.launch import own_command
from lem.experiment.sampler_process import SamplerProcess, interval_ms
from lem.measurement import is_estimate
from lem.meters.gpus import find_gpus, named_gpus, open_nvml, visible_gpus
from lem.meters.rapl import find_rapl
from lem.meters.samples import PART_FILENAME, GpuSample, PartReader, SampleLog, SampleLogError, read_tail
from lem.orchestration.attempt import WorkerEvent
from lem.orchestration.baselines import BARE, BaselineBook, Reference
from lem.orchestration.gaps import RecoveryProbe
from lem.record import Record
from lem.units import NS_PER_S

__all__ = ["Attendance", "HostMeters", "has_recovered"]

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
