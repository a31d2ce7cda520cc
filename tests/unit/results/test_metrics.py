from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.record import Record
from lem.results.metrics import (
    METRIC_BY_NAME,
    METRICS,
    parse_comparable,
    parse_metric,
)
from tests.records import make_record


def full_record() -> Record:
    """Ten requests, one of them failed: 40 tokens in, 20 out, six good answers; every energy is known."""
    record = make_record()
    given: dict[str, dict[str, Any]] = {
        "energy": {
            "gpu_energy_j": 100.0,
            "gpu_energy_net_j": 60.0,
            "cpu_package_energy_j": 40.0,
            "dram_energy_j": 10.0,
            "external_energy_j": 200.0,
            "load_energy_j": 900.0,
            "warmup_energy_j": 30.0,
            "prefill_energy_j": 20.0,
            "decode_energy_j": 80.0,
            "energy_source": "nvml_counter",
        },
        "window": {"warmup_prompts": 5},
        "work": {"requests_ok": 9, "requests_failed": 1, "input_tok": 40, "output_tok": 20, "requests_good": 6},
        "carbon": {"pue": 1.2, "co2e_g": 0.5, "cost": 0.1},
    }
    sections = {name: dataclasses.replace(getattr(record, name), **values) for name, values in given.items()}
    return dataclasses.replace(record, **sections)


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [
        ("gpu_energy_net_per_output_tok_j", 60 / 20, "J/tok"),
        ("gpu_energy_net_per_total_tok_j", 60 / 60, "J/tok"),
        ("gpu_energy_net_per_request_j", 60 / 9, "J"),
        ("cpu_package_energy_per_output_tok_j", 40 / 20, "J/tok"),
        ("dram_energy_per_request_j", 10 / 9, "J"),
        ("external_energy_per_total_tok_j", 200 / 60, "J/tok"),
        ("prefill_energy_per_input_tok_j", 20 / 40, "J/tok"),
        ("decode_energy_per_output_tok_j", 80 / 20, "J/tok"),
        ("load_energy_per_load_j", 900, "J"),
        ("warmup_energy_per_prompt_j", 30 / 5, "J"),
        ("co2e_per_output_tok_g", 0.5 / 20, "g/tok"),
        ("co2e_per_request_g", 0.5 / 9, "g"),
        ("cost_per_million_output_tok", 1e6 * 0.1 / 20, ""),
        ("cost_per_1000_requests", 1000 * 0.1 / 9, ""),
        ("good_requests_ratio", 6 / 10, ""),  # a failed request is not good
        ("output_tok_per_request", 20 / 9, "tok"),
    ],
)
def test_what_is_normalised_is_divided_by_what_its_name_says(name: str, value: float, unit: str) -> None:
    metric = parse_comparable(name)
    found, why = metric.read(full_record())
    assert found == pytest.approx(value)
    assert why is None
    assert metric.unit == unit


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("gpu_energy_j", "energy_per_output_tok_j or energy_per_total_tok_j"),
        ("gpu_energy_net_j", "gpu_energy_net_per_output_tok_j or"),
        ("dram_energy_j", "dram_energy_per_output_tok_j"),
        ("load_energy_j", "load_energy_per_load_j"),
        ("co2e_g", "co2e_per_output_tok_g"),
        ("cost", "cost_per_million_output_tok or cost_per_1000_requests"),
        ("output_tok", "output_tok_per_request"),
        ("window_s", "output_tok_per_s"),
    ],
)
def test_what_grows_with_the_work_in_a_window_is_not_compared(name: str, instead: str) -> None:
    with pytest.raises(UserError, match="grows with the work in a window") as caught:
        parse_comparable(name)
    assert instead in caught.value.hint
    assert parse_metric("gpu_energy_j").read(full_record()) == (100.0, None)  # it is shown


def test_every_metric_has_a_value_or_a_reason() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric is parse_metric(metric.name) for metric in METRICS)
    for record in (make_record(), full_record()):
        assert [
            it.name for it in METRIC_BY_NAME.values() if (it.read(record)[0] is None) == (it.read(record)[1] is None)
        ] == []


def test_a_count_of_zero_and_a_value_beyond_measure_have_their_reasons() -> None:
    idle = dataclasses.replace(full_record(), work=dataclasses.replace(full_record().work, output_tok=0))
    net = parse_metric("net")
    assert net.read(idle) == (None, Reason.of("no_work", what="output tokens"))
    huge = dataclasses.replace(full_record().energy, gpu_energy_net_j=1e308)
    assert net.read(dataclasses.replace(full_record(), energy=huge)) == (None, Reason.of("out_of_range"))


@pytest.mark.parametrize("part", ["mean", "p50", "p90", "p95", "p99"])
@pytest.mark.parametrize("kind", ["ttft", "tpot", "icl", "e2e", "queue"])
def test_the_mean_and_percentiles_of_every_latency_are_metrics(kind: str, part: str) -> None:
    metric = parse_comparable(f"{kind}_{part}_s")
    assert (metric.field, metric.percentile, metric.is_higher_better) == (f"{kind}_s", part, False)
