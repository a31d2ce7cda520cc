"""The scripted GPUs know their true energy, and their meters err exactly as they are told to."""

from __future__ import annotations

import math

import pytest

from tests.doubles.nvml.traces import (
    NS_PER_S,
    Counter,
    GpuTrace,
    Level,
    Point,
    PowerSignal,
    Ripple,
    Sensor,
    Trace,
    random_trace,
    simulate_log,
)

ORIGIN_NS = 5_000 * NS_PER_S
WINDOW = (ORIGIN_NS, ORIGIN_NS + 10 * NS_PER_S)

LINE = PowerSignal(points=(Point(1.0, 80.0), Point(2.0, 80.0), Point(2.0, 300.0), Point(4.0, 200.0)))
LEVELS = PowerSignal(levels=(Level(1.0, 80.0), Level(2.0, 400.0, 0.3), Level(3.5, 90.0, 0.0), Level(3.5, 70.0, 2.0)))
RIPPLES = PowerSignal(ripples=(Ripple(0.3, 2.0, 40.0, 10.0, 0.4), Ripple(1.0, math.inf, 20.0, 20.0)))
SUM = PowerSignal(LINE.points, LEVELS.levels, RIPPLES.ripples)


def _trace(signal=LEVELS, **gpu):
    return Trace(ORIGIN_NS, (GpuTrace(signal=signal, **gpu),))


def _at(seconds):
    return ORIGIN_NS + round(seconds * NS_PER_S)


@pytest.mark.parametrize("signal", [LINE, LEVELS, RIPPLES, SUM], ids=["line", "levels", "ripples", "sum"])
def test_energy_is_the_integral_of_power(signal):
    steps, from_s, to_s = 70_000, -1.0, 6.0
    width_s = (to_s - from_s) / steps
    summed_j = sum(signal.power_w(from_s + (step + 0.5) * width_s) for step in range(steps)) * width_s
    # Where power jumps, the step that it falls into is wrong by at most its own width.
    assert signal.energy_j(from_s, to_s) == pytest.approx(summed_j, abs=350.0 * width_s)


def test_the_counter_tells_the_energy_until_its_last_update():
    trace = _trace(SUM, counter=Counter(0.5, phase_s=0.2, offset_mj=7_000))
    expected_mj = math.floor(7_000 + 1000 * SUM.energy_j(0.0, 2.7))
    assert [trace.counter_mj(_at(at)) for at in (2.701, 2.9, 3.199)] == [expected_mj] * 3
    assert trace.counter_mj(_at(3.201)) == math.floor(7_000 + 1000 * SUM.energy_j(0.0, 3.2))


def test_a_reset_has_the_counter_begin_at_zero():
    trace = _trace(SUM, counter=Counter(0.5, offset_mj=10**9, resets_s=(2.1, 4.2)))
    assert trace.counter_mj(_at(2.05)) > 10**9
    assert trace.counter_mj(_at(2.4)) == 0
    assert trace.counter_mj(_at(2.6)) == math.floor(1000 * SUM.energy_j(2.1, 2.5))
    assert trace.counter_mj(_at(4.6)) == math.floor(1000 * SUM.energy_j(4.2, 4.5))


def test_a_sensor_tells_the_mean_of_its_window_until_the_next():
    trace = _trace(SUM, instant=Sensor(0.025, 0.1, lag_s=0.01), average=Sensor(1.0, 0.1))
    expected_w = SUM.energy_j(2.365, 2.39) / 0.025
    assert trace.instant_w(_at(2.401)) == trace.instant_w(_at(2.499)) == pytest.approx(expected_w, abs=0.0006)
    assert trace.average_w(_at(2.401)) == pytest.approx(SUM.energy_j(1.4, 2.4), abs=0.0006)


def test_the_log_brackets_every_update_of_the_counter():
    trace = _trace(SUM, counter=Counter(0.1, jitter_s=0.02, phase_s=0.033, seed=9))
    log = simulate_log(trace, _at(-1.0), _at(6.0), poll_jitter_ms=7.0, seed=2)
    first, *later = log.counters
    assert first.before_ns == first.at_ns >= _at(-1.0)
    updates = [ORIGIN_NS + at_s * 1e9 for at_s in trace.gpus[0].counter.ticks.between(-0.99, 5.999)]
    assert len(later) == len(updates)
    for row, update_ns in zip(later, updates, strict=True):
        assert row.before_ns < update_ns <= row.at_ns
        assert row.at_ns - row.before_ns <= 27_000_000
        assert row.energy_mj == trace.counter_mj(row.at_ns)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_trace_idles_works_in_its_window_and_relaxes(seed):
    trace = random_trace(seed, with_window=WINDOW, idle_w=80.0, busy_w=400.0)
    assert trace.energy_j(_at(-5.0), _at(0.0)) == pytest.approx(400.0)
    assert 300.0 < trace.energy_j(*WINDOW) / 10 < 440.0
    after = [trace.power_w(_at(at)) for at in (10.001, 10.5, 25.0)]
    assert after == sorted(after, reverse=True)
    assert after[1] < 80.0 + 0.05 * 320.0
    assert after[2] == pytest.approx(80.0, abs=0.1)
    assert {10.0, 20.0} <= {ripple.frequency_hz for ripple in trace.gpus[0].signal.ripples}
