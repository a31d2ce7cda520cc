"""Energy sources, scopes and clock events: texts that are on disk, and what each of them is."""

import json

import pytest

from lem.base.measurement import (
    ENERGY_COUNTED,
    POWER_CAP_BIT,
    SLOWDOWN_BITS,
    SLOWDOWN_MASK,
    THERMAL_BITS,
    EnergyScope,
    EnergySource,
    is_cpu_source,
    is_estimate,
    is_gpu_source,
    is_integrated_power,
)

KINDS = (is_gpu_source, is_integrated_power, is_cpu_source, is_estimate)


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("nvml_counter", {is_gpu_source}),
        ("power_instant_integral", {is_gpu_source, is_integrated_power}),
        ("power_average_integral", {is_gpu_source, is_integrated_power}),
        ("rapl", {is_cpu_source}),
        ("tdp_estimate", {is_cpu_source, is_estimate}),
        ("external_csv", set()),
        ("power_of_a_later_version", set()),
        (None, set()),
    ],
)
def test_what_a_source_is_follows_from_its_name_alone(source: str | None, kinds: set[object]) -> None:
    assert {kind for kind in KINDS if kind(source)} == kinds


def test_the_energy_of_a_machine_is_not_said_to_be_by_an_external_meter() -> None:
    """A sensor of hwmon has this scope, too."""
    assert ENERGY_COUNTED.keys() == set(EnergyScope)
    assert "external" not in ENERGY_COUNTED[EnergyScope.MACHINE]


@pytest.mark.parametrize("member", [*EnergySource, *EnergyScope])
def test_a_name_is_its_plain_text_wherever_it_is_written(member: EnergySource | EnergyScope) -> None:
    assert (f"{member}", str(member), json.dumps({member: member})) == (
        member.value,
        member.value,
        f'{{"{member.value}": "{member.value}"}}',
    )


def test_the_masks_are_those_of_the_bits() -> None:
    assert sum(SLOWDOWN_BITS) == SLOWDOWN_MASK
    assert {bit for bit, text in SLOWDOWN_BITS.items() if "thermal" in text} == {
        bit for bit in SLOWDOWN_BITS if bit & THERMAL_BITS
    }
    assert not POWER_CAP_BIT & SLOWDOWN_MASK
