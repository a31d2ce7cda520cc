"""A load that goes on and off: what the counter sees of it, and what integrated power does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from lem.meters.curve import power_curve
from lem.meters.samples import SampleLog
from tests.gpu.bench import INTERVAL_MS, Bench, Step
from tests.gpu.finding import Finding
from tests.gpu.load import Busy
from tests.gpu.windows import counted_j, integrated_j, span_of, thinned

FINE_MS = 20


class SquareWave(Step):
    """Integrated power over the counter's energy at several periods.

    A sensor that sees 25 of every 100 ms (A100, H100) aliases what swings near 10 Hz (Yang et al., SC24).
    """

    name = "square-wave"
    title = "A load that swings: integrated power over the counter"

    def run(self, bench: Bench) -> Iterator[Finding]:
        engine, guard_s = bench.engine(), bench.extent.guard_s
        with bench.sampling("square-wave", FINE_MS) as sampled:
            bench.rest(guard_s)
            found = []
            for period_s, duration_s in bench.extent.waves:
                found.append((period_s, engine.swing(period_s, duration_s)))
                bench.rest(2 * guard_s)
        log = sampled.log()
        for period_s, busy in found:
            counted = counted_j(log, busy, guard_s)
            text = f"on and off every {period_s:g} s"
            details = {**asdict(busy), "counted_j": counted}
            yield Finding(f"{text}: mean power", counted / busy.seconds, "W", "the counter", details=details)
            if log.header.gpus[0].power_error is not None:
                yield Finding(text, None, "", log.header.gpus[0].power_error)
                continue
            yield from _ratios(log, busy, counted, text)


def _ratios(log: SampleLog, busy: Busy, counted: float, text: str) -> Iterator[Finding]:
    source = log.header.gpus[0].power_source
    fine = integrated_j(log, busy, FINE_MS / 1e3)
    yield Finding(f"{text}: sampled every {FINE_MS} ms", fine / counted, "", f"{source} over {busy.seconds:.1f} s")
    samples = thinned(log, INTERVAL_MS // FINE_MS)
    coarse = power_curve(samples, 0, INTERVAL_MS / 1e3, "power").between_j(span_of(busy))
    yield Finding(f"{text}: sampled every {INTERVAL_MS} ms", coarse / counted, "", f"{source}; lem's usual interval")
