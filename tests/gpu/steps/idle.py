"""Power at rest: bare, with a CUDA context, and with a model loaded."""

from __future__ import annotations

from collections.abc import Iterator

from lem.meters.curve import Span
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding
from tests.gpu.windows import rested_w


class Idle(Step):
    """Means of the energy counter over some seconds without work."""

    name = "idle"
    title = "Power at rest (energy counter)"

    def run(self, bench: Bench) -> Iterator[Finding]:
        bench.close_engine()
        yield _rest(bench, "idle-bare", "bare, no process on the GPU")
        engine = bench.engine()
        yield _rest(bench, "idle-context", "with a CUDA context and 2 GiB")
        extent, first = bench.extent, bench.extent.models[0]
        parameters = engine.load(
            bench.models / first, batch=1, input_tok=extent.input_tok, output_tok=extent.output_tok
        )
        yield _rest(bench, "idle-loaded", f"with {first} loaded ({parameters / 1e9:.3g} B parameters)")


def _rest(bench: Bench, name: str, text: str) -> Finding:
    """One look, after the device had time to settle; a margin beside it holds the readings at its edges."""
    bench.rest(bench.extent.settle_s)
    with bench.sampling(name) as sampled:
        bench.rest(bench.extent.guard_s)
        opened_ns = bench.clock.monotonic_ns()
        bench.rest(bench.extent.idle_s)
        span = Span(opened_ns, bench.clock.monotonic_ns())
        bench.rest(bench.extent.guard_s)
    log = sampled.log()
    temps = [row.temp_c for row in log.samples if row.temp_c is not None]
    note = f"over {span.seconds:.0f} s" + (f", {temps[-1]:.0f} °C" if temps else "")
    return Finding(text, rested_w(log, span), "W", note)
