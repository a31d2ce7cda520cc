"""Whether every interval, verdict and test holds what it claims, on campaigns whose truth is known.

    python -m tests.bench.coverage [--campaigns N]   simulated, 4,000 a line, some minutes
    python -m tests.bench.coverage --only NAME       the lines of one group
    python -m tests.bench.coverage real [N]          N real ones (20) of two equal configurations of the lab's model

Simulated campaigns have deviations of cycles, engine loads and runs, and where it says so drift, effects of the place,
attempts that are spoiled and rerun, and cycles that are lost. Their records go the way of real ones. Everything is
seeded. For independent cycles, where 95 % and 5 % are claimed, coverage must be at least 93.5 %, errors at most 6.5 %.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lem.base.measurement import UNSTEADY_BY_CHANCE
from lem.config.campaign_config import STRUCTURES
from lem.config.sections import SloConfig
from lem.engines.traffic import arrival_offsets_s
from lem.meters.requestlog import Request, RequestLog
from lem.meters.work import count_good, latency_of, percentile
from lem.orchestration.resume import make_rule, needs_cycle
from lem.record import Record
from lem.results.aggregation import Sensitivity
from lem.results.bootstrap import (
    AUTOCORRELATED_COVERAGE,
    BOOTSTRAP_COVERAGE,
    HEAVY_TAILED_COVERAGE,
    TRAFFIC_COVERAGE,
    log_t_interval,
)
from lem.results.check import check_run
from lem.results.compare import (
    SIGNIFICANCE,
    Anchor,
    Comparison,
    Row,
    compare_configurations,
    compare_runs,
)
from lem.results.history import find_cuts
from lem.results.load import Bracket, Knee, find_series
from lem.results.metrics import parse_metric
from lem.results.run import Configuration, Run, make_run
from lem.results.stats import Gate, Verdict, anchored_effect, paired_effect, parse_gate
from lem.results.stopping import StoppingRule, next_stage, parse_target
from lem.results.student import POWER
from lem.results.trends import FALSE_ALARMS, WATCHED, Course, is_chance
from tests.bench.interference import make_model, run_campaign
from tests.bench.simulation import TRUE_ENERGY_J, Simulated
from tests.records import make_record, under_load

N_CAMPAIGNS, N_REAL = 4000, 20
ENERGY, THROUGHPUT = parse_metric("energy"), parse_metric("throughput")
GATE = parse_gate("energy=3%")
AT_THE_GATE = 1.03
SECOND_DAY = "20260715T100000Z-0002"

LEAST_COVERAGE, MOST_ERROR = 0.935, 0.065
_SLACK = MOST_ERROR - 0.05

# A bad day: all deviations, drift, and spoiled attempts.
BAD_DAY = Simulated(drift=0.01, invalid=0.1)


@dataclass(frozen=True)
class Figure:
    """A line of the output."""

    name: str
    found: float
    claim: str = ""
    is_ok: bool | None = None  # None: shown, not judged

    def __str__(self) -> str:
        verdict = {None: "", True: "ok", False: "OFF"}[self.is_ok]
        return f"{self.name:<66}{100 * self.found:>6.1f} %  {self.claim:<12}{verdict}".rstrip()


def covers(name: str, hits: Iterable[bool]) -> Figure:
    share = share_of(hits)
    return Figure(name, share, "95 %", share >= LEAST_COVERAGE)


def errs(name: str, errors: Iterable[bool], claim: float = 0.05) -> Figure:
    share = share_of(errors)
    return Figure(name, share, f"at most {100 * claim:g} %", share <= claim + min(_SLACK, claim))


def labelled(name: str, hits: Iterable[bool], label: float) -> Figure:
    """A share beside the figure that users are shown; they agree to two standard errors and its last digit."""
    found = list(hits)
    tolerance = 0.01 + 2 * math.sqrt(label * (1 - label) / max(len(found), 1))
    share = share_of(found)
    return Figure(name, share, f"label {100 * label:.3g} %", abs(share - label) <= tolerance)


def share_of(outcomes: Iterable[bool]) -> float:
    found = list(outcomes)
    return sum(found) / len(found) if found else math.nan


def simulated(n: int, base: Simulated = BAD_DAY, **changes: Any) -> Iterator[Run]:
    for seed in range(1, n + 1):
        yield make_run(replace(base, seed=seed, **changes).records())


def against_first(run: Run, gates: Sequence[Gate] = ()) -> Comparison:
    """With c00 as the baseline, whatever ran first, so that the true ratio is known."""
    first, *others = sorted(run.with_results, key=lambda item: item.name)
    return compare_configurations(run, first, others, metrics=(ENERGY,), gates=gates)


def rows_of(comparison: Comparison) -> list[Row]:
    return [row for pair in comparison.pairs for row in pair.rows]


def holds(bounds: Sequence[float | None] | None, truth: float) -> bool:
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return False
    return bounds[0] <= truth <= bounds[1]


# --- intervals


def intervals(n: int) -> Iterator[Figure]:
    for cycles in (3, 5, 10):
        t_hits, bootstrap_hits = [], []
        for run in simulated(n, cycles=cycles):
            item = next(it for it in run.with_results if it.name == "c00")
            estimate = item.estimate(ENERGY)
            t_hits.append(holds((estimate.low, estimate.high), TRUE_ENERGY_J))
            if (found := estimate.bootstrap) is not None and found.n_samples == cycles:
                bootstrap_hits.append(holds((found.ci_lower, found.ci_upper), TRUE_ENERGY_J))
        yield covers(f"t interval of a configuration, {cycles} cycles", t_hits)
        yield labelled(f"bootstrap interval, {cycles} cycles", bootstrap_hits, BOOTSTRAP_COVERAGE[cycles])
    for cycles in (3, 5, 10):
        runs = simulated(n, ratios=(1.0, 0.41), cycles=cycles, cycle_sd=0.02)
        yield covers(f"t interval of a ratio, {cycles} cycles", ratio_hits(runs, 0.41))
    for count in (4, 12):
        runs = simulated(n, ratios=(1.0,) * count)
        hits = (all(holds(row.interval, 1.0) for row in rows_of(against_first(run))) for run in runs)
        yield covers(f"all {count - 1} intervals of a comparison together, 5 cycles", hits)
    yield from best_of_many(n)
    yield covers(
        "t interval of a ratio over an anchor, two days, 5 cycles", anchored(n, lambda row: holds(row.interval, 1))
    )


def ratio_hits(runs: Iterable[Run], truth: float) -> Iterator[bool]:
    for run in runs:
        if (interval := rows_of(against_first(run))[0].interval) is not None:  # of two cycles or more
            yield holds(interval, truth)


def best_of_many(n: int, count: int = 20) -> Iterator[Figure]:
    """The configuration with the least energy, of equal ones: its interval, and that of its ratio to the baseline."""
    plain, own, ratio = [], [], []
    for run in simulated(n, ratios=(1.0,) * count):
        ranked = sorted(run.with_results, key=lambda item: item.estimate(ENERGY).value or math.inf)
        estimate, chosen = ranked[0].estimate(ENERGY), ranked[0].interval_as_best(ENERGY, count)
        plain.append(holds((estimate.low, estimate.high), TRUE_ENERGY_J))
        own.append(holds(chosen, TRUE_ENERGY_J))
        ratio.append(holds(least_of(rows_of(against_first(run))).interval, 1.0))
    yield Figure(f"best of {count}: its interval, not adjusted", share_of(plain))
    yield covers(f"best of {count}: its interval in the report", own)
    yield covers(f"best of {count}: the interval of the least ratio to the baseline", ratio)


def least_of(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda row: row.effect.log_ratio if row.effect else math.inf)


def anchored(n: int, judge: Callable[[Row], bool]) -> Iterator[bool]:
    for before, after in two_days(n):
        comparison = compare_runs(before, after, anchor=Anchor("c00"), metrics=(ENERGY,))
        yield judge(next(row for pair in comparison.pairs for row in pair.rows if pair.other.name == "c01"))


def two_days(n: int) -> Iterator[tuple[Run, Run]]:
    quiet = Simulated(day_sd=0.01, cycle_sd=0.0, load_sd=0.0)
    return zip(simulated(n, quiet), simulated(n, quiet, run_id=SECOND_DAY), strict=True)


# --- verdicts


def verdicts(n: int) -> Iterator[Figure]:
    for count, cycles in ((2, 3), (2, 5), (2, 10), (6, 5), (12, 5)):
        runs = simulated(n, ratios=(1.0,) * count, cycles=cycles)
        found = (any(row.is_found for row in rows_of(against_first(run))) for run in runs)
        yield errs(f"A/A: a difference among {count} equal configurations, {cycles} cycles", found)
    both = (
        compare_configurations(run, *sides(run), metrics=(ENERGY, THROUGHPUT))
        for run in simulated(n, ratios=(1.0,) * 4)
    )
    yield errs("A/A: a difference in energy or throughput, 4 configurations", (found_any(it) for it in both))
    yield from exclusions(n)
    for cycles in (5, 10):
        runs = simulated(n, ratios=(1.0, AT_THE_GATE), cycles=cycles)
        said = [verdict_of(against_first(run, [GATE])) for run in runs]
        yield errs(f"gate of 3 %, exactly 3 % worse, {cycles} cycles: worse", (it is Verdict.WORSE for it in said))
        yield errs(f"gate of 3 %, exactly 3 % worse, {cycles} cycles: within", (it is Verdict.WITHIN for it in said))
    truths = {
        1.0: {Verdict.WITHIN},
        1.01: {Verdict.WITHIN},
        AT_THE_GATE: set(),
        0.96: {Verdict.BETTER},
        1.06: {Verdict.WORSE},
    }
    wrong = []
    for run in simulated(n, ratios=(1.0, *truths)):
        judged = [row.judgement.verdict for row in rows_of(against_first(run, [GATE])) if row.judgement]
        wrong.append(
            any(it not in {*truth, Verdict.INCONCLUSIVE} for it, truth in zip(judged, truths.values(), strict=True))
        )
    yield errs("gate of 3 %: any wrong verdict among 5 configurations, 5 cycles", wrong)
    missed = (verdict_of(against_first(run, [GATE])) is not Verdict.WORSE for run in simulated(n, ratios=(1.0, 1.06)))
    yield Figure("gate of 3 %, 6 % worse, 5 cycles: not found", share_of(missed))
    power = simulated(n, Simulated(cycle_sd=0.02, load_sd=0.0), ratios=(1.0, 1.01))
    yield labelled("a true 1 % is found, 2 % between cycles, 5 cycles", map(found_any, map(against_first, power)), 0.66)
    naive = (naive_p(*days) < SIGNIFICANCE for days in two_days(n))
    yield Figure("two days without a difference: a naive test finds one", share_of(naive))
    yield errs("two days without a difference: over an anchor", anchored(n, lambda row: row.is_found))


def planning(n: int) -> Iterator[Figure]:
    """What the dry run says of differences and cycles, by the noise that it assumes."""
    assumed = Sensitivity.assumed(ENERGY, is_load_shared=False)
    for count, cycles in ((2, 3), (2, 5), (2, 10), (7, 5)):
        ratio = 1 + assumed.smallest(cycles, count - 1)
        runs = simulated(n, Simulated(), ratios=(1.0, ratio, *[1.0] * (count - 2)), cycles=cycles)
        hits = (rows_of(against_first(run))[0].is_found for run in runs)
        yield labelled(f"smallest difference of {cycles} cycles, {count - 1} comparisons: found", hits, POWER)
    for threshold in (0.02, 0.03):
        cycles = assumed.needed(threshold, is_gate=True) or 0
        gate = replace(GATE, threshold=threshold)
        said = (verdict_of(against_first(run, [gate])) for run in simulated(n, Simulated(), cycles=cycles))
        share = share_of(it is Verdict.WITHIN for it in said)
        name = f"gate of {100 * threshold:g} %, equal configurations, the {cycles} cycles it needs: within"
        yield Figure(name, share, f"at least {100 * POWER:g} %", share >= POWER - _SLACK)


def exclusions(n: int) -> Iterator[Figure]:
    """Three in ten attempts are spoiled and rerun, so that one in eleven cycles is lost."""
    withheld, wrong, needless = [], [], []
    for run in simulated(n, invalid=0.3):
        row = rows_of(against_first(run))[0]
        is_withheld = row.reason is not None and row.reason.code == "unequal_exclusions"
        withheld.append(is_withheld)
        needless.append(is_withheld and len({item.n_lost for item in run.with_results}) == 1)
        wrong += [row.is_found] if row.p_adjusted is not None else []
    yield Figure("3 in 10 attempts spoiled: verdict withheld, since cycles were lost", share_of(withheld))
    yield errs("3 in 10 attempts spoiled: withheld where equally many were lost", needless, 0.0)
    yield errs("3 in 10 attempts spoiled: a difference found where there is none", wrong)


def sides(run: Run) -> tuple[Configuration, Sequence[Configuration]]:
    return run.with_results[0], run.with_results[1:]


def found_any(comparison: Comparison) -> bool:
    return any(row.is_found for row in rows_of(comparison))


def verdict_of(comparison: Comparison) -> Verdict | None:
    judgement = rows_of(comparison)[0].judgement
    return judgement.verdict if judgement else None


def naive_p(before: Run, after: Run) -> float:
    """Welch's test of one configuration in two runs, as if their cycles were all that varies."""
    values = [
        next(item for item in run.with_results if item.name == "c01").estimate(ENERGY).values for run in (after, before)
    ]
    return anchored_effect(*(paired_effect(it, [1.0] * len(it)) for it in values)).p_value or 1.0


