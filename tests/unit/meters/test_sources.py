from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import MeterRefused
from lem.base.measurement import EnergySource
from lem.base.reasons import Reason
from lem.meters.attempt import choose_sources
from lem.meters.capabilities import Capabilities, GpuCapability, find_capabilities
from lem.meters.samples import GpuHeader, RaplZone, SampleHeader
from tests.doubles.powercap import Powercap
from tests.scripted_attempt import config
from tests.unit.meters.nvml_stand_in import FakeClock, FakeNvml

NO_RIGHTS = "root alone may read it: sudo chmod a+r /sys/class/powercap/*/energy_uj"
COUNTER, INSTANT_POWER, AVERAGE_POWER, RAPL, TDP_ESTIMATE, EXTERNAL = EnergySource
PACKAGE, DRAM, CORE = RaplZone("package-0", "package", 10**9), RaplZone("dram", "dram", 10**9), RaplZone("c", "core", 9)


def gpu(place: int = 0, **changes: Any) -> GpuHeader:
    known = GpuHeader(place, f"GPU-{place}", "H200", "580", power_limit_w=700.0, mig_mode=False, power_source="instant")
    return dataclasses.replace(known, **changes)


def header(*gpus: GpuHeader, zones: tuple[RaplZone, ...] = (), **changes: Any) -> SampleHeader:
    errors = {"rapl_error": None if zones else NO_RIGHTS, "gpu_error": None if gpus else "no driver", **changes}
    return SampleHeader(0, "2026-07-14T10:00:00Z", "lab1", 100, gpus, zones=zones, **errors)


def choose(found: SampleHeader, *uuids: str, foreign: Any = None, **options: Any) -> Any:
    return choose_sources(config(**options), found, uuids, is_cpu=not uuids, foreign=foreign)


def test_the_counter_comes_first() -> None:
    sources = choose(header(gpu(), zones=(PACKAGE, DRAM)), "GPU-0")
    assert (sources.gpu_method, sources.primary, sources.scope) == (COUNTER, COUNTER, "gpu")
    assert (sources.cpu_method, sources.reasons) == (
        RAPL,
        {"external": Reason.of("option_not_given", option="measurement.external_csv")},
    )


@pytest.mark.parametrize(
    ("power_source", "method"),
    [("instant", INSTANT_POWER), ("average", AVERAGE_POWER), (None, None)],
)
def test_integrated_power_is_the_named_fallback(power_source: str | None, method: str | None) -> None:
    sources = choose(header(gpu(counter_error="Not Supported", power_source=power_source)), "GPU-0")
    assert (sources.gpu_method, sources.primary) == (method, method)
    assert (sources.reasons.get("gpu") is None) == (method is not None)


def test_every_gpu_is_read_in_the_same_way() -> None:
    sources = choose(header(gpu(0), gpu(1, counter_error="Not Supported")), "GPU-1", "GPU-0")
    assert (sources.gpu_method, sources.gpus) == (INSTANT_POWER, (1, 0))


def test_one_gpu_that_cannot_be_read_leaves_all_without_energy() -> None:
    deaf = gpu(1, counter_error="Unknown Error", power_error="Unknown Error", power_source=None)
    sources = choose(header(gpu(0), deaf), "GPU-0", "GPU-1")
    assert sources.gpu_method is None
    assert sources.reasons["gpu"] == sources.reasons["primary"]
    assert "GPU-1: Unknown Error" in sources.reasons["gpu"].text


def test_another_gpu_of_the_host_that_cannot_be_read_does_not_matter() -> None:
    assert choose(header(gpu(0), gpu(1, counter_error="lost")), "GPU-0").gpu_method == COUNTER


def test_a_gpu_that_the_sampler_does_not_see_is_named() -> None:
    sources = choose(header(gpu(0), gpu_error="nvml: no permission"), "GPU-9")
    assert sources.missing_uuids == ("GPU-9",)
    assert sources.reasons["gpu"] == Reason.of("meter_unreadable", what="GPU-9", error="nvml: no permission")


def test_a_mig_instance_has_no_energy_since_the_counter_is_the_boards() -> None:
    sources = choose(header(gpu(mig_mode=True)), "GPU-0")
    assert sources.gpu_method is None
    assert sources.reasons["gpu"].code == "mig_board"


def test_a_mig_instance_that_cuda_calls_by_its_own_name_is_known_by_the_board_that_is_cut() -> None:
    sources = choose(header(gpu(mig_mode=True)), "GPU-77")
    assert (sources.reasons["gpu"].code, sources.reasons["gpu"].data["missing"]) == ("mig_instance", "GPU-77")


def test_a_foreign_process_leaves_no_energy() -> None:
    sources = choose(header(gpu()), "GPU-0", foreign={"GPU-0": (4711,), "GPU-1": (1,)})
    assert sources.primary is None
    assert sources.reasons["gpu"].data["pids"] == "4711"
    assert choose(header(gpu()), "GPU-0", foreign={"GPU-1": (1,)}).primary == COUNTER


def test_the_scope_of_a_module_is_told() -> None:
    assert choose(header(gpu(energy_scope="module")), "GPU-0").scope == "module"


def test_on_a_cpu_rapl_counts() -> None:
    sources = choose(header(zones=(PACKAGE, CORE)))
    assert (sources.primary, sources.scope) == (RAPL, "cpu_package")
    assert (sources.reasons["gpu"].code, sources.reasons["dram"].code) == ("on_cpu", "no_dram")


