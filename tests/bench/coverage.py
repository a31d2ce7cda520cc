"""Whether the statistics hold what they say, on campaigns whose truth is known: `python -m tests.bench.coverage`.

Each campaign is simulated whole: a deviation of each cycle that all its experiments share, of each engine load, of
each attempt, a drift over the campaign, attempts that another process spoils and that are run again, and cycles lost
because the second attempt was spoiled too. Its records go the way of real ones, through aggregation and comparison.
Everything is seeded, so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.results.bootstrap import BOOTSTRAP_COVERAGE
from lem.results.compare import SIGNIFICANCE, Anchor, Comparison, Row, compare_configurations, compare_runs
from lem.results.metrics import parse_metric
from lem.results.run import Run, make_run
from lem.results.stats import Verdict, anchored_effect, paired_effect, parse_gate
from tests.synthetic_campaign import Campaign, Configuration

N_CAMPAIGNS = 1000
ENERGY = parse_metric("energy")
TRUE_ENERGY_J = 0.3
GATE_PERCENT = 3.0

# Deviations of 1 % between loads and 0.5 % between runs, exclusions and drift as a bad day brings them.
NOISY = Campaign(
    configurations=(),
    load_sd=0.01,
    run_sd=0.005,
    cycle_sd=0.01,
    drift=0.01,
    invalid_probability=0.1,
    invalid_shift=0.2,
    structure="shuffled",
    window_s=1.0,
    has_samples=False,
)


@dataclass(frozen=True)
class Coverage:
    hits: int
    total: int

    @property
    def share(self) -> float:
        return self.hits / self.total

    def error(self, expected: float) -> float:
        """Two standard errors of the share if `expected` is true."""
        return 2 * math.sqrt(expected * (1 - expected) / self.total)


@dataclass(frozen=True)
class Figure:
    """A line of the output; `tolerance` is two standard errors of a share of so many campaigns."""

    name: str
    found: float
    expected: float | None
    tolerance: float = 0.0

    @property
    def is_ok(self) -> bool:
        return self.expected is None or abs(self.found - self.expected) <= self.tolerance

    def __str__(self) -> str:
        line = f"{self.name:<64}{100 * self.found:>6.1f} %"
        if self.expected is None:
            return line
        return f"{line}  {100 * self.expected:>5.1f} ± {100 * self.tolerance:.1f} %  {'ok' if self.is_ok else 'OFF'}"


def simulated(
    n_campaigns: int,
    ratios: Sequence[float] = (1.0,),
    *,
    campaign: Campaign = NOISY,
    first_seed: int = 1,
    **changes: object,
) -> Iterable[Run]:
    """The results of campaigns with a configuration for each ratio to `TRUE_ENERGY_J`."""
    configurations = tuple(
        Configuration(f"batch-{index}", batch_size=index + 1, energy_per_output_tok_j=TRUE_ENERGY_J * ratio)
        for index, ratio in enumerate(ratios)
    )
    for seed in range(first_seed, first_seed + n_campaigns):
        made = dataclasses.replace(campaign, configurations=configurations, seed=seed, **changes)  # type: ignore[arg-type]
        yield make_run(made.records())


def interval_coverage(cycles: int, n_campaigns: int = N_CAMPAIGNS) -> tuple[Coverage, Coverage]:
    """Of one configuration's energy: the t interval, and the bootstrap interval of the campaigns that lost no cycle."""
    t_hits = bootstrap_hits = n_whole = 0
    # Two configurations, so that drift meets the one at different places of each cycle.
    for run in simulated(n_campaigns, (1.0, 2.0), cycles=cycles):
        estimate = run.with_results[0].estimate(ENERGY)
        t_log, bootstrap = estimate.t_log, estimate.bootstrap
        truth = TRUE_ENERGY_J if run.with_results[0].name == "batch-0" else 2 * TRUE_ENERGY_J
        t_hits += t_log is not None and _holds(t_log.ci_lower, t_log.ci_upper, truth)
        if bootstrap is not None and bootstrap.n_samples == cycles:
            n_whole += 1
            bootstrap_hits += _holds(bootstrap.ci_lower, bootstrap.ci_upper, truth)
    return Coverage(t_hits, n_campaigns), Coverage(bootstrap_hits, n_whole)


def ratio_coverage(cycles: int, n_campaigns: int = N_CAMPAIGNS) -> Coverage:
    """The interval of a true ratio of 0.41, paired within cycles that share a deviation of 2 %."""
    hits = total = 0
    for run in simulated(n_campaigns, (1.0, 0.41), cycles=cycles, cycle_sd=0.02):
        row = _rows(_against_first(run))[0]
        interval = row.effect.interval() if row.effect else None
        if interval is not None:
            total += 1
            hits += _holds(*interval, 0.41)
    return Coverage(hits, total)


def found_effects(ratio: float, cycles: int, n_campaigns: int = N_CAMPAIGNS) -> Coverage:
    """How often a true ratio is found at p < 0.05 amid 2 % between cycles and 0.5 % between runs."""
    runs = simulated(
        n_campaigns, (1.0, ratio), cycles=cycles, cycle_sd=0.02, load_sd=0.0, drift=0.0, invalid_probability=0.0
    )
    return _share(_rows(_against_first(run))[0].is_found for run in runs)


def false_differences(n_configurations: int, cycles: int, n_campaigns: int = N_CAMPAIGNS) -> Coverage:
    """How often any difference is found among configurations that are all the same."""
    runs = simulated(n_campaigns, (1.0,) * n_configurations, cycles=cycles, invalid_probability=0.0)
    return _share(any(row.is_found for row in _rows(_against_first(run))) for run in runs)


