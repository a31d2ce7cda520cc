"""A campaign of 10,000 experiments: what the host takes while it runs, and what every command takes afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.figure import Figure
from tests.bench.host import command_cost, run_host
from tests.synthetic_campaign import sweep

__all__ = ["scale"]

_EXPERIMENTS = 10_000
_FEW, _MORE = 5, 50

# Those that read every result, each with what it may take: CPU seconds and MiB.
_COMMANDS = (
    ("lem status", ("status", "demo"), 2, 100),
    ("lem results list", ("results", "list"), 10, 250),
    ("lem check", ("check", "demo"), 15, 250),
    ("lem compare", ("compare", "demo"), 15, 250),
    ("lem results export", ("results", "export", "demo", "--output", "demo.csv"), 15, 500),
    ("lem report", ("report", "demo", "--output", "demo.html"), 30, 350),
)


def scale() -> Iterator[Figure]:
    """The host's own cost, with so many in its manifest, and that of reading so many results."""
    with tempfile.TemporaryDirectory() as name:
        yield from _host(Path(name) / "campaign")
    with tempfile.TemporaryDirectory() as name:
        yield from _commands(Path(name))


def _host(folder: Path) -> Iterator[Figure]:
    few = run_host(folder, _EXPERIMENTS, stop_after=_FEW)
    more = run_host(folder, _EXPERIMENTS, "--resume", stop_after=_MORE)
    again = run_host(folder, _EXPERIMENTS, "--resume", stop_after=_FEW)
    name = f"{_EXPERIMENTS:,} experiments"
    each_s = (more.cpu_s - again.cpu_s) / (_MORE - _FEW)
    yield Figure(f"{name}: host, CPU time to start and to run {_FEW}", few.cpu_s, "s", 10)
    yield Figure(f"{name}: host, CPU time to resume and to run {_FEW}", again.cpu_s, "s", 10)
    yield Figure(f"{name}: host, CPU time an experiment (warm)", 1000 * each_s, "ms", 250)
    yield Figure(f"{name}: host, from a result to the next one's start", 1000 * more.turn_s, "ms", 250)
    yield Figure(f"{name}: host process, memory", more.memory_kib / 1024, "MiB", 200)


def _commands(folder: Path) -> Iterator[Figure]:
    sweep(_EXPERIMENTS, cycles=5).write(folder)
    for name, words, most_s, most_mib in _COMMANDS:
        cost = command_cost(folder, *words)
        yield Figure(f"{_EXPERIMENTS:,} results: {name}, CPU time", cost.cpu_s, "s", most_s)
        yield Figure(f"{_EXPERIMENTS:,} results: {name}, memory", cost.memory_kib / 1024, "MiB", most_mib)