# --- cycles that are added


def sequential(n: int) -> Iterator[Figure]:
    """Cycles added by a rule from the start, and by hand as an inconclusive gate proposes."""
    steady = Simulated(cycles=20)
    for count, text in ((2, "ci=1.5%:energy"), (2, "ci=2.5%:energy"), (5, "ci=2%:energy")):
        runs = [
            grown(records, make_rule(parse_target(text), None)) for records in records_of(n, steady, (1.0,) * count)
        ]
        hits = [all(holds(row.interval, 1.0) for row in rows_of(against_first(run))) for run in runs]
        yield covers(f"--until {text}, {count} configurations: all ratios, {mean_cycles(runs):.1f} cycles", hits)
        found = (found_any(against_first(run)) for run in runs)
        yield errs(f"--until {text}, {count} configurations: a difference found", found)
    runs = [grown(it, make_rule(parse_target("each=1.5%:energy"), None)) for it in records_of(n, steady, (1.0, 1.0))]
    hits = [holds((it.low, it.high), TRUE_ENERGY_J) for run in runs for it in (run.with_results[0].estimate(ENERGY),)]
    yield covers(f"--until each=1.5%:energy: an interval, {mean_cycles(runs):.1f} cycles", hits)
    for cycles, name in ((0, "--until energy=3%"), (1, "by hand after an inconclusive gate")):
        runs = [
            extended(records) if cycles else grown(records, make_rule(parse_target("energy=3%"), None))
            for records in records_of(n, steady, (1.0, AT_THE_GATE))
        ]
        said = [verdict_of(against_first(run, [GATE])) for run in runs]
        title = f"{name}, exactly 3 % worse, {mean_cycles(runs):.1f} cycles"
        yield errs(f"{title}: worse", (it is Verdict.WORSE for it in said))
        yield errs(f"{title}: within", (it is Verdict.WITHIN for it in said))
        yield covers(f"{name}: the ratio's interval", (holds(lead_row(run).interval, AT_THE_GATE) for run in runs))
    said = [
        verdict_of(against_first(grown(it, make_rule(parse_target("energy=3%"), None)), [GATE]))
        for it in records_of(n, steady, (1.0, 1.06))
    ]
    yield Figure("--until energy=3%, 6 % worse: not found", share_of(it is not Verdict.WORSE for it in said))


