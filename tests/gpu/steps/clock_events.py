"""The clock events that were seen in everything before."""

from __future__ import annotations

from collections.abc import Iterator

from lem.base.measurement import SLOWDOWN_BITS
from lem.meters.samples import FINISHED_FILENAME, GpuSample, PartReader, read_finished
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding, LeftOut

# nvmlClocksEventReasons (NVML reference); the others make an experiment invalid.
BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x10: "sync boost",
    0x100: "display clocks",
    **SLOWDOWN_BITS,
}


class ClockEvents(Step):
    """Shares of the samples that all steps of this folder have left."""

    name = "events"
    title = "Clock events, temperature and clocks seen"
    is_brief = True

    def run(self, bench: Bench) -> Iterator[Finding]:
        samples = list(_samples(bench))
        masks = [row.event_mask for row in samples if row.event_mask is not None]
        if not masks:
            raise LeftOut("no sample tells of clock events")
        for bit, text in BITS.items():
            seen = sum(bool(mask & bit) for mask in masks)
            if seen or bit in SLOWDOWN_BITS:
                note = f"{seen} of {len(masks)} samples"
                target = "0 %" if bit in SLOWDOWN_BITS else ""
                yield Finding(f"{text} ({bit:#x})", 100 * seen / len(masks), "%", note, target)
        temps = [row.temp_c for row in samples if row.temp_c is not None]
        if temps:
            yield Finding("hottest", max(temps), "°C", f"coldest {min(temps):.0f} °C")
        clocks = [row.sm_clock_hz for row in samples if row.sm_clock_hz is not None and (row.util_ratio or 0) > 0.5]
        if clocks:
            note = f"down to {min(clocks) / 1e6:.0f} MHz, in samples that tell of more than 50 % use"
            yield Finding("SM clock under load, highest", max(clocks) / 1e6, "MHz", note)


def _samples(bench: Bench) -> Iterator[GpuSample]:
    for path in sorted(bench.samples.glob("*.part")):
        yield from PartReader(path).read().samples
    for path in sorted((bench.out / "results").rglob(FINISHED_FILENAME)):
        yield from read_finished(path)[0].samples
