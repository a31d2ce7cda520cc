from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from lem.base.units import NS_PER_S
from lem.meters.curve import (
    ClosedWindow,
    NotMeasured,
    Span,
    counter_curve,
    power_curve,
    update_period_s,
)
from lem.meters.rapl import rapl_curve
from lem.meters.samples import CounterChange, GpuSample, RaplReading

POLL_S = 0.02


def ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def between(opened_s: float, closed_s: float) -> Span:
    return Span(ns(opened_s), ns(closed_s))


def counted(energy_j: Callable[[float], float], times_s: Sequence[float], gpu: int = 0) -> list[CounterChange]:
    """A counter brought up to date at those times, each seen between the polls around it."""
    changes = [CounterChange(gpu, ns(times_s[0]) - 1, ns(times_s[0]) - 1, 0)]
    for at_s in times_s:
        poll = int(at_s / POLL_S)
        changes.append(CounterChange(gpu, ns(poll * POLL_S), ns((poll + 1) * POLL_S), round(1000 * energy_j(at_s))))
    return changes


def every(period_s: float, end_s: float, phase_s: float = 0.0) -> list[float]:
    return [phase_s + number * period_s for number in range(1, int((end_s - phase_s) / period_s) + 1)]


def seen(times_s: Sequence[float], poll_s: float) -> list[CounterChange]:
    """Changes at those times, as polls so far apart see them."""
    polls = [number * poll_s for number in range(int(times_s[-1] / poll_s) + 2)]
    at = [next(number for number, poll in enumerate(polls) if poll >= time) for time in times_s]
    return [CounterChange(0, ns(polls[number - 1]), ns(polls[number]), count) for count, number in enumerate(at)]


def misplaced_ms(times_s: Sequence[float], poll_s: float) -> list[float]:
    """By how much knots lie beside their changes; bounds that leave a poll's own are an error."""
    changes = seen(times_s, poll_s)
    curve = counter_curve(changes, 0, "counter")
    for row, low, high in zip(changes, curve.earliest_ns, curve.latest_ns, strict=True):
        assert row.before_ns <= low <= high <= row.at_ns
    return [abs(at_ns / 1e6 - 1e3 * at_s) for at_ns, at_s in zip(curve.at_ns, times_s, strict=True)]


@pytest.mark.parametrize("period_s", [0.05, 0.1, 0.5])
def test_polls_out_of_step_with_a_regular_counter_place_its_changes_to_a_millisecond(period_s: float) -> None:
    times_s = every(period_s, 100 * period_s, 0.0123)
    assert max(misplaced_ms(times_s, 0.019)) < 1.5
    # In step they see every change equally late, and nothing tells by how much.
    assert max(misplaced_ms(times_s, 0.020)) > 1.5


def test_changes_less_regular_than_polls_are_dense_are_placed_no_worse_than_by_their_own_polls() -> None:
    chance = random.Random(5)
    times_s = [at_s + chance.uniform(-0.03, 0.03) for at_s in every(0.2, 40)]
    assert max(misplaced_ms(times_s, 0.019)) <= 19
    assert sum(misplaced_ms(times_s, 0.019)) / len(times_s) < 19 / 2


def test_updates_about_as_short_as_polls_stay_where_their_polls_saw_them() -> None:
    times_s = every(0.02, 4, 0.0123)
    # Two changes may lie between two polls: the second alone is seen.
    times_s = [before for before, after in itertools.pairwise(times_s) if int(before / 0.019) != int(after / 0.019)]
    assert max(misplaced_ms(times_s, 0.019)) <= 9.5 + 1e-6


@pytest.mark.parametrize(("opened_s", "closed_s", "said"), [(-1, 2, "first read"), (1, 99, "last read")])
def test_a_window_beyond_the_readings_is_not_measured(opened_s: float, closed_s: float, said: str) -> None:
    curve = counter_curve(counted(lambda at_s: 250 * at_s, every(0.1, 5)), 0, "the counter")
    with pytest.raises(NotMeasured, match=f"the counter was {said}"):
        curve.between_j(between(opened_s, closed_s))


def test_a_meter_that_was_read_once_gives_nothing() -> None:
    with pytest.raises(NotMeasured, match="read 1 times"):
        counter_curve([CounterChange(0, 1, 2, 3)], 0, "the counter").between_j(Span(0, 2))


def test_a_counter_reset_in_the_window_gives_no_energy() -> None:
    changes = counted(lambda at_s: 250 * at_s if at_s < 2 else 250 * (at_s - 2), every(0.1, 5, 0.01))
    curve = counter_curve(changes, 0, "the counter")
    with pytest.raises(NotMeasured, match=r"the counter fell from \d+ to \d+ mJ: the driver was reloaded"):
        curve.between_j(between(1, 4))
    assert curve.between_j(between(2.5, 4.5)) == pytest.approx(500, rel=0.02)


def test_a_change_seen_late_came_at_most_one_update_before_it_was_seen() -> None:
    changes = counted(lambda at_s: 250 * at_s, every(0.1, 3))
    stalled = CounterChange(0, ns(3.0), ns(5.0), round(250_000 * 4.99))
    curve = counter_curve([*changes, stalled], 0, "c")
    assert ns(4.9) <= curve.at_ns[-1] <= ns(5.0)


def closed_window(guard_s: float, idle_w: float | None) -> ClosedWindow:
    return ClosedWindow(between(10, 20), between(10 - guard_s, 10), between(20, 20 + guard_s), idle_w)


