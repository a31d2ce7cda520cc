"""Large campaigns: what the host takes while one runs, what every command takes afterwards, and its report."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lem.cli.main import main
from tests.bench.host import Figure, command_cost, run_host
from tests.browser import browser, opened
from tests.synthetic_campaign import sweep

_EXPERIMENTS = 10_000
_IN_REPORT = 1000
_FEW, _MORE = 5, 50

# Those that read every result, each with what it may take: CPU seconds and MiB.
_COMMANDS = (
    ("lem status", ("status", "demo"), 2, 100),
    ("lem results list, without an index", ("results", "list"), 20, 400),
    ("lem results list", ("results", "list"), 3, 150),
    ("lem check", ("check", "demo"), 10, 250),
    ("lem compare", ("compare", "demo"), 10, 250),
    ("lem results export", ("results", "export", "demo", "--output", "demo.csv"), 15, 500),
    ("lem report", ("report", "demo", "--output", "demo.html"), 25, 350),
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


# From the start of the navigation to the first frame after the page was loaded and laid out.
_DRAWN = """() => new Promise(resolve => {
    document.body.getBoundingClientRect();
    requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now())));
})"""


def report() -> Iterator[Figure]:
    """With one cycle, which gives the most configurations, and with five."""
    for cycles in (1, 5):
        with tempfile.TemporaryDirectory() as folder:
            yield from _report_of(cycles, Path(folder))


def _report_of(cycles: int, folder: Path) -> Iterator[Figure]:
    written = sweep(_IN_REPORT, cycles=cycles).write(folder)
    page = folder / "report.html"
    name = f"report of {_IN_REPORT:,} experiments, {cycles} {'cycle' if cycles == 1 else 'cycles'}"
    command = ["report", written.campaign, "--results-dir", str(written.results_dir), "--output", str(page)]
    begin_s = time.process_time()
    if main(command, io.StringIO(), io.StringIO()) != 0:
        raise RuntimeError("lem report fails")
    yield Figure(f"{name}: to make, CPU time", time.process_time() - begin_s, "s")
    yield Figure(f"{name}: size", page.stat().st_size / 1e6, "MB", 2)
    with browser() as started, opened(started, page) as found:
        yield Figure(f"{name}: drawn in", found.evaluate(_DRAWN) / 1000, "s", 2)
