"""Figures; what the host process of a campaign costs beside its worker; and pairs of runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from lem.base.errors import ExitCode
from lem.results.bootstrap import log_t_interval

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


ROOT = Path(__file__).resolve().parents[2]
PYZ = ROOT / "lem.pyz"
TIMEOUT_S = 600

# Runs lem.pyz as Python would, then says what the host process itself took (its children left out).
HOST = """
import json, resource, runpy, sys, time
report = sys.argv[1]
sys.argv = sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
json.dump({"code": code, "cpu_s": time.process_time(), "memory_kib": memory_kib}, open(report, "w"))
"""


@dataclass(frozen=True)
class HostCost:
    """What the host process of a campaign took, its workers left out.

    Attributes:
        turn_s: median over experiments of the time from the event that one is completed to the first phase of the next.
    """

    cpu_s: float
    memory_kib: int
    turn_s: float = 0.0


def run_host(folder: Path, experiments: int, *options: str, stop_after: int | None = None) -> HostCost:
    """What it takes to run a campaign of so many experiments that share one engine load.

    Args:
        options: of `lem campaign`.
        stop_after: end it by SIGTERM once so many are completed; `--resume` in the same folder then goes on."""
    folder.mkdir(exist_ok=True)
    (folder / "bench.yaml").write_text(campaign_text(experiments), encoding="utf-8")
    (folder / "prompts.txt").write_text("one two three\nfour five\n", encoding="utf-8")
    words = ["campaign", "bench.yaml", "--executor", "local", *(options or ("--fresh",)), "--yes", "--json"]
    with open(folder / "errors", "wb") as errors:
        process = _start(folder, words, subprocess.PIPE, errors)
        turn_s = _follow(process, stop_after)
        process.wait(TIMEOUT_S)
    cost = _cost(folder, int(ExitCode.OK) if stop_after is None else int(ExitCode.SIGTERM))
    return HostCost(cost.cpu_s, cost.memory_kib, turn_s)


def command_cost(folder: Path, *words: str) -> HostCost:
    with open(folder / "errors", "wb") as errors:
        _start(folder, words, subprocess.DEVNULL, errors).wait(TIMEOUT_S)
    return _cost(folder, int(ExitCode.OK))


def _start(folder: Path, words: Sequence[str], out: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LEM")}
    environ |= {"PYTHONPATH": str(ROOT / "tests" / "doubles"), "LEM_LOCK_DIR": str(folder)}
    command = [sys.executable, "-c", HOST, "host.json", str(PYZ), *words]
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=out, stderr=errors)


def _cost(folder: Path, code: int) -> HostCost:
    report = json.loads((folder / "host.json").read_text(encoding="utf-8"))
    if report["code"] != code:
        raise RuntimeError(f"lem fails with {report['code']}:\n{(folder / 'errors').read_text()[-2000:]}")
    return HostCost(report["cpu_s"], report["memory_kib"])


def _follow(process: subprocess.Popen[bytes], stop_after: int | None) -> float:
    """The median of the seconds from a completed experiment to the next one's first phase."""
    turns_s: list[float] = []
    completed_s: float | None = None
    completed = 0
    for line in process.stdout or ():
        event, now_s = json.loads(line)["event"], time.perf_counter()
        if event == "phase" and completed_s is not None:
            turns_s.append(now_s - completed_s)
            completed_s = None
        elif event == "experiment_completed":
            completed_s = now_s
            completed += 1
            if completed == stop_after:
                process.send_signal(signal.SIGTERM)
    return statistics.median(turns_s) if turns_s else 0.0


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