def stepped_j(at_s: float) -> float:
    """60 W at rest, 300 W from 10 to 20 s."""
    return 60 * at_s + 240 * (min(max(at_s, 10), 20) - 10)


@pytest.mark.parametrize("period_s", [0.1, 0.5])
@pytest.mark.parametrize("phase_s", [0.003, 0.041, 0.078])
@pytest.mark.parametrize("idle_w", [None, 60.0])
def test_the_guards_of_a_closed_window_are_taken_off(period_s: float, phase_s: float, idle_w: float | None) -> None:
    curve = counter_curve(counted(stepped_j, every(period_s, 25, phase_s)), 0, "c")
    assert curve.closed_j(closed_window(2 * period_s + 0.05, idle_w)) == pytest.approx(3000, rel=0.002)


def test_guards_without_an_update_are_seen_from_inside() -> None:
    curve = counter_curve(counted(stepped_j, every(0.5, 25, 0.2)), 0, "c")
    assert curve.closed_j(closed_window(0.01, None)) == pytest.approx(3000, rel=0.02)


def test_what_the_device_took_to_relax_is_not_counted_to_the_window() -> None:
    def relaxing_j(at_s: float) -> float:
        return stepped_j(at_s) + (9.6 if at_s > 20.04 else 0.0)  # 40 ms at 240 W above rest

    for phase_s in (0.013, 0.037, 0.061, 0.093):
        curve = counter_curve(counted(relaxing_j, every(0.1, 25, phase_s)), 0, "c")
        assert curve.closed_j(closed_window(0.25, 60.0)) < 3000 + 9.6 - 2


def test_work_that_ends_unevenly_is_bounded_by_what_the_guard_shows() -> None:
    def uneven_j(at_s: float) -> float:
        return stepped_j(at_s) - 240 * min(max(at_s - 19.6, 0), 0.4)  # it fell to rest 0.4 s before it was over

    curve = counter_curve(counted(uneven_j, every(0.5, 25, 0.05)), 0, "c")
    assert curve.closed_j(closed_window(1.05, 60.0)) == pytest.approx(3000 - 96, rel=0.005)
    assert curve.closing_doubt_j(closed_window(1.05, 60.0)) == pytest.approx(96, rel=0.15)


def test_a_warmup_that_relaxes_in_the_guard_is_not_taken_for_rest() -> None:
    def after_warmup_j(at_s: float) -> float:
        return stepped_j(at_s) + 30 * min(1.0, max(0.0, (at_s - 9.8) / 0.05))

    curve = counter_curve(counted(after_warmup_j, every(0.1, 25, 0.009)), 0, "c")
    assert curve.closed_j(closed_window(0.3, 60.0)) == pytest.approx(3000, rel=0.003)


def samples(times_s: Sequence[float], power_w: Callable[[float], float | None]) -> list[GpuSample]:
    return [GpuSample(0, ns(at_s), power_w=power_w(at_s)) for at_s in times_s]


def test_integrated_power_is_a_sum_of_trapezoids() -> None:
    rows = samples(every(0.1, 5), lambda at_s: 100 + 20 * at_s)
    assert power_curve(rows, 0, 0.1, "p").between_j(between(1, 4)) == pytest.approx(300 + 10 * (16 - 1))


def test_a_hole_of_more_than_three_periods_voids_integrated_power() -> None:
    # What could not be read is a hole and not zero; three periods without a sample are none.
    rows = samples(
        [at_s for at_s in every(0.1, 9) if not 5.05 < at_s < 5.25], lambda s: None if 4.05 < s < 4.45 else 100.0
    )
    curve = power_curve(rows, 0, 0.1, "power of GPU-1")
    with pytest.raises(NotMeasured, match=r"power of GPU-1 was not read for 0\.50 s, more than 3 periods of 0\.1 s"):
        curve.between_j(between(1, 8))
    assert curve.between_j(between(5, 8)) == pytest.approx(300)


MAX_UJ = 65_532_610_987


def test_a_rapl_counter_that_wraps_goes_on() -> None:
    begin_uj = MAX_UJ - 100_000_000
    readings = [RaplReading(0, ns(at_s), (begin_uj + at_s * 50_000_000) % MAX_UJ) for at_s in range(10)]
    assert any(b.energy_uj < a.energy_uj for a, b in itertools.pairwise(readings))
    assert rapl_curve(readings, 0, MAX_UJ, "zone").between_j(between(0.5, 8.5)) == pytest.approx(400)


def test_a_rapl_counter_not_read_for_so_long_that_it_may_wrap_twice_gives_nothing() -> None:
    readings = [RaplReading(0, ns(at_s), 50_000_000 * at_s) for at_s in (0, 1, 100, 101)]
    curve = rapl_curve(readings, 0, MAX_UJ, "package-0")
    with pytest.raises(NotMeasured, match="package-0 was not read for 99 s, in which it may have wrapped more than"):
        curve.between_j(between(0.5, 100.5))


def test_a_missed_update_does_not_stretch_the_period() -> None:
    times = [at_s for number, at_s in enumerate(every(0.1, 20, 0.003)) if number % 7]
    period_s = update_period_s(counted(lambda at_s: 250 * at_s, times), 0, between(2, 19))
    assert period_s == pytest.approx(0.1, rel=0.02)


def test_the_period_of_a_counter_that_hardly_changes_is_not_known() -> None:
    with pytest.raises(NotMeasured, match="fewer than three times"):
        update_period_s(counted(lambda at_s: at_s, [0.1, 5.0]), 0, between(0, 6))
