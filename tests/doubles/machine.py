"""A folder like /proc and /sys/fs/cgroup, with processes, threads and CPU limits that a test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lem.meters.usage import Roots

TICKS_PER_S = 100
_NS = 1_000_000_000


@dataclass
class Process:
    parent: int
    cpu_s: float = 0.0
    ended_s: float = 0.0  # of children that it waited for
    state: str = "S"
    threads_s: dict[int, tuple[float, float]] = field(default_factory=dict)  # tid: (run, waited)
    cgroup: str = "0::/lem.slice/engine"
    name: str = "python3 (engine)"  # a name may hold blanks and parentheses
    started_ticks: int = 4711
    inner_pid: int | None = None  # its number in its container


@dataclass
class Machine:
    """The tree is written by `write`, with the processes and times that are set then."""

    folder: Path
    busy_s: float = 0.0
    idle_s: float = 1000.0
    steal_s: float = 0.0
    processes: dict[int, Process] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # below /sys/fs/cgroup

    @property
    def roots(self) -> Roots:
        return Roots(proc=self.folder / "proc", sys=self.folder / "sys", powercap=self.folder / "powercap")

    def write(self) -> None:
        proc = self.roots.proc
        proc.mkdir(parents=True, exist_ok=True)
        ticks = [round(value * TICKS_PER_S) for value in (self.busy_s, 0, 0, self.idle_s, 0, 0, 0, self.steal_s)]
        (proc / "stat").write_text(f"cpu  {' '.join(map(str, ticks))} 0 0\ncpu0 1 2 3\n", encoding="ascii")
        for path in proc.iterdir():
            if path.name.isdigit() and int(path.name) not in self.processes:
                path.rename(proc / f"gone-{path.name}")
        for pid, process in self.processes.items():
            self._write_process(proc / str(pid), pid, process)
        for name, text in self.files.items():
            path = self.roots.cgroup / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")

    def _write_process(self, folder: Path, pid: int, process: Process) -> None:
        (folder / "task").mkdir(parents=True, exist_ok=True)
        user, system, ended = round(process.cpu_s * TICKS_PER_S), 0, round(process.ended_s * TICKS_PER_S)
        fields = [process.state, process.parent, *[0] * 9, user, system, ended, *[0] * 5, process.started_ticks, 0]
        text = f"{pid} ({process.name}) {' '.join(map(str, fields))}\n"
        (folder / "stat").write_text(text, encoding="ascii")
        (folder / "cgroup").write_text(f"{process.cgroup}\n", encoding="ascii")
        inner = "" if process.inner_pid is None else f"\t{process.inner_pid}"
        (folder / "status").write_text(f"Name:\tx\nNSpid:\t{pid}{inner}\nThreads:\t1\n", encoding="ascii")
        for path in (folder / "task").iterdir():
            if int(path.name) not in process.threads_s:
                (path / "schedstat").unlink(missing_ok=True)
        for tid, (run_s, wait_s) in process.threads_s.items():
            thread = folder / "task" / str(tid)
            thread.mkdir(exist_ok=True)
            (thread / "schedstat").write_text(f"{round(run_s * _NS)} {round(wait_s * _NS)} 17\n", encoding="ascii")
