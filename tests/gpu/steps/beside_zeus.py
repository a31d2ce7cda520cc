"""The same window read by lem and by zeus (https://ml.energy/zeus), where that is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lem.meters.curve import Span, counter_curve
from lem.meters.nvml import find_gpus
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding, LeftOut
from tests.gpu.windows import COUNTER, counted_j


class BesideZeus(Step):
    """Both read the energy counter: zeus at the edges, lem at its changes."""

    name = "zeus"
    title = "The same window by zeus"

    def run(self, bench: Bench) -> Iterator[Finding]:
        monitor = _monitor(bench.uuid)
        engine, guard_s = bench.engine(), bench.extent.guard_s
        with bench.sampling("zeus") as sampled:
            bench.rest(2 * guard_s)
            opened_ns = time.monotonic_ns()
            monitor.begin_window("window", sync_execution=False)  # the engine is another process, which synchronises
            busy = engine.stay_busy(bench.extent.beside_s)
            measured = monitor.end_window("window", sync_execution=False)
            span = Span(opened_ns, time.monotonic_ns())
            bench.rest(2 * guard_s)
        log = sampled.log()
        zeus_j = float(sum(measured.gpu_energy.values()))
        lem_j = counter_curve(log.counters, 0, COUNTER).between_j(span)
        version = importlib.metadata.version("zeus") if _has_metadata() else "of an unknown version"
        note = f"zeus {version}: {zeus_j:.1f} J, lem: {lem_j:.1f} J, {span.seconds:.1f} s"
        yield Finding("lem over zeus, the window of zeus", lem_j / zeus_j, "", note, "1")
        closed_j = counted_j(log, busy, guard_s)
        note = f"lem's closed window ends with the work: {closed_j:.1f} J, {busy.seconds:.1f} s"
        yield Finding("lem over zeus, the window of lem", closed_j / zeus_j, "", note, details=asdict(busy))


def _monitor(uuid: str) -> Any:
    """A monitor of zeus on the GPU, as zeus numbers it (by CUDA_VISIBLE_DEVICES where that is set)."""
    try:
        monitors: Any = importlib.import_module("zeus.monitor")
    except ImportError as error:
        raise LeftOut(f"zeus cannot be imported ({error}); README.md says how to bring it along") from error
    if not any(gpu.uuid == uuid for gpu in find_gpus()):
        raise LeftOut("NVML does not see the GPU any more")
    # The driver chose the first visible GPU, which is 0 to zeus.
    return monitors.ZeusMonitor(gpu_indices=[0], cpu_indices=[])


def _has_metadata() -> bool:
    try:
        importlib.metadata.version("zeus")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
