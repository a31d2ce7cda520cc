"""The sampler: polls counters and sensors into a sample log, in a process of its own."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from lem.base.clock import Clock
from lem.base.dataclass import dataclass, replace
from lem.base.errors import ExitCode, LemError
from lem.base.units import NS_PER_MS, NS_PER_S
from lem.meters import samples
from lem.meters.hwmon import HwmonMeter, is_address
from lem.meters.machine import read_gpu_settings, read_machine
from lem.meters.nvml import MeterFailure, NvmlMeter, open_nvml
from lem.meters.rapl import find_rapl, find_tdp
from lem.meters.samples import (
    HWMON,
    ClockPair,
    CounterChange,
    CpuLoad,
    CpuUse,
    GpuHeader,
    GpuSample,
    GpuSecond,
    LimitSeen,
    Meter,
    MeterError,
    ProcessesSeen,
    RaplReading,
    Row,
)
from lem.meters.sensors import find_sensors
from lem.meters.usage import HERE, Roots, UsageMeter, busy_ratio

# As short as the shortest update period seen (20 to 100 ms), and prime: counters keep whole numbers of milliseconds,
# and a poll in step with one (100.000 ms on an H200) would see every change equally late. 53 wakings a second cost
# about 1 % of one CPU.
COUNTER_POLL_MS = 19

SHORTEST_INTERVAL_MS = 10
LONGEST_INTERVAL_MS = 60_000

_RARE_NS = 5 * COUNTER_POLL_MS * NS_PER_MS  # a fifth of its interval more or less hurts no sample, whose time is kept
_READINGS = (
    *("counter", "power", "average", "slowed", "limit", "set_limit", "processes"),
    *("temperature", "sm_clock", "utilisation", "memory", "events"),
)
_CLOCK_PAIR_MS = 10_000
_LOOK_MS = 500  # a stop of the engine is seen if it lasts this long


class SampleFileError(LemError):
    """The log cannot be written."""


class SamplerOwner(Protocol):
    def wait(self, until_ns: int) -> Sequence[str] | None:
        """The orders that come before that moment, as soon as there is one; None to end, or when the owner is gone."""


@dataclass(frozen=True)
class SamplerOptions:
    output: Path  # the log, which must not exist yet
    gpus: tuple[str, ...] = ()  # UUIDs
    interval_ms: int = 100  # between samples of a GPU, 0 for none; its counter is polled every `COUNTER_POLL_MS`
    tdp_w: float | None = None  # design power of all CPU packages, as the user gives it
    energy: str = "auto"  # `measurement.energy`, which decides whether sensors of module and machine are sampled


def run_sampler(options: SamplerOptions, nvml: Any, clock: Clock, owner: SamplerOwner, *, roots: Roots = HERE) -> None:
    with _created(options.output) as descriptor:
        sampler = _Sampler(options, nvml, clock, roots)
        _append(options.output, descriptor, [samples.encode_header(sampler.header)])
        _append(options.output, descriptor, map(samples.encode_row, sampler.everything()))
        while (orders := owner.wait(sampler.next_ns)) is not None:
            rows = [row for order in orders for row in sampler.obey(order)] + sampler.due()
            if rows:
                _append(options.output, descriptor, map(samples.encode_row, rows))
                # What is written to a file that was removed is lost.
                if os.fstat(descriptor).st_nlink == 0:
                    raise SampleFileError(f"{options.output}: the sample log was removed while it was written")
        _append(options.output, descriptor, map(samples.encode_row, [*sampler.everything(), sampler.clock_pair()]))


@contextlib.contextmanager
def _created(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.fchmod(descriptor, 0o644)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _append(path: Path, descriptor: int, lines: Iterable[str]) -> None:
    view = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8"))
    try:
        sys.audit("lem.write", str(path))  # see lem.base.durable
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> SampleFileError:
    return SampleFileError(
        f"{path}: the sample log cannot be written: {error.strerror}", "free some space, or make it writable"
    )


class Complaints:
    def __init__(self) -> None:
        self._reported: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._reported)

    def of(self, meter: str, at_ns: int, message: str) -> list[Row]:
        if self._reported.get(meter) == message:
            return []
        self._reported[meter] = message
        return [MeterError(at_ns, meter, message)]

    def withdraw(self, meter: str) -> None:
        self._reported.pop(meter, None)


class GpuWatch:
    """One GPU that is sampled; `place` is its place in the log's header."""

    # A GPU that is lost is only asked, once a second, whether it is back. What fails for another reason is tried every
    # time, with a fresh handle once a second; what the GPU does not have is tried once.

    def __init__(self, meter: Meter, place: int, clock: Clock, complaints: Complaints) -> None:
        self._meter = meter
        self._place = place
        self._clock = clock
        self._complaints = complaints
        self._energy_mj: int | None = None
        self._polled_ns = 0
        self._pids: tuple[int, ...] | None = None
        self._limit_w: float | None = None
        self._hopeless = {what for what in _READINGS if not meter.has(what)}
        self._is_lost = not meter.is_known
        self._is_failing = self._is_lost

    def poll(self) -> list[Row]:
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        energy_mj = self._read("counter", rows)
        if energy_mj is None:
            return rows
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        before_ns = at_ns if self._energy_mj is None else self._polled_ns
        before_mj = self._energy_mj
        self._energy_mj, self._polled_ns = energy_mj, at_ns
        return [] if energy_mj == before_mj else [CounterChange(self._place, before_ns, at_ns, energy_mj)]

    def sample(self) -> list[Row]:
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        power_w = self._read("power", rows)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        sample = GpuSample(
            self._place,
            at_ns,
            power_w,
            temp_c=self._read("temperature", rows),
            sm_clock_hz=self._read("sm_clock", rows),
            util_ratio=self._read("utilisation", rows),
            memory_b=self._read("memory", rows),
            event_mask=self._read("events", rows),
        )
        return rows if sample == GpuSample(self._place, at_ns) else [*rows, sample]

    def look_each_second(self) -> list[Row]:
        rows = [*self._look_at_processes(), *self._look_at_limit()]
        at_ns = self._clock.monotonic_ns()
        average_w = self._read("average", rows)
        state = GpuSecond(self._place, at_ns, self._read("limit", rows), average_w, self._read("slowed", rows))
        return rows if state == GpuSecond(self._place, at_ns) else [*rows, state]

    def _look_at_processes(self) -> list[Row]:
        rows: list[Row] = []
        at_ns = self._clock.monotonic_ns()
        pids = self._read("processes", rows)
        if pids is None or pids == self._pids:
            return rows
        self._pids = pids
        return [ProcessesSeen(self._place, at_ns, pids)]

    def _look_at_limit(self) -> list[Row]:
        # Not an error where it cannot be read: the limit in force is recorded anyway.
        at_ns, limit_w = self._clock.monotonic_ns(), self._read("set_limit", [])
        if not limit_w or limit_w == self._limit_w:
            return []
        self._limit_w = limit_w
        return [LimitSeen(self._place, at_ns, limit_w)]

    def revive(self) -> list[Row]:
        if not self._is_failing or not self._meter.is_known:
            return []
        at_ns, name = self._clock.monotonic_ns(), samples.gpu_meter(self._place, "handle")
        try:
            self._meter.renew()
        except MeterFailure as failure:
            return self._complaints.of(name, at_ns, str(failure))
        self._complaints.withdraw(name)
        self._is_lost = self._is_failing = False
        return []

    def _read(self, what: str, rows: list[Row]) -> Any:
        if self._is_lost or what in self._hopeless:
            return None
        try:
            value = self._meter.read(what)
        except MeterFailure as failure:
            if failure.is_lasting:
                self._hopeless.add(what)
            else:
                self._is_failing = True
                self._is_lost = failure.is_lost
            name = samples.gpu_meter(self._place, what)
            rows += self._complaints.of(name, self._clock.monotonic_ns(), str(failure))
            return None
        if self._complaints:
            self._complaints.withdraw(samples.gpu_meter(self._place, what))
        return value


