"""A real sampler reads the NVML double through pynvml, as it would a driver; what the double does is known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from lem.base.launch import own_command
from lem.cli.report import trace_of
from lem.meters.samples import PartReader, SampleLog
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, Events, GpuProcess, GpuTrace, Level, Load, PowerSignal, Ripple, Trace
from tests.processes import wait_for

pytestmark = pytest.mark.needs("gcc")

TIMEOUT_S = 60.0
COMMAND = own_command(sys.executable)
TORCH = Path(__file__).parents[2] / "doubles" / "pulsing_torch"


@pytest.fixture
def double(tmp_path: Path) -> NvmlDouble:
    return NvmlDouble(tmp_path / "nvml")


def sample(
    double: NvmlDouble, trace: Trace, changes: int = 0, *more: str, places: Sequence[int] | None = None
) -> SampleLog:
    """What a sampler logs of the trace until it has seen so many changes of every counter.

    Args:
        places: which GPUs of the trace to sample, in this order; all of them without it.
    """
    double.say(*trace.lines(), *more)
    output = double.script.with_name("samples.part")
    chosen = [trace.gpus[place] for place in (range(len(trace.gpus)) if places is None else places)]
    words = [word for gpu in chosen for word in ("--gpu", gpu.uuid)]
    command = [*COMMAND, "worker", "--sampler", "--output", str(output), *words]
    with subprocess.Popen(command, env=double.environ(), stdin=subprocess.PIPE) as sampler:
        wait_for(lambda: (output.exists() and output.read_bytes().count(b"\n") > 1) or None)
        wait_for(lambda: has_changed(PartReader(output).read(), changes, len(chosen)) or None)
    assert sampler.returncode == 0
    return PartReader(output).read()


def test_the_power_limit_that_is_set_is_logged(double: NvmlDouble, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("1 1 0 did power 250000\n", encoding="ascii")
    log = sample(double, Trace(1, (GpuTrace(uuid="GPU-1", more=(f"settings {settings}", "enforced_limit 200")),)))
    assert [(row.gpu, row.limit_w) for row in log.limits] == [(0, 250.0)]
    assert log.header.gpus[0].settings.power_limit_set_w == 250.0
    assert log.header.gpus[0].power_limit_w == 200.0, "the one in force"


def has_changed(log: SampleLog, changes: int, gpus: int) -> bool:
    return changes == 0 or all(len(changes_of(log, place)) > changes for place in range(gpus))


def changes_of(log: SampleLog, place: int) -> list[tuple[int, int]]:
    return [(row.at_ns, row.energy_mj) for row in log.counters if row.gpu == place]


def test_gpus_keep_their_own_label_in_whatever_order_they_are_sampled(double: NvmlDouble) -> None:
    places = (2, 0)
    gpus = tuple(GpuTrace(uuid=f"GPU-{index}", temp_c=40 + index) for index in range(4))
    log = sample(double, Trace(time.monotonic_ns(), gpus), places=places)
    assert [gpu.label for gpu in log.header.gpus] == [f"GPU {index}" for index in places]
    curves = trace_of(log, ()).temperature
    assert [series.label.partition(f" {log.header.gpus[0].name}")[0] for series in curves] == [
        f"GPU {index}" for index in places
    ]
    assert [series.points[0][1] for series in curves if series.points[0]] == [40 + index for index in places]


def test_every_row_is_what_the_gpu_did_at_that_time(double: NvmlDouble) -> None:
    now_ns = time.monotonic_ns()
    busy = PowerSignal(levels=(Level(0.0, 80.0), Level(2.0, 420.0, 0.3)), ripples=(Ripple(2.0, 60.0, 40.0, 10.0),))
    first = GpuTrace(
        uuid="GPU-first",
        signal=busy,
        counter=Counter(period_s=0.04),
        temp_c=47,
        events=(Events(-10.0, 600.0, 0x4),),
        sm_clocks_mhz=((0.0, 1755),),
        utilisation_percent=((0.0, 63),),
        memory_used_b=3_000_000_000,
        processes=(GpuProcess(4711), GpuProcess(12)),
        power_limit_w=650.0,
    )
    second = GpuTrace(uuid="GPU-second", signal=PowerSignal(levels=(Level(0.0, 111.0),)), counter=Counter(period_s=0.1))
    trace = Trace(now_ns - 2_000_000_000, (first, second))
    log = sample(double, trace, 15)
    for place in range(2):
        rows = changes_of(log, place)
        for (before_ns, _), (_, energy_mj), (after_ns, _) in zip(rows, rows[1:], rows[2:], strict=False):
            assert trace.counter_mj(before_ns, place) <= energy_mj <= trace.counter_mj(after_ns, place)
        assert all(later > earlier for (_, earlier), (_, later) in pairwise(rows))
    seen = [row for row in log.samples if row.gpu == 0]
    assert {(row.temp_c, row.sm_clock_hz, row.util_ratio, row.memory_b, row.event_mask) for row in seen} == {
        (47.0, 1.755e9, 0.63, 3_000_000_000, 0x4)
    }
    assert {row.power_w for row in log.samples if row.gpu == 1} == {111.0}
    assert {row.pids for row in log.processes if row.gpu == 0} == {(12, 4711)}
    assert [gpu.uuid for gpu in log.header.gpus] == ["GPU-first", "GPU-second"]
    assert (log.header.gpus[0].power_limit_w, log.header.gpus[0].power_source) == (650.0, "instant")
    assert log.errors == ()


@pytest.mark.parametrize(
    ("gpu", "more", "found", "words"),
    [
        (GpuTrace(), (), ("gpu", "instant", True), ""),
        (GpuTrace(scope="module"), (), ("module", "instant", True), ""),
        (GpuTrace(mig=True), (), ("gpu", None, False), "whole board"),
        (GpuTrace(), ("fail nvmlDeviceGetFieldValues 13",), ("gpu", "average", True), ""),
        (GpuTrace(), ("lost 0",), ("gpu", None, False), "dmesg"),
    ],
)
def test_what_a_driver_tells_is_in_the_header(
    double: NvmlDouble, gpu: GpuTrace, more: tuple[str, ...], found: tuple[str, str | None, bool], words: str
) -> None:
    trace = Trace(time.monotonic_ns(), (dataclasses.replace(gpu, uuid="GPU-x"),))
    log = sample(double, trace, 0, *more)
    (header,) = log.header.gpus
    assert (header.energy_scope, header.power_source, header.counter_error is None) == found
    assert words in (header.counter_error or "")
    assert bool(log.counters) is found[2]
    assert {row.power_w is not None for row in log.samples} <= {found[1] is not None}


def test_the_gpus_are_listed_with_how_fine_their_counters_are(double: NvmlDouble) -> None:
    gpus = (
        GpuTrace(uuid="GPU-fine", counter=Counter(period_s=0.02), signal=PowerSignal(levels=(Level(0.0, 90.0),))),
        GpuTrace(uuid="GPU-none", counter=None, persistence=False),
    )
    double.say(*Trace(time.monotonic_ns(), gpus).lines())
    document = json.loads(_gpus(double, "--json", "--probe"))["energy"]
    fine, none = document["gpus"]
    assert (fine["energy_source"], none["energy_source"]) == ("nvml_counter", "power_instant_integral")
    assert fine["counter_update_period_s"] >= 0.01
    assert none["counter_update_period_s"] is None
    text = " ".join(_gpus(double).split())
    assert "GPU-fine" in text
    assert "energy counter power: instantaneous" in text
    assert "power is integrated instead" in text
    assert "nvidia-smi -pm 1" in text


def test_a_probe_finds_how_late_a_counter_is_and_later_samplers_know_it(double: NvmlDouble, tmp_path: Path) -> None:
    load_log = tmp_path / "load"
    gpu = GpuTrace(uuid="GPU-x", load=Load(str(load_log), 90.0, 400.0), counter=Counter(period_s=0.05, lag_s=0.1))
    trace = Trace(time.monotonic_ns(), (gpu,))
    double.say(*trace.lines())
    (without,) = json.loads(_gpus(double, "--json", "--probe"))["energy"]["gpus"]
    assert without["counter_lag_s_null_reason_coded"]["code"] == "no_pulses"
    assert "No CUDA GPUs are available" in without["counter_lag_s_null_reason"]
    words = ("--json", "--probe", "--python", sys.executable)
    (found,) = json.loads(_gpus(double, *words, LEMTEST_LOAD_LOG=str(load_log)))["energy"]["gpus"]
    assert found["counter_lag_s"] == pytest.approx(0.1, abs=0.01)
    (listed,) = json.loads(_gpus(double, "--json"))["energy"]["gpus"]
    assert listed["counter_lag_s"] == found["counter_lag_s"]


def test_a_gpu_without_memory_of_its_own_and_one_that_fails_hide_no_other(double: NvmlDouble) -> None:
    unified = GpuTrace(uuid="GPU-unified", more=("fail nvmlDeviceGetMemoryInfo 3",))
    broken, usual = GpuTrace(uuid="GPU-broken", more=("fail * 999",)), GpuTrace(uuid="GPU-usual")
    double.say(*Trace(time.monotonic_ns(), (broken, unified, usual)).lines())
    document = json.loads(_gpus(double, "--json"))
    assert [(gpu["uuid"], gpu["memory_total_b"]) for gpu in document["gpus"]] == [
        ("GPU-unified", None),
        ("GPU-usual", 80_000_000_000),
    ]
    assert document["error"] == "Unknown Error"
    text = _gpus(double)
    assert "GPU-unified  memory shared with the machine" in text
    assert "GPU-usual  1.9 of 74.5 GiB in use" in text


def test_each_second_limit_mean_and_slowdowns_are_read(double: NvmlDouble) -> None:
    now_ns = time.monotonic_ns()
    gpu = GpuTrace(
        uuid="GPU-x",
        signal=PowerSignal(levels=(Level(0.0, 120.0),)),
        events=(Events(0.0, 2.5, 0x40), Events(1.0, 1.5, 0x4)),
        power_limit_w=140.0,
    )
    log = sample(double, Trace(now_ns - 5_000_000_000, (gpu,)))
    assert {(row.limit_w, row.average_w, row.slowed_s) for row in log.seconds} == {(140.0, 120.0, 2.5)}
    assert (log.header.gpus[0].average_source, log.header.gpus[0].counts_slowdowns) == ("field", True)


def _gpus(double: NvmlDouble, *words: str, **variables: str) -> str:
    command = [*COMMAND, "gpus", *words]
    folder = str(double.script.parent)
    usual = {"LEM_LOCK_DIR": folder, "LEM_CACHE_DIR": folder, "PYTHONPATH": str(TORCH)}
    env = {**double.environ(), **usual, **variables}
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout
