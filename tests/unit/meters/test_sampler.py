"""The sampler's loop, on a clock that the test holds: what is read when, and how it goes on when something fails."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from lem.meters.sampler import COUNTER_POLL_MS, PipeOwner, SampleFileError, SamplerOptions, run_sampler
from lem.meters.samples import CounterChange, CpuUse, PartReader, SampleLog, read_tail
from lem.meters.usage import Roots
from tests.doubles.hwmon import Device, HwmonTree, acpi, amd, overwrite, second_die
from tests.doubles.powercap import Powercap
from tests.unit.meters.nvml_stand_in import FakeClock, FakeNvml

MS = 1_000_000
S = 1_000 * MS

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


@dataclass
class ScriptedOwner:
    """An owner that lets the clock run, has things happen at their times, and wants an end at last."""

    clock: FakeClock
    end_s: float
    # (seconds since the start, an order or something to do).
    events: list[tuple[float, str | Callable[[], object]]] = field(default_factory=list)
    late_s: float = 0.0  # how much later than asked for each wait ends

    def __post_init__(self) -> None:
        self.start_ns = self.clock.now_ns
        self._waiting = sorted(self.events, key=lambda event: event[0])

    def wait(self, until_ns: int) -> Sequence[str] | None:
        moment_ns = max(self.clock.now_ns, until_ns + round(self.late_s * S))
        if self._waiting and self._at(self._waiting[0][0]) <= moment_ns:
            at_s, event = self._waiting.pop(0)
            self.clock.now_ns = max(self.clock.now_ns, self._at(at_s))
            if isinstance(event, str):
                return [event]
            event()
            return ()
        if moment_ns >= self._at(self.end_s):
            self.clock.now_ns = self._at(self.end_s)
            return None
        self.clock.now_ns = moment_ns
        return ()

    def _at(self, seconds: float) -> int:
        return self.start_ns + round(seconds * S)


@dataclass
class Rig:
    folder: Path
    nvml: FakeNvml | str = field(default_factory=FakeNvml)
    gpus: tuple[str, ...] = ("GPU-a",)
    interval_ms: int = 100
    energy: str = "auto"
    clock: FakeClock = field(default_factory=FakeClock)

    @property
    def output(self) -> Path:
        return self.folder / "samples.part"

    def run(
        self,
        end_s: float,
        *events: tuple[float, str | Callable[[], object]],
        late_s: float = 0.0,
        tdp_w: float | None = None,
    ) -> SampleLog:
        """What it logged from 0 to `end_s`; times in the log count from there."""
        options = SamplerOptions(self.output, self.gpus, self.interval_ms, tdp_w, self.energy)
        owner = ScriptedOwner(self.clock, end_s, list(events), late_s)
        self.start_ns = owner.start_ns
        (self.folder / "stat").write_text("cpu 1 2 3 4 5 6 7 8 9 10\n")
        roots = Roots(proc=self.folder, sys=self.folder / "sys", powercap=self.folder / "powercap")
        run_sampler(options, self.nvml, self.clock, owner, roots=roots)
        return PartReader(self.output).read()

    def counts(self, joule_per_s: float, period_s: float) -> None:
        """Have the energy counter run, brought up to date so often."""
        assert isinstance(self.nvml, FakeNvml)

        def energy_mj(_: object) -> int:
            periods = (self.clock.now_ns - self.clock.now_ns % round(period_s * S)) // round(period_s * S)
            return round(periods * period_s * joule_per_s * 1e3)

        self.nvml.answers[COUNTER] = energy_mj

    def since_start_s(self, at_ns: int) -> float:
        return (at_ns - self.start_ns) / S


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def errors_of(log: SampleLog) -> list[tuple[str, str]]:
    return [(row.meter, row.message) for row in log.errors]


def polled(due_s: float) -> float:
    """The first poll of the counter at that time or later, at which what is due rarely is read."""
    return -(-round(due_s * 1000) // COUNTER_POLL_MS) * COUNTER_POLL_MS / 1000


def test_short_intervals_and_gpus_without_a_counter_are_sampled_on_time(rig: Rig) -> None:
    rig.interval_ms = 20
    times = [round(rig.since_start_s(row.at_ns), 3) for row in rig.run(1.0).samples]
    assert times[:50] == [round(0.02 * step, 2) for step in range(50)]
    rig.output.unlink()
    without = Rig(rig.folder, FakeNvml(failures={COUNTER: 3}))
    times = [round(without.since_start_s(row.at_ns), 3) for row in without.run(1.0).samples]
    assert times[:10] == [round(0.1 * step, 1) for step in range(10)]


def test_a_late_sampler_does_not_drift(rig: Rig) -> None:
    log = rig.run(10.0, late_s=0.003)
    times = [rig.since_start_s(row.at_ns) for row in log.samples]
    assert len(times) == 101
    assert {row.power_w for row in log.samples} == {90.0}
    # A sample waits for the next poll, and that is late.
    late_s = [time - step * 0.1 for step, time in enumerate(times[:-1])]
    assert -1e-9 < min(late_s) <= max(late_s) < 0.019 + 0.0031


def test_what_was_missed_stays_a_hole(rig: Rig) -> None:
    def hang() -> None:
        rig.clock.now_ns += round(0.73 * S)

    log = rig.run(2.0, (0.5, hang))
    times = [rig.since_start_s(row.at_ns) for row in log.samples]
    gaps = [round(after - before, 3) for before, after in pairwise(times)]
    assert max(gaps) == 0.812  # from the poll after 0.4 to 1.23, and back in step at 1.3
    assert polled(1.3) in [round(time, 3) for time in times]
    assert len(times) == len(set(times))


def test_the_counter_is_polled_often_and_its_changes_alone_are_kept(rig: Rig) -> None:
    rig.counts(300.0, 0.1)
    log = rig.run(1.0)
    first, *changes = log.counters
    assert first.before_ns == first.at_ns  # when that value came is not known
    assert [row.energy_mj - first.energy_mj for row in changes] == [30_000 * step for step in range(1, 11)]
    *changes, last = changes
    assert {row.at_ns - row.before_ns for row in changes} == {19 * MS}
    assert last.at_ns - last.before_ns == 12 * MS  # at the end, 1 s
    assert isinstance(rig.nvml, FakeNvml)
    assert rig.nvml.calls.count(COUNTER) == 55  # each 19 ms, at start and end, and the one that tried it


def test_a_stamp_lies_in_the_middle_of_its_reading(rig: Rig) -> None:
    rig.clock.step_ns = 2 * MS  # every look at the clock takes 2 ms
    log = rig.run(0.05)
    # The header's stamp lies between the looks at 2 and 4 ms, the counter's between those at 6 and 8 ms.
    assert log.counters[0].at_ns - log.header.started_ns == 4 * MS


def test_the_interval_changes_when_the_owner_says_so_and_the_counter_is_polled_as_before(rig: Rig) -> None:
    rig.counts(300.0, 0.1)
    log = rig.run(2.0, (1.0, "interval 500"))
    times = [round(rig.since_start_s(row.at_ns), 3) for row in log.samples]
    assert times[:11] == [*(polled(step * 0.1) for step in range(10)), polled(1.5)]
    assert set(times[11:]) <= {polled(2.0), 2.0}
    assert len(log.counters) == 21


def test_the_row_of_an_order_comes_after_every_reading_before_it(rig: Rig) -> None:
    rig.counts(300.0, 0.02)
    rig.run(0.6, (0.15, "watch 1"), (0.45, "interval 500"))
    rows = [row for row in read_tail(rig.output) if isinstance(row, (CounterChange, CpuUse))]
    times = [row.at_ns for row in rows]
    assert {round(rig.since_start_s(row.at_ns), 2) for row in rows if isinstance(row, CpuUse)} >= {0.15, 0.45}
    assert times == sorted(times)


@pytest.mark.parametrize("order", ["interval", "interval 5", "interval 10.5", "hello 3", "interval 999999"])
def test_an_order_that_is_not_understood_changes_nothing_and_is_told(rig: Rig, order: str) -> None:
    log = rig.run(0.5, (0.25, order))
    assert len(log.samples) == 6
    assert errors_of(log) == [("orders", f"not understood: {order}")]


def test_no_gpu_is_looked_at_while_the_owner_wants_none_and_the_counter_is_polled_as_before(rig: Rig) -> None:
    rig.counts(joule_per_s=100.0, period_s=0.1)
    log = rig.run(2.0, (0.45, "interval 0"), (1.45, "interval 100"))
    times = [rig.since_start_s(row.at_ns) for row in log.samples]
    assert not [time for time in times if 0.45 < time < 1.45]
    assert max(times) == 2.0
    assert [row for row in log.counters if 0.5 < rig.since_start_s(row.at_ns) < 1.4]


def test_everything_slow_is_read_once_a_second(rig: Rig) -> None:
    Powercap.server(rig.folder / "powercap").make(0)
    log = rig.run(2.5)
    assert [zone.name for zone in log.header.zones][:2] == ["package-0", "package-0/core"]
    seconds = [0.0, polled(1.0), polled(2.0), 2.5]
    for zone in range(6):
        assert [rig.since_start_s(row.at_ns) for row in log.rapl if row.zone == zone] == seconds
    assert [rig.since_start_s(row.at_ns) for row in log.loads] == seconds
    assert (log.header.rapl_error, log.header.cpu_tdp_w) == (None, 410.0)


def test_processes_are_told_when_they_change(rig: Rig) -> None:
    assert isinstance(rig.nvml, FakeNvml)
    nvml = rig.nvml
    name = "nvmlDeviceGetComputeRunningProcesses"
    log = rig.run(
        5.0,
        (1.5, lambda: nvml.answers.update({name: [_Process(12), _Process(7)]})),
        (3.5, lambda: nvml.answers.update({name: []})),
    )
    assert [(rig.since_start_s(row.at_ns), row.pids) for row in log.processes] == [
        (0.0, ()),
        (polled(2.0), (7, 12)),
        (polled(4.0), ()),
    ]


@dataclass
class _Process:
    pid: int


def test_the_clocks_are_paired_from_time_to_time_and_at_the_end(rig: Rig) -> None:
    rig.gpus = ()
    log = rig.run(25.0)
    assert [rig.since_start_s(row.at_ns) for row in log.clocks] == [10.0, 20.0, 25.0]
    pairs = [(log.header.started_ns, log.header.started_utc), *((row.at_ns, row.utc) for row in log.clocks)]
    first_ns, first_utc = pairs[0]
    for at_ns, utc in pairs[1:]:
        elapsed = datetime.fromisoformat(utc) - datetime.fromisoformat(first_utc)
        assert elapsed.total_seconds() == (at_ns - first_ns) / S


@pytest.mark.parametrize(
    ("gpus", "nvml", "said"),
    [
        ((), "no GPU is sampled", "no GPU is to be sampled"),
        (("GPU-a",), "Driver Not Loaded", "NVML is not available: Driver Not Loaded"),
    ],
)
def test_without_a_gpu_to_sample_the_header_says_why(rig: Rig, gpus: tuple[str, ...], nvml: str, said: str) -> None:
    rig.gpus, rig.nvml = gpus, nvml
    log = rig.run(1.0, tdp_w=95.0)
    assert (log.header.gpus, log.header.gpu_error) == ((), said)
    assert (log.header.cpu_tdp_w, log.header.cpu_tdp_source) == (95.0, "measurement.cpu_tdp_w")
    assert "no RAPL package" in (log.header.rapl_error or "")
    assert (log.samples, log.counters, len(log.loads)) == ((), (), 2)


def test_a_gpu_that_is_not_there_is_in_the_header_and_its_neighbour_is_sampled(rig: Rig) -> None:
    rig.gpus = ("GPU-x", "GPU-a")
    rig.nvml = FakeNvml(failures={"nvmlDeviceGetMemoryInfo": 3})
    log = rig.run(0.5)
    assert [gpu.index for gpu in log.header.gpus] == [None, 0]
    assert "Not Found" in (log.header.gpus[0].counter_error or "")
    assert {row.gpu for row in log.samples} == {1}
    assert {row.gpu for row in log.counters} == {1}
    assert {row.gpu for row in log.processes} == {1}
    assert [meter for meter, _ in errors_of(log)] == ["gpu1.memory"]


def test_what_a_gpu_does_not_have_is_told_once_and_not_asked_again(rig: Rig) -> None:
    assert isinstance(rig.nvml, FakeNvml)
    rig.nvml.failures["nvmlDeviceGetUtilizationRates"] = 3
    log = rig.run(2.0)
    assert [meter for meter, _ in errors_of(log)] == ["gpu0.utilisation"]
    assert {row.util_ratio for row in log.samples} == {None}
    assert {row.power_w for row in log.samples} == {90.0}
    assert rig.nvml.calls.count("nvmlDeviceGetUtilizationRates") == 1


def test_a_failure_is_told_when_it_comes_and_when_it_changes_but_not_at_every_tick(rig: Rig) -> None:
    assert isinstance(rig.nvml, FakeNvml)
    failures = rig.nvml.failures
    log = rig.run(
        3.0,
        (0.95, lambda: failures.update({COUNTER: 999})),
        (1.55, lambda: failures.update({COUNTER: 10})),
        (1.95, failures.clear),
        (2.45, lambda: failures.update({COUNTER: 10})),
    )
    assert [round(rig.since_start_s(row.at_ns), 2) for row in log.errors] == [0.95, 1.56, 2.45]
    assert len(log.samples) == 31  # the rest is read as before


def test_a_counter_that_comes_back_says_since_when_it_was_not_seen(rig: Rig) -> None:
    rig.counts(300.0, 0.1)
    assert isinstance(rig.nvml, FakeNvml)
    failures = rig.nvml.failures
    log = rig.run(2.0, (0.45, lambda: failures.update({COUNTER: 999})), (1.05, failures.clear))
    (hole,) = [row for row in log.counters if row.at_ns - row.before_ns > 19 * MS]
    assert (round(rig.since_start_s(hole.before_ns), 2), round(rig.since_start_s(hole.at_ns), 2)) == (0.44, 1.06)


def test_a_gpu_that_is_lost_is_asked_for_once_a_second_and_goes_on_when_it_is_back(rig: Rig) -> None:
    rig.nvml = nvml = FakeNvml(uuids=("GPU-a", "GPU-b"))
    rig.gpus = ("GPU-a", "GPU-b")
    rig.counts(300.0, 0.1)
    asked: list[int] = []
    log = rig.run(
        6.0,
        (0.95, lambda: nvml.lost.update({"GPU-a": 15})),
        (1.0, nvml.calls.clear),
        (3.95, lambda: asked.append(nvml.calls.count("nvmlDeviceGetHandleByUUID"))),
        (4.5, nvml.lost.clear),
    )
    assert asked == [3]
    lost_s = [rig.since_start_s(row.at_ns) for row in log.samples if row.gpu == 0]
    assert not [at_s for at_s in lost_s if 0.95 < at_s < 5.0]
    assert len([at_s for at_s in lost_s if at_s >= 5.0]) > 8
    assert len([row for row in log.samples if row.gpu == 1]) == 61
    assert {meter for meter, _ in errors_of(log)} <= {"gpu0.counter", "gpu0.handle"}
    assert all("dmesg" in message for _, message in errors_of(log))
    assert len(log.errors) == 2


def test_a_zone_that_cannot_be_read_any_more_is_told_and_the_others_are_read(rig: Rig) -> None:
    tree = Powercap.server(rig.folder / "powercap")
    tree.make(0)
    tree.take_away(["intel-rapl:2"])
    log = rig.run(5.0, (1.5, lambda: tree.take_away(["intel-rapl:1"])), (1.6, (rig.folder / "stat").unlink))
    assert [meter for meter, _ in errors_of(log)] == ["rapl.psys", "rapl.package-1", "cpu_load"]
    assert "psys" not in [zone.name for zone in log.header.zones]
    assert len([row for row in log.rapl if row.zone == 3]) == 2
    assert len([row for row in log.rapl if row.zone == 0]) == 6


def test_the_log_is_for_everybody_to_read(rig: Rig) -> None:
    before = os.umask(0o077)
    try:
        rig.run(0.1)
    finally:
        os.umask(before)
    assert rig.output.stat().st_mode & 0o777 == 0o644


def test_a_log_that_is_there_is_not_overwritten(rig: Rig) -> None:
    rig.output.write_text("somebody's\n")
    with pytest.raises(SampleFileError, match="File exists"):
        rig.run(0.1)
    assert rig.output.read_text() == "somebody's\n"


def test_a_log_that_was_removed_ends_the_sampler(rig: Rig) -> None:
    with pytest.raises(SampleFileError, match="removed"):
        rig.run(1.0, (0.5, rig.output.unlink))


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB within the block: as a disk that is full.

    A block and no fixture: in between, pytest itself writes, and its output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_ends_the_sampler_and_what_was_written_can_be_read(rig: Rig) -> None:
    with pytest.raises(SampleFileError, match="cannot be written: File too large"), small_files():
        rig.run(60.0)
    assert len(PartReader(rig.output).read().samples) > 10


FOREVER_NS = 2**62


@dataclass
class Pipes:
    """Both ends of an owner's pipes."""

    orders: int
    wakeup: int
    owner: PipeOwner

    def write(self, data: bytes) -> None:
        os.write(self.orders, data)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    orders, orders_writer = os.pipe()
    wakeup, wakeup_writer = os.pipe()
    yield Pipes(orders_writer, wakeup_writer, PipeOwner(orders, wakeup))
    for descriptor in (orders, wakeup, orders_writer, wakeup_writer):
        os.close(descriptor)


