"""The scripted GPUs know their true energy, and their meters err exactly as they are told to."""

from __future__ import annotations

import math

import pytest

from lem.meters.samples import PartReader, SampleLog, encode_header, encode_row
from tests.doubles.nvml.traces import (
    NS_PER_S,
    Counter,
    Events,
    GpuProcess,
    GpuTrace,
    Level,
    Load,
    Point,
    PowerSignal,
    Ripple,
    Sensor,
    Thermal,
    Trace,
    random_trace,
    simulate_log,
)
from tests.doubles.powercap import Zone

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


def test_power_keeps_to_its_script_at_the_edges():
    assert [LINE.power_w(at) for at in (0.0, 1.5, 2.0, 3.0, 9.0)] == [80.0, 80.0, 300.0, 250.0, 200.0]
    assert LEVELS.power_w(0.0) == 80.0
    assert LEVELS.power_w(2.3) == pytest.approx(400.0 - 320.0 / math.e)
    assert LEVELS.power_w(5.5) == pytest.approx(70.0 + 20.0 / math.e)


@pytest.mark.parametrize("signal", [LINE, LEVELS, PowerSignal(LINE.points, LEVELS.levels)])
@pytest.mark.parametrize("tau_s", [0.3, 1.7])
def test_what_is_slow_sees_power_through_its_time_constant(signal, tau_s):
    steps, to_s = 40_000, 6.0
    width_s, seen_w = to_s / steps, signal.power_w(0.0)
    for step in range(steps):
        seen_w += (signal.power_w((step + 0.5) * width_s) - seen_w) * (1 - math.exp(-width_s / tau_s))
    assert signal.smoothed_w(to_s, tau_s) == pytest.approx(seen_w, abs=0.1)


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


def test_a_25_ms_window_misses_a_ripple_that_the_whole_period_averages_out():
    rippling = PowerSignal(points=(Point(0.0, 200.0),), ripples=(Ripple(0.0, 100.0, 50.0, 10.0),))
    partly = _trace(rippling, instant=Sensor(0.025, 0.1))
    wholly = _trace(rippling, instant=Sensor(0.1, 0.1))
    assert abs(partly.instant_w(_at(5.05)) - 200.0) > 30.0
    assert wholly.instant_w(_at(5.05)) == pytest.approx(200.0, abs=0.001)


def test_a_load_draws_what_follows_from_the_log_of_its_engine():
    load = Load("missing", idle_w=80.0, busy_w=400.0, rise_tau_s=0.1, fall_tau_s=0.5, events=0x4)
    trace = Trace(ORIGIN_NS, (GpuTrace(load=load),))
    worked = trace.after_load({0: f"{_at(1.0)} 1\n{_at(3.0)} 0.5\n{_at(4.0)} 0\n"})
    decay = 1.0 - math.exp(-20.0)
    end_w = 400.0 - 320.0 * math.exp(-20.0)
    assert worked.energy_j(_at(0.0), _at(1.0)) == pytest.approx(80.0)
    assert worked.energy_j(_at(1.0), _at(3.0)) == pytest.approx(800.0 - 320.0 * 0.1 * decay)
    assert worked.power_w(_at(4.0)) == pytest.approx(240.0 + (end_w - 240.0) * math.exp(-2.0))
    assert [worked.utilisation_percent(_at(at)) for at in (0.5, 2.0, 3.5, 5.0)] == [0, 100, 50, 0]
    assert [worked.event_mask(_at(at)) for at in (0.5, 2.0, 3.5, 5.0)] == [0, 4, 4, 0]


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


def test_the_log_holds_what_the_meters_said_when_it_looked():
    trace = _trace(SUM, thermal=Thermal(), events=(Events(2.0, 3.0, 0x4),), processes=(GpuProcess(8, from_s=2.5),))
    log = simulate_log(trace, _at(0.0), _at(5.0), interval_ms=200, zones=(Zone("intel-rapl:0", "package-0"),))
    assert [row.at_ns for row in log.samples] == [_at(number / 5) for number in range(26)]
    for row in log.samples:
        assert row.power_w == trace.instant_w(row.at_ns)
        assert (row.temp_c, row.event_mask) == (trace.temp_c(row.at_ns), trace.event_mask(row.at_ns))
    assert [(row.at_ns, row.pids) for row in log.processes] == [(_at(0.0), ()), (_at(3.0), (8,))]
    assert [row.at_ns for row in log.rapl] == [_at(at) for at in range(6)]
    assert log.header.zones[0].domain == "package"
    assert log.header.gpus[0].power_source == "instant"


def test_nothing_is_logged_in_a_gap_and_the_change_after_it_tells_of_it():
    trace = _trace(SUM)
    log = simulate_log(trace, _at(0.0), _at(5.0), gaps=((_at(2.0), _at(3.0)),))
    assert not [row for row in log.rows() if _at(2.0) <= row.at_ns < _at(3.0)]
    (row,) = [row for row in log.counters if row.at_ns == _at(3.0)]
    assert row.before_ns == _at(1.995)  # the last poll of 19 ms


def test_a_simulated_log_is_one_that_lem_reads(tmp_path):
    log = simulate_log(random_trace(1, with_window=WINDOW), *WINDOW, zones=(Zone("intel-rapl:0", "package-0"),))
    lines = [encode_header(log.header), *(encode_row(row) for row in log.rows())]
    (tmp_path / "samples.part").write_text("".join(f"{line}\n" for line in lines))
    again = PartReader(tmp_path / "samples.part").read()
    assert isinstance(again, SampleLog)
    assert again == log


def test_a_random_trace_follows_from_its_seed():
    assert random_trace(5, with_window=WINDOW) == random_trace(5, with_window=WINDOW)
    assert random_trace(5, with_window=WINDOW) != random_trace(6, with_window=WINDOW)


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