def gate_verdicts(
    ratios: Sequence[float], cycles: int, n_campaigns: int = N_CAMPAIGNS
) -> tuple[tuple[Verdict, ...], ...]:
    """What the gate said, campaign by campaign, of configurations with these ratios to their baseline."""
    gate = parse_gate(f"energy={GATE_PERCENT}%")
    runs = simulated(n_campaigns, (1.0, *ratios), cycles=cycles, invalid_probability=0.0)
    return tuple(
        tuple(row.judgement.verdict for row in _rows(_against_first(run, [gate])) if row.judgement) for run in runs
    )


def false_differences_between_days(cycles: int, n_campaigns: int = N_CAMPAIGNS) -> tuple[Coverage, Coverage]:
    """How often two runs of the same, 1 % between their days, are found to differ: naively, and over an anchor."""
    quiet = dataclasses.replace(NOISY, day_sd=0.01, cycle_sd=0, load_sd=0, drift=0, invalid_probability=0)
    before = simulated(n_campaigns, (1.0, 1.0), campaign=quiet, cycles=cycles, run_id="20260714T100000Z-0001")
    after = simulated(n_campaigns, (1.0, 1.0), campaign=quiet, cycles=cycles, run_id="20260715T100000Z-0002")
    naive, anchored = [], []
    for one, other in zip(before, after, strict=True):
        naive.append(_naive_p(one, other) < SIGNIFICANCE)
        anchored.append(
            any(row.is_found for row in _rows(compare_runs(one, other, anchor=Anchor("batch-0"), metrics=(ENERGY,))))
        )
    return _share(naive), _share(anchored)


def figures(n_campaigns: int = N_CAMPAIGNS) -> Iterable[Figure]:
    for cycles in (3, 5, 10):
        t_interval, bootstrap = interval_coverage(cycles, n_campaigns)
        label = BOOTSTRAP_COVERAGE[cycles]
        yield _expected(f"t interval of a configuration, {cycles} cycles", t_interval, 0.95)
        yield _expected(f"bootstrap interval, {cycles} cycles, against its label", bootstrap, label)
    for cycles in (3, 5, 10):
        yield _expected(f"t interval of a ratio, {cycles} cycles", ratio_coverage(cycles, n_campaigns), 0.95)
    yield _expected(
        "a difference found where there is none, 2 configurations", false_differences(2, 5, n_campaigns), 0.05
    )
    many = false_differences(6, 5, n_campaigns)
    yield Figure("any difference found where there is none, 6 configurations (≤ 5)", many.share, None)
    yield _expected("a true 1 % found, 2 % between cycles, 5 cycles", found_effects(1.01, 5, n_campaigns), 0.66)
    yield from _gate_figures(n_campaigns)
    naive, anchored = false_differences_between_days(5, n_campaigns)
    yield _expected("two days, no difference: a naive test finds one", naive, 0.58)
    yield _expected("two days, no difference: over an anchor", anchored, 0.05)


def _gate_figures(n_campaigns: int) -> Iterable[Figure]:
    for name, ratio in (("no effect", 1.0), ("1 % worse", 1.01), ("exactly 3 % worse", 1.03), ("6 % worse", 1.06)):
        for cycles in (5, 10):
            said = [verdicts[0] for verdicts in gate_verdicts((ratio,), cycles, n_campaigns)]
            for verdict in (Verdict.WORSE, Verdict.WITHIN):
                share = said.count(verdict) / len(said)
                yield Figure(f"gate of 3 %, {name}, {cycles} cycles: {verdict.value}", share, None)
    families = gate_verdicts((1.0, 1.01, 1.03, 0.96, 1.06), 5, n_campaigns)
    wrong = sum(
        Verdict.WORSE in said[:4] or Verdict.BETTER in (*said[:3], said[4]) or Verdict.WITHIN in (said[2], *said[3:])
        for said in families
    )
    yield Figure("gate of 3 %, any wrong verdict among 5 configurations (≤ 5)", wrong / n_campaigns, None)


def main(argv: Sequence[str] | None = None) -> int:
    """0; a figure outside two standard errors is shown as such: one in twenty is, when all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--campaigns", type=int, default=N_CAMPAIGNS, metavar="N", help="default: %(default)s")
    count = parser.parse_args(argv).campaigns
    print(f"{count} simulated campaigns a line; ± is two standard errors")
    for figure in figures(count):
        print(figure, flush=True)
    return 0


def _expected(name: str, coverage: Coverage, expected: float) -> Figure:
    return Figure(name, coverage.share, expected, coverage.error(expected))


def _holds(lower: float | None, upper: float | None, truth: float) -> bool:
    return lower is not None and upper is not None and lower <= truth <= upper


def _share(outcomes: Iterable[bool]) -> Coverage:
    found = list(outcomes)
    return Coverage(sum(found), len(found))


def _against_first(run: Run, gates: Sequence[object] = ()) -> Comparison:
    ordered = sorted(run.with_results, key=lambda item: item.name)
    return compare_configurations(run, ordered[0], ordered[1:], metrics=(ENERGY,), gates=gates)  # type: ignore[arg-type]


def _rows(comparison: Comparison) -> list[Row]:
    return [row for pair in comparison.pairs for row in pair.rows]


def _naive_p(before: Run, after: Run) -> float:
    """Welch's test of one configuration in two runs, as if their cycles were all that varies."""
    sides = [
        next(item for item in run.with_results if item.name == "batch-1").estimate(ENERGY).values
        for run in (after, before)
    ]
    effect = anchored_effect(*(paired_effect(values, [1.0] * len(values)) for values in sides))
    return effect.p_value if effect.p_value is not None else 1.0


if __name__ == "__main__":
    raise SystemExit(main())