def test_orders_are_lines_however_they_come(pipes: Pipes) -> None:
    assert pipes.owner.wait(0) == ()  # long past
    pipes.write(b"interval 50\n\xff\ninterval 1")
    assert pipes.owner.wait(FOREVER_NS) == ["interval 50", "\ufffd"]
    pipes.write(b"00\n")
    assert pipes.owner.wait(FOREVER_NS) == ["interval 100"]


def test_a_signal_ends_it_before_any_order(pipes: Pipes) -> None:
    pipes.write(b"interval 50\n")
    os.write(pipes.wakeup, b"\x0f")
    assert pipes.owner.wait(FOREVER_NS) is None


def test_the_end_of_the_pipe_ends_it(pipes: Pipes) -> None:
    pipes.write(b"interval 50\n")
    os.dup2(pipes.wakeup, pipes.orders)  # closes the only end that could write orders
    assert pipes.owner.wait(FOREVER_NS) == ["interval 50"]
    assert pipes.owner.wait(FOREVER_NS) is None


def hwmon(rig: Rig, *devices: Device) -> HwmonTree:
    tree = HwmonTree(rig.folder / "sys", devices)
    tree.make(0, lambda _: 100.0)
    return tree


def test_a_gpu_of_hwmon_is_sampled_as_one_of_nvml(rig: Rig) -> None:
    rig.nvml, rig.gpus = "no driver", ("0000:03:00.0",)
    tree = hwmon(rig, amd(begins=65536))
    log = rig.run(2.0, (1.0, lambda: tree.update(0, 60_000_000, lambda _: 160.0)))
    (header,) = log.header.gpus
    assert (header.meter, header.uuid, log.header.gpu_error) == ("hwmon", "0000:03:00.0", None)
    assert [row.energy_mj for row in log.counters] == [1_000, 61_000]
    assert {row.power_w for row in log.samples} == {100.0, 160.0}
    assert {row.temp_c for row in log.samples} == {55.0}
    assert errors_of(log) == []


