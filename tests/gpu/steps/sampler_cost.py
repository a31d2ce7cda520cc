"""What a sampler beside it costs an engine in throughput."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from lem.results.statistics import log_t_interval
from tests.gpu.bench import Bench
from tests.gpu.engine_client import Engine
from tests.gpu.finding import Finding

__all__ = ["SamplerCost"]

BATCH = 16
TARGET_PERCENT = 0.5


@dataclass(frozen=True)
class SamplerCost:
    """Pairs of runs, ABBA: a model generates with a sampler beside it, and without."""

    name: str = "sampler-cost"
    title: str = "Cost of the sampler"
    is_brief: bool = False

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent, first = bench.extent, bench.extent.models[0]
        engine = bench.engine()
        engine.load(bench.models / first, batch=BATCH, input_tok=extent.input_tok, output_tok=extent.output_tok)
        engine.generate(extent.pair_s)  # the first run is slower
        pairs = [_pair(bench, engine, number) for number in range(extent.pairs)]
        interval = log_t_interval([beside / alone for beside, alone in pairs])
        name = f"throughput lost beside a sampler, {first}, batch {BATCH}"
        if interval.geometric_mean is None or interval.ci_lower is None or interval.ci_upper is None:
            yield Finding(name, None, "%", str(interval.warning))
            return
        low, high = 100 * (1 - interval.ci_upper), 100 * (1 - interval.ci_lower)
        note = f"95 % t interval {low:.2f} to {high:.2f} %, {len(pairs)} ABBA pairs of {extent.pair_s:g} s"
        details = {"beside_tok_per_s": [pair[0] for pair in pairs], "alone_tok_per_s": [pair[1] for pair in pairs]}
        target = f"at most {TARGET_PERCENT} %"
        yield Finding(name, 100 * (1 - interval.geometric_mean), "%", note, target, details)


def _pair(bench: Bench, engine: Engine, number: int) -> tuple[float, float]:
    """Throughput with a sampler and without, the two in the order ABBA over the pairs."""
    rates: dict[bool, float] = {}
    for is_beside in (True, False) if number % 2 == 0 else (False, True):
        beside = bench.sampling("sampler-cost") if is_beside else contextlib.nullcontext()
        with beside:
            rates[is_beside] = engine.generate(bench.extent.pair_s)
    return rates[True], rates[False]
