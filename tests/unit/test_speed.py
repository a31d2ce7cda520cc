"""How `python -m tests.bench.speed` judges a row, and the exponent of a cost that grows."""

from __future__ import annotations

import pytest

from tests.bench.speed import Row, exponent, slope

SIZES = (100, 1_000, 10_000)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("constant", [0.0, 0.5, 30.0])
def test_exponent_is_of_what_comes_on_top_of_the_constant_part(power: float, constant: float):
    assert exponent(SIZES, [constant + 0.001 * size**power for size in SIZES]) == pytest.approx(power, abs=0.011)


def test_slope_of_a_cost_without_a_constant_part():
    assert slope(SIZES, [2.0, 2.0, 2.0]) == 0
    assert slope(SIZES, [1.0, 10.0, 100.0]) == pytest.approx(1)


def test_row_judges_the_median_of_the_ratios_or_the_new_value():
    pairs = [(1.0, 10.0), (3.0, 10.0), (9.0, 30.0)]  # the ratio of the medians is 0.3, too
    assert Row("report", "s", 0.3).line(pairs).split()[1:] == ["10.000", "3.000", "s", "0.300", "0.30", "x", "ok"]
    assert Row("report", "s", 0.2).line(pairs).endswith("OVER")
    assert Row("--help", "ms", 3, is_of_old=False).line(pairs).endswith("3.00 ms  ok")
    assert Row("--help", "ms", 2.9, is_of_old=False).line(pairs).endswith("2.90 ms  OVER")