def test_a_gpu_of_hwmon_that_comes_back_under_another_number_is_sampled_again(rig: Rig) -> None:
    rig.nvml, rig.gpus = "no driver", ("0000:03:00.0",)
    tree = hwmon(rig, amd())
    folder = rig.folder / "sys/class/hwmon"
    log = rig.run(
        6.0,
        (2.0, (folder / "hwmon0").unlink),
        (4.0, lambda: (folder / "hwmon7").symlink_to(tree.folder_of(0))),
        (4.0, lambda: tree.update(0, 400_000_000, lambda _: 160.0)),
    )
    times = [rig.since_start_s(row.at_ns) for row in log.samples]
    assert max(after - before for before, after in pairwise(times)) == pytest.approx(2.2, abs=0.15)
    assert [row.power_w for row in log.samples][-1] == 160.0
    assert [name for name, _ in errors_of(log)] == ["gpu0.power", "gpu0.handle"]


def test_a_limit_of_hwmon_that_another_program_changes_is_told(rig: Rig) -> None:
    rig.nvml, rig.gpus = "no driver", ("0000:03:00.0",)
    tree = hwmon(rig, amd())
    cap = Path(tree.folder_of(0), "power1_cap")
    log = rig.run(4.0, (2.0, lambda: overwrite(cap, b"300000000\n")))
    assert [row.limit_w for row in log.limits] == [500.0, 300.0]


