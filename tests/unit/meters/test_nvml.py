"""One GPU's meters: units, fallbacks, why something cannot be read; and which GPUs an engine sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lem.meters.machine import GpuFacts, visible_gpus
from lem.meters.nvml import MeterFailure, NvmlMeter, gpu_uuids
from tests.unit.meters.nvml_stand_in import FakeNvml

UNSIGNED_INT, UNSIGNED_LONG_LONG = 1, 3
INSTANT = {(186, 0): (UNSIGNED_INT, 123_456)}
MODULE = {(186, 1): (UNSIGNED_INT, 400_000), (191, 1): (UNSIGNED_LONG_LONG, 5_000_000_000)}
COUNTER, AVERAGE = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"


def test_every_quantity_is_in_si_units() -> None:
    meter = NvmlMeter(FakeNvml(fields=INSTANT), "GPU-a")
    expected = {
        "power": 123.456,
        "temperature": 41.0,
        "sm_clock": 1.98e9,
        "utilisation": 0.37,
        "memory": 2_000,
        "events": 0x4,
    }
    assert {quantity: meter.read(quantity) for quantity in expected} == expected
    assert meter.read("counter") == 1_000


def test_the_header_says_what_does_not_change() -> None:
    answers = {"nvmlDeviceGetName": b"Tesla", "nvmlDeviceGetVbiosVersion": b"96.00"}  # bytes in an older pynvml
    header = NvmlMeter(FakeNvml(uuids=("GPU-b", "GPU-a"), fields=INSTANT, answers=answers), "GPU-a").header
    assert (header.index, header.uuid, header.name, header.driver) == (1, "GPU-a", "Tesla", "580.65.06")
    assert (header.vbios, header.power_limit_w) == ("96.00", 700.0)
    assert (header.persistence_mode, header.mig_mode) == (True, False)
    assert (header.energy_scope, header.power_source) == ("gpu", "instant")
    assert (header.counter_error, header.power_error) == (None, None)


def test_the_enforced_limit_is_asked_for_before_the_management_limit() -> None:
    answers = {"nvmlDeviceGetPowerManagementLimit": 650_000}
    assert NvmlMeter(FakeNvml(answers=answers), "GPU-a").header.power_limit_w == 700.0
    failures = {"nvmlDeviceGetEnforcedPowerLimit": 13}
    assert NvmlMeter(FakeNvml(answers=answers, failures=failures), "GPU-a").header.power_limit_w == 650.0
    failures["nvmlDeviceGetPowerManagementLimit"] = 3
    assert NvmlMeter(FakeNvml(failures=failures), "GPU-a").header.power_limit_w is None


class OldNvml(FakeNvml):
    """A pynvml from before energy counters."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == COUNTER:
            raise AttributeError(name)
        return super().__getattr__(name)


def test_a_pynvml_without_a_function_is_named_with_its_remedy() -> None:
    error = NvmlMeter(OldNvml(), "GPU-a").header.counter_error
    assert error is not None
    assert f"this pynvml has no {COUNTER}: update nvidia-ml-py" in str(error)


@pytest.mark.parametrize(
    ("quantity", "newer", "older", "value"),
    [
        ("temperature", "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", 55),
        ("events", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons", 0x48),
    ],
)
def test_a_deprecated_function_is_called_only_where_the_new_one_is_absent(
    quantity: str, newer: str, older: str, value: int
) -> None:
    nvml = FakeNvml(answers={older: value})
    NvmlMeter(nvml, "GPU-a").read(quantity)
    assert older not in nvml.calls
    nvml.failures[newer] = 13
    meter = NvmlMeter(nvml, "GPU-a")
    assert (meter.read(quantity), meter.read(quantity)) == (value, value)
    assert nvml.calls[-1] == nvml.calls[-2] == older  # the new one is not tried again
    nvml.failures[newer] = 999
    with pytest.raises(MeterFailure, match="Unknown"):
        NvmlMeter(nvml, "GPU-a").read(quantity)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "does not support it"),
        (4, "run lem as root"),
        (13, "update the driver"),
        (15, "dmesg"),
        (999, "Unknown Error"),
    ],
)
def test_why_there_is_no_counter_is_told_with_what_to_do(code: int, words: str) -> None:
    meter = NvmlMeter(FakeNvml(failures={COUNTER: code}), "GPU-a")
    assert words in (meter.header.counter_error or "")
    assert not meter.has("counter")
    assert (meter.header.power_source, meter.read("power")) == ("average", 90.0)
    with pytest.raises(MeterFailure, match="the energy counter"):
        meter.read("counter")


