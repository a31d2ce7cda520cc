"""The report of 1,000 experiments: time to make, size, and time until Chromium has drawn it."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lem.cli.main import main
from tests.bench.figure import Figure
from tests.browser import browser, opened
from tests.synthetic_campaign import sweep

__all__ = ["report"]

_EXPERIMENTS = 1000

# From the start of the navigation to the first frame after the page was loaded and laid out.
_DRAWN = """() => new Promise(resolve => {
    document.body.getBoundingClientRect();
    requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now())));
})"""


def report() -> Iterator[Figure]:
    """With one cycle, which gives the most configurations, and with five."""
    for cycles in (1, 5):
        with tempfile.TemporaryDirectory() as folder:
            yield from _of(cycles, Path(folder))


def _of(cycles: int, folder: Path) -> Iterator[Figure]:
    written = sweep(_EXPERIMENTS, cycles=cycles).write(folder)
    page = folder / "report.html"
    name = f"report of {_EXPERIMENTS:,} experiments, {cycles} {'cycle' if cycles == 1 else 'cycles'}"
    command = ["report", written.campaign, "--results-dir", str(written.results_dir), "--output", str(page)]
    begin_s = time.process_time()
    if main(command, io.StringIO(), io.StringIO()) != 0:
        raise RuntimeError("lem report fails")
    yield Figure(f"{name}: to make, CPU time", time.process_time() - begin_s, "s")
    yield Figure(f"{name}: size", page.stat().st_size / 1e6, "MB", 2)
    with browser() as started, opened(started, page) as found:
        yield Figure(f"{name}: drawn in", found.evaluate(_DRAWN) / 1000, "s", 2)
