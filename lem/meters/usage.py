"""Who used the CPUs: the engine, lem, other programs, the hypervisor; and whether the engine was kept from running.

Everything is a counter of the kernel that is read now and then. One walk over /proc finds the processes of the engine
when it is named and when a phase begins; between those, only these processes are read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lem.base.clock import Clock
from lem.base.dataclass import dataclass, replace
from lem.base.process import PROC, TICK_S, below, list_processes, numbered, read_small, read_stat
from lem.base.units import NS_PER_S
from lem.meters.rapl import POWERCAP
from lem.meters.samples import CpuUse

# Stopped by a signal, or by a tracer such as gdb.
_STOPPED = "Tt"
# Threads are read as often as keeps that below a thousandth of a CPU, but at least this often.
_THREADS_SHARE = 1000
_THREADS_AT_MOST_NS = 5 * NS_PER_S


@dataclass(frozen=True)
class Roots:
    """Where the kernel shows its files; a test passes trees of its own."""

    proc: Path = PROC
    sys: Path = Path("/sys")
    powercap: Path = POWERCAP

    @property
    def cgroup(self) -> Path:
        return self.sys / "fs" / "cgroup"


HERE = Roots()


@dataclass(frozen=True)
class CpuTimes:
    busy_s: float
    idle_s: float  # waiting for a disk included
    steal_s: float  # this virtual machine wanted to run, and the hypervisor ran something else


def read_cpu_times(proc: Path) -> CpuTimes:
    """From the first line of /proc/stat, also inside a container. Raises OSError, or ValueError: not understood."""
    first_line = read_small(proc / "stat").partition(b"\n")[0].decode(errors="replace")
    label, *words = first_line.split() or [""]
    if label != "cpu" or len(words) < 8 or not "".join(words).isdecimal():
        raise ValueError(f"{proc / 'stat'}: not understood: {first_line}")
    # user and nice hold what guests took (proc_stat(5)).
    user, nice, system, idle, iowait, irq, softirq, steal = (int(word) * TICK_S for word in words[:8])
    return CpuTimes(user + nice + system + irq + softirq, idle + iowait, steal)


def busy_ratio(before: CpuUse | None, now: CpuUse) -> float | None:
    if before is None:
        return None
    busy_s = now.busy_s - before.busy_s
    total_s = busy_s + now.idle_s - before.idle_s + now.steal_s - before.steal_s
    # The kernel's idle and iowait times may go back a little (proc_stat(5)).
    return min(1.0, max(0.0, busy_s / total_s)) if total_s > 0 else None


def find_by_namespace(proc: Path, pid: int, started_ticks: int) -> int | None:
    """The number here of a process that a container knows as `pid`; None if it is not there."""
    # The last number of `NSpid` is that in its innermost namespace; the start time tells apart those of several.
    for number in numbered(proc):
        with contextlib.suppress(OSError):  # it has ended
            inner = re.search(rb"^NSpid:.*\s(\d+)$", read_small(f"{proc}/{number}/status"), re.MULTILINE)
            found = read_stat(number, proc) if inner and int(inner[1]) == pid else None
            if found is not None and found.started_ticks == started_ticks:
                return number
    return None


class Limits:
    def __init__(self, roots: Roots, pid: int | str) -> None:
        self._folders: tuple[Path, ...] = ()
        self._freezers: tuple[tuple[Path, str], ...] = ()  # a file, and what it says of a frozen cgroup
        with contextlib.suppress(OSError):
            for line in read_small(roots.proc / str(pid) / "cgroup").decode(errors="replace").splitlines():
                _, controllers, path = line.split(":", 2)
                names = controllers.split(",")
                if controllers == "" or "cpu" in names:
                    self._folders += tuple(_levels(roots.cgroup, controllers, path))
                if controllers == "" or "freezer" in names:  # a cgroup shows it also if one above is frozen
                    name, frozen = ("freezer.state", "FROZEN") if controllers else ("cgroup.events", "frozen 1")
                    self._freezers += ((next(_levels(roots.cgroup, controllers, path)) / name, frozen),)
        self._before_s: dict[Path, float] = {}

    def throttled_s(self) -> float:
        """For how long a limit held threads back since the last call, over all CPUs; of nested limits the longest."""
        longest_s = 0.0
        for folder in self._folders:
            values = _pairs(folder / "cpu.stat")
            # Version 2 counts in microseconds, version 1 in nanoseconds.
            if (now := values.get("throttled_usec")) is not None:
                now_s = now / 1e6
            elif (now := values.get("throttled_time")) is not None:
                now_s = now / NS_PER_S
            else:
                continue
            longest_s = max(longest_s, now_s - self._before_s.get(folder, now_s))
            self._before_s[folder] = now_s
        return longest_s

    @property
    def is_frozen(self) -> bool:
        return any(frozen in _text(path).splitlines() for path, frozen in self._freezers)

    @property
    def cpus(self) -> float | None:
        allowed = []
        for folder in self._folders:
            quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
            quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):
                allowed.append(int(quota) / int(period))
        return min(allowed, default=None)


def _levels(root: Path, controllers: str, path: str) -> Iterator[Path]:
    bases = [root / controllers, *(root / name for name in controllers.split(","))] if controllers else []
    base = next((base for base in bases if base.is_dir()), root / "unified" if not controllers else root)
    base = base if base.is_dir() else root
    parts = Path(path.lstrip("/")).parts
    if ".." in parts or not (base / Path(*parts)).is_dir():
        parts = ()
    for size in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:size])


def _pairs(path: Path) -> dict[str, int]:
    words = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return read_small(path).decode("ascii", "replace").strip()
    return ""


_Key = TypeVar("_Key")


class _Growth(Generic[_Key]):
    def __init__(self) -> None:
        self.total_s = 0.0
        self._before_s: Mapping[_Key, float] | None = None

    def add(self, now_s: Mapping[_Key, float]) -> None:
        before_s = now_s if self._before_s is None else self._before_s
        self.total_s += sum(max(0.0, value - before_s.get(key, 0.0)) for key, value in now_s.items())
        self._before_s = now_s


class _Engine:
    def __init__(self, roots: Roots, pid: int, now_ns: int) -> None:
        self.limits: tuple[Limits, ...] = ()
        self.throttled_s = self.stopped_s = 0.0
        self.looked_ns = now_ns
        self._roots = roots
        self._proc = roots.proc
        self._tops: tuple[int, ...] = ()
        self._run: _Growth[tuple[int, int]] = _Growth()
        self._wait: _Growth[tuple[int, int]] = _Growth()
        self._cpu_s = 0.0
        self._cpu_before_s: float | None = None
        self.add(pid)

    def add(self, *pids: int) -> None:
        """Count these processes and those below them too; they share a cgroup."""
        self._tops += pids
        for limits in (Limits(self._roots, pid) for pid in pids[:1]):
            limits.throttled_s()
            self.limits += (limits,)
        self.find_processes()

    def find_processes(self) -> None:
        """Find its processes again, since it may have started some, and its supervisor, which is lem's."""
        processes = list_processes(self._proc)
        tops = [pid for pid in self._tops if pid in processes]
        self.pids = tuple(dict.fromkeys(pid for top in tops for pid in (top, *below(top, processes))))
        self._supervisor = tuple(processes[pid].parent for pid in self._tops[:1] if pid in processes)
        self.threads_due_ns = 0

    def cpu_s(self) -> float:
        """That of a process which ends passes to the one that waits for it."""
        found = (read_stat(pid, self._proc) for pid in (*self.pids, *self._supervisor))
        now_s = sum(stat.cpu_s + stat.ended_s for stat in found if stat is not None)
        self._cpu_before_s = now_s if self._cpu_before_s is None else self._cpu_before_s
        self._cpu_s = max(self._cpu_s, now_s - self._cpu_before_s)
        return self._cpu_s

    def thread_times_s(self) -> tuple[float, float] | None:
        """How long its threads ran, and waited for a CPU, since the first call; None if the kernel does not count."""
        # /proc/PID/task/TID/schedstat: nanoseconds on a CPU and on a run queue (sched-stats.rst in the kernel's
        # documentation). Whether the latter covers the time in which a limit kept a thread from running depends on the
        # kernel.
        run_s, wait_s = {}, {}
        for pid in self.pids:
            folder = self._proc / str(pid) / "task"
            with contextlib.suppress(OSError):
                for tid in numbered(folder):
                    with contextlib.suppress(OSError, ValueError):  # the thread has ended, or there is no such file
                        run, wait, _ = read_small(f"{folder}/{tid}/schedstat").split()
                        run_s[pid, tid], wait_s[pid, tid] = int(run) / NS_PER_S, int(wait) / NS_PER_S
        if not any(run_s.values()):  # all 0 where the kernel was told not to count (kernel.sched_schedstats)
            return None
        self._run.add(run_s)
        self._wait.add(wait_s)
        return self._run.total_s, self._wait.total_s

    def is_stopped(self) -> bool:
        stats = (read_stat(pid, self._proc) for pid in self.pids)
        is_stopped = any(stat is not None and stat.state in _STOPPED for stat in stats)
        return is_stopped or any(limits.is_frozen for limits in self.limits)


