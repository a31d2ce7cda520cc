"""The statistics hold what they say on simulated campaigns; seeded, so it is the same every time.

`python -m tests.bench.coverage` prints all figures; here are those that must not change unseen.
"""

from __future__ import annotations

import math

import pytest

from lem.results.bootstrap import BOOTSTRAP_COVERAGE
from lem.results.stats import Verdict
from tests.bench.coverage import (
    Coverage,
    false_differences,
    false_differences_between_days,
    found_effects,
    gate_verdicts,
    interval_coverage,
    main,
    ratio_coverage,
)


def test_the_t_interval_holds_the_truth_and_the_bootstrap_what_its_label_says() -> None:
    """1,000 campaigns with deviations of cycles and loads, drift, exclusions and reruns."""
    t_interval, bootstrap = interval_coverage(5)
    assert t_interval.total == 1000
    assert t_interval.share == pytest.approx(0.95, abs=0.014)
    assert 900 < bootstrap.total < 1000  # some lost a cycle, whose label is another
    assert bootstrap.share == pytest.approx(BOOTSTRAP_COVERAGE[5], abs=bootstrap.error(BOOTSTRAP_COVERAGE[5]))


def test_the_interval_of_a_ratio_holds_the_true_ratio() -> None:
    coverage = ratio_coverage(4, 400)
    assert coverage.total == 400
    assert coverage.share == pytest.approx(0.95, abs=coverage.error(0.95))


def test_a_true_effect_is_found_as_often_as_is_said_and_none_where_there_is_none() -> None:
    power = found_effects(1.01, 5, 400)
    assert power.share == pytest.approx(0.66, abs=power.error(0.66))
    assert false_differences(5, 5, 300).share < 0.05 + Coverage(0, 300).error(0.05)


def test_a_gate_is_seldom_wrong_also_among_several() -> None:
    """No effect, 1 % worse, on the threshold, 4 % better, 6 % worse: no verdict may say another thing."""
    said = gate_verdicts((1.0, 1.01, 1.03, 0.96, 1.06), 5, 200)
    truths = ({Verdict.WITHIN}, {Verdict.WITHIN}, set[Verdict](), {Verdict.BETTER}, {Verdict.WORSE})
    wrong = sum(
        any(verdict not in {*truth, Verdict.INCONCLUSIVE} for verdict, truth in zip(verdicts, truths, strict=True))
        for verdicts in said
    )
    assert wrong / len(said) < 0.05 + Coverage(0, 200).error(0.05)
    assert sum(verdicts[4] is Verdict.WORSE for verdicts in said) > 100


def test_an_anchor_takes_out_what_separates_two_days() -> None:
    naive, anchored = false_differences_between_days(5, 300)
    assert naive.share > 0.25
    assert anchored.share < 0.05 + anchored.error(0.05)


def test_the_bench_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--campaigns", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 simulated campaigns")
    assert len(lines) > 20
    assert not any(math.isnan(float(line.split("%")[0].split()[-1])) for line in lines[1:] if " %" in line)
