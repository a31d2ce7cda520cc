"""Who used the CPUs, read from scripted trees of /proc and /sys/fs/cgroup, and once from the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lem.base.clock import Clock
from lem.base.process import identify
from lem.meters.samples import CpuUse
from lem.meters.usage import HERE, Limits, Roots, UsageMeter, busy_ratio, find_by_namespace, read_cpu_times
from tests.doubles.machine import Machine, Process
from tests.unit.meters.nvml_stand_in import FakeClock

LEM, SUPERVISOR, GUARDIAN, ENGINE, CORE, OTHER = 10, 20, 30, 31, 32, 99


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """lem on the host, its supervisor, an engine of two processes, and another program."""
    machine = Machine(tmp_path, busy_s=500.0)
    machine.processes = {
        LEM: Process(1, cpu_s=3.0),
        SUPERVISOR: Process(LEM, cpu_s=1.0),
        GUARDIAN: Process(SUPERVISOR, threads_s={GUARDIAN: (0.01, 0.0)}),
        ENGINE: Process(GUARDIAN, cpu_s=40.0, threads_s={ENGINE: (30.0, 2.0), 310: (10.0, 1.0)}),
        CORE: Process(ENGINE, cpu_s=20.0, threads_s={CORE: (20.0, 0.5)}),
        OTHER: Process(1, cpu_s=300.0, threads_s={OTHER: (300.0, 5.0)}),
    }
    machine.write()
    return machine


def row_of(folder: Path, **ticks: int) -> CpuUse:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    (folder / "stat").write_text(f"cpu  {' '.join(str(ticks.get(name, 0)) for name in names)}\ncpu0 1 2 3 4\n")
    return UsageMeter(FakeClock(), Roots(proc=folder)).read()


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ({"user": 1030, "idle": 1070}, 0.3),
        ({"user": 1010, "nice": 10, "system": 10, "irq": 10, "softirq": 10, "idle": 1050}, 0.5),
        ({"user": 1000, "idle": 1050, "iowait": 40, "steal": 10}, 0.0),
        ({"user": 1100, "idle": 1000, "guest": 100}, 1.0),  # in user already
        ({"user": 1110, "idle": 990}, 1.0),  # the kernel's idle time went back a little
        ({"user": 1000, "idle": 1000}, None),  # no time has passed
    ],
)
def test_the_load_is_the_busy_share_since_the_reading_before(
    tmp_path: Path, ticks: dict[str, int], expected: float | None
) -> None:
    before = row_of(tmp_path, user=1000, idle=1000)
    found = busy_ratio(before, row_of(tmp_path, **ticks))
    assert found == (None if expected is None else pytest.approx(expected))
    assert busy_ratio(None, before) is None  # since when is not known


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8\n", "cpu a b c d e f g h\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    with pytest.raises(ValueError, match="not understood"):
        read_cpu_times(tmp_path)


def watching(machine: Machine, clock: FakeClock) -> UsageMeter:
    meter = UsageMeter(clock, machine.roots, (LEM,))
    meter.watch(GUARDIAN)
    meter.read()
    return meter


def test_what_is_not_of_the_engine_or_lem_is_not_counted_as_theirs(machine: Machine) -> None:
    meter = watching(machine, FakeClock())
    machine.busy_s += 10.0
    machine.idle_s += 3.0
    machine.steal_s += 0.5
    machine.processes[OTHER].cpu_s += 4.0
    machine.processes[ENGINE].cpu_s += 3.0
    machine.processes[CORE].cpu_s += 2.0
    machine.processes[SUPERVISOR].cpu_s += 0.2
    machine.processes[LEM].cpu_s += 0.1
    machine.write()
    row = meter.read()
    assert (row.busy_s, row.idle_s, row.steal_s) == (510.0, 1003.0, 0.5)
    assert row.own_s == pytest.approx(5.3)


def test_threads_add_up_also_when_some_come_and_go(machine: Machine) -> None:
    meter, engine = watching(machine, FakeClock()), machine.processes[ENGINE]
    engine.threads_s = {ENGINE: (32.0, 3.0), 310: (10.5, 1.25), 311: (4.0, 0.5)}
    machine.write()
    first = meter.read()
    assert [first.run_s, first.wait_s] == [pytest.approx(6.5), pytest.approx(1.75)]
    del engine.threads_s[310]  # what it had until then stays counted
    engine.threads_s[ENGINE] = (33.0, 3.0)
    machine.write()
    second = meter.read()
    assert [second.run_s, second.wait_s] == [pytest.approx(7.5), pytest.approx(1.75)]


def test_a_process_that_the_engine_starts_is_found_when_a_phase_begins(machine: Machine) -> None:
    meter = watching(machine, FakeClock())
    machine.processes[33] = Process(CORE, cpu_s=2.0, threads_s={33: (2.0, 1.0)})
    machine.write()
    assert meter.read().own_s == 0.0
    meter.find_processes()
    row = meter.read()
    assert (row.own_s, row.run_s, row.wait_s) == (2.0, 2.0, 1.0)


def test_time_of_processes_that_have_ended_is_the_engines_once(machine: Machine) -> None:
    meter = watching(machine, FakeClock())
    machine.processes[CORE].cpu_s += 2.0
    machine.write()
    assert meter.read().own_s == pytest.approx(2.0)
    machine.processes[ENGINE].ended_s += machine.processes.pop(CORE).cpu_s  # one that was seen
    machine.write()
    assert meter.read().own_s == pytest.approx(2.0)
    machine.processes[ENGINE].ended_s += 3.0  # and one that came and went between two readings
    machine.write()
    assert meter.read().own_s == pytest.approx(5.0)


def test_without_an_engine_only_the_machine_is_known(machine: Machine) -> None:
    meter = UsageMeter(FakeClock(), machine.roots, (LEM,))
    assert meter.read() == CpuUse(100_000_000_000, meter.read().asleep_s, 500.0, 1000.0, 0.0)
    meter.watch(4242)
    assert meter.read().own_s is None


def test_a_kernel_that_does_not_count_waiting_leaves_it_unknown(machine: Machine) -> None:
    for process in machine.processes.values():
        process.threads_s = dict.fromkeys(process.threads_s, (0.0, 0.0))
    machine.write()
    row = watching(machine, FakeClock()).read()
    assert (row.own_s, row.run_s, row.wait_s) == (0.0, None, None)


def test_an_engine_with_many_threads_is_read_less_often(machine: Machine) -> None:
    clock = FakeClock(step_ns=1_000_000)  # every look at the clock takes a millisecond, so that reading threads costs
    meter = watching(machine, clock)
    assert meter.read().run_s is None
    clock.now_ns += 1_000_000_000
    assert meter.read().run_s is not None


@pytest.mark.parametrize("state", ["T", "t"])
def test_a_stopped_process_of_the_engine_is_seen(machine: Machine, state: str) -> None:
    clock = FakeClock()
    meter = watching(machine, clock)
    for second in range(8):
        machine.processes[CORE].state = state if 2 <= second < 5 else "R"
        machine.write()
        clock.now_ns += 1_000_000_000
        meter.look()
    assert meter.read().stopped_s == 3.0


@pytest.mark.parametrize(
    ("line", "name", "frozen", "thawed"),
    [
        (
            "0::/lem.slice/engine",
            "lem.slice/engine/cgroup.events",
            "populated 1\nfrozen 1\n",
            "populated 1\nfrozen 0\n",
        ),
        ("5:freezer:/docker/abc", "freezer/docker/abc/freezer.state", "FROZEN\n", "THAWED\n"),
    ],
)
def test_a_paused_container_is_a_stop(tmp_path: Path, line: str, name: str, frozen: str, thawed: str) -> None:
    machine, clock = Machine(tmp_path), FakeClock()
    machine.processes = {GUARDIAN: Process(SUPERVISOR, cgroup=line)}
    (machine.roots.cgroup / "lem.slice" / "engine").mkdir(parents=True)
    machine.files[name] = thawed
    machine.write()
    meter = watching(machine, clock)
    for text in (frozen, frozen, thawed):
        machine.files[name] = text
        machine.write()
        clock.now_ns += 1_000_000_000
        meter.look()
    assert meter.read().stopped_s == 2.0


@pytest.mark.parametrize(
    ("line", "files", "cpus", "throttled_s"),
    [
        (
            "0::/lem.slice/engine",
            {
                "lem.slice/engine/cpu.max": ("max 100000", "max 100000"),
                "lem.slice/engine/cpu.stat": ("usage_usec 5\nthrottled_usec 0", "usage_usec 9\nthrottled_usec 0"),
                "lem.slice/cpu.max": ("150000 100000", "150000 100000"),  # the limit of a pod, above the container's
                "lem.slice/cpu.stat": ("nr_throttled 1\nthrottled_usec 500000", "throttled_usec 2750000"),
            },
            1.5,
            2.25,
        ),
        (
            "4:cpu,cpuacct:/docker/abc",
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": ("200000", "200000"),
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": ("100000", "100000"),
                "cpu,cpuacct/docker/abc/cpu.stat": ("throttled_time 1000000000", "throttled_time 1750000000"),
            },
            2.0,
            0.75,
        ),
        # Inside a container of version 1: the path is the host's, the folder the container's own.
        (
            "1:cpu:/docker/abc",
            {
                "cpu/cpu.cfs_quota_us": ("-1", "-1"),
                "cpu/cpu.cfs_period_us": ("100000", "100000"),
                "cpu/cpu.stat": ("throttled_time 0", "throttled_time 5000000"),
            },
            None,
            0.005,
        ),
        ("0::/gone", {}, None, 0.0),
    ],
)
def test_limits_of_both_versions_of_cgroups(
    tmp_path: Path, line: str, files: dict[str, tuple[str, str]], cpus: float | None, throttled_s: float
) -> None:
    machine = Machine(tmp_path, processes={ENGINE: Process(1, cgroup=line)})
    machine.files = {name: before for name, (before, _) in files.items()}
    machine.write()
    limits = Limits(machine.roots, ENGINE)
    assert limits.throttled_s() == 0.0
    machine.files = {name: after for name, (_, after) in files.items()}
    machine.write()
    assert limits.throttled_s() == pytest.approx(throttled_s)
    assert limits.throttled_s() == 0.0
    assert limits.cpus == cpus


def test_the_engine_of_a_container_is_found_by_its_number_there(machine: Machine) -> None:
    machine.processes[51] = Process(1, inner_pid=7, started_ticks=1)  # of another container
    machine.processes[52] = Process(1, inner_pid=7, started_ticks=2)
    machine.write()
    assert find_by_namespace(machine.roots.proc, 7, 2) == 52
    assert find_by_namespace(machine.roots.proc, 7, 3) is None


def test_a_real_process_is_watched_and_its_stop_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = UsageMeter(Clock(), HERE, (os.getpid(),))
        meter.watch(child.pid)
        meter.read()
        deadline = time.monotonic() + 30
        while (meter.read().run_s or 0.0) < 0.05 and time.monotonic() < deadline:
            meter.find_processes()  # and read the threads at once
        row = meter.read()
        assert row.own_s is not None
        assert row.stopped_s == 0.0
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        meter.look()
        assert (meter.read().stopped_s or 0.0) > 0.0
        found = identify(child.pid)
        assert found is not None
        assert find_by_namespace(HERE.proc, child.pid, found.started_ticks) == child.pid
    finally:
        child.kill()
        child.wait()
    meter.find_processes()
    assert meter.read().own_s is None


def test_a_server_that_runs_elsewhere_counts_from_when_it_is_named(machine: Machine) -> None:
    meter = UsageMeter(FakeClock(), machine.roots, (LEM,))
    meter.watch(GUARDIAN, OTHER)  # it ran before: what it used until now is not the engine's
    meter.read()
    machine.processes[OTHER].cpu_s += 4.0
    machine.processes[33] = Process(OTHER, cpu_s=1.0, threads_s={33: (1.0, 0.0)})
    machine.write()
    assert meter.read().own_s == pytest.approx(4.0)
    meter.find_processes()
    assert meter.read().own_s == pytest.approx(5.0)
