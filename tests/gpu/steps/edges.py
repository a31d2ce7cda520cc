"""What the energy counter tells of a load that begins and ends at known moments: how far it lags behind."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

from lem.base.importer import CACHE_VARIABLE
from lem.base.launch import own_command
from lem.base.units import NS_PER_S
from lem.meters.curve import Curve, Span, counter_curve
from lem.meters.sampler import COUNTER_POLL_MS
from tests.gpu.bench import Bench, Step
from tests.gpu.finding import Finding
from tests.gpu.load import Busy
from tests.gpu.windows import COUNTER

# Around an edge power changes for so long, to the slowest counter's eye; beyond it is level for so long.
SETTLED_S, LEVEL_S = 0.4, 0.5
_PROBE_S = 180.0


class Edges(Step):
    """Energy that is missing after a beginning, and that comes after an end, as time at the step of power.

    A counter that lags shows the same at both. A device that takes its time to draw its power shows it at the
    beginning alone, one that takes its time to relax at the end alone.
    """

    name = "edges"
    title = "The counter at the edges of a load"

    def run(self, bench: Bench) -> Iterator[Finding]:
        extent, engine = bench.extent, bench.engine()
        engine.stay_busy(extent.settle_s)
        with bench.sampling("edges") as sampled:
            bench.rest(SETTLED_S + LEVEL_S)
            found = []
            for _ in range(extent.edges):
                bench.rest(SETTLED_S + LEVEL_S)
                found.append(engine.stay_busy(2 * (SETTLED_S + LEVEL_S)))
                bench.rest(SETTLED_S + LEVEL_S)
            bench.rest(SETTLED_S)  # until the counter has told of the end
        log = sampled.log()
        curve = counter_curve(log.counters, 0, COUNTER)
        bounds = [(high - low) / 1e6 for low, high in zip(curve.earliest_ns, curve.latest_ns, strict=True)]
        note = f"the median of {len(bounds)}; polled every {COUNTER_POLL_MS} ms"
        yield Finding("bounds on the moment of an update", statistics.median(bounds), "ms", note)
        yield _times("missing after a beginning", [_missing_ms(curve, busy) for busy in found])
        yield _times("left over after an end", [_left_over_ms(curve, busy) for busy in found])
        bench.close_engine()  # a probe leaves a GPU alone that another program uses
        yield _probed(bench)


def _probed(bench: Bench) -> Finding:
    command = [*own_command(sys.executable), "gpus", "--probe", "--json"]
    env = {**bench.environ, CACHE_VARIABLE: str(bench.out / "cache")}
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_PROBE_S, check=True)
    (gpu,) = (gpu for gpu in json.loads(finished.stdout)["energy"]["gpus"] if gpu["uuid"] == bench.uuid)
    lag_s, name = gpu["counter_lag_s"], "lag of the counter, by lem gpus --probe"
    if lag_s is None:
        return Finding(name, None, "ms", gpu["counter_lag_s_null_reason"])
    return Finding(name, 1e3 * lag_s, "ms", "the median of three pulses of work")


def _missing_ms(curve: Curve, busy: Busy) -> float:
    """By how much less than the load's energy it was, around the load's beginning."""
    rest_w, load_w, drawn_j = _around(curve, busy.opened_ns)
    return 1e3 * (SETTLED_S * (rest_w + load_w) - drawn_j) / (load_w - rest_w)


def _left_over_ms(curve: Curve, busy: Busy) -> float:
    """By how much more than the load's energy it was, around the load's end."""
    load_w, rest_w, drawn_j = _around(curve, busy.closed_ns)
    return 1e3 * (drawn_j - SETTLED_S * (rest_w + load_w)) / (load_w - rest_w)


def _around(curve: Curve, edge_ns: int) -> tuple[float, float, float]:
    """Power before an edge and after it, and the energy between."""
    settled_ns, level_ns = round(SETTLED_S * NS_PER_S), round(LEVEL_S * NS_PER_S)
    first_ns, last_ns = edge_ns - settled_ns, edge_ns + settled_ns
    before_w = curve.mean_power_w(Span(first_ns - level_ns, first_ns))
    after_w = curve.mean_power_w(Span(last_ns, last_ns + level_ns))
    return before_w, after_w, curve.between_j(Span(first_ns, last_ns))


def _times(name: str, values_ms: Sequence[float]) -> Finding:
    note = f"the median of {len(values_ms)}, {min(values_ms):.1f} to {max(values_ms):.1f} ms"
    return Finding(name, statistics.median(values_ms), "ms", note, "0", {"values": list(values_ms)})
