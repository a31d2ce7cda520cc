"""Whether short windows add up to a long one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from lem.meters.samples import SampleLog
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding
from tests.gpu.load import Busy
from tests.gpu.windows import counted_j, integrated_j, naive_j


class Additivity(Step):
    """One window of 30 s among three of 10 s, all with idle guards and the same load; mean power is compared.

    Windows end with a whole piece of work and so are not equally long to the millisecond: their energies are divided
    by their lengths. The long one stands in the middle, since a GPU warms up.
    """

    name = "additivity"
    title = "Additivity of windows"

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent, engine = bench.extent, bench.engine()
        engine.stay_busy(extent.settle_s)
        bench.rest(extent.guard_s)
        long_place = extent.parts // 2
        lengths = [extent.part_s] * extent.parts
        lengths.insert(long_place, extent.part_s * extent.parts)
        with bench.sampling("additivity") as sampled:
            bench.rest(extent.guard_s)
            found = []
            for length_s in lengths:
                found.append(engine.stay_busy(length_s))
                bench.rest(2 * extent.guard_s)
        long = found.pop(long_place)
        log, guard_s = sampled.log(), extent.guard_s
        text = f"{extent.parts} × {extent.part_s:g} s over {extent.part_s * extent.parts:g} s"
        details = {"parts": [asdict(item) for item in found], "whole": asdict(long)}
        counted = [counted_j(log, item, guard_s) for item in (*found, long)]
        yield Finding(
            f"energy of {text}, per second", _ratio(counted, (*found, long)), "", "the counter in closed windows", "1",
            {**details, "counted_j": counted},
        )  # fmt: skip
        naive = [naive_j(log, item) for item in (*found, long)]
        yield Finding(f"naive difference, {text}", _ratio(naive, (*found, long)), "", "the counter read at the edges")
        yield from _integrated(log, found, long, text)
        done = sum(item.done for item in found) / sum(item.seconds for item in found) / (long.done / long.seconds)
        yield Finding(f"work of {text}, per second", done, "", "what the load did meanwhile")


def _integrated(log: SampleLog, parts: list[Busy], whole: Busy, text: str) -> Iterator[Finding]:
    if log.header.gpus[0].power_error is not None:
        yield Finding(f"integrated power, {text}", None, "", log.header.gpus[0].power_error)
        return
    windows = (*parts, whole)
    integrated = [integrated_j(log, item, log.header.interval_ms / 1e3) for item in windows]
    yield Finding(f"integrated power, {text}", _ratio(integrated, windows), "", log.header.gpus[0].power_source or "")


def _ratio(energies_j: list[float], windows: tuple[Busy, ...]) -> float:
    """Mean power over the parts, over that of the whole, which is the last."""
    seconds = [item.seconds for item in windows]
    return sum(energies_j[:-1]) / sum(seconds[:-1]) / (energies_j[-1] / seconds[-1])
