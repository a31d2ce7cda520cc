"""The statistics hold what they claim on simulated campaigns; seeded, so it is the same every time.

`python -m tests.bench.coverage` prints all figures; here are those that must not change unseen.
"""

from __future__ import annotations

import re

import pytest

from lem.orchestration.resume import make_rule
from lem.results.stats import Verdict
from lem.results.stopping import parse_target
from tests.bench.coverage import (
    AT_THE_GATE,
    GATE,
    against_first,
    covers,
    errs,
    extended,
    found_any,
    grown,
    has_drift,
    holds,
    lead_row,
    main,
    ratio_hits,
    records_of,
    rows_of,
    simulated,
    verdict_of,
    window,
)
from tests.bench.simulation import TRUE_ENERGY_J, Simulated


def test_the_interval_of_a_configuration_and_of_a_ratio_hold_the_truth() -> None:
    runs = list(simulated(400, ratios=(1.0, 0.41), cycles=4))
    own = [next(item for item in run.with_results if item.name == "c00").estimate("energy") for run in runs]
    assert covers("", (holds((it.low, it.high), TRUE_ENERGY_J) for it in own)).is_ok
    assert covers("", ratio_hits(runs, 0.41)).is_ok


def test_all_intervals_of_a_comparison_hold_together_and_no_difference_is_found_where_there_is_none() -> None:
    compared = [against_first(run) for run in simulated(300, ratios=(1.0,) * 5)]
    assert covers("", (all(holds(row.interval, 1.0) for row in rows_of(it)) for it in compared)).is_ok
    assert errs("", map(found_any, compared)).is_ok


def test_a_gate_is_seldom_wrong_and_cycles_that_are_added_do_not_change_that() -> None:
    steady = Simulated(cycles=12)
    runs = [extended(records, most=12) for records in records_of(300, steady, (1.0, AT_THE_GATE))]
    assert errs("", (verdict_of(against_first(run, [GATE])) is Verdict.WORSE for run in runs)).is_ok
    assert covers("", (holds(lead_row(run).interval, AT_THE_GATE) for run in runs)).is_ok
    assert sum(run.stopping is not None for run in runs) > 250


def test_a_campaign_that_tests_after_every_cycle_covers_what_it_claims() -> None:
    rule = make_rule(parse_target("ci=2%:energy"), 12)
    runs = [grown(records, rule) for records in records_of(200, Simulated(cycles=12), (1.0, 1.0))]
    assert covers("", (holds(lead_row(run).interval, 1.0) for run in runs)).is_ok
    assert {run.stopping.looks[0] for run in runs if run.stopping} == {5}
    assert len({len(run.stopping.looks) for run in runs if run.stopping}) > 3


@pytest.mark.parametrize("count", [2, 8])
def test_a_drift_is_seldom_found_where_there_is_none(count: int) -> None:
    runs = simulated(200, Simulated(cycle_sd=0.02), ratios=(1.0,) * count)
    assert errs("", map(has_drift, runs)).is_ok


def test_steady_windows_of_poisson_traffic_are_steady() -> None:
    assert [seed for seed in range(200) if window(seed, 4.0).steady.value is not True] == []


def test_the_bench_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--campaigns", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 simulated campaigns")
    assert len(lines) > 50
    assert not [line for line in lines if "nan" in line.split()]
    assert all(re.search(r" [ 0-9.]+ %", line) for line in lines[1:])