def records_of(n: int, base: Simulated, ratios: tuple[float, ...]) -> Iterator[list[Record]]:
    for seed in range(1, n + 1):
        yield replace(base, seed=seed, ratios=ratios).records()


def first_cycles(records: Sequence[Record], cycles: int, rule: StoppingRule | None) -> Run:
    return make_run([it for it in records if it.identity.cycle_index < cycles], stopping=rule)


def grown(records: Sequence[Record], rule: StoppingRule) -> Run:
    """The run at its end, as `lem campaign --until` adds cycles."""
    cycles = rule.least_cycles
    while True:
        rule = replace(rule, looks=(*rule.looks, cycles))
        run = first_cycles(records, cycles, rule)
        if not needs_cycle(run, rule, cycles)[0]:
            return run
        cycles += 1


def extended(records: Sequence[Record], cycles: int = 5, most: int = 20) -> Run:
    """The run at its end, of somebody who adds the cycles that an inconclusive gate proposes."""
    rule: StoppingRule | None = None
    while True:
        run = first_cycles(records, cycles, rule)
        judgement = rows_of(against_first(run, [GATE]))[0].judgement
        if judgement is None or judgement.verdict is not Verdict.INCONCLUSIVE or cycles >= most:
            return run
        more = min(most, cycles + (judgement.further_cycles or most))
        rule, cycles = next_stage(rule, None, cycles, more), more