class _Schedule:
    def __init__(self, first_ns: int, period_ms: int) -> None:
        self.period_ns = period_ms * NS_PER_MS
        self.next_ns: float = first_ns + self.period_ns if period_ms else math.inf

    def is_due(self, now_ns: int) -> bool:
        if now_ns < self.next_ns:
            return False
        self.next_ns += ((now_ns - self.next_ns) // self.period_ns + 1) * self.period_ns
        return True


def is_interval(interval_ms: int) -> bool:
    return interval_ms == 0 or SHORTEST_INTERVAL_MS <= interval_ms <= LONGEST_INTERVAL_MS


def _meters(names: Iterable[str], nvml: Any, sys: Path) -> Iterator[Meter]:
    for name in names:
        if is_address(name):
            yield HwmonMeter(sys, name)
        elif not isinstance(nvml, str):
            yield NvmlMeter(nvml, name)


def _needs_sensors(energy: str, gpus: Sequence[GpuHeader], *, has_packages: bool) -> bool:
    """Whether sensors of module and machine may give the energy: reading one may take long, as ACPI methods do."""
    own = [gpu for gpu in gpus if gpu.covered_by is None]
    is_metered = all(None in (gpu.counter_error, gpu.power_error) for gpu in own) if own else has_packages
    return energy == HWMON or (energy == "auto" and not is_metered)


class _Sampler:
    def __init__(self, options: SamplerOptions, nvml: Any, clock: Clock, roots: Roots) -> None:
        self._clock = clock
        self._complaints = Complaints()
        self._polled: list[Row] = []  # not written yet
        meters = tuple(_meters(options.gpus, nvml, roots.sys))
        gpus = tuple(meter.header for meter in meters)
        self._rapl = find_rapl(roots.powercap)
        sensors: tuple[Meter, ...] = ()
        if _needs_sensors(options.energy, gpus, has_packages=bool(self._rapl.counters)):
            sensors = find_sensors(roots.sys)
        self._gpus = [
            GpuWatch(meter, place, clock, self._complaints) for place, meter in enumerate((*meters, *sensors))
        ]
        self._usage = UsageMeter(clock, roots, (os.getpid(), os.getppid()))
        self._used: CpuUse | None = None  # a second ago
        tdp_w, tdp_source = find_tdp(options.tdp_w, roots.powercap)
        gpu_error = f"NVML is not available: {nvml}" if isinstance(nvml, str) and not gpus else None
        start = self.clock_pair()
        started_ns = start.at_ns
        self.header = samples.SampleHeader(
            started_ns=started_ns,
            started_utc=start.utc,
            host=platform.node(),
            interval_ms=options.interval_ms,
            gpus=tuple(
                gpu if gpu.meter == HWMON else replace(gpu, settings=read_gpu_settings(nvml, gpu.uuid, roots.sys))
                for gpu in gpus
            ),
            sensors=tuple(meter.header for meter in sensors),
            machine=read_machine(roots.proc, roots.sys),
            gpu_error=gpu_error if options.gpus else "no GPU is to be sampled",
            zones=tuple(counter.zone for counter in self._rapl.counters),
            rapl_error=self._rapl.explained,
            dram_error=self._rapl.dram_error,
            cpu_tdp_w=tdp_w,
            cpu_tdp_source=tdp_source,
        )
        self._polls = _Schedule(started_ns, COUNTER_POLL_MS if any(meter.has("counter") for meter in meters) else 0)
        self._samples = _Schedule(started_ns, options.interval_ms if self._gpus else 0)
        self._seconds = _Schedule(started_ns, samples.SLOW_PERIOD_S * 1000)
        self._clock_pairs = _Schedule(started_ns, _CLOCK_PAIR_MS)
        self._looks = _Schedule(started_ns, 0)  # at the engine, once it is known

    @property
    def next_ns(self) -> int:
        """When to wake; rare readings wait for the next poll, since a wake costs more than most readings."""
        schedules = [self._samples, self._seconds, self._looks]
        if self._polls.next_ns < math.inf:
            schedules = [self._polls] if self._samples.period_ns >= _RARE_NS else [self._polls, self._samples]
        return int(min(schedule.next_ns for schedule in schedules))

    def obey(self, order: str) -> list[Row]:
        """Follow an order: `interval N` (ms) begins a phase, `watch PID…` names the engine."""
        word, _, value = order.strip().partition(" ")
        now_ns = self._clock.monotonic_ns()
        if word == "interval" and value.isdecimal() and is_interval(int(value)):
            self._samples = _Schedule(now_ns, int(value) if self._gpus else 0)
            self._usage.find_processes()
            return self._with_polled([*self._read_usage()])
        if word == "watch" and (pids := value.split()) and all(map(str.isdecimal, pids)):
            self._usage.watch(*map(int, pids))
            self._looks = _Schedule(now_ns, _LOOK_MS)
            return self._with_polled([*self._read_usage()])
        if order.strip() == "find":  # what is watched may have started others
            self._usage.find_processes()
            return []
        return self._complaints.of("orders", now_ns, f"not understood: {order.strip()}")

    def due(self) -> list[Row]:
        now_ns = self._clock.monotonic_ns()
        rows: list[Row] = []
        if self._polls.is_due(now_ns):
            self._polled += [row for gpu in self._gpus for row in gpu.poll()]
        if self._samples.is_due(now_ns):
            rows += [row for gpu in self._gpus for row in gpu.sample()]
        if self._looks.is_due(now_ns):
            self._usage.look()
        if self._seconds.is_due(now_ns):
            rows += self._each_second()
        if self._clock_pairs.is_due(now_ns):
            rows.append(self.clock_pair())
        return self._with_polled(rows) if rows or self._samples.next_ns == math.inf else rows

    def _with_polled(self, rows: list[Row]) -> list[Row]:
        """Rows after those of polls, which are written with the next sample: a write costs as much as a wake."""
        # A reader of a row relies on all readings before it.
        polled, self._polled = self._polled, []
        return polled + rows

    def everything(self) -> list[Row]:
        rows = self._with_polled([row for gpu in self._gpus for row in gpu.poll()])
        if self._samples.next_ns < math.inf:
            rows += [row for gpu in self._gpus for row in gpu.sample()]
        return [*rows, *self._each_second()]

    def clock_pair(self) -> ClockPair:
        opened_ns = self._clock.monotonic_ns()
        utc = self._clock.utc_now()
        return ClockPair((opened_ns + self._clock.monotonic_ns()) // 2, utc.isoformat())

    def _each_second(self) -> list[Row]:
        rows = [row for gpu in self._gpus for row in (*gpu.revive(), *gpu.look_each_second())]
        return [*rows, *self._read_rapl(), *self._read_load()]

    def _read_rapl(self) -> Iterator[Row]:
        for place, counter in enumerate(self._rapl.counters):
            meter = f"rapl.{counter.zone.name}"
            opened_ns = self._clock.monotonic_ns()
            try:
                energy_uj = counter.read_uj()
            except (OSError, ValueError) as error:
                yield from self._complaints.of(meter, opened_ns, str(error))
                continue
            self._complaints.withdraw(meter)
            yield RaplReading(place, (opened_ns + self._clock.monotonic_ns()) // 2, energy_uj)
        for name, why in self._rapl.missing:
            yield from self._complaints.of(f"rapl.{name}", self._clock.monotonic_ns(), why)

    def _read_load(self) -> Iterator[Row]:
        for row in self._read_usage():
            yield row
            if isinstance(row, CpuUse):
                yield CpuLoad(row.at_ns, busy_ratio(self._used, row))
                self._used = row

    def _read_usage(self) -> Iterator[Row]:
        at_ns = self._clock.monotonic_ns()
        try:
            yield self._usage.read()
        except (OSError, ValueError) as error:
            yield from self._complaints.of("cpu_load", at_ns, str(error))


_STDIN = 0
_READ_B = 4096


class PipeOwner:
    def __init__(self, orders_fd: int, wakeup_fd: int) -> None:
        self._orders_fd = orders_fd
        self._wakeup_fd = wakeup_fd  # readable when a signal asks for the end
        self._begun = b""

    def wait(self, until_ns: int) -> Sequence[str] | None:
        timeout_s = max(0, until_ns - time.monotonic_ns()) / NS_PER_S
        ready, _, _ = select.select([self._orders_fd, self._wakeup_fd], [], [], timeout_s)
        if self._wakeup_fd in ready:
            return None
        if not ready:
            return ()
        data = os.read(self._orders_fd, _READ_B)
        if not data:
            return None
        *lines, self._begun = (self._begun + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def run_sampler_process(options: SamplerOptions, err: TextIO) -> int:
    is_on_nvml = any(not is_address(name) for name in options.gpus)
    opened = open_nvml() if is_on_nvml else contextlib.nullcontext("no GPU is sampled")
    wakeup_fd, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # it only makes the pipe readable
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    with opened as nvml:
        try:
            run_sampler(options, nvml, Clock(), PipeOwner(_STDIN, wakeup_fd))
        except SampleFileError as error:
            err.write(f"error: {error.message}\n")
            return int(ExitCode.EXPERIMENT_FAILED)
    return int(ExitCode.OK)
