"""The sample log: everything that the meters of one attempt read, on CLOCK_MONOTONIC.

While it is written, it is a file of JSON lines: a header, then one row a line, in the order in which they were read.
Rows are lists that start with their kind. The finished log of a result (`samples.jsonl.gz`) has the same lines after
one with the marks, so that every figure of the record can be recomputed from it alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from lem.base import durable
from lem.base.codec import MOST, complete, decode, decode_row, shown
from lem.base.dataclass import asdict, dataclass, field, fields
from lem.base.measurement import EnergyScope
from lem.base.reasons import Reason
from lem.base.units import GIB, KIB, MIB, NS_PER_S
from lem.meters.machine import GpuSettings, MachineFacts

SAMPLES_SCHEMA = 2
NVML, HWMON = "nvml", "hwmon"  # of `GpuHeader.meter`
PART_FILENAME = "samples.part"
FINISHED_FILENAME = "samples.jsonl.gz"

# How often the sampler reads powercap zones, the load of the CPU, and the processes on GPUs.
SLOW_PERIOD_S = 1
# A hole longer than three sampling periods voids an integration.
HOLE_PERIODS = 3


class SampleLogError(ValueError):
    """A file that is not a sample log of this schema."""


def gpu_meter(place: int, what: str) -> str:
    return f"gpu{place}.{what}"


@dataclass(frozen=True)
class GpuHeader:
    index: int | None  # NVML's; None if NVML does not see the GPU
    uuid: str
    name: str
    driver: str
    vbios: str | None = None
    power_limit_w: float | None = None
    persistence_mode: bool | None = None
    mig_mode: bool | None = None
    energy_scope: str = EnergyScope.GPU.value  # or `module`, if the driver answers only for GPU and CPU together
    power_source: str | None = None  # of `GpuSample.power_w`: `instant` (field 186) or `average` (over 1 s on some)
    # Of `GpuSecond.average_w`: `field` (185), `usage` (nvmlDeviceGetPowerUsage where that is a mean over 1 s), or
    # `none`; None in logs that do not tell.
    average_source: str | None = None
    settings: GpuSettings = field(default_factory=GpuSettings)
    counter_lag_s: float | None = None  # how late its counter is, if `lem gpus --probe` found it
    counts_slowdowns: bool | None = None  # whether `GpuSecond.slowed_s` is read; None in logs that do not tell
    counter_error: str | None = None  # why the energy counter cannot be read
    power_error: str | None = None  # why power cannot be read
    meter: str = NVML  # or `hwmon`
    counter_sensor: str | None = None  # the file that the counter is read from (hwmon)
    power_sensor: str | None = None  # the file that power is read from (hwmon)
    power_interval_s: float | None = None  # over which power is averaged, as the driver says
    power_lag_s: float | None = None  # how far power may lag behind; None: as usual for `power_source`
    covered_by: str | None = None  # the GPU whose meters count for this one too (the first chiplet of an MI250)
    counter_ranges_j: tuple[float, ...] = ()  # where the counter may wrap: at one of these

    @property
    def label(self) -> str:
        return self.uuid if self.index is None else f"GPU {self.index}"


class Meter(Protocol):
    """A GPU or a sensor: `NvmlMeter` (which describes the readings), `HwmonMeter` or `SensorMeter`."""

    header: GpuHeader

    @property
    def is_known(self) -> bool:
        """Whether it was found at all."""

    def has(self, what: str) -> bool:
        """Whether there is such a reading."""

    def read(self, what: str) -> Any:
        """The reading; raises MeterFailure."""

    def renew(self) -> None:
        """Find it again; raises MeterFailure."""


@dataclass(frozen=True)
class RaplZone:
    name: str
    domain: str  # `package`, `dram` or another name of the kernel's
    max_uj: int  # the counter wraps here
    limit_w: float | None = None  # the largest of its `constraint_*` limits; None without any


@dataclass(frozen=True)
class SampleHeader:
    """Who sampled what, and the first pair of clocks, by which outside logs are aligned."""

    started_ns: int  # CLOCK_MONOTONIC
    started_utc: str  # at the same moment
    host: str
    interval_ms: int
    gpus: tuple[GpuHeader, ...] = ()
    gpu_error: str | None = None  # why no GPU is sampled
    zones: tuple[RaplZone, ...] = ()
    rapl_error: str | None = None  # why no zone is sampled
    dram_error: str | None = None  # why no zone of the memory is, though the kernel shows some
    cpu_tdp_w: float | None = None  # the power the CPU packages are designed for
    cpu_tdp_source: str | None = None
    machine: MachineFacts = field(default_factory=MachineFacts)
    sensors: tuple[GpuHeader, ...] = ()  # of the module, the CPUs or the machine (hwmon), with power alone

    @property
    def devices(self) -> tuple[GpuHeader, ...]:
        """What rows of GPUs name by its place: the GPUs, then the sensors."""
        return self.gpus + self.sensors

    def describe_meter(self, meter: str) -> str:
        for place, gpu in enumerate(self.devices):
            if meter.startswith(gpu_meter(place, "")):
                return f"{meter.removeprefix(gpu_meter(place, ''))} of {gpu.label}"
        return meter


@dataclass(frozen=True, slots=True)
class CounterChange:
    """A new counter value, which came after `before_ns`, the last poll with the old one; equal in a GPU's first row."""

    gpu: int
    before_ns: int
    at_ns: int
    energy_mj: int


