"""Drift: found where it is, whatever differs between configurations, with an interval that covers it."""

from __future__ import annotations

import math
import random

import pytest

from lem.results.stats import Drift, change_of, trend_of, without_means

Observation = tuple[str, int, float]

LEVELS = {"a": 1.0, "b": 20.0, "c": 300.0}


def drift_of(found: list[Observation]) -> Drift | None:
    places = [place for _, place, _ in found]
    length = max(places, default=0) - min(places, default=0)
    return trend_of(places, [value for *_, value in found], [name for name, *_ in found], length=length)


def observations(drift: float, noise_sd: float, seed: int, cycles: int = 5) -> list[Observation]:
    """Interleaved cycles of three configurations; the log of the value rises by `drift` from first to last."""
    noise = random.Random(seed)
    places = [(cycle * len(LEVELS) + index, name) for cycle in range(cycles) for index, name in enumerate(LEVELS)]
    last = len(places) - 1
    return [
        (name, order, LEVELS[name] * math.exp(drift * order / last + noise.gauss(0, noise_sd)))
        for order, name in places
    ]


def test_a_drift_without_noise_is_found_to_the_digit() -> None:
    drift = drift_of(observations(0.03, 0.0, seed=1))
    assert drift is not None
    assert drift.change == pytest.approx(math.expm1(0.03))
    assert drift.is_flagged
    assert drift.is_significant


def test_levels_of_configurations_are_no_drift() -> None:
    grouped = [(name, 5 * index + cycle, level) for index, (name, level) in enumerate(LEVELS.items())
               for cycle in range(5)]  # fmt: skip
    drift = drift_of(grouped)
    assert drift is not None
    assert drift.change == pytest.approx(0.0, abs=1e-12)
    assert not drift.is_flagged


def test_the_interval_covers_the_true_drift_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(400):
        drift = drift_of(observations(0.02, 0.01, seed))
        assert drift is not None
        assert drift.ci_lower is not None
        assert drift.ci_upper is not None
        covered += drift.ci_lower <= math.expm1(0.02) <= drift.ci_upper
    assert 0.92 < covered / 400 < 0.98


def test_a_configuration_with_one_value_says_nothing() -> None:
    assert drift_of([("a", 0, 1.0), ("b", 1, 2.0)]) is None
    assert drift_of([]) is None


def test_two_values_give_a_change_without_an_interval() -> None:
    drift = drift_of([("a", 0, 1.0), ("a", 1, 1.05)])
    assert drift is not None
    assert (drift.n, drift.ci_lower, drift.is_significant) == (2, None, False)
    assert drift.change == pytest.approx(0.05)


def test_each_value_is_set_against_its_own_configuration() -> None:
    logs = without_means([math.log(value) for value in (1.0, 9.0, 4.0)], ["a", "b", "a"])
    assert logs == pytest.approx([-math.log(2), 0.0, math.log(2)])


def test_a_change_beyond_all_measure_is_no_overflow() -> None:
    assert change_of(1e6) > 1e300
    assert change_of(-1e6) == -1.0
    assert change_of(0.0) == 0.0