def lead_row(run: Run) -> Row:
    return rows_of(against_first(run))[0]


def mean_cycles(runs: Sequence[Run]) -> float:
    return sum(max(item.n_cycles for item in run.with_results) for run in runs) / len(runs)


# --- trends


def trends(n: int) -> Iterator[Figure]:
    driftless = replace(BAD_DAY, drift=0.0)
    for count, cycles in itertools.product((2, 6, 12), (5, 10)):
        runs = simulated(n, driftless, ratios=(1.0,) * count, cycles=cycles)
        yield errs(f"drift found where there is none, {count} configurations, {cycles} cycles", map(has_drift, runs))
    runs = simulated(n, ratios=(1.0,) * 6, cycles=10, drift=0.05)
    yield Figure("a drift of 5 % is found, 6 configurations, 10 cycles", share_of(map(has_drift, runs)))
    for count, cycles in ((4, 5), (4, 10)):
        runs = simulated(n, driftless, ratios=(1.0,) * count, cycles=cycles)
        yield errs(
            f"effect of the place found where there is none, {count} configurations, {cycles} cycles",
            map(has_place, runs),
        )
    for cycles in (10, 20):
        runs = simulated(n, Simulated(cycles=cycles))
        found = [it for run in runs if (it := Course(run, ENERGY).autocorrelation)]
        yield errs(f"autocorrelation found where there is none, {cycles} cycles", (it.p_value < 0.05 for it in found))
        runs = simulated(n, Simulated(cycles=cycles, memory=0.3, run_sd=0.0))
        found = [it for run in runs if (it := Course(run, ENERGY).autocorrelation)]
        yield labelled(
            f"autocorrelation of 0.3 is found, {cycles} cycles", (it.p_value < 0.05 for it in found), found[0].power
        )


