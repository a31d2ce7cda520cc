from __future__ import annotations

import dataclasses
import json
import math
import statistics
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from lem.base.units import percent
from lem.results.aggregation import earlier_times, measure_precision, run_document
from lem.results.run import make_run
from lem.results.stopping import STOPPING_FILE, StoppingRule, Target, read_stopping_rule, write_stopping_rule
from lem.results.table import render_run
from tests.needs import Late
from tests.records import make_record

stats: Any = Late("scipy.stats")

RULE = StoppingRule(Target(0.02), 5, 20)
LOOKED = StoppingRule(Target(0.02, "output_tok_per_s", "ratio"), 5, 20, looks=(5, 6, 8), added=(3,))


def _records(rates, **more):
    return [make_record(cycle=cycle, output_tok_per_s=rate, **more) for cycle, rate in enumerate(rates)]


def test_the_half_width_is_that_of_the_interval_over_the_mean():
    # Logs ±0.01 around 0, n = 2: t(0.975, 1) · 0.01·√2 / √2 = 12.706 · 0.01.
    records = _records([100 * 2.718281828459045**0.01, 100 / 2.718281828459045**0.01])
    (found,) = make_run(records).configurations
    assert found.estimate("throughput").half_width == pytest.approx(2.718281828459045**0.12706 - 1, rel=1e-4)


def test_a_target_splits_configurations_into_narrow_and_wide():
    narrow = _records([100, 100.5, 99.5, 100, 100], config_name="narrow")
    wide = _records([90, 110, 90, 110, 100], config_name="wide", config_hash="f" * 16)
    report = measure_precision(make_run([*narrow, *wide]), RULE)
    assert (list(report.narrow), list(report.wide)) == (["narrow"], ["wide"])


def test_the_ratio_to_the_first_configuration_is_watched_and_what_a_cycle_shares_cancels_out():
    shared = [90.0, 110.0, 95.0, 105.0, 100.0]
    first = _records(shared, config_name="first")
    other = _records([rate * change for rate, change in zip(shared, (1, 1.005, 1, 0.995, 1), strict=True)],
                     config_name="other", config_hash="f" * 16)  # fmt: skip
    run = make_run([*first, *other])
    assert set(measure_precision(run, RULE).wide) == {"first", "other"}
    ratio = measure_precision(run, StoppingRule(Target(0.02, kind="ratio"), 5, 20, looks=(5,)))
    assert (list(ratio.narrow), ratio.wide) == (["other"], {})
    # sd 0.35 %, t of 4 degrees at 1.79 %: 3.88
    assert ratio.narrow["other"] == pytest.approx(0.00354 * 3.88 / 5**0.5, rel=0.01)
    wide, narrow = (StoppingRule(Target(it, "output_tok_per_s", "gate"), 5, 20, looks=(5,)) for it in (0.03, 0.001))
    assert list(measure_precision(run, wide).narrow) == list(measure_precision(run, narrow).wide) == ["other"]


def test_values_of_zero_have_no_interval_and_never_will():
    report = measure_precision(make_run(_records([0.0, 1.0, 1.0, 1.0, 1.0])), RULE)
    assert report.wide == {}
    assert "zero or negative" in report.without["small"]


@pytest.mark.parametrize("rule", [RULE, LOOKED])
def test_a_rule_comes_back_as_it_was_written(tmp_path, rule):
    write_stopping_rule(tmp_path / "run", rule)
    assert read_stopping_rule(tmp_path / "run") == rule


def test_a_rule_of_an_earlier_build_may_have_tested_after_every_cycle(tmp_path):
    target = {"half_width": 0.02, "metric": None}
    document = {"schema_version": 1, "target": target, "least_cycles": 5, "most_cycles": 20}
    (tmp_path / STOPPING_FILE).write_text(json.dumps(document))
    assert read_stopping_rule(tmp_path) == dataclasses.replace(RULE, looks=tuple(range(5, 21)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"target": {"half_width": "x", "metric": null}}',
        '{"target": [1], "least_cycles": 1, "most_cycles": 2}',
        '{"target": null, "least_cycles": 1, "most_cycles": 1000000000}',
        '{"target": null, "least_cycles": 5, "most_cycles": 20, "looks": [21]}',
        '{"target": null, "least_cycles": 5, "most_cycles": 20, "added": [5, 5]}',
        '{"target": {"half_width": 0.1, "metric": null, "kind": "x"}, "least_cycles": 5, "most_cycles": 20}',
    ],
)
def test_a_broken_rule_is_told_and_is_none(tmp_path, caplog, content):
    (tmp_path / STOPPING_FILE).write_text(content)
    assert read_stopping_rule(tmp_path) is None
    assert "is corrupt: unknown whether" in caplog.text


def test_table_and_json_say_by_which_rule_cycles_were_added_and_widen_the_intervals():
    records = _records([100, 101, 102, 103, 104])
    run = make_run(records, stopping=LOOKED)
    shown = " ".join(render_run(run).split())
    assert "after 3 cycles, then until every ratio is within ±2 % in output_tok_per_s (5 cycles at least" in shown
    assert f"are taken at {percent(LOOKED.alpha)} instead of 5 %" in shown
    target = {"half_width": 0.02, "metric": "output_tok_per_s", "kind": "ratio"}
    bounds = {"least_cycles": 5, "most_cycles": 20}
    assert run_document(run)["stopping"] == {"target": target, **bounds, "looks": (5, 6, 8), "added": (3,)}
    (found,), (fixed,) = run.configurations, make_run(records).configurations
    logs = [math.log(value) for value in found.estimate("throughput").values]
    half = stats.t.ppf(1 - LOOKED.alpha / 2, 4) * statistics.stdev(logs) / math.sqrt(5)
    assert found.estimate("throughput").high == pytest.approx(math.exp(statistics.fmean(logs) + half))
    assert (found.estimate("throughput").half_width or 0) > (fixed.estimate("throughput").half_width or 1)


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


OTHER = "f" * 16


@pytest.mark.parametrize(
    ("records", "measured_s"),
    [
        # 30 s apart, less the gap before the second: 29.6 s, of which 12.3 s are known.
        ([_started(0, cycle=0), _started(30, cycle=1), _started(60, cycle=2)], [28.8]),
        # The last one took around it what the others did.
        ([_started(0), _started(30, config_hash=OTHER)], [28.8, 28.8]),
        # A night between two experiments is not work.
        ([_started(0, cycle=0), _started(30, cycle=1), _started(40_000, cycle=2)], [28.8]),
        # Other runs and hosts do not follow.
        ([_started(0), _started(30, cycle=1, host="other"), _started(60, cycle=2, run_id="other")], [11.5]),
        ([], []),
    ],
)
def test_what_lies_around_a_window_is_seen_from_one_start_to_the_next(records, measured_s):
    found = earlier_times(records)
    assert list(found.measured.values()) == pytest.approx(measured_s)
    assert found.gap == (0.4 if records else None)


def test_the_median_counts_so_that_one_odd_experiment_does_not():
    records = [_started(30 * cycle, cycle=cycle) for cycle in range(5)]
    records[2] = dataclasses.replace(records[2], window=dataclasses.replace(records[2].window, load_s=9.0))
    assert set(earlier_times(records).load.values()) == {0.8}


def test_a_start_that_is_no_time_is_left_out():
    record = make_record()
    broken = dataclasses.replace(record, identity=dataclasses.replace(record.identity, start_utc="yesterday"))
    assert earlier_times([broken, make_record(cycle=1)]).measured
