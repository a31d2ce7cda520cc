"""Scales: every value has a place, ticks are round and on the scale."""

from __future__ import annotations

import math

import pytest

from lem.results.report.plot import Scale, fitting_scale, tick_text


def test_a_scale_runs_from_begin_to_end_and_keeps_what_is_outside_at_its_ends() -> None:
    scale = Scale(10, 20, 0, 100)
    assert [scale(value) for value in (10, 15, 20, 5, 99)] == [0, 50, 100, 0, 100]
    assert Scale(1, 100, 0, 100, is_log=True)(10) == pytest.approx(50)


@pytest.mark.parametrize(
    "values", [[5.0], [0.0], [0.0, 0.0], [1, 2], [0.001, 900], [-3, 4], [1e-9, 1e9], [2.0, 2.0000001]]
)
def test_ticks_are_few_and_lie_on_the_scale(values: list[float]) -> None:
    scale = fitting_scale(values, 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(scale.low - 1e-9 <= tick <= scale.high * (1 + 1e-9) + 1e-9 for tick in ticks)
    assert list(ticks) == sorted(set(ticks))
    assert all(0 < scale(value) < 100 for value in values)


def test_values_far_apart_get_a_logarithmic_scale_but_never_from_zero() -> None:
    assert fitting_scale([1, 20], 0, 1).is_log
    assert not fitting_scale([1, 7], 0, 1).is_log
    assert not fitting_scale([0, 20], 0, 1).is_log
    from_zero = fitting_scale([1, 20], 0, 1, is_from_zero=True)
    assert (from_zero.is_log, from_zero.low) == (False, 0.0)


def test_ticks_read_as_people_write_them() -> None:
    assert [tick_text(value) for value in (0.30000000000000004, 1000.0, 2e6, 0.0)] == ["0.3", "1000", "2000000", "0"]
    assert math.isclose(float(tick_text(2.5e-7)), 2.5e-7)
