"""What can be measured here: how fine a counter is, and the words for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.meters.sources import Capabilities, GpuCapability, find_capabilities
from tests.doubles.powercap import Powercap
from tests.unit.meters.nvml_stand_in import FakeClock, FakeNvml

COUNTER, POWER = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"
INSTANT = {(186, 0): (1, 100_000.0)}
NS_PER_S = 1_000_000_000


def counting(clock: FakeClock, periods_s: dict[str, float]) -> FakeNvml:
    """GPUs whose counters are brought up to date so often."""
    nvml = FakeNvml(uuids=tuple(periods_s), fields=INSTANT)
    nvml.answers[COUNTER] = lambda uuid: clock.now_ns // round(periods_s[uuid] * NS_PER_S)
    return nvml


def find(nvml: FakeNvml | str, clock: FakeClock | None = None, probe_s: float = 0.0, enough: int = 6) -> Capabilities:
    return find_capabilities(nvml, clock or FakeClock(), probe_s=probe_s, enough=enough, rapl_root=Path("/nowhere"))


def only(found: Capabilities) -> GpuCapability:
    (gpu,) = found.gpus
    return gpu


@pytest.mark.parametrize("period_s", [0.02, 0.1, 0.5])
def test_the_update_period_is_that_of_the_counter(period_s: float) -> None:
    clock = FakeClock()
    gpu = only(find(counting(clock, {"GPU-a": period_s}), clock, probe_s=2.5))
    assert gpu.counter_update_period_s == pytest.approx(period_s, rel=0.11)
    assert gpu.describe()[0] == f"energy counter, updated every {(gpu.counter_update_period_s or 0) * 1e3:.0f} ms"


def test_looking_ends_when_enough_was_seen_of_every_counter() -> None:
    clock = FakeClock(now_ns=0)
    find(counting(clock, {"GPU-a": 0.02, "GPU-b": 0.1}), clock, probe_s=60.0, enough=10)
    assert 1.0 <= clock.now_ns / NS_PER_S < 1.2


def test_a_counter_that_stands_still_is_told_and_not_waited_for_without_end() -> None:
    clock = FakeClock(now_ns=0)
    nvml = counting(clock, {"GPU-a": 0.1, "GPU-b": 1000.0})
    first, second = find(nvml, clock, probe_s=3.0).gpus
    assert first.counter_update_period_s == pytest.approx(0.1, rel=0.05)
    assert second.counter_update_period_s is None
    assert second.describe()[0] == "energy counter; it changed fewer than three times in 3.0 s"
    assert clock.now_ns < 3.1 * NS_PER_S


def test_without_a_probe_nobody_waits() -> None:
    clock = FakeClock()
    before_ns = clock.now_ns
    gpu = only(find(counting(clock, {"GPU-a": 0.1}), clock))
    assert clock.now_ns == before_ns
    assert (gpu.counter_update_period_s, gpu.probe_error, gpu.source) == (None, None, "nvml_counter")
    assert gpu.describe() == ("energy counter", "power: instantaneous, limit 700 W")


@pytest.mark.parametrize(
    ("nvml", "source", "words"),
    [
        (FakeNvml(fields=INSTANT, failures={COUNTER: 3}), "power_instant_integral", "power is integrated instead"),
        (FakeNvml(failures={COUNTER: 4}), "power_average_integral", "run lem as root"),
        (FakeNvml(failures={COUNTER: 3, POWER: 3}), None, "does not support it"),
        (FakeNvml(answers={"nvmlDeviceGetMigMode": [1, 1]}), None, "whole board"),
    ],
)
def test_what_stands_in_for_a_counter_is_named(nvml: FakeNvml, source: str | None, words: str) -> None:
    gpu = only(find(nvml, probe_s=1.0))
    assert gpu.source == source
    assert words in " ".join(gpu.describe())
    assert gpu.counter_update_period_s is None
    assert gpu.probe_error is None


def test_a_module_and_lacking_persistence_are_told() -> None:
    module = {(186, 1): (1, 400_000.0), (191, 1): (3, 5.0)}
    nvml = FakeNvml(failures={COUNTER: 3, POWER: 3}, fields=module, answers={"nvmlDeviceGetPersistenceMode": 0})
    lines = only(find(nvml)).describe()
    assert any("CPU included" in line for line in lines)
    assert any("nvidia-smi -pm 1" in line for line in lines)


def test_a_gpu_that_does_not_answer_is_listed_in_its_place() -> None:
    found = find(FakeNvml(uuids=("GPU-a", "GPU-b", "GPU-c"), lost={"GPU-b": 15}))
    assert [(gpu.meter.index, gpu.source) for gpu in found.gpus] == [
        (0, "nvml_counter"),
        (1, None),
        (2, "nvml_counter"),
    ]
    assert "dmesg" in found.gpus[1].describe()[0]


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [("Driver Not Loaded", "NVML is not available: Driver Not Loaded"), (FakeNvml(uuids=()), "no GPU")],
)
def test_why_there_is_no_gpu_is_told(nvml: FakeNvml | str, reason: str) -> None:
    found = find(nvml)
    assert found.gpus == ()
    assert reason in (found.gpu_error or "")


def test_the_cpu_is_looked_at_without_a_gpu(tmp_path: Path) -> None:
    tree = Powercap.server(tmp_path)
    tree.make(0)
    tree.take_away(["intel-rapl:2"])
    cpu = find_capabilities("no driver", FakeClock(), rapl_root=tmp_path).cpu
    assert cpu.zones[:2] == ("package-0", "package-0/core")
    assert cpu.missing == ("psys: No such file or directory",)
    assert (cpu.rapl_error, cpu.tdp_w) == (None, 410.0)


def test_the_document_has_a_source_for_each_gpu() -> None:
    document = find(FakeNvml()).to_dict()
    assert document["gpu_error"] is None
    (gpu,) = document["gpus"]
    assert (gpu["uuid"], gpu["energy_source"], gpu["counter_update_period_s"]) == ("GPU-a", "nvml_counter", None)
    assert document["cpu"]["rapl_error"]
