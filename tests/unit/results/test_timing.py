"""What a planned campaign will take, from what earlier results took."""

import dataclasses
from datetime import datetime, timedelta, timezone

import pytest

from lem.results.run import earlier_times
from tests.records import make_record

# Load 0.8 s, warm-up 1.5 s, window 10 s, a gap of 0.4 s before it: 12.3 s are known of each experiment.
START = datetime(2026, 7, 14, 10, tzinfo=timezone.utc)


def _started(seconds, **more):
    record = make_record(**more)
    label = (START + timedelta(seconds=seconds)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return dataclasses.replace(record, identity=dataclasses.replace(record.identity, start_utc=label))


def test_one_result_tells_its_load_its_warm_up_and_its_window():
    found = earlier_times([make_record()])
    (measured,), (load,) = found.measured.values(), found.load.values()
    assert (measured, load, found.gap) == (11.5, 0.8, 0.4)


def test_what_lies_around_a_window_is_seen_from_one_start_to_the_next():
    # 30 s apart, less the gap before the second: 29.6 s, of which 12.3 s are known.
    found = earlier_times([_started(0, cycle=0), _started(30, cycle=1), _started(60, cycle=2)])
    (measured,) = found.measured.values()
    assert measured == pytest.approx(29.6 - 0.8)


def test_the_last_one_took_around_it_what_the_others_did():
    other = "f" * 16
    found = earlier_times([_started(0), _started(30, config_hash=other)])
    assert found.measured[other] == pytest.approx(29.6 - 0.8)


def test_a_night_between_two_experiments_is_not_taken_for_work():
    found = earlier_times([_started(0, cycle=0), _started(30, cycle=1), _started(40_000, cycle=2)])
    (measured,) = found.measured.values()
    assert measured == pytest.approx(29.6 - 0.8)


def test_other_runs_and_hosts_do_not_follow():
    found = earlier_times([_started(0), _started(30, cycle=1, host="other"), _started(60, cycle=2, run_id="other")])
    (measured,) = found.measured.values()
    assert measured == 11.5


def test_the_median_counts_so_that_one_odd_experiment_does_not():
    records = [_started(30 * cycle, cycle=cycle) for cycle in range(5)]
    records[2] = dataclasses.replace(records[2], window=dataclasses.replace(records[2].window, load_s=9.0))
    assert set(earlier_times(records).load.values()) == {0.8}


def test_a_start_that_is_no_time_is_left_out():
    record = make_record()
    broken = dataclasses.replace(record, identity=dataclasses.replace(record.identity, start_utc="yesterday"))
    assert earlier_times([broken, make_record(cycle=1)]).measured


def test_nothing_is_known_of_nothing():
    found = earlier_times([])
    assert (dict(found.measured), dict(found.load), found.gap) == ({}, {}, None)
