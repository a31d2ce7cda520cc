"""How often the energy counter and the sensor of power are brought up to date, at rest and under load."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from lem.meters.curve import NotMeasured, Span, update_period_s
from lem.meters.nvml import NvmlMeter, open_nvml
from lem.meters.sampler import COUNTER_POLL_MS, Complaints, GpuWatch
from lem.meters.samples import CounterChange
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding, LeftOut
from tests.gpu.load import Busy

POLL_S = 0.002


class Meters(Step):
    """Changes seen by a poll every 2 ms, beside what lem's sampler makes of its own."""

    name = "meters"
    title = "Update periods of the meters"

    def run(self, bench: Bench) -> Iterator[Finding]:
        engine, probe_s = bench.engine(), bench.extent.probe_s
        with open_nvml() as nvml:
            if isinstance(nvml, str):
                raise LeftOut(f"NVML is not available: {nvml}")
            meter = NvmlMeter(nvml, bench.uuid)
            yield from _described(_look(bench, meter, probe_s), "at rest")
            with bench.sampling("meters") as sampled:
                bench.rest(bench.extent.guard_s)
                with ThreadPoolExecutor(1) as pool:
                    working = pool.submit(engine.stay_busy, probe_s + 0.4)
                    bench.rest(0.2)  # the load has begun
                    seen = _look(bench, meter, probe_s).within(working.result())
                bench.rest(bench.extent.guard_s)
            yield from _described(seen, "under load")
            try:
                period_s = update_period_s(sampled.log().counters, 0, seen.span)
                note = f"polled every {COUNTER_POLL_MS} ms"
                yield Finding("counter under load, as lem's sampler sees it", 1e3 * period_s, "ms", note)
            except NotMeasured as error:
                yield Finding("counter under load, as lem's sampler sees it", None, "ms", str(error))


@dataclass(frozen=True)
class _Seen:
    span: Span
    counter: Sequence[CounterChange]
    power_ns: Sequence[int]
    power_source: str | None

    def within(self, busy: Busy) -> _Seen:
        """What was seen of it under load."""
        span = Span(max(self.span.opened_ns, busy.opened_ns), min(self.span.closed_ns, busy.closed_ns))
        return _Seen(
            span,
            [row for row in self.counter if span.opened_ns <= row.at_ns <= span.closed_ns],
            [at_ns for at_ns in self.power_ns if span.opened_ns <= at_ns <= span.closed_ns],
            self.power_source,
        )


def _look(bench: Bench, meter: NvmlMeter, probe_s: float) -> _Seen:
    watch = GpuWatch(meter, 0, bench.clock, Complaints())
    opened_ns = bench.clock.monotonic_ns()
    until_ns = opened_ns + round(probe_s * 1e9)
    changes: list[CounterChange] = []
    power_ns: list[int] = []
    last_w: float | None = None
    while (now_ns := bench.clock.monotonic_ns()) < until_ns:
        changes += [row for row in watch.poll() if isinstance(row, CounterChange)]
        if meter.header.power_error is None:
            power_w = meter.read("power")
            power_ns += [now_ns] if last_w is not None and power_w != last_w else []
            last_w = power_w
        bench.clock.sleep(POLL_S)
    return _Seen(Span(opened_ns, until_ns), changes, power_ns, meter.header.power_source)


def _described(seen: _Seen, when: str) -> Iterator[Finding]:
    counter_ns = [row.at_ns for row in seen.counter if row.before_ns < row.at_ns]
    yield _period(f"counter {when}", counter_ns, f"{len(counter_ns)} changes in {seen.span.seconds:.1f} s")
    note = f"{len(seen.power_ns)} changes in {seen.span.seconds:.1f} s; source: {seen.power_source}"
    yield _period(f"power sensor {when}", seen.power_ns, note)


def _period(what: str, at_ns: Sequence[int], note: str) -> Finding:
    """The median spacing. A value that stays the same at an update hides it, so a sensor may look slower than it is."""
    spacings = [(after - before) / 1e6 for before, after in pairwise(at_ns)]
    if len(spacings) < 2:
        return Finding(what, None, "ms", f"too few changes: {note}")
    text = f"{note}, {min(spacings):.0f} to {max(spacings):.0f} ms apart"
    return Finding(what, statistics.median(spacings), "ms", text, details={"at_ns": list(at_ns)})
