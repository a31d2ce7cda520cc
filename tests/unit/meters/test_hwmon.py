"""GPUs of AMD and Intel, and sensors of modules, CPUs and machines, on trees like /sys."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import MeterRefused
from lem.base.measurement import EnergySource
from lem.base.process import read_small
from lem.cli.report import trace_of
from lem.config.experiment import ExperimentConfig
from lem.engines.common import visible_gpus
from lem.meters.capabilities import Capabilities, CpuCapability, find_capabilities
from lem.meters.curve import NotMeasured, Span, counter_curve
from lem.meters.hwmon import HwmonMeter, hwmon_gpus, metered_gpus
from lem.meters.machine import GpuFacts, named_gpus
from lem.meters.nvml import MeterFailure
from lem.meters.recompute import RawData, recompute
from lem.meters.samples import FINISHED_FILENAME, CounterChange, GpuHeader, SampleHeader, read_finished
from lem.meters.sensors import find_sensors
from lem.meters.sources import choose_sources
from lem.meters.usage import Roots
from lem.orchestration.doctor import check_gpu_energy, check_sensors
from lem.record import decode_record, encode_record
from lem.results.detail import render_record
from tests.bench.truth import HWMON
from tests.doubles.hwmon import Device, HwmonTree, acpi, amd, intel, jetson, metrics, overwrite, second_die, thor
from tests.doubles.nvml.library import SCRIPT_VARIABLE
from tests.scripted_attempt import config
from tests.truth_rig import OPTIONS, play
from tests.unit.meters.nvml_stand_in import FakeClock

S = 1_000_000_000
NVIDIA = GpuFacts(0, "GPU-0", "H200", None, (9, 0))
FIRST, SECOND = "0000:03:00.0", "0000:06:00.0"


def tree(folder: Path, *devices: Device, is_jetson: bool = False, power_w: float = 100.0) -> Path:
    HwmonTree(folder / "sys", devices, is_jetson).make(0, lambda _: power_w)
    return folder / "sys"


def look(sys: Path, address: str = FIRST) -> GpuHeader:
    return HwmonMeter(sys, address).header


@pytest.mark.parametrize("version", [(1, 2), (1, 3), (1, 4), (1, 5)])
def test_the_energy_of_amdgpu_is_where_its_layout_has_it(tmp_path: Path, version: tuple[int, int]) -> None:
    meter = HwmonMeter(tree(tmp_path, amd(version=version, begins=65536 * 1234)), FIRST)
    assert meter.read("counter") == 1_234_000  # mJ
    assert meter.read("power") == 100.0
    assert (meter.header.counter_sensor, meter.header.power_sensor) == (
        "amdgpu gpu_metrics energy_accumulator",
        "amdgpu power1_average",
    )
    assert (meter.header.energy_scope, meter.header.power_limit_w) == ("gpu", 500.0)
    assert (meter.read("temperature"), meter.read("sm_clock"), meter.read("memory")) == (55.0, 1.7e9, 1 << 30)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (metrics((1, 1), 5), "v1.1 is not a layout"),
        (metrics((1, 6), 5), "v1.6 is not a layout"),
        (metrics((2, 3), 5), "v2.3, that of an APU, has no energy"),
        (metrics((1, 3), 0), "reports no energy"),
        (metrics((1, 3), 2**64 - 1), "reports no energy"),
        (metrics((1, 3), 2**32 - 1), "reports no energy"),  # UINT_MAX of the drivers of Radeon GPUs
        (metrics((1, 5), 5)[:64], "not understood"),
        (b"", "not understood"),
        (b"\x10\x00\x01\x03" + bytes(40), "not understood: v1.3 with 16 bytes"),
    ],
)
def test_an_unknown_layout_is_no_counter_and_power_is_integrated(tmp_path: Path, table: bytes, why: str) -> None:
    header = look(tree(tmp_path, amd().having(**{"device/gpu_metrics": table})))
    assert header.counter_error is not None
    assert why in header.counter_error
    assert header.power_error is None
    assert choose(header).gpu_method == EnergySource.HWMON_POWER


def choose(*gpus: GpuHeader, sensors: tuple[GpuHeader, ...] = (), uuids: Any = None, **options: Any) -> Any:
    header = SampleHeader(0, "", "", 100, gpus, sensors=sensors)
    return choose_sources(config(measurement=options), header, [gpu.uuid for gpu in gpus] if uuids is None else uuids)


def test_an_mi300a_is_the_gpu_to_use_and_its_energy_is_that_of_the_socket(tmp_path: Path) -> None:
    sys = tree(tmp_path, amd(device="0x74a0", version=(1, 5)))
    header = look(sys)
    assert (header.counter_error, header.energy_scope) == (None, "module")
    assert choose(header).scope == "module"
    assert named_gpus(None, metered_gpus({}, sys, ()))[0].uuid == FIRST


def test_of_two_chiplets_the_second_reports_nothing_and_counts_once(tmp_path: Path) -> None:
    sys = tree(tmp_path, amd(device="0x740c"), second_die(SECOND), amd("0000:83:00.0", device="0x740c"))
    first, second, other = (look(sys, address) for address in (FIRST, SECOND, "0000:83:00.0"))
    assert (first.energy_scope, first.covered_by, other.covered_by) == ("card", None, None)
    assert (second.covered_by, "second chiplet" in str(second.counter_error)) == (FIRST, True)
    both = choose(first, second)
    assert (both.gpus, both.gpu_method, both.scope) == ((0,), EnergySource.HWMON_COUNTER, "card")
    alone = choose(first, second, uuids=[SECOND])
    assert (alone.gpu_method, alone.primary, alone.reasons["gpu"].code) == (None, None, "gpu_unreadable")


@pytest.mark.parametrize("power", ["power1_average", "power1_input"])
def test_no_power_is_no_reading(tmp_path: Path, power: str) -> None:
    header = look(tree(tmp_path, amd(power="").having(**{power: "0\n"})))
    assert header.power_error == f"{power} reports 0 W, and a GPU always draws some"


def test_a_file_that_others_may_not_read_names_the_remedy() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # unlike pytest's own folders
        sys = tree(Path(folder), amd())
        for path in (*sys.rglob("power1_average"), *sys.rglob("gpu_metrics")):
            path.chmod(0)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            header = pool.submit(look_as_nobody, sys).result()
    for error in (header.counter_error, header.power_error):
        assert "this user may not read it" in str(error)
        assert "chmod a+r" in str(error)


def look_as_nobody(sys: Path) -> GpuHeader:
    if not os.geteuid():
        os.setuid(65534)
    return look(sys)


def test_a_gpu_is_found_again_under_another_number(tmp_path: Path) -> None:
    sys = tree(tmp_path, amd())
    meter = HwmonMeter(sys, FIRST.upper())
    link = sys / "class/hwmon/hwmon0"
    folder = link.resolve()
    link.unlink()
    with pytest.raises(MeterFailure) as lost:
        meter.read("power")
    assert lost.value.is_lost
    with pytest.raises(MeterFailure):
        meter.renew()
    (sys / "class/hwmon/hwmon12").symlink_to(folder)
    meter.renew()
    assert meter.read("power") == 100.0


def test_what_is_no_number_fails_for_this_time(tmp_path: Path) -> None:
    sys = tree(tmp_path, amd())
    meter = HwmonMeter(sys, FIRST)
    overwrite(sys / "class/hwmon/hwmon0/power1_average", b"\n")
    with pytest.raises(MeterFailure) as failure:
        meter.read("power")
    assert (failure.value.is_lasting, failure.value.is_lost) == (False, False)


def test_a_part_of_a_gpu_is_not_a_gpu_and_the_card_comes_before_its_package(tmp_path: Path) -> None:
    labels = {"energy1_label": "pkg\n", "energy2_label": "card\n"}
    xe = intel(SECOND, driver="xe", files={"energy1_input": 1.0, "energy2_input": 1.0}).having(**labels)
    sys = tree(tmp_path, Device("i915_gt0", FIRST, intel().files), intel(FIRST), xe, Device("nvme", "0000:01:00.0"))
    assert [gpu.uuid for gpu in hwmon_gpus(0, sys)] == [FIRST, SECOND]
    assert [look(sys, it).counter_sensor for it in (FIRST, SECOND)] == ["i915 energy1_input", "xe energy2_input"]
    assert look(sys).power_error == "no power (power1_average or power1_input)"


@pytest.mark.parametrize(
    ("environ", "nvidia", "seen", "default"),
    [
        ({}, (), ["0000:0b:00.0", "0000:83:00.0", "0000:03:00.0"], 2),  # the APU comes last
        ({"HIP_VISIBLE_DEVICES": "1"}, (), ["0000:83:00.0"], 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, (), ["0000:0b:00.0", "0000:83:00.0"], 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, (), [], 0),
        ({}, (NVIDIA,), ["GPU-0", "0000:0b:00.0", "0000:83:00.0", "0000:03:00.0"], 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, (NVIDIA,), ["GPU-0", "0000:0b:00.0", "0000:83:00.0", "0000:03:00.0"], 1),
    ],
)
def test_gpus_are_those_that_a_program_sees(
    tmp_path: Path, environ: Mapping[str, str], nvidia: Any, seen: list[str], default: int
) -> None:
    sys = tree(tmp_path, amd("0000:03:00.0", version=(2, 3)), amd("0000:0b:00.0"), amd("0000:83:00.0"))
    found = metered_gpus(environ, sys, nvidia)
    assert [gpu.uuid for gpu in found] == seen
    assert [gpu.uuid for gpu in found if gpu.is_default] == seen[:default]
    assert [gpu.uuid for gpu in named_gpus(None, found)] == seen[: min(1, default)]
    assert [gpu.uuid for gpu in named_gpus(("0000:0B:00.0",), found)] == ["0000:0b:00.0"] * ("0000:0b:00.0" in seen)


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        ((jetson(),), [("ina3221 VDD_IN", "module", None, 0.2)]),
        ((jetson().having(update_interval="500\n"),), [("ina3221 VDD_IN", "module", 0.5, 1.0)]),
        ((jetson("VDD_CPU_CV"),), []),
        ((thor(),), [("ina238 hwmon0", "module", None, 0.2)]),
        ((acpi(),), [("power_meter power_meter.0", "machine", 1.0, 2.1)]),
        ((acpi(more={"device/power1_is_battery": "1\n"}),), []),
        (
            tuple(acpi(f"{name} Power Socket 1", interval_ms=50) for name in ("CPU", "Grace", "SysIO", "Module")),
            [
                ("power_meter Grace Power Socket 1", "cpu_package", 0.05, 1.15),
                ("power_meter Module Power Socket 1", "module", 0.05, 1.15),
            ],
        ),
        ((acpi("CPU Power Socket 0"),), [("power_meter CPU Power Socket 0", "cpu_package", 1.0, 2.1)]),
    ],
)
def test_a_sensor_says_what_it_covers_and_over_what_it_averages(tmp_path: Path, devices: Any, found: Any) -> None:
    headers = [meter.header for meter in find_sensors(tree(tmp_path, *devices, is_jetson=True))]
    facts = [(it.uuid, it.energy_scope, it.power_interval_s, pytest.approx(it.power_lag_s)) for it in headers]
    assert facts == found
    assert [it.power_error for it in headers] == [None] * len(found)


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ((acpi(interval_ms=60_000),), "it averages over 60 s, more than 10 s"),
        ((acpi(), acpi()), "there are 2 meters of the machine"),
        ((acpi(share=0.0),), "it reports 0 W"),
        ((acpi(more={"device/power1_average": "unknown\n"}),), "not understood"),
    ],
)
def test_a_sensor_that_cannot_be_trusted_says_why(tmp_path: Path, devices: Any, why: str) -> None:
    sensors = tuple(meter.header for meter in find_sensors(tree(tmp_path, *devices)))
    assert all(why in str(sensor.power_error) for sensor in sensors)
    sources = choose(sensors=sensors)
    assert sources.primary is None
    assert why in sources.reasons["primary"].text
    found = check_sensors(Capabilities(CpuCapability(), sensors=sensors))
    assert (found.status, why in found.message) == ("warning", True)


MACHINE = GpuHeader(None, "plug", "plug", "power_meter", energy_scope="machine", meter="hwmon", power_source="average")
NVML_GPU = GpuHeader(0, "GPU-0", "H200", "580", power_source="instant")
AMD_GPU = GpuHeader(1, FIRST, "MI210", "amdgpu", meter="hwmon", power_source="average")


@pytest.mark.parametrize(
    ("gpus", "sensors", "energy", "primary", "reason"),
    [
        ((AMD_GPU,), (MACHINE,), "auto", EnergySource.HWMON_COUNTER, None),
        ((AMD_GPU,), (), "hwmon", EnergySource.HWMON_COUNTER, None),
        ((NVML_GPU,), (MACHINE,), "hwmon", EnergySource.HWMON_SENSOR, ("gpu", "other_meter_set")),
        ((NVML_GPU,), (MACHINE,), "auto", EnergySource.COUNTER, None),
        ((NVML_GPU, AMD_GPU), (), "auto", None, ("gpu", "meters_mixed")),
        ((), (MACHINE,), "auto", EnergySource.HWMON_SENSOR, ("gpu", "on_cpu")),
        ((), (), "auto", None, ("sensor", "no_sensor")),
        ((), (MACHINE,), "none", None, ("sensor", "energy_off")),
    ],
)
def test_the_meter_is_that_of_the_gpus_then_a_sensor(
    gpus: Any, sensors: Any, energy: str, primary: EnergySource | None, reason: tuple[str, str] | None
) -> None:
    sources = choose(*gpus, sensors=sensors, energy=energy)
    assert sources.primary == primary
    if reason is not None:
        assert sources.reasons[reason[0]].code == reason[1]
    assert sources.sensors == ((len(gpus),) if primary == EnergySource.HWMON_SENSOR else ())


@pytest.mark.parametrize(
    ("gpus", "energy", "text"),
    [
        ((AMD_GPU,), "nvml", f"measurement.energy: nvml: NVML does not see {FIRST}"),
        ((NVML_GPU,), "hwmon", "measurement.energy: hwmon: another meter is set (measurement.energy: hwmon); no hwmon"),
        ((), "hwmon", "measurement.energy: hwmon: the experiment runs on the CPU; no hwmon sensor"),
    ],
)
def test_a_meter_that_is_asked_for_and_missing_is_refused(gpus: Any, energy: str, text: str) -> None:
    with pytest.raises(MeterRefused, match="^" + text.replace("(", r"\(").replace(")", r"\)")):
        choose(*gpus, energy=energy)


def changes(*readings: tuple[float, int]) -> list[CounterChange]:
    """By seconds and mJ; each was polled 20 ms before."""
    return [CounterChange(0, round((at - 0.02) * S), round(at * S), energy_mj) for at, energy_mj in readings]


RANGES_J = (2**32 / 1e6, 2**18)


@pytest.mark.parametrize(
    ("readings", "energy_j"),
    [
        ([(1, 4_294_900), (1.1, 4_294_960), (1.2, 53)], 0.12),
        ([(1, 262_143_900), (1.1, 262_143_960), (1.2, 20)], 0.12),
        ([(1, 262_144_500), (1.1, 262_144_560), (1.2, 262_144_620)], 0.12),  # the driver counts on
    ],
)
def test_a_wrap_of_32_bits_is_corrected(readings: list[tuple[float, int]], energy_j: float) -> None:
    curve = counter_curve(changes(*readings), 0, "it", RANGES_J)
    assert curve.holes == ()
    assert curve.energy_j[-1] == pytest.approx(energy_j, abs=2e-3)


@pytest.mark.parametrize(("begins_j", "ranges_j"), [(65_535.9, (2.0**16,)), (65_536.1, ())])
def test_a_counter_of_amdgpu_wraps_at_32_bits_unless_it_is_beyond(
    tmp_path: Path, begins_j: float, ranges_j: tuple[float, ...]
) -> None:
    header = look(tree(tmp_path, amd(begins=round(begins_j * 2**16))))
    assert header.counter_ranges_j == ranges_j
    rows = changes((1, 65_535_900), (1.1, 65_535_960), (1.2, 20))
    curve = counter_curve(rows, 0, "it", header.counter_ranges_j)
    assert [hole.reason.code for hole in curve.holes] == ["counter_reset"] * (not ranges_j)
    assert curve.energy_j[-1] == pytest.approx(0.12 if ranges_j else 0.06, abs=1e-3)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EBUSY])
@pytest.mark.parametrize("status", ["suspended", "active"])
def test_a_gpu_that_is_asleep_says_how_to_keep_it_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: str
) -> None:
    sys = tree(tmp_path, amd().having(**{"device/power/runtime_status": f"{status}\n"}))

    def read(path: Path | str) -> bytes:
        if Path(path).name in ("gpu_metrics", "power1_average"):
            raise OSError(code, os.strerror(code), str(path))
        return read_small(path)

    monkeypatch.setattr("lem.meters.hwmon.read_small", read)
    header = look(sys)
    for error in (header.counter_error, header.power_error):
        assert os.strerror(code) in str(error)
        assert ("it is asleep; keep it awake: echo on | sudo tee " in str(error)) is (status == "suspended")
        assert ("device/power/control)" in str(error) or f"{FIRST}/power/control)" in str(error)) is (
            status == "suspended"
        )


@pytest.mark.parametrize(
    ("readings", "ranges_j", "code"),
    [
        ([(1, 4_000_000), (1.1, 4_000_060), (1.2, 50)], RANGES_J, "counter_reset"),  # 295 J in 0.1 s
        ([(1, 4_294_900), (1.1, 4_294_960), (1.2, 53)], (), "counter_reset"),
        ([(1, 200_000_000), (1.1, 200_000_060), (1.2, 50)], RANGES_J, "counter_reset"),
    ],
)
def test_a_fall_that_is_not_a_wrap_is_a_reset(readings: Any, ranges_j: Any, code: str) -> None:
    with pytest.raises(NotMeasured) as why:
        counter_curve(changes(*readings), 0, "it", ranges_j).between_j(Span(S, round(1.15 * S)))
    assert why.value.reason.code == code


@pytest.mark.parametrize(("unread_s", "is_hole"), [(200.0, False), (300.0, True)])
def test_a_counter_that_may_have_wrapped_twice_unread_is_a_hole(unread_s: float, is_hole: bool) -> None:
    """2^18 J last 262 s at 1 kW."""
    rows = changes((1, 100_000_000), (1.1, 100_000_060))
    at_s = 1.1 + unread_s
    rows.append(CounterChange(0, round(1.1 * S), round(at_s * S), 110_000_000))
    rows += changes((at_s + 0.1, 110_000_060))
    codes = [hole.reason.code for hole in counter_curve(rows, 0, "it", RANGES_J).holes]
    assert codes == ["zone_hole"] * is_hole


def test_what_can_be_measured_names_sensors_and_scopes(tmp_path: Path) -> None:
    sys = tree(tmp_path, amd(), second_die(SECOND), acpi("Grace Power Socket 0", interval_ms=50))
    found = find_capabilities("no driver", FakeClock(), roots=Roots(sys=sys, powercap=tmp_path))
    assert [gpu.meter.index for gpu in found.gpus] == [0, 1]
    assert found.gpus[0].describe()[:2] == (
        "energy counter amdgpu gpu_metrics energy_accumulator",
        "power: amdgpu power1_average (an average), limit 500 W",
    )
    assert check_gpu_energy(found).status == "warning"
    (sensor,) = found.to_dict()["sensors"]
    assert sensor == {
        "name": "power_meter Grace Power Socket 0",
        "scope": "cpu_package",
        "sensor": "power_meter Grace Power Socket 0 power1_average",
        "interval_s": 0.05,
        "error": None,
    }
    assert check_sensors(found).message.endswith("(an average, over 0.05 s) covers cpu_package")


def test_an_engine_on_rocm_names_its_gpus_by_pci_address() -> None:
    rocm = SimpleNamespace(uuid="6366", gcnArchName="gfx90a", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    cuda = SimpleNamespace(uuid="8c7a", pci_domain_id=0, pci_bus_id=1, pci_device_id=0)
    gpus = SimpleNamespace(
        device_count=lambda: 2, is_available=lambda: True, get_device_properties=lambda index: (rocm, cuda)[index]
    )
    assert visible_gpus(SimpleNamespace(cuda=gpus)) == ("0000:c1:00.0", "GPU-8c7a")  # type: ignore[arg-type]


@pytest.mark.needs("gcc")
@pytest.mark.parametrize(
    "name", ["hwmon: amdgpu, MI250, both chiplets", "hwmon: server, ACPI power meter, means of 1 s"]
)
def test_every_figure_follows_from_the_samples_and_names_its_sensor(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCRIPT_VARIABLE, "")
    scene = next(row.scene for row in HWMON if row.name == name)
    record = play(scene, tmp_path / "attempt").record
    log, marks = read_finished(tmp_path / "attempt" / FINISHED_FILENAME)
    settings = ExperimentConfig.from_dict({"model": "any", **OPTIONS, **scene.options})
    found = recompute(record, settings, RawData(log, marks))
    assert found.differences == ()
    assert found.compared > 10
    trace = trace_of(log, marks)
    label = "0000:03:00.0 AMD GPU 1002:740c" if name.startswith("hwmon: amdgpu") else "power_meter power_meter.0"
    assert [series.label for series in trace.power] == [label]
    again = decode_record(encode_record(record))
    sensor, scope = again.energy.energy_sensor, again.energy.energy_scope
    if name.startswith("hwmon: amdgpu"):
        assert (sensor, scope) == ("amdgpu gpu_metrics energy_accumulator", "card")
        assert again.energy.why_none("sensor_interval_s").code == "counter_averages_nothing"
    else:
        assert (sensor, scope) == ("power_meter power_meter.0 power1_average", "machine")
        assert again.energy.sensor_interval_s == 1.0
    assert f"({sensor}, which covers: {scope})" in " ".join(render_record(again, width=80).split())