class UsageMeter:
    def __init__(self, clock: Clock, roots: Roots, lem_pids: Sequence[int] = ()) -> None:
        self._clock = clock
        self._roots = roots
        self._lem_pids = tuple(lem_pids)
        self._lem: _Growth[int] = _Growth()
        self._engine: _Engine | None = None

    def watch(self, pid: int, *others: int) -> None:
        """Count for the engine whose processes are these and those below them, from 0 on."""
        self._engine, self._lem = _Engine(self._roots, pid, self._clock.monotonic_ns()), _Growth()
        self._engine.add(*others)

    def find_processes(self) -> None:
        if self._engine is not None:
            self._engine.find_processes()

    def look(self) -> None:
        if self._engine is not None:
            now_ns = self._clock.monotonic_ns()
            if self._engine.is_stopped():
                self._engine.stopped_s += (now_ns - self._engine.looked_ns) / NS_PER_S
            self._engine.looked_ns = now_ns

    def read(self) -> CpuUse:
        at_ns = self._clock.monotonic_ns()
        times = read_cpu_times(self._roots.proc)
        row = CpuUse(at_ns, *map(_rounded, (self._clock.asleep_s(), times.busy_s, times.idle_s, times.steal_s)))
        engine = self._engine
        if engine is None or not engine.pids:
            return row
        found = ((pid, read_stat(pid, self._roots.proc)) for pid in self._lem_pids)
        self._lem.add({pid: stat.cpu_s for pid, stat in found if stat is not None})
        engine.throttled_s += sum(limits.throttled_s() for limits in engine.limits)
        threads_s = self._thread_times_s(engine)
        return replace(
            row,
            own_s=_rounded(self._lem.total_s + engine.cpu_s()),
            throttled_s=_rounded(engine.throttled_s),
            stopped_s=_rounded(engine.stopped_s),
            run_s=None if threads_s is None else _rounded(threads_s[0]),
            wait_s=None if threads_s is None else _rounded(threads_s[1]),
        )

    def _thread_times_s(self, engine: _Engine) -> tuple[float, float] | None:
        """Those of the threads, as often as costs little: an engine may have hundreds."""
        begin_ns = self._clock.monotonic_ns()
        if begin_ns < engine.threads_due_ns:
            return None
        times_s = engine.thread_times_s()
        cost_ns = self._clock.monotonic_ns() - begin_ns
        engine.threads_due_ns = begin_ns + min(_THREADS_SHARE * cost_ns, _THREADS_AT_MOST_NS)
        return times_s


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