def has_drift(run: Run) -> bool:
    return any((found := Course(run, metric).drift) is not None and found.is_found for metric in WATCHED)


def has_place(run: Run) -> bool:
    found = Course(run, ENERGY).position_effect
    return found is not None and found.is_found


# What the documentation says of orders that confound places and configurations, or do so by chance.
ORDER_CLAIMS = {"interleaved": "29 to 98 %", "shuffled": "5 to 8 %"}


def order(n: int) -> Iterator[Figure]:
    """Equal configurations where the second place of a cycle costs 1 % more."""
    noise = Simulated(cycle_sd=0.01, load_sd=0.0, run_sd=0.005, place=0.01)
    for structure, cycles in itertools.product([it for it in STRUCTURES if it != "grouped"], (3, 5, 10)):
        found = (found_any(against_first(run)) for run in simulated(n, noise, structure=structure, cycles=cycles))
        name = f"second place costs 1 %: a difference found, {structure}, {cycles} cycles"
        claim = ORDER_CLAIMS.get(structure)
        yield errs(name, found) if claim is None else Figure(name, share_of(found), f"claim {claim}")


# --- traffic


WINDOW_NS = 30 * 10**9
QPS, SERVERS, SERVICE_S = 4.0, 4, 0.7
_TOKENS = 16