def test_a_cpu_without_rapl_has_no_energy_and_the_remedy_is_the_reason() -> None:
    sources = choose(header())
    assert sources.primary is None
    assert {sources.reasons[name] for name in ("cpu", "dram", "primary")} == {
        Reason.of("sampler_reports", error=NO_RIGHTS)
    }


def test_rapl_never_stands_for_a_gpu_that_cannot_be_read() -> None:
    deaf = gpu(counter_error="Not Supported", power_error="Not Supported", power_source=None)
    sources = choose(header(deaf, zones=(PACKAGE,)), "GPU-0")
    assert (sources.cpu_method, sources.primary) == (RAPL, None)


def test_the_estimate_is_made_only_when_asked_for() -> None:
    found = header(cpu_tdp_w=205.0)
    assert choose(found).primary is None
    sources = choose(found, measurement={"energy": "tdp_estimate"})
    assert (sources.primary, sources.cpu_tdp_w) == (TDP_ESTIMATE, 205.0)
    given = choose(found, measurement={"energy": "tdp_estimate", "cpu_tdp_w": 280})
    assert given.cpu_tdp_w == 280.0


def test_the_users_own_meter_counts_only_where_nothing_else_does() -> None:
    own = {"external_csv": "plug.csv"}
    assert choose(header(), measurement=own).primary == EXTERNAL
    assert choose(header(), measurement=own).scope == "machine"
    beside = choose(header(gpu()), "GPU-0", measurement=own)
    assert (beside.primary, beside.is_external) == (COUNTER, True)


def test_energy_that_is_not_wanted_is_not_measured() -> None:
    sources = choose(header(gpu(), zones=(PACKAGE,)), "GPU-0", measurement={"energy": "none"})
    assert (sources.gpu_method, sources.cpu_method, sources.primary) == (None, None, None)
    assert {sources.reasons[name].code for name in ("gpu", "cpu", "dram", "primary")} == {"energy_off"}


DEAF = gpu(counter_error="No Permission", power_error="No Permission", power_source=None)


@pytest.mark.parametrize(
    ("found", "uuids", "options", "said"),
    [
        (header(zones=(PACKAGE,)), (), {"energy": "nvml"}, "nvml: the experiment runs on the CPU"),
        (header(DEAF), ("GPU-0",), {"energy": "nvml"}, "No Permission"),
        (header(gpu(counter_error="Not Supported")), ("GPU-0",), {"energy": "nvml"}, "Not Supported"),
        (header(gpu(mig_mode=True)), ("GPU-0",), {"energy": "nvml"}, "MIG"),
        (header(gpu()), ("GPU-0",), {"energy": "rapl"}, NO_RIGHTS),
        (header(), (), {"energy": "rapl"}, NO_RIGHTS),
        (header(), (), {"energy": "tdp_estimate"}, "design power of this CPU is unknown"),
        (header(), (), {"phases": True}, NO_RIGHTS),
        (header(), (), {"phases": True, "external_csv": "plug.csv"}, "only measurement.external_csv"),
    ],
)
def test_a_demand_that_cannot_be_met_is_refused_for_good(
    found: SampleHeader, uuids: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(MeterRefused) as caught:
        choose(found, *uuids, measurement=options)
    assert said in caught.value.message
    assert (caught.value.kind, caught.value.is_permanent) == ("meter", True)
    assert caught.value.hint


def test_a_foreign_process_is_refused_where_energy_was_demanded() -> None:
    with pytest.raises(MeterRefused, match="process 4711"):
        choose(header(gpu()), "GPU-0", foreign={"GPU-0": (4711,)}, measurement={"energy": "nvml"})


def test_a_baseline_that_nothing_can_measure_is_refused() -> None:
    with pytest.raises(MeterRefused, match=r"baseline\.required: true"):
        choose(header(), baseline={"required": True})
    assert choose(header(gpu()), "GPU-0", baseline={"required": True}).primary == COUNTER


def test_guards_outlast_the_lag_of_a_power_sensor() -> None:
    deaf: dict[str, Any] = {"counter_error": "Not Supported"}
    assert choose(header(gpu()), "GPU-0").least_guard_s == 0.0
    assert choose(header(gpu(**deaf)), "GPU-0").least_guard_s == pytest.approx(0.4)
    assert choose(header(gpu(**deaf, power_source="average")), "GPU-0").least_guard_s == pytest.approx(1.3)


COUNT, USAGE = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"
INSTANT = {(186, 0): (1, 100_000.0)}
NS_PER_S = 1_000_000_000


def counting(clock: FakeClock, periods_s: dict[str, float]) -> FakeNvml:
    """GPUs whose counters are brought up to date so often."""
    nvml = FakeNvml(uuids=tuple(periods_s), fields=INSTANT)
    nvml.answers[COUNT] = lambda uuid: clock.now_ns // round(periods_s[uuid] * NS_PER_S)
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
        (FakeNvml(fields=INSTANT, failures={COUNT: 3}), "power_instant_integral", "power is integrated instead"),
        (FakeNvml(failures={COUNT: 4}), "power_average_integral", "run lem as root"),
        (FakeNvml(failures={COUNT: 3, USAGE: 3}), None, "does not support it"),
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
    nvml = FakeNvml(failures={COUNT: 3, USAGE: 3}, fields=module, answers={"nvmlDeviceGetPersistenceMode": 0})
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