def test_the_second_chiplet_of_a_card_that_has_a_meter_asks_for_no_sensor(rig: Rig) -> None:
    rig.nvml, rig.gpus = "no driver", ("0000:03:00.0", "0000:06:00.0")
    hwmon(rig, amd(device="0x740c"), second_die("0000:06:00.0"), acpi())
    header = rig.run(1.0).header
    assert [gpu.covered_by for gpu in header.gpus] == [None, "0000:03:00.0"]
    assert header.sensors == ()


@pytest.mark.parametrize(
    ("energy", "has_gpu", "has_packages", "sensors"),
    [
        ("auto", False, False, 1),
        ("auto", False, True, 0),  # reading a sensor may take long
        ("auto", True, False, 0),
        ("hwmon", True, True, 1),
        ("rapl", False, False, 0),
        ("none", False, False, 0),
    ],
)
def test_sensors_of_the_machine_are_sampled_where_nothing_else_is(
    rig: Rig, energy: str, has_gpu: bool, has_packages: bool, sensors: int
) -> None:
    rig.energy, rig.gpus = energy, ("GPU-a",) if has_gpu else ()
    hwmon(rig, acpi())
    if has_packages:
        Powercap.server(rig.folder / "powercap").make(0)
    log = rig.run(1.0)
    assert len(log.header.sensors) == sensors
    powers = {row.power_w for row in log.samples if row.gpu == len(log.header.gpus)}
    assert powers == ({100.0} if sensors else set())