def traffic(n: int) -> Iterator[Figure]:
    """Windows of 30 s of Poisson arrivals at a queue with 4 servers, 70 % busy; lengths are exponential."""
    for qps in (1.0, 4.0, 16.0):
        unsteady = (window(seed, qps).steady.value is False for seed in range(n))
        yield errs(f"steady Poisson window found unsteady, {qps:g} requests a second", unsteady, UNSTEADY_BY_CHANCE)
    truth = traffic_figures(window(0, QPS, min(3000, 20 * n) * WINDOW_NS))
    pool = [traffic_figures(window(seed, QPS)) for seed in range(1, 5 * n + 1)]
    for place, name in enumerate(TRAFFIC_COVERAGE):
        hits = []
        for campaign in range(n):
            values = [figures[place] for figures in pool[5 * campaign : 5 * campaign + 5]]
            found = log_t_interval(values)
            hits.append(holds((found.ci_lower, found.ci_upper), truth[place]))
        yield labelled(f"EXEMPT traffic window of 30 s, {name}, 5 cycles", hits, TRAFFIC_COVERAGE[name])


def window(seed: int, qps: float, length_ns: int = WINDOW_NS) -> RequestLog:
    """Opened after 20 s, when the queue has settled."""
    rng, free_ns = random.Random(f"window/{seed}"), [0] * round(SERVERS * qps / QPS or 1)
    opened_ns = 20 * 10**9
    requests = []
    for number, offset_s in enumerate(arrival_offsets_s("poisson", qps, rng)):
        arrived_ns = round(offset_s * 1e9)
        if arrived_ns > opened_ns + length_ns:
            break
        server = min(range(len(free_ns)), key=free_ns.__getitem__)
        started_ns = max(arrived_ns, free_ns[server])
        free_ns[server] = finished_ns = started_ns + round(1e9 * SERVICE_S * rng.expovariate(1.0))
        tokens = max(1, round(_TOKENS * (finished_ns - started_ns) / 1e9 / SERVICE_S))
        requests.append(Request(number, 8, tokens, 0, arrived_ns, started_ns, finished_ns))
    return RequestLog("poisson", opened_ns, opened_ns + length_ns, len(requests) + 1, tuple(requests))


def traffic_figures(log: RequestLog) -> tuple[float, ...]:
    found = latency_of(log.completed).e2e_s
    assert found is not None
    p95 = percentile(sorted(item.e2e_ns / 1e9 for item in log.completed), 0.95)
    return found.p50, p95, found.mean, log.output_tok / log.window_s


# --- the knee of a sweep over loads


LIMIT_S, SPEED_SD = 1.4, 0.1
SWEEPS = {"5 loads": (2.0, 3.0, 4.0, 5.0, 6.0), "17 loads": tuple(2 + 0.25 * step for step in range(17))}