@dataclass(frozen=True)
class MachineLoad:
    cpus: float  # that there are
    foreign: float  # used by other programs than this one
    stolen: float  # that the hypervisor gave to others
    programs: tuple[tuple[str, float], ...]  # (name and number, CPUs), the greatest first, without this one


def watch_machine(clock: Clock, roots: Roots, own_pid: int, duration_s: float) -> MachineLoad:
    begin_ns, times, before = clock.monotonic_ns(), read_cpu_times(roots.proc), list_processes(roots.proc)
    clock.sleep(duration_s)
    now, after = read_cpu_times(roots.proc), list_processes(roots.proc)
    elapsed_s = (clock.monotonic_ns() - begin_ns) / NS_PER_S
    used = {
        pid: (stat.cpu_s - (before[pid].cpu_s if pid in before else 0.0)) / elapsed_s for pid, stat in after.items()
    }
    busy, stolen = (now.busy_s - times.busy_s) / elapsed_s, (now.steal_s - times.steal_s) / elapsed_s
    programs = sorted(((cpus, pid) for pid, cpus in used.items() if pid != own_pid and cpus > 0), reverse=True)
    return MachineLoad(
        cpus=busy + stolen + (now.idle_s - times.idle_s) / elapsed_s,
        foreign=max(0.0, busy - used.get(own_pid, 0.0)),
        stolen=stolen,
        programs=tuple((f"{after[pid].name} ({pid})", cpus) for cpus, pid in programs),
    )
