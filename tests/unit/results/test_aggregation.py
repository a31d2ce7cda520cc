"""Aggregates over cycles: what counts, what is left out, and when there is no interval."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from typing import Any

import pytest

from lem.base.reasons import Reason
from lem.record import Record, RecordError
from lem.results.aggregation import (
    Sensitivity,
    aggregate_campaign_results,
    configuration_document,
    earlier_sensitivity,
)
from lem.results.metrics import distinct
from lem.results.run import ENERGY, NO_INTERVAL, THROUGHPUT, Configuration
from tests.records import NO_METER, NO_TOKEN_TIMES, make_record, sentences


def cycles(*rates: float, **fields: object) -> list[Record]:
    return [make_record(cycle=cycle, output_tok_per_s=rate, **fields) for cycle, rate in enumerate(rates)]


def configured(records: Iterable[Record], confidence: float = 0.95) -> Configuration:
    return Configuration("small", distinct(records), confidence=confidence)


def rates_of(aggregate: Configuration) -> tuple[float, ...]:
    return aggregate.estimate("output_tok_per_s").values


def test_each_configuration_has_its_cycles_and_both_intervals_in_every_group() -> None:
    results = {"small": cycles(100, 102, 98), "large": cycles(50, 51, config_name="large", config_hash="f" * 16)}
    aggregates = aggregate_campaign_results(results)
    assert {name: item["n_cycles"] for name, item in aggregates.items()} == {"small": 3, "large": 2}
    throughput = aggregates["small"]["throughput"]["output_tok_per_s"]
    assert throughput["values"] == [100, 102, 98]
    assert throughput["unit"] == "tok/s"
    assert throughput["bootstrap"]["mean"] == pytest.approx(100)
    assert throughput["bootstrap"]["ci_lower"] < 100 < throughput["bootstrap"]["ci_upper"]
    assert throughput["t_log"]["geometric_mean"] == pytest.approx(statistics.geometric_mean([100, 102, 98]))
    assert throughput["t_log"]["ci_lower"] < throughput["bootstrap"]["ci_lower"]
    for group, metric in (("tokens", "output_tok"), ("latency", "e2e_p50_s"), ("throughput", "requests_per_s")):
        assert aggregates["small"][group][metric]["bootstrap"]["n_samples"] == 3
        assert aggregates["small"][group][metric]["t_log"]["n_samples"] == 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"output_tok_per_s": 5}, "small: result 2: schema_version is None"),
        *((item, "small: result 2: expected an object") for item in ("text", 7, [1])),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(item: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        aggregate_campaign_results({"small": [make_record(), item]})


def test_a_confidence_outside_zero_and_one_is_refused_even_without_results() -> None:
    with pytest.raises(ValueError, match="confidence"):
        aggregate_campaign_results({"small": []}, confidence=95)


def test_a_metric_measured_nowhere_carries_its_reason() -> None:
    aggregate = aggregate_campaign_results({"small": cycles(100, 102)})["small"]
    assert aggregate["energy"]["gpu_energy_j"]["null_reason"] == NO_METER
    assert aggregate["energy"]["gpu_energy_j"]["bootstrap"] is None
    assert aggregate["latency"]["ttft_p50_s"]["null_reason"] == NO_TOKEN_TIMES
    assert aggregate["latency"]["e2e_p95_s"]["null_reason"] == "needs requests with 100 different prompts, there are 8"


def test_a_metric_measured_in_some_cycles_says_in_how_many() -> None:
    records = [*cycles(100, 102), make_record(cycle=2, ttft_p50_s=0.01)]
    ttft = configured(records).estimate("ttft_p50_s")
    assert ttft.values == (0.01,)
    assert ttft.warning == f"measured in 1 of 3 cycles: {NO_TOKEN_TIMES}"


def test_failed_experiments_are_left_out_and_counted() -> None:
    aggregates = aggregate_campaign_results({"small": [*cycles(100, 102), None, None], "none": []})
    aggregate = aggregates["small"]
    assert aggregate["throughput"]["output_tok_per_s"]["values"] == [100, 102]
    assert (aggregate["n_cycles"], aggregate["n_results"], aggregate["n_failed"]) == (2, 2, 2)
    assert json.loads(json.dumps(aggregates, allow_nan=False)) == aggregates


def test_invalid_results_are_left_out_and_counted_and_estimated_beside_the_valid_ones() -> None:
    hot = make_record(cycle=2, output_tok_per_s=60, is_valid=False, invalid_reasons=("thermal slowdown",))
    aggregate = configured([*cycles(100, 102), hot])
    assert rates_of(aggregate) == (100, 102)
    assert (aggregate.n_cycles, len(aggregate.records), aggregate.n_invalid) == (2, 3, 1)
    assert aggregate.invalid_reasons == dict.fromkeys(sentences("thermal slowdown"), 1)
    every = aggregate.estimate("output_tok_per_s").all_attempts
    assert every is not None
    assert (round(3 * every.mean, 9), every.n_cycles, every.n_attempts) == (100 + 102 + 60, 3, 3)


@pytest.mark.parametrize(
    ("records", "rates"),
    [
        (
            [  # the last valid attempt
                make_record(attempt=2, output_tok_per_s=102),
                make_record(attempt=1, output_tok_per_s=101),
                make_record(attempt=3, output_tok_per_s=10, is_valid=False),
                make_record(attempt=10, output_tok_per_s=5, is_valid=False),
            ],
            (102,),
        ),
        ([*cycles(100, 102), make_record(config_hash="f" * 16, output_tok_per_s=110)], (105, 102)),  # the mean of two
        ([*cycles(100, 102, 98), *cycles(100, 102, 98)], (100, 102, 98)),  # identical duplicates once
        (cycles(0.0, 0.0, 3.0), (0.0, 0.0, 3.0)),
    ],
)
def test_a_cycle_is_one_value(records: list[Record], rates: tuple[float, ...]) -> None:
    aggregate = configured(records)
    assert rates_of(aggregate) == rates
    is_mixed = len({record.identity.config_hash for record in records}) > 1
    assert (Reason.of("mixed_configurations", count=2) in aggregate.warnings) == is_mixed
    t_log = aggregate.estimate("output_tok_per_s").t_log
    assert t_log is not None
    assert ("zero or negative" in (t_log.warning or "")) == (t_log.geometric_mean is None) == (min(rates) == 0)


def test_cycles_that_share_an_engine_load_have_no_interval() -> None:
    aggregate = configured(cycles(100, 102, 98, load_id="one"))
    estimate = aggregate.estimate("output_tok_per_s")
    assert aggregate.is_load_shared
    assert estimate.bootstrap is not None
    assert estimate.t_log is not None
    for interval in (estimate.bootstrap, estimate.t_log):
        assert {interval.ci_lower, interval.ci_upper} == {None}
        assert interval.warning == NO_INTERVAL.text
    assert estimate.bootstrap.mean == pytest.approx(100)
    document = configuration_document(aggregate)
    assert document["no_interval_reason"] == NO_INTERVAL.text
    assert document["throughput"]["output_tok_per_s"]["bootstrap"]["true_coverage"] is None


@pytest.mark.parametrize(("versions", "has_interval"), [("11", True), ("12", False)])
@pytest.mark.parametrize(("backend", "is_fixed"), [("server", False), ("vllm", True)])
def test_two_versions_of_a_server_share_no_interval(
    versions: str, has_interval: bool, backend: str, is_fixed: bool
) -> None:
    records = [
        record.with_sections(
            identity=dataclasses.replace(record.identity, backend=backend),
            environment=dataclasses.replace(record.environment, engine_version=version),
        )
        for record, version in zip(cycles(100, 102), versions, strict=True)
    ]
    aggregate = configured(records)
    assert (aggregate.estimate("output_tok_per_s").low is not None) == (has_interval or is_fixed)
    reason = configuration_document(aggregate)["no_interval_reason"]
    assert (reason is None) == (has_interval or is_fixed)
    assert reason is None or "(1, 2)" in reason


@pytest.mark.parametrize(
    "records",
    [
        [  # with an attempt that does not count
            make_record(cycle=0, load_id="one"),
            make_record(cycle=1, load_id="one", is_valid=False),
            make_record(cycle=1, attempt=2, load_id="two"),
        ],
        [make_record(host="a", load_id="1"), make_record(host="b", load_id="1")],  # the same name on another host
    ],
)
def test_a_load_that_no_two_cycles_have_is_not_shared(records: list[Record]) -> None:
    assert not configured(records).is_load_shared


def test_without_any_valid_result_everything_is_null_with_a_reason() -> None:
    aggregate = configured([make_record(is_valid=False)])
    assert aggregate.n_cycles == 0
    assert aggregate.estimate("output_tok_per_s").null_reason == "no valid result"
    assert aggregate.estimate("output_tok_per_s").all_attempts is not None


def test_results_of_several_hosts_or_runs_under_one_name_are_warned_about() -> None:
    aggregate = configured([make_record(), make_record(host="b"), make_record(run_id="later")])
    assert aggregate.n_cycles == 3
    assert {Reason.of("mixed_hosts", count=2), Reason.of("mixed_runs", count=2)} <= set(aggregate.warnings)
    first, other = make_record(), make_record(cycle=1)
    moved = dataclasses.replace(other, identity=dataclasses.replace(other.identity, node="b"))
    assert Reason.of("mixed_hosts", count=2) in configured([first, moved]).warnings


def _pairs(run_id: str, *ratios: float) -> list[Record]:
    large = {"config_name": "large", "config_hash": "f" * 16}
    rates = [100.0 + cycle for cycle in range(len(ratios))]
    others = [rate * ratio for rate, ratio in zip(rates, ratios, strict=True)]
    return [*cycles(*rates, run_id=run_id), *cycles(*others, run_id=run_id, **large)]


def test_the_spread_of_earlier_ratios_is_pooled_over_runs_and_names_them() -> None:
    first, second = (1.50, 1.52, 1.49), (1.61, 1.60)
    records = [*_pairs("20260714T100000Z-3fa1", *first), *_pairs("20260715T100000Z-aa01", *second)]
    variances = [statistics.variance(map(math.log, ratios)) for ratios in (first, second)]
    found = earlier_sensitivity(records, THROUGHPUT)
    assert found is not None
    assert found.spread == pytest.approx(math.sqrt((2 * variances[0] + variances[1]) / 3))
    assert (found.n_pairs, found.run_ids) == (3, ("20260714T100000Z-3fa1", "20260715T100000Z-aa01"))
    assert earlier_sensitivity(records, ENERGY) is None
    assert earlier_sensitivity(_pairs("20260716T100000Z-bb02", 1.5), THROUGHPUT) is None


def test_shared_loads_take_the_noise_of_loads_out_of_the_assumed_spread() -> None:
    alone, shared = (Sensitivity.assumed(ENERGY, is_load_shared=is_shared) for is_shared in (False, True))
    assert (alone.spread, shared.spread) == pytest.approx((math.sqrt(2) * 0.0111803, math.sqrt(2) * 0.005), rel=1e-5)
    assert alone.smallest(5) > shared.smallest(5)


def test_more_comparisons_need_more_cycles_and_leave_less_power() -> None:
    found = Sensitivity(ENERGY, 0.01)
    assert (found.needed(0.02), found.needed(0.02, 10), found.needed(0.00001)) == (5, 8, None)
    least = found.smallest(5)
    assert found.smallest(5, 10) > least
    assert found.power(5, least, 1) == pytest.approx(0.8, abs=1e-3)
    assert found.power(5, least, 10) < 0.5