def knee(n: int) -> Iterator[Figure]:
    """Windows of 60 s of Poisson arrivals at a queue with 4 servers, as fast in each cycle as its engine load is."""
    fine = [2 + 0.1 * step for step in range(41)]
    knees = sorted(bracket_of(-seed, fine)[0] for seed in range(1, min(n, 400) + 1))
    truth = knees[len(knees) // 2]
    for name, loads in SWEEPS.items():
        pool = [bracket_of(seed, loads) for seed in range(1, min(n, 1000) + 1)]
        rng = random.Random(name)
        for cycles in (3, 5, 10):
            found = [Knee(tuple(rng.choices(pool, k=cycles))) for _ in range(n)]
            hits = [it.interval is not None and it.interval[0] <= truth < it.interval[1] for it in found]
            share, claim = share_of(hits), found[0].coverage or 0.0
            title = f"interval of the knee, {name}, {cycles} cycles"
            yield Figure(title, share, f"≥ {100 * claim:.1f} %", share >= claim - _SLACK)


def bracket_of(seed: int, loads: Sequence[float]) -> Bracket:
    """What one cycle shows of the knee; its engine is as fast at every load, and gets the same arrivals, scaled."""
    service_s = SERVICE_S * math.exp(random.Random(f"speed/{seed}").gauss(0, SPEED_SD))
    records = []
    for load in loads:
        log = window_at(seed, load, service_s)
        record = make_record(config_name=f"load{load}", n_requests=len(log.completed))
        records.append(under_load(record, load, count_good(log, SloConfig(e2e_ms=1000 * LIMIT_S)).value))
    (series,) = find_series(make_run(records).with_results)
    assert series.knee is not None
    return series.knee.brackets[0]


def window_at(seed: int, qps: float, service_s: float) -> RequestLog:
    requests, free_s = [], [0.0] * SERVERS
    for offset_s in arrival_offsets_s("poisson", qps, random.Random(f"knee/{seed}")):
        begin_s = max(offset_s, heapq.heappop(free_s))
        heapq.heappush(free_s, begin_s + service_s)
        arrived_ns, begin_ns, end_ns = (round(1e9 * at_s) for at_s in (offset_s, begin_s, begin_s + service_s))
        requests.append(Request(0, 8, 1, 0, arrived_ns, begin_ns, end_ns))
        if offset_s > 80:
            return RequestLog("poisson", 20 * 10**9, 80 * 10**9, 1, tuple(requests))
    raise AssertionError("arrivals have no end")


# --- runs over time


def over_runs(n: int) -> Iterator[Figure]:
    """Series of runs that vary by 1 % about a level; a step is one of 5 %."""
    for count, runs in ((1, 5), (1, 12), (1, 30), (8, 12)):
        found = (any(find_cuts(series, FALSE_ALARMS / count) for series in shown) for shown in nights(n, count, runs))
        yield errs(f"a change point where there is none, {plural_series(count)}, {runs} runs", found)
    for name, runs, places in (
        ("in the middle", 8, (4,)),
        ("in the middle", 12, (6,)),
        ("at the last run", 12, (11,)),
        ("at the last run", 24, (23,)),
        ("that returns after 8 runs", 24, (8, 16)),
    ):
        for count in (1, 20):
            cuts = [find_cuts(series, FALSE_ALARMS / count) for (series,) in nights(n, 1, runs, places)]
            found = (bool(item) for item in cuts)
            yield Figure(f"a step of 5 % {name} of {runs} runs is found, {plural_series(count)}", share_of(found))
    for name, draw in (("Student t, 4 degrees", heavy), ("autocorrelation 0.3", correlated)):
        found = (bool(find_cuts(draw(random.Random(seed), 20), FALSE_ALARMS)) for seed in range(n))
        yield Figure(f"exempt: {name}: a change point, 20 runs", share_of(found))


def plural_series(count: int) -> str:
    return f"{count} series tested"


def nights(n: int, count: int, runs: int, places: Sequence[int] = ()) -> Iterator[list[list[float]]]:
    for seed in range(n):
        rng = random.Random(f"{seed}/{count}/{runs}/{places}")
        steps = [math.log(1.05) * (sum(place <= index for place in places) % 2) for index in range(runs)]
        yield [[rng.gauss(step, 0.01) for step in steps] for _ in range(count)]


def heavy(rng: random.Random, runs: int) -> list[float]:
    return [0.01 * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(2, 2) / 4) for _ in range(runs)]


