from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.config.experiment_config import ExperimentConfig
from lem.errors import OptionRefused
from lem.meters.registry import energy_reasons
from lem.record import Energy, Gpu, Idle


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


@pytest.mark.parametrize("energy", ["auto", "none"])
def test_every_field_of_energy_has_a_reason(energy: str) -> None:
    reasons = energy_reasons(config(measurement={"energy": energy}))
    fields = {item.name for section in (Energy, Idle, Gpu) for item in dataclasses.fields(section)}
    assert set(reasons) == fields - {"uuid", "name", "null_reasons"}
    assert all(reasons.values())


def test_energy_that_was_not_wanted_says_so() -> None:
    assert "measurement.energy: none" in energy_reasons(config(measurement={"energy": "none"}))["gpu_energy_j"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"measurement": {"energy": "nvml"}}, "measurement.energy: nvml"),
        ({"measurement": {"energy": "rapl"}}, "measurement.energy: rapl"),
        ({"measurement": {"energy": "tdp_estimate"}}, "measurement.energy: tdp_estimate"),
        ({"measurement": {"phases": True}}, "measurement.phases: true"),
        ({"measurement": {"external_csv": "a.csv"}}, "measurement.external_csv: a.csv"),
        ({"baseline": {"required": True}}, "baseline.required: true"),
    ],
)
def test_an_option_that_demands_energy_is_refused_for_good(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionRefused) as caught:
        energy_reasons(config(**options))
    assert named in caught.value.message
    assert caught.value.kind == "meter"
    assert caught.value.is_permanent


def test_all_refused_options_are_named_at_once() -> None:
    with pytest.raises(OptionRefused, match=r"nvml.*phases"):
        energy_reasons(config(measurement={"energy": "nvml", "phases": True}))
