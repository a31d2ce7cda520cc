from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lem.base.errors import MeterRefused
from lem.base.measurement import EnergySource
from lem.meters.samples import GpuHeader, RaplZone, SampleHeader
from lem.meters.sources import choose_sources
from tests.scripted_attempt import config

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
        {"external": "measurement.external_csv is not given"},
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
    assert "GPU-1: Unknown Error" in sources.reasons["gpu"]


def test_another_gpu_of_the_host_that_cannot_be_read_does_not_matter() -> None:
    assert choose(header(gpu(0), gpu(1, counter_error="lost")), "GPU-0").gpu_method == COUNTER


def test_a_gpu_that_the_sampler_does_not_see_is_named() -> None:
    sources = choose(header(gpu(0), gpu_error="nvml: no permission"), "GPU-9")
    assert sources.missing_uuids == ("GPU-9",)
    assert sources.reasons["gpu"] == "GPU-9 cannot be read: nvml: no permission"


def test_a_mig_instance_has_no_energy_since_the_counter_is_the_boards() -> None:
    sources = choose(header(gpu(mig_mode=True)), "GPU-0")
    assert sources.gpu_method is None
    assert "MIG" in sources.reasons["gpu"]


def test_a_mig_instance_that_cuda_calls_by_its_own_name_is_known_by_the_board_that_is_cut() -> None:
    sources = choose(header(gpu(mig_mode=True)), "GPU-77")
    assert "GPU-77 is not a GPU" in sources.reasons["gpu"]
    assert "MIG" in sources.reasons["gpu"]


def test_a_foreign_process_leaves_no_energy() -> None:
    sources = choose(header(gpu()), "GPU-0", foreign={"GPU-0": (4711,), "GPU-1": (1,)})
    assert sources.primary is None
    assert "process 4711" in sources.reasons["gpu"]
    assert choose(header(gpu()), "GPU-0", foreign={"GPU-1": (1,)}).primary == COUNTER


def test_the_scope_of_a_module_is_told() -> None:
    assert choose(header(gpu(energy_scope="module")), "GPU-0").scope == "module"


def test_on_a_cpu_rapl_counts() -> None:
    sources = choose(header(zones=(PACKAGE, CORE)))
    assert (sources.primary, sources.scope) == (RAPL, "cpu_package")
    assert sources.reasons["gpu"] == "the experiment runs on the CPU"
    assert "memory" in sources.reasons["dram"]


def test_a_cpu_without_rapl_has_no_energy_and_the_remedy_is_the_reason() -> None:
    sources = choose(header())
    assert sources.primary is None
    assert {sources.reasons[name] for name in ("cpu", "dram", "primary")} == {NO_RIGHTS}


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
    assert all("measurement.energy: none" in sources.reasons[name] for name in ("gpu", "cpu", "dram", "primary"))


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
