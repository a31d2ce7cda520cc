"""What a sampler beside it costs an engine in throughput."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from lem.results.bootstrap import log_t_interval
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding
from tests.gpu.load import Busy

BATCH = 16
TARGET_PERCENT = 0.5


class SamplerCost(Step):
    """Pairs of runs, ABBA, with a sampler beside them and without: a GPU that is kept busy, and a model that generates.

    A small model waits for its Python process most of the time: where the speed of that moves by tenths, the copies
    alone can tell of half a percent.
    """

    name = "sampler-cost"
    title = "Cost of the sampler"

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent, first = bench.extent, bench.extent.models[0]
        engine = bench.engine()
        engine.load(bench.models / first, batch=BATCH, input_tok=extent.input_tok, output_tok=extent.output_tok)
        works = {
            "copies in the GPU's memory": lambda: _copied_per_s(engine.stay_busy(extent.pair_s)),
            f"{first}, batch {BATCH}": lambda: engine.generate(extent.pair_s),
        }
        for text, work in works.items():
            work()  # the first run is slower
            pairs = [_pair(bench, work, number) for number in range(extent.pairs)]
            yield _lost(f"throughput lost beside a sampler, {text}", pairs, extent.pair_s)


def _copied_per_s(busy: Busy) -> float:
    return busy.done / busy.seconds


def _lost(name: str, pairs: Sequence[tuple[float, float]], pair_s: float) -> Finding:
    interval = log_t_interval([beside / alone for beside, alone in pairs])
    if interval.geometric_mean is None or interval.ci_lower is None or interval.ci_upper is None:
        return Finding(name, None, "%", str(interval.warning))
    low, high = 100 * (1 - interval.ci_upper), 100 * (1 - interval.ci_lower)
    note = f"95 % t interval {low:.2f} to {high:.2f} %, {len(pairs)} ABBA pairs of {pair_s:g} s"
    details = {"beside_per_s": [pair[0] for pair in pairs], "alone_per_s": [pair[1] for pair in pairs]}
    return Finding(name, 100 * (1 - interval.geometric_mean), "%", note, f"at most {TARGET_PERCENT} %", details)


def _pair(bench: Bench, work: Callable[[], float], number: int) -> tuple[float, float]:
    """Throughput with a sampler and without, the two in the order ABBA over the pairs."""
    rates: dict[bool, float] = {}
    for is_beside in (True, False) if number % 2 == 0 else (False, True):
        beside = bench.sampling("sampler-cost") if is_beside else contextlib.nullcontext()
        with beside:
            rates[is_beside] = work()
    return rates[True], rates[False]
