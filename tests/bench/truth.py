"""Scripted meters × true joules × lem's figure × error or reason.

    python -m tests.bench.truth [WORDS OF A NAME]

Every row is a whole attempt on meters whose joules are known (tests/truth_rig.py). A figure must be within 1 % of the
truth, unless the row says otherwise, or null with the reason that names the cause. A figure in a valid record that is
further off is the one thing that must not be.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base.errors import LemError
from tests.doubles.hwmon import Device, acpi, amd, intel, jetson, second_die, thor
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Sensor
from tests.truth_rig import Course, CsvMeter, Package, Scene, Sensed, play

WITHIN = 0.01
ROOT = Path(__file__).resolve().parents[2]
UUID = "GPU-11111111-2222-3333-4444-555555555555"
OTHER = "GPU-99999999-2222-3333-4444-555555555555"
FROZEN = Counter(period_s=1e9)


@dataclass(frozen=True)
class Row:
    name: str
    scene: Scene
    # How far the figure may be from the truth; None where it must be null.
    within: float | None = WITHIN
    reasons: tuple[str, ...] = ()  # the code of the null reason, or of an invalid record: one of these
    warnings: tuple[str, ...] = ()  # codes that the record must have


@dataclass(frozen=True)
class Result:
    name: str
    true_j: float
    found_j: float | None
    source: str | None
    is_valid: bool
    codes: tuple[str, ...]  # of the null reason, or of what makes it invalid
    reason: str
    warnings: tuple[str, ...]

    @property
    def error(self) -> float | None:
        return None if self.found_j is None else self.found_j / self.true_j - 1

    def verdict(self, row: Row) -> str:
        """`` when it is as it must be, else what is wrong with it."""
        missing = set(row.warnings) - set(self.warnings)
        if self.error is None or not self.is_valid:
            if row.within is not None:
                return "MUST GIVE A NUMBER"
            return "" if set(self.codes) & set(row.reasons) else "WRONG REASON"
        if row.within is None:
            return "MUST BE NULL"
        if abs(self.error) > row.within:
            return "VALID AND WRONG"
        return f"NO WARNING {', '.join(sorted(missing))}" if missing else ""


# Meters of the CPU: 68 W at work, 12 W at rest, a reading each second.
_POWER = Course(12.0, 68.0)
_UJ = 1_000_000


def _cpu(*packages: Package, **options: object) -> Scene:
    return Scene(
        packages=packages, options={"warmup": {"enabled": False}, "measurement": {"energy": "rapl"}, **options}
    )


def _package(**changes: object) -> Package:
    return dataclasses.replace(Package("intel-rapl:0", "package-0", _POWER, limit_w=205.0), **changes)  # type: ignore[arg-type]


def _second(**changes: object) -> Package:
    return _package(**{"folder": "intel-rapl:1", "name": "package-1", "begins_uj": 9_000_000_000, **changes})


def _dram(folder: str, watts: float = 8.0, **changes: object) -> Package:
    usual = {"folder": folder, "name": "dram", "course": Course(watts / 2, watts), "begins_uj": 1_000_000_000}
    return _package(**{**usual, **changes})


def _dies(watts: Sequence[float], begins_uj: Sequence[int], is_counted: Sequence[bool]) -> tuple[Package, ...]:
    return tuple(
        _package(
            folder=f"intel-rapl:{die}",
            name=f"package-0-die-{die}",
            course=Course(12.0, power_w),
            begins_uj=begin_uj,
            is_counted=is_own,
        )
        for die, (power_w, begin_uj, is_own) in enumerate(zip(watts, begins_uj, is_counted, strict=True))
    )


def _backwards(since_s: float, energy_uj: int) -> int:
    """For a second it reads what it read long ago."""
    return energy_uj - 70 * _UJ if 4.0 <= since_s < 5.0 else energy_uj


def _glitch(since_s: float, energy_uj: int) -> int:
    return energy_uj + 20_000 * _UJ if 4.0 <= since_s < 5.0 else energy_uj


def _reset(since_s: float, energy_uj: int) -> int:
    return energy_uj if since_s < 5.0 else max(0, energy_uj - 5_400 * _UJ)


def _wraps_elsewhere(since_s: float, energy_uj: int) -> int:
    """At 2^35 µJ, whatever max_energy_range_uj says."""
    return energy_uj % (1 << 35)


def _wraps_far(_since_s: float, energy_uj: int) -> int:
    return energy_uj % (1 << 37)


def _still(_since_s: float, _energy_uj: int) -> int:
    return 7_000_000_000


def _stops(since_s: float, energy_uj: int) -> int | None:
    return energy_uj if since_s < 5.0 else None


_held: dict[str, int] = {}


def _freezes(since_s: float, energy_uj: int) -> int:
    """From the middle of the window on it stays as it is."""
    if since_s < 5.0:
        _held["at"] = energy_uj
    return _held["at"]


RAPL = (
    Row("rapl, one package", _cpu(_package())),
    Row(
        "rapl, two packages and their memory",
        _cpu(_package(), _dram("intel-rapl:0:0"), _second(), _dram("intel-rapl:1:0", 9.0)),
    ),
    Row("rapl, real wrap in the window", _cpu(_package(begins_uj=65_532_610_987 - 450 * _UJ))),
    Row("rapl, backwards for a second", _cpu(_package(reading=_backwards)), None, ("zone_fell",)),
    Row("rapl, forwards for a second", _cpu(_package(reading=_glitch)), None, ("zone_leapt", "zone_fell")),
    Row("rapl, reset in the window", _cpu(_package(reading=_reset)), None, ("zone_fell",)),
    Row(
        "rapl, wraps elsewhere",
        _cpu(_package(begins_uj=(1 << 35) - 450 * _UJ, reading=_wraps_elsewhere)),
        None,
        ("zone_fell",),
    ),
    Row(
        "rapl, wraps far above its range",
        _cpu(_package(begins_uj=(1 << 37) - 450 * _UJ, max_uj=1 << 40, reading=_wraps_far, range_uj=1 << 36)),
        None,
        ("zone_fell",),
    ),
    Row("rapl, never changes", _cpu(_package(reading=_still)), None, ("zone_still",)),
    Row("rapl, freezes in the window", _cpu(_package(reading=_freezes)), None, ("zone_still",)),
    Row("rapl, one of two packages frozen", _cpu(_package(), _second(reading=_still)), None, ("zone_still",)),
    Row("rapl, one of two stops in the middle", _cpu(_package(), _second(reading=_stops)), None, ("read_early",)),
    Row(
        "rapl, 1500 W and a range of 1080 J",
        _cpu(_package(course=Course(300.0, 1500.0), limit_w=1500.0, max_uj=1_080 * _UJ, begins_uj=0)),
        None,
        ("zone_hole",),
    ),
    Row("rapl, 1500 W", _cpu(_package(course=Course(300.0, 1500.0), limit_w=1500.0))),
    Row("rapl, four dies with one counter", _cpu(*_dies([68.0] * 4, [5_000_000_000] * 4, [True, False, False, False]))),
    Row("rapl, two dies that differ", _cpu(*_dies([90.0, 60.0], [5_000_000_000] * 2, [True, True]))),
    Row(
        "rapl, two sockets of two mirrored dies",
        _cpu(
            *_dies([68.0] * 2, [5_000_000_000] * 2, [True, False]),
            *(
                dataclasses.replace(it, folder=f"intel-rapl:{2 + place}", name=f"package-1-die-{place}")
                for place, it in enumerate(_dies([55.0] * 2, [8_000_000_000] * 2, [True, False]))
            ),
        ),
    ),
    Row(
        "rapl, unreadable, with a readable mmio twin",
        _cpu(_package(reading=lambda *_: None, is_counted=False), _package(folder="intel-rapl-mmio:0")),
    ),
    Row("rapl, readable, with an mmio twin", _cpu(_package(), _package(folder="intel-rapl-mmio:0", is_counted=False))),
    Row("rapl, two zones of one name", _cpu(_package(), _second(name="package-0"))),
    Row("rapl, memory of one of two packages", _cpu(_package(), _dram("intel-rapl:0:0", is_counted=False), _second())),
    Row("rapl, memory that never changes", _cpu(_package(), _dram("intel-rapl:0:0", is_counted=False, reading=_still))),
)


def _xe() -> Device:
    """The package draws 0.8 of the card, and both have counters."""
    device = intel(driver="xe", files={"energy1_input": 1.0, "energy2_input": 0.8})
    return device.having(energy1_label="card\n", energy2_label="pkg\n")


def _gpu(**changes: object) -> GpuTrace:
    usual = GpuTrace(uuid=UUID, load=Load("", 90.0, 410.0, 0.01, 0.01), counter=Counter(period_s=0.1, phase_s=0.03))
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def _on(*gpus: GpuTrace, **changes: object) -> Scene:
    return dataclasses.replace(Scene(gpus=gpus), **changes)  # type: ignore[arg-type]


def _boosted(_at_s: float) -> tuple[str, ...]:
    """Dynamic Boost raises the limit in force, and not the one that is set."""
    return ("gpu 0", "enforced_limit 140")


def _blink(at_s: float) -> tuple[str, ...]:
    """20 ms of hardware thermal slowdown, between two samples, which are taken every 100 ms."""
    since_s = math.floor(at_s) + 5.035
    return ("gpu 0", f"events {since_s!r} {since_s + 0.02!r} 0x40")


_BURSTS = Load("", 90.0, 250.0, 0.0, 0.0, ripples=((160.0, 10.0, 1.6),))
_LAPTOP = Load("", 20.0, 139.5, 0.01, 0.01)

GPU = (
    *(
        Row(f"nvml, counter of {period_s:g} s", _on(_gpu(counter=Counter(period_s=period_s, phase_s=period_s / 3))))
        for period_s in (0.02, 0.1, 0.5, 1.0)
    ),
    Row("nvml, counter 50 ms behind", _on(_gpu(counter=Counter(period_s=0.1, lag_s=0.05)))),
    Row("nvml, counter 100 ms behind", _on(_gpu(counter=Counter(period_s=0.1, lag_s=0.1)))),
    Row("nvml, unified memory", _on(_gpu(more=("fail nvmlDeviceGetMemoryInfo 3",)))),
    Row("nvml, capability cannot be asked", _on(_gpu(more=("fail nvmlDeviceGetCudaComputeCapability 999",)))),
    Row("nvml, beside a GPU that fails", _on(_gpu(uuid=OTHER, more=("fail * 999",)), _gpu(), in_use=(1,))),
    Row("nvml, limit boosted in the window", _on(_gpu(load=_LAPTOP, power_limit_w=115.0), at_window=_boosted)),
    Row("nvml, limit of 0", _on(_gpu(power_limit_w=0.0))),
    Row("nvml, counter frozen, power sampled", _on(_gpu(counter=FROZEN)), 0.05, warnings=("counter_frozen",)),
    Row(
        "nvml, counter frozen, no power",
        _on(_gpu(counter=FROZEN, instant=None, average=None)),
        None,
        ("gpu_unreadable",),
    ),
    Row("nvml, no counter", _on(_gpu(counter=None))),
    Row("nvml, no counter, averages alone", _on(_gpu(counter=None, instant=None))),
    Row(
        "nvml, power at half the counter's rate",
        _on(_gpu(instant=Sensor(gain=0.5), average=Sensor(window_s=1.0, gain=0.5))),
        None,
        ("crosscheck_failed",),
    ),
    Row("nvml, counter at half the power's rate", _on(_gpu(counter=Counter(gain=0.5))), None, ("crosscheck_failed",)),
    Row("nvml, no counter, bursts of 10 Hz", _on(_gpu(counter=None, load=_BURSTS)), None, ("power_disputed",)),
    Row(
        "nvml, driver reloaded in the window",
        _on(_gpu(), at_window=lambda at_s: ("gpu 0", f"reset {at_s + 5.0!r}")),
        None,
        ("counter_reset",),
    ),
    Row("nvml, slowdown between two samples", _on(_gpu(), at_window=_blink), None, ("slowdown_counted",)),
    Row(
        "nvml, slowdown between two samples, violations alone",
        _on(_gpu(more=("fail nvmlDeviceGetFieldValues 13",)), at_window=_blink),
        None,
        ("slowdown_counted",),
    ),
    Row("nvml, above the power limit", _on(_gpu(power_limit_w=200.0)), None, ("above_power_limit",)),
    Row("nvml, MIG", _on(_gpu(mig=True)), None, ("mig_board",)),
)


def _plug(meter: CsvMeter, beside: Scene = Scene(cpu=_POWER), unit: str | None = None) -> Scene:  # noqa: B008
    return dataclasses.replace(beside, csv=meter, options={"measurement": {"external_unit": unit}})


_ON_GPU = Scene(gpus=(_gpu(),))
_ON_CPU = Scene(packages=(_package(),))

EXTERNAL = (
    Row("plug, each second", _plug(CsvMeter())),
    Row("plug, each second, beside a GPU", _plug(CsvMeter(), _ON_GPU)),
    Row("plug, ten times a second, beside a package", _plug(CsvMeter(period_s=0.1), _ON_CPU)),
    Row("plug, means of the last 5 s", _plug(CsvMeter(mean_s=5.0))),
    Row("plug, means of the last 5 s, beside a GPU", _plug(CsvMeter(mean_s=5.0), _ON_GPU)),
    Row("plug, means of 5 s, every 5 s", _plug(CsvMeter(period_s=5.0, mean_s=5.0))),
    Row("plug, clock 2 s ahead", _plug(CsvMeter(ahead_s=2.0)), warnings=("external_corrected",)),
    Row(
        "plug, clock 3 s behind, beside a GPU", _plug(CsvMeter(ahead_s=-3.0), _ON_GPU), warnings=("external_corrected",)
    ),
    Row("plug, clock a minute ahead", _plug(CsvMeter(ahead_s=60.0)), None, ("external_short", "external_unaligned")),
    Row("plug, follows nothing", _plug(CsvMeter(share=0.0, swing_w=40.0), _ON_GPU), None, ("external_unaligned",)),
    Row("plug, a reading every hour", _plug(CsvMeter(period_s=3600.0)), None, ("external_short", "external_few")),
    Row("plug, a reading every 15 s", _plug(CsvMeter(period_s=15.0)), None, ("external_short", "external_few")),
    Row("plug, kilowatts, as its header says", _plug(CsvMeter(header="time,power_kw", factor=1e-3))),
    Row("plug, kilowatts read as watts", _plug(CsvMeter(factor=1e-3), _ON_GPU), None, ("external_below_parts",)),
    Row("plug, no unit", _plug(CsvMeter(header="")), None, ("refused",)),
    Row("plug, unit by option", _plug(CsvMeter(header="", factor=1e3), unit="mW")),
    Row("plug, less than its GPU", _plug(CsvMeter(share=0.5, base_w=1.0), _ON_GPU), None, ("external_below_parts",)),
    Row("plug, less than its CPU", _plug(CsvMeter(share=0.5, base_w=1.0), _ON_CPU), None, ("external_below_parts",)),
    Row("plug, a hole of 8 s", _plug(CsvMeter(hole_s=(3.0, 11.0))), None, ("external_hole",)),
)

_WORK = Course(60.0, 300.0)


def _sensed(
    *devices: Device, work: Course = _WORK, jetson: bool = False, energy: str = "auto", **changes: Any
) -> Scene:
    """Devices of hwmon, the first of which have the joules."""
    counted = changes.pop("counted", len(devices))
    found = tuple(Sensed(device, work, is_counted=place < counted, **changes) for place, device in enumerate(devices))
    options = {"measurement": {"energy": energy}}
    return Scene(sensed=found, is_jetson=jetson, options=options)


_SLOW = Course(12.0, 68.0)
_TILES = intel(files={"energy1_input": 0.5})

HWMON = (
    *(
        Row(f"hwmon: amdgpu, gpu_metrics v{version[0]}.{version[1]}", _sensed(amd(version=version)))
        for version in ((1, 2), (1, 3), (1, 4), (1, 5))
    ),
    Row("hwmon: amdgpu, wrap of 32 bits, 2^16 J", _sensed(amd(begins=2**32 - 3_000 * 2**16, bits=32))),
    Row("hwmon: amdgpu, two cards", _sensed(amd(), amd("0000:83:00.0", version=(1, 5)))),
    Row("hwmon: amdgpu, unknown gpu_metrics v1.9, power1_average", _sensed(amd(version=(1, 9), mean_s=1.0))),
    Row("hwmon: amdgpu, unknown gpu_metrics v1.9, power1_input", _sensed(amd(version=(1, 9), power="power1_input"))),
    Row(
        "hwmon: amdgpu, unknown gpu_metrics v1.9, no power",
        _sensed(amd(version=(1, 9), power="")),
        None,
        ("gpu_unreadable",),
    ),
    Row("hwmon: amdgpu, APU (gpu_metrics v2.3)", _sensed(amd(version=(2, 3))), warnings=("energy_of_module",)),
    Row("hwmon: amdgpu, counter in another unit", _sensed(amd(gain=2.0)), None, ("crosscheck_failed",)),
    Row("hwmon: amdgpu, above its power limit", _sensed(amd(), work=Course(60.0, 700.0)), None, ("above_power_limit",)),
    Row("hwmon: amdgpu, gone for 3 s in the window", _sensed(amd(), absent_s=(3.0, 6.0)), None, ("sampler_starved",)),
    Row(
        "hwmon: amdgpu, no counter, gone for 3 s in the window",
        _sensed(amd(version=(1, 9)), absent_s=(3.0, 6.0)),
        None,
        ("power_hole",),
    ),
    Row("hwmon: amdgpu, gone from 3 s on", _sensed(amd(), absent_s=(3.0, 1e6)), None, ("read_early",)),
    Row("hwmon: amdgpu, driver reloaded in the window", _sensed(amd(), reset_s=5.0), None, ("counter_reset",)),
    Row(
        "hwmon: amdgpu, MI250, both chiplets",
        _sensed(amd(device="0x740c"), second_die("0000:06:00.0"), counted=1),
        warnings=("energy_of_card",),
    ),
    Row("hwmon: amdgpu, MI250, second chiplet alone", _sensed(second_die("0000:06:00.0")), None, ("gpu_unreadable",)),
    Row("hwmon: i915, energy1_input", _sensed(intel())),
    Row("hwmon: i915, beside its tiles", _sensed(intel(), dataclasses.replace(_TILES, driver="i915_gt0"), counted=1)),
    Row("hwmon: xe, card and package", _sensed(_xe())),
    Row("hwmon: i915, wrap at 2^32 µJ", _sensed(intel(begins_uj=2**32 - 3_000 * _UJ, range_uj=2**32))),
    Row(
        "hwmon: i915, wrap of the register, 2^18 J",
        _sensed(intel(begins_uj=2**18 * _UJ - 3_000 * _UJ, range_uj=2**18 * _UJ)),
    ),
    Row("hwmon: i915, driver reloaded in the window", _sensed(intel(), reset_s=5.0), None, ("counter_reset",)),
    Row("hwmon: Jetson, VDD_IN of an INA3221", _sensed(jetson(), work=_SLOW), warnings=("energy_of_module",)),
    Row("hwmon: Jetson, VDD_IN on channel 2", _sensed(jetson(channel=2, volts=19.0), work=_SLOW)),
    Row("hwmon: Jetson, another label", _sensed(jetson("VDD_GPU_SOC"), work=_SLOW), None, ("sampler_reports",)),
    Row("hwmon: Jetson Thor, INA238", _sensed(thor(), work=_SLOW, jetson=True)),
    Row("hwmon: an INA238 that is not a Jetson's", _sensed(thor(), work=_SLOW), None, ("sampler_reports",)),
    Row(
        "hwmon: Grace, two sockets with their rails",
        _sensed(
            acpi("Grace Power Socket 0", interval_ms=50),
            acpi("Grace Power Socket 1", interval_ms=50),
            *(acpi(f"{name} Power Socket 0", interval_ms=50) for name in ("CPU", "SysIO", "Module")),
            counted=2,
        ),
    ),
    Row("hwmon: server, ACPI power meter, means of 1 s", _sensed(acpi()), warnings=("energy_of_machine",)),
    Row("hwmon: server, ACPI power meter, means of 5 s", _sensed(acpi(interval_ms=5000))),
    Row(
        "hwmon: server, ACPI power meter, means of 60 s", _sensed(acpi(interval_ms=60_000)), None, ("sampler_reports",)
    ),
    Row("hwmon: server, two ACPI power meters", _sensed(acpi(), acpi()), None, ("sampler_reports",)),
    Row(
        "hwmon: server, ACPI power meter, beside RAPL, energy: hwmon",
        dataclasses.replace(_sensed(acpi(), energy="hwmon"), packages=(_package(),)),
    ),
    Row("hwmon: none, energy: hwmon", Scene(options={"measurement": {"energy": "hwmon"}}), None, ("refused",)),
)

ROWS = (*RAPL, *GPU, *EXTERNAL, *HWMON)


def run(row: Row, folder: Path) -> Result:
    try:
        outcome = play(row.scene, folder)
    except LemError as error:
        return Result(row.name, 0.0, None, None, False, ("refused",), error.message, ())
    record, energy = outcome.record, outcome.record.energy
    found = energy.measured("external_energy_j") if row.scene.csv is not None else energy.primary_j
    reasons = record.validity.invalid_reasons
    if found.value is None:
        assert found.null_reason is not None
        reasons = (found.null_reason, *reasons)
    return Result(
        row.name,
        outcome.true_j,
        found.value,
        energy.energy_source,
        record.validity.valid,
        tuple(reason.code for reason in reasons),
        "; ".join(reason.text for reason in reasons),
        tuple(warning.code for warning in record.validity.warnings),
    )


def results(words: str = "") -> list[Result]:
    """The results of the rows whose name has these words, from a process that sees the NVML double."""
    with tempfile.TemporaryDirectory() as folder:
        double = NvmlDouble(Path(folder) / "nvml")
        command = [sys.executable, "-m", "tests.bench.truth", "--json", words]
        finished = subprocess.run(command, env=double.environ(), cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return [
        Result(**{**item, "codes": tuple(item["codes"]), "warnings": tuple(item["warnings"])})
        for item in map(json.loads, finished.stdout.splitlines())
    ]


def _print_json(words: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(ROWS):
            if words in row.name:
                print(json.dumps(dataclasses.asdict(run(row, Path(folder) / str(number)))), flush=True)
    return 0


def main(arguments: Sequence[str]) -> int:
    """0; 1 when a row is not as it must be."""
    if arguments[:1] == ["--json"]:
        return _print_json(arguments[1])
    rows = {row.name: row for row in ROWS}
    numbers = nulls = wrong = 0
    print(f"{'meter':<58}{'true J':>10}{'lem J':>10}{'error':>9}  reason")
    for result in results(" ".join(arguments)):
        verdict = result.verdict(rows[result.name])
        is_number = result.error is not None and result.is_valid
        numbers, nulls, wrong = numbers + is_number, nulls + (not is_number), wrong + bool(verdict)
        found = "–" if result.found_j is None else f"{result.found_j:.1f}"
        error = "–" if result.error is None else f"{result.error:+.2%}"
        print(f"{result.name:<58}{result.true_j:>10.1f}{found:>10}{error:>9}  {verdict or result.reason}", flush=True)
    print(f"{numbers} give a number, {nulls} are null or invalid with a reason, {wrong} are not as they must be")
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    raise SystemExit(main(sys.argv[1:]))
