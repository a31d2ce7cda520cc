"""The NVML double answers as NVIDIA's library does, asked by NVIDIA's own Python module in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import (
    NS_PER_S,
    Counter,
    Events,
    GpuProcess,
    GpuTrace,
    Level,
    Load,
    Point,
    PowerSignal,
    Ripple,
    Sensor,
    Thermal,
    Trace,
    random_trace,
)

pytestmark = pytest.mark.needs("gcc")


@pytest.fixture
def double(tmp_path):
    return NvmlDouble(tmp_path / "nvml")


def _run(double, program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=double.environ(), capture_output=True, text=True, timeout=60, check=False)


def test_a_line_that_is_not_understood_is_told_and_fails_everything(double):
    double.say("memory_usd 5")
    finished = _run(double, "import pynvml; pynvml.nvmlInit()")
    assert "not understood: memory_usd 5" in finished.stderr
    assert "NVMLError_InvalidArgument" in finished.stderr


@pytest.mark.parametrize(("code", "error"), [(3, None), (999, "Unknown Error")])
def test_only_memory_that_is_not_supported_is_that_of_the_machine(double, code, error):
    double.say(*NvmlDouble.gpu(), f"fail nvmlDeviceGetMemoryInfo {code}")
    program = "from lem.meters.nvml import read_gpus; found = read_gpus(); print(len(found.gpus), found.error)"
    assert _run(double, program).stdout == f"{int(error is None)} {error}\n"


AT_TIMES = """
import json, os, sys
import pynvml

pynvml.nvmlInit()

def ask(function, *arguments):
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        return str(error)

def field(handle, name, kind, scope=0):
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(name, scope)])
    return ask(pynvml._nvmlCheckReturn, value.nvmlReturn) if value.nvmlReturn else getattr(value.value, kind)

def utilisation(handle):
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return rates.gpu

def look(index):
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "counter": ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),
        "energy": ask(field, handle, pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, "ullVal"),
        "instant": ask(field, handle, pynvml.NVML_FI_DEV_POWER_INSTANT, "uiVal"),
        "average": ask(pynvml.nvmlDeviceGetPowerUsage, handle),
        "field_average": ask(field, handle, pynvml.NVML_FI_DEV_POWER_AVERAGE, "uiVal"),
        "temp": ask(pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU),
        "events": ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
        "sm_clock": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "utilisation": ask(utilisation, handle),
        "pids": ask(lambda: [item.pid for item in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]),
    }

looks = []
for now_ns in json.loads(sys.argv[2]):
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(f"now {now_ns}\\n")
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    looks.append([look(index) for index in range(pynvml.nvmlDeviceGetCount())])
json.dump(looks, sys.stdout)
"""


ORIGIN_NS = 7_000 * NS_PER_S
EVERYTHING = PowerSignal(
    points=(Point(1.0, 80.0), Point(2.0, 120.0), Point(2.0, 30.0), Point(9.0, 60.0)),
    levels=(Level(0.5, 90.0), Level(2.0, 400.0, 0.05), Level(5.0, 300.0, 0.0), Level(8.0, 95.0, 1.5)),
    ripples=(Ripple(2.0, 8.0, 40.0, 10.0, 0.3), Ripple(2.5, 7.0, 15.0, 20.0, 1.1)),
)
RICH = GpuTrace(
    uuid="GPU-rich",
    name="NVIDIA H200 NVL",
    signal=EVERYTHING,
    counter=Counter(0.1, 0.03, 0.017, lag_s=0.02, offset_mj=123_456_789_012, gain=1.02, seed=77, resets_s=(6.21,)),
    instant=Sensor(0.025, 0.1, jitter_s=0.01, phase_s=0.03, lag_s=0.015, quantum_w=0.5, noise_w=3.0, seed=5),
    thermal=Thermal(27.0, 0.09, 1.5),
    events=(Events(3.0, 4.0, 0x40), Events(3.5, 6.0, 0x4)),
    sm_clocks_mhz=((0.0, 1980), (3.0, 1410)),
    utilisation_percent=((0.0, 0), (2.0, 97), (8.0, 3)),
    processes=(GpuProcess(11, 5_000), GpuProcess(12, 6_000, 2.0, 8.0)),
    power_limit_w=600.0,
    more=("enforced_limit 550",),
)
COARSE = GpuTrace(
    signal=PowerSignal(points=(Point(0.0, 200.0),)),
    counter=Counter(0.5, resolution_mj=1_000),
    instant=Sensor(0.1, 0.1),
    temp_c=61,
    persistence=False,
)
SCRIPTED = Trace(ORIGIN_NS, (RICH, COARSE))


def _look_at(tmp_path, trace, times_ns):
    now = tmp_path / "now"
    double = NvmlDouble(tmp_path / "nvml", more=(str(now),))
    double.say(*trace.lines())
    finished = _run(double, AT_TIMES, str(now), json.dumps(list(times_ns)))
    assert finished.stderr == ""
    looks: list[list[dict[str, Any]]] = json.loads(finished.stdout)
    return looks


def test_the_library_says_what_its_twin_says_at_every_time(tmp_path):
    times_ns = [ORIGIN_NS + 47_000_001 * number for number in range(-40, 260)]
    for at_ns, looks in zip(times_ns, _look_at(tmp_path, SCRIPTED, times_ns), strict=True):
        for gpu, look in enumerate(looks):
            assert look["counter"] == look["energy"] == SCRIPTED.counter_mj(at_ns, gpu)
            assert look["instant"] == round(1000 * SCRIPTED.instant_w(at_ns, gpu))
            assert look["average"] == look["field_average"] == round(1000 * SCRIPTED.average_w(at_ns, gpu))
            assert look["temp"] == SCRIPTED.temp_c(at_ns, gpu)
            assert look["events"] == SCRIPTED.event_mask(at_ns, gpu)
            assert look["sm_clock"] == SCRIPTED.sm_clock_mhz(at_ns, gpu)
            assert look["utilisation"] == SCRIPTED.utilisation_percent(at_ns, gpu)
            assert look["pids"] == list(SCRIPTED.pids(at_ns, gpu))


@pytest.mark.parametrize("mode", ["closed", "steady"])
def test_the_library_replays_random_traces(tmp_path, mode):
    window = (ORIGIN_NS, ORIGIN_NS + 10 * NS_PER_S)
    times_ns = [ORIGIN_NS + 173_000_001 * number for number in range(-40, 100)]
    for seed in range(3):
        trace = random_trace(seed, 0.1, with_window=window, mode=mode)
        for at_ns, (look,) in zip(times_ns, _look_at(tmp_path, trace, times_ns), strict=True):
            assert look["counter"] == trace.counter_mj(at_ns)
            assert look["instant"] == round(1000 * trace.instant_w(at_ns))
            assert look["temp"] == trace.temp_c(at_ns)


def test_the_library_follows_the_log_of_an_engine(tmp_path):
    states = [(0.2, 0), (1.0, 1), (1.02, 1), (2.5, 0.4), (2.6, 0), (4.0, 1), (7.0, 0)]
    text = "".join(f"{ORIGIN_NS + round(at * NS_PER_S)} {state}\n" for at, state in states)
    log = tmp_path / "load"
    load = Load(str(log), 85.0, 410.0, 0.05, 0.3, ripples=((30.0, 10.0, 0.2), (12.0, 20.0, 0.0)), events=0x4)
    trace = Trace(ORIGIN_NS, (GpuTrace(load=load, counter=Counter(0.1, 0.02, seed=3), thermal=Thermal(tau_s=0.3)),))
    log.write_text(f"{text}{ORIGIN_NS + 8 * NS_PER_S} 1")  # a line that is still being written
    times_ns = [ORIGIN_NS + 31_000_001 * number for number in range(-10, 290)]
    worked = trace.after_load({0: text})
    for at_ns, (look,) in zip(times_ns, _look_at(tmp_path, trace, times_ns), strict=True):
        assert look["counter"] == worked.counter_mj(at_ns)
        assert look["instant"] == round(1000 * worked.instant_w(at_ns))
        assert look["temp"] == worked.temp_c(at_ns)
        assert look["events"] == worked.event_mask(at_ns)
        assert look["utilisation"] == worked.utilisation_percent(at_ns)