@dataclass(frozen=True, slots=True)
class GpuSample:
    gpu: int
    at_ns: int
    power_w: float | None = None
    temp_c: float | None = None
    sm_clock_hz: float | None = None
    util_ratio: float | None = None
    memory_b: int | None = None
    event_mask: int | None = None


@dataclass(frozen=True, slots=True)
class GpuSecond:
    gpu: int
    at_ns: int
    limit_w: float | None = None  # in force now: some are raised under load (Dynamic Boost)
    average_w: float | None = None  # the mean over the second before
    slowed_s: float | None = None  # for how long heat or a power brake slowed it, since the driver was loaded


@dataclass(frozen=True, slots=True)
class RaplReading:
    zone: int
    at_ns: int
    energy_uj: int  # the counter as it is, wraps included


@dataclass(frozen=True, slots=True)
class CpuLoad:
    """The share of all CPU time that was busy since the last reading, 0 to 1; None in the first row of a log."""

    at_ns: int
    busy_ratio: float | None


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Who had the CPUs, in seconds that only grow, but for a new engine; None: not known, or not read this time."""

    at_ns: int
    asleep_s: float  # CLOCK_BOOTTIME less CLOCK_MONOTONIC: while the machine was suspended
    busy_s: float  # CPU time of all programs on all CPUs, as that of the following
    idle_s: float  # in which a CPU had nothing to do
    steal_s: float  # that the hypervisor gave to others
    own_s: float | None = None  # of the engine and of lem
    run_s: float | None = None  # the engine's threads on a CPU
    wait_s: float | None = None  # its threads ready to run, without a CPU
    throttled_s: float | None = None  # its CPU limit kept it from running
    stopped_s: float | None = None  # one of its processes was stopped by a signal, or its container paused


@dataclass(frozen=True, slots=True)
class ProcessesSeen:
    """The processes with a compute context on a GPU, as the host numbers them; a row whenever they change."""

    gpu: int
    at_ns: int
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LimitSeen:
    """The power limit that is set for a GPU, which Dynamic Boost does not move; a row whenever it changes."""

    gpu: int
    at_ns: int
    limit_w: float


@dataclass(frozen=True, slots=True)
class MeterError:
    at_ns: int
    meter: str
    message: str


@dataclass(frozen=True, slots=True)
class ClockPair:
    at_ns: int
    utc: str


Row = (
    CounterChange
    | GpuSample
    | RaplReading
    | CpuLoad
    | ProcessesSeen
    | MeterError
    | ClockPair
    | GpuSecond
    | CpuUse
    | LimitSeen
)

# In the order of the fields of `SampleLog`.
_KINDS: Mapping[str, type[Row]] = {
    "c": CounterChange,
    "s": GpuSample,
    "r": RaplReading,
    "l": CpuLoad,
    "p": ProcessesSeen,
    "e": MeterError,
    "t": ClockPair,
    "g": GpuSecond,
    "u": CpuUse,
    "w": LimitSeen,
}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()}
# Some fifteen million rows. A damaged or hostile file must not fill the memory; a log above this is refused, never cut.
_MOST_B = GIB

# Of a few GPUs, 16 KiB are more than three seconds.
_TAIL_B, _TAIL_S = 16 * KIB, 3

_VALUES = {kind: attrgetter(*(item.name for item in fields(kind))) for kind in _LETTERS}


@dataclass(frozen=True)
class Mark:
    name: str
    opened_ns: int
    closed_ns: int


@dataclass(frozen=True)
class SampleLog:
    header: SampleHeader
    counters: tuple[CounterChange, ...] = ()
    samples: tuple[GpuSample, ...] = ()
    rapl: tuple[RaplReading, ...] = ()
    loads: tuple[CpuLoad, ...] = ()
    processes: tuple[ProcessesSeen, ...] = ()
    errors: tuple[MeterError, ...] = ()
    clocks: tuple[ClockPair, ...] = ()
    seconds: tuple[GpuSecond, ...] = ()
    usage: tuple[CpuUse, ...] = ()
    limits: tuple[LimitSeen, ...] = ()

    def rows(self) -> Iterator[Row]:
        groups: list[Sequence[Row]] = [getattr(self, item.name) for item in fields(self)[1:]]
        return iter(sorted((row for group in groups for row in group), key=lambda row: row.at_ns))


def encode_header(header: SampleHeader) -> str:
    return _dump({"schema_version": SAMPLES_SCHEMA, **asdict(header)})


def encode_row(row: Row) -> str:
    return _dump([_LETTERS[type(row)], *_VALUES[type(row)](row)])


class PartReader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rows = _Rows(path, first=1)
        self._log: SampleLog | None = None

    def read(self) -> SampleLog:
        self._take()
        if self._log is None:
            self._log = self._rows.log()
        return self._log

    def latest_ns(self, kinds: Collection[type[Row]]) -> int:
        """When the last row of these kinds was written, else the header; much quicker than `read` where rows arrive."""
        self._take()
        return self._rows.latest_ns(kinds)

    def _take(self) -> None:
        with durable.open_regular(self._path) as file:
            file.seek(self._offset)
            data = file.read()
        size = data.rfind(b"\n") + 1  # what follows the last end of line is still being written
        if size:
            self._log = None
            self._rows.take(data[:size].split(b"\n")[:-1])
            self._offset += size


def read_tail(path: Path) -> list[Row]:
    try:
        with durable.open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_B))
            lines = file.read().split(b"\n")[1:-1]  # the first may have lost its beginning, the last its end
        rows: list[Row] = []
        for line in reversed(lines):
            rows.append(_decode_row(json.loads(line)))
            if rows[-1].at_ns < rows[0].at_ns - _TAIL_S * NS_PER_S:
                break
        return rows[::-1]
    except (OSError, RecursionError, ValueError):
        return []


def write_finished(path: Path, log: SampleLog, marks: Sequence[Mark]) -> None:
    first = _dump({"marks": [[mark.name, mark.opened_ns, mark.closed_ns] for mark in marks]})
    lines = [first, encode_header(log.header), *(encode_row(row) for row in log.rows())]
    durable.write_bytes(path, gzip.compress("".join(f"{line}\n" for line in lines).encode(), compresslevel=6, mtime=0))


def read_finished(path: Path, most_b: int = _MOST_B) -> tuple[SampleLog, tuple[Mark, ...]]:
    rows = _Rows(path, first=2)
    try:
        with contextlib.closing(durable.unpacked_lines(path, most_b, free_b=MIB)) as lines:
            document = json.loads(next(lines, b"null"))
            found = document.get("marks") if isinstance(document, dict) else None
            if not isinstance(found, list) or not all(isinstance(item, list) for item in found):
                raise ValueError("it does not start with marks")
            marks = tuple(decode_row(Mark, item) for item in found)
            rows.take(lines)
    except SampleLogError:
        raise
    except durable.UnpackedTooFar as error:
        raise SampleLogError(f"{path}: {error}") from error
    except (EOFError, RecursionError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise SampleLogError(f"{path}: not a finished sample log: {error}") from error
    return rows.log(), marks


_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # json.dumps makes one for each call


class _Rows:
    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        self._next = first
        self._header: SampleHeader | None = None
        self._places: dict[str, int] = {}
        self._found: dict[str, list[Any]] = {letter: [] for letter in _KINDS}
        self._tuples: dict[str, tuple[Any, ...]] = dict.fromkeys(_KINDS, ())  # of the last log

    def take(self, lines: Iterable[bytes]) -> None:
        try:
            for line in lines:
                value = _value_of(line)
                if self._header is None:
                    header = self._header = _decode_header(value)
                    gpus, zones = len(header.devices), len(header.zones)
                    self._places = {"c": gpus, "s": gpus, "p": gpus, "g": gpus, "w": gpus, "r": zones}
                else:
                    row, letter = _decode_row(value), value[0]
                    if letter in self._places and not 0 <= value[1] < self._places[letter]:
                        raise ValueError(f"a row of device {value[1]}, which is not in the header")
                    self._found[letter].append(row)
                self._next += 1
        except durable.UnpackedTooFar:  # of the lines themselves
            raise
        except (RecursionError, ValueError) as error:
            raise SampleLogError(f"{self._path}:{self._next}: not a sample log: {error}") from error

    @property
    def header(self) -> SampleHeader:
        if self._header is None:
            raise SampleLogError(f"{self._path}: not a sample log: it has no header")
        return self._header

    def log(self) -> SampleLog:
        grown = {letter: tuple(rows) for letter, rows in self._found.items() if len(rows) > len(self._tuples[letter])}
        self._tuples.update(grown)
        return SampleLog(self.header, *self._tuples.values())

    def latest_ns(self, kinds: Collection[type[Row]]) -> int:
        found = (self._found[_LETTERS[kind]] for kind in kinds)
        return max((rows[-1].at_ns for rows in found if rows), default=self.header.started_ns)


_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def _value_of(line: bytes) -> Any:
    """As `json.loads`, which takes twice as long for a short line: it looks for the encoding, and for blanks."""
    try:
        text = line.decode()
        value, end = _scan(text, 0)
    except (StopIteration, ValueError):
        return json.loads(line)
    return value if text[end:] in ("", "\n") else json.loads(line)


def _decode_header(document: Any) -> SampleHeader:
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version not in range(1, SAMPLES_SCHEMA + 1):
        raise ValueError(f"schema_version {version!r:.40}, this lem reads 1 to {SAMPLES_SCHEMA}")
    values = {name: value for name, value in document.items() if name != "schema_version"}
    # Later builds have more fields.
    header = decode(SampleHeader, complete(SampleHeader, values, Reason.of("not_reported")), "header")
    if not all(-MOST < number < MOST for number in _numbers(values)):
        raise ValueError("a number of the header is out of range")
    if header.interval_ms < 0:
        raise ValueError(f"interval_ms is {header.interval_ms}")
    return header


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def _decode_row(value: Any) -> Row:
    if not isinstance(value, list) or not value:
        raise ValueError(f"not a row: {shown(value)}")
    kind = _KINDS.get(value[0]) if isinstance(value[0], str) else None
    if kind is None:
        raise ValueError(f"unknown kind of row: {value[0]!r:.40}")
    return decode_row(kind, value[1:])