def correlated(rng: random.Random, runs: int) -> list[float]:
    values = [rng.gauss(0, 0.01)]
    while len(values) < runs:
        values.append(0.3 * values[-1] + rng.gauss(0, 0.01 * math.sqrt(1 - 0.09)))
    return values


# --- exempt


def exempt(n: int) -> Iterator[Figure]:
    """What no interval over a few cycles can hold; users are shown the figure of the label."""
    for memory, label in AUTOCORRELATED_COVERAGE.items():
        runs = simulated(n, Simulated(cycles=10, memory=memory, run_sd=0.0), ratios=(1.0, 1.0))
        yield labelled(f"EXEMPT autocorrelation of {memory:g}, ratio, 10 cycles", ratio_hits(runs, 1.0), label)
    runs = simulated(n, Simulated(has_heavy_tails=True, cycle_sd=0.0), ratios=(1.0, 1.0))
    yield labelled(
        "EXEMPT heavy tails (Student t, 2 degrees), ratio, 5 cycles", ratio_hits(runs, 1.0), HEAVY_TAILED_COVERAGE
    )


GROUPS: dict[str, Callable[[int], Iterator[Figure]]] = {
    "intervals": intervals,
    "verdicts": verdicts,
    "planning": planning,
    "order": order,
    "sequential": sequential,
    "trends": trends,
    "traffic": traffic,
    "knee": knee,
    "runs": over_runs,
    "exempt": exempt,
}


# --- real campaigns

# Two configurations that differ in nothing that is used: warm-up settles long before.
SAME = """\
campaign_name: same
model: {model}
grid:
  backends: [pytorch]
  shared:
    max_output_tokens: [16]
    max_input_tokens: [32]
    fp_precision: [float32]
    ignore_eos: [true]
    gpus: [[]]
    prompts: [{{type: synthetic, input_tokens: 16, sample_size: 8}}]
    measurement.min_window_sec: [1]
    measurement.max_wait_pct: [100]
    measurement.max_foreign_pct: [100]
    baseline.enabled: [false]
    warmup.max_prompts: [40, 41]
execution: {{cycles: 5, structure: shuffled, seed: {seed}, config_gap_seconds: 0, cycle_gap_seconds: 0}}
"""


def real(n: int) -> int:
    """0 if differences are found at no more than the stated rate, as far as so few campaigns can tell."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name))
        for seed in range(1, n + 1):
            run = run_campaign(Path(name, str(seed)), Path(sys.executable), SAME.format(model=model, seed=seed))
            first, second = run.with_results
            rows = rows_of(compare_configurations(run, first, [second], metrics=(THROUGHPUT, parse_metric("e2e"))))
            found.append(any(row.is_found for row in rows))
            shown = [
                f"{row.effect.ratio:.4f} (p {row.p_adjusted:.3f})" for row in rows if row.effect and row.p_adjusted
            ]
            kinds = ", ".join(item.kind for item in check_run(run) if item.is_weak) or "-"
            print(f"{seed:>3} throughput, latency: {', '.join(shown)}; weak: {kinds}", flush=True)
    print(errs(f"A/A: a difference in {n} real campaigns of 5 cycles", found))
    return 1 if sum(found) and is_chance(sum(found), n, SIGNIFICANCE) is False else 0


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a figure is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--campaigns", type=int, default=N_CAMPAIGNS, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", choices=GROUPS, action="append", help="only this group")
    args = parser.parse_args(argv)
    if args.what[:1] == ["real"]:
        return real(int(args.what[1]) if args.what[1:] else N_REAL)
    print(
        f"{args.campaigns} simulated campaigns a line; coverage at least 93.5 %, errors at most 1.5 % above the claim"
    )
    is_fine = True
    for name in args.only or GROUPS:
        for figure in GROUPS[name](args.campaigns):
            print(figure, flush=True)
            is_fine &= figure.is_ok is not False
    return 0 if is_fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
