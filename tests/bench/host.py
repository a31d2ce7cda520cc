"""Figures; what a process costs, and the host of a campaign beside its worker; and pairs of runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lem.base.errors import ExitCode
from lem.results.bootstrap import log_t_interval
from tests.bench.builds import Build

HEADER = f"{'figure':<64}{'value':>10} {'unit':<6}{'target':>10}"


@dataclass(frozen=True)
class Figure:
    """One line of the table; `target` is what the value must not exceed, None for a figure others are measured by."""

    name: str
    value: float
    unit: str
    target: float | None = None

    def __str__(self) -> str:
        line = f"{self.name:<64}{self.value:>10.2f} {self.unit:<6}"
        if self.target is None:
            return line.rstrip()
        return f"{line}{self.target:>10.2f}  {'ok' if self.value <= self.target else 'OVER'}"


TIMEOUT_S = 600
_WARM_AFTER = 5  # results
_NEW_OPTION = "    measurement.max_wait_pct: [null]\n"  # unknown to the first build

# A small process starts the one that is measured, since the largest size of a child includes that of its parent.
_ACCOUNT = """
import os, sys
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


@dataclass(frozen=True)
class Cost:
    cpu_s: float  # of a process and all that it waited for
    memory_kib: int  # the largest resident size


def process_cost(folder: Path, *arguments: str, codes: Sequence[int] = (0,), environ: Mapping[str, str] = {}) -> Cost:
    """What Python takes with these arguments, by the kernel's account (wait4).

    Args:
        codes: that it may exit with.
        environ: more variables.
    """
    command = [sys.executable, "-I", "-S", "-c", _ACCOUNT, sys.executable, *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LEM", "PYTHON"))}
    done = subprocess.run(
        command, cwd=folder, env={**plain, **environ}, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    code, cpu_s, memory_kib = done.stdout.split()
    if int(code) not in codes:
        raise RuntimeError(f"{' '.join(arguments)} fails with {code}:\n{done.stderr[-2000:]}")
    return Cost(float(cpu_s), int(memory_kib))


@dataclass(frozen=True)
class HostCost:
    """What the host process of a campaign takes, its workers left out; of an experiment, once some have run."""

    first_cpu_s: float  # until the first result
    each_cpu_s: float  # from one result to the next
    turn_s: float  # median time from the event of a result to the first phase of the next experiment
    memory_kib: int  # the largest resident size


def run_host(build: Build, folder: Path, planned: int, results: int) -> HostCost:
    """Run a campaign of so many experiments until so many results are there."""
    folder.mkdir(parents=True)
    cpu_s: list[float] = []
    turns_s: list[float] = []
    completed_s: float | None = None
    memory_kib = 0
    with start_campaign(build, folder, planned) as process:
        for line in process.stdout or ():
            event, now_s = json.loads(line)["event"], time.perf_counter()
            if event == "phase" and completed_s is not None:
                turns_s.append(now_s - completed_s)
                completed_s = None
            elif event == "experiment_completed":
                completed_s = now_s
                cpu_s.append(time.clock_gettime(~process.pid << 3 | 2))  # its CPU clock: clock_getcpuclockid(3)
                memory_kib = max(memory_kib, _largest_kib(process.pid))
                if len(cpu_s) == results < planned:
                    process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT_S)
    if code != (ExitCode.OK if results == planned else ExitCode.SIGTERM):
        raise RuntimeError(f"lem fails with {code}:\n{(folder / 'errors').read_text()[-2000:]}")
    each_cpu_s = (cpu_s[results - 1] - cpu_s[_WARM_AFTER - 1]) / (results - _WARM_AFTER)
    return HostCost(cpu_s[0], each_cpu_s, statistics.median(turns_s[_WARM_AFTER:]), memory_kib)


def start_campaign(
    build: Build, folder: Path, planned: int, *, program: Sequence[str] = (), environ: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """`lem campaign` of so many experiments on one load of an engine that answers at once; it prints its events.

    Args:
        program: arguments of Python that come before lem.pyz.
        environ: more variables.
    """
    text = campaign_text(planned).replace(_NEW_OPTION, "" if build.is_first else _NEW_OPTION)
    (folder / "bench.yaml").write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text("one two three\nfour five\n", encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LEM", "PYTHON"))}
    doubles = {"PYTHONPATH": str(build.tree / "tests" / "doubles")}
    places = {"LEM_LOCK_DIR": str(folder), "LEM_CACHE_DIR": str(folder.parent)}
    words = ["campaign", "bench.yaml", "--executor", "local", "--fresh", "--yes", "--json"]
    command = [sys.executable, *program, str(build.zip), *words]
    with open(folder / "errors", "wb") as errors:
        return subprocess.Popen(
            command, cwd=folder, env={**plain, **doubles, **places, **environ}, stdout=subprocess.PIPE, stderr=errors
        )


def _largest_kib(pid: int) -> int:
    """The largest resident size of a process so far; 0 once it has ended."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines())
    return int(fields.get("VmHWM", "0 kB").split()[0])


def campaign_text(experiments: int) -> str:
    """A campaign of so many experiments in one cycle, with one engine key: only the batch size differs."""
    return f"""\
campaign_name: bench
model: trivial
grid:
  backends: [pytorch]
  shared:
    max_output_tokens: [8]
    min_output_tokens: [8]
    ignore_eos: [true]
    gpus: [[]]
    warmup.enabled: [false]
    measurement.min_window_sec: [0.01]
    measurement.max_wait_pct: [null]
    prompts: [{{type: file, path: prompts.txt}}]
  backend_overrides:
    pytorch:
      batch_size: {list(range(1, experiments + 1))}
execution: {{cycles: 1, config_gap_seconds: 0, cycle_gap_seconds: 0}}
"""


# Two sides run in turn, so that what a machine does meanwhile meets both

T = TypeVar("T")

TARGET = 0.97


def in_turn(ours: Callable[[], T], theirs: Callable[[], T], pairs: int) -> Iterator[tuple[T, T]]:
    """What both sides give, pair by pair, run in the order ABBA; the first run of each is slower, and left out."""
    ours(), theirs()
    for index in range(pairs):
        order = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        found = {side: side() for side in order}
        yield found[ours], found[theirs]


def told(whose: str, ratios: Sequence[float]) -> str:
    """The line about lem's throughput over that of another: the geometric mean with its interval on logs."""
    interval = log_t_interval(ratios)
    return (
        f"throughput, lem over {whose}: {interval.geometric_mean:.4f} "
        f"({interval.ci_lower:.4f} to {interval.ci_upper:.4f}, 95 % t interval, {len(ratios)} pairs; "
        f"target above {TARGET})"
    )