def test_without_power_the_counter_counts_all_the_same() -> None:
    meter = NvmlMeter(FakeNvml(failures={AVERAGE: 3}), "GPU-a")
    assert "does not support it" in (meter.header.power_error or "")
    assert (meter.header.power_source, meter.has("counter")) == (None, True)
    with pytest.raises(MeterFailure) as caught:
        meter.read("power")
    assert caught.value.is_lasting


@pytest.mark.parametrize("uuid", ["GPU-a", "MIG-1"])
def test_a_gpu_under_mig_has_no_meter_of_its_own(uuid: str) -> None:
    header = NvmlMeter(FakeNvml(uuids=(uuid,), answers={"nvmlDeviceGetMigMode": [1, 1]}), uuid).header
    assert header.mig_mode is True
    for error in (header.counter_error, header.power_error):
        assert "whole board" in (error or "")
        assert "-mig 0" in (error or "")
    assert header.power_source is None


@pytest.mark.parametrize(("code", "mode"), [(3, False), (13, False), (999, None)])
def test_a_gpu_without_mig_is_not_under_mig(code: int, mode: bool | None) -> None:
    assert NvmlMeter(FakeNvml(failures={"nvmlDeviceGetMigMode": code}), "GPU-a").header.mig_mode is mode


def test_a_virtual_gpu_is_told_as_such() -> None:
    nvml = FakeNvml(failures={COUNTER: 3, AVERAGE: 3}, answers={"nvmlDeviceGetVirtualizationMode": 2})
    header = NvmlMeter(nvml, "GPU-a").header
    assert "virtual GPU" in (header.counter_error or "")
    assert "virtual GPU" in (header.power_error or "")


def test_a_module_is_measured_where_the_driver_answers_for_nothing_else() -> None:
    meter = NvmlMeter(FakeNvml(failures={COUNTER: 3, AVERAGE: 3}, fields=MODULE), "GPU-a")
    assert (meter.header.energy_scope, meter.header.power_source) == ("module", "instant")
    assert (meter.header.counter_error, meter.header.power_error) == (None, None)
    assert (meter.read("counter"), meter.read("power")) == (5_000_000_000, 400.0)


def test_counter_and_power_are_never_of_different_scopes() -> None:
    meter = NvmlMeter(FakeNvml(failures={COUNTER: 3}, fields=MODULE | INSTANT), "GPU-a")
    assert (meter.header.energy_scope, meter.read("power"), meter.has("counter")) == ("gpu", 123.456, False)
    assert "module of GPU and CPU" in (meter.header.counter_error or "")


def test_a_shortened_uuid_is_understood_while_it_is_unique() -> None:
    nvml = FakeNvml(uuids=("GPU-abc", "GPU-abd"))
    assert NvmlMeter(nvml, "GPU-abd").header.uuid == "GPU-abd"
    assert NvmlMeter(FakeNvml(uuids=("GPU-abc", "GPU-xyz")), "GPU-a").header.uuid == "GPU-abc"
    assert not NvmlMeter(nvml, "GPU-ab").is_known


def test_one_gpu_that_is_lost_hides_no_other() -> None:
    assert gpu_uuids(FakeNvml(uuids=("GPU-a", "GPU-b"), lost={"GPU-a": 15})) == (None, "GPU-b")
    assert gpu_uuids(FakeNvml(failures={"nvmlDeviceGetCount": 999})) == ()


PRESENT = tuple(GpuFacts(index, f"GPU-{letter * 4}", "card", 2**34, (9, 0)) for index, letter in enumerate("abc"))


@pytest.mark.parametrize(
    ("value", "letters"),
    [
        (None, "abc"),
        ("0,1,2", "abc"),
        ("2", "c"),
        ("2,0", "ca"),
        (" 1 , 0 ", "ba"),
        ("GPU-bb", "b"),
        ("GPU-cccc,0", "ca"),
        ("", ""),
        ("-1", ""),
        ("0,7,1", "a"),  # as CUDA: what follows an entry that names no GPU is hidden too
        ("gpu-BB", "b"),
        ("GPU-,1", ""),  # stands for several
    ],
)
def test_an_index_counts_what_the_engine_sees(value: str | None, letters: str) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid for gpu in visible_gpus(PRESENT, environ)] == [f"GPU-{letter * 4}" for letter in letters]
